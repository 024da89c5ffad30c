"""Gated linear attention with one gate a token and head, as Mamba-2's state-space duality has it; causal.

Inputs: g (B, H, N), the log of what each token leaves of the state, such as logsigmoid(...) or dt * A; it receives a
gradient. In linear time: a LinearOp, with a state in and out.
"""

import attncc as ac

simple_gla = ac.Variant(
    name="simple_gla",
    score=ac.gate("g"),
    mask=ac.causal,
    normalizer=ac.identity,
    cites="Transformers are SSMs, arXiv:2405.21060",
)
