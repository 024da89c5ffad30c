"""What a GPU is, as far as a schedule depends on it, read from `schedules/devices/*.toml`: a GPU is a file."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attncc import resources
from attncc.errors import AttnccError, UnsupportedError
from attncc.schedule.problem import MAX_CHUNK, Dtype, Precision, head_chunks

if TYPE_CHECKING:
    import torch  # seconds to import, and a device that is named needs none of it


@dataclass(frozen=True)
class Device:
    """The figures of one GPU, all of the whole card unless the name says otherwise; `sms` are compute units on AMD.

    Bytes for shared memory, GHz, dense TFLOP/s by operand type (`fp32` is the IEEE rate), operations a clock and SM,
    GB/s, MiB, microseconds. `smem_reserved`: bytes of shared memory that the driver keeps for each program;
    `l2_bytes_per_clk_sm`: what an SM gets from the level-two cache when all of them read; latencies are clocks from a
    load to its data when all of them load, from there and from memory; `dram_bytes_per_clk_sm`: what one SM can take
    in; `dram_share`: the share of the memory's rate that a kernel which only reads can have.
    `tmem_columns` (tensor memory of an SM) is 0 except on Blackwell data-centre cards.
    `tma`: the backward copies its tiles with the tensor memory accelerator. `gluon`: the kernels that the scheduler may
    give to Gluon by itself, "forward", "decode" (keys that hold their values), "dkdv" (the whole backward) and
    "dkdv_wide" (that of heads wider than 128): those that were run and measured on the card.
    """

    name: str
    title: str
    target: str
    backend: str
    cards: tuple[str, ...]
    reference: bool
    warp_size: int
    sms: int
    smem_per_block: int
    smem_per_sm: int
    regs_per_sm: int
    regs_per_thread_max: int
    threads_per_sm: int
    schedulers_per_sm: int
    smem_bytes_per_clk_sm: float
    clock_ghz: float
    tensor_tflops: dict[str, float] = field(hash=False)
    fma_per_clk_sm: float
    int_per_clk_sm: float
    sfu_per_clk_sm: float
    dram_gbps: float
    l2_mb: float
    l2_bytes_per_clk_sm: float
    l2_latency_clk: float
    dram_latency_clk: float
    dram_bytes_per_clk_sm: float
    dram_share: float
    launch_us: float
    smem_reserved: int = 0
    tmem_columns: int = 0
    tma: bool = False
    gluon: tuple[str, ...] = ()

    def matmul_tflops(self, dtype: Dtype, precision: Precision) -> float:
        """The matmul rate for operands of `dtype`; float32 operands run at the rate of `precision`."""
        if dtype == "fp32":
            return self.tensor_tflops["tf32" if precision == "tf32" else "fp32"]
        return self.tensor_tflops[dtype]

    @property
    def overlaps_kernels(self) -> bool:
        """Can a kernel's programs start before the kernel in front of it has ended (programmatic dependent launch)?"""
        return self.backend == "cuda" and int(self.target.removeprefix("sm_")) >= 90

    @property
    def is_interpreter(self) -> bool:
        """Whether this stands for Triton's interpreter on a CPU, which has no limits worth counting."""
        return self.backend == "cpu"


# What a CPU tensor runs on. There is nothing to fit and nothing to predict: only `candidates` looks at it.
INTERPRETER = Device(
    name="interpreter",
    title="Triton's interpreter on a CPU",
    target="cpu",
    backend="cpu",
    cards=(),
    reference=False,
    warp_size=1,
    sms=1,
    smem_per_block=2**31,
    smem_per_sm=2**31,
    regs_per_sm=2**31,
    regs_per_thread_max=2**31,
    threads_per_sm=2**31,
    schedulers_per_sm=1,
    smem_bytes_per_clk_sm=1.0,
    clock_ghz=1.0,
    tensor_tflops=dict.fromkeys(("bf16", "fp16", "tf32", "fp32"), 0.001),
    fma_per_clk_sm=1.0,
    int_per_clk_sm=1.0,
    sfu_per_clk_sm=1.0,
    dram_gbps=10.0,
    l2_mb=1.0,
    l2_bytes_per_clk_sm=1.0,
    l2_latency_clk=1.0,
    dram_latency_clk=1.0,
    dram_bytes_per_clk_sm=1.0,
    dram_share=1.0,
    launch_us=100.0,
)


def device_names() -> tuple[str, ...]:
    """The names of the known devices, in alphabetical order."""
    return tuple(sorted(path.stem for path in (resources.path("schedules") / "devices").glob("*.toml")))


def targets() -> tuple[str, ...]:
    """The architectures of the known devices, each once, in order."""
    return tuple(sorted({load_device(name).target for name in device_names()}, key=lambda t: (len(t), t)))


@cache
def load_device(name: str) -> Device:
    """The device described by `schedules/devices/<name>.toml`; UnsupportedError if there is none."""
    if name not in device_names():
        raise _unknown(name)
    return parse_device(resources.path("schedules") / "devices" / f"{name}.toml")


def parse_device(path: Path) -> Device:
    """The device that the file `path` describes; AttnccError naming the file and the field if it is malformed."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise AttnccError(f"{path}: not a TOML file: {error}") from error
    known = {entry.name: entry for entry in fields(Device) if entry.name != "name"}
    optional = {"smem_reserved", "tmem_columns", "tma", "gluon"}
    wrong = [f"unknown field {key!r}" for key in sorted(set(data) - set(known))]
    wrong += [f"missing field {key!r}" for key in sorted(set(known) - set(data) - optional)]
    rates = data.get("tensor_tflops", {})
    types = ("bf16", "fp16", "tf32", "fp32")
    if not isinstance(rates, dict) or set(rates) != set(types):
        wrong.append(f"tensor_tflops has exactly the entries {', '.join(types)}")
    numbers = {"int": int, "float": (int, float)}
    wrong += [
        f"field {key!r} is {data[key]!r}, expected a positive number"
        for key, entry in known.items()
        if key in data and str(entry.type) in numbers and not _is_positive(data[key], numbers[str(entry.type)])
    ]
    if not isinstance(data.get("tma", False), bool):
        wrong.append(f"field 'tma' is {data['tma']!r}, expected true or false")
    gluon = data.get("gluon", [])
    if not isinstance(gluon, list) or not set(gluon) <= {"forward", "decode", "dkdv", "dkdv_wide"}:
        wrong.append(f'field \'gluon\' is {gluon!r}, expected a list of "forward", "decode", "dkdv" and "dkdv_wide"')
    if wrong:
        raise AttnccError(f"{path}: {'; '.join(wrong)}")
    return Device(**{**data, "name": path.stem, "cards": tuple(data["cards"]), "gluon": tuple(gluon)})


def loads_boxes(device: Device, dtype: Dtype, d_qk: int, d_v: int, branches: int = 1, value: int | None = None) -> bool:
    """Whether the backward loads its tiles through descriptors, whose rows must be multiples of 16 bytes.

    Beyond the tensor a box has 0, but beyond a branch it has the next one, and beyond a value that is part of k
    the rest of k: pieces must be whole there. Wider heads come by pointers: resident boxes would fill the registers.
    """
    ends = [d_qk // branches] * (branches > 1) + [value] * (value is not None)
    whole = all(sum(head_chunks(end)) == end for end in ends if end is not None)
    fits = all(dim % 8 == 0 and dim <= MAX_CHUNK * branches for dim in (d_qk, d_v))
    return device.tma and dtype != "fp32" and fits and whole


def device_for(target_or_name: str) -> Device:
    """The device of that name ("h100"), or the reference card of that architecture ("sm_90"); else UnsupportedError.

    Capital letters and small ones are the same.
    """
    target_or_name = target_or_name.lower()
    if target_or_name in device_names():
        return load_device(target_or_name)
    if target_or_name == INTERPRETER.target:
        return INTERPRETER
    for name in device_names():
        device = load_device(name)
        if device.target == target_or_name and device.reference:
            return device
    raise _unknown(target_or_name)


def device_of(device: torch.device | str) -> Device:
    """The device model of a torch device, with the SMs and shared memory that its driver reports.

    Rates of an unlisted card are those of its architecture's reference card, scaled by the number of SMs.
    A CPU is Triton's interpreter. UnsupportedError for an architecture without a device file or another kind of device.
    """
    import torch

    device = torch.device(device)
    if device.type == "cpu":
        return INTERPRETER
    if device.type != "cuda":
        raise UnsupportedError(
            f"device {str(device)!r} is neither a GPU that torch calls cuda nor a cpu",
            remedy="move q, k and v to a cuda device, or to the cpu to run through Triton's interpreter",
        )
    return _device_of_index(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _device_of_index(index: int) -> Device:
    """The model of the `index`-th GPU of this process, read from its driver once."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    arch = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    target = arch.split(":")[0] if arch else f"sm_{properties.major}{properties.minor}"
    return _with_real_figures(_listed(properties.name, target), properties)


def _listed(card: str, target: str) -> Device:
    """The device file that lists `card` by name, else the reference card of `target`."""
    for name in device_names():
        device = load_device(name)
        if device.target == target and any(re.search(rf"\b{re.escape(part)}\b", card) for part in device.cards):
            return device
    try:
        return device_for(target)
    except UnsupportedError:
        raise _unknown(f"{card} ({target})") from None


def _with_real_figures(device: Device, properties: Any) -> Device:
    """`device` with the name, SMs and shared memory of the real card, and matmul rates scaled by its SMs."""
    sms = properties.multi_processor_count
    per_block = getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block
    per_sm = getattr(properties, "shared_memory_per_multiprocessor", 0) or device.smem_per_sm
    rates = {dtype: rate * sms / device.sms for dtype, rate in device.tensor_tflops.items()}
    return replace(
        device, title=properties.name, sms=sms, smem_per_block=per_block, smem_per_sm=per_sm, tensor_tflops=rates
    )


def _is_positive(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0


def _unknown(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"no device or architecture {name!r}; known devices: {', '.join(device_names())}; "
        f"known architectures: {', '.join(targets())}",
        remedy="name one of these, or describe the GPU in a file of its own under schedules/devices/",
    )
