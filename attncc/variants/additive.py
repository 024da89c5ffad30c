"""Additive attention: a layer of tanh units compares the query with the key, and v_a weighs the units.

Inputs: v_a (H, D), the weights of the units; it receives a gradient. q and k are W_a s and U_a h, made before the op.
There is no `scale`. The units are a loop over the head dimension inside the kernels: B H M N D numbers are never there.
"""

import attncc as ac

additive = ac.Variant(
    name="additive",
    similarity=lambda q_vec, k_vec, h, v_a: ac.sum_d(v_a[h] * ac.tanh(q_vec + k_vec)),
    inputs={"v_a": ac.Input("h", "d", grad=True)},
    cites="Neural Machine Translation by Jointly Learning to Align and Translate, arXiv:1409.0473",
)
