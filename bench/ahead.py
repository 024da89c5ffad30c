"""Candidates planned and compiled ahead, in processes that use no GPU: into attncc's cache, where whoever times finds
them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any

from attncc.codegen.crosscompile import gpu_target
from attncc.runtime.launch import launches
from attncc.runtime.op import AttentionOp
from attncc.schedule import Device
from bench.regret_cells import Cell, Mode, Plan, Trial, bound_of, op_of, plan


class Ahead:
    """A pool of processes that plans cells and compiles their candidates, the first cells first."""

    def __init__(self, cells: Sequence[Cell], device: Device, workers: int):
        self._device = device
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_without_gpu)
        self._plans = {cell: self._pool.submit(plan, cell, device) for cell in cells}
        self._jobs: dict[Any, Future[str | None]] = {}
        self._waiting: dict[Cell, list[Future[str | None]]] = {}

    @property
    def compiled(self) -> tuple[int, int]:
        """How many candidates are compiled, of how many that were asked for so far."""
        return sum(job.done() for job in self._jobs.values()), len(self._jobs)

    def ready(self, budget: float) -> Iterator[Plan]:
        """The plans of all cells, each when its candidates are compiled; for at most `budget` more seconds at a time
        nothing is ready. A cell whose plan fails raises here what went wrong."""
        left = list(self._plans)
        while left:
            for cell in left:
                if cell not in self._waiting and self._plans[cell].done():
                    self._waiting[cell] = self._begin(self._plans[cell].result())
            done = next((c for c in left if c in self._waiting and all(job.done() for job in self._waiting[c])), None)
            if done is not None:
                left.remove(done)
                yield self._plans[done].result()
                continue
            awaited: list[Future[Any]] = [*self._waiting.get(left[0], [self._plans[left[0]]])]
            unfinished = [future for future in awaited if not future.done()]
            if unfinished and not wait(unfinished, timeout=budget, return_when="FIRST_COMPLETED").done:
                raise TimeoutError("nothing was compiled in the time left")

    def close(self) -> None:
        """Drop what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, found: Plan) -> list[Future[str | None]]:
        """Compile the candidates of a cell that no other cell shares."""
        jobs = []
        for trial in found.trials:
            for direction, kernels in trial.kernels.items():
                key = (found.cell.family, direction, kernels)
                if key not in self._jobs:
                    self._jobs[key] = self._pool.submit(compile_trial, found.cell, trial, direction, self._device)
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
        prepared = engine.prepare_for(device, bound, cell.shape.dtype)
        forward = launches(lambda: engine.host_code(prepared, bound, *qkv, False))
        both = launches(lambda: engine.host_code(prepared, bound, *qkv, direction == "backward"))
        for job in forward if direction == "forward" else both[len(forward) :]:
            job.finish(gpu_target(device))
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return None
