"""Cases in which Triton's compiler cannot prefetch tiles ahead of the loop that uses them."""

from __future__ import annotations

from attncc.schedule.device import Device
from attncc.schedule.problem import Kernel, KernelSchedule, Problem

#: rows of a block below which its compiler for AMD gives up on elements that are read for each pair (Triton 3.6)
AMD_ROWS = 64


def stages_compile(kernel: Kernel, ks: KernelSchedule, problem: Problem, device: Device) -> bool:
    """Whether Triton can compile this number of stages. For AMD it cannot pipeline short blocks of a forward that
    reads an input per pair, such as a dense bias: a layout conversion remains that has no LLVM IR."""
    ahead = kernel == "forward" and ks.num_stages > 1 and problem.costs.forward.loads > 0
    return not (ahead and device.backend == "hip" and ks.block_m < AMD_ROWS)
