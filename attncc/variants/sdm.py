"""Sparse distributed memory: a table over the Hamming distance of q and k, over max(its sum, 1).

    weight = table[floor(bits (1 - cos(q, k)) / 2)]

Inputs: table (bits + 1,), the size of two circles' intersection by their distance. q and k are normalized before the
op, which takes scale=1.0. The distance is a step function: q and k receive zeros.
Scalar: bits, the length of addresses.
"""

import attncc as ac


def intersection(score, row, table, bits):
    """A look-up for each pair."""
    w = table[ac.floor(bits * (1 - ac.minimum(ac.maximum(score, -1), 1)) / 2)]
    return w / ac.maximum(row.sum(w), 1)


sdm = ac.Variant(
    name="sdm",
    normalizer=intersection,
    inputs={"table": ac.Input("distance"), "bits": ac.Scalar(64)},
    cites="Attention Approximates Sparse Distributed Memory, arXiv:2111.05498",
)
