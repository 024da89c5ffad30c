"""Cross-compile the kernels of a chunk plan for any GPU, and read their resource usage. Needs no GPU."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

from triton.compiler import ASTSource

from attncc.codegen.crosscompile import TYPES, CompiledKernel, compiled, kernel_names, resources
from attncc.schedule.delta import solve_precision
from attncc.schedule.device import Device
from attncc.schedule.linear import LinearSchedule
from attncc.schedule.problem import Dtype, Precision

_TENSORS = (
    *("Q_PTR", "K_PTR", "V_PTR", "DO_PTR", "OUT_PTR", "DQ_PTR", "DK_PTR", "DV_PTR", "OWN_PTR"),
    *("ERASED_PTR", "SOLVED_PTR", "REST_PTR", "ADDED_PTR", "DRIGHT_PTR", "RECALLED_PTR", "WEIGHTS_PTR"),
    *("X_PTR", "Y_PTR", "Z_PTR", "U_PTR", "KEPT_PTR", "FEATURES_PTR", "PAIR_PTR", "DIAGONAL_PTR"),
    *("ASKED_PTR", "LEFT_PTR"),
)
_STATES = ("STATES_PTR", "DSTATES_PTR")
_FLAGS = (
    *("HAS_STATE", "HAS_FIRST", "HAS_LAST", "KEEP", "KEEP_LAST", "KEEP_STATE", "WANT_PRODUCT", "WANT_STEP"),
    *("WANT_STEPS", "WANT_ROW", "WANT_DIAGONAL", "WEIGHTED", "PAIRS", "HAS_FACTOR", "HAS_WEIGHT", "SHARED"),
)
#: the launch arguments of the host's small kernels
_SMALL = {"BLOCK": 1024, "SIZE": 128 * 128, "num_warps": 4}
#: elements between consecutive tokens: 16 heads of 128
_TOKEN = 2048


def cross_compile_linear(
    module: ModuleType,
    schedule: LinearSchedule,
    device: Device,
    dtype: Dtype,
    precision: Precision = "ieee",
    states: Dtype = "fp32",
    only: Collection[str] | None = None,
) -> dict[str, CompiledKernel]:
    """Compile every kernel of a generated module for `device`, with a state coming in; no GPU is needed, nor used.

    states: the dtype in which the states of chunks are stored; only: compile only the kernels of these names.
    """
    found = {}
    for name in kernel_names(module):
        if only is not None and name not in only:
            continue
        if name == "forward_kernel" and "carry" in schedule.kernels and "forward" not in schedule.kernels:
            continue  # the carry kernel computes the output, too
        kernel = getattr(module, name)
        of_host = {**_SMALL, "CHUNK": schedule.chunk if name == "runs_kernel" else 32}
        meta = dict(schedule.kernels.get(name.removesuffix("_kernel"), of_host))
        options = {key: meta.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in meta}
        constants: dict[str, Any] = {
            **dict.fromkeys(_FLAGS, True),
            **meta,
            "PACKED": False,
            "REVERSE": False,
            "AGAIN": False,
            "READ": "forward" not in schedule.kernels,
            "STEPS": 16,
            "DOT": TYPES[dtype],
            "PRECISION": precision if dtype == "fp32" else "ieee",
            "SOLVE": solve_precision("ieee", dtype == "fp32", device),
            "FAST_MATH": dtype != "fp32" and device.backend == "cuda",
        }
        source = ASTSource(
            kernel, *_arguments(kernel, constants, {**dict.fromkeys(_TENSORS, dtype), **dict.fromkeys(_STATES, states)})
        )
        found[name] = resources(name, compiled(source, name, device, options), device)
    return found


def _arguments(kernel: Any, constants: dict[str, Any], dtypes: Mapping[str, Dtype]) -> tuple[Any, Any, Any]:
    """Types, constants and alignments of a kernel's parameters, as a call with aligned tensors has them."""
    signature: dict[str, str] = {}
    values: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            values[(i,)] = _TOKEN if name.startswith("stride_") else constants[name]
        elif name.endswith("_PTR"):
            tables = ("SEGMENTS_PTR", "SEQUENCES_PTR")
            signature[name] = "*" + ("i32" if name in tables else dtypes.get(name, "fp32"))
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name.startswith(("constant", "power_", "read_")):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.startswith("stride_"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, values, attributes
