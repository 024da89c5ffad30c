"""A user's input or scalar may be called what generated code calls something of its own."""

from __future__ import annotations

import ast
import re

import pytest
import torch

import attncc as ac
from attncc import variants
from attncc.codegen import crosscompile
from attncc.codegen.module import load_source
from attncc.codegen.names import coded, taken
from attncc.codegen.plan import Plan
from attncc.codegen.render import render
from attncc.codegen.similarity import SimilaritySlots
from attncc.codegen.standalone import standalone
from attncc.codegen.texts import HINTS
from attncc.language.stages import cannot_name
from attncc.language.textform import from_texts
from attncc.runtime.reference import reference
from attncc.schedule import KernelSchedule, Schedule, device_for

#: values that the lowering names itself, where no leaf has the name
_FRESH = {*HINTS.values(), "holds", "product", "shifted", "value", "scale_log2", "q_pos"}
_UNUSUAL = from_texts(
    mask="h < 2 and (q_idx // 3) % 2 == kv_idx % 2 or kv_idx < q_idx and (q_idx + kv_idx > 3 or kv_idx < 5)",
    score="gelu(score) + silu(score) * abs(score)",
    normalizer="p = exp(score - row.max(score)) * (1 + sigmoid(score))\np / row.sum(p)",
)


@pytest.mark.parametrize("backend", ["triton", "gluon"])
@pytest.mark.parametrize("name", [*variants.names(), "unusual"])
def test_every_name_of_generated_code_is_known(name, backend):
    graph = (_UNUSUAL if name == "unusual" else variants.get(name)).graph
    plan = Plan(graph)
    own = [d.name for d in plan.graph.inputs] + [s.name for s in graph.scalars] + sorted(plan.similarity.own)
    other = plan.only_triton or graph.value is not None
    if backend == "gluon" and (other or not SimilaritySlots(plan).plain_dot):
        pytest.skip("Gluon kernels have scores that are made of the product of q and k, and one pass over the keys")
    tree = ast.parse(render(plan, 96, 80, plan.has_backward is None, forward_in=backend))
    found = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
        n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)
    }
    for identifier in found:
        if any(o in identifier or o.upper() in identifier for o in own):
            continue
        base = re.sub(r"(_f)?(_\d+)*(_f)?(_kernel|_new)?$", "", identifier.replace("_gl_", "_").removesuffix("_PTR"))
        known = taken(identifier) or cannot_name(identifier) or taken(base) or cannot_name(base) or base in _FRESH
        known = known or cannot_name(base.lower()) or taken(base.lower())
        assert known or base.lower().startswith(("row_", "col_mean", "summary_", "bounds_", "q_terms", "k_terms")), (
            identifier
        )


@pytest.mark.parametrize("name", ["tile", "i", "phase", "meta", "k_0", "alpha", "s", "ds", "live_begin", "total"])
def test_a_scalar(name):
    variant = ac.loads_toml(
        f'[stages]\nscore = "score * {name} + other * kv_idx"\n[scalars]\n{name} = 0.3\nother = 0.1'
    )
    agree(variant)


@pytest.mark.parametrize(
    "name", ["heads", "group", "grad", "batch", "bounds", "wanted", "dq", "options", "x", "m_blocks"]
)
def test_an_input(name):
    variant = ac.loads_toml(
        f'[stages]\nscore = "score * {name}[h] + heads2[kv_idx] * s"\nmask = "kv_idx <= q_idx"\n'
        f'[inputs]\n{name} = {{ index = ["h"], grad = true }}\nheads2 = {{ index = ["kv_idx"], grad = true }}\n'
        "[scalars]\ns = 0.5"
    )
    agree(variant, **{name: torch.randn(2), "heads2": torch.randn(21)})


def test_inputs_that_differ_in_case_alone():
    """Pointers are parameters of kernels in upper case: both were W_PTR, and the module did not load."""
    variant = ac.loads_toml(
        '[stages]\nscore = "score * w[h] + W[kv_idx] * s"\n[inputs]\nw = { index = ["h"], grad = true }\n'
        'W = { index = ["kv_idx"], grad = true }\n[scalars]\ns = 0.5'
    )
    agree(variant, w=torch.randn(2), W=torch.randn(21))


@pytest.mark.parametrize("name", ["Bias", "bounds"])
def test_a_map_that_is_called_otherwise_in_generated_code(name, monkeypatch):
    """Its descriptor's type is that of the input; `attncc compile` ended in StopIteration."""
    variant = ac.loads_toml(
        f'[stages]\nscore = "score + {name}[b, h, q_idx, kv_idx]"\n'
        f'[inputs]\n{name} = {{ index = ["b", "h", "q_idx", "kv_idx"] }}'
    )
    signatures = []
    monkeypatch.setattr(crosscompile.triton, "compile", lambda source, **options: signatures.append(source.signature))
    monkeypatch.setattr(crosscompile, "resources", lambda name, result, device: None)
    tiling, device = KernelSchedule(64, 32, 4, 2), device_for("sm_90")
    schedule = Schedule(tiling, tiling, tiling, pair=tiling)
    source = standalone(Plan(variant.graph), 32, 32, schedule, "bf16", device)
    crosscompile.cross_compile(
        load_source(source, "maps"), variant.graph, schedule, device, "bf16", only=("dkdv_kernel",)
    )
    (types,) = signatures
    assert [t for p, t in types.items() if p.endswith("_BOXES")] == ["tensordesc<bf16[1, 1, 64, 32]>"]


def agree(variant, **inputs):
    torch.manual_seed(0)
    leaves = {n: torch.randn(1, 2, length, 16) for n, length in (("q", 20), ("k", 21), ("v", 21))} | inputs
    leaves = {n: x.requires_grad_() for n, x in leaves.items()}
    q, k, v = (leaves[n] for n in "qkv")
    results = [f(q, k, v, **inputs) for f in (ac.compile(variant), lambda *a, **i: reference(variant, *a, **i))]
    torch.testing.assert_close(results[0], results[1].float(), rtol=1e-5, atol=1e-6)
    got, want = (torch.autograd.grad(r.sum(), list(leaves.values())) for r in results)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_most_variants_keep_their_names():
    plans = {name: Plan(variants.get(name).graph) for name in variants.names()}
    # the `total` of one and the `tokens` of the other are names of the host's, too
    assert {name for name, plan in plans.items() if coded(plan)[0] is not plan} == {"shared_weights", "meta_tokens"}


def test_a_standalone_module_with_such_a_name_is_python():
    op = ac.compile(ac.loads_toml('[stages]\nscore = "score * meta"\n[scalars]\nmeta = 0.3'))
    assert "num_meta" in op.source(32)
    ast.parse(op.source(32))


def test_such_a_name_has_its_own_type_where_there_is_no_gpu(monkeypatch):
    """Integers are no floats, for a register as for a comparison."""
    variant = ac.loads_toml(
        '[stages]\nscore = "score * meta"\nmask = "batch[b, kv_idx] == batch[b, q_idx] + other"\n'
        '[inputs]\nbatch = { index = ["b", "kv_idx"], dtype = "int" }\n[scalars]\nmeta = 0.3\nother = 1'
    )
    signatures = []
    monkeypatch.setattr(crosscompile.triton, "compile", lambda source, **options: signatures.append(source.signature))
    monkeypatch.setattr(crosscompile, "resources", lambda name, result, device: None)
    tiling = KernelSchedule(64, 64, 4, 2)
    module = load_source(ac.compile(variant).source(32), "names")
    only = ("forward_kernel",)
    crosscompile.cross_compile(
        module, variant.graph, Schedule(tiling, tiling, tiling), device_for("sm_80"), "bf16", only=only
    )
    (types,) = signatures
    assert (types["IN_BATCH_PTR"], types["num_meta"], types["num_other"]) == ("*i32", "fp32", "i32")


def test_a_standalone_file_is_called_by_the_names_of_the_spec():
    variant = ac.loads_toml(
        '[stages]\nscore = "score * meta + grad[h] * results"\n'
        '[inputs]\ngrad = { index = ["h"], grad = true }\n[scalars]\nmeta = 0.3\nresults = 2.0'
    )
    tiling = KernelSchedule(64, 64, 4, 2)
    schedule = Schedule(tiling, tiling, tiling, pair=tiling)
    text = standalone(Plan(variant.graph), 32, 32, schedule, "bf16", device_for("sm_80"))
    (function,) = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "attention")
    # `results` is one of its own names
    assert [a.arg for a in function.args.kwonlyargs] == ["grad", "meta", "num_results", "scale", "return_lse"]
    assert "grad[h]: float, receives a gradient" in ast.get_docstring(function)
    assert "_Attention.apply(scale, (meta, num_results, ), q, k, v, grad)" in text
