"""L2 attention: the negative squared distance of q and k, a Gaussian kernel before the softmax. Causal.

It is 2 q.k - |q|^2 - |k|^2, one matmul and a term a row and a column. `scale` is 1/sqrt(Dqk) as it is for the dot.
"""

import attncc as ac

squared_distance = ac.Variant(
    name="squared_distance",
    similarity=lambda q_vec, k_vec, scale: -scale * ac.sum_d((q_vec - k_vec) ** 2),
    mask=ac.causal,
    cites="The Lipschitz Constant of Self-Attention, arXiv:2006.04710; Transformer Dissection, arXiv:1908.11775",
)
