"""Shared by all tests: GPU tests are skipped where there is no GPU; no test touches the user's own cache; what is drawn
at random is the same in every run, but for `make fuzz`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("same", derandomize=True)
settings.register_profile("fuzz", max_examples=2000, print_blob=True)
settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty cache folder for every test."""
    folder = tmp_path_factory.mktemp("attncc-cache")
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(folder))
    return folder
