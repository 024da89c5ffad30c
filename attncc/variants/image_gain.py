"""A learned factor on the scores of image tokens, of each head, causal (dynamic attention reallocation).

Inputs: image (B, N) integers, 1 for tokens of images; gain (H,), which receives a gradient.
"""

import attncc as ac

image_gain = ac.Variant(
    name="image_gain",
    score=lambda score, b, h, kv_idx, gain, image: score * ac.where(image[b, kv_idx] == 1, gain[h], 1),
    mask=ac.causal,
    inputs={"gain": ac.Input("h", grad=True), "image": ac.Input("b", "kv_idx", dtype="int")},
    cites="True Multimodal In-Context Learning Needs Attention to the Visual Context, arXiv:2507.15807",
)
