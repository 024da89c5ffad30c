"""Auxiliary outputs of the op on CPU tensors, beside the same thing written by hand in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

import attncc as ac
from attncc.errors import InputError, UnsupportedError
from attncc.runtime.modules import Features

ready = ac.outputs


def weights_of(q, k):
    """(weights, scores, visible) of causal softmax attention, aligned to the end; a row that sees nothing weighs 0."""
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
    m, n = scores.shape[2:]
    visible = torch.ones(m, n, dtype=torch.bool).tril(n - m)
    hidden = scores.masked_fill(~visible, -torch.inf)
    alive = visible.any(-1, keepdim=True)
    weights = torch.where(alive, hidden.masked_fill(~alive, 0.0).softmax(-1), 0.0).masked_fill(~visible, 0.0)
    return weights, hidden, visible


def blocks(w, m, n):
    padded = torch.nn.functional.pad(w, (0, -w.shape[3] % n, 0, -w.shape[2] % m))
    return padded.unflatten(3, (-1, n)).unflatten(2, (-1, m)).sum((3, 5))


def diagonals(w, lo, hi):
    found = [w.diagonal(d, -2, -1).sum(-1) for d in range(lo, hi + 1)]
    return torch.stack(found, -1)


def mean_of_last(w, visible, rows):
    count = visible[-rows:].sum(0).clamp_min(1)
    return w[:, :, -rows:].sum(2) / count


#: name: (the output, the same by hand from weights, scores, visible and segments)
READY = {
    "entropy": (ready.entropy, lambda w, s, v, g: -torch.xlogy(w, w.clamp_min(1e-300)).sum(-1)),
    "row_max": (ready.row_max, lambda w, s, v, g: s.amax(-1)),
    "argmax": (ready.argmax, lambda w, s, v, g: torch.where(v.any(-1), w.argmax(-1), -1)),
    "top1": (ready.top1_prob, lambda w, s, v, g: torch.where(v.any(-1), w.amax(-1), -torch.inf)),
    "mass": (ready.row_mass(2, 11), lambda w, s, v, g: w[..., 2:11].sum(-1)),
    "odd": (ready.row_mass(lambda kv_idx: kv_idx % 2 == 1), lambda w, s, v, g: w[..., 1::2].sum(-1)),
    "segment2": (ready.segment_mass(2), lambda w, s, v, g: (w * (g == 2)[:, None, None]).sum(-1)),
    "received": (ready.received, lambda w, s, v, g: w.sum(-2)),
    "recent": (ready.column_mean(-5), lambda w, s, v, g: mean_of_last(w, v, 5)),
    "blocks": (ready.block_sums(4, 2), lambda w, s, v, g: blocks(w, 4, 2)),
    "wide_blocks": (ready.block_sums(48, 16), lambda w, s, v, g: blocks(w, 48, 16)),
    "diagonals": (ready.offset_sums(), lambda w, s, v, g: diagonals(w, 1 - w.shape[2], w.shape[3] - 1)),
    "near": (ready.offset_sums(-6, 2), lambda w, s, v, g: diagonals(w, -6, 2)),
    "last": (ready.last_rows(3), lambda w, s, v, g: w[:, :, -3:]),
    "cls": (lambda weight, pair: pair(0, 1).sum(weight), lambda w, s, v, g: w[:, :, :1]),
    "map": (ready.weights(), lambda w, s, v, g: w),
    "scores": (ready.scores(), lambda w, s, v, g: s),
    "centre": (
        lambda weight, row, kv_idx: row.sum(weight * kv_idx) / row.sum(weight),
        lambda w, s, v, g: (w * torch.arange(w.shape[3])).sum(-1) / torch.where(v.any(-1), w.sum(-1), 1.0),
    ),
    "lowest": (
        lambda score, col: col.min(score),
        lambda w, s, v, g: s.masked_fill(~v, torch.inf).amin(-2),
    ),
}
#: shapes (batch, heads, key heads, queries, keys, Dqk, Dv): odd, grouped heads, rows that see nothing
SHAPES = [(2, 4, 2, 19, 27, 24, 8), (1, 2, 1, 37, 21, 16, 16)]


def variant(names, **stages):
    return ac.Variant(mask=ac.causal, outputs={name: READY[name][0] for name in names}, **stages)


def tensors(shape, dtype=torch.float32):
    batch, heads, kv_heads, q_len, kv_len, d_qk, d_v = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((batch, heads, q_len, d_qk), (batch, kv_heads, kv_len, d_qk), (batch, kv_heads, kv_len, d_v))
    q, k, v = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return q, k, v, torch.randint(0, 4, (batch, kv_len), generator=generator, dtype=torch.int32)


def by_hand(names, q, k, segment):
    w, s, visible = weights_of(q, k)
    return {name: READY[name][1](w, s, visible, segment) for name in names}


def close(got, want, tolerance):
    finite = want.isfinite()
    assert got.shape == want.shape
    assert torch.equal(got[~finite].double(), want[~finite].double())
    assert (got[finite].double() - want[finite].double()).abs().max() < tolerance * (1 + want[finite].abs().max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_ready_made_output(shape):
    q, k, v, segment = tensors(shape)
    op = ac.compile(variant(READY))
    got = dict(zip(READY, op(q, k, v, segment=segment, outputs=tuple(READY)), strict=True))
    want = by_hand(READY, q.double(), k.double(), segment)
    for name in READY:
        assert got[name].dtype == (torch.int64 if name == "argmax" else torch.float32)
        close(got[name], want[name], 2e-6)


#: each alone: together, their conditions say nothing of which tiles to visit
OF_WEIGHTS = {
    "heavy": (lambda weight, row: row.count(weight > 0.1), lambda w, s, v: (v & (w > 0.1)).sum(-1)),
    "near": (
        lambda weight, row, kv_idx: row.sum(weight, (weight > 0.1) & (kv_idx < 9)),
        lambda w, s, v: torch.where(w > 0.1, w, 0.0)[..., :9].sum(-1),
    ),
    "seen": (lambda score, col: col.count(score > 0), lambda w, s, v: (s > 0).sum(-2)),
    "largest": (lambda weight, col: col.max(weight), lambda w, s, v: w.masked_fill(~v, -torch.inf).amax(-2)),
    "place": (lambda weight, col: col.argmax(weight), lambda w, s, v: w.masked_fill(~v, -torch.inf).argmax(-2)),
    "far": (
        lambda weight, offset: offset(-20, 0).sum(weight, weight > 0.1),
        lambda w, s, v: diagonals(torch.where(w > 0.1, w, 0.0), -20, 0),
    ),
}


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_conditions_on_weights_and_reductions_along_the_queries(name):
    """Over several tiles of queries and of keys."""
    q, k, v, _ = tensors((1, 2, 1, 85, 103, 16, 16))
    output, expected = OF_WEIGHTS[name]
    got = ac.compile(ac.Variant(mask=ac.causal, outputs={name: output}))(q, k, v, outputs=name)
    close(got, expected(*weights_of(q.double(), k.double())), 2e-6)


def test_16_bits():
    q, k, v, segment = tensors(SHAPES[0], torch.float16)
    names = [n for n in READY if n not in ("argmax", "scores")]
    got = ac.compile(variant(names))(q, k, v, segment=segment, outputs=tuple(names))
    for name, value in zip(names, got, strict=True):
        close(value, by_hand(names, q.double(), k.double(), segment)[name], 2e-5)


@pytest.mark.parametrize(
    ("names", "shape"),
    [
        (("entropy", "mass"), SHAPES[1]),
        (("top1",), SHAPES[1]),
        (("row_max", "segment2"), SHAPES[0]),
        (("received", "recent"), SHAPES[0]),
        (("lowest",), SHAPES[0]),
        (("blocks", "wide_blocks"), SHAPES[1]),
        (("near", "diagonals"), SHAPES[0]),
        (("last",), SHAPES[0]),
        (("centre",), SHAPES[1]),
    ],
    ids=lambda x: "-".join(map(str, x)),
)
def test_gradients_by_hand(names, shape):
    """Of the outputs alone and beside out, against autograd of the formulas written by hand."""
    q, k, v, segment = tensors(shape)
    op = ac.compile(variant(names))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    call = {"segment": segment} if "segment2" in names else {}
    results = op(*leaves, outputs=("out", *names), **call)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    weights, scores, visible = weights_of(*exact[:2])
    wanted = [weights @ exact[2].repeat_interleave(q.shape[1] // k.shape[1], 1)]
    wanted += [READY[name][1](weights, scores, visible, segment) for name in names]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator) for x in results]
    finite = [x.detach().isfinite() for x in results]
    for skipped in (0, 1):  # out takes part, or not
        losses = []
        for xs in (results, wanted):
            terms = [(torch.where(f, x, 0.0) * c).sum() for x, f, c in zip(xs, finite, cotangents, strict=True)]
            losses.append(sum(terms[skipped:]))
        got = torch.autograd.grad(losses[0], leaves, retain_graph=True)
        want = torch.autograd.grad(losses[1], exact, retain_graph=True, materialize_grads=True)
        for g, w in zip(got, want, strict=True):
            assert not g.isnan().any()
            assert (g - w).norm() <= 2e-6 * w.norm() + 1e-7


def biased(weight, col, bias, kv_idx):
    return col.sum(weight * bias[kv_idx])


def gated(weight, row, kv_idx, gain, h):
    return gain[h] * row.sum(weight * kv_idx) / (row.sum(weight) + 0.1)


NORMALIZERS = {"softmax1": ac.softmax1, "sigmoid": "sigmoid", "relu": "relu", "taylor": ac.taylor}


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradients_of_inputs_and_other_normalizers(normalizer):
    """Inputs of the score, of a reduction, and of an output's own expression; beside autograd of the reference."""
    spec = ac.Variant(
        inputs={"gain": ac.Input("h", grad=True), "bias": ac.Input("kv_idx", grad=True)},
        score=lambda score, bias, kv_idx: score + bias[kv_idx],
        mask=ac.causal,
        normalizer=NORMALIZERS[normalizer],
        outputs={"entropy": ready.entropy, "gated": gated, "biased": biased},
    )
    q, k, v, _ = tensors((1, 2, 1, 21, 13, 16, 8))
    generator = torch.Generator().manual_seed(2)
    gain, bias = 0.5 + torch.rand(2, generator=generator), 0.3 * torch.randn(13, generator=generator)
    names, found = ("entropy", "gated", "biased"), []
    for run, dtype in ((ac.compile(spec), torch.float32), (lambda *a, **b: ac.reference(spec, *a, **b), torch.float64)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, gain, bias)]
        ys = run(*leaves[:2], v.to(dtype), gain=leaves[2], bias=leaves[3], outputs=names)
        assert all(y.isfinite().all() for y in ys)
        loss = sum(((i + 1) * y * y).sum() for i, y in enumerate(ys))
        found.append((*ys, *torch.autograd.grad(loss, leaves)))
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() <= 3e-6 * want.norm()


def test_gradients_of_an_output_where_a_sweep_alone_needs_delta():
    """What the minimum passes back has the output's cotangents in it, and no pair's own gradient has."""
    variant = ac.loads_toml(
        '[stages]\nnormalizer = "x = score - row.min(score)\\nx / (row.sum(x) + 1)"\n'
        '[outputs]\nsquares = "row.sum(weight * weight)"'
    )
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16, requires_grad=True) for n in (7, 11, 11))
    x = q.double() @ k.double().mT / 4
    x = x - x.amin(-1, keepdim=True)
    w = x / (x.sum(-1, keepdim=True) + 1)
    want = w.square().sum(-1)
    got = ac.compile(variant)(q, k, v, outputs="squares")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    cotangent = torch.randn(want.shape, dtype=torch.float64)
    found = torch.autograd.grad(got, (q, k), cotangent.float())
    wanted = torch.autograd.grad(want, (q, k), cotangent)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_nothing_is_computed_or_required_that_is_not_asked_for():
    q, k, v, segment = tensors(SHAPES[0])
    op = ac.compile(variant(("segment2", "received")))
    plain = ac.compile(ac.Variant(mask=ac.causal))
    assert torch.equal(op(q, k, v), plain(q, k, v))
    assert torch.equal(op(q, k, v, segment=segment), plain(q, k, v))
    assert op.engine.modules.source(Features(24, 8)) == plain.engine.modules.source(Features(24, 8))
    assert op(q, k, v, outputs="received").shape == (2, 4, 27)
    with pytest.raises(InputError, match="needs the input 'segment'"):
        op(q, k, v, outputs="segment2")
    with pytest.raises(InputError, match=r"no input 'segmnt'"):
        op(q, k, v, segmnt=segment)
    with pytest.raises(InputError, match="there is no output 'entropy'"):
        op(q, k, v, outputs="entropy")


def test_outputs_come_in_the_order_of_the_call_and_twice_give_the_same_bits():
    q, k, v, _ = tensors(SHAPES[0])
    op = ac.compile(variant(("received", "entropy", "diagonals")))
    names = ("lse", "diagonals", "out", "received", "entropy")
    got, again = op(q, k, v, outputs=names), op(q, k, v, outputs=names)
    assert [x.shape[2:] for x in got] == [(19,), (45,), (19, 8), (27,), (19,)]
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_an_output_as_large_as_the_map_has_a_limit():
    q, k, v, _ = tensors(SHAPES[0])
    op = ac.compile(
        ac.Variant(outputs={"map": ready.weights(limit=4000), "blocks": ready.block_sums(1, 1, limit=4000)})
    )
    for name in ("map", "blocks"):
        with pytest.raises(InputError, match=rf"'{name}' \(2, 4, 19, 27\) has 4,104 elements .* its limit is 4,000"):
            op(q, k, v, outputs=name)
    assert ac.compile(ac.Variant(outputs={"map": ready.weights()}))(q, k, v, outputs="map").shape == (2, 4, 19, 27)


def test_a_gradient_that_is_not_derived_is_refused_by_name():
    q, k, v, _ = tensors(SHAPES[0])
    op = ac.compile(ac.Variant(outputs={"peaks": lambda score, block: block(16, 16).max(score)}))
    peaks = op(q.requires_grad_(), k, v, outputs="peaks")
    with pytest.raises(UnsupportedError, match=r"(?s)output 'peaks'.*block\(16, 16\).sum or row.max"):
        peaks.sum().backward()


def test_positions_have_no_gradient():
    q, k, v, _ = tensors(SHAPES[0])
    top, argmax = ac.compile(variant(("top1", "argmax")))(q.requires_grad_(), k, v, outputs=("top1", "argmax"))
    assert top.requires_grad
    assert not argmax.requires_grad


def test_empty_calls():
    op = ac.compile(variant(READY))
    for q_len, kv_len in ((0, 5), (5, 0)):
        q, k, v, segment = tensors((1, 2, 1, q_len, kv_len, 16, 8))
        got = op(q, k, v, segment=segment, outputs=tuple(READY))
        want = ac.reference(variant(READY), q, k, v, segment=segment, outputs=tuple(READY))
        for name, a, b in zip(READY, got, want, strict=True):
            assert torch.equal(a.double(), b.double()), name


def test_it_is_an_operator_for_pytorch():
    q, k, v, _ = tensors((1, 2, 1, 9, 11, 16, 8))
    names = ("out", "received", "top1", "argmax", "centre", "recent")
    op = ac.compile(variant(names[1:]))
    args = op.torch_args(*(x.requires_grad_() for x in (q, k, v)), outputs=names)
    torch.library.opcheck(op.torch_op(names), args)

    def loss(q, k, v):
        out, received, top, _, centre, recent = op(q, k, v, outputs=names)
        rows = torch.where(top.isfinite(), top, 0).sum() + (centre * centre).sum()
        return out.sum() + (received * received).sum() + recent.sin().sum() + rows

    eager = torch.autograd.grad(loss(q, k, v), (q, k, v))
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k, v), (q, k, v))
    for a, b in zip(eager, compiled, strict=True):
        assert (a - b).abs().max() < 1e-4


def test_masks_that_read_inputs_and_skip_tiles():
    """Documents, a window, and a condition shared by all reductions: the same tiles as a brute-force map."""
    spec = ac.Variant(
        mask=ac.causal & ac.sliding_window(20) & ac.document(),
        outputs={"received": ready.received, "recent": ready.column_mean(-9), "blocks": ready.block_sums(16, 16),
                 "diagonals": ready.offset_sums(), "entropy": ready.entropy, "last": ready.last_rows(5)},
    )  # fmt: skip
    q, k, v, _ = tensors((2, 2, 2, 150, 150, 16, 16))
    doc = torch.sort(torch.randint(0, 6, (2, 150), generator=torch.Generator().manual_seed(3)), -1).values.int()
    names = tuple(o.name for o in spec.graph.outputs)
    small = ac.KernelSchedule(32, 16, 4, 1)
    op = ac.compile(spec, schedule=ac.Schedule(small, small, small))
    got = op(q, k, v, doc=doc, outputs=names)
    for name, a, b in zip(names, got, ac.reference(spec, q, k, v, doc=doc, outputs=names), strict=True):
        assert (a - b).abs().max() < 1e-5, name


def test_names_that_generated_code_uses_itself():
    """Inputs and outputs may have the names of the light passes' own values."""
    spec = ac.Variant(
        inputs={"best": ac.Input("h", grad=True), "lo": ac.Scalar(2), "tile": ac.Input("b", "kv_idx", dtype="int")},
        score=lambda score, h, best: score * best[h],
        mask=ac.causal,
        outputs={
            "q": lambda weight, row, kv_idx, lo: row.sum(weight, kv_idx < lo),
            "place": lambda weight, col, tile, b, kv_idx: col.sum(weight, tile[b, kv_idx] == 1),
        },
    )
    q, k, v, tile = tensors((2, 2, 2, 9, 9, 16, 16))
    call = {"best": torch.tensor([0.5, 2.0]), "tile": tile, "lo": 3, "outputs": ("q", "place")}
    for got, want in zip(ac.compile(spec)(q, k, v, **call), ac.reference(spec, q, k, v, **call), strict=True):
        assert (got - want).abs().max() < 2e-6


def test_a_pass_says_what_it_computes_and_from_what():
    text = ac.compile(variant(("received", "argmax", "near"))).explain(target="h100", q_len=1024)
    assert "received[b, h, kv_idx] = col.sum(weight)\n      a light pass over the queries" in text
    assert "backward: dweight += dy_received_0[b, h, kv_idx]" in text
    assert "no gradient: an integer has none" in text
    assert "along each band of diagonals" in text
