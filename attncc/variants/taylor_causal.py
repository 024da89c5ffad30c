"""The second-order Taylor polynomial of exp over its sum, causal: what an approximate softmax keeps."""

import attncc as ac

taylor_causal = ac.Variant(
    name="taylor_causal",
    mask=ac.causal,
    normalizer="taylor",
    cites="Deconstructing Attention, arXiv:2510.11602",
)
