"""Top-theta: softmax over the keys whose score passes a calibrated threshold of the head; short rows are dense. Causal.

Inputs: theta (H,), the thresholds on scores. Scalar: dense_keys, the row length up to which every key is kept.
A longer row in which no score passes gives 0.
"""

import attncc as ac


def over_threshold(score, row, h, q_idx, q_len, kv_len, theta, dense_keys):
    """exp(s) where s > theta, over its sum."""
    keep = (score > theta[h]) | (q_idx + kv_len - q_len < dense_keys)
    p = ac.where(keep, ac.exp(score - row.max(score)), 0)
    total = row.sum(p)
    return p / ac.where(total > 0, total, 1)


top_theta = ac.Variant(
    name="top_theta",
    mask=ac.causal,
    normalizer=over_threshold,
    inputs={"theta": ac.Input("h"), "dense_keys": ac.Scalar(64)},
    cites="Top-Theta Attention, arXiv:2502.08363",
)
