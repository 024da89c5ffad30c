"""Device models, read from `schedules/devices/*.toml`: the figures of a GPU that schedules depend on."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attncc import resources
from attncc.errors import AttnccError, UnsupportedError
from attncc.schedule.device_file import faults
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
    `borrowed`: no file lists this card, and these are the figures of another of its architecture.
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
    borrowed: bool = False

    @property
    def card(self) -> str:
        """The name under which results of this card are kept: that of its device file, or its own if the file is
        another card's."""
        return self.title if self.borrowed else self.name

    def matmul_tflops(self, dtype: Dtype, precision: Precision) -> float:
        """The matmul rate for operands of `dtype`; float32 operands run at the rate of `precision`."""
        if dtype == "fp32":
            return self.tensor_tflops["tf32" if precision == "tf32" else "fp32"]
        return self.tensor_tflops[dtype]

    @property
    def overlaps_kernels(self) -> bool:
        """Whether a kernel may start before the previous one has ended (programmatic dependent launch)."""
        return self.backend == "cuda" and int(self.target.removeprefix("sm_")) >= 90

    @property
    def is_interpreter(self) -> bool:
        """Whether this stands for Triton's interpreter on a CPU, which has no limits worth counting."""
        return self.backend == "cpu"


#: what is known without a file, or from its name
_NOT_IN_FILES = {"name", "borrowed"}

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
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AttnccError(f"{path}: not a TOML file: {error}") from error
    wrong = faults(data, {entry.name: str(entry.type) for entry in fields(Device) if entry.name not in _NOT_IN_FILES})
    if wrong:
        raise AttnccError(f"{path}: {'; '.join(wrong)}")
    lists = {key: tuple(data.get(key, ())) for key in ("cards", "gluon")}
    return Device(**{**data, "name": path.stem, **lists})


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
    by_name = {name.lower(): name for name in device_names()}
    if target_or_name in by_name:
        return load_device(by_name[target_or_name])
    if target_or_name == INTERPRETER.target:
        return INTERPRETER
    of_target = [device for device in map(load_device, device_names()) if device.target == target_or_name]
    named = [device for device in of_target if device.reference] or of_target
    if len(named) > 1:
        raise AttnccError(
            f"{_files(named)} are all of {target_or_name}, and one card stands for it",
            remedy="one of them says reference = true, and the others reference = false",
        )
    if named:
        return named[0]
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
    """The device file that lists `card` by name, the one with the longest part of it where several do, else the
    reference card of `target`, `borrowed`."""
    lengths = {device: _named(card, device) for device in map(load_device, device_names()) if device.target == target}
    longest = max(lengths.values(), default=0)
    found = [device for device, length in lengths.items() if length == longest > 0]
    if len(found) > 1:
        raise AttnccError(
            f"{_files(found)} all list the card {card!r}", remedy="the one that is right names more of it under cards"
        )
    if found:
        return found[0]
    try:
        return replace(device_for(target), borrowed=True)
    except UnsupportedError:
        raise _unknown(f"{card} ({target})") from None


def _named(card: str, device: Device) -> int:
    """The length of the longest text of a device's `cards` that the name of a card has as words; 0 for none."""
    return max((len(part) for part in device.cards if re.search(rf"\b{re.escape(part)}\b", card)), default=0)


def _files(devices: Iterable[Device]) -> str:
    return " and ".join(f"schedules/devices/{device.name}.toml" for device in devices)


def _with_real_figures(device: Device, properties: Any) -> Device:
    """`device` with the name, SMs and shared memory of the real card, and matmul rates scaled by its SMs."""
    sms = properties.multi_processor_count
    per_block = getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block
    per_sm = getattr(properties, "shared_memory_per_multiprocessor", 0) or device.smem_per_sm
    rates = {dtype: rate * sms / device.sms for dtype, rate in device.tensor_tflops.items()}
    return replace(
        device, title=properties.name, sms=sms, smem_per_block=per_block, smem_per_sm=per_sm, tensor_tflops=rates
    )


def _unknown(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"no device or architecture {name!r}; known devices: {', '.join(device_names())}; "
        f"known architectures: {', '.join(targets())}",
        remedy="name one of these, or describe the GPU in a file of its own under schedules/devices/",
    )
