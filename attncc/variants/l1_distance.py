"""Laplace attention: the negative sum of absolute differences of q and k, a Laplace kernel before the softmax.

Attentive Neural Processes have it for regression. `scale` is 1/sqrt(Dqk) as it is for the dot; pass 1 for theirs.
"""

import attncc as ac

l1_distance = ac.Variant(
    name="l1_distance",
    similarity=lambda q_vec, k_vec, scale: -scale * ac.sum_d(ac.abs(q_vec - k_vec)),
    cites="Attentive Neural Processes, arXiv:1901.05761",
)
