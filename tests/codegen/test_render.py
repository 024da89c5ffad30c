"""The generated text: deterministic, self-contained, readable, and linear in memory."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import linecache
import os
import re
import subprocess
import sys
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch

import attncc as ac
from attncc.codegen.module import load_source
from attncc.codegen.plan import Plan
from attncc.codegen.render import render
from attncc.codegen.standalone import standalone
from attncc.errors import UnsupportedError
from attncc.ir.text import formula, to_text
from attncc.runtime import interpreter
from attncc.runtime.verify import eager
from attncc.schedule import KernelSchedule, Schedule, device_for

NAMES = ac.variants.names()
#: characters of a line, unless the user's own formula takes more
WIDEST = 280
SMALL = KernelSchedule(16, 16, 4, 1)


@cache
def plan(name):
    return Plan(ac.variants.get(name).graph)


@cache
def source(name, d_qk=64, d_v=64):
    return render(plan(name), d_qk, d_v, True)


def functions(text):
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_tidy_python(name):
    text = source(name)
    compile(text, name, "exec")
    lines = text.split("\n")
    assert [line for line in lines if line != line.rstrip()] == []
    longest = max(len(formula(stage.expr)) for stage in plan(name).graph.stages)
    assert max(map(len, lines)) <= max(WIDEST, 2 * longest)
    assert "\n\n\n\n" not in text
    assert "{{" not in text
    assert "{%" not in text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sigmoid", "_logistic_of_pairs(product - (s * scale_log2), FAST_MATH)"),
        ("sigmoid", "ds = dp * (1 - p) * p"),
        ("softcap", "ds = (1 - (tanh * tanh)) * (dp - delta[None, :]) * p"),
        ("unnormalized_sigmoid", "scale_log2 = -1.4426950408889634 * scale"),
    ],
)
def test_no_pair_is_negated_for_a_difference(name, text):
    assert text in source(name)


def test_a_logarithm_of_pairs_is_one_instruction():
    powers = ac.Variant(
        name="powers",
        score=lambda score: ac.log(1 + ac.abs(score)) + ac.abs(score) ** 0.3,
        normalizer=lambda score, row: ac.softplus(score) / row.sum(ac.softplus(score)),
    )
    text = render(Plan(powers.graph), 64, 64, True)
    assert {"_log", "_log2", "_softplus"} <= functions(text).keys()
    for kernel in ("forward_kernel", "dkdv_kernel", "dq_kernel"):
        own = ast.unparse(functions(text)[kernel])
        assert re.search(r" _log\(.*, FAST_MATH\)", own)
        assert re.search(r" _log2\(.*, FAST_MATH\)", own)
    assert "tl.log(row_sum_0)" in text  # a row has one, which may as well be exact


@pytest.mark.parametrize("name", NAMES)
def test_the_header_has_the_formula_and_its_proof(name):
    header = ast.get_docstring(ast.parse(source(name)))
    lines = {line.strip() for line in header.splitlines()}
    assert {line.strip() for line in to_text(plan(name).graph).splitlines()} <= lines
    assert {line for part in plan(name).parts for line in part.online.proof} <= lines
    assert f"'{name}', head dimensions 64 and 64" in header


@pytest.mark.parametrize("name", NAMES)
def test_every_function_is_used(name):
    """Helpers, summaries and host functions are there only where something calls them."""
    found = functions(source(name))
    used = {node.id for node in ast.walk(ast.parse(source(name))) if isinstance(node, ast.Name)}
    assert set(found) - used == {"forward", "backward"}


def test_lines_of_the_shelf_are_short_enough_to_read():
    assert [n for n in NAMES if max(map(len, source(n).split("\n"))) > WIDEST] == ["t5_bias", "gmm", "afa"]


def test_helpers_come_with_what_calls_them():
    assert "tanh" not in source("causal").split('"""')[2]
    assert any("tanh" in name for name in functions(source("softcap")))
    assert "bounds_kv_kernel" in functions(source("document"))
    assert "bounds_kv_kernel" not in functions(source("causal"))
    assert "delta_kernel" in functions(source("causal"))
    assert "delta_kernel" not in functions(source("sigmoid"))
    assert "dkdv_kernel" not in functions(render(plan("causal"), 64, 64, False))


#: an input of theirs has a row for each query and a column for each key, or each distance to one
PAIRWISE = ("dense_bias", "transformer_xl")


@pytest.mark.parametrize("name", [n for n in NAMES if n not in PAIRWISE])
def test_no_tensor_has_a_row_for_each_query_and_a_column_for_each_key(name):
    """Every allocation of the host code, by the sizes in it."""
    host = [f for n, f in functions(source(name)).items() if not n.endswith("_kernel")]
    calls = [
        node
        for function in host
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1].removeprefix("new_")
        in ("empty", "zeros", "ones", "full", "empty_like")
    ]
    assert calls
    for call in calls:
        text = ast.unparse(call)
        by_query = re.search(r"\bq_len\b|q\.shape\[2\]", text)
        by_key = re.search(r"\bkv_len\b|[kv]\.shape\[2\]", text)
        assert not (by_query and by_key), text


SCRIPT = """
import hashlib, json, sys
import attncc as ac
from attncc.errors import UnsupportedError
from attncc.codegen.plan import Plan
from attncc.codegen.render import render
names = json.loads(sys.argv[1])
texts = {n: render(Plan(ac.variants.get(n).graph), 96, 64, True) for n in names}
print(json.dumps({n: hashlib.sha256(t.encode()).hexdigest() for n, t in texts.items()}))
"""


def test_two_processes_generate_the_same_text():
    names = json.dumps(["gemma2_local", "prefix_lm", "document", "t5_bias", "sink", "cog"])
    found = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run([sys.executable, "-c", SCRIPT, names], env=env, capture_output=True, text=True, check=True)
        found.append(json.loads(run.stdout))
    here = {n: hashlib.sha256(source(n, 96, 64).encode()).hexdigest() for n in json.loads(names)}
    assert found == [here, here]


def test_loaded_text_is_found_by_tracebacks_and_kept_apart():
    module = load_source(source("causal"), "causal")
    other = load_source(source("softcap"), "causal")
    assert module.__file__ != other.__file__
    linecache.checkcache()
    assert linecache.getline(module.__file__, 1).startswith('"""Attention kernels for')


def file_of(name, folder):
    path = folder / f"{name}_kernel.py"
    schedule = Schedule(SMALL, SMALL, SMALL)
    path.write_text(standalone(plan(name), 16, 16, schedule, "fp32", device_for("h100")))
    return path


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] != "attncc", name

sys.meta_path.insert(0, Blocked())
import importlib.util
spec = importlib.util.spec_from_file_location("kernel", sys.argv[1])
kernel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
assert "attncc" not in sys.modules
import torch
try:
    kernel.attention(*torch.zeros(3, 1, 1, 4, 16), slopes=torch.zeros(1))
except ValueError as error:
    print(error)
"""


def test_a_standalone_file_needs_torch_and_triton_alone(tmp_path):
    path = file_of("alibi", tmp_path)
    imported = {
        alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert imported == {"torch", "triton", "triton.language"}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(ast.parse(path.read_text())))
    run = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(path)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "must be on one GPU" in run.stdout


@pytest.mark.parametrize("name", ["sink", "base"])  # `base` is a name of the code's own
def test_a_standalone_file_computes_the_variant_and_its_gradients_on_a_cpu(tmp_path, name):
    text = "exp(score - row.max(score)) / (row.sum(exp(score - row.max(score))) + exp({0}[h] - row.max(score)))"
    variant = ac.loads_toml(
        f'[stages]\nnormalizer = "{text.format(name)}"\n[inputs]\n{name} = {{ index = ["h"], grad = true }}'
    )
    path = tmp_path / "kernel.py"
    schedule = Schedule(SMALL, SMALL, SMALL)
    path.write_text(standalone(Plan(variant.graph), 16, 16, schedule, "fp32", device_for("h100")))
    spec = importlib.util.spec_from_file_location("interpreted_kernel", path)
    kernel = importlib.util.module_from_spec(spec)
    with interpreter.decorating():
        spec.loader.exec_module(kernel)
    leaves = [x.requires_grad_() for x in (*torch.randn(3, 1, 2, 9, 16), torch.tensor([0.5, -1.0]))]

    def results(attend, **more):
        out, lse = attend(*leaves[:3], **{name: leaves[3]}, **more)
        return out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)

    with interpreter.interpreting():
        found = results(kernel.attention, return_lse=True)
    expected = results(partial(eager, variant), outputs=("out", "lse"))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    with pytest.raises(ValueError, match=rf"{name} \(3,\) does not fit its pattern \(h=2\)"):
        kernel.attention(*leaves[:3], **{name: torch.zeros(3)})
    with pytest.raises(ValueError, match=f"{name} must be on cpu, and of floats"):
        kernel.attention(*leaves[:3], **{name: torch.zeros(2, dtype=torch.int32)})


@pytest.mark.parametrize(("name", "backend"), [("alibi", "gluon"), ("sliding_window", "triton"), ("mla", "triton")])
def test_the_top_of_a_standalone_file_says_what_to_call(name, backend):
    schedule = Schedule(*(KernelSchedule(64, 128, 8, 2, backend=b) for b in (backend, backend, "triton")))
    tree = ast.parse(standalone(plan(name), 128, 128, schedule, "bf16", device_for("h100")))
    called = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "attention")
    assert f"Call `attention({ast.unparse(called.args)})`" in ast.get_docstring(tree)


def test_a_file_of_gluon_refuses_gpus_that_it_is_not_for():
    schedule = Schedule(*(KernelSchedule(64, 128, 8, 2, backend=b) for b in ("gluon", "gluon", "triton")))
    text = standalone(plan("causal"), 128, 128, schedule, "bf16", device_for("h100"))
    check = text[text.index("def _check(") :].partition("\n\n\n")[0]
    names = {"torch": SimpleNamespace(cuda=SimpleNamespace(get_device_capability=lambda device: (8, 0)))}
    exec(check, names)
    x = SimpleNamespace(device="cuda:0", dtype="bf16", is_cuda=True)
    with pytest.raises(ValueError, match="Gluon are for Hopper GPUs"):
        names["_check"](x, x, x)
    assert "Hopper" not in standalone(
        plan("causal"), 128, 128, Schedule(SMALL, SMALL, SMALL), "bf16", device_for("h100")
    )


def test_a_standalone_file_says_why_it_has_no_backward(monkeypatch):
    def refuse(*_):
        raise UnsupportedError("nobody knows its derivative")

    monkeypatch.setattr("attncc.codegen.plan.differentiate", refuse)
    graph = ac.variants.get("causal").graph
    text = standalone(Plan(graph), 16, 16, Schedule(SMALL, SMALL, SMALL), "fp32", device_for("h100"))
    compile(text, "kernel", "exec")
    assert "raise NotImplementedError(" in text
    assert "nobody knows its derivative" in text


def test_a_standalone_file_fixes_the_order_of_sums_where_pytorch_asks_for_it():
    tiling = KernelSchedule(64, 128, 8, 2, "gluon")
    text = standalone(plan("causal"), 128, 128, Schedule(SMALL, tiling, SMALL), "bf16", device_for("h100"))
    assert '"ORDERED": True' in text.split("torch.are_deterministic_algorithms_enabled()")[1]
    assert 'ordered = meta["ORDERED"]' in text


def test_the_formulas_stand_where_they_are_computed():
    text = source("softcap")
    graph = plan("softcap").graph
    for stage in ("score", "mask"):
        assert text.count(formula(graph[stage].expr)) > 1  # in the header, and at least once in a kernel


def test_two_elements_of_a_tile_share_a_division_and_those_of_a_row_do_not():
    gate = ac.Variant(
        name="gate",
        inputs={"g": ac.Input("b", "h", "q_idx")},
        score=lambda score, b, h, q_idx, g: score * ac.sigmoid(g[b, h, q_idx]),
    )
    assert "_logistic(" in render(Plan(gate.graph), 64, 64, True)
    assert "_logistic_of_pairs(" not in render(Plan(gate.graph), 64, 64, True)
    assert "_logistic_of_pairs(" in source("sigmoid")
    assert "_logistic(" not in source("sigmoid")


def test_what_has_the_sign_of_a_score_is_one_product_and_its_negative():
    weighed = "exp(-(abs(score) + 0.01) ** 1.5)"
    text = f'[stages]\nscore = "score"\nmask = "True"\nnormalizer = "{weighed} / row.sum({weighed})"'
    dkdv = functions(render(Plan(ac.loads_toml(text).graph), 64, 64, True))["dkdv_kernel"]
    ds = next(a for a in ast.walk(dkdv) if isinstance(a, ast.Assign) and ast.unparse(a.targets[0]) == "ds")
    above, below = re.search(r", (\w+), tl.where\(.*, (.*), 0\)\)$", ast.unparse(ds.value)).groups()
    assert below == f"-{above}"
