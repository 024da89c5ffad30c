"""The Bayesian attention mechanism: a generalized Gaussian log-prior over distances, of each head's own, causal.

    prior = -exp(strength) (|j - i - loc| + 1e-5)^power,  loc = exp(skew) - exp(-skew)

Inputs: strength, power, skew (H,); they receive gradients. power = 1 and skew = 0 is ALiBi with slopes exp(strength).
"""

import attncc as ac


def prior(score, h, q_idx, kv_idx, q_len, kv_len, strength, power, skew):
    """The power as exp(power log x)."""
    away = ac.abs(kv_idx - (q_idx + kv_len - q_len) - (ac.exp(skew[h]) - ac.exp(-skew[h]))) + 1e-5
    return score - ac.exp(strength[h] + power[h] * ac.log(away))


bam = ac.Variant(
    name="bam",
    score=prior,
    mask=ac.causal,
    inputs=dict.fromkeys(("strength", "power", "skew"), ac.Input("h", grad=True)),
    cites="Bayesian Attention Mechanism, arXiv:2505.22842",
)
