"""KERPLE's logarithmic kernel, causal: a bias of -r1 log(1 + r2 distance), which carries beyond lengths of training.

Inputs: r1 and r2 (H,), both above 0; they receive gradients. Its power kernel is bam's prior without a skew.
"""

import attncc as ac


def logarithmic(score, h, q_idx, kv_idx, q_len, kv_len, r1, r2):
    """A conditionally positive definite kernel of two positions."""
    return score - r1[h] * ac.log(1 + r2[h] * ac.abs(q_idx + kv_len - q_len - kv_idx))


kerple = ac.Variant(
    name="kerple",
    score=logarithmic,
    mask=ac.causal,
    inputs=dict.fromkeys(("r1", "r2"), ac.Input("h", grad=True)),
    cites="KERPLE, arXiv:2205.09921",
)
