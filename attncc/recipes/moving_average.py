"""Mega's multi-dimensional damped moving average: what stands before its attention. A convolution, no attention.

Source: Mega, arXiv:2209.10655. Its gated attention is the variant `mega`, or `relu2` with its bias.
"""

from __future__ import annotations

import torch
from torch import Tensor


def moving_average(x: Tensor, p: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    """(B, N, C): y_t = sum_n gamma_n h_n,t / sqrt(n) with h_t = (1 - p alpha) h_(t-1) + p beta x_t in n dimensions.

    x (B, N, C); p, alpha in (0, 1), beta and gamma (C, n). By a transform of twice the length, O(N log N); the
    residual omega x and the activation are the block's.
    """
    length = x.shape[1]
    log_kept = torch.log1p(-(p * alpha).float())
    steps = torch.arange(length, device=x.device, dtype=torch.float32)[:, None, None]
    kernel = ((p * beta * gamma).float() * (steps * log_kept).exp()).sum(-1) * p.shape[-1] ** -0.5
    transformed = torch.fft.rfft(x.float(), 2 * length, 1) * torch.fft.rfft(kernel, 2 * length, 0)
    return torch.fft.irfft(transformed, 2 * length, 1)[:, :length].to(x.dtype)
