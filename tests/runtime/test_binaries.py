"""Specialization, compilation and launches of generated kernels, on a machine without a GPU: the driver is a fake."""

import itertools
import subprocess
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import triton.language as tl
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

import attncc as ac
from attncc.errors import AttnccWarning
from attncc.runtime import binaries, compiler, launch, specialize
from attncc.runtime.binaries import Binaries
from attncc.runtime.compiler import Binary, compile_kernel
from attncc.runtime.lines import without_lines
from attncc.runtime.modules import Features
from attncc.runtime.specialize import signature
from attncc.schedule.cache import Cache

from .delta_launch import H100, META, arguments, delta_kernel


@pytest.fixture(scope="module")
def kernel():
    return delta_kernel()


class Parameter:
    """A kernel's parameter, as far as specialization looks at it."""

    is_constexpr = False
    name = "x"

    def __init__(self, specialize):
        self.do_not_specialize = not specialize


VALUES = [
    *(0, 1, 2, 16, -16, 17, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**62, 2**63, True, False, 1.0, 0.1, None),
    *(torch.empty(32, dtype=t) for t in specialize._POINTERS),
    *(torch.empty(33, dtype=torch.float16)[1:], torch.empty(36)[4:], torch.empty(4, device="meta")),
    TensorDescriptor(torch.empty(2, 64, 32), [2, 64, 32], [2048, 32, 1], [1, 16, 32]),
]


@pytest.mark.parametrize(("value", "specialize"), list(itertools.product(VALUES, (True, False))))
def test_arguments_are_specialized_as_triton_does(value, specialize):
    class Kernel:
        params = (Parameter(specialize),)

    expected, hint = native_specialize_impl(CUDABackend, value, False, specialize, True)
    found = signature(Kernel, (value,), {})
    assert found is not None
    assert found.types == (expected,)
    assert found.aligned == ("D" in (hint or "") if isinstance(hint, str) else False,)
    assert found.constants == ((value,) if expected == "constexpr" else (None,))


def test_what_triton_alone_can_pass_has_no_signature():
    class Kernel:
        params = (Parameter(True),)

    assert signature(Kernel, ((1, 2),), {}) is None
    assert signature(Kernel, (object(),), {}) is None


def test_constants_and_options_are_told_apart(kernel):
    found = signature(kernel, arguments(), {**META, "num_warps": 8})
    assert found.options == (("num_warps", 8),)
    assert found.constants[-2:] == (32, False)
    assert found.types[:4] == ("*fp16", "*fp16", "*fp32", "*fp32")
    assert found.types[-3] == "i32"  # a length is never compiled in
    assert len(found.runtime) == len(found.types) - found.types.count("constexpr")


def test_the_stages_alone_give_what_the_whole_compiler_gives(kernel, monkeypatch):
    special = signature(kernel, arguments(), META)
    ours = compile_kernel(kernel, special, H100)
    seen = []
    compile_ = compiler.triton.compile
    monkeypatch.setattr(compiler, "is_watched", lambda: True)
    monkeypatch.setattr(compiler.triton, "compile", lambda *a, **k: seen.append(compile_(*a, **k)) or seen[-1])
    theirs = compile_kernel(kernel, special, H100)
    assert theirs is seen[0]
    facts = theirs.metadata
    assert (ours.name, ours.warps, ours.shared) == (facts.name, facts.num_warps, facts.shared)
    assert code(ours.image) == code(theirs.asm["cubin"])


def code(image):
    """The machine code in a cubin: its disassembly."""
    tool = Path(compiler.triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def test_a_binary_has_line_numbers_where_they_are_asked_for(kernel, monkeypatch):
    special = signature(kernel, arguments(), META)
    assert b".debug_line" not in compile_kernel(kernel, special, H100).image
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "0")
    assert b".debug_line" in compile_kernel(kernel, special, H100).image


def test_kernels_of_others_keep_their_line_numbers():
    knobs = compiler.triton.knobs.compilation
    with without_lines(), ThreadPoolExecutor(1) as other:
        assert knobs.disable_line_info
        assert not other.submit(lambda: bool(knobs.disable_line_info)).result()
    assert not knobs.disable_line_info


def test_a_program_decides_on_line_numbers_for_itself(monkeypatch):
    knobs = compiler.triton.knobs.compilation
    with knobs.scope():
        knobs.disable_line_info = False
        with without_lines():
            assert not knobs.disable_line_info
    with without_lines():
        assert knobs.disable_line_info
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    assert knobs.disable_line_info


def test_a_kernel_that_takes_more_than_a_launch_passes_is_left_to_triton(kernel, monkeypatch):
    monkeypatch.setattr(compiler, "_is_plain", lambda facts, signature: False)
    assert isinstance(compile_kernel(kernel, signature(kernel, arguments(), META), H100), CompiledKernel)


def test_each_language_is_compiled_as_what_it_is(kernel, monkeypatch):
    class Seen(Exception):
        pass

    def spy(source, target, options):
        raise Seen(type(source).__name__)

    monkeypatch.setattr(compiler, "_stages", spy)
    with pytest.raises(Seen, match="^ASTSource"):
        compile_kernel(kernel, signature(kernel, arguments(), META), H100)
    gluon = ac.compile("causal", backend="gluon").engine.modules.load(Features(64, 64, form="gluon")).forward_kernel
    plain = len([p for p in gluon.params if not p.is_constexpr])
    special = signature(gluon, [2] * plain, {p.name: 128 for p in gluon.params if p.is_constexpr})
    with pytest.raises(Seen, match="^GluonASTSource"):
        compile_kernel(gluon, special, H100)


def test_a_binary_is_compiled_once_and_then_read_from_disk(kernel, tmp_path, monkeypatch):
    special = signature(kernel, arguments(), META)
    made = Binaries("digest", Cache(tmp_path)).begin(kernel, special, H100).result()
    assert isinstance(made, Binary)
    assert made.name == "delta_kernel"
    assert made.image[:4] == b"\x7fELF"
    assert made.warps == 4
    _settle(tmp_path)
    monkeypatch.setattr(binaries, "compile_kernel", None)
    assert Binaries("digest", Cache(tmp_path)).begin(kernel, special, H100).result() == made


def _settle(folder):
    """Wait for the entry, which is written behind the caller's back."""
    for _ in range(200):
        if list(folder.glob("*.json")):
            return
        time.sleep(0.05)
    raise AssertionError("no entry was written")


@pytest.mark.parametrize("change", ["source", "alignment", "target", "constant", "option", "environment", "dtype"])
def test_another_kernel_is_never_taken_for_it(kernel, tmp_path, monkeypatch, change):
    def key(digest="digest", args=None, meta=None, target=H100):
        special = signature(kernel, args or arguments(), meta or META)
        return Binaries(digest, Cache(tmp_path))._key(kernel, special, target)

    before = key()
    assert key() == before
    if change == "environment":
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    changes = {
        "source": {"digest": "another"},
        "alignment": {"args": (torch.empty(9216, dtype=torch.float16)[1:], *arguments()[1:])},
        "target": {"target": GPUTarget("cuda", 80, 32)},
        "constant": {"meta": {**META, "BLOCK_M": 64}},
        "option": {"meta": {**META, "num_warps": 8}},
        "dtype": {"args": arguments(dtype=torch.bfloat16)},
    }
    assert key(**changes.get(change, {})) != before


def test_nothing_is_read_from_disk_while_somebody_watches_the_compiler(kernel, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_KERNEL_DUMP", "1")
    assert Binaries("digest", Cache(tmp_path))._key(kernel, signature(kernel, arguments(), META), H100) is None


def test_a_corrupt_entry_is_compiled_again(kernel, tmp_path):
    special = signature(kernel, arguments(), META)
    first = Binaries("digest", Cache(tmp_path))
    made = first.begin(kernel, special, H100).result()
    _settle(tmp_path)
    (tmp_path / f"{first._key(kernel, special, H100)}.json").write_text("{")
    with pytest.warns(AttnccWarning, match="ignored"):
        again = Binaries("digest", Cache(tmp_path)).begin(kernel, special, H100).result()
    assert again.name == made.name


def test_threads_share_one_compilation(kernel, tmp_path, monkeypatch):
    special = signature(kernel, arguments(), META)
    compiled = []
    compile_kernel = binaries.compile_kernel
    monkeypatch.setattr(binaries, "compile_kernel", lambda *a: compiled.append(a) or compile_kernel(*a))
    shared = Binaries("digest", Cache(tmp_path))
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: shared.begin(kernel, special, H100).result(), range(8)))
    assert len(compiled) == 1
    assert all(binary is found[0] for binary in found)


def test_a_failure_reaches_the_caller_and_the_next_call_tries_again(kernel, tmp_path, monkeypatch):
    special = signature(kernel, arguments(), META)
    shared = Binaries("digest", Cache(tmp_path))
    compile_kernel = binaries.compile_kernel
    answers = iter([RuntimeError("ptxas is ill"), None])

    def moody(*args):
        if error := next(answers):
            raise error
        return compile_kernel(*args)

    monkeypatch.setattr(binaries, "compile_kernel", moody)
    with pytest.raises(RuntimeError, match="ptxas is ill"):
        shared.begin(kernel, special, H100).result()
    assert isinstance(shared.begin(kernel, special, H100).result(), Binary)


def test_a_folder_that_cannot_be_written_costs_one_warning(kernel, tmp_path):
    folder = tmp_path / "file"
    folder.write_text("not a folder")
    special = signature(kernel, arguments(), META)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert isinstance(Binaries("digest", Cache(folder)).begin(kernel, special, H100).result(), Binary)
        for _ in range(200):  # the entry is written behind the caller's back
            if seen:
                break
            time.sleep(0.05)
    assert ["cannot be written" in str(w.message) for w in seen] == [True]


def test_a_profiler_sees_launches_through_triton(monkeypatch):
    assert not launch.watched()
    monkeypatch.setattr(launch.triton.knobs.runtime, "launch_enter_hook", lambda metadata: None)
    assert launch.watched()


def test_a_dtype_is_a_constant(kernel):
    forward = ac.compile("causal").engine.modules.load(Features(16, 16)).forward_kernel
    constants = {p.name: 16 for p in forward.params if p.is_constexpr}
    values = [torch.empty(64, dtype=torch.float16)] * 5 + [16] * (len(forward.params) - 5 - len(constants))
    found = signature(forward, values, {**constants, "DOT": tl.float16})
    assert tl.float16 in found.constants
