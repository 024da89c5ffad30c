"""Shared by all tests: GPU tests are skipped where there is no GPU; no test touches the user's own cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


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
