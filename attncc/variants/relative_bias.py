"""A learned bias for each distance, of each head, ahead and behind.

Inputs: table (H, M + N - 1), indexed by kv_idx - q_idx + M - 1; it receives a gradient.
"""

import attncc as ac

relative_bias = ac.Variant(
    name="relative_bias",
    score=lambda score, h, q_idx, kv_idx, q_len, table: score + table[h, kv_idx - q_idx + q_len - 1],
    inputs={"table": ac.Input("h", "distance", grad=True)},
    cites="AnomalyBERT, arXiv:2305.04468",
)
