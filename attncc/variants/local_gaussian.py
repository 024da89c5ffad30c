"""Luong's local-p: softmax within a window around a predicted place, times a Gaussian of the distance to it.

The Gaussian comes after the softmax and is not normalized: rows sum to less than 1.
Inputs: center (B, H, M), a real place among the keys for each query; it receives a gradient through the Gaussian, none
through the window's edges. Scalar: reach, the window's half; the Gaussian's deviation is half of that.
"""

import attncc as ac


def near(kv_idx, b, h, q_idx, center, reach):
    """Keys at most `reach` from the place."""
    return ac.abs(kv_idx - center[b, h, q_idx]) <= reach


def fading(weight, v_vec, row, kv_idx, b, h, q_idx, center, reach):
    """A factor of the numerator alone."""
    return row.sum(weight * ac.exp(-2 * ((kv_idx - center[b, h, q_idx]) / reach) ** 2) * v_vec)


local_gaussian = ac.Variant(
    name="local_gaussian",
    mask=near,
    reduction=fading,
    inputs={"center": ac.Input("b", "h", "q_idx", grad=True), "reach": ac.Scalar(10.0)},
    cites="Effective Approaches to Attention-based Neural Machine Translation, arXiv:1508.04025",
)
