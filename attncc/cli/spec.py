"""Resolve a SPEC to a Variant: a shipped name, a TOML file, a Variant in a Python file, or formulas in options."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from attncc.errors import AttnccError, Diagnostic, SpecError
from attncc.language.places import traceback_span
from attncc.language.textform import from_texts, load_toml
from attncc.language.variant import Variant


def resolve(
    spec: str | None,
    similarity: str | None = None,
    score: str | None = None,
    mask: str | None = None,
    normalizer: str | None = None,
) -> Variant:
    """The variant that a command line names. SpecError: it names none or two, or the spec is wrong."""
    inline = {"similarity": similarity, "score": score, "mask": mask, "normalizer": normalizer}
    stages = {stage: text for stage, text in inline.items() if text is not None}
    if spec is None and not stages:
        raise SpecError(
            "there is no SPEC", remedy='name one (attncc list), a file, or give --mask "kv_idx <= q_idx" and the like'
        )
    if spec is None:
        return from_texts(**stages)
    if stages:
        raise SpecError(
            f"both '{spec}' and --{', --'.join(stages)} are given",
            remedy="a spec is complete: give its name or file alone, or all of its formulas inline",
        )
    return named(spec)


def named(spec: str) -> Variant:
    """The variant of one SPEC argument. SpecError: there is none, or it is wrong."""
    path, colon, name = spec.rpartition(":")
    if spec.endswith(".py") or path.endswith(".py"):
        return _from_python(Path(path), name) if colon and path.endswith(".py") else _from_python(Path(spec), "")
    if spec.endswith(".toml"):
        return load_toml(spec)
    if Path(spec).suffix or "/" in spec:
        raise SpecError(f"'{spec}' is no kind of spec", remedy="a spec file is spec.toml, or spec.py:name")
    from attncc import variants

    return variants.get(spec)


def _from_python(path: Path, name: str) -> Variant:
    """The Variant called `name` in a Python file, which is executed."""
    if not path.is_file():
        raise SpecError(f"no such file: {path}")
    module = _execute(path)
    found = [key for key, value in vars(module).items() if isinstance(value, Variant)]
    listed = f"its variants: {', '.join(found)}" if found else "it defines no Variant at the top level"
    if not name:
        remedy = f"write {path}:{found[0]}; {listed}" if found else listed
        raise SpecError(f"{path}: which variant?", remedy=remedy)
    if name not in vars(module):
        raise SpecError(f"{path} has no '{name}'", remedy=listed)
    value = getattr(module, name)
    if not isinstance(value, Variant):
        raise SpecError(f"'{name}' in {path} is {type(value).__name__}, not a Variant", remedy=listed)
    return value


def _execute(path: Path) -> ModuleType:
    found = importlib.util.spec_from_file_location(f"attncc_spec_{path.stem}", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # as when Python itself runs the file
    try:
        found.loader.exec_module(module)
    except Diagnostic as error:  # if no formula is at fault it has no place: then give it the line of the file
        raise error.at(traceback_span(error)) from None
    except AttnccError:
        raise
    except Exception as error:  # the user's program may raise anything
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else own[-1].lineno if own else None
        where = f"{path}:{line}" if line else str(path)
        raise SpecError(f"{where}: {type(error).__name__}: {error}", remedy="the file must run as it is") from None
    finally:
        sys.path.remove(folder)
    return module
