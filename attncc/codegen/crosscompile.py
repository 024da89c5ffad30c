"""Cross-compile generated kernels for any GPU, and read their registers, spills and shared memory. Needs no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attncc.codegen.launch import kernel_of, launch_meta
from attncc.codegen.names import written
from attncc.codegen.usage import usage_of_amdgcn, usage_of_cubin
from attncc.codegen.wgmma import Fault, wgmma_faults
from attncc.errors import InputError, UnsupportedError
from attncc.ir.graph import VariantGraph
from attncc.schedule import hopper
from attncc.schedule.device import Device
from attncc.schedule.light import light_tilings
from attncc.schedule.problem import Dtype, Kernel, KernelSchedule, Precision, Schedule

TYPES: dict[str, Any] = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
#: the launch of merge_kernel, the same for all schedules
MERGE = KernelSchedule(1, 1, 4, 1)
#: the tiling of Gluon's kernel of dQ, whose number of stages is fixed in its source
DQ_OF_ROWS = KernelSchedule(2 * hopper.ROWS, hopper.ROWS, 8, 1, "gluon")
#: kernels with 32 rows per program
_LIGHT = ("delta_kernel", "prepare_kernel", "finish_kernel")
_ROWS = 16  # strides of real tensors are multiples of 16 elements, and Triton compiles for that


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one target. registers: per thread; spills: bytes per thread; shared: bytes per block."""

    name: str
    registers: int
    spills: int
    shared: int
    ptx: str
    binary: bytes
    kind: str  # "ptx" and cubin, or "amdgcn" and hsaco

    @cached_property
    def faults(self) -> tuple[Fault, ...]:
        """Instructions that the assembler has miscompiled (see `codegen.wgmma`)."""
        return wgmma_faults(self.binary) if "wgmma.mma_async" in self.ptx else ()


def gpu_target(device: Device) -> GPUTarget:
    """Triton's description of a device."""
    arch: int | str = int(device.target.removeprefix("sm_")) if device.backend == "cuda" else device.target
    return GPUTarget(device.backend, arch, device.warp_size)


def kernel_names(module: ModuleType) -> tuple[str, ...]:
    """The kernels of a generated module, in order."""
    return tuple(name for name in vars(module) if name.endswith("_kernel"))


def cross_compile(
    module: ModuleType,
    graph: VariantGraph,
    schedule: Schedule,
    device: Device,
    dtype: Dtype,
    precision: Precision = "ieee",
    only: tuple[str, ...] | None = None,
    group: int = 1,
    ordered: bool = False,
) -> dict[str, CompiledKernel]:
    """Compile a generated module's kernels for `device`, by name. Needs no GPU.

    group: query heads per key head; ordered: every sum has a fixed order; only: compile these kernels alone.
    UnsupportedError: a kernel does not compile. InputError: Triton's cache cannot be written.
    """
    compiled = {}
    for name in kernel_names(module):
        if only is None or name in only:
            facts = (schedule, device, dtype, precision, group, ordered)
            compiled[name] = _compile(getattr(module, name), name, graph, *facts)
    return compiled


def _compile(
    kernel: Any,
    name: str,
    graph: VariantGraph,
    schedule: Schedule,
    device: Device,
    dtype: Dtype,
    precision: Precision,
    group: int,
    ordered: bool,
) -> CompiledKernel:
    tiling = _tiling(name, schedule)
    fast = dtype != "fp32" and device.backend == "cuda"
    constants: dict[str, Any] = {
        "BLOCK_M": 32 if name in _LIGHT else tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "BLOCK": tiling.block_n,
        "CELL_M": min(tiling.block_m, 16),
        "CELL_N": min(tiling.block_n, 16),
        "DOT": TYPES[dtype],
        "PRECISION": precision if dtype == "fp32" else "ieee",
        "FAST_MATH": fast,
        "WIDE": False,
        "HAS_DLSE": False,
        "SETTLE": True,
        "KEEP_B": True,
        "KEEP_H": True,
        "GROUP": group,
        "STAGES": tiling.num_stages,
        "DEALT": True,
        "SPLIT": True,
        "SPLITS": max(tiling.splits, 1),
        "BLOCK_S": 32,
        "OVERLAP": device.overlaps_kernels,
        "SUM_DQ": True,
        "ORDERED": ordered,
        "COUNT": 1,
    }
    parameters = _parameters(kernel, name, graph, tiling, dtype, constants)
    source = (_gluon_source() if kernel.is_gluon() else ASTSource)(kernel, *parameters)
    meta = launch_meta(tiling)
    options = {name: meta[name] for name in ("num_warps", "num_stages", "maxnreg") if name in meta}
    return resources(name, compiled(source, name, device, options), device)


def _parameters(
    kernel: Any, name: str, graph: VariantGraph, tiling: Any, dtype: Dtype, constants: Mapping[str, Any]
) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """The types of all parameters, the values of constants, and alignments, as in launches with aligned tensors."""
    gluon = kernel.is_gluon()
    signature: dict[str, str] = {}
    values: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    names = written(graph)
    inputs = {names[d.name].upper(): d for d in graph.inputs}
    scalars = {names[s.name]: "i32" if s.is_int else "fp32" for s in graph.scalars}
    for i, parameter in enumerate(kernel.params):
        p = parameter.name
        if parameter.is_constexpr:
            signature[p] = "constexpr"
            values[(i,)] = True if p.startswith("WANT_") or p.endswith("_BOXED") else constants[p]
        elif p in scalars:
            signature[p] = scalars[p]
        elif p.startswith("SUMS_DESC_"):
            signature[p] = _box((2 * int(p.removeprefix("SUMS_DESC_")), 32), "fp32")
        elif p.endswith("_BOXES"):
            dims = len(inputs[p.removesuffix("_BOXES")].pattern)
            box = (*[1] * (dims - 2), hopper.ROWS if gluon else tiling.block_m, tiling.block_n)
            signature[p] = _box(box, dtype) if gluon else f"tensordesc<{dtype}{list(box)}>"
        elif "_DESC_" in p:
            signature[p] = _descriptor(p, name, tiling, dtype)
        elif p == "ROWS_DESC":
            signature[p] = _box((1, tiling.block_m), "fp32")
        elif p == "scale":
            signature[p] = "fp32"
        elif p.endswith("_PTR") or p.startswith("SUMMARY_"):
            signature[p] = "*" + _pointer(p, inputs, dtype)
            attributes[(i,)] = [["tt.divisibility", _ROWS]]
        else:
            signature[p] = "i32"
            if p.startswith("stride_"):
                attributes[(i,)] = [["tt.divisibility", _ROWS]]
    return signature, values, attributes


def compiled(source: Any, name: str, device: Device, options: Mapping[Any, int]) -> Any:
    """Compile a kernel's source for a device. UnsupportedError: it does not compile. InputError: Triton's cache cannot
    be written."""
    try:
        return triton.compile(source, target=gpu_target(device), options=dict(options))
    except OSError as error:
        raise InputError(
            f"Triton cannot write what it compiles: {error}",
            remedy="name a folder that can be written: TRITON_CACHE_DIR=folder attncc ...",
        ) from error
    except Exception as error:
        raise UnsupportedError(f"{name} does not compile for {device.target}: {error}") from error


def _gluon_source() -> Any:
    """The class of Gluon sources, imported late because Triton's releases have it in different places."""
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _tiling(name: str, schedule: Schedule) -> Any:
    kernel = kernel_of(name, schedule)
    if kernel is not None:
        return schedule.of(kernel)
    for loop, tiling in light_tilings(schedule).items():
        if name.startswith(f"{loop}_"):
            return tiling
    if name == "dq_of_rows_kernel":
        return DQ_OF_ROWS
    if name == "merge_kernel":
        return MERGE
    if name in _LIGHT or name.startswith(("summary_", "bounds_")):
        return schedule.forward
    return schedule.pair or schedule.dq


def _descriptor(name: str, kernel: str, tiling: Any, dtype: Dtype) -> str:
    """The type of a descriptor parameter such as K_DESC_128: boxes of 128 columns, with as many rows as a tile of K."""
    tensor, columns = name.split("_DESC_")
    of_queries = tensor in ("Q", "DO", "DOUT", "OUT")
    if tiling.backend == "triton":
        return f"tensordesc<{dtype}[1, 1, {tiling.block_m if of_queries else tiling.block_n}, {columns}]>"
    rows = tiling.block_m if of_queries and kernel == "dkdv_kernel" else tiling.block_n
    if kernel.startswith("by_key_in_warps"):
        rows = tiling.block_m if of_queries else hopper.ROWS
    elif tensor in ("DQ", "DK", "DV") or tensor.startswith("SHARE_") or (of_queries and kernel != "dkdv_kernel"):
        rows = hopper.ROWS
    return _box((1, 1, rows, int(columns)), dtype)


def _box(shape: tuple[int, ...], dtype: Dtype) -> str:
    """The type of a Gluon kernel's tensor descriptor for boxes of this shape."""
    from triton.experimental.gluon import language as gl

    types = {"bf16": gl.bfloat16, "fp16": gl.float16, "fp32": gl.float32}
    layout = gl.NVMMASharedLayout.get_default_for(list(shape), types[dtype])
    return f"tensordesc<{dtype}{list(shape)},{layout!r}>"


def _pointer(name: str, inputs: dict[str, Any], dtype: Dtype) -> str:
    """The element type of a pointer parameter; `inputs` by their names in upper case."""
    if (of_input := name.removesuffix("_PTR")) in inputs:
        return "i32" if inputs[of_input].dtype == "int" else "fp32"
    counts = ("MIN_PTR", "MAX_PTR", "BOUNDS_PTR", "TURNS_PTR", "SUMMED_PTR", "ADDED_PTR", "DEALT_PTR")
    if name.startswith("SUMMARY_") or name in counts:
        return "i32"
    rows = ("Q_PTR", "K_PTR", "V_PTR", "OUT_PTR", "DOUT_PTR", "DQ_PTR", "DK_PTR", "DV_PTR")
    if name in rows or name.startswith("SHARE_"):
        return dtype
    return "fp32"


def resources(name: str, result: Any, device: Device) -> CompiledKernel:
    """The resource usage of a kernel that Triton compiled, read from its machine code."""
    shared = int(result.metadata.shared)
    if device.backend == "hip":
        text = result.asm["amdgcn"]
        usage = usage_of_amdgcn(text)
        return CompiledKernel(name, usage.registers, usage.spills, shared, text, result.asm["hsaco"], "amdgcn")
    ptx, image = result.asm["ptx"], result.asm["cubin"]
    usage = usage_of_cubin(image, ptx)
    return CompiledKernel(name, usage.registers, usage.spills, shared, ptx, image, "ptx")


def spilled(kernels: Mapping[str, CompiledKernel], schedule: Schedule) -> dict[tuple[Kernel, KernelSchedule], int]:
    """The spilled bytes of each of the scheduler's kernels and its tiling: the most of the kernels with this tiling."""
    found: dict[tuple[Kernel, KernelSchedule], int] = {}
    for name, compiled in kernels.items():
        kernel = kernel_of(name, schedule)
        if kernel is not None:
            key = kernel, schedule.of(kernel)
            found[key] = max(compiled.spills, found.get(key, 0))
    return found
