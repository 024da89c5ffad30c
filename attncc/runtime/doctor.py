"""Check what works on this machine, by trying it: versions, GPUs, the interpreter, cross-compilation, the cache."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from attncc.version import __version__


@dataclass(frozen=True)
class Finding:
    """One thing that was tried: what came of it, and whether attncc can live with that."""

    name: str
    ok: bool
    detail: str


def examine() -> list[Finding]:
    """Try everything, the cheap things first. Nothing is raised: a failure is a finding."""
    tries: list[tuple[str, Callable[[], str]]] = [
        ("attncc", lambda: f"{__version__}, Python {platform.python_version()}"),
        *((name, lambda name=name: version(name)) for name in ("torch", "triton", "sympy")),
        ("GPU", _gpus),
        ("assembler", _assembler),
        ("cross-compilation", _cross_compilation),
        ("interpreter", _interpreter),
        ("cache folder", _cache_folder),
        ("plots", _plots),
    ]
    return [_tried(name, attempt) for name, attempt in tries]


def _tried(name: str, attempt: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, attempt())
    except _Optional as missing:
        return Finding(name, True, str(missing))
    except Exception as error:  # whatever is wrong here is what the user wants to know
        return Finding(name, False, f"{type(error).__name__}: {error}")


class _Optional(Exception):
    """Something is not there, and need not be."""


def _gpus() -> str:
    import torch

    from attncc.schedule.device import device_of

    if not torch.cuda.is_available():
        raise _Optional("none that torch can use: kernels run through Triton's interpreter, and compile for any target")
    found = []
    for index in range(torch.cuda.device_count()):
        device = device_of(f"cuda:{index}")
        exact = ", an estimate from that of its kind" if device.borrowed else ""
        found.append(f"{device.title} ({device.target}, device file {device.name}{exact})")
    return "; ".join(found)


def _assembler() -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    missing = [tool for tool in ("ptxas", "cuobjdump") if not (folder / tool).exists()]
    if missing:
        raise FileNotFoundError(f"triton's package has no {', '.join(missing)}")
    return "ptxas and cuobjdump, in triton's package"


def _cross_compilation() -> str:
    from attncc import variants
    from attncc.codegen.crosscompile import cross_compile
    from attncc.codegen.module import load_source
    from attncc.codegen.plan import Plan
    from attncc.codegen.problem import problem_of
    from attncc.codegen.render import render
    from attncc.runtime.explain import sizes_of
    from attncc.schedule.choose import choose
    from attncc.schedule.device import device_for

    graph = variants.get("causal").graph
    plan, device = Plan(graph), device_for("h100")
    schedule = choose(problem_of(plan, sizes_of(d_qk=64), "fp16", "ieee", {}), device)
    module = load_source(render(plan, 64, 64, backward=False), graph.name)
    kernel = cross_compile(module, graph, schedule, device, "fp16", only=("forward_kernel",))["forward_kernel"]
    return f"works: causal forward for {device.target} takes {kernel.registers} registers"


def _interpreter() -> str:
    import torch

    from attncc import variants
    from attncc.runtime.samples import Shape
    from attncc.runtime.verify import verify_variant

    rows = verify_variant(variants.get("causal"), "cpu", torch.float32, [Shape(1, 1, 1, 32, 32, 16, 16)])
    wrong = [row.check.name for row in rows if not row.ok]
    if wrong:
        raise ArithmeticError(f"wrong results: {', '.join(wrong)}")
    return "works: causal forward and backward agree with the reference"


def _cache_folder() -> str:
    from attncc.schedule.cache import Cache

    cache = Cache()
    cache.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cache.directory):
        pass
    return f"{cache.directory}, {len(cache.list())} entries"


def _plots() -> str:
    try:
        return f"matplotlib {version('matplotlib')}"
    except PackageNotFoundError:
        raise _Optional(
            "matplotlib is not installed: attncc show --png needs it (pip install 'attncc[plot]')"
        ) from None
