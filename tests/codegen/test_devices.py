"""Every device file: what the model chooses first in Triton for a plain variant is compiled for that card, fits, and
keeps its registers. The heads are of another width for each; every kernel of every card at 64, 128 and 256 was compiled
when the files were written, of causal and of alibi."""

import pytest

import attncc as ac
from attncc.codegen.crosscompile import cross_compile
from attncc.codegen.module import load_source
from attncc.codegen.plan import Plan
from attncc.codegen.problem import problem_of
from attncc.codegen.render import render
from attncc.schedule import KERNELS, Schedule, device_names, first_choice, load_device, shared_memory
from attncc.schedule.device import loads_boxes

WIDTHS = {
    "a100": 256,
    "b200": 256,
    "h100": 128,
    "h200": 64,
    "l4": 128,
    "mi300x": 256,
    "rtx3090": 128,
    "rtx4090": 256,
    "rtx5090": 64,
}


def test_every_device_is_compiled_for():
    assert set(WIDTHS) == set(device_names())


def first_choices(device, dim, length, dtype, kernels):
    """The problem, what the model chooses first for it, and those kernels compiled for the device."""
    graph = ac.variants.get("causal").graph
    plan = Plan(graph)
    sizes = {"b": 4, "h": 16, "h_kv": 16, "q_idx": length, "kv_idx": length, "d_qk": dim, "d_v": dim}
    problem = problem_of(plan, sizes, dtype, "ieee", {})
    schedule = Schedule(*(first_choice(kernel, problem, device) for kernel in KERNELS))
    module = load_source(render(plan, dim, dim, True, loads_boxes(device, dtype, dim, dim)), f"devices_{dtype}_{dim}")
    compiled = cross_compile(module, graph, schedule, device, dtype, only=tuple(f"{k}_kernel" for k in kernels))
    return problem, schedule, compiled


@pytest.mark.parametrize(("name", "dim"), WIDTHS.items())
def test_first_choices_fit_and_spill_nothing(name, dim):
    device = load_device(name)
    problem, schedule, compiled = first_choices(device, dim, 4096, "bf16", KERNELS)
    for kernel in KERNELS:
        fact = compiled[f"{kernel}_kernel"]
        assert fact.shared <= shared_memory(kernel, schedule.of(kernel), problem, device) <= device.smem_per_block
        assert 0 < fact.registers <= device.regs_per_thread_max
        assert (fact.spills, fact.faults) == (0, ()), f"{kernel} {schedule.of(kernel)}"


@pytest.mark.parametrize("name", ["a100", "h100"])
@pytest.mark.parametrize("dim", [80, 96])
def test_the_backward_of_narrow_pieces_in_float32_spills_nothing(name, dim):
    """Heads in two pieces, multiplied without tensor cores: larger tiles spilled kilobytes a thread."""
    _, schedule, compiled = first_choices(load_device(name), dim, 2048, "fp32", ("dkdv",))
    assert compiled["dkdv_kernel"].spills == 0, schedule.dkdv
