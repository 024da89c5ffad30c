"""Slot attention: slots (the queries) compete for each key, and each takes a mean of what it won.

A softmax over the queries, with a small constant beside it so that a slot which wins nothing takes the mean of all,
and then a mean over the keys. Inference and training are one formula; q holds the slots, k and v the inputs.
"""

import attncc as ac


def competing(score, row, col):
    """The share of each key that goes to each query, over what the query gets in all."""
    p = ac.exp(score - col.max(score))
    share = p / col.sum(p) + 1e-8
    return share / row.sum(share)


slots = ac.Variant(name="slots", normalizer=competing, cites="Slot Attention, arXiv:2006.15055")
