"""The rules that kernels are held against: what they let pass, and what they must not."""

from __future__ import annotations

import pytest
import torch

import attncc as ac
from attncc.runtime.reference import reference
from attncc.runtime.tf32 import Tf32Matmuls, cut
from attncc.runtime.verify import Shape, check, eager, sample_inputs, shapes_for, verify_variant

REFERENCE = torch.linspace(-2, 2, 101, dtype=torch.float64)
INF = torch.inf


def near(dtype, relative):
    return (REFERENCE * (1 + relative)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "relative", "ok"),
    [
        (torch.float32, 0, True),
        (torch.float32, 3e-6, False),  # beyond the worst element of plain float32
        (torch.bfloat16, 0, True),
        (torch.bfloat16, 4e-3, True),
        (torch.bfloat16, 1.5e-2, False),
        (torch.float16, 6e-3, False),
    ],
)
def test_the_worst_element(dtype, relative, ok):
    plain = REFERENCE.to(dtype)
    found = check("out", near(dtype, relative), REFERENCE, plain)
    assert found.ok is ok
    assert (found.max_err <= found.max_allowed and found.rms <= found.rms_allowed) is ok


def test_the_root_mean_square_catches_what_a_bad_peer_lets_pass():
    plain = near(torch.bfloat16, 0.05)
    found = check("out", near(torch.bfloat16, 0.02), REFERENCE, plain)
    assert found.max_err < found.max_allowed
    assert found.rms > found.rms_allowed
    assert not found.ok
    assert check("dslopes", near(torch.bfloat16, 0.02), REFERENCE, plain, "gradient").ok


def test_a_gradient_may_be_three_times_as_far_as_plain_pytorch():
    plain, got = near(torch.float32, 1e-6), near(torch.float32, 2.6e-6)
    assert not check("out", got, REFERENCE, plain).ok
    assert check("dq", got, REFERENCE, plain, "gradient").ok


def test_a_gradient_may_have_the_rounding_of_exponents_as_large_as_the_scores():
    plain, got = near(torch.float32, 1e-7), near(torch.float32, 1.5e-6)
    assert not check("dv", got, REFERENCE, plain, "gradient").ok
    assert check("dv", got, REFERENCE, plain, "gradient", score=12.0).ok
    assert not check("dv", near(torch.float32, 3e-6), REFERENCE, plain, "gradient", score=12.0).ok
    assert not check("out", got, REFERENCE, plain, score=12.0).ok


def test_the_dtype_of_the_computation_counts_not_that_of_the_result():
    got = near(torch.float32, 3e-3)
    assert not check("lse", got, REFERENCE, got).ok
    assert check("lse", got, REFERENCE, got, dtype=torch.bfloat16).ok
    assert check("lse", got, REFERENCE, got, tf32=True).ok


@pytest.mark.parametrize(
    ("got", "ok"),
    [
        ([1.0, -INF], True),
        ([1.0, INF], False),
        ([1.0, -1e30], False),
        ([-INF, -INF], False),
        ([float("nan"), -INF], False),
        ([1.0, float("nan")], False),
    ],
)
def test_infinities_agree_and_nan_is_wrong(got, ok):
    reference = torch.tensor([1.0, -INF], dtype=torch.float64)
    assert check("lse", torch.tensor(got), reference, reference.float()).ok is ok


def test_a_zero_reference_asks_for_zeros_up_to_the_noise_of_float32():
    zero = torch.zeros(4, dtype=torch.float64)
    assert check("dq", torch.full((4,), 1e-7), zero, zero.float(), "gradient").ok
    assert not check("dq", torch.full((4,), 1e-5), zero, zero.float(), "gradient").ok
    assert check("dq", torch.empty(0), torch.empty(0).double(), torch.empty(0)).ok


def test_plain_pytorch_that_overflows_allows_nothing():
    plain = REFERENCE.float()
    plain[3] = INF
    assert not check("out", near(torch.float32, 1e-3), REFERENCE, plain).ok


@pytest.mark.parametrize("name", ["sliding_window", "t5_bias", "sink", "relu2", "dense_bias"])
def test_plain_pytorch_in_float32_passes(name):
    variant = ac.variants.get(name)
    rows = verify_variant(variant, op=lambda *a, **k: eager(variant, *a, **k))
    assert len(rows) >= 4 * len(shapes_for("cpu"))
    assert all(row.ok for row in rows), [r for r in rows if not r.ok]
    assert {row.check.name for row in rows} >= {"out", "dq", "dk", "dv", *(f"d{d.name}" for d in variant.graph.inputs)}


def test_a_compiled_kernel_passes():
    rows = verify_variant(ac.variants.get("alibi"), shapes=[Shape(1, 4, 2, 19, 23, 16, 24, strided=True)])
    assert [row.check.name for row in rows] == ["out", "lse", "dq", "dk", "dv", "dslopes"]
    assert all(row.ok for row in rows), rows


def wrong_mask(q, k, v, **options):
    return eager(
        ac.Variant(mask=lambda q_idx, kv_idx, q_len, kv_len: kv_idx < q_idx + kv_len - q_len), q, k, v, **options
    )


class Restless:
    """Right within rounding, and different each time."""

    def __init__(self):
        self.calls = 0

    def __call__(self, q, k, v, **options):
        self.calls += 1
        out, lse = eager(ac.variants.get("causal"), q, k, v, **options)
        return out * (1 + self.calls * 2**-23), lse


def wrong_gradient(q, k, v, **options):
    out, lse = eager(ac.variants.get("causal"), q, k, v, **options)
    return out + (lambda x: x - x.detach())(0.01 * q.sum()), lse


def test_faulty_kernels_are_found():
    causal, shape = ac.variants.get("causal"), [Shape(1, 2, 2, 9, 12, 8, 8)]
    assert {r.check.name for r in verify_variant(causal, shapes=shape, op=wrong_mask) if not r.check.ok} >= {
        "out",
        "lse",
    }
    rows = verify_variant(causal, shapes=shape, op=Restless())
    assert all(r.check.ok for r in rows)
    assert "out" in {r.check.name for r in rows if not r.repeatable}
    found = {r.check.name for r in verify_variant(causal, shapes=shape, op=wrong_gradient) if not r.ok}
    assert found == {"dq"}


def test_a_shape_by_itself_is_verified_as_among_others():
    shapes = [Shape(1, 1, 1, 9, 9, 16, 16), Shape(1, 2, 1, 7, 12, 16, 16)]
    together = verify_variant(ac.variants.get("causal"), "cpu", torch.float32, shapes)
    apart = [verify_variant(ac.variants.get("causal"), "cpu", torch.float32, [s], seed=i) for i, s in enumerate(shapes)]
    assert together == [row for rows in apart for row in rows]


def test_plans_with_a_state_are_verified_where_there_is_one():
    """A state of degree 2 has no room for heads beyond 128: there only all pairs are verified."""
    small, large, uneven = Shape(1, 1, 1, 9, 9, 16, 16), Shape(1, 1, 1, 9, 9, 144, 16), Shape(1, 1, 1, 5, 9, 16, 16)
    rows = verify_variant(ac.variants.get("taylor_causal"), "cpu", torch.float32, [small, large, uneven])
    assert all(row.ok for row in rows)
    assert {row.shape for row in rows if "chunk" in row.check.name} == {small}
    assert {row.shape for row in rows if "recurrent" in row.check.name} == {small}
    assert {row.shape for row in rows} == {small, large, uneven}


def test_samples_of_what_is_read_at_integers_within_an_exponent():
    """Whether an exponent is above 0 is asked of numbers, and of integers in products beside them, too."""
    variant = ac.loads_toml(
        """
        [stages]
        score = "score + exp(-table[4 * doc[b, q_idx] + doc[b, kv_idx]])"
        [inputs]
        table = { index = ["bucket"] }
        doc = { index = ["b", "kv_idx"], dtype = "int" }
        """
    )
    sample = sample_inputs(variant.graph, Shape(1, 1, 1, 7, 9, 8, 8), torch.float32)
    assert (sample.inputs["doc"].shape, sample.inputs["table"].shape) == ((1, 9), (32,))


def test_samples_are_reproducible_and_sensible():
    variant = ac.Variant(
        inputs={
            "doc": ac.Input("b", "kv_idx", dtype="int"),
            "length": ac.Input("b", dtype="int"),
            "slopes": ac.Input("h", default=lambda sizes: [2.0] * sizes["h"]),
            "temperature": ac.Input("h"),
            "bias": ac.Input("h", "q_idx", "kv_idx", grad=True),
            "table": ac.Input("h", "bucket"),
            "window": ac.Scalar(4096),
            "cap": ac.Scalar(30.0),
        },
        score=lambda score, h, q_idx, kv_idx, slopes, temperature, bias, table, cap: (
            cap * score / temperature[h] + slopes[h] * bias[h, q_idx, kv_idx] + table[h, kv_idx]
        ),
        mask=lambda b, q_idx, kv_idx, doc, length, window: (
            (doc[b, q_idx] == doc[b, kv_idx]) & (kv_idx < length[b]) & (q_idx - kv_idx < window)
        ),
    )
    shape = Shape(2, 4, 2, 30, 60, 8, 16, strided=True, broadcast=("q_idx",))
    sample = sample_inputs(variant.graph, shape, torch.float16, seed=5)
    again = sample_inputs(variant.graph, shape, torch.float16, seed=5)
    other = sample_inputs(variant.graph, shape, torch.float16, seed=6)
    assert torch.equal(sample.q, again.q)
    assert not torch.equal(sample.q, other.q)
    assert (sample.q.shape, sample.k.shape, sample.v.shape) == ((2, 4, 30, 8), (2, 2, 60, 8), (2, 2, 60, 16))
    assert not sample.q.is_contiguous()
    found = sample.inputs
    assert found["doc"].shape == (2, 60)
    assert (found["doc"].diff(dim=-1) >= 0).all()
    assert found["doc"].unique().numel() > 1
    assert 0 <= found["length"].min() <= found["length"].max() <= 60
    assert found["slopes"].tolist() == [2.0] * 4
    assert 0.5 <= found["temperature"].min() <= found["temperature"].max() <= 1.5
    assert found["bias"].shape == (4, 1, 60)
    assert found["bias"].dtype == torch.float16
    assert found["bias"].min() < 0
    assert found["table"].dtype == torch.float32
    assert (found["window"], found["cap"]) == (20, 30.0)


def test_auxiliary_outputs_are_verified():
    """Counts exactly, positions by the exact value there, and gradients but of what has none."""
    outputs = {
        "received": ac.outputs.received,
        "argmax": ac.outputs.argmax,
        "seen": lambda col: col.count(),
        "peaks": lambda score, block: block(16, 16).max(score),
    }
    variant = ac.variants.get("causal").with_outputs(**outputs)
    rows = verify_variant(variant, shapes=[Shape(1, 2, 1, 11, 19, 16, 16)])
    assert [row.check.name for row in rows] == ["out", "lse", *sorted(outputs), "dq", "dk", "dv"]
    assert all(row.ok for row in rows), rows

    def shifted(*args, **kwargs):
        results = list(op(*args, **kwargs))
        names = list(kwargs["outputs"])
        results[names.index("argmax")] = (results[names.index("argmax")] - 1).clamp_min(0)
        results[names.index("seen")] = results[names.index("seen")] + 1
        return tuple(results)

    op = ac.compile(variant)
    rows = verify_variant(variant, shapes=[Shape(1, 2, 1, 11, 19, 16, 16)], op=shifted)
    assert [row.check.name for row in rows if not row.ok] == ["argmax", "seen"]


def test_cotangents_are_the_same_in_float64():
    """An op that computes as the reference does errs by the rounding of its inputs' gradients alone."""

    def op(q, k, v, outputs, gain):
        results = reference("ssmax", q.double(), k.double(), v.double(), outputs=outputs, gain=gain.double())
        return tuple(r.to(q.dtype if r.dim() == 4 else torch.float32) for r in results)

    variant, shape = ac.variants.get("ssmax"), Shape(1, 1, 1, 24, 24, 16, 16)
    rows = verify_variant(variant, "cpu", torch.bfloat16, [shape], op)
    errors = {row.check.name: row.check.max_err for row in rows}
    assert 0 < errors["dgain"] < 1e-5


def test_what_is_summed_decays_where_a_negative_rate_meets_it():
    """ssd's steps times its rates below 0 are exponents: growth would soon be past every float16."""
    shape = Shape(1, 4, 2, 391, 391, 16, 16)
    of_steps = sample_inputs(ac.variants.get("ssd").graph, shape, torch.float16).inputs
    assert of_steps["rate"].max() < 0 < of_steps["dt"].mean()
    assert sample_inputs(ac.variants.get("gla").graph, shape, torch.float16).inputs["g"].mean() < 0


def test_plain_pytorch_in_tf32_at_any_length():
    """cuBLAS takes float32 where rows are not aligned, and would be no measure of a kernel that takes tf32."""
    a, b = (torch.randn(2, *size, requires_grad=True) for size in ((40, 50), (50, 7)))
    with Tf32Matmuls():
        product = a @ b
        da, _ = torch.autograd.grad(product.square().sum(), (a, b))
    read = [cut(x.detach()).double() for x in (a, b, 2 * product)]
    torch.testing.assert_close(product.double(), read[0] @ read[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(da.double(), read[2] @ read[1].mT, atol=1e-4, rtol=0)
    assert (product - a @ b).abs().max() > 1e-3
    assert cut(torch.tensor([1.0, -0.1, torch.inf])).tolist() == [1.0, -0.0999755859375, torch.inf]
