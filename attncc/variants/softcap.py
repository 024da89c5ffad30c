"""Scores capped softly to (-cap, cap) by tanh, causal. Gemma 2 caps at 50, Grok-1 at 30."""

import attncc as ac

softcap = ac.Variant(
    name="softcap",
    score=ac.softcap("cap"),
    mask=ac.causal,
    inputs={"cap": ac.Scalar(50.0)},
    cites="Gemma 2, arXiv:2408.00118",
)
