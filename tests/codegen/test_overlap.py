"""The kernel that merges parts may start before they are done, where the GPU can: it waits before it reads anything."""

import pytest

import attncc as ac
from attncc.codegen.crosscompile import cross_compile
from attncc.codegen.module import load_source
from attncc.codegen.plan import Plan
from attncc.codegen.render import render
from attncc.schedule import KernelSchedule, Schedule, device_for

TILES = KernelSchedule(16, 64, 4, 2, splits=8)


@pytest.fixture(scope="module")
def module():
    return load_source(render(Plan(ac.variants.get("sink").graph), 64, 64, False, forward_in="decode"), "overlap")


def ptx(module, target):
    schedule = Schedule(TILES, TILES, TILES, origin="user")
    found = cross_compile(module, ac.variants.get("sink").graph, schedule, device_for(target), "bf16")
    return found["decode_kernel"].ptx, found["merge_kernel"].ptx


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_the_merge_waits_before_it_reads(module, target):
    parts, merge = ptx(module, target)
    assert 0 < parts.index("griddepcontrol.launch_dependents") < parts.index("ld.global")
    assert 0 < merge.index("griddepcontrol.wait") < merge.index("ld.global") < merge.index("st.global")


def test_older_gpus_have_no_such_instruction(module):
    assert not any("griddepcontrol" in text for text in ptx(module, "sm_80"))
