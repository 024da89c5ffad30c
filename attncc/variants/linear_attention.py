"""Linear attention: elu(x) + 1 of q and k as features, over the sum of the weights, causal.

In linear time: `attncc.compile` gives a LinearOp, with a state in and out. Features and sums are at least 0.
"""

import attncc as ac


def elu1(x):
    """elu(x) + 1, always positive."""
    return ac.relu(x) + ac.exp(ac.minimum(0, x))


linear_attention = ac.Variant(
    name="linear_attention",
    similarity=lambda q_vec, k_vec: ac.dot(elu1(q_vec), elu1(k_vec)),
    mask=ac.causal,
    normalizer=ac.by_sum,
    cites="Transformers are RNNs, arXiv:2006.16236",
)
