"""Kernels that other processes compile: the same binaries, and what goes wrong there is done here."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import attncc as ac
from attncc.runtime import binaries, compilers
from attncc.runtime.binaries import Binaries
from attncc.runtime.compiler import compile_kernel
from attncc.runtime.modules import Features
from attncc.runtime.specialize import signature
from attncc.schedule.cache import Cache
from tests.runtime.test_binaries import H100, META, arguments
from tests.runtime.test_processes import all_gone


@pytest.fixture(scope="module")
def kernel():
    return ac.compile("causal", backend="triton").engine.modules.load(Features(64, 64)).delta_kernel


def test_a_kernel_that_another_process_compiled_is_the_same(kernel, tmp_path, monkeypatch):
    special = signature(kernel, arguments(), META)
    with compilers.compilers(2) as count, monkeypatch.context() as patch:
        assert count == 2
        assert compilers.running()
        patch.setattr(binaries, "compile_kernel", None)
        made = Binaries("digest", Cache(tmp_path)).begin(kernel, special, H100).result()
        refused = signature(kernel, arguments(), {**META, "BLOCK_M": 3})
        assert compilers.compiled(kernel, refused, H100) is None
    assert made == compile_kernel(kernel, special, H100)
    assert not compilers.running()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_none_of_them_outlives_who_is_killed(tmp_path):
    """A tuner, for one."""
    told = tmp_path / "pids"
    text = f"""
import os, time
from pathlib import Path
from attncc.runtime import compilers
if __name__ == "__main__":
    with compilers.compilers(2):
        found = {{compilers._executor.submit(os.getpid).result() for _ in range(4)}}
        Path({str(told)!r}).write_text(" ".join(map(str, found)))
        time.sleep(60)
"""
    script = tmp_path / "main.py"
    script.write_text(text)
    parent = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    end = time.monotonic() + 60
    while not (told.exists() and told.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    assert all_gone(told)


@pytest.mark.parametrize("count", [0, 1])
def test_one_process_would_gain_nothing(kernel, count):
    with compilers.compilers(count) as found:
        assert found == 0
        assert compilers.compiled(kernel, signature(kernel, arguments(), META), H100) is None


def test_a_measurement_waits_for_what_this_process_compiles():
    done = []
    binaries.start(lambda: done.append(torch.zeros(2_000_000).sort().values.sum()))
    binaries.settle()
    assert len(done) == 1
