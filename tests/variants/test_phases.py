"""Normalizing over the queries, and what rows do that see no key, against plain PyTorch by hand."""

from __future__ import annotations

import pytest
import torch

import attncc as ac
from attncc.codegen.plan import Plan
from attncc.codegen.standalone import standalone
from attncc.errors import SpecError, UnsupportedError
from attncc.passes.lint import lint
from attncc.schedule import KernelSchedule, Schedule, device_for

from .by_hand import HALF, agree, causal, draw, rep, score, softmax


def over_queries(score, col):
    p = ac.exp(score - col.max(score))
    return p / col.sum(p)


def slots(score, row, col):
    """Slot attention: slots compete for each key, and each takes a mean of what it won."""
    p = ac.exp(score - col.max(score))
    share = p / col.sum(p) + 1e-4
    return share / row.sum(share)


def sigmoid_over_queries(score, col):
    p = ac.sigmoid(score)
    return p / col.sum(p)


def column_softmax(s, shown):
    return softmax(s.mT, shown.mT).mT


def slots_by_hand(s, shown):
    share = torch.where(shown, column_softmax(s, shown) + 1e-4, 0.0)
    total = share.sum(-1, keepdim=True)
    return share / total.where(total > 0, 1.0)


def sigmoid_by_hand(s, shown):
    p = torch.where(shown, s.sigmoid(), 0.0)
    total = p.sum(-2, keepdim=True)
    return p / total.where(total > 0, 1.0)


#: the formula in Python and as text, and the weights from scores and what is shown
CASES = {
    "over_queries": (over_queries, "p = exp(score - col.max(score))\np / col.sum(p)", column_softmax),
    "slots": (
        slots,
        "p = exp(score - col.max(score))\nshare = p / col.sum(p) + 1e-4\nshare / row.sum(share)",
        slots_by_hand,
    ),
    "sigmoid": (sigmoid_over_queries, "p = sigmoid(score)\np / col.sum(p)", sigmoid_by_hand),
}
#: query and key heads, queries and keys; of the first, most keys are seen by no query, of the second, most queries see
#: none, with a causal mask that begins with both
SIZES = ((4, 2, 17, 53), (2, 1, 37, 21))


@pytest.mark.parametrize(("sizes", "options"), [(SIZES[0], {}), (SIZES[1], HALF)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_normalizing_over_queries(name, sizes, options):
    normalizer, text, weights = CASES[name]
    shift = {"shift": ac.Input("h", "kv_idx", grad=True)}
    mask = "kv_idx <= 2 * q_idx - 9"
    variant = ac.Variant(
        score=lambda score, h, kv_idx, shift: score + shift[h, kv_idx],
        mask=lambda q_idx, kv_idx: kv_idx <= 2 * q_idx - 9,
        normalizer=normalizer,
        inputs=shift,
    )
    written = ac.loads_toml(
        f"[stages]\nscore = 'score + shift[h, kv_idx]'\nmask = '{mask}'\nnormalizer = '''{text}'''\n"
        "[inputs]\nshift = { index = ['h', 'kv_idx'], grad = true }"
    )
    assert written.graph.digest == variant.graph.digest
    heads, kv_heads, m, n = sizes
    arguments = draw(1, heads, m, 16), draw(1, kv_heads, n, 16, seed=1), draw(1, kv_heads, n, 24, seed=2)
    shown = torch.arange(n) <= 2 * torch.arange(m)[:, None] - 9

    def oracle(q, k, v, shift):
        return weights(score(q, k) + shift[:, None], shown) @ rep(v, heads)

    agree(variant, oracle, arguments, shift=draw(heads, n, seed=3), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_one_query_has_all_of_each_key(name, dtype):
    """Its share of a key is 1 whatever its score is, so nothing comes of that: not what rounding leaves, either."""
    op = ac.compile(ac.Variant(normalizer=CASES[name][0]))
    leaves = [draw(2, 4, 1, 16), draw(2, 2, 70, 16, seed=1), draw(2, 2, 70, 24, seed=2)]
    leaves = [x.to(dtype).requires_grad_() for x in leaves]
    out = op(*leaves)
    dq, dk, dv = torch.autograd.grad(out, leaves, draw(*out.shape, seed=3).to(dtype))
    assert dq.abs().max() <= 4e-7
    assert dk.abs().max() <= 4e-7
    assert dv.any()


def test_two_column_sums_and_an_input_in_the_terms_of_one():
    """Each passes its gradient on to scores, to q and k, and to what its own terms read."""

    def normalizer(score, row, col, h, q_idx, t):
        p, w = ac.exp(score - col.max(score)), ac.sigmoid(score) * ac.exp(t[h, q_idx])
        a = p / col.sum(p) - w / (0.5 + col.sum(w))
        return a / (row.sum(ac.abs(a)) + 0.1)

    def oracle(q, k, v, t):
        shown = causal(17, 29)
        s = score(q, k)
        w = s.sigmoid() * t[:, :, None].exp() * shown
        a = column_softmax(s, shown) - w / (0.5 + w.sum(-2, keepdim=True))
        return a / (a.abs().sum(-1, keepdim=True) + 0.1) @ rep(v, 4)

    inputs = {"t": ac.Input("h", "q_idx", grad=True)}
    arguments = draw(1, 4, 17, 16), draw(1, 2, 29, 16, seed=1), draw(1, 2, 29, 24, seed=2)
    agree(ac.Variant(normalizer=normalizer, mask=ac.causal, inputs=inputs), oracle, arguments, t=draw(4, 17, seed=3))


@pytest.mark.parametrize("name", ["slope", "table"])
def test_gradients_pass_through_column_sums_whatever_an_input_is_called(name):
    """Generated code has values of these names, so that all inputs get others there, in the order that they have."""
    variant = ac.loads_toml(
        f"""
        [stages]
        score = "score + bias[h, kv_idx] * q_idx"
        normalizer = "p = exp(score - col.max(score))\\np / col.sum(p)"
        reduction = "row.sum({name}[h] * weight * v_vec)"
        [inputs]
        bias = {{ index = ["h", "kv_idx"], grad = true }}
        {name} = {{ index = ["h"], grad = true }}
        """
    )

    def oracle(q, k, v, bias, **inputs):
        s = score(q, k) + bias[:, None] * torch.arange(7.0)[:, None]
        return inputs[name][:, None, None] * (column_softmax(s, torch.ones(7, 9, dtype=torch.bool)) @ v)

    arguments = draw(1, 2, 7, 16), draw(1, 2, 9, 16, seed=1), draw(1, 2, 9, 8, seed=2)
    agree(variant, oracle, arguments, bias=draw(2, 9, seed=3), **{name: draw(2)})


def test_messages_from_children_to_parents():
    """Reversed attention: a child's weights over its parents sum to 1, and its message goes to them. Here parents are
    the queries, and children the keys; gates are a head's and a child's."""
    variant = ac.Variant(
        normalizer=over_queries,
        reduction=lambda weight, v_vec, row, b, h, kv_idx, gate: row.sum(weight * gate[b, h, kv_idx] * v_vec),
        inputs={"gate": ac.Input("b", "h", "kv_idx", grad=True)},
    )
    child, parent, v = draw(2, 2, 33, 16), draw(2, 2, 19, 16, seed=1), draw(2, 2, 33, 16, seed=2)

    def oracle(parent, child, v, gate):
        return score(child, parent).softmax(-1).mT @ (v * gate[..., None])

    agree(variant, oracle, (parent, child, v), gate=draw(2, 2, 33, seed=3))


@pytest.mark.parametrize(
    ("policy", "normalizer", "options"),
    [("open", "softmax", {}), ("open", "sigmoid", HALF), ("uniform", "softmax", {}), ("uniform", "softmax", HALF)],
)
def test_rows_that_see_no_key(policy, normalizer, options):
    """Documents, of which some queries' have no key, and causal with more queries than keys."""
    inputs = {"own": ac.Input("b", "q_idx", dtype="int"), "doc": ac.Input("b", "kv_idx", dtype="int")}
    variant = ac.Variant(
        mask=ac.causal & (lambda b, q_idx, kv_idx, own, doc: own[b, q_idx] == doc[b, kv_idx]),
        normalizer=normalizer,
        dead_rows=policy,
        inputs=inputs,
    )
    written = ac.loads_toml(
        f"dead_rows = '{policy}'\n[stages]\nnormalizer = '{normalizer}'\n"
        "mask = 'kv_idx <= q_idx + kv_len - q_len and own[b, q_idx] == doc[b, kv_idx]'\n"
        "[inputs]\nown = { index = ['b', 'q_idx'], dtype = 'int' }\ndoc = { index = ['b', 'kv_idx'], dtype = 'int' }"
    )
    assert written.graph.digest == variant.graph.digest != ac.Variant(normalizer=normalizer, mask=ac.causal)
    arguments = draw(2, 4, 37, 16), draw(2, 2, 29, 16, seed=1), draw(2, 2, 29, 24, seed=2)
    generator = torch.Generator().manual_seed(0)
    own, doc = torch.randint(0, 4, (2, 37), generator=generator), torch.randint(0, 3, (2, 29), generator=generator)
    shown = (causal(37, 29) & (own[..., None] == doc[:, None]))[:, None]
    dead = ~shown.any(-1, keepdim=True)
    assert dead.any(2).all()
    assert not dead.all()

    def oracle(q, k, v, own, doc):
        s = score(q, k)
        if policy == "uniform":
            return torch.where(dead, 1 / 29, softmax(s, shown)) @ rep(v, 4)
        weights = softmax(s, shown | dead)
        if normalizer == "sigmoid":
            weights = torch.where(shown | dead, (s - torch.tensor(29.0).log()).sigmoid(), 0.0)
        return weights @ rep(v, 4)

    agree(variant, oracle, arguments, own=own.int(), doc=doc.int(), **options)


def test_outputs_see_the_same_weights():
    variant = ac.Variant(mask=ac.causal, normalizer=over_queries, dead_rows="open")
    variant = variant.with_outputs(received=lambda col, weight: col.sum(weight), seen=lambda row: row.count())
    q, k, v = (draw(1, 2, n, 16, seed=i).float() for i, n in enumerate((21, 13, 13)))
    received, seen = ac.compile(variant)(q, k, v, outputs=("received", "seen"))
    torch.testing.assert_close(received, torch.ones(1, 2, 13))
    assert seen[0, 0].tolist() == [13] * 8 + list(range(1, 14))  # 8 rows saw no key


def test_torch_compile_follows_what_is_made_before():
    op = ac.compile(ac.Variant(mask=ac.causal, normalizer=slots, dead_rows="open"))
    q, k, v = (draw(1, 2, n, 16, seed=i).float().requires_grad_() for i, n in enumerate((21, 13, 13)))
    compiled = torch.compile(lambda *x: op(*x), backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(q, k, v).square().sum(), (q, k, v)) for f in (op, compiled)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def refused(reason, **stages):
    with pytest.raises(UnsupportedError, match=reason):
        ac.compile(ac.Variant(**stages))
    (finding, *_) = lint(ac.Variant(**stages).graph)
    assert finding.level == "error"


def test_a_column_of_zeros_has_its_gradient():
    """No log of 0: the sum of a column whose scores are all negative is 0, and so is its slope."""

    def rectified(score, col):
        return ac.relu(score) / (1 + col.sum(ac.relu(score)))

    q, k, v = draw(1, 1, 9, 16).abs(), draw(1, 1, 7, 16, seed=1).abs(), draw(1, 1, 7, 16, seed=2)
    k[:, :, ::2] *= -1

    def oracle(q, k, v):
        p = score(q, k).relu()
        return p / (1 + p.sum(-2, keepdim=True)) @ v

    agree(ac.Variant(normalizer=rectified), oracle, (q, k, v))


def test_wrong_tensors_are_told_as_ever():
    q, k, v = (draw(1, 2, n, 16, seed=i).float() for i, n in enumerate((5, 9, 9)))
    op = ac.compile(ac.Variant(normalizer=over_queries, mask=ac.causal, dead_rows="open"))
    for wrong, reason in (((q[0], k, v), "expected 4 dimensions"), ((q, k, v[:, :, :3]), "number of keys: 9 and 3")):
        with pytest.raises(ac.InputError, match=reason):
            op(*wrong)
    with pytest.raises(ac.InputError, match="has no input 'gain'"):
        op(q, k, v, gain=q)


def test_a_mask_that_shows_all_has_no_dead_rows():
    q, k, v = (draw(1, 1, n, 16, seed=i).float() for i, n in enumerate((5, 9, 9)))
    op = ac.compile(ac.Variant(dead_rows="open"))
    assert not op.plan.made
    torch.testing.assert_close(op(q, k, v), score(q, k).softmax(-1) @ v, rtol=1e-5, atol=1e-6)


def test_what_is_no_column_sum_is_refused():
    def of_rows(score, row, col):
        p = ac.softmax(score, row)
        return p / col.sum(p)

    with pytest.raises(SpecError, match=r"col.sum is over a value that knows its whole row(.|\n)*second op"):
        ac.Variant(normalizer=of_rows)
    refused("other than as the shift", normalizer=lambda score, col: ac.exp(score - col.max(score)))
    refused("terms of a column sum are positive", normalizer=lambda score, col: score / col.sum(score))
    refused(
        "reads h_kv",
        score=lambda score, h_kv, x: score + x[h_kv],
        normalizer=over_queries,
        inputs={"x": ac.Input("h_kv")},
    )
    with pytest.raises(SpecError, match=r"no col reduction is called 'root'"):
        ac.loads_toml("[stages]\nnormalizer = 'col.root(score)'")


def test_what_policies_for_dead_rows_are_refused():
    refused("equal scores give equal weights", normalizer="softmax1", mask=ac.causal, dead_rows="uniform")
    refused("equal scores give equal weights", normalizer="sigmoid", mask=ac.causal, dead_rows="uniform")
    with pytest.raises(SpecError, match=r"spec.toml:1: dead_rows is 'mean'(.|\n)*\^(.|\n)*zero, open, uniform"):
        ac.loads_toml("dead_rows = 'mean'", file="spec.toml")
    with pytest.raises(SpecError, match="with 2 branches"):
        ac.Variant(
            branches=2,
            dead_rows="open",
            reduction=lambda weight, v_vec, row: row.sum((weight[0] - weight[1]) * v_vec),
        )
    assert not [f for f in lint(ac.Variant(mask=ac.sliding_window(4), dead_rows="open").graph) if f.stage == "mask"]


def test_several_ops_are_no_single_file():
    plan, ks = Plan(ac.Variant(normalizer=over_queries).graph), KernelSchedule(64, 64, 4, 2)
    with pytest.raises(UnsupportedError, match="col_lse_0, which another op makes"):
        standalone(plan, 64, 64, Schedule(ks, ks, ks), "bf16", device_for("sm_90"))
