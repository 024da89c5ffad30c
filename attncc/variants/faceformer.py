"""A periodic ALiBi, causal: slope times the number of whole periods between query and key.

Inputs: slopes (H,), ALiBi's if they are not given; they receive a gradient. Scalar: period, the frames of a second.
"""

import attncc as ac
from attncc.language.mods import default_slopes


def periodic(score, h, q_idx, kv_idx, q_len, kv_len, slopes, period):
    """Distances within a period are one."""
    return score - slopes[h] * ((q_idx + kv_len - q_len - kv_idx) // period)


faceformer = ac.Variant(
    name="faceformer",
    score=periodic,
    mask=ac.causal,
    inputs={"slopes": ac.Input("h", grad=True, default=default_slopes), "period": ac.Scalar(30)},
    cites="FaceFormer, arXiv:2112.05329",
)
