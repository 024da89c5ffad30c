"""ReLU attention: max(score, 0) / N, every pair visible, as in vision transformers."""

import attncc as ac

relu = ac.Variant(
    name="relu",
    normalizer="relu",
    cites="Replacing softmax with ReLU in Vision Transformers, arXiv:2309.08586",
)
