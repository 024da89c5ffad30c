"""What a file of schedules/devices may say: the type of every field, the range of its unit, and where two must agree.

A figure in another unit, such as a clock in MHz, would be no error anywhere else, only bad choices.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

OPTIONAL = {"smem_reserved", "tmem_columns", "tma", "gluon"}
TYPES = ("bf16", "fp16", "tf32", "fp32")
GLUON = ("forward", "decode", "dkdv", "dkdv_wide")
#: what a target is called, and the widths of a warp, by backend
TARGETS = {"cuda": (r"sm_\d{2,3}", "sm_86"), "hip": (r"gfx[0-9a-f]{3,5}", "gfx942")}
WARPS = {"cuda": (32,), "hip": (32, 64)}
#: the first architecture with a tensor memory accelerator, and those with tensor memory
TMA, TENSOR_MEMORY = 90, (100, 103)
#: far around what GPUs have: only another unit is beyond
RANGES: dict[str, tuple[float, float, str]] = {
    "smem_per_block": (2**14, 2**21, "bytes"),
    "smem_per_sm": (2**14, 2**21, "bytes"),
    "regs_per_sm": (2**14, 2**20, "registers"),
    "regs_per_thread_max": (64, 1024, "registers"),
    "threads_per_sm": (512, 4096, "threads"),
    "clock_ghz": (0.2, 10, "GHz"),
    "dram_gbps": (10, 100_000, "GB/s"),
    "l2_mb": (0.25, 4096, "MiB"),
    "dram_share": (0.1, 1, "as a share of 1"),
    "launch_us": (0.1, 1000, "microseconds"),
}
#: how far the published rate of float32 may be from that of the units that `fma_per_clk_sm` counts
FP32_APART = 3


def faults(data: Mapping[str, Any], known: Mapping[str, str]) -> list[str]:
    """All that is wrong with a file's fields; `known` are their types by name."""
    found = [f"unknown field {key!r}" for key in sorted(set(data) - set(known))]
    found += [f"missing field {key!r}" for key in sorted(set(known) - set(data) - OPTIONAL)]
    for key in sorted(set(data) & set(known)):
        expected = _expected(key, known[key], data[key])
        if expected:
            found.append(f"field {key!r} is {data[key]!r}, expected {expected}")
    rates = data.get("tensor_tflops", {})
    if not isinstance(rates, dict) or set(rates) != set(TYPES):
        found.append(f"tensor_tflops has exactly the entries {', '.join(TYPES)}")
    else:
        wrong = [name for name in TYPES if not _is_positive(rates[name], (int, float))]
        found += [f"tensor_tflops.{name} is {rates[name]!r}, expected a positive number" for name in wrong]
    return found or _disagreements(data)


def _expected(key: str, kind: str, value: Any) -> str:
    """The expected form of a field that has another."""
    if kind == "str":
        return "" if isinstance(value, str) and value.strip() else "a text"
    if kind == "bool":
        return "" if isinstance(value, bool) else "true or false"
    if key == "cards":
        return "" if _is_list_of_texts(value) else 'a list of parts of names that drivers say, such as ["H100"]'
    if key == "gluon":
        names = ", ".join(f'"{name}"' for name in GLUON[:-1])
        return "" if isinstance(value, list) and _all_of(value, GLUON) else f'a list of {names} and "{GLUON[-1]}"'
    if kind in ("int", "float"):
        if not _is_positive(value, int if kind == "int" else (int, float)):
            return "a positive number" if kind == "float" else "a positive number without a fraction"
        low, high, unit = RANGES.get(key, (0, float("inf"), ""))
        return "" if low <= value <= high else f"{low:,} to {high:,} {unit}"
    return ""


def _disagreements(data: Mapping[str, Any]) -> list[str]:
    """Where fields that are right by themselves do not fit each other."""
    backend, target = data["backend"], data["target"]
    if backend not in TARGETS:
        return [f"field 'backend' is {backend!r}, expected 'cuda' or 'hip'"]
    pattern, example = TARGETS[backend]
    if not re.fullmatch(pattern, target):
        return [f"field 'target' is {target!r}, expected a name such as {example!r} for the backend {backend!r}"]
    found = []
    if data["warp_size"] not in WARPS[backend]:
        allowed = " or ".join(map(str, WARPS[backend]))
        found.append(f"field 'warp_size' is {data['warp_size']}, expected {allowed} for the backend {backend!r}")
    number = int(target.removeprefix("sm_")) if backend == "cuda" else 0
    if data.get("tma") and number < TMA:
        found.append(f"field 'tma' is true, and {target} has no tensor memory accelerator")
    if data.get("tmem_columns") and number not in TENSOR_MEMORY:
        found.append(f"field 'tmem_columns' is {data['tmem_columns']}, and {target} has no tensor memory")
    if data["smem_per_block"] > data["smem_per_sm"]:
        found.append(
            f"field 'smem_per_block' is {data['smem_per_block']:,}, more than 'smem_per_sm', {data['smem_per_sm']:,}"
        )
    rate, units = data["tensor_tflops"]["fp32"], 2 * data["fma_per_clk_sm"] * data["sms"] * data["clock_ghz"] / 1e3
    if not units / FP32_APART <= rate <= units * FP32_APART:
        found.append(
            f"tensor_tflops.fp32 is {rate:g}, but {data['sms']} SMs with {data['fma_per_clk_sm']:g} operations a clock "
            f"at {data['clock_ghz']:g} GHz have {units:.3g} TFLOP/s: 'sms', 'clock_ghz' or the rate is wrong"
        )
    return found


def _is_positive(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0 and isfinite(value)


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) and each.strip() for each in value)


def _all_of(value: list[Any], allowed: tuple[str, ...]) -> bool:
    return all(isinstance(each, str) and each in allowed for each in value)
