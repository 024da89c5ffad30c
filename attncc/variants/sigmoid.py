"""Sigmoid attention: sigmoid(score - log N), with no denominator; causal. N is the number of keys, for every row."""

import attncc as ac

sigmoid = ac.Variant(
    name="sigmoid",
    mask=ac.causal,
    normalizer="sigmoid",
    cites="Theory, Analysis, and Best Practices for Sigmoid Self-Attention, arXiv:2409.04431",
)
