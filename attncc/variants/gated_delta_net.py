"""The gated delta rule: the state decays, then a token's key finds its value there and replaces it; causal.

Inputs: beta (B, H, N), how much is replaced, between 0 and 1; g (B, H, N), the log of what each token leaves of the
state, such as -exp(A_log) * softplus(a + dt_bias); both receive gradients. Keys have length 1. A RecurrenceOp, with a
state in and out.
"""

from typing import Any

import attncc as ac


def update(state: Any, k_vec: Any, v_vec: Any, b: Any, h: Any, kv_idx: Any, beta: Any, g: Any) -> Any:
    """The value is written less what the key finds of what is kept."""
    kept = ac.exp(g[b, h, kv_idx]) * state
    return kept + beta[b, h, kv_idx] * k_vec * (v_vec - ac.dot(k_vec, kept))


gated_delta_net = ac.Variant(
    name="gated_delta_net",
    recurrence=ac.recurrence(update),
    inputs={"beta": ac.Input("b", "h", "kv_idx", grad=True), "g": ac.Input("b", "h", "kv_idx", grad=True)},
    cites="Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv:2412.06464",
)
