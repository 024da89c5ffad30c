"""Gluon's names in other releases of Triton: everything that differs is in one template.

ATTNCC_TRITONS names folders with other releases, as `pip install --no-deps --target` makes them, joined by colons."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from attncc.resources import path

OTHERS = [folder for folder in os.environ.get("ATTNCC_TRITONS", "").split(":") if folder]
TEMPLATES = sorted((path("templates") / "gluon").glob("*.j2"))
COMPILE = """
import tests.codegen.test_hopper as t
t.test_the_backward_spills_nothing_and_adds_by_tma("causal", (128, 128), "bf16", 1)
kernel = t.compiled("causal", t.KernelSchedule(128, 128, 8, 2, "gluon"))
assert kernel.spills <= 8, kernel.spills  # two registers in 3.9, none in 3.6 to 3.8
import triton
print("compiled by", triton.__version__)
"""


@pytest.mark.parametrize("name", [p.name for p in TEMPLATES if p.name != "gluon_compat.py.j2"])
def test_templates_import_nothing_and_use_no_name_that_has_changed(name):
    text = (path("templates") / "gluon" / name).read_text()
    assert not re.search(r"^\s*(import|from) (?!.*\.j2)", text, re.M)
    assert not re.search(r"\btma\.(?!store_wait)|gl\.(thread_)?barrier\b", text)


@pytest.mark.parametrize("folder", OTHERS or [pytest.param("", marks=pytest.mark.skip(reason="no other Triton"))])
def test_other_releases_compile_the_same_text(folder, tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{root}", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, cwd=root)
    assert "compiled by" in done.stdout, done.stderr[-2000:]
