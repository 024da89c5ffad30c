"""Every test in this folder needs a CUDA GPU."""

import gc
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in Path(item.fspath).parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(autouse=True)
def leave_room():
    """Several processes share the GPU: memory that PyTorch keeps for later goes back after each test."""
    yield
    gc.collect()
    torch.cuda.empty_cache()
