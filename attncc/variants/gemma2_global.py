"""Gemma 2's global layers: softcap 50, causal.

The model scales by query_pre_attn_scalar ** -0.5 in place of 1/sqrt(Dqk): pass scale=256**-0.5 for 2B and 9B,
scale=144**-0.5 for 27B.
"""

import attncc as ac

gemma2_global = ac.Variant(
    name="gemma2_global",
    score=ac.softcap("cap"),
    mask=ac.causal,
    inputs={"cap": ac.Scalar(50.0)},
    cites="Gemma 2, arXiv:2408.00118",
)
