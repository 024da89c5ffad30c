"""The Gluon forward for Hopper: its text, and what the assembler makes of it. Values are checked on a GPU."""

from __future__ import annotations

import builtins
import re
import symtable
from dataclasses import replace
from functools import cache
from math import ceil

import pytest

import attncc as ac
from attncc.codegen.crosscompile import cross_compile
from attncc.codegen.hopper_backward import by_distance
from attncc.codegen.module import load_source
from attncc.codegen.plan import Plan
from attncc.codegen.render import render
from attncc.codegen.similarity import SimilaritySlots
from attncc.errors import UnsupportedError
from attncc.schedule import KernelSchedule, Schedule, device_for, hopper, hopper_backward
from attncc.schedule.problem import head_chunks
from tests.schedule.problems import problem

H100 = device_for("h100")
NAMES = [
    name
    for name, plan in ((name, Plan(ac.variants.get(name).graph)) for name in ac.variants.names())
    if plan.graph.value is None and SimilaritySlots(plan).plain_dot and not plan.only_triton
]


@cache
def plan(name):
    return Plan(ac.variants.get(name).graph)


def source(name, d_qk=128, d_v=128):
    warps = plan(name).facts.warps
    both = not warps.no_backward and hopper_backward.queries(d_qk, d_v, warps) is not None
    return render(plan(name), d_qk, d_v, True, forward_in="gluon", backward_in="gluon" if both else "triton")


def compiled(name, tiling, d_qk=128, d_v=128, dtype="bf16"):
    module = load_source(render(plan(name), d_qk, d_v, False, forward_in="gluon"), name)
    schedule = Schedule(tiling, tiling, tiling)
    return cross_compile(module, plan(name).graph, schedule, H100, dtype, only=("forward_kernel",))["forward_kernel"]


@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_tidy_and_names_only_what_it_is_handed(name):
    text = source(name)
    assert [line for line in text.split("\n") if line != line.rstrip()] == []
    module = symtable.symtable(text, name, "exec")
    known = {s.get_name() for s in module.get_symbols()} | set(dir(builtins))
    functions = {f.get_name(): f for f in module.get_children() if f.get_type() == "function"}
    for function in functions.values():
        assert {s.get_name() for s in function.get_symbols() if s.is_global()} <= known
    warps = ("_weigh", "_load", "_attend", "_load_queries", "_add_queries", "_gradients")
    for warp in (w for w in warps if w in functions):
        unused = {s.get_name() for s in functions[warp].get_symbols() if s.is_parameter() and not s.is_referenced()}
        assert unused == set()


def test_several_passes_are_refused():
    with pytest.raises(UnsupportedError, match="go over the keys once(.|\n)*backend='triton'"):
        source("entmax15")


def three_branches(weight, row, v_vec):
    return row.sum((weight[0] - weight[1] / 2 + weight[2]) * v_vec)


def test_branches_that_fill_no_tiles_are_refused():
    with pytest.raises(UnsupportedError, match="whole tiles of a branch(.|\n)*backend='triton'"):
        source("differential", 112)
    three = Plan(ac.Variant(branches=3, mask=ac.causal, reduction=three_branches).graph)
    with pytest.raises(UnsupportedError, match="heads of 192 in 3 branches(.|\n)*backend='triton'"):
        render(three, 192, 64, True, backward_in="gluon")


@pytest.mark.parametrize(
    ("name", "tiling", "dims", "dtype"),
    [
        ("causal", KernelSchedule(128, 128, 8, 2, "gluon"), (128, 128), "bf16"),
        ("alibi", KernelSchedule(192, 64, 12, 3, "gluon"), (64, 64), "fp16"),
        ("softcap", KernelSchedule(128, 64, 8, 2, "gluon"), (256, 256), "bf16"),
        ("sink", KernelSchedule(128, 128, 8, 2, "gluon"), (192, 128), "bf16"),
        ("sigmoid", KernelSchedule(128, 128, 8, 3, "gluon"), (96, 80), "bf16"),
        ("document", KernelSchedule(128, 64, 8, 2, "gluon"), (64, 128), "fp16"),
        ("causal", KernelSchedule(128, 128, 8, 2, "gluon"), (96, 96), "bf16"),
        ("sink", KernelSchedule(128, 128, 8, 2, "gluon"), (96, 96), "bf16"),
        ("full", KernelSchedule(192, 128, 12, 2, "gluon"), (64, 64), "bf16"),
        ("full", KernelSchedule(192, 128, 12, 3, "gluon"), (64, 64), "bf16"),
        ("causal", KernelSchedule(192, 128, 12, 3, "gluon"), (64, 64), "fp16"),
        ("alibi", KernelSchedule(128, 128, 8, 2, "gluon"), (128, 128), "bf16"),
    ],
)
def test_nothing_spills_and_the_memory_is_what_the_scheduler_counts(name, tiling, dims, dtype):
    kernel = compiled(name, tiling, *dims, dtype)
    counted = hopper.shared_memory("forward", tiling, replace(problem(), d_qk=dims[0], d_v=dims[1], dtype=dtype))
    assert kernel.spills == 0
    assert counted - hopper.RESERVED_BYTES < kernel.shared <= counted
    assert "wgmma.mma_async" in kernel.ptx
    assert "cp.async.bulk.tensor" in kernel.ptx
    assert "setmaxnreg" in kernel.ptx
    assert kernel.ptx.count("mbarrier.init") == kernel.ptx.count("mbarrier.inval") == len(set(barriers(kernel)))
    assert max(barriers(kernel)) - min(barriers(kernel)) < 256


def backward_compiled(name, tiling, d_qk, d_v, dtype, group=1, ordered=False, deals=False):
    text = render(plan(name), d_qk, d_v, True, True, forward_in="gluon", backward_in="gluon", deals=deals)
    triton = KernelSchedule(64, 64, 4, 2)
    schedule = Schedule(KernelSchedule(128, 64, 8, 2, "gluon"), tiling, triton, pair=triton)
    last = "dq_of_rows_kernel" if hopper_backward.wide(d_qk, d_v) else "finish_kernel"
    only = ("dkdv_kernel", "prepare_kernel", last)
    only_these = {"only": only, "group": group, "ordered": ordered}
    return cross_compile(load_source(text, name), plan(name).graph, schedule, H100, dtype, **only_these)


@pytest.mark.parametrize(
    ("name", "dims", "dtype", "group"),
    [
        ("causal", (128, 128), "bf16", 1),
        ("softcap", (128, 128), "bf16", 4),
        ("full", (64, 64), "fp16", 1),
        ("sliding_window", (96, 80), "bf16", 2),
        ("sink", (128, 64), "bf16", 1),
    ],
)
def test_the_backward_spills_nothing_and_adds_by_tma(name, dims, dtype, group):
    sized = replace(problem(kv_heads=16 // group), d_qk=dims[0], d_v=dims[1], dtype=dtype)
    tiling = hopper.tilings("dkdv", sized, H100)[0]
    dealt = hopper_backward.deals(tiling, sized)
    kernels = backward_compiled(name, tiling, *dims, dtype, group, deals=dealt)
    kernel = kernels["dkdv_kernel"]
    # softcap, where a program has several heads: one constant that each warp reads again
    assert kernel.spills <= (8 if (name, group) == ("softcap", 4) else 0)
    assert [k.spills for k in kernels.values() if k is not kernel] == [0, 0]
    assert not kernel.faults
    counted = hopper.shared_memory("dkdv", tiling, sized)
    assert counted - hopper.RESERVED_BYTES < kernel.shared <= counted
    assert "cp.reduce.async.bulk.tensor" in kernel.ptx
    # blocks are dealt where a group has one head; who comes first to a tile of dQ claims it, and says when it is there
    assert dealt == (group == 1)
    # and two warps round dQ of a head once its blocks have been counted
    deals = {"global.gpu.relaxed.add.u32"} if dealt else set()
    if dealt and not hopper_backward.summed_apart(*dims, plan(name).facts.warps):
        deals |= {"global.gpu.release.add.u32"}
        assert "ld.global.gpu.acquire.b32" in kernel.ptx
    claims = {"global.acquire.gpu.cas.b32", "global.gpu.release.exch.b32"}
    third = hopper_backward.summed_apart(*dims, plan(name).facts.warps)
    # no other atomics: TMA adds the sums of dQ. Triton 3.9 emits red if the result is unused
    assert set(re.findall(r"\b(?:atom|red)\.(global\S*)", kernel.ptx)) == deals | (set() if third else claims)
    # one instruction for each 16 of a matmul's depth: scores, twice, dp, dV and dK of both warpgroups, dQ in pieces
    qk, v = (sum(head_chunks(dim)) for dim in dims)
    keys = tiling.block_m // 16
    chunks_qk, chunks_v = len(head_chunks(dims[0])), len(head_chunks(dims[1]))
    pieces = sum(ceil(width / hopper_backward.NARROW) for width in head_chunks(dims[0]))
    dq = pieces * hopper_backward.KEYS // 16
    assert kernel.ptx.count("wgmma.mma_async") == 2 * (2 * qk // 16 + v // 16 + keys * (chunks_qk + chunks_v)) + dq


@pytest.mark.parametrize("name", ["relative_bias", "t5_bias"])
@pytest.mark.parametrize("d", [64, 128])
def test_sums_by_distance_spill_nothing_and_add_four_blocks_of_eight_queries_at_once(name, d):
    sized = replace(problem(), d_qk=d, d_v=d)
    kernel = backward_compiled(name, hopper.tilings("dkdv", sized, H100)[0], d, d, "bf16")["dkdv_kernel"]
    assert kernel.spills == 0
    assert not kernel.faults
    # ten blocks of each warpgroup's tile, along its diagonals: each is rotated in two exchanges, and added up in two
    assert len(re.findall(r"(?:atom|red)\.global\.gpu\.relaxed\.add\.f32", kernel.ptx)) == 2 * 3
    assert kernel.ptx.count("shfl.sync.idx") >= 2 * 10 * 2
    assert kernel.ptx.count("shfl.sync.bfly") == 2 * 10 * 2


@pytest.mark.parametrize(
    ("name", "dims"),
    [("causal", (128, 128)), ("full", (80, 128)), ("document", (128, 80)), ("causal", (64, 64)), ("softcap", (96, 96))],
)
def test_a_fixed_order_costs_no_memory_and_next_to_no_registers(name, dims):
    sized = replace(problem(), d_qk=dims[0], d_v=dims[1])
    tiling = hopper.tilings("dkdv", sized, H100)[0]
    kernel = backward_compiled(name, tiling, *dims, "bf16", ordered=True)["dkdv_kernel"]
    assert kernel.spills <= 24  # of the warp that adds, and has 24 registers a thread
    assert kernel.shared <= hopper.shared_memory("dkdv", tiling, sized)
    assert "ld.global.gpu.acquire" in kernel.ptx
    assert "atom.global.gpu.release" in kernel.ptx
    assert re.search(r"cp.async.bulk.wait_group\s+0", kernel.ptx)


@pytest.mark.parametrize("dims", [(128, 96), (64, 64), (192, 192), (256, 256)])
def test_heads_of_a_group_in_programs_of_their_own_hand_on_sums_of_dk_and_dv_four_entries_an_instruction(dims):
    sized = replace(problem(heads=16, kv_heads=4), d_qk=dims[0], d_v=dims[1])
    tiling = next(t for t in hopper.tilings("dkdv", sized, H100) if t.splits == 4)
    kernels = backward_compiled("causal", tiling, *dims, "bf16", group=4)
    kernel = kernels["dkdv_kernel"]
    assert kernel.spills <= (16 if dims == (192, 192) else 0)  # as with the heads of a group in one program
    assert kernels["prepare_kernel"].spills == 0
    # two warpgroups with dK and dV of 64 keys each, or with one of them; a thread has a 128th of a tile
    shares = hopper_backward.shares_keys(*dims, plan("causal").facts.warps)
    entries = (1 if shares else 2) * 64 * sum(sum(head_chunks(dim)) for dim in dims) // 128
    assert kernel.ptx.count("ld.global.v4.b32") == kernel.ptx.count("st.global.v4.b32") == entries // 4
    assert "red.global" not in kernel.ptx


def barriers(kernel):
    """Where the mbarriers of a kernel lie in shared memory."""
    places = dict(re.findall(r"add\.s32\s+(%r\d+), %r\d+, (\d+);", kernel.ptx))
    at = re.findall(r"mbarrier\.init\.shared::cta\.b64 \[(%r\d+)\]", kernel.ptx)
    return [int(places[register]) for register in at]


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("ordered", [False, True])
def test_no_tile_is_given_the_memory_of_a_barrier(splits, ordered):
    # one that a kernel does not use, as that of the keys where a group's heads are apart, lay where ds does
    tiling = KernelSchedule(64, 128, 8, 2, "gluon", splits=splits)
    kernel = backward_compiled("causal", tiling, 128, 128, "bf16", group=4, ordered=ordered)["dkdv_kernel"]
    found = barriers(kernel)
    assert len(found) == len(set(found)) == kernel.ptx.count("mbarrier.inval")
    assert max(found) - min(found) < 256


@pytest.mark.parametrize(
    ("dims", "dtype", "group"), [((128, 128), "bf16", 1), ((128, 64), "fp16", 4), ((64, 128), "bf16", 1)]
)
def test_two_branches_have_their_matmuls_side_by_side(dims, dtype, group):
    costs = replace(problem().costs, warps=plan("differential").facts.warps, rows=4)
    sized = replace(problem(), d_qk=dims[0], d_v=dims[1], dtype=dtype, branches=2, costs=costs)
    tiling = hopper.tilings("dkdv", sized, H100)[0]
    kernels = backward_compiled("differential", tiling, *dims, dtype, group)
    kernel = kernels["dkdv_kernel"]
    assert kernel.spills <= 120  # around the loop, and addresses that do not change in it
    assert [k.spills for k in kernels.values() if k is not kernel] == [0, 0]
    assert not kernel.faults
    counted = hopper.shared_memory("dkdv", tiling, sized)
    assert counted - hopper.RESERVED_BYTES < kernel.shared <= counted
    # for each 16 of a matmul's depth one instruction: scores (a first tile's of one branch, too), dp, dV, dK, dQ
    qk, v = dims[0] // 16, dims[1] // 16
    keys, weights = tiling.block_m // 16, hopper_backward.KEYS // 16
    assert kernel.ptx.count("wgmma.mma_async") == 2 * (qk + qk // 2 + v + keys + 2 * keys + weights)


@pytest.mark.parametrize("dims", [(128, 128), (128, 64), (64, 128)])
def test_a_forward_of_two_branches_has_an_accumulator_for_each(dims):
    sized = replace(problem(), d_qk=dims[0], d_v=dims[1], branches=2)
    tiling = hopper.tilings("forward", sized, H100)[0]
    kernel = compiled("differential", tiling, *dims)
    assert kernel.spills <= 32  # around the loop
    counted = hopper.shared_memory("forward", tiling, sized)
    assert counted - hopper.RESERVED_BYTES < kernel.shared <= counted
    text = source("differential", *dims)
    assert [text.count(f"def _weigh_{i}(") for i in range(3)] == [1, 1, 0]


def test_what_a_dq_apart_is_for_is_said():
    text = source("alibi", 128, 128)
    assert "apart = any(name in wanted for name in ['slopes'])" in text
    assert "apart = False\n" in source("causal", 128, 128)
    assert "apart = False\n" in source("causal", 64, 64)
    # blocks of keys whose tiles of queries lie in two ranges take no turns
    assert 'apart = meta["ORDERED"]\n' in source("prefix_lm", 128, 128)
    # the factor of a branch has its gradient from the kernel of dK and dV
    assert "apart = False\n" in source("differential", 128, 128)


def test_a_backward_of_more_than_a_dot_is_refused():
    with pytest.raises(UnsupportedError, match="this similarity has more(.|\n)*backend='triton'"):
        render(plan("transformer_xl"), 64, 64, True, backward_in="gluon")


@pytest.mark.parametrize(("name", "d_qk", "why"), [("causal", 48, "heads of 48"), ("key_gain", 256, "sums over them")])
def test_heads_that_two_warpgroups_cannot_share_are_refused(name, d_qk, why):
    with pytest.raises(UnsupportedError, match=f"{why}(.|\n)*backend='triton'"):
        render(plan(name), d_qk, 64, True, forward_in="gluon", backward_in="gluon")


@pytest.mark.parametrize(
    ("name", "dims", "group"),
    [("causal", (192, 128), 1), ("softcap", (160, 136), 4), ("full", (64, 256), 1), ("causal", (192, 192), 4)],
)
def test_the_backward_of_wide_heads_spills_nothing_and_has_a_kernel_for_dq(name, dims, group):
    sized = replace(problem(heads=16, kv_heads=16 // group), d_qk=dims[0], d_v=dims[1])
    tiling = hopper.tilings("dkdv", sized, H100)[-1 if group > 1 else 0]
    kernels = backward_compiled(name, tiling, *dims, "bf16", group)
    dkdv, dq = kernels["dkdv_kernel"], kernels["dq_of_rows_kernel"]
    assert dkdv.spills <= 16  # around the loop
    assert [k.spills for k in kernels.values() if k is not dkdv] == [0, 0]
    counted = hopper.shared_memory("dkdv", tiling, sized)
    assert counted - hopper.RESERVED_BYTES < dkdv.shared <= counted
    assert "red.global" not in dkdv.ptx + dq.ptx
    assert dq.shared <= H100.smem_per_block
    # one instruction for each 16 of a matmul's depth, of a first tile and of others: scores, dp, dQ, of both warpgroups
    qk, v = (sum(head_chunks(dim)) for dim in dims)
    assert dq.ptx.count("wgmma.mma_async") == 2 * 2 * (qk // 16 + v // 16 + 4 * len(head_chunks(dims[0])))


@pytest.mark.parametrize("name", ["causal", "full"])
def test_the_widest_heads_fit(name):
    (tiling,) = hopper.tilings("dkdv", replace(problem(), d_qk=256, d_v=256), H100)
    kernels = backward_compiled(name, tiling, 256, 256, "bf16")
    assert max(k.shared for k in kernels.values()) <= H100.smem_per_block
    assert max(k.spills for k in kernels.values()) <= 72  # addresses, which do not change in the loop


def test_a_score_that_is_weighed_by_its_size_has_one_copy_of_its_stages():
    """Where the maximum is of |score|, that of a hidden pair is -inf; of the score 16 bits are kept, its sign."""
    text = source("cog")
    assert 'shown = gl.where(visible, shown, float("-inf"))' in text
    assert "phase: gl.constexpr" not in text
    assert compiled("cog", KernelSchedule(128, 128, 8, 2, "gluon")).spills <= 48  # around the loops
    assert "phase: gl.constexpr" in source("sigmoid")


@pytest.mark.parametrize("d", [64, 128, 256])
def test_a_weight_with_a_sign_alone_waits_for_dp(d):
    """Its cotangent is dp |p| - delta p: dp, the sign and the magnitude had spilled 168 bytes."""
    assert re.search(r"ds = \(dp \* gl.abs\(p\)\) - \(p \* delta\[None, :\]\)", source("cog", d, d))
    sized = replace(problem(), d_qk=d, d_v=d, costs=replace(problem().costs, warps=plan("cog").facts.warps))
    tiling = hopper.tilings("dkdv", sized, H100)[0]
    assert backward_compiled("cog", tiling, d, d, "bf16")["dkdv_kernel"].spills <= {64: 8, 128: 0, 256: 64}[d]


def test_accumulators_that_are_wide_are_rescaled_behind_a_branch():
    text = source("causal", 256, 256)
    assert "acc_0 = _rescaled_256(acc_0, " in text
    kernel = compiled("causal", KernelSchedule(128, 64, 8, 2, "gluon"), 256, 256)
    assert kernel.spills == 0
    assert kernel.ptx.count("vote.sync.any.pred moved") == 2
    assert "_rescaled_128" in source("causal", 128, 128)
    assert "_rescaled" not in source("softcap", 128, 128)  # more than q k: it took longer
    assert "_rescaled" not in source("causal", 64, 64)
    assert "_rescaled_256" in source("sink", 256, 256)  # its maximum is one of two numbers, and any number serves


@pytest.mark.parametrize(("d", "tile"), [(64, (192, 128)), (128, (128, 128)), (256, (128, 64))])
def test_rows_of_a_softmax_stay_with_their_lanes(d, tile):
    """One look for the maximum in the first tile and one in the loop, by three warpgroups or two; conversions that move
    data would not compile."""
    kernel = compiled("causal", KernelSchedule(*tile, tile[0] // 16, 2, "gluon"), d, d)
    assert kernel.spills == 0
    assert kernel.ptx.count("vote.sync.any.pred over") == 2 * tile[0] // 64
    for name in ("full", "sliding_window", "document", "sink", "softmax1"):
        assert "_moved(s, row_max_0, scale_log2)" in source(name, d, d)
    assert "_moved(s, row_max_0, 1.0, row_offset)" in source("alibi", d, d)
    assert "_moved(s, row_max_0, " in source("softcap", d, d)
    assert "_moved(shown, row_max_0, 1.0)" in source("cog", d, d)
    for name in ("sigmoid", "softpick", "top_theta"):  # there is no maximum, or no score of it hides a pair
        assert "_moved" not in source(name, d, d)


def test_bounds_that_read_inputs_by_row_are_found_by_a_kernel_of_their_own():
    limited = ac.Variant(
        name="limited",
        inputs={"seen": ac.Input("b", "q_idx", dtype="int")},
        mask=lambda b, q_idx, kv_idx, seen: kv_idx < seen[b, q_idx],
    )
    text = render(Plan(limited.graph), 64, 64, False, forward_in="gluon")
    assert "def bounds_kv_kernel" in text
    assert "live_end = gl.load(bounds_at + 1)" in text
    assert "def bounds_kv_kernel" not in render(Plan(limited.graph), 64, 64, False)


@pytest.mark.parametrize("rows", [128, 192])
def test_bounds_of_blocks_that_are_no_power_of_two(rows):
    module = load_source(render(plan("document"), 64, 64, False, forward_in="gluon"), "document")
    tiling = KernelSchedule(rows, 64, rows // 16, 2, "gluon")
    kernels = cross_compile(module, plan("document").graph, Schedule(tiling, tiling, tiling), H100, "bf16")
    assert {"bounds_kv_kernel", "forward_kernel"} <= set(kernels)


def test_entries_of_a_table_are_loaded_one_by_one_and_once():
    """A row's pointer is at any multiple of four bytes, though it is a multiple of a tile less the row's number. Of a
    tile of 64 keys a thread has 32 pairs at 18 distances, in each of its warpgroup's two copies of the stages."""
    kernel = compiled("relative_bias", KernelSchedule(128, 64, 8, 2, "gluon"))
    assert "ld.global.v" not in kernel.ptx
    assert kernel.ptx.count("ld.global.nc.b32") == 2 * 2 * 18


@pytest.mark.parametrize(
    ("score", "summed"),
    [
        ("2 * score", True),
        ("score / (2 + q_idx % 3)", True),
        ("score * temperature[h]", False),
        ("score / temperature[h]", False),
    ],
)
def test_a_table_is_summed_with_dk_where_its_cotangent_is_a_multiple_of_ds_that_is_never_0(score, summed):
    """ds has the temperature as a factor, and is 0 with it, or with its inverse; the table's cotangent is not."""
    variant = ac.loads_toml(
        f'[stages]\nscore = "{score} + bias[h, q_idx - kv_idx]"\n'
        '[inputs]\nbias = { index = ["h", "dist"], grad = true }\n'
        + ('temperature = { index = ["h"] }\n' if "temperature" in score else "")
    )
    assert bool(by_distance(Plan(variant.graph))) == summed
