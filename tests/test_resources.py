from __future__ import annotations

from pathlib import Path

import pytest

from attncc import resources
from attncc.errors import AttnccError


def test_a_checkout_uses_the_folders_at_its_top():
    top = Path(__file__).resolve().parents[1]
    assert resources.path("templates") == top / "templates"
    assert resources.path("schedules") == top / "schedules"
    assert list((resources.path("schedules") / "devices").glob("*.toml"))


def test_an_installed_package_uses_the_folders_inside_it(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "attncc"
    (package / "_data" / "templates").mkdir(parents=True)
    (tmp_path / "site-packages" / "templates").mkdir()  # some other project's: not ours to read
    monkeypatch.setattr(resources, "_PACKAGE", package)
    assert resources.path("templates") == package / "_data" / "templates"


def test_a_broken_installation_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path / "attncc")
    with pytest.raises(AttnccError, match=r"templates folder is missing.*\n.*install attncc again"):
        resources.path("templates")
