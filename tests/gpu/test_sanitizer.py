"""NVIDIA's compute-sanitizer over one small call of each family of kernels: accesses outside of what was allocated, and
hazards in shared memory. It comes with the CUDA toolkit; without it the tests are skipped.

Of kernels in Gluon racecheck (2025.3) reports two things that barriers in shared memory order, which it cannot see:
what the compiler hands to the warps when they part, and the number of the next tile, which the loading warp stores
before it arrives at `turn_full` and the others load after they have waited there. Those are left to `test_races`.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.kernels import FAMILIES

ROOT = Path(__file__).parents[2]
TOOL = shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin")))
SECONDS = 300
RACED = [name for name, family in FAMILIES.items() if not family.hopper]


def sanitized(tool, names, kernels, **more):
    """What the tool says, and how many errors it counts. `kernels`: the folder of those that other tests compiled."""
    # a tensor is an allocation of its own: the tool knows those of the driver
    own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "ATTNCC_CACHE_DIR": str(kernels)}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **own, **more}
    command = [TOOL, "--tool", tool, sys.executable, "-m", "tests.gpu.kernels", *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    said = done.stdout + done.stderr
    counted = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", said)
    assert counted, said[-3000:]
    assert all(f"{name}: out" in said for name in names), said[-3000:]
    return said, int(counted[1])


@pytest.mark.slow(seconds=100)
@pytest.mark.skipif(TOOL is None, reason="no compute-sanitizer here")
@pytest.mark.parametrize(("tool", "names"), [("memcheck", list(FAMILIES)), ("racecheck", RACED)])
def test_nothing_is_found(tool, names, kernels_of_the_run):
    said, errors = sanitized(tool, names, kernels_of_the_run)
    if errors:  # once more with lines of the kernels, whose binaries are others
        said += sanitized(tool, names, kernels_of_the_run, TRITON_DISABLE_LINE_INFO="0")[0]
    assert not errors, said[-6000:]
