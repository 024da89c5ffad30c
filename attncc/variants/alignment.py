"""A diagonal of cross attention: each query sees its own few keys, one (VOCASET) or two (BIWI) in FaceFormer.

Scalar: keys, how many a query has.
"""

import attncc as ac

alignment = ac.Variant(
    name="alignment",
    mask=lambda q_idx, kv_idx, keys: kv_idx // keys == q_idx,
    inputs={"keys": ac.Scalar(2)},
    cites="FaceFormer, arXiv:2112.05329",
)
