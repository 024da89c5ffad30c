"""LightNet's additive decay: each channel of the state is a softmax of k over the tokens so far. One gated kernel.

    state_t = sum_j exp(k_j) v_j' / sum_j exp(k_j)  by channel of k
            = exp(z_(t-1) - z_t) state_(t-1) + exp(k_t - z_t) v_t'        z = log-cumulative-sum-exp of k

Source: You Only Scan Once, arXiv:2405.21022.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from attncc.errors import InputError
from attncc.recipes.ops import linear, of_features
from attncc.runtime.linear_cut import sequence_lengths

#: (B, H, D, Dv) and the log of each channel's sum so far, (B, H, D), both float32; B: sequences, where they are packed
State = tuple[Tensor, Tensor]


def lightnet(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, State]:
    """out (B, H, N, Dv), or (out, state). q behind its activation, k as logits; without `causal` every key is seen.

    cu_seqlens: packed causal sequences in a batch of 1, each with a state of its own. z and the gates are float32
    tensors as large as k, made in PyTorch; the rest is the kernels of `gla`.
    """
    if not causal and cu_seqlens is not None:
        raise InputError("packed sequences are causal", remedy="call each on its own")
    if not causal:
        whole: Tensor = of_features(False, False)(q, k.float().softmax(2).to(k.dtype), v, scale=1.0)
        return whole
    logits = k.float()
    z, behind, last = _sums(logits, None if initial_state is None else initial_state[1], cu_seqlens)
    # nothing lies before the first token: what it leaves of it has no say
    gates = torch.where(behind == -torch.inf, 0.0, behind - z)
    state = None if initial_state is None else initial_state[0]
    found = linear("gla")(
        *(q, (logits - z).exp().to(k.dtype), v),
        g=gates,
        scale=1.0,
        initial_state=state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )
    return (found[0], (found[1], last)) if output_final_state else found


def _sums(logits: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The log of each channel's sum up to every token, (B, H, N, D), the same without the token itself, and behind the
    last token of each sequence, (B, H, D)."""
    ends = None if cu_seqlens is None else sequence_lengths(cu_seqlens, logits.shape[0], logits.shape[2])
    parts = [logits] if ends is None else [logits[:, :, lo:hi] for lo, hi in pairwise(ends)]
    if initial is None:
        initial = logits.new_full((len(parts) * logits.shape[0], logits.shape[1], logits.shape[3]), -torch.inf)
    firsts = initial.unsqueeze(2).split(logits.shape[0])
    sums = [torch.cat([first, part], 2).logcumsumexp(2) for first, part in zip(firsts, parts, strict=True)]
    upto, before = (torch.cat([x[:, :, cut] for x in sums], 2) for cut in (slice(1, None), slice(-1)))
    return upto, before, torch.cat([x[:, :, -1] for x in sums])
