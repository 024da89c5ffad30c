"""Adaptive filter attention, the isotropic and robust form: the likelihood of a key under a linear stochastic model.

Inputs, each (H,) with a gradient: rate > 0, of decay (-mu in the paper); sigma2, eta2, gamma2, the variances of
process, key and query; nu and tau, the tails' weight and the temperature. Rotate q, k, v by -t before the op and its
output by t behind it, as RoPE does; a head dimension of Dqk has Dqk/2 complex channels, which `scale`, 1/sqrt(Dqk),
counts.

    E = exp(-rate dt)                 V = sigma2 (1 - E^2) / (2 rate) + eta2 E^2 + gamma2
    R^2 = |q|^2 + E^2 |k|^2 - 2 E q.k
    score = tau^2 (-log V - log(1 + R^2 / (nu V Dqk/2)))               out = sum softmax(score) E v
"""

import attncc as ac


def log_likelihood(q_vec, k_vec, scale, h, q_idx, kv_idx, q_len, kv_len, rate, sigma2, eta2, gamma2, nu, tau):
    e = ac.exp(-rate[h] * ac.abs(q_idx + kv_len - q_len - kv_idx))
    residual = ac.sum_d(q_vec**2) + e**2 * ac.sum_d(k_vec**2) - 2 * e * ac.dot(q_vec, k_vec)
    variance = sigma2[h] * (1 - e**2) / (2 * rate[h]) + eta2[h] * e**2 + gamma2[h]
    return tau[h] ** 2 * (-ac.log(variance) - ac.log(1 + residual * 2 * scale**2 / (nu[h] * variance)))


def decayed(weight, v_vec, row, h, q_idx, kv_idx, q_len, kv_len, rate):
    return row.sum(weight * ac.exp(-rate[h] * ac.abs(q_idx + kv_len - q_len - kv_idx)) * v_vec)


afa = ac.Variant(
    name="afa",
    similarity=log_likelihood,
    mask=ac.causal,
    reduction=decayed,
    inputs=dict.fromkeys(("rate", "sigma2", "eta2", "gamma2", "nu", "tau"), ac.Input("h", grad=True)),
    cites="Attention as an Adaptive Filter, arXiv:2509.04154",
)
