"""The Gluon kernels' text on a model of the machine: values against the reference, and races that it must notice."""

import re
from functools import cache

import pytest
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


TILT = {"tilt": ac.Input("h", grad=True)}
SLOPES = {**TILT, "slopes": ac.Input("h", default=lambda sizes: torch.linspace(0.01, 0.2, sizes["h"]), grad=True)}
#: branches that see other keys, a branch with no maximum beside one with, and one that reads distances
BRANCHES = (
    ac.Variant(name="two_windows", branches=2, mask=windows, reduction=mixed, inputs=TILT),
    ac.Variant(name="two_normalizers", branches=2, mask=ac.causal, normalizer=unlike, reduction=mixed, inputs=TILT),
    ac.Variant(name="two_scores", branches=2, score=with_distances, mask=ac.causal, reduction=mixed, inputs=SLOPES),
    ac.Variant(name="two_full", branches=2, reduction=mixed, inputs=TILT),
)


def by_key(weight, v_vec, row, b, h, kv_idx, gate):
    return row.sum(weight * gate[b, h, kv_idx] * v_vec)


#: what dp is multiplied by beside the slope is a key's, and the gradient of that a multiple of the slope
GATED_KEYS = ac.Variant(
    name="gated_keys", mask=ac.causal, reduction=by_key, inputs={"gate": ac.Input("b", "h", "kv_idx", grad=True)}
)
OWN = {own.name: own for own in (TWO_NORM, GATED_KEYS, *BRANCHES)}


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
        leaf = {"q": s.q, "k": s.k, "v": s.v, **{n: x for n, x in s.inputs.items() if isinstance(x, torch.Tensor)}}
        leaf = {n: x.clone().to(kind).requires_grad_() if x.is_floating_point() else x for n, x in leaf.items()}
        numbers = {n: x for n, x in s.inputs.items() if not isinstance(x, torch.Tensor)}
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


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("causal", GROUPED),
        ("causal", Shape(1, 1, 1, 100, 130, 128, 80)),
        ("causal", Shape(1, 2, 1, 100, 130, 72, 40, strided=True)),
        ("full", STRIDED),
        ("alibi", GROUPED),
        ("softcap", STRIDED),
        ("document", GROUPED),
        ("sigmoid", GROUPED),
        ("cog", Shape(1, 2, 1, 100, 130, 72, 40, strided=True)),
        ("qk_temperature", GROUPED),
        ("dense_bias", GROUPED),
        ("image_gain", GROUPED),
        ("parallel_context", GROUPED),
        ("t5_bias", GROUPED),
        ("bam", STRIDED),
        ("kerple", GROUPED),
        ("faceformer", Shape(1, 2, 1, 150, 200, 128, 128)),
    ],
)
def test_values(name, shape):
    run = Run(name, shape)
    assert not run.failures(run.backward())


PAIR = Shape(1, 2, 1, 130, 150, 64, 128)


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("differential", PAIR, {}),
        ("differential", PAIR, {"sums": False}),
        ("differential", Shape(1, 4, 1, 130, 90, 64, 80), {"splits": 4}),  # rows that see nothing
        ("differential", Shape(1, 2, 2, 100, 140, 32, 64, strided=True), {}),
        ("differential", Shape(1, 2, 1, 130, 150, 64, 128, shared_key=True), {}),
        ("two_windows", PAIR, {"sums": False}),
        ("two_normalizers", PAIR, {}),
        ("two_scores", PAIR, {}),
        ("two_full", Shape(1, 1, 1, 260, 300, 64, 64), {"sums": False}),
    ],
)
def test_branches(name, shape, options):
    run = Run(name, shape)
    wanted = tuple(d.name for d in run.plan.graph.inputs if d.grad)
    assert not run.failures(run.backward(wanted, **options))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # of the forward: operands are waited for, and slots given back when all branches have read them
        ("mbarrier.wait(v_full.index(stage), (count // STAGES) & 1)", "pass"),
        ("mbarrier.wait(k_full.index(following), ((count + 1) // STAGES) & 1)", "pass"),
        ("k_empty = _barriers(STAGES, CONSUMERS)", "k_empty = _barriers(STAGES, 1)"),
        ("        tma.store_wait(0)\n        _group_barrier()\n        out_0", "        out_0"),
        # of the backward
        ("mbarrier.wait(ds_empty.index(0), (count + 1) & 1)", "pass"),
        ("mbarrier.wait(ds_full.index(0), count & 1)", "pass"),
        ("mbarrier.wait(do_full.index(stage), (count // STAGES) & 1)", "pass"),
        ("mbarrier.wait(q_full.index(stage), (count // STAGES) & 1, pred=turn + 1 < turns)", "pass"),
        ("mbarrier.wait(dq_empty.index(consumer), count & 1)", "pass"),
        ("mbarrier.wait(keys_read.index(0), 0)", "pass"),
        ("q_empty = _barriers(STAGES, 2)", "q_empty = _barriers(STAGES, 1)"),
        ("fence_async_shared()\n                mbarrier.arrive(ds_full", "mbarrier.arrive(ds_full"),
        # and what branches share and do not
        ("delta_0 = delta\n", "delta_0 = delta + delta_1\n"),
        ("ds_tiles.index(1).permute", "ds_tiles.index(0).permute"),
    ],
)
def test_the_model_notices_what_is_left_out_of_branches(before, after):
    assert before in source("two_full", 64, 64)
    try:
        run = Run("two_full", Shape(1, 3, 3, 400, 450, 64, 64), lambda text: text.replace(before, after))
        noticed = run.failures(run.backward())
    except machine.MachineError:
        return
    assert noticed


@pytest.mark.parametrize(
    ("name", "shape", "strips"),
    [
        ("causal", Shape(1, 2, 1, 100, 130, 128, 80), 2),  # the slope is the weight
        ("softcap", GROUPED, 2),
        ("alibi", Shape(1, 1, 1, 130, 150, 128, 128), 4),  # places within a tile
        ("document", GROUPED, 8),  # what is read a query, which the warp that loads has
        ("cog", Shape(1, 1, 1, 100, 130, 72, 40, strided=True), 2),
        ("qk_temperature", GROUPED, 4),
        ("parallel_context", GROUPED, 2),
        ("t5_bias", GROUPED, 2),
        ("relative_bias", Shape(1, 1, 1, 100, 130, 96, 96), 4),
        ("relative_bias", Shape(1, 1, 1, 100, 70, 128, 64), 8),
        ("bam", STRIDED, 4),
        ("sigmoid", Shape(1, 1, 1, 150, 130, 128, 64), 8),
    ],
)
def test_tiles_in_strips(name, shape, strips):
    run = Run(name, shape, strips=strips)
    wanted = tuple(d.name for d in run.plan.graph.inputs if d.grad)
    assert not run.failures(run.backward(wanted))


@pytest.mark.parametrize(
    ("name", "shape", "strips"),
    [
        ("elu1", Shape(1, 2, 1, 100, 130, 128, 128), 0),  # a slope that is not the weight
        ("softpick", GROUPED, 0),  # one that has a sign, for which ds asks
        ("softpick", Shape(1, 1, 1, 150, 130, 128, 80), 2),
        ("head_gates", GROUPED, 0),  # dp is multiplied by what a query has, which is read again
        ("head_gates", Shape(1, 1, 1, 130, 150, 128, 64), 2),
        ("bounded_sum", GROUPED, 4),  # ds has nothing of a pair but dp
        ("bee_rag", Shape(1, 2, 1, 100, 130, 128, 80), 0),  # a sum a key of ds itself
        ("bee_rag", Shape(1, 1, 1, 100, 130, 64, 64), 2),
        ("key_gain", Shape(1, 1, 1, 150, 130, 128, 128), 4),  # one that keeps the scores
        ("gated_keys", GROUPED, 0),
        ("gated_keys", Shape(1, 1, 1, 100, 70, 128, 128), 2),
        ("elu1", Shape(1, 1, 1, 100, 70, 256, 256), 0),
    ],
)
def test_what_waits_for_dp(name, shape, strips):
    run = Run(name, shape, strips=strips)
    wanted = tuple(d.name for d in run.plan.graph.inputs if d.grad)
    assert not run.failures(run.backward(wanted))


def test_strips_in_a_fixed_order_and_of_heads_of_a_group_apart():
    run = Run("softcap", Shape(1, 4, 1, 260, 300, 128, 80), strips=2)
    first, second = (run.backward(sums=False) for _ in range(2))
    assert not run.failures(first)
    assert all(map(torch.equal, first[:3], second[:3]))
    assert not run.failures(run.backward(splits=4))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # dK and dV are stored when both warpgroups have written them
        ("        mbarrier.wait(written.index(0), 0)\n", ""),
        # a strip has its own queries' statistics
        ("slice(strip * WIDTH, WIDTH, 0)", "slice(0, WIDTH, 0)"),
        # and its own place in the tile
        ("tile * BLOCK_M + strip * WIDTH +", "tile * BLOCK_M +"),
    ],
)
def test_the_model_notices_what_goes_wrong_in_strips(before, after):
    assert before in source("softcap", 128, 128, strips=2)
    run = Run("softcap", Shape(1, 1, 1, 130, 150, 128, 128), lambda text: text.replace(before, after), strips=2)
    try:
        noticed = run.failures(run.backward())
    except machine.MachineError:
        return
    assert noticed


@pytest.mark.parametrize("name", ["alibi", "sink"])
def test_dq_in_a_fixed_order_and_the_gradients_of_rows(name):
    run = Run(name, GROUPED)
    wanted = tuple(d.name for d in run.plan.graph.inputs if d.grad)
    assert not run.failures(run.backward(wanted, sums=False))
    assert not run.failures(run.backward(wanted))


#: a bias by distance of pairs that a mask cuts, beside a product with what a query has
CUT_BIAS = ac.Variant(
    name="cut_bias",
    score=lambda score, table, h, q_idx, kv_idx, q_len: score / (2 + q_idx % 3) + table[h, kv_idx - q_idx + q_len - 1],
    mask=ac.causal & ac.sliding_window(90),
    inputs={"table": ac.Input("h", "distance", grad=True)},
)
OWN[CUT_BIAS.name] = CUT_BIAS


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("relative_bias", Shape(2, 2, 1, 150, 130, 128, 64), {}),  # keys past the end have a distance, too
        ("t5_bias", Shape(1, 4, 2, 130, 200, 128, 128), {"splits": 2}),
        ("relative_bias", Shape(1, 1, 1, 200, 70, 64, 64), {}),  # a warpgroup has dQ
        ("cut_bias", Shape(1, 2, 2, 300, 280, 128, 80), {}),
        ("cut_bias", Shape(1, 1, 1, 70, 400, 64, 64), {}),  # keys that nobody sees
        ("relative_bias", Shape(1, 2, 1, 100, 90, 128, 64), {"sums": False}),  # in a fixed order, by its own kernel
    ],
)
def test_what_has_an_entry_a_distance_is_summed_with_dk_and_dv(name, shape, options):
    run = Run(name, shape)
    launches = []
    launch = run.module._launch
    run.module._launch = lambda kernel, *rest: (launches.append(kernel.__name__), launch(kernel, *rest))
    assert not run.failures(run.backward(("table",), **options))
    assert ("dtable_0_kernel" in launches) == ("sums" in options)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (" | (block_lo + BLOCK_N > kv_len)", ""),
        ("gl.where(ahead, ", "gl.where(key >= 0, "),
        ("far[i + 1]", "far[i]"),
        ("row + 8 - 8 * which", "row + 8 + 8 * which"),
    ],
)
def test_the_model_notices_what_goes_wrong_by_distance(before, after):
    assert before in source("t5_bias", 128, 64)
    run = Run("t5_bias", Shape(1, 2, 1, 150, 130, 128, 64), lambda text: text.replace(before, after))
    try:
        noticed = run.failures(run.backward(("table",)))
    except machine.MachineError:
        return
    assert [f.name for f in noticed] == ["dtable"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("causal", Shape(1, 2, 1, 140, 300, 128, 128)),
        ("causal", Shape(1, 1, 1, 300, 130, 128, 80)),  # rows that see nothing
        ("causal", Shape(1, 1, 1, 70, 40, 128, 80)),
        ("full", Shape(1, 1, 1, 100, 300, 96, 128, strided=True)),
        ("sliding_window", Shape(1, 1, 1, 400, 420, 128, 80)),
        ("document", Shape(1, 1, 1, 130, 300, 128, 80)),
        ("causal", Shape(1, 6, 2, 260, 300, 128, 80)),
        # a warpgroup has dQ, and other warps add it: in one piece, and in two
        ("causal", GROUPED),
        ("full", Shape(1, 2, 2, 200, 400, 64, 48)),
        ("sliding_window", Shape(1, 1, 1, 400, 420, 64, 64)),
        ("document", Shape(1, 2, 1, 130, 300, 80, 96)),
    ],
)
def test_in_a_fixed_order_programs_add_to_a_tile_of_dq_in_their_turn(name, shape):
    run = Run(name, shape)
    first, second = (run.backward(sums=False) for _ in range(2))  # what is early and what is late differs
    assert not run.failures(first)
    assert all(map(torch.equal, first[:3], second[:3]))


def test_the_model_notices_a_barrier_whose_memory_a_tile_may_be_given():
    run = Run("causal", GROUPED, lambda text: re.sub(r"\n    _retire\(ds_full, 2\)", "", text))
    with pytest.raises(machine.MachineError, match="before the kernel ends"):
        run.backward()


def test_blocks_of_keys_with_two_runs_of_tiles_take_no_turns():
    run = Run("prefix_lm", GROUPED)
    assert not run.failures(run.backward(sums=False))


@pytest.mark.parametrize("d", [128, 96, 64])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("_pass_turn_on(summed_at)", "pass"),
        # it is another's turn when what was added is in memory
        ("    _stores_are_done(0)\n", ""),
        # those that others wait for start first
        ("n_block = n_blocks - 1 - n_block", "pass"),
        # who visits a tile
        ("(begin <= tile) & ", ""),
    ],
)
def test_the_model_notices_who_comes_before_their_turn(d, before, after):
    assert source("sliding_window", d, 80).count(before) >= 1
    run = Run("sliding_window", Shape(1, 1, 1, 400, 420, d, 80), lambda text: text.replace(before, after))
    try:
        noticed = run.failures(run.backward(sums=False))
    except machine.MachineError:
        return
    assert noticed


@pytest.mark.parametrize("d", [64, 96])
def test_the_model_notices_a_tile_of_dq_that_overtakes_who_adds_it(d):
    text = source("full", d, d)
    waits = set(re.findall(r"mbarrier\.wait\(dq_empty\.index\(.*", text[text.index("def _sum_queries") :]))
    assert len(waits) == (1 if d == 64 else 2)
    for wait in waits:
        run = Run("full", Shape(1, 4, 4, 600, 130, d, d), lambda text, wait=wait: text.replace(wait, "pass"))
        try:
            noticed = run.failures(run.backward(sums=False))
        except machine.MachineError:
            continue
        assert noticed


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize(
    ("name", "shape", "splits"),
    [
        ("causal", Shape(1, 4, 1, 130, 150, 64, 48), 2),
        ("alibi", Shape(1, 4, 1, 130, 150, 64, 48), 4),
        ("document", Shape(1, 4, 1, 130, 150, 64, 48), 4),
        ("causal", Shape(2, 6, 2, 140, 200, 128, 80), 3),
        ("full", Shape(1, 4, 2, 70, 300, 128, 80, strided=True), 2),
        ("causal", Shape(1, 2, 1, 130, 150, 192, 128), 2),
        ("causal", Shape(1, 3, 1, 5, 700, 256, 192), 3),  # more counts than rows of queries
    ],
)
def test_the_heads_of_a_group_add_up_dk_and_dv_in_turns(name, shape, splits, sums):
    run = Run(name, shape)
    first, second = (run.backward(splits=splits, sums=sums) for _ in range(2))
    assert not run.failures(first)
    assert all(map(torch.equal, first[1:3], second[1:3]))
    assert sums or torch.equal(first[0], second[0])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("_pass_turn_on(ADDED_PTR + slot)", "pass"),
        ("_wait_for_turn(ADDED_PTR + slot, share)", "_wait_for_turn(ADDED_PTR + slot, share + 1)"),
        # those that others wait for start first
        ("share = line % SPLITS", "share = SPLITS - 1 - line % SPLITS"),
        # the first adds to nothing, the last rounds the sum of all
        ("if share > 0:", "if True:"),
        ("rounds = share + 1 == SPLITS", "rounds = share == 0"),
        ("slot = block * 2 + consumer", "slot = block * 2"),
        # and nobody has added before
        ("tl.store(ADDED_PTR + turn, 0", "tl.store(ADDED_PTR + turn, 1"),
    ],
)
def test_the_model_notices_who_adds_to_dk_and_dv_before_their_turn(before, after):
    shape = Shape(1, 3, 1, 140, 150, 128, 80)
    assert source("causal", 128, 80).count(before) >= 1
    run = Run("causal", shape, lambda text: text.replace(before, after))
    try:
        noticed = run.failures(run.backward(splits=3))
    except machine.MachineError:
        return
    assert noticed


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("causal", Shape(1, 2, 1, 130, 150, 192, 128), {}),
        ("causal", Shape(1, 2, 1, 130, 150, 192, 128), {"splits": 2}),
        ("full", Shape(1, 1, 1, 200, 70, 256, 256), {}),
        ("softcap", Shape(1, 1, 1, 130, 150, 160, 144, strided=True), {}),
        ("document", Shape(1, 1, 1, 260, 150, 256, 64), {}),
        ("cog", Shape(1, 1, 1, 130, 150, 128, 192), {}),
        ("softcap", Shape(1, 1, 1, 130, 150, 256, 200), {}),
        ("causal", Shape(1, 1, 1, 210, 70, 136, 136), {}),
        ("sink", Shape(1, 1, 1, 70, 210, 136, 136), {"wanted": ("sink",)}),
    ],
)
def test_wide_heads(name, shape, options):
    run = Run(name, shape)
    assert not run.failures(run.backward(**options))


@pytest.mark.parametrize(
    ("name", "threshold"),
    [("causal", "row_max + {}"), ("alibi", "offset + {}"), ("cog", "row_max + {}"), ("two_norm", "> {}")],
)
def test_a_maximum_that_moves_seldom(name, threshold):
    """At the threshold that is generated a random sample's moves once; at a lower one it does for some of the rows."""
    generated = threshold.format("8.0")
    assert generated in source(name, 64, 256)
    for by in ("8.0", "0.25"):
        change = threshold.format(by)
        run = Run(name, Shape(1, 1, 1, 130, 260, 64, 256), lambda text, to=change: text.replace(generated, to))
        assert not [f for f in run.failures(run.backward()) if "out" in str(f)]


def test_three_warpgroups_scan_documents_in_blocks_of_192():
    run = Run("document", Shape(1, 2, 1, 300, 250, 64, 64), rows=192)
    assert not run.failures(run.backward())


def test_rows_that_see_nothing_give_zeros():
    run = Run("causal", Shape(1, 2, 2, 210, 70, 64, 64))
    dq, dk, dv = run.backward()
    assert not run.failures((dq, dk, dv))
    assert not dq[:, :, :140].any()


def test_an_infinite_cotangent_of_the_lse_of_a_row_that_sees_nothing_goes_nowhere():
    run = Run("causal", Shape(1, 1, 1, 210, 70, 64, 64))
    dlse = torch.zeros(1, 1, 210)
    clean = run.backward(dlse=dlse)
    dlse[:, :, :140] = float("-inf")
    for found, expected in zip(run.backward(dlse=dlse)[1:], clean[1:], strict=True):
        assert torch.equal(found, expected)


def test_a_slot_of_values_of_keys_is_refilled_when_they_were_read():
    """Consumers leave a tile of keys before they read what its keys have: with as many slots the warp that loads would
    be too early."""
    shape = Shape(1, 2, 2, 130, 700, 72, 64)
    assert "% (STAGES + 1)" in source("bee_rag", 72, 64)
    run = Run("bee_rag", shape)
    assert not run.failures(run.backward())
    broken = Run("bee_rag", shape, lambda text: text.replace("% (STAGES + 1)", "% STAGES"))
    assert broken.failures(broken.backward())


@pytest.mark.parametrize("kind", [torch.int8, torch.int64])
def test_integers_of_any_width_are_read_a_key(kind):
    run = Run("document", GROUPED)
    s = run.sample
    arguments = (s.q, s.k, s.v, s.inputs["doc"].to(kind), run.arguments[-1])
    out = run.module.forward(*arguments, schedule(GROUPED, run.warps), OPTIONS)
    assert torch.equal(out[0], run.out)


#: mutations of the kernel in which a warpgroup has dQ
OF_ONE_WITH_DQ = [
    # a matmul's operands are waited for
    ("mbarrier.wait(do_full.index(stage), (count // STAGES) & 1, pred=turn + 1 < turns)", "pass"),
    ("mbarrier.wait(v_full.index(0), 0)", "pass"),
    # a buffer is given back when its last matmul is done, not before
    ("mbarrier.wait(ds_empty.index(half), ((count >> 1) + 1) & 1)", "pass"),
    ("mbarrier.wait(q_empty.index(stage), (count // STAGES + 1) & 1)", "pass"),
    ("            tma.store_wait(1)", "            pass"),
    ("mbarrier.wait(keys_read.index(0), 0)", "pass"),
    # the asynchronous units see what threads wrote
    ("fence_async_shared()\n                mbarrier.arrive(ds_full", "mbarrier.arrive(ds_full"),
    # barriers count
    ("mbarrier.arrive(q_empty.index(last), count=1)", "pass"),
    ("ds_full = _barriers(2, 2)", "ds_full = _barriers(2, 1)"),
]
#: and of that in which two share it
OF_TWO_WITH_DQ = [
    # what comes first to a tile of dQ lies in memory before others hear of it, and they see it
    ("    _stores_are_done(0)\n", ""),
    ("_see_stores(count)", "pass"),
    ("summed == NOTHING", "summed == BEGUN"),
    ("mbarrier.wait(dq_empty.index(consumer), count & 1)", "pass"),
    ("            tma.store_wait(1)\n", ""),
    ("            mbarrier.wait(ds_full.index(half), (count >> 1) & 1)\n    ", "    "),
]


@pytest.mark.parametrize(
    ("d", "before", "after"),
    [(64, *change) for change in OF_ONE_WITH_DQ] + [(128, *change) for change in OF_TWO_WITH_DQ],
)
def test_the_model_notices_what_is_left_out(d, before, after):
    assert before in source("full", d, d)

    def broken(text):
        return text.replace(before, after)

    heads = 16 if "ds_empty" in before else 3  # seldom is the third warpgroup two tiles behind
    run = Run("full", Shape(1, heads, heads, 600, 130, d, d), broken)
    try:
        noticed = run.failures(run.backward())
    except machine.MachineError:
        return
    assert noticed


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("mbarrier.wait(p_empty.index(consumer), parity ^ 1)", "pass"),
        ("mbarrier.wait(p_full.index(0), parity)", "pass"),
        ("do_empty = _barriers(STAGES, 2)", "do_empty = _barriers(STAGES, 1)"),
        ("fence_async_shared()\n            mbarrier.arrive(p_full", "mbarrier.arrive(p_full"),
        # and where each has keys of its own
        ("mbarrier.wait(q_full.index(stage), phase)\n            qk = ", "qk = "),
        ("mbarrier.wait(do_full.index(stage), phase)\n            dv_0 = ", "dv_0 = "),
        (
            "q_empty = _barriers(STAGES, 2)\n    do_full = _barriers(STAGES, 1)\n    written",
            "q_empty = _barriers(STAGES, 1)\n    do_full = _barriers(STAGES, 1)\n    written",
        ),
        ("written = _barriers(1, 2)", "written = _barriers(1, 1)"),
        # and of the kernel of dQ
        ("mbarrier.wait(k_empty.index(stage), (i // KEY_STAGES + 1) & 1)", "pass"),
        ("mbarrier.wait(v_full.index(value_stage), (i // VALUE_STAGES) & 1)", "pass"),
        ("mbarrier.wait(q_full.index(consumer), 0)\n    # ds", "# ds"),
        ("fence_async_shared()\n    _group_barrier()\n    _store_tile(DQ_DESC", "_store_tile(DQ_DESC"),
    ],
)
def test_the_model_notices_what_is_left_out_of_the_one_for_wide_heads(before, after):
    d_v = next(d for d in (136, 200) if before in source("full", 136, d))
    shape = Shape(1, 2, 2, 400, 450, 136, d_v)

    def broken(text):
        return text.replace(before, after)

    run = Run("full", shape, broken)
    try:
        noticed = run.failures(run.backward())
    except machine.MachineError:
        return
    assert noticed
