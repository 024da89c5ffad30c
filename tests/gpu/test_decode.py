"""Split-KV on a GPU: values at size, bits, CUDA graphs, growing caches, offsets past 2^31."""

from __future__ import annotations

import pytest
import torch

import attncc as ac
from attncc.runtime.operands import Operands
from attncc.runtime.shapes import bind
from attncc.runtime.verify import Shape, check, eager, verify_variant
from attncc.schedule.device import device_of

SHAPES = (
    Shape(1, 32, 8, 1, 8191, 128, 128),
    Shape(3, 8, 2, 4, 3001, 128, 64, strided=True),
    Shape(2, 28, 4, 5, 1025, 96, 96, broadcast=("b",)),
    Shape(1, 16, 1, 16, 2048, 64, 64),
    Shape(1, 4, 4, 130, 5000, 80, 80),
)


def failures(rows):
    return [f"{r.shape} {r.check} repeatable={r.repeatable}" for r in rows if not r.ok]


def tensors(batch, heads, kv_heads, q_len, kv_len, dim=128, dtype=torch.bfloat16):
    q = torch.randn(batch, heads, q_len, dim, device="cuda", dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, kv_len, dim, device="cuda", dtype=dtype) for _ in range(2))
    return q, k, v


def attends(name):
    """The op of all pairs, which is what splits the keys."""
    return ac.compile(name, plan="parallel")


def splits_of(op, q, k, v):
    return op.engine.prepare(Operands(bind(op.graph, q, k, v, None, {}), q, k, v)).schedule.forward.splits


@pytest.mark.parametrize(
    "name",
    ["causal", "sliding_window", "alibi", "gemma2_local", "sink", "cog", "sigmoid", "taylor", "document", "t5_bias"],
)
def test_shipped_variants(name):
    assert not failures(verify_variant(ac.variants.get(name), "cuda", torch.bfloat16, SHAPES[:3], attends(name)))


@pytest.mark.parametrize("name", ["causal", "document", "t5_bias"])
def test_more_queries(name):
    assert not failures(verify_variant(ac.variants.get(name), "cuda", torch.bfloat16, SHAPES[3:], attends(name)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["causal", "sink", "differential"])
def test_other_dtypes(name, dtype):
    assert not failures(verify_variant(ac.variants.get(name), "cuda", dtype, SHAPES[:2], attends(name)))


def test_head_dimensions_of_latent_attention():
    op = ac.compile("mla")
    q = torch.randn(2, 128, 1, 576, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(2, 1, 3000, 576, device="cuda", dtype=torch.bfloat16)
    exact, plain = ac.reference("mla", q.double(), k.double()), eager("mla", q, k)
    assert check("out", op(q, k), exact, plain).ok


@pytest.mark.parametrize("backend", ["triton", "gluon"])
@pytest.mark.parametrize(
    ("heads", "q_len", "kv_len"),
    [(16, 1, 300), (32, 3, 517), (128, 2, 40), (64, 4, 2), (16, 200, 333), (128, 1, 9000)],
)
def test_keys_that_hold_their_values(backend, heads, q_len, kv_len):
    if backend == "gluon" and device_of("cuda").target != "sm_90":
        pytest.skip("Gluon kernels are for Hopper")
    op = ac.compile("mla", backend=backend)
    q = torch.randn(2, heads, q_len, 576, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(2, 1, kv_len, 576, device="cuda", dtype=torch.bfloat16)
    exact, plain = ac.reference("mla", q.double(), k.double()), eager("mla", q, k)
    out = op(q, k)
    assert check("out", out, exact, plain).ok
    assert torch.equal(out, op(q, k))


def test_every_number_of_parts_gives_the_same_to_rounding():
    q, k, v = tensors(2, 8, 2, 1, 5000)
    side = ac.KernelSchedule(64, 64, 4, 2)
    results = []
    for splits in (1, 2, 7, 32, 128):
        forward = ac.KernelSchedule(16, 64, 4, 3, splits=splits)
        results.append(ac.compile("causal", schedule=ac.Schedule(forward, side, side))(q, k, v).float())
    exact = ac.reference("causal", q.double(), k.double(), v.double())
    assert all((r - exact).abs().max() < 4e-3 for r in results)


def test_the_same_bits_every_time():
    op = ac.compile("alibi")
    q, k, v = tensors(4, 32, 8, 1, 20000)
    assert splits_of(op, q, k, v) > 1
    first = op(q, k, v)
    assert all(torch.equal(first, op(q, k, v)) for _ in range(50))


def test_a_cuda_graph_reads_the_cache_as_it_is_when_replayed():
    op = ac.compile(
        ac.Variant(mask=lambda b, kv_idx, n: kv_idx < n[b], inputs={"n": ac.Input("b", dtype="int")}, name="ragged")
    )
    q, k, v = tensors(4, 32, 8, 1, 16384)
    n = torch.tensor([1, 100, 9000, 16384], device="cuda", dtype=torch.int32)
    with torch.no_grad():
        op(q, k, v, n=n)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            op(q, k, v, n=n)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = op(q, k, v, n=n)
        for seed in range(3):
            torch.manual_seed(seed)
            q.normal_()
            k.normal_()
            n.random_(0, 16385)
            graph.replay()
            assert torch.equal(out, op(q, k, v, n=n))


def test_a_cache_that_grows_is_compiled_once():
    op = ac.compile("causal")
    cache = torch.randn(2, 2, 4200, 8, 128, device="cuda", dtype=torch.bfloat16)  # k and v, batch, length, head, dim
    q = torch.randn(2, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    for length in range(4090, 4110):
        k, v = cache[:, :, :length].transpose(2, 3)
        exact = ac.reference("causal", q.double(), k.double(), v.double())
        assert (op(q, k, v) - exact).abs().max() < 4e-3
    assert len(op.engine.modules) == 1
    assert not len(op.kinds)  # no length came twice
    for _ in range(3):
        assert torch.equal(op(q, k, v), op(q, k, v))
    assert len(op.kinds) == 1


def test_offsets_beyond_32_bits():
    q, k, v = tensors(1, 8, 8, 1, 2_200_000, dim=128)
    assert k.numel() > 2**31
    out = ac.compile("causal")(q, k, v)
    last = slice(7, 8)
    score = (q[:, last].float() @ k[:, last].float().transpose(-1, -2)) * 128**-0.5
    exact = score.softmax(-1) @ v[:, last].float()
    assert (out[:, last] - exact).abs().max() <= 2e-2 * exact.abs().max()


def test_memory_is_the_parts_alone():
    op = ac.compile("causal")
    q, k, v = tensors(1, 32, 8, 1, 65536)
    with torch.no_grad():
        op(q, k, v)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        op(q, k, v)
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 4 * 2**20
