"""The delta rule: a token takes away what its key finds in the state, and writes its value there; causal.

Inputs: beta (B, H, N), how much of it, between 0 and 1 (2 with negative eigenvalues); it receives a gradient. Keys have
length 1, so that beta = 1 replaces what was there. A RecurrenceOp, with a state in and out.
"""

from typing import Any

import attncc as ac


def update(state: Any, k_vec: Any, v_vec: Any, b: Any, h: Any, kv_idx: Any, beta: Any) -> Any:
    """The value is written less what the key found."""
    return state + beta[b, h, kv_idx] * k_vec * (v_vec - ac.dot(k_vec, state))


delta_net = ac.Variant(
    name="delta_net",
    recurrence=ac.recurrence(update),
    inputs={"beta": ac.Input("b", "h", "kv_idx", grad=True)},
    cites="Parallelizing Linear Transformers with the Delta Rule over Sequence Length, arXiv:2406.06484",
)
