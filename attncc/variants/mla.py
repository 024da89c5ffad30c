"""Latent attention in its absorbed form, causal: the value of a key is its first 512 elements (MLA, DeepSeek-V2).

q (B, H, M, 576) and k (B, 1, N, 576), a latent of 512 beside a rotary key of 64; a call has no v; out is (B, H, M, 512)
The scale is that of the heads before absorption: op(q, k, scale=192**-0.5), times mscale**2 where YaRN is on. The
gradient of k has both parts. For training and prefill the form with 192 and 128 elements a head is cheaper: `causal`.
"""

import attncc as ac

mla = ac.Variant(name="mla", mask=ac.causal, value="k[:512]", cites="DeepSeek-V2, arXiv:2405.04434")
