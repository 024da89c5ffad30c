"""LightNet's additive decay: each channel of the state is a softmax of k over the tokens so far. One gated kernel.

    state_t = sum_j exp(k_j) v_j' / sum_j exp(k_j)  by channel of k
            = exp(z_(t-1) - z_t) state_(t-1) + exp(k_t - z_t) v_t'        z = log-cumulative-sum-exp of k

Source: You Only Scan Once, arXiv:2405.21022.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attncc.recipes.ops import linear, of_features

#: (B, H, D, Dv) and the log of each channel's sum so far, (B, H, D), both float32
State = tuple[Tensor, Tensor]


def lightnet(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    initial_state: State | None = None,
    output_final_state: bool = False,
) -> Tensor | tuple[Tensor, State]:
    """out (B, H, N, Dv), or (out, state). q behind its activation, k as logits; without `causal` every key is seen.

    z and the gates are float32 tensors as large as k, made in PyTorch; the rest is the kernels of `gla`.
    """
    if not causal:
        whole: Tensor = of_features(False, False)(q, k.float().softmax(2).to(k.dtype), v, scale=1.0)
        return whole
    logits = k.float()
    z = logits.logcumsumexp(2)
    before = z.new_full((*z.shape[:2], 1, z.shape[3]), -torch.inf)
    if initial_state is not None:
        before = initial_state[1].unsqueeze(2)
        z = torch.logaddexp(z, before)
    behind = torch.cat([before, z[:, :, :-1]], 2)
    # nothing lies before the first token: what it leaves of it has no say
    gates = torch.where(behind == -torch.inf, 0.0, behind - z)
    state = None if initial_state is None else initial_state[0]
    found = linear("gla")(
        *(q, (logits - z).exp().to(k.dtype), v),
        g=gates,
        scale=1.0,
        initial_state=state,
        output_final_state=output_final_state,
    )
    return (found[0], (found[1], z[:, :, -1])) if output_final_state else found
