"""TaylorShift: 1 + x + x^2 / 2 of x = tau cos(q, k), over its sum: its direct and its efficient form, by length.

Inputs: tau (H,), the temperature of each head; it receives a gradient. Published outputs are times sqrt(N / Dqk).
"""

import attncc as ac
from attncc.variants.cosine import cosine_similarity

taylorshift = ac.Variant(
    name="taylorshift",
    similarity=cosine_similarity,
    normalizer="taylor",
    inputs={"tau": ac.Input("h", grad=True)},
    cites="TaylorShift, arXiv:2403.02920",
)
