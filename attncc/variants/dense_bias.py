"""A bias for every pair, added to the score: AlphaFold's pair bias, Swin's relative bias, and any other.

Inputs: bias (B, H, M, N), with size 1 in each dimension in which it is the same; it receives a gradient, summed over
those dimensions.
"""

import attncc as ac

dense_bias = ac.Variant(
    name="dense_bias",
    score=ac.bias("bias"),
    cites="AlphaFold 2, doi:10.1038/s41586-021-03819-2; Swin Transformer, arXiv:2103.14030",
)
