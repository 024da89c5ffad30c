"""Scaled cosine attention: the cosine of q and k over a learned temperature of each head.

Inputs: tau (H,), the factor 1/temperature; it receives a gradient. Swin V2 learns its logarithm and keeps it below 100.
A vector of zeros has the cosine 0.
"""

import attncc as ac


def cosine_similarity(q_vec, k_vec, h, tau):
    """tau q.k / (|q| |k|)."""
    lengths = ac.maximum(ac.sum_d(q_vec**2), 1e-24) * ac.maximum(ac.sum_d(k_vec**2), 1e-24)
    return tau[h] * ac.dot(q_vec, k_vec) / ac.sqrt(lengths)


cosine = ac.Variant(
    name="cosine",
    similarity=cosine_similarity,
    inputs={"tau": ac.Input("h", grad=True)},
    cites="Swin Transformer V2, arXiv:2111.09883",
)
