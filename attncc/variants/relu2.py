"""Squared ReLU attention: max(score, 0)^2 / N, every pair visible."""

import attncc as ac

relu2 = ac.Variant(
    name="relu2",
    normalizer="relu2",
    cites="Replacing softmax with ReLU in Vision Transformers, arXiv:2309.08586",
)
