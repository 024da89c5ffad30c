"""Forgetting attention, causal: a gate of each token takes from the scores of all keys before it (FoX).

Inputs: f (B, H, N), the log of each token's gate, logsigmoid(w . x + b); it receives a gradient. Gates of 1 are causal
attention, and equal gates are ALiBi.
"""

import attncc as ac


def fading(score, b, h, q_idx, kv_idx, q_len, kv_len, f):
    """The gates of the tokens behind the key, up to the query's own."""
    return score + ac.cumsum(f[b, h, q_idx + kv_len - q_len]) - ac.cumsum(f[b, h, kv_idx])


forgetting = ac.Variant(
    name="forgetting",
    score=fading,
    mask=ac.causal,
    inputs={"f": ac.Input("b", "h", "kv_idx", grad=True)},
    cites="Forgetting Transformer, arXiv:2503.02130",
)
