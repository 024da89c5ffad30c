"""Location-relative attention by dynamic convolution: energies from filters over the alignment of the step before.

    energy = v . tanh(U static(a) + T dynamic(a) + b) + log prior(a),  a the last alignment

A decoder's step needs the step before it, so that this is a function of one step, O(N), and no kernel over queries.

Source: Location-Relative Attention Mechanisms For Robust Long-Form Speech Synthesis, arXiv:1910.10288.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dynamic_convolution(
    last: Tensor, dynamic: Tensor, static: Tensor, u: Tensor, t: Tensor, b: Tensor, v: Tensor, prior: Tensor
) -> Tensor:
    """(B, N), the next alignment of `last` (B, N); the context is that times the memory.

    dynamic (B, C, width), predicted from the query; static (C', 1, width); u (C', D), t (C, D), b and v (D);
    prior (taps), causal: its first tap is the place itself.
    """
    batch, channels, width = dynamic.shape
    moved = F.conv1d(last[None], dynamic.reshape(batch * channels, 1, width), padding=width // 2, groups=batch)
    own = F.conv1d(last[:, None], static, padding=static.shape[-1] // 2)
    ahead = F.conv1d(F.pad(last[:, None], (len(prior) - 1, 0)), prior.flip(0)[None, None])[:, 0]
    hidden = torch.tanh(own.mT @ u + moved.unflatten(1, (batch, channels))[0].mT @ t + b)
    return (hidden @ v + ahead.clamp_min(1e-6).log()).softmax(-1)
