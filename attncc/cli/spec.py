"""SPEC to a Variant or a Hybrid: a shipped name, a TOML file, a name in a Python file, or formulas inline."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from attncc.errors import AttnccError, Diagnostic, SpecError
from attncc.language.hybrid import Hybrid
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
    """The variant that a command line names. SpecError if it names none or two, or a hybrid, or is wrong."""
    return _single(resolve_any(spec, similarity, score, mask, normalizer), spec or "")


def resolve_any(
    spec: str | None,
    similarity: str | None = None,
    score: str | None = None,
    mask: str | None = None,
    normalizer: str | None = None,
) -> Variant | Hybrid:
    """The variant or hybrid that a command line names. SpecError if it names none or two, or is wrong."""
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
    return named_any(spec)


def named(spec: str) -> Variant:
    """The variant of one SPEC argument. SpecError for a hybrid, of which the command takes no more than a part."""
    return _single(named_any(spec), spec)


def _single(found: Variant | Hybrid, spec: str) -> Variant:
    if isinstance(found, Hybrid):
        separator = "." if spec.rpartition(":")[0].endswith(".py") else ":"
        parts = ", ".join(f"{spec}{separator}{part}" for part in found.parts)
        raise SpecError(f"'{spec}' is a hybrid, and this command takes one variant", remedy=f"its parts: {parts}")
    return found


def named_any(spec: str) -> Variant | Hybrid:
    """The variant or hybrid of one SPEC argument; a hybrid's part is `layer.toml:near`, or `specs.py:layer.near`."""
    path, colon, name = spec.rpartition(":")
    if spec.endswith(".py") or path.endswith(".py"):
        return _from_python(Path(path), name) if colon and path.endswith(".py") else _from_python(Path(spec), "")
    if spec.endswith(".toml"):
        return load_toml(spec)
    if colon and path.endswith(".toml"):
        return _part(load_toml(path), path, name)
    if Path(spec).suffix or "/" in spec:
        raise SpecError(f"'{spec}' is no kind of spec", remedy="a spec file is spec.toml, or spec.py:name")
    from attncc import variants

    return variants.get(spec)


def _part(found: Variant | Hybrid, spec: str, name: str) -> Variant:
    """A hybrid's part of that name."""
    if not isinstance(found, Hybrid):
        raise SpecError(f"'{spec}' is no hybrid, and has no part '{name}'", remedy=f"write {spec}")
    if name not in found.parts:
        raise SpecError(f"'{spec}' has no part '{name}'", remedy=f"its parts: {', '.join(found.parts)}")
    return found.parts[name]


def _from_python(path: Path, name: str) -> Variant | Hybrid:
    """The Variant or Hybrid called `name` in a Python file. The file is executed: it is the user's own program."""
    if not path.is_file():
        raise SpecError(f"no such file: {path}")
    module = _execute(path)
    found = [key for key, value in vars(module).items() if isinstance(value, Variant | Hybrid)]
    listed = f"its variants: {', '.join(found)}" if found else "it defines no Variant at the top level"
    if not name:
        remedy = f"write {path}:{found[0]}; {listed}" if found else listed
        raise SpecError(f"{path}: which variant?", remedy=remedy)
    name, dot, part = name.partition(".")
    if name not in vars(module):
        raise SpecError(f"{path} has no '{name}'", remedy=listed)
    value = getattr(module, name)
    if not isinstance(value, Variant | Hybrid):
        raise SpecError(f"'{name}' in {path} is {type(value).__name__}, not a Variant", remedy=listed)
    return _part(value, f"{path}:{name}", part) if dot else value


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
