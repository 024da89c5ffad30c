"""Calls of the Gluon kernels' text on a model of the machine, held against the reference."""

import re
from functools import cache

import torch
import triton.language as tl

import attncc as ac
from attncc.codegen.plan import Plan
from attncc.codegen.render import render
from attncc.runtime.reference import reference
from attncc.runtime.samples import Shape, sample_inputs
from attncc.runtime.shapes import bind
from attncc.runtime.verify import check, eager
from attncc.schedule import hopper_backward
from tests.codegen import machine

OPTIONS = {"DOT": tl.float16, "PRECISION": "ieee", "FAST_MATH": False}
#: the log of a key's sum over the queries, as a plan has it that needs one
COLUMN = "col_lse_0"
GROUPED = Shape(1, 2, 1, 130, 150, 64, 64)
STRIDED = Shape(1, 2, 2, 100, 140, 96, 64, strided=True)


def schedule(shape, warps, sums=True, rows=128, splits=1):
    tiles = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}
    wide = hopper_backward.wide(shape.d_qk, shape.d_v)
    return {
        "forward": {"BLOCK_M": rows, "BLOCK_N": 64, "STAGES": 2, "programs": 3},
        "dkdv": {
            "BLOCK_M": hopper_backward.ROWS,
            "BLOCK_N": 64 if hopper_backward.shares_keys(shape.d_qk, shape.d_v, warps) else 128,
            "STAGES": 3 if wide and shape.d_qk < 256 else 2,
            "programs": 3,
            "SPLITS": splits,
            "SUM_DQ": not wide,
            "ORDERED": not sums,
        },
        "dq": tiles,
        "pair": tiles,
    }


def two_norm(score, row):
    p = ac.exp(score - row.max(score))
    return p / ac.sqrt(row.sum(p * p))


#: a row's sum is of other terms than its weights
TWO_NORM = ac.Variant(name="two_norm", mask=ac.causal, normalizer=two_norm)


def mixed(weight, tilt, h, row, v_vec):
    return row.sum((tilt[h] * weight[0] + weight[1]) * v_vec)


def windows(q_idx, kv_idx, branch):
    return (kv_idx <= q_idx) & ((branch == 0) | (q_idx - kv_idx < 40))


def unlike(score, row, kv_len, branch):
    p = ac.exp(score - row.max(score))
    return ac.sigmoid(score - ac.log(kv_len)) if branch == 0 else p / row.sum(p)


def with_distances(score, slopes, h, q_idx, kv_idx, branch):
    return score + slopes[h] * (kv_idx - q_idx) if branch == 1 else 5 * ac.tanh(score / 5)


def alike(score, row_bias, h, q_idx, kv_idx, branch):
    return (score + 0.1 * ac.sin(row_bias[h, q_idx] * (kv_idx + 1))) * (1 - 0.3 * branch)


def weighed_by_row(score, row, row_bias, h, q_idx):
    p = ac.exp(score - row.max(score))
    return p * (1 + 0.3 * row_bias[h, q_idx]) / row.sum(p)


def mixed_by_row(weight, row_bias, h, q_idx, row, v_vec):
    return row.sum((weight[0] - row_bias[h, q_idx] * weight[1]) * v_vec)


TILT = {"tilt": ac.Input("h", grad=True)}
ROW_BIAS = {"row_bias": ac.Input("h", "q_idx", grad=True)}
SLOPES = {**TILT, "slopes": ac.Input("h", default=lambda sizes: torch.linspace(0.01, 0.2, sizes["h"]), grad=True)}
#: branches that see other keys, a branch with no maximum beside one with, and one that reads distances
BRANCHES = (
    ac.Variant(name="two_windows", branches=2, mask=windows, reduction=mixed, inputs=TILT),
    ac.Variant(name="two_normalizers", branches=2, mask=ac.causal, normalizer=unlike, reduction=mixed, inputs=TILT),
    ac.Variant(name="two_scores", branches=2, score=with_distances, mask=ac.causal, reduction=mixed, inputs=SLOPES),
    ac.Variant(name="two_full", branches=2, reduction=mixed, inputs=TILT),
)
#: branches that share what is computed of a row, of a key and of a pair: each has a function of its own in the forward
SHARING = ac.Variant(
    name="two_alike",
    branches=2,
    score=alike,
    mask=ac.causal,
    normalizer=weighed_by_row,
    reduction=mixed_by_row,
    inputs=ROW_BIAS,
)


def by_key(weight, v_vec, row, b, h, kv_idx, gate):
    return row.sum(weight * gate[b, h, kv_idx] * v_vec)


#: what dp is multiplied by beside the slope is a key's, and the gradient of that a multiple of the slope
GATED_KEYS = ac.Variant(
    name="gated_keys", mask=ac.causal, reduction=by_key, inputs={"gate": ac.Input("b", "h", "kv_idx", grad=True)}
)
#: a bias by distance of pairs that a mask cuts, beside a product with what a query has
CUT_BIAS = ac.Variant(
    name="cut_bias",
    score=lambda score, table, h, q_idx, kv_idx, q_len: score / (2 + q_idx % 3) + table[h, kv_idx - q_idx + q_len - 1],
    mask=ac.causal & ac.sliding_window(90),
    inputs={"table": ac.Input("h", "distance", grad=True)},
)


def shifted_by_head(score, shift, h):
    return 3 * ac.tanh(score / 3) + shift[h]


#: what a score adds is the same for all rows of a head, or of all heads
SHIFTED = (
    ac.Variant(name="shifted", score=lambda score: score - 0.5, mask=ac.causal),
    ac.Variant(name="shifted_by_head", score=shifted_by_head, inputs={"shift": ac.Input("h", grad=True)}),
)


def rising(score, kv_idx):
    return score + kv_idx / 4


#: the weight of a key past the end would be more than 16 bits hold
RISING = (
    ac.Variant(name="rising", score=rising),
    ac.Variant(name="two_rising", branches=2, score=rising, reduction=mixed, inputs=TILT),
)
OWN = {own.name: own for own in (TWO_NORM, GATED_KEYS, CUT_BIAS, SHARING, *BRANCHES, *SHIFTED, *RISING)}


def variant(name):
    return OWN[name] if name in OWN else ac.variants.get(name)


@cache
def source(name, d_qk, d_v, shared_key=False, strips=0, deals=False):
    plan = Plan(variant(name).graph)
    whole = d_qk * plan.graph.branches
    d_k = d_qk if shared_key else None
    return render(plan, whole, d_v, True, True, "gluon", d_k, backward_in="gluon", strips=strips, deals=deals)


def poisoned(text):
    """The sums of dQ, dK and dV begin as NaN, and counts of who has added as some number."""
    for shape in (r"(?<=    sums = )torch.empty\((\(.*\))", r"torch.empty\((\(blocks \* .*\))"):
        text, found = re.subn(shape + ", dtype=", r'torch.full(\1, float("nan"), dtype=', text)
        assert found <= 1
    return text.replace("added = torch.empty(turns, ", "added = torch.full((turns,), 2, ")


class Run:
    """A forward and, when asked for, a backward of one variant at one shape; `text` may be changed before."""

    def __init__(self, name, shape, change=lambda text: text, rows=128, strips=0, deals=False):
        self.name, self.shape = name, shape
        self.plan = Plan(variant(name).graph)
        self.warps = self.plan.facts.warps
        self.sample = sample_inputs(self.plan.graph, shape, torch.float16)
        if COLUMN in self.sample.inputs:  # a softmax over the queries, whose sum the forward's first sweep makes
            q, k = self.sample.q.double(), self.sample.k.double().repeat_interleave(shape.heads // shape.kv_heads, 1)
            scores = q @ k.transpose(-1, -2) * shape.d_qk**-0.5
            self.sample.inputs[COLUMN] = scores.logsumexp(2).float().contiguous()
        text = source(name, shape.d_qk, shape.d_v, shape.shared_key, strips, deals)
        self.module = machine.load(change(poisoned(text)), name)
        s = self.sample
        bound = bind(self.plan.graph, s.q, s.k, s.v, None, s.inputs)
        self.arguments = (s.q, s.k, s.v, *bound.tensors.values(), *bound.scalars.values(), bound.scale)
        self.out, *self.rows = self.module.forward(*self.arguments, schedule(shape, self.warps, rows=rows), OPTIONS)

    def backward(self, wanted=(), sums=True, dlse=None, splits=1):
        results = dict(zip(self.plan.facts.results, self.rows, strict=True))
        saved = tuple(results[n] for n in self.plan.facts.saved)
        self.dout = torch.randn(self.out.shape, generator=torch.Generator().manual_seed(3)).half()
        return self.module.backward(
            *(*self.arguments, self.out, saved, self.dout, dlse, wanted),
            *(schedule(self.shape, self.warps, sums, splits=splits), OPTIONS),
        )

    def expected(self, attend, kind):
        """(out, gradients by name) by a quadratic implementation, in elements of `kind`."""
        s = self.sample
        given = {n: x for n, x in s.inputs.items() if n != COLUMN}
        leaf = {"q": s.q, "k": s.k, "v": s.v, **{n: x for n, x in given.items() if isinstance(x, torch.Tensor)}}
        leaf = {n: x.clone().to(kind).requires_grad_() if x.is_floating_point() else x for n, x in leaf.items()}
        numbers = {n: x for n, x in given.items() if not isinstance(x, torch.Tensor)}
        wanted = ["q", "k", "v", *(d.name for d in self.plan.graph.inputs if d.grad)]
        out = attend(variant(self.name), **leaf, **numbers)
        found = torch.autograd.grad(out, [leaf[n] for n in wanted], self.dout.to(out.dtype), materialize_grads=True)
        return out.detach(), dict(zip(wanted, found, strict=True))

    def failures(self, gradients):
        exact, plain = self.expected(reference, torch.float64), self.expected(eager, torch.float16)
        names = [*("q", "k", "v"), *(d.name for d in self.plan.graph.inputs if d.grad)]
        found = [check("out", self.out, exact[0], plain[0])]
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                pair = (exact[1][name], plain[1][name])
                found.append(check(f"d{name}", gradient, *pair, "gradient", dtype=torch.float16))
        return [f for f in found if not f.ok]

    def noticed(self, wanted=(), **options):
        """What the model notices of a changed text: the results that are wrong, or that it ended the backward."""
        try:
            return [f.name for f in self.failures(self.backward(wanted, **options))]
        except machine.MachineError:
            return ["ended"]
