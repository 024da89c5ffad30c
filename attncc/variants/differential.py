"""The difference of two attention maps over one V, causal (DIFF Transformer).

q (B, H, M, 2 * d) and k (B, Hkv, N, 2 * d) hold the two maps side by side, v (B, Hkv, N, Dv) is shared. The scale is
1/sqrt(d). A projection's (B, L, H, 2, d) is q.flatten(3).transpose(1, 2), with no copy. Where both maps share keys
(DIFF V2), k is (B, Hkv, N, d).

Inputs: lam (H,), the factor of the second map; it receives a gradient. Published:

    lam      = exp(dot(lam_q1, lam_k1)) - exp(dot(lam_q2, lam_k2)) + lam_init
    lam_init = 0.8 - 0.6 * exp(-0.3 * layer), with layers counted from 0
    result   = rms_norm(out, eps=1e-5) * gamma * (1 - lam_init), each head for itself

Shared DIFF projects q and k by a common matrix plus one of low rank for each map; the op is this one.
"""

import attncc as ac


def difference(weight, lam, h, row, v_vec):
    """The first map less lam times the second."""
    return row.sum((weight[0] - lam[h] * weight[1]) * v_vec)


differential = ac.Variant(
    name="differential",
    branches=2,
    mask=ac.causal,
    reduction=difference,
    inputs={"lam": ac.Input("h", grad=True)},
    cites="Differential Transformer, arXiv:2410.05258; Shared DIFF Transformer, arXiv:2501.17900",
)
