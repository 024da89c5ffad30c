"""Gemma 2's local layers: softcap 50, causal, the last 4096 tokens, the query's own counted.

The model scales by query_pre_attn_scalar ** -0.5 in place of 1/sqrt(Dqk): pass scale=256**-0.5 for 2B and 9B,
scale=144**-0.5 for 27B.
"""

import attncc as ac

gemma2_local = ac.Variant(
    name="gemma2_local",
    score=ac.softcap("cap"),
    mask=ac.causal & ac.sliding_window("window"),
    inputs={"cap": ac.Scalar(50.0), "window": ac.Scalar(4096)},
    cites="Gemma 2, arXiv:2408.00118",
)
