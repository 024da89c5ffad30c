"""Every test in this folder needs a CUDA GPU. Many processes share it, and the cores: most of the time goes into
compiling kernels, and what else they do on the CPU is kept small."""

import ctypes
import gc
import os
from pathlib import Path

import pytest
import torch

from attncc.runtime import launch
from attncc.runtime.binaries import Binaries
from attncc.schedule import Cache


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in Path(item.fspath).parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
    items.sort(key=seconds, reverse=True)  # so that none is left running when all others have ended


def seconds(item):
    """What a slow test says that it takes."""
    mark = item.get_closest_marker("slow")
    return 0 if mark is None else mark.kwargs.get("seconds", 10)


#: of a CUDA context: whoever waits for the GPU sleeps
BLOCKING_SYNC = 4


@pytest.fixture(scope="session", autouse=True)
def leave_cores():
    """A process that waits for the GPU does not ask it again and again; what PyTorch does on the CPU is too small for
    threads that wait for each other, and its compiler has no processes of its own; objects that were imported are no
    garbage, and are not looked through after each test."""
    if torch.version.cuda is not None:
        driver = ctypes.CDLL("libcuda.so.1")
        driver.cuInit(0)
        for device in range(torch.cuda.device_count()):
            driver.cuDevicePrimaryCtxSetFlags_v2(device, BLOCKING_SYNC)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def leave_room():
    """Memory that PyTorch keeps for later goes back after each test."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def kernels_of_the_run(monkeypatch, tmp_path_factory):
    """What one test compiled is there for the others, in whatever process: compiling takes most of their time. All else
    that a cache holds, which tiling is taken among it, is each test's own."""
    here = tmp_path_factory.getbasetemp()  # of a worker it is in that of all
    kernels = Cache((here.parent if "PYTEST_XDIST_WORKER" in os.environ else here) / "kernels")
    monkeypatch.setattr(launch, "Binaries", lambda digest, cache: Binaries(digest, kernels))
    return kernels.directory
