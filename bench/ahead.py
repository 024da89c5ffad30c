"""Candidates planned and compiled ahead, in processes that use no GPU: into attncc's cache, where whoever times finds
them."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any

from attncc.codegen.crosscompile import gpu_target
from attncc.runtime.launch import launches
from attncc.runtime.op import AttentionOp
from attncc.runtime.operands import Operands
from attncc.schedule import Device
from bench.regret_cells import REACHES, Cell, Mode, Plan, Trial, bound_of, op_of, plan


class Ahead:
    """A pool of processes that plans cells and compiles their candidates: the first round of all cells, then the next.
    A cell whose plan fails raises here what went wrong."""

    def __init__(self, cells: Sequence[Cell], device: Device, workers: int):
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_without_gpu)
        plans = [future.result() for future in [self._pool.submit(plan, cell, device) for cell in cells]]
        self._jobs: dict[Any, Future[str | None]] = {}
        self._waiting: list[tuple[Plan, int, list[Future[str | None]]]] = []
        for number in range(len(REACHES)):
            for found in plans:
                if found.rounds[number]:
                    self._waiting.append((found, number, self._begin(found, number, device)))

    @property
    def compiled(self) -> tuple[int, int]:
        """How many candidates are compiled, of how many."""
        return sum(job.done() for job in self._jobs.values()), len(self._jobs)

    def ready(self, seconds: float) -> Iterator[tuple[Plan, int]]:
        """Cells with the number of a round of theirs, each when its candidates are compiled, rounds of a cell in order;
        ends where nothing is ready after `seconds` in all."""
        end = time.monotonic() + seconds
        while self._waiting:
            now = [(p, number) for p, number, jobs in self._waiting if all(job.done() for job in jobs)]
            earlier = {p.cell: number for p, number, _ in reversed(self._waiting)}
            chosen = next((entry for entry in now if earlier[entry[0].cell] == entry[1]), None)
            if chosen is None:
                left = end - time.monotonic()
                unfinished = [job for _, _, jobs in self._waiting for job in jobs if not job.done()]
                if left <= 0 or not wait(unfinished, timeout=left, return_when="FIRST_COMPLETED").done:
                    return
                continue
            self._waiting = [entry for entry in self._waiting if entry[:2] != chosen]
            yield chosen

    def close(self) -> None:
        """Drop what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, found: Plan, number: int, device: Device) -> list[Future[str | None]]:
        """Compile the candidates of a round that no other cell shares."""
        jobs = []
        for trial in found.rounds[number]:
            for direction, kernels in trial.kernels.items():
                key = (found.cell.family, direction, kernels)
                if key not in self._jobs:
                    self._jobs[key] = self._pool.submit(compile_trial, found.cell, trial, direction, device)
                jobs.append(self._jobs[key])
        return jobs


def _without_gpu() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def compile_trial(cell: Cell, trial: Trial, direction: Mode, device: Device) -> str | None:
    """Compile what a trial launches in one direction. Returns what went wrong, or None: the process that times says so
    again."""
    try:
        engine = AttentionOp(op_of(cell.variant).graph, trial.schedule).engine
        bound, qkv = bound_of(cell)
        call = Operands(bound, *qkv)
        prepared = engine.prepare_for(device, bound, cell.shape.dtype)
        forward = launches(lambda: engine.host_code(prepared, call, False))
        both = launches(lambda: engine.host_code(prepared, call, direction == "backward"))
        for job in forward if direction == "forward" else both[len(forward) :]:
            job.finish(gpu_target(device))
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return None
