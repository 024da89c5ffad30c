"""The interpreter leaves `triton.language` as it was, also where a kernel fails, and beside other threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import attncc as ac
from attncc.runtime import interpreter

OWNERS = (tl, tl.core, tl.standard, tl.math, tl.core.tensor, tl.core.tensor_descriptor_base)


def language():
    """Everything that a kernel may look up; names that are only ever added to a module are not part of it."""
    return {(owner.__name__, name): value for owner in OWNERS for name, value in vars(owner).items()}


def unchanged(before):
    """The entries that are not what they were, and a class's new ones."""
    after = language()
    classes = {owner.__name__ for owner in OWNERS if isinstance(owner, type)}
    changed = {key for key, value in before.items() if after.get(key) is not value}
    return changed | {key for key in after.keys() - before.keys() if key[0] in classes}


def call(name="causal", **options):
    q, k, v = (torch.randn(1, 1, 5, 16) for _ in range(3))
    return ac.compile(name)(q, k, v, **options)


def test_an_interpreted_run_leaves_the_language_alone():
    before, patch, errors = language(), triton.runtime.interpreter._patch_lang_tensor, np.geterr()
    call()
    assert unchanged(before) == set()
    assert triton.runtime.interpreter._patch_lang_tensor is patch
    assert np.geterr() == errors
    assert not triton.knobs.runtime.interpret


def test_the_language_is_another_one_while_it_runs():
    before = language()
    with interpreter.interpreting():
        assert isinstance(tl.standard.cdiv, InterpretedFunction)
    assert isinstance(tl.standard.cdiv, JITFunction)
    assert unchanged(before) == set()


def test_a_failing_kernel_restores_it():
    with interpreter.decorating():
        kernel = triton.jit(failing)
    before, patch = language(), triton.runtime.interpreter._patch_lang_tensor
    with pytest.raises(triton.runtime.errors.InterpreterError), interpreter.interpreting():
        kernel[(1,)](torch.zeros(4), BLOCK=4)
    assert unchanged(before) == set()
    assert triton.runtime.interpreter._patch_lang_tensor is patch
    call()


def failing(x, BLOCK: tl.constexpr):
    values = tl.load(x + tl.arange(0, BLOCK))
    tl.store(x + tl.arange(0, BLOCK), values.no_such_attribute)


def test_an_exception_while_decorating_restores_the_choice():
    with interpreter.decorating():
        assert triton.knobs.runtime.interpret
    with pytest.raises(ZeroDivisionError), interpreter.decorating():
        1 / 0
    assert not triton.knobs.runtime.interpret
    assert isinstance(triton.jit(failing), JITFunction)


def test_nothing_compiles_while_a_thread_interprets():
    order = []

    def compiles():
        with interpreter.compiling():
            order.append("compiled")

    thread = threading.Thread(target=compiles)
    with interpreter.interpreting():
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        order.append("interpreted")
    thread.join(10)
    assert order == ["interpreted", "compiled"]


def test_many_threads_compile_at_once():
    inside = threading.Barrier(3, timeout=10)

    def compiles():
        with interpreter.compiling():
            inside.wait()

    threads = [threading.Thread(target=compiles) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not inside.broken


def test_an_interpreted_kernel_may_call_another():
    with interpreter.interpreting(), interpreter.interpreting():
        assert isinstance(tl.standard.cdiv, InterpretedFunction)
    assert isinstance(tl.standard.cdiv, JITFunction)
