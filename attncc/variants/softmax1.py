"""Softmax with a 1 in the denominator, "off by one": a row may attend to nothing. Causal."""

import attncc as ac

softmax1 = ac.Variant(
    name="softmax1",
    mask=ac.causal,
    normalizer=ac.softmax1,
    cites="Evan Miller, Attention Is Off By One, 2023",
)
