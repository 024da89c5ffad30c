"""The Gluon forward for Hopper: its text, and what the assembler makes of it. Values are checked on a GPU."""

from __future__ import annotations

import builtins
import symtable
from dataclasses import replace
from functools import cache

import pytest

import attncc as ac
from attncc.codegen.crosscompile import cross_compile
from attncc.codegen.module import load_source
from attncc.codegen.plan import Plan
from attncc.codegen.render import render
from attncc.codegen.similarity import SimilaritySlots
from attncc.errors import UnsupportedError
from attncc.schedule import KernelSchedule, Schedule, device_for, hopper
from tests.schedule.problems import problem

H100 = device_for("h100")
NAMES = [
    name
    for name, plan in ((name, Plan(ac.variants.get(name).graph)) for name in ac.variants.names())
    if plan.graph.branches == 1
    and plan.graph.value is None
    and SimilaritySlots(plan).plain_dot
    and not plan.only_triton
]


@cache
def plan(name):
    return Plan(ac.variants.get(name).graph)


def source(name, d_qk=128, d_v=128):
    return render(plan(name), d_qk, d_v, True, forward_in="gluon")


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
    for warp in ("_weigh", "_load", "_attend"):
        unused = {s.get_name() for s in functions[warp].get_symbols() if s.is_parameter() and not s.is_referenced()}
        assert unused == set()


def test_several_passes_are_refused():
    with pytest.raises(UnsupportedError, match="go over the keys once(.|\n)*backend='triton'"):
        source("entmax15")


def test_branches_are_refused():
    with pytest.raises(UnsupportedError, match="one score a pair(.|\n)*backend='triton'"):
        source("differential")


@pytest.mark.parametrize(
    ("name", "tiling", "dims", "dtype"),
    [
        ("causal", KernelSchedule(128, 128, 8, 2, "gluon"), (128, 128), "bf16"),
        ("alibi", KernelSchedule(192, 64, 12, 3, "gluon"), (64, 64), "fp16"),
        ("softcap", KernelSchedule(128, 64, 8, 2, "gluon"), (256, 256), "bf16"),
        ("sink", KernelSchedule(128, 128, 8, 2, "gluon"), (192, 128), "bf16"),
        ("sigmoid", KernelSchedule(128, 128, 8, 3, "gluon"), (96, 80), "bf16"),
        ("document", KernelSchedule(128, 64, 8, 2, "gluon"), (64, 128), "fp16"),
    ],
)
def test_nothing_spills_and_the_memory_is_what_the_scheduler_counts(name, tiling, dims, dtype):
    kernel = compiled(name, tiling, *dims, dtype)
    counted = hopper.shared_memory(tiling, replace(problem(), d_qk=dims[0], d_v=dims[1], dtype=dtype))
    assert kernel.spills == 0
    assert counted - hopper.RESERVED_BYTES < kernel.shared <= counted
    assert "wgmma.mma_async" in kernel.ptx
    assert "cp.async.bulk.tensor" in kernel.ptx
    assert "setmaxnreg" in kernel.ptx


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
