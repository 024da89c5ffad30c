"""Trilinear attention: w . [q; k; q*k], as bidirectional attention flow compares a context with a question.

Inputs: w_q, w_k, w_qk (H, Dqk), the three parts of w; they receive gradients.
"""

import attncc as ac

_VECTOR = ac.Input("h", "d", grad=True)

trilinear = ac.Variant(
    name="trilinear",
    similarity=lambda q_vec, k_vec, h, w_q, w_k, w_qk: (
        ac.dot(w_q[h], q_vec) + ac.dot(w_k[h], k_vec) + ac.dot(w_qk[h] * q_vec, k_vec)
    ),
    inputs={"w_q": _VECTOR, "w_k": _VECTOR, "w_qk": _VECTOR},
    cites="Bidirectional Attention Flow, arXiv:1611.01603",
)
