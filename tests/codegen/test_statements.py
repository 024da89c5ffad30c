"""What generated statements read, and how they are said in Gluon."""

from __future__ import annotations

import pytest

from attncc.codegen.statements import free_names, in_gluon


@pytest.mark.parametrize(
    ("statements", "free"),
    [
        (["b = a + 1", "c = a * b"], ("a",)),
        (["a = a + 1"], ("a",)),
        (["total += x"], ("x", "total")),
        (["if phase == 0:", "    s = tl.where(visible, s, far)", "t = s"], ("phase", "visible", "s", "far")),
        (["for i in range(n):", "    x = x + i", "y = i"], ("n", "x")),
        (["p = _helper(tl.exp2(s), WIDE)", 'q = float("-inf")'], ("s", "WIDE")),
        (["load = tl.load(PTR + row[:, None], mask=row < n, other=0)"], ("PTR", "row", "n")),
        ([], ()),
    ],
)
def test_free_names_are_those_read_before_they_are_set(statements, free):
    assert free_names(statements) == free


def test_gluon_has_the_same_names_and_helpers_of_its_own():
    line = (
        "value = tl.load(X_PTR + _offset(q_idx, stride_x_0, WIDE)) * total.to(tl.float32) + _tanh(subtl.x, FAST_MATH)"
    )
    assert in_gluon(line) == (
        "value = gl.load(X_PTR + _gl_offset(q_idx, stride_x_0, WIDE)) * total.to(gl.float32)"
        " + _gl_tanh(subtl.x, FAST_MATH)"
    )
    assert in_gluon("@triton.jit\ndef _sign(x):") == "@gluon.jit\ndef _gl_sign(x):"
