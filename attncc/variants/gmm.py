"""Mixture-of-Gaussians attention over key positions j, not normalized.

    weight = sum_k w_k / Z_k exp(-(j - mu_k)^2 / (2 sigma_k^2))

Inputs: w, mu, sigma (B, M, 5), each query's mixture; they receive gradients. Z is sqrt(2 pi) sigma, version 2 of the
reference; mu is a running sum that the caller takes. q and k are not read.
"""

import math

import attncc as ac

_MIXTURE = ac.Input("b", "q_idx", "component", grad=True)


def mixture(b, q_idx, kv_idx, w, mu, sigma):
    """The density of the mixture at a key's position."""
    parts = ((w[b, q_idx, k], mu[b, q_idx, k], sigma[b, q_idx, k]) for k in range(5))
    return sum(a / (math.sqrt(2 * math.pi) * s) * ac.exp(-((kv_idx - m) ** 2) / (2 * s**2)) for a, m, s in parts)


gmm = ac.Variant(
    name="gmm",
    similarity=mixture,
    normalizer=lambda score: score,
    inputs={"w": _MIXTURE, "mu": _MIXTURE, "sigma": _MIXTURE},
    cites="Graves, arXiv:1308.0850; Location-Relative Attention, arXiv:1910.10288",
)
