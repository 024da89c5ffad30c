"""Compile generated kernels to machine code with Triton's compiler. Needs no GPU."""

from __future__ import annotations

import base64
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction

from attncc.codegen.usage import usage_of_amdgcn, usage_of_cubin
from attncc.runtime.assembler import sound
from attncc.runtime.interpreter import compiling
from attncc.runtime.lines import without_lines
from attncc.runtime.specialize import ALIGNED, Signature


@dataclass(frozen=True)
class Binary:
    """A kernel for one architecture: a cubin, its entry's name, warps and bytes of shared memory a program, bytes that
    a thread spills, what the compiler decided of each tensor descriptor among its arguments, and whether it may start
    before the kernel in front of it has ended."""

    name: str
    image: bytes
    warps: int
    shared: int
    spills: int
    boxes: tuple[Mapping[str, Any], ...] = ()
    early: bool = False

    def to_json(self) -> dict[str, Any]:
        """A plain dict for the cache."""
        return {
            "kind": "kernel",
            "name": self.name,
            "warps": self.warps,
            "shared": self.shared,
            "spills": self.spills,
            "boxes": list(self.boxes),
            "early": self.early,
            "image": base64.b64encode(self.image).decode(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Binary | None:
        """The inverse of `to_json`; None for something else."""
        name, boxes, early, image = (data.get(key) for key in ("name", "boxes", "early", "image"))
        warps, shared, spills = (data.get(key) for key in ("warps", "shared", "spills"))
        if not (isinstance(name, str) and isinstance(image, str) and isinstance(boxes, list)):
            return None
        if type(warps) is not int or type(shared) is not int or type(spills) is not int or type(early) is not bool:
            return None
        return cls(name, base64.b64decode(image), warps, shared, spills, tuple(boxes), early)


#: what can be launched: a binary, or a kernel that only Triton's own launcher can start
Compiled: TypeAlias = Binary | CompiledKernel


def spilled_bytes(compiled: Compiled) -> int:
    """Bytes a thread that a kernel spills."""
    if isinstance(compiled, Binary):
        return compiled.spills
    if "amdgcn" in compiled.asm:
        return usage_of_amdgcn(compiled.asm["amdgcn"]).spills
    return usage_of_cubin(compiled.asm["cubin"], compiled.asm["ptx"]).spills


#: held by the thread that is in Triton's front end, which is Python: side by side several would take turns, and the
#: kernel that a call waits for, the first, would be as late as the last
_front_end = threading.Lock()


def compile_kernel(kernel: Any, signature: Signature, target: GPUTarget) -> Compiled:
    """Compile one specialization for a target; no GPU is needed. What the compiler raises is not changed."""
    names = [p.name for p in kernel.params]
    types = dict(zip(names, signature.types, strict=True))
    constants = {(i,): c for i, c in enumerate(signature.constants) if signature.types[i] == "constexpr"}
    hints = {(i,): [["tt.divisibility", ALIGNED]] for i, aligned in enumerate(signature.aligned) if aligned}
    source = _source_class(kernel)(kernel, types, constants, hints)
    options = dict(signature.options)
    with compiling():
        if not is_watched() and target.backend == "cuda":
            image, ptx, facts = _stages(source, target, options)
            if _is_plain(facts, signature):
                # the few kernels in Gluon are looked through by tests, which is not quick: they are long
                if target.arch == 90 and not kernel.is_gluon():
                    image = sound(facts.name, ptx, image)
                spills = usage_of_cubin(image, ptx).spills
                boxes = tuple(facts.tensordesc_meta or ())
                early = bool(facts.launch_pdl)
                return Binary(facts.name, image, facts.num_warps, facts.shared, spills, boxes, early)
        return triton.compile(source, target=target, options=options)


def _stages(source: Any, target: GPUTarget, options: dict[str, Any]) -> tuple[bytes, str, Any]:
    """A cubin, its PTX, and what the compiler says of it, by the stages of `triton.compile` alone.

    That itself looks into Triton's cache first, whose keys hold a digest of the whole compiler: half a second in every
    process.
    """
    backend = make_backend(target)
    parsed = backend.parse_options({**options, **source.parse_options()})
    facts: dict[str, Any] = {"target": target, **vars(parsed)}
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    words = backend.get_codegen_implementation(parsed), backend.get_module_map()
    with _front_end:
        module = source.make_ir(target, parsed, *words, context)
    names = list(stages)
    ptx = ""
    with without_lines():
        for name in names[names.index(source.ext) :]:
            ptx = module if name == "cubin" else ptx
            module = stages[name](module, facts)
    return module, ptx, SimpleNamespace(**facts)


def _is_plain(facts: Any, signature: Signature) -> bool:
    """Whether a launch can pass all arguments of the kernel: no scratch memory, clusters, or descriptors that are
    decomposed."""
    described = sum(kind.startswith("tensordesc") for kind in signature.types)
    scratch = facts.global_scratch_size or facts.profile_scratch_size
    special = facts.num_ctas != 1 or facts.launch_cooperative_grid
    return not scratch and not special and len(facts.tensordesc_meta or ()) == described


def is_watched() -> bool:
    """Whether hooks observe the compiler, or change its results."""
    knobs = triton.knobs.compilation
    return bool(knobs.always_compile or knobs.dump_ir or knobs.override or knobs.listener)


def _source_class(kernel: Any) -> Any:
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def bypasses(kernel: Any) -> bool:
    """Whether Triton's front end can be bypassed for this kernel now: not while it is watched."""
    knobs = triton.knobs.runtime
    return (
        isinstance(kernel, JITFunction)
        and torch.version.hip is None
        and knobs.jit_cache_hook is None
        and knobs.jit_post_compile_hook is None
        and not knobs.debug
        and not knobs.override_arch
        and not triton.knobs.compilation.instrumentation_mode
        and not kernel.pre_run_hooks
    )


@cache
def current_target(device: int) -> GPUTarget:
    """Triton's name of a CUDA device."""
    major, minor = torch.cuda.get_device_capability(device)
    return GPUTarget("cuda", major * 10 + minor, 32)
