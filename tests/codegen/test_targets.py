"""A variant that nobody ships, compiled for every architecture with the schedule that the model chooses."""

from __future__ import annotations

from functools import cache

import pytest

import attncc as ac
from attncc.codegen import crosscompile
from attncc.codegen.crosscompile import cross_compile, kernel_names
from attncc.codegen.module import load_source
from attncc.codegen.plan import Plan
from attncc.codegen.problem import problem_of
from attncc.codegen.render import render
from attncc.errors import UnsupportedError
from attncc.schedule import KERNELS, KernelSchedule, Schedule, choose, device_for, shared_memory
from attncc.schedule.candidates import candidates
from attncc.schedule.device import loads_boxes

#: bytes a thread that a first choice may spill: none, but where the estimate of registers is known to be a few too low
SPILLS_ALLOWED = {("gfx942", 128, "forward"): 32}


def unit_length(score, row):
    p = ac.exp(score - row.max(score))
    return p / ac.sqrt(row.sum(p * p))


GRAPH = ac.Variant(
    name="unit_length",
    score=ac.softcap(30.0) >> ac.alibi(),
    mask=ac.causal & ac.window(512, 0) | ac.prefix(16),
    normalizer=unit_length,
).graph


@cache
def generated(dim, tma=False, **languages):
    plan = Plan(GRAPH)
    return plan, load_source(render(plan, dim, dim, True, tma, **languages), f"targets_{dim}")


def sizes(dim):
    return {"b": 4, "h": 16, "h_kv": 16, "q_idx": 4096, "kv_idx": 4096, "d_qk": dim, "d_v": dim}


@pytest.mark.parametrize(
    ("target", "dim", "kernels"),
    [
        ("sm_80", 128, KERNELS),
        ("sm_89", 64, ("dkdv",)),
        ("sm_90", 64, ("forward",)),
        ("sm_90", 128, KERNELS),
        ("sm_100", 128, ("forward", "dkdv")),
        ("sm_120", 64, ("dq",)),
        ("gfx942", 128, ("forward",)),
        ("gfx942", 64, ("dkdv",)),
    ],
)
def test_the_first_choice_fits_and_keeps_its_registers(target, dim, kernels):
    device = device_for(target)
    problem = problem_of(Plan(GRAPH), sizes(dim), "bf16", "ieee", {})
    schedule = choose(problem, device)
    languages = {
        "forward_in": schedule.forward.backend,
        "backward_in": schedule.dkdv.backend,
        "strips": schedule.dkdv.strips,
    }
    _, module = generated(dim, loads_boxes(device, "bf16", dim, dim), **languages)
    only = tuple(f"{kernel}_kernel" for kernel in kernels)
    compiled = cross_compile(module, GRAPH, schedule, device, "bf16", only=only)
    assert tuple(compiled) == tuple(name for name in kernel_names(module) if name in only)
    for kernel in kernels:
        fact, tiling = compiled[f"{kernel}_kernel"], schedule.of(kernel)
        assert fact.shared <= shared_memory(kernel, tiling, problem, device) <= device.smem_per_block
        assert 0 < fact.registers <= device.regs_per_thread_max
        assert not fact.faults
        allowed = SPILLS_ALLOWED.get((target, dim, kernel), 0)
        assert fact.spills <= allowed, f"{kernel} {tiling} spills {fact.spills} bytes a thread"
        assert fact.binary.startswith(b"\x7fELF")
        assert fact.kind == ("amdgcn" if device.backend == "hip" else "ptx")
        assert f".target {target}" in fact.ptx if device.backend == "cuda" else target in fact.ptx


@pytest.mark.parametrize("target", ["sm_80", "sm_120"])
def test_weights_that_a_mask_hides_and_a_row_sums_up_keep_their_registers(target):
    device, graph = device_for(target), ac.variants.get("taylor_causal").graph
    plan = Plan(graph)
    module = load_source(render(plan, 128, 128, False), "taylor_causal")
    schedule = choose(problem_of(plan, sizes(128), "bf16", "ieee", {}), device)
    compiled = cross_compile(module, graph, schedule, device, "bf16", only=("forward_kernel",))
    assert compiled["forward_kernel"].spills == 0


@pytest.mark.parametrize(("dtype", "apart"), [("fp32", True), ("bf16", False)])
def test_a_product_in_float32_is_summed_before_it_is_added(monkeypatch, dtype, apart):
    """The compiler would add to the total key by key, and rounding would grow with the keys."""
    monkeypatch.setattr(crosscompile, "resources", lambda name, result, device: result.asm["ttir"])
    _, module = generated(64)
    tiling = KernelSchedule(32, 16, 4, 2)
    schedule, only = Schedule(tiling, tiling, tiling), ("forward_kernel",)
    text = cross_compile(module, GRAPH, schedule, device_for("sm_90"), dtype, only=only)["forward_kernel"]
    products = [line.split("tt.dot")[1] for line in text.splitlines() if "tt.dot " in line]
    assert any("%acc" in line for line in products) == (not apart)
    assert any("maxNumImpreciseAcc" in line for line in products) == apart


@pytest.mark.parametrize("q_len", [1, 32])
def test_a_bias_of_pairs_beside_few_queries_compiles_for_amd(q_len):
    """Triton's compiler cannot load it a tile ahead there, where blocks are short."""
    graph, device = ac.variants.get("dense_bias").graph, device_for("gfx942")
    plan = Plan(graph)
    problem = problem_of(plan, {**sizes(64), "q_idx": q_len, "h_kv": 4}, "bf16", "ieee", {})
    schedule = choose(problem, device)
    form = "decode" if schedule.forward.splits else "triton"
    module = load_source(render(plan, 64, 64, False, forward_in=form), f"bias_{q_len}")
    only = ("forward_kernel", "decode_kernel")
    (compiled,) = cross_compile(module, graph, schedule, device, "bf16", only=only, group=4).values()
    assert "gfx942" in compiled.ptx


def test_a_sweep_of_the_backward_compiles_beside_kernels_with_descriptors():
    device, plan = device_for("sm_90"), Plan(ac.variants.get("entmax15").graph)
    module = load_source(render(plan, 64, 64, True, tma=True), "targets_sweeps")
    schedule = choose(problem_of(plan, sizes(64), "bf16", "ieee", {}), device)
    compiled = cross_compile(module, plan.graph, schedule, device, "bf16")
    assert {"forward_kernel", "cotangents_kernel", "dkdv_kernel", "dq_kernel"} <= set(compiled)
    assert all(fact.shared <= device.smem_per_block for fact in compiled.values())


def test_what_does_not_compile_is_refused_with_the_kernel_and_the_target():
    _, module = generated(64)
    wrong = KernelSchedule(48, 64, 4, 2)  # a block that is no power of two
    with pytest.raises(UnsupportedError, match="forward_kernel does not compile for sm_90"):
        cross_compile(
            module, GRAPH, Schedule(wrong, wrong, wrong), device_for("sm_90"), "bf16", only=("forward_kernel",)
        )


def test_grouped_heads_change_the_kernel_of_keys_alone():
    device, (plan, module) = device_for("sm_80"), generated(64)
    problem = problem_of(plan, sizes(64), "bf16", "ieee", {})
    schedule = Schedule(*(candidates(kernel, problem, device)[0] for kernel in KERNELS))
    one, four = (
        cross_compile(module, GRAPH, schedule, device, "bf16", only=("dkdv_kernel",), group=group)["dkdv_kernel"]
        for group in (1, 4)
    )
    assert one.ptx != four.ptx


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("q_len", [1, 16])
def test_split_keys_are_read_16_bytes_at_a_time_without_spills(target, q_len):
    device, plan = device_for(target), Plan(GRAPH)
    module = load_source(render(plan, 128, 128, False, forward_in="decode"), "targets_decode")
    call = {**sizes(128), "b": 1, "h": 32, "h_kv": 8, "q_idx": q_len, "kv_idx": 65536}
    problem = problem_of(plan, call, "bf16", "ieee", {})
    schedule = choose(problem, device)
    assert schedule.forward.splits > 1
    only = ("decode_kernel", "merge_kernel")
    compiled = cross_compile(module, GRAPH, schedule, device, "bf16", only=only, group=problem.group)
    allowed = 8 if (target, q_len) == ("gfx942", 16) else 0
    assert [compiled[name].spills <= limit for name, limit in zip(only, (allowed, 0), strict=True)] == [True, True]
    assert compiled["decode_kernel"].shared <= shared_memory("forward", schedule.forward, problem, device)
    assert not any(kernel.faults for kernel in compiled.values())
    if device.backend == "cuda":
        copies = compiled["decode_kernel"].ptx.count("cp.async.cg.shared.global")
        assert copies > 0
        assert "cp.async.ca" not in compiled["decode_kernel"].ptx  # copies of less than 16 bytes


def test_a_table_that_is_read_at_a_place_which_hangs_on_the_score():
    """Triton cannot pipeline such a loop on Hopper; and the backward of a step function multiplies no zeros."""
    graph, device = ac.variants.get("sdm").graph, device_for("sm_90")
    tiling = KernelSchedule(64, 64, 4, 3)
    text = render(Plan(graph), 64, 64, True, tma=True)
    kernels = cross_compile(load_source(text, "sdm"), graph, Schedule(tiling, tiling, tiling), device, "bf16")
    assert {"forward_kernel", "dkdv_kernel", "dq_kernel"} <= set(kernels)
    assert "wgmma" in kernels["dkdv_kernel"].ptx
    assert "wgmma" not in kernels["dq_kernel"].ptx
