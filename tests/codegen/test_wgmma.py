"""The check of machine code for sm_90, on text as nvdisasm prints it, and on what becomes of our kernels."""

import pytest

import attncc as ac
from attncc.codegen.crosscompile_linear import cross_compile_linear
from attncc.codegen.module import load_source
from attncc.codegen.sass import parse
from attncc.codegen.wgmma import faults_of
from attncc.runtime.recurrence import RecurrenceOp
from attncc.schedule.delta import delta_schedule
from attncc.schedule.device import device_for
from attncc.schedule.linear import LinearSizes


def code(text):
    """Instructions, a line each; a label ends in a colon."""
    lines = [x.strip() for x in text.strip().splitlines()]
    return parse("\n".join(x if x.endswith(":") else f"        /*{i:04x}*/    {x} ;" for i, x in enumerate(lines)))


def said(text):
    return [fault.what for fault in faults_of(code(text))]


#: a descriptor's address in UR8, its upper half in UR9, and the next step's in UR10 and UR11
STEP = """
UMOV UR9, 0x40000040
WARPGROUP.ARRIVE
{}
UMOV UR12, UR8
UMOV UR13, UR9
UMOV UR14, UR10
UMOV UR15, UR11
HGMMA.64x32x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT, gsb0
WARPGROUP.DEPBAR.LE gsb0, 0x0
EXIT
"""
ZERO = "UMOV UR4, URZ\nUIADD3 UR10, UP0, UR8, 0x40, URZ\nUIADD3.X UR11, UR4, -0x7fffffe0, URZ, UP0, !UPT"
ADDRESS = "UIADD3 UR10, UP0, UR8, 0x40, URZ\nUIADD3.X UR11, UR8, -0x7fffffe0, URZ, UP0, !UPT"
RIGHT = [
    ZERO,
    "UIADD3.64 UR10, UR8, 0x40, URZ",
    "UIADD3 UR10, UP0, UR8, -0x40, URZ\nUIADD3.X UR11, UR9, -0x1, URZ, UP0, !UPT",
    "ULOP3.LUT UR10, UR8, 0x2, URZ, 0xfc, !UPT\nULOP3.LUT UR11, URZ, 0x40000040, URZ, 0xfc, !UPT",
    # by way of other registers, and of memory
    "IMAD.U32 R4, RZ, RZ, UR9\nSTL.64 [R1+0x8], R4\nLDL.LU.64 R6, [R1+0x8]\nR2UR UR11, R6",
    # swapped by three exclusive ors
    "UMOV UR10, UR9\nS2UR UR11, SR_CTAID.X\n"
    + "\n".join(f"ULOP3.LUT UR{i}, UR11, UR10, URZ, 0x3c, !UPT" for i in (11, 10, 11)),
    # the same on both ways
    "UMOV UR11, 0x1\n@P0 BRA `(.L_x_1)\nUMOV UR11, 0x1\n.L_x_1:",
]
WRONG = [
    ADDRESS,
    "UMOV UR11, UR5",
    "IADD3 R4, P0, R8, 0x40, RZ\nIADD3.X R5, R0, -0x7fffffe0, RZ, P0, !PT\nR2UR UR11, R5",
    "UMOV UR11, 0x1\n@P0 BRA `(.L_x_1)\nUMOV UR11, 0x2\n.L_x_1:",
    "UMOV UR11, 0x1\n@UP0 UMOV UR11, 0x2",
]


@pytest.mark.parametrize("step", RIGHT)
def test_a_constant_half_is_right(step):
    assert said(STEP.format(step)) == []


@pytest.mark.parametrize("step", WRONG)
def test_a_half_that_is_no_constant_is_found(step):
    assert said(STEP.format(step)) == ["the swizzle and stride of its right operand, in UR15, are no constant"]


def test_a_left_operand_in_memory_has_a_descriptor_too():
    wrong = STEP.format(ZERO).replace("UMOV UR13, UR9", "UMOV UR13, UR8")
    assert said(wrong) == ["the swizzle and stride of its left operand, in UR13, are no constant"]
    assert said(wrong.replace("R24, gdesc", "R24, R4, gdesc")) == []


def test_what_closes_a_group_and_sums_nothing_has_no_descriptor():
    """A matmul whose sums nobody reads is gone but for this."""
    assert said("WARPGROUP.ARRIVE\nHGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0\nEXIT") == []


#: a sum in R24 to R39, a left operand in R4 to R7
FLIGHT = """
UMOV UR11, 0x40000040
WARPGROUP.ARRIVE
HGMMA.64x32x16.F32.BF16 R24, R4, gdesc[UR8].tnspB, RZ, !UPT
HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR8].tnspB, R24, gsb0
{}
WARPGROUP.DEPBAR.LE gsb0, 0x0
{}
EXIT
"""


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("IADD3 R5, R6, 0x1, RZ", "writes an operand"),
        ("LDS.128 R40, [R60]", "writes an operand"),
        ("LDS.64 R38, [R60]", "touches the sum"),
        ("FMUL R60, R39, R61", "touches the sum"),
        ("STS.128 [R60], R36", "touches the sum"),
        ("@!P0 BRA `(.L_x_1)\nWARPGROUP.DEPBAR.LE gsb0, 0x0\n.L_x_1:\nFADD R60, R24, R61", "touches the sum"),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1\nFADD R60, R24, R61", "touches the sum"),
    ],
)
def test_a_register_in_flight_is_found(line, what):
    found = said(FLIGHT.format(line, ""))
    assert found
    assert all(text.startswith(what) for text in found)
    assert said(FLIGHT.format("", line)) == []  # behind the wait all may be done


@pytest.mark.parametrize(
    "line", ["FADD R60, R40, R61", "LDS.128 R44, [R4]", "IMAD.WIDE.U32 R60, R23, 0x8, R62", "STS [R60+0x18], R5"]
)
def test_other_registers_are_nobody_s_matter(line):
    assert said(FLIGHT.format(line, "")) == []


def test_an_earlier_group_may_be_done_while_a_later_one_is_not():
    later = "HGMMA.64x32x16.F32.BF16 R64, R44, gdesc[UR8].tnspB, RZ, !UPT, gsb0\nWARPGROUP.DEPBAR.LE gsb0, 0x1\n"
    assert said(FLIGHT.format(later + "FADD R60, R24, R61", "")) == []
    assert said(FLIGHT.format(later + "FADD R60, R64, R61", ""))


def test_a_jump_by_a_table_goes_to_all_of_it():
    table = 'BRX R2 -0x1c0 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)\n.L_x_1:\nEXIT\n.L_x_2:\nFADD R60, R24, R61'
    assert said(FLIGHT.format(table, ""))


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net"])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_delta_rule_s_equations(name, dim):
    """What ptxas 12.8 made wrong of them, at 32 columns and 4 warps, was found on an H100."""
    graph, device = ac.compile(name).graph, device_for("sm_90")
    module = load_source(RecurrenceOp(graph).source(dim, dim), name)
    schedule = delta_schedule(LinearSizes("bf16", 2, 16, 8192, dim, dim), device)
    found = cross_compile_linear(module, schedule, device, "bf16", states="bf16", only=("prepare_kernel",))
    assert not found["prepare_kernel"].faults
