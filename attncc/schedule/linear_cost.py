"""The cost of a call by chunks against that of all pairs: which is faster, and what limits it.

A scan goes from chunk to chunk. An iteration is limited not by memory or matmul throughput but by latency: the loads of
the chunk, then four matmuls of which each needs the result of the one before. So this dependency chain is a limit of
its own, with as many iterations as a program has chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attncc.schedule.device import Device
from attncc.schedule.linear import STEPS, LinearSizes, PlanName, linear_schedule, padded, places
from attncc.schedule.model import model
from attncc.schedule.problem import DTYPE_BYTES


@dataclass(frozen=True)
class ChunkCost:
    """Microseconds of a forward by chunks: what each unit would need alone, and what begins and ends the kernels.

    memory: q, k, v read, k and v again for the states, out written; tensor: the matmuls at the rate that they reach
    here; chain: turns of a program's loops; prepare: the kernel before them that makes pairs where each channel decays,
    bound by its arithmetic; least: q, k, v and out moved once, at the memory's rate.
    """

    memory: float
    tensor: float
    chain: float
    prepare: float
    ends: float
    least: float

    @property
    def terms(self) -> dict[str, float]:
        """The limits by name."""
        return {"memory": self.memory, "tensor": self.tensor, "chain": self.chain, "prepare": self.prepare}

    @property
    def limit(self) -> str:
        """The unit that needs the longest."""
        return max(self.terms, key=lambda unit: self.terms[unit])

    @property
    def us(self) -> float:
        """Of the whole forward."""
        return self.ends + self.prepare + max(self.memory, self.tensor, self.chain)


def chunk_cost(sizes: LinearSizes, device: Device) -> ChunkCost:
    """The forward by chunks on a device."""
    fit, schedule = model().linear, linear_schedule(sizes, device)
    chunk, block = schedule.chunk, schedule.kernels["forward"]["BLOCK"]
    tokens = sizes.sequences * sizes.heads * sizes.length
    segments = -(-max(1, sizes.length) // schedule.span)
    whole = segments == 1  # nothing is handed from segment to segment
    row, each = sizes.d_qk + sizes.d_v, DTYPE_BYTES[sizes.dtype]
    rate = 1e3 * device.dram_gbps
    flops = 2.0 * tokens * (chunk * row + (2 if whole else 3) * sizes.d_qk * sizes.d_v)
    programs = sizes.sequences * sizes.heads * -(-sizes.d_v // block) * segments
    turns = -(-programs // places(device)) * schedule.span // chunk
    share = padded(sizes.d_qk) * block * chunk / (128 * 64 * 64)
    gap = fit.turn_gap[schedule.kernels["forward"]["num_stages"] > 2]
    clocks = gap + fit.turn_work * share + (0 if whole else fit.states_turn * share)
    chunks = sizes.sequences * sizes.heads * -(-sizes.length // chunk)
    prepared = chunks * fit.prepare_chunk * padded(sizes.d_qk) * chunk / (128 * 64) if sizes.by_channel else 0.0
    return ChunkCost(
        memory=tokens * (2 * row if whole else 3 * row) * each / rate,
        tensor=flops / (fit.chunk_rate * 1e6 * device.matmul_tflops(sizes.dtype, "ieee")),
        chain=turns * clocks / (1e3 * device.clock_ghz),
        prepare=prepared / (1e3 * device.sms * device.clock_ghz),
        ends=(1 if whole else 3) * device.launch_us + (1 if whole else 2) * fit.program_ends / (1e3 * device.clock_ghz),
        least=tokens * 2 * row * each / rate,
    )


def choose_plan(sizes: LinearSizes, device: Device, causal: bool = True) -> PlanName:
    """ "parallel", "chunk" or "recurrent": whichever the model takes to be the fastest."""
    if causal and sizes.length <= STEPS and not device.is_interpreter:
        return "recurrent"
    times: dict[PlanName, float] = {"parallel": quadratic_us(sizes, device), "chunk": chunk_cost(sizes, device).us}
    return min(times, key=lambda name: times[name])


def quadratic_us(sizes: LinearSizes, device: Device) -> float:
    """The causal forward over all pairs: half of the matmuls of a full one, or an exp for each pair and channel."""
    pairs = sizes.sequences * sizes.heads * sizes.length * sizes.length / 2
    if sizes.by_channel:
        return device.launch_us + pairs * sizes.d_qk / (1e3 * device.sms * device.sfu_per_clk_sm * device.clock_ghz)
    flops = 2.0 * pairs * (sizes.d_qk + sizes.d_v)
    return device.launch_us + flops / (model().linear.pairs_rate * 1e6 * device.matmul_tflops(sizes.dtype, "ieee"))


def crossover(sizes: LinearSizes, device: Device) -> int:
    """The length from which the model takes chunks to be faster than all pairs, in steps of 64 tokens."""
    lo, hi = 1, 1 << 14
    while lo < hi:
        at = (lo + hi) // 2
        there = replace(sizes, length=64 * at)
        if chunk_cost(there, device).us < quadratic_us(there, device):
            hi = at
        else:
            lo = at + 1
    return 64 * lo
