"""Lightning attention: no scale, no denominator, and ALiBi's slopes as rates of decay; causal.

Inputs: rates (H,), minus ALiBi's slopes by default; a layer multiplies them by 1 - layer / (layers - 1) + 1e-5. q, k, v
pass SiLU before the op, the norm comes behind it. In linear time: a LinearOp, with a state in and out.
"""

import attncc as ac


def slopes(sizes: dict[str, int]) -> list[float]:
    """Minus ALiBi's slopes."""
    return [-s for s in ac.alibi_slopes(sizes["h"])]


lightning = ac.Variant(
    name="lightning",
    similarity=lambda q_vec, k_vec: ac.dot(q_vec, k_vec),
    score=ac.decay("rates", default=slopes),
    mask=ac.causal,
    normalizer=ac.identity,
    cites="Lightning Attention-2, arXiv:2401.04658",
)
