"""The cost of a split-KV kernel and of the merge after it.

Concurrent programs share the memory bandwidth. None receives more than its SM can take, or than the bytes that its
pipeline keeps in flight allow; a tile takes a program that long, or as long as its arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from attncc.passes.work import LiveTiles
from attncc.schedule.device import Device
from attncc.schedule.memory import instruction, shared_memory, tiling, warp_grid
from attncc.schedule.model import model
from attncc.schedule.problem import KernelSchedule, Problem, head_chunks
from attncc.schedule.registers import register_limit, registers

FIT = model().decode


def pack(problem: Problem) -> int:
    """Query heads that are rows of one tile."""
    return problem.group if problem.costs.packs_heads else 1


def live_tiles(ks: KernelSchedule, problem: Problem) -> LiveTiles:
    """The tiles of one head that blocks meet whose rows are the queries of all heads of a group."""
    return problem.costs.live(_queries(ks, problem), ks.block_n)


def _queries(ks: KernelSchedule, problem: Problem) -> int:
    """Queries of a block."""
    return max(ks.block_m // pack(problem), 1)


def grid(ks: KernelSchedule, problem: Problem) -> tuple[int, float]:
    """Programs without splits, and the tiles that one of them visits on average."""
    tiles = live_tiles(ks, problem).live / ceil(problem.q_len / _queries(ks, problem))
    blocks = ceil(problem.q_len * pack(problem) / ks.block_m)
    return blocks * problem.batch * problem.heads // pack(problem), tiles


def programs_per_sm(ks: KernelSchedule, problem: Problem, device: Device) -> int:
    """How many programs an SM holds at once, by shared memory, registers and threads."""
    threads = ks.num_warps * device.warp_size
    by_memory = device.smem_per_sm // max(shared_memory("forward", ks, problem, device) + device.smem_reserved, 1)
    wanted = min(registers("forward", ks, problem, device), register_limit(ks, device))
    return max(1, min(by_memory, int(device.regs_per_sm // (wanted * threads)), device.threads_per_sm // threads))


@dataclass(frozen=True)
class Streaming:
    """The work of one tiling, whatever the number of splits.

    `lines` programs of `tiles` tiles each, before they are split; `slots`: programs that the device holds at once;
    clocks of each unit for one tile; `dram_clk`: bytes a clock that the memory gives to the programs together, counted
    once for each of the `readers` that find them in the cache.
    """

    ks: KernelSchedule
    problem: Problem
    device: Device
    lines: int
    tiles: float
    resident: int
    tile_bytes: int
    tensor: float
    sfu: float
    alu: float
    readers: float

    @classmethod
    def of(cls, ks: KernelSchedule, problem: Problem, device: Device) -> Streaming:
        """The work of a tiling."""
        lines, tiles = grid(ks, problem)
        live = live_tiles(ks, problem)
        pair, mask, mixed = problem.costs.forward, problem.costs.mask, live.mixed / max(live.live, 1)
        pairs = ks.block_m * ks.block_n
        op, tiles_of = instruction("forward", ks, problem, device), tiling("forward", ks, problem)
        # Triton's warp groups beyond the blocks of rows compute the scores again, and share the second matmul
        repeated = warp_grid(op, ks, tiles_of)[2] if op == "wgmma" and ks.backend == "triton" else 1
        qk = repeated * sum(problem.qk_chunks) * problem.costs.similarity.dots
        v = sum(head_chunks(problem.d_v)) * problem.values * problem.branches
        flops = device.matmul_tflops(problem.dtype, problem.precision) * 1e3 / device.clock_ghz / device.sms
        fma, integer = (pair.fma + mixed * mask.fma) * pairs, (pair.int + mixed * mask.int) * pairs
        return cls(
            ks,
            problem,
            device,
            lines,
            tiles,
            resident=programs_per_sm(ks, problem, device),
            tile_bytes=sum(t.rows * t.dim for t in tiles_of.streamed) * problem.dtype_bytes,
            tensor=2 * pairs * (qk + v) / (flops * FIT.matmul_share[op]),
            sfu=repeated * (pair.sfu + mixed * mask.sfu) * pairs / device.sfu_per_clk_sm,
            alu=repeated * (fma / device.fma_per_clk_sm + integer / device.int_per_clk_sm),
            # row blocks of one head, and heads that could not be packed, find the tiles of the first in the cache
            readers=max(lines / (problem.batch * problem.kv_heads), 1.0),
        )

    @property
    def slots(self) -> int:
        """Programs that the device holds at once."""
        return self.device.sms * self.resident

    @property
    def dram_clk(self) -> float:
        """Bytes a clock of the whole card."""
        return self.device.dram_gbps * self.device.dram_share / self.device.clock_ghz * self.readers

    def _wave(self, active: int, splits: int) -> float:
        """Clocks of programs that start together."""
        together = min(self.resident, ceil(active / self.device.sms))
        each, longest = self.tiles / splits, ceil(self.tiles / splits)
        under_way = max(self.ks.num_stages - 1, 0.5) * self.tile_bytes
        rate = min(self.device.dram_bytes_per_clk_sm / together, under_way / self.device.dram_latency_clk)
        units = self.tensor + self.sfu + self.alu
        arithmetic = max(
            (units + self.tile_bytes / self.device.smem_bytes_per_clk_sm) * together, FIT.tile_chain + units
        )
        arithmetic += self.device.dram_latency_clk * FIT.hidden ** (self.ks.num_stages - 1) / together
        shared = each * self.tile_bytes * active / self.dram_clk
        limits = (longest * self.tile_bytes / rate, longest * arithmetic, shared)
        norm: float = sum(limit**FIT.overlap for limit in limits) ** (1 / FIT.overlap)
        return norm + FIT.program_ends

    def us(self, splits: int) -> float:
        """Microseconds of the launches."""
        full_waves, last = divmod(self.lines * splits, self.slots)
        clocks = full_waves * self._wave(self.slots, splits) + (self._wave(last, splits) if last else 0.0)
        return clocks / (self.device.clock_ghz * 1e3) + self.launch_us(splits)

    def launch_us(self, splits: int) -> float:
        """Microseconds of launches, and of the merge: partial results are written and read once, in float32."""
        if splits == 1:
            return self.device.launch_us
        p = self.problem
        numbers = p.batch * p.heads * p.q_len * splits * (p.d_v * p.values + 2) * p.branches
        return (
            self.device.launch_us
            + FIT.merge_us
            + 2 * 4 * numbers / (self.device.dram_gbps * self.device.dram_share * 1e3)
        )

    def terms(self, splits: int) -> dict[str, float]:
        """Microseconds that each unit is busy."""
        clocks_per_us = self.device.clock_ghz * 1e3
        spread = self.lines * self.tiles / self.device.sms / clocks_per_us
        return {
            "tensor": self.tensor * spread,
            "sfu": self.sfu * spread,
            "alu": self.alu * spread,
            "memory": self.lines * self.tiles * self.tile_bytes / self.dram_clk / clocks_per_us,
            "launch": self.launch_us(splits),
        }


def predict(ks: KernelSchedule, problem: Problem, device: Device) -> tuple[float, dict[str, float]]:
    """The time of the launches in microseconds, and each unit's own."""
    work = Streaming.of(ks, problem, device)
    return work.us(ks.splits), work.terms(ks.splits)
