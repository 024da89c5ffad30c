"""elu(s) + 1 over its sum, causal: a positive weight that grows like s and decays like exp(s)."""

import attncc as ac


def elu_plus_one(score, row):
    """exp(s) below 0, 1 + s above."""
    p = ac.exp(ac.minimum(score, 0)) + ac.relu(score)
    return p / (row.sum(p) + 1e-8)


elu1 = ac.Variant(
    name="elu1",
    mask=ac.causal,
    normalizer=elu_plus_one,
    cites="When Attention Sink Emerges in Language Models, arXiv:2410.10781",
)
