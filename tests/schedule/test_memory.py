"""The accounting against the compiler: kernels of the real templates, cross-compiled for every architecture."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

import attncc as ac
from attncc.codegen.crosscompile import cross_compile
from attncc.codegen.facts import facts_of
from attncc.codegen.module import load_source
from attncc.codegen.plan import Plan
from attncc.codegen.render import render
from attncc.schedule import KERNELS, KernelSchedule, Schedule, buffers, device_for, first_choice, shared_memory
from attncc.schedule.device import INTERPRETER, loads_boxes
from attncc.schedule.memory import instruction, tensor_memory
from attncc.schedule.registers import registers

from .problems import problem

# Row vectors and barriers are rounded up: what they can be over at most, in bytes.
ROUNDING = 4096


@cache
def generated(d_qk, d_v, tma):
    graph = ac.variants.get("causal").graph
    return load_source(render(Plan(graph), d_qk, d_v, True, tma), f"accounting_{d_qk}_{d_v}"), graph


def compiled(work, schedule, device):
    module, graph = generated(work.d_qk, work.d_v, loads_boxes(device, work.dtype, work.d_qk, work.d_v))
    only = tuple(f"{kernel}_kernel" for kernel in KERNELS)
    return cross_compile(module, graph, schedule, device, work.dtype, work.precision, only)


def uniform(*tiling):
    return Schedule(*[KernelSchedule(*tiling)] * 3)


@pytest.mark.parametrize(
    ("target", "dim"),
    [
        ("sm_80", 128),
        ("sm_89", 128),
        ("sm_90", 128),
        ("sm_100", 128),
        ("sm_120", 128),
        ("gfx942", 128),
        ("sm_89", 64),
        ("sm_90", 64),
        ("gfx942", 64),
    ],
)
def test_the_first_choice_fits_as_predicted_and_does_not_spill(target, dim):
    """The model's choice, that is: a shipped table holds what measured fastest, a few spilled bytes or not."""
    device, work = device_for(target), problem(d_qk=dim)
    schedule = Schedule(*(first_choice(kernel, work, device) for kernel in KERNELS))
    kernels = compiled(work, schedule, device)
    for kernel in KERNELS:
        fact = kernels[f"{kernel}_kernel"]
        model = shared_memory(kernel, schedule.of(kernel), work, device)
        assert fact.shared <= model <= device.smem_per_block
        assert model <= 1.15 * fact.shared + ROUNDING
        assert fact.spills == 0, f"{kernel} {schedule.of(kernel)} spills {fact.spills} bytes"


@pytest.mark.parametrize(
    ("target", "work", "tiling"),
    [
        ("sm_80", problem("fp16", 96), (64, 32, 4, 2)),
        ("sm_86", problem("bf16", 256), (32, 32, 4, 2)),
        ("sm_90", problem("fp16", 192, 128), (64, 64, 4, 2)),
        ("sm_90", problem("bf16", 64), (64, 64, 4, 3)),
        ("sm_100", problem("bf16", 96), (64, 32, 4, 2)),
        ("gfx942", problem("bf16", 256), (32, 32, 4, 2)),
    ],
    ids=["sm_80-96", "sm_86-256", "sm_90-192-128", "sm_90-64", "sm_100-96", "gfx942-256"],
)
def test_16_bit_tilings_take_what_is_predicted(target, work, tiling):
    device, schedule = device_for(target), uniform(*tiling)
    kernels = compiled(work, schedule, device)
    for kernel in KERNELS:
        fact = kernels[f"{kernel}_kernel"].shared
        model = shared_memory(kernel, schedule.of(kernel), work, device)
        assert fact <= model <= 1.17 * fact + ROUNDING, kernel


@pytest.mark.parametrize(
    ("target", "precision", "stages"),
    [("sm_80", "tf32", 2), ("sm_90", "ieee", 2), ("sm_90", "tf32", 1), ("gfx942", "ieee", 1)],
)
def test_float32_tilings_take_no_more_than_predicted(target, precision, stages):
    device, work, schedule = device_for(target), problem("fp32", 32, precision=precision), uniform(32, 32, 4, stages)
    kernels = compiled(work, schedule, device)
    for kernel in KERNELS:
        fact = kernels[f"{kernel}_kernel"].shared
        model = shared_memory(kernel, schedule.of(kernel), work, device)
        assert fact <= model, kernel
        assert stages == 1 or model <= 1.5 * fact + ROUNDING, kernel


def test_the_breakdown_adds_up():
    device, work, ks = device_for("h100"), problem(d_qk=128), KernelSchedule(128, 128, 8, 3)
    parts = {buffer.name: buffer.bytes for buffer in buffers("forward", ks, work, device)}
    assert parts == {"k": 98304, "v": 98304, "q": 32768, "row vectors": 1024}
    assert shared_memory("forward", ks, work, device) == sum(parts.values())


def test_a_bias_that_is_staged_is_counted():
    device, ks = device_for("a100"), KernelSchedule(64, 64, 4, 3)
    plain = problem()
    biased = problem(forward=type(plain.costs.forward)(fma=8, sfu=1, loads=1))
    extra = shared_memory("forward", ks, biased, device) - shared_memory("forward", ks, plain, device)
    assert extra == 2 * 64 * 64 * 4


def test_vectors_that_travel_with_the_tiles_are_counted():
    device, ks, plain = device_for("h100"), KernelSchedule(128, 128, 8, 3), problem()
    documents = replace(plain, costs=replace(plain.costs, vectors=2))
    extra = shared_memory("forward", ks, documents, device) - shared_memory("forward", ks, plain, device)
    assert extra == 2 * 128 * 4
    assert registers("forward", ks, documents, device) > registers("forward", ks, plain, device)


@pytest.mark.parametrize(
    ("target", "dtype", "precision", "block_m", "expected"),
    [
        ("sm_80", "bf16", "ieee", 128, "mma"),
        ("sm_90", "bf16", "ieee", 128, "wgmma"),
        ("sm_90", "bf16", "ieee", 32, "mma"),
        ("sm_90", "fp32", "ieee", 128, "fma"),
        ("sm_90", "fp32", "tf32", 128, "wgmma"),
        ("sm_100", "bf16", "ieee", 128, "tcgen05"),
        ("sm_120", "bf16", "ieee", 128, "mma"),
        ("gfx942", "fp32", "ieee", 128, "mfma"),
    ],
)
def test_the_matmul_instruction(target, dtype, precision, block_m, expected):
    ks = KernelSchedule(block_m, 64, 4, 2)
    assert instruction("forward", ks, problem(dtype, precision=precision), device_for(target)) == expected


def test_tensor_memory_exists_on_blackwell_alone():
    ks = KernelSchedule(128, 128, 8, 2)
    assert tensor_memory("dkdv", ks, problem(), device_for("b200")) == 640  # more than the 512 there are
    assert tensor_memory("forward", ks, problem(), device_for("b200")) == 320
    assert tensor_memory("forward", ks, problem(), device_for("h100")) == 0


def test_the_interpreter_needs_none():
    assert shared_memory("forward", KernelSchedule(64, 64, 1, 1), problem(), INTERPRETER) == 0


def test_inputs_of_each_component_are_counted():
    """A decay of each channel is a float32 tile beside that of k: with it uncounted the first choice did not fit."""
    device = device_for("sm_90")
    graph = ac.variants.get("gla").graph
    plan = Plan(graph)
    work = replace(
        problem("fp16", 128), costs=replace(problem("fp16", 128).costs, similarity=facts_of(plan).similarity)
    )
    assert work.costs.similarity.wide_k == 1
    schedule = Schedule(*(first_choice(kernel, work, device) for kernel in KERNELS))
    module = load_source(render(plan, 128, 128, True, False), "accounting_gla")
    only = ("forward_kernel",)
    fact = cross_compile(module, graph, schedule, device, "fp16", "ieee", only)["forward_kernel"]
    assert fact.shared <= shared_memory("forward", schedule.forward, work, device) <= device.smem_per_block
