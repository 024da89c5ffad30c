"""Seconds from formula to first result, forward and backward, in a fresh process: cold, then with a warm disk cache.

Each figure is that of the fastest of several starts. What is counted is said in bench.cold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import attncc as ac
from bench import area, cold
from bench.case import Case, Shape
from bench.check import against_reference
from bench.record import ROOT
from bench.run import Run

#: how often each starts afresh, cold and warm; those of FlexAttention take half a minute, cold and warm
REPEATS = {"attncc": 3, "flex": 1, "simple_gla": 2, "gated_delta_net": 2}


def fresh(name: str, caches: Path, bytecode: Path) -> dict[str, float]:
    """One contestant in a new process whose caches are all under `caches`.

    Python's own cache of compiled modules is in `bytecode`: some installations are without one, and what a contestant
    imports late would be parsed in every process.
    """
    folders = {
        "PYTHONPYCACHEPREFIX": bytecode,
        "TRITON_CACHE_DIR": caches / "triton",
        "TORCHINDUCTOR_CACHE_DIR": caches / "inductor",
        "ATTNCC_CACHE_DIR": caches / "attncc",
    }
    environment = {**os.environ, **{key: str(path) for key, path in folders.items()}}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-m", "bench.cold", name]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    seconds: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return seconds


def _check() -> None:
    """The formula that is timed, against the reference, before any process is started for it."""
    case = Case("cold", cold.variant(), area.causal)
    b, h, m, d = cold.SIZE
    against_reference(ac.compile(case.variant), case, Shape(b=b, h=h, m=m, d=d))
    torch.cuda.empty_cache()


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("compile")
    try:
        _check()
    except Exception as error:
        run.fail(results, "compile check", error, case="check")
        return
    lines = []
    with tempfile.TemporaryDirectory() as bytecode:
        for name, repeats in REPEATS.items():
            first, again = [], []
            for _ in range(1 if run.quick else repeats):
                if run.out_of_time(results, f"{name} cold start"):
                    break
                with tempfile.TemporaryDirectory() as folder:
                    first.append(fresh(name, Path(folder), Path(bytecode)))
                    again.append(fresh(name, Path(folder), Path(bytecode)))
            for cache, taken in (("cold", first), ("warm disk cache", again)):
                if taken:
                    best = min(taken, key=lambda t: t["total_s"])
                    row = {key: round(seconds, 3) for key, seconds in best.items()}
                    results.add(case=name, cache=cache, runs=len(taken), **row)
                    lines.append([name, cache, *(f"{seconds:.2f}" for seconds in row.values())])
    run.show(
        f"compile, seconds to the first result, {results.meta['gpu']}",
        ["", "cache", "imports", "forward", "backward", "both, beyond imports"],
        lines,
    )
