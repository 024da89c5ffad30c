"""Location-based attention: a row of a learned table for each key position instead of a key. k is not read.

Inputs: table (H, N, Dqk), in which Luong's is W_a and the Synthesizer's the second layer of its MLP; it receives a
gradient. k gives the number of keys and of their heads.
"""

import attncc as ac

location = ac.Variant(
    name="location",
    similarity=lambda q_vec, h, kv_idx, table: ac.dot(q_vec, table[h, kv_idx]),
    inputs={"table": ac.Input("h", "kv_idx", "d", grad=True)},
    cites="Luong et al., arXiv:1508.04025; Synthesizer, arXiv:2005.00743",
)
