"""Seconds from formula to first result, forward and backward, in a fresh process: cold, then with a warm disk cache."""

from __future__ import annotations

import json
import os
import statistics
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

#: attncc's figure is the median of several fresh starts; FlexAttention's costs a quarter of a minute each
REPEATS = {"attncc": 3, "flex": 1}


def fresh(name: str, caches: Path) -> dict[str, float]:
    """One contestant in a new process whose caches are all under `caches`."""
    folders = {
        "TRITON_CACHE_DIR": caches / "triton",
        "TORCHINDUCTOR_CACHE_DIR": caches / "inductor",
        "ATTNCC_CACHE_DIR": caches / "attncc",
    }
    environment = {**os.environ, **{key: str(path) for key, path in folders.items()}}
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
    for name, repeats in REPEATS.items():
        first, again = [], []
        for _ in range(1 if run.quick else repeats):
            if run.out_of_time(results, f"{name} cold start"):
                break
            with tempfile.TemporaryDirectory() as folder:
                first.append(fresh(name, Path(folder)))
                again.append(fresh(name, Path(folder)))
        for cache, taken in (("cold", first), ("warm disk cache", again)):
            if taken:
                median = {key: round(statistics.median(t[key] for t in taken), 3) for key in taken[0]}
                results.add(case=name, cache=cache, runs=len(taken), **median)
                lines.append([name, cache, *(f"{median[k]:.2f}" for k in median)])
    run.show(
        f"compile, seconds to the first result, {results.meta['gpu']}",
        ["", "cache", "imports", "forward", "backward", "both, beyond imports"],
        lines,
    )
