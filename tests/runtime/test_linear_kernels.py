"""Kernels of attention in linear time: their text, what they take of a GPU, and how they are scheduled."""

from __future__ import annotations

import ast

import pytest

from attncc.codegen.crosscompile_linear import cross_compile_linear
from attncc.codegen.linear import render_linear
from attncc.codegen.module import load_source
from attncc.passes.linearize import linearize
from attncc.schedule.device import device_for
from attncc.schedule.linear import LinearSizes, linear_schedule, shared_bytes
from attncc.schedule.linear_cost import choose_plan, crossover
from tests.runtime.linear_cases import FULL, SCANS, VARIANTS


@pytest.mark.parametrize("variant", [*VARIANTS.values(), *FULL.values()], ids=lambda v: v.name)
def test_the_text_is_tidy_python(variant):
    graph = variant.graph
    source = render_linear(graph, linearize(graph), 96, 80)
    ast.parse(source)
    assert "{{" not in source
    assert not any(line != line.rstrip() for line in source.splitlines())
    assert source == render_linear(graph, linearize(graph), 96, 80)


@pytest.mark.parametrize(
    ("name", "target", "dim", "dtype"),
    [
        ("simple_gla", "sm_90", 128, "bf16"),
        ("simple_gla", "sm_90", 64, "bf16"),
        ("lightning", "sm_90", 128, "bf16"),
        ("polynomial", "sm_80", 64, "fp16"),
        ("retention", "gfx942", 64, "bf16"),
        ("gla", "sm_90", 128, "bf16"),
        ("full_weighted", "sm_80", 64, "bf16"),
    ],
)
def test_every_kernel_compiles_and_fits(name, target, dim, dtype):
    variants = {v.name: v for v in (*VARIANTS.values(), *FULL.values())}
    graph, device = variants[name].graph, device_for(target)
    module = load_source(render_linear(graph, linearize(graph), dim, dim), f"linear_{name}_{target}")
    rows = int(name in ("simple_gla", "gla"))
    sizes = LinearSizes(dtype, 2, 16, 8192, dim, dim, name == "gla", rows=rows)
    schedule = linear_schedule(sizes, device)
    for kernel in cross_compile_linear(module, schedule, device, dtype).values():
        meta = schedule.kernels.get(kernel.name.removesuffix("_kernel"), {})
        if "CHUNK" in meta and "BLOCK" in meta:
            model = shared_bytes(dim, meta["BLOCK"], meta["CHUNK"], sizes, meta["num_stages"])
            assert kernel.shared <= model <= device.smem_per_block, kernel
        # on an H100 some spills of the gradients cost less than narrower blocks, which form a chunk's pairs more often
        wide = target != "sm_90" or kernel.name in ("dq_kernel", "dk_kernel", "dv_kernel")
        assert kernel.spills <= (320 if wide else 40), kernel
        if kernel.name in SCANS and meta["num_stages"] == 3:  # then two programs of a multiprocessor have room
            assert 2 * (kernel.shared + device.smem_reserved) <= device.smem_per_sm, kernel
        # where the assembler made one wrong, another makes it again at the first call
        assert not kernel.faults


def test_the_model_crosses_over_once():
    device = device_for("h100")
    short, long = (LinearSizes("bf16", 2, 16, n, 128, 128) for n in (128, 32768))
    length = crossover(short, device)
    assert length == crossover(long, device)
    assert 256 <= length <= 8192
    assert choose_plan(short, device) == "parallel"
    assert choose_plan(long, device) == "chunk"
    assert choose_plan(LinearSizes("bf16", 2, 16, 1, 128, 128), device) == "recurrent"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 512), (96, 80), (16, 16)])
def test_schedules_cover_the_sequence(dims, dtype):
    for target in ("sm_80", "sm_89", "sm_90", "gfx942"):
        for length in (1, 63, 1000, 8192):
            found = linear_schedule(LinearSizes(dtype, 1, 4, length, *dims), device_for(target))
            assert found.span % found.chunk == 0
            assert found.span >= found.chunk
            assert all(m["BLOCK"] >= 16 for m in found.kernels.values())
