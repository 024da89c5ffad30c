"""Split-KV through the interpreter: parts of the keys, merged, beside the float64 reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import attncc as ac
from attncc.errors import UnsupportedError
from attncc.runtime import launch
from attncc.runtime.launch import collect, ghost
from attncc.runtime.modules import Features
from attncc.runtime.operands import Operands
from attncc.runtime.samples import Shape, sample_inputs
from attncc.runtime.shapes import bind
from attncc.runtime.verify import check, eager, verify_variant
from attncc.schedule import KernelSchedule, Schedule

PLAIN = KernelSchedule(32, 32, 1, 1)
#: grouped heads, an odd number of keys, Dqk != Dv, several blocks of rows in the second
ONE_QUERY = Shape(2, 4, 2, 1, 40, 16, 24)
FEW_QUERIES = Shape(1, 6, 2, 6, 37, 24, 16, strided=True)


def softmax_with_sink(score, row, h, sink):
    m = ac.maximum(row.max(score), sink[h])
    p = ac.exp(score - m)
    return p / (row.sum(p) + ac.exp(sink[h] - m))


BY_HEAD = ac.Input("h", dtype="int")
VARIANTS = {
    "sink, bias, softcap": ac.Variant(
        score=ac.softcap(5.0) >> ac.alibi(),
        mask=ac.causal,
        normalizer=softmax_with_sink,
        inputs={"sink": ac.Input("h", grad=True)},
    ),
    "signed weights": ac.Variant(normalizer="cog", mask=ac.causal & ac.window(20, 0) | ac.prefix(7)),
    "no denominator": ac.variants.get("sigmoid"),
    "two branches": ac.variants.get("differential"),
    "documents": ac.variants.get("document"),
    "reach and temperature of a head": ac.Variant(
        score=lambda score, h, heat: score * ac.exp(heat[h]),
        mask=lambda q_idx, kv_idx, q_len, kv_len, h, reach: (
            (kv_idx <= q_idx + kv_len - q_len) & (q_idx + kv_len - q_len - kv_idx < reach[h])
        ),
        inputs={"reach": BY_HEAD, "heat": ac.Input("h")},
    ),
    "a gate of a head, a bias of a pair": ac.Variant(
        score=lambda score, b, h, q_idx, kv_idx, bias: score + bias[b, h, q_idx, kv_idx],
        mask=lambda q_idx, kv_idx, h, on: (on[h] > 20) & (kv_idx >= q_idx),
        inputs={"bias": ac.Input("b", "h", "q_idx", "kv_idx"), "on": BY_HEAD},
    ),
    "documents of a head": ac.Variant(
        mask=lambda h, kv_idx, doc: doc[h, kv_idx] == doc[h, 0], inputs={"doc": ac.Input("h", "kv_idx", dtype="int")}
    ),
    "keys of a head": ac.Variant(
        similarity=lambda q_vec, k_vec, h, w: ac.dot(q_vec, ac.tanh(k_vec * w[h])),
        inputs={"w": ac.Input("h", "d")},
    ),
    "lengths": ac.Variant(
        mask=lambda b, q_idx, kv_idx, q_len, n: kv_idx <= q_idx + n[b] - q_len, inputs={"n": ac.Input("b", dtype="int")}
    ),
    "places of the maxima of two branches": ac.Variant(
        branches=2,
        normalizer=lambda score, row: ac.exp(score - row.max(score)) / (row.sum(ac.exp(score - row.max(score))) + 0.1),
        reduction=lambda weight, row, v_vec: row.sum((weight[0] - 0.4 * weight[1]) * v_vec),
    ),
    "place of a maximum": ac.Variant(normalizer=lambda score, row: score / row.max(ac.abs(score))),
}


def split(variant, splits, block_m=16, block_n=16):
    """The op with its keys in so many parts, whatever the sizes."""
    forward = KernelSchedule(block_m, block_n, 1, 1, splits=splits)
    return ac.compile(variant, schedule=Schedule(forward, PLAIN, PLAIN))


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def failures(variant, op, sample, dtype=torch.float32):
    """What of out, and of lse where there is one, is not as the reference says, or not the same twice."""
    outputs = ("out", "lse") if op.plan.has_lse else ("out",)
    inputs = sample.inputs

    def call(function, *arguments, **named):
        found = function(*arguments, outputs=outputs, **named)
        return found if isinstance(found, tuple) else (found,)

    got, again = (call(op, sample.q, sample.k, sample.v, **inputs) for _ in range(2))
    exact = call(
        lambda *a, **n: ac.reference(variant, *a, **n),
        *map(double, (sample.q, sample.k, sample.v)),
        **{name: double(x) for name, x in inputs.items()},
    )
    plain = call(lambda *a, **n: eager(variant, *a, **n), sample.q, sample.k, sample.v, **inputs)
    rows = [check(*row, dtype=dtype) for row in zip(outputs, got, exact, plain, strict=True)]
    repeated = all(map(torch.equal, got, again))
    return [row for row in rows if not row.ok] + ([] if repeated else ["not the same twice"])


@pytest.mark.parametrize("name", VARIANTS)
def test_parts_merge_to_the_whole(name):
    variant = VARIANTS[name]
    op = split(variant, 3)
    assert not failures(variant, op, sample_inputs(op.graph, FEW_QUERIES, torch.float32))


@pytest.mark.parametrize("splits", [1, 9])
def test_any_number_of_parts_some_of_which_see_nothing(splits):
    variant = VARIANTS["signed weights"]
    op = split(variant, splits, block_m=32)
    assert not failures(variant, op, sample_inputs(op.graph, ONE_QUERY, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit(dtype):
    variant = VARIANTS["sink, bias, softcap"]
    op = split(variant, 3, block_n=32)
    assert not failures(variant, op, sample_inputs(op.graph, ONE_QUERY, dtype), dtype)


@pytest.mark.parametrize("splits", [1, 4])
def test_rows_that_see_no_key_are_zero(splits):
    variant = VARIANTS["lengths"]
    op = split(variant, splits)
    q, k, v = torch.randn(3, 4, 3, 16), torch.randn(3, 2, 40, 16), torch.randn(3, 2, 40, 16)
    n = torch.tensor([0, 2, 40], dtype=torch.int32)  # none, a part of the rows, all keys
    out, lse = op(q, k, v, n=n, outputs=("out", "lse"))
    assert not out[0].any()
    assert (lse[0] == float("-inf")).all()
    assert (lse[1, :, 0] == float("-inf")).all()
    assert lse[1, :, 1:].isfinite().all()
    exact = ac.reference(variant, *map(double, (q, k, v)), n=n)
    assert (out - exact).abs().max() < 1e-5


def test_no_keys_at_all():
    q, k = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 0, 16)
    out, lse = split("causal", 2)(q, k, k, outputs=("out", "lse"))
    assert not out.any()
    assert (lse == float("-inf")).all()


def test_a_view_of_a_longer_cache_and_of_its_layout():
    op = split("causal", 3)
    cache = torch.full((2, 100, 2, 2, 16), float("nan"))  # (batch, length, k or v, head, dim)
    cache[:, :37] = torch.randn(2, 37, 2, 2, 16)
    k, v = cache[:, :37].permute(2, 0, 3, 1, 4)
    q = torch.randn(2, 4, 2, 16)
    got = op(q, k, v)
    exact = ac.reference("causal", *map(double, (q, k, v)))
    assert (got - exact).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["two branches", "place of a maximum", "places of the maxima of two branches"])
def test_gradients_through_merged_rows(name):
    variant = VARIANTS[name]
    rows = verify_variant(variant, shapes=[ONE_QUERY], op=split(variant, 3))
    assert any(row.check.name == "dq" for row in rows)
    assert not [f"{row.check} {row.repeatable}" for row in rows if not row.ok]


@pytest.mark.parametrize(
    ("q_len", "kv_len", "splits"), [(1, 200, True), (4, 64, True), (60, 70, False), (20, 10, False)]
)
def test_few_rows_split_their_keys_by_themselves(q_len, kv_len, splits):
    op = ac.compile("causal")
    q, k, v = (torch.randn(1, heads, length, 16) for heads, length in ((4, q_len), (2, kv_len), (2, kv_len)))
    schedule = op.engine.prepare(Operands(bind(op.graph, q, k, v, None, {}), q, k, v)).schedule
    assert (schedule.forward.splits > 1) == splits
    assert (op(q, k, v) - ac.reference("causal", *map(double, (q, k, v)))).abs().max() < 1e-5


def test_several_passes_over_the_keys_own_their_rows():
    op = ac.compile("entmax15")
    q, k, v = (torch.randn(1, 2, length, 16) for length in (1, 80, 80))
    assert (op(q, k, v) - ac.reference("entmax15", *map(double, (q, k, v)))).abs().max() < 1e-5
    with pytest.raises(UnsupportedError, match="cannot be dealt to several programs"):
        split("entmax15", 2)(q, k, v)


def test_the_host_code_runs_for_its_launches_alone():
    """As a CUDA graph and a replay need it: no value is looked at, and every buffer is the call's own."""
    op = split("document", 4)
    module = op.engine.modules.load(Features(16, 16, form="decode"))
    q, k = (ghost(torch.empty(1, heads, length, 16)) for heads, length in ((4, 1), (2, 64)))
    doc = ghost(torch.empty(1, 64, dtype=torch.int32))
    meta = {"forward": {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2, "splits": 4}}
    options = {"DOT": None, "PRECISION": "ieee", "FAST_MATH": False}
    launched = []

    def run():
        inputs = [doc for _ in op.graph.inputs]
        module.forward(q, k, k, *inputs, *(0 for _ in op.graph.scalars), 1.0, meta, options)
        launched.extend(job.kernel.__name__ for job in launch.trace.jobs)
        launch.trace.jobs.clear()

    collect(run, 0)
    assert launched[-2:] == ["decode_kernel", "merge_kernel"]
    assert meta["forward"]["splits"] == 4  # a schedule is shared by calls


def test_the_backward_has_bounds_of_its_own_blocks():
    """Those of packed heads are for 8 queries of 4 heads, after which another document begins, in another tile."""
    op = split("document", 3)
    q, k, v = (torch.randn(1, heads, length, 16) for heads, length in ((4, 20), (1, 108), (1, 108)))
    inputs = {"doc": torch.tensor([[0] * 80 + [1] * 16 + [2] * 12])}
    cotangent = torch.randn(q.shape)
    found = []
    for attend, dtype in ((op, torch.float32), (partial(ac.reference, "document"), torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (q.clone(), k.clone(), v.clone())]
        out = attend(*leaves, **inputs)
        found.append(torch.autograd.grad(out, leaves, cotangent.to(out.dtype)))
    for got, exact in zip(*found, strict=True):
        assert (got - exact).abs().max() < 1e-5
