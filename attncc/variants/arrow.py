"""An arrowhead: candidates see the context and themselves, the context sees everything (Uni-Encoder).

Inputs: segment (B, N) integers, 0 for the context and one number for each candidate. Positions of candidates restart
behind the context, before the op.
"""

import attncc as ac


def arrowhead(segment, b, q_idx, kv_idx, q_len, kv_len):
    """The first row of blocks, the first column, and the diagonal."""
    own, other = segment[b, q_idx + kv_len - q_len], segment[b, kv_idx]
    return (own == other) | (own == 0) | (other == 0)


arrow = ac.Variant(
    name="arrow",
    mask=arrowhead,
    inputs={"segment": ac.Input("b", "kv_idx", dtype="int")},
    cites="Uni-Encoder, arXiv:2106.01263",
)
