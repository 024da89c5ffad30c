"""Sigmoid attention without a bias and without a denominator, causal: no attention sinks appear in training.

The mask comes after the sigmoid: what is hidden has weight 0, not sigmoid(0).
"""

import attncc as ac

unnormalized_sigmoid = ac.Variant(
    name="unnormalized_sigmoid",
    mask=ac.causal,
    normalizer=lambda score: ac.sigmoid(score),
    cites="When Attention Sink Emerges in Language Models, arXiv:2410.10781",
)
