"""One attention from several over different keys."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(*results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention over all keys, from the (out, lse) of attention over parts of them.

    out (B, H, M, Dv) of any float dtype, lse (B, H, M) in float32, -inf where a row sees no key. Differentiable,
    through every lse, too. A part that counts a sink may be given once.
    """
    outs, lses = zip(*results, strict=True)
    stacked = torch.stack(lses)
    top = stacked.detach().amax(0)
    top = top.where(top > -torch.inf, 0.0)
    shares = (stacked - top).exp()
    total = shares.sum(0)
    alive = total > 0
    total = total.where(alive, 1.0)
    weights = (shares / total).unsqueeze(-1)
    out = sum(w * o for w, o in zip(weights, outs, strict=True))
    return out.to(outs[0].dtype), (top + total.log()).where(alive, -torch.inf)
