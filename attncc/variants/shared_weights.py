"""The softmax weights of another layer, from its q, k and lse, meet this layer's v. Causal.

Inputs: total (B, H, M), the lse of the layer whose weights are shared, as `op(q, k, v, outputs=("out", "lse"))` gives
it there. It receives a gradient, which that lse passes on to q and k.
"""

import attncc as ac


def given(score, b, h, q_idx, total):
    """exp(s) over a denominator that is known."""
    return ac.exp(score - total[b, h, q_idx])


shared_weights = ac.Variant(
    name="shared_weights",
    mask=ac.causal,
    normalizer=given,
    inputs={"total": ac.Input("b", "h", "q_idx", grad=True)},
    cites="Shared Attention, arXiv:2407.12866; Skim-Attention, arXiv:2109.01078",
)
