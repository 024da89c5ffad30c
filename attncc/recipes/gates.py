"""Gaussian adaptive attention: a gate of each element by how likely it is among its row's. No queries, no keys.

A product of K Gaussians is one, with the precisions added: a softmax along one axis of a quadratic, O(size of x).

Source: Gaussian Adaptive Attention is All You Need, arXiv:2401.11143.
"""

from __future__ import annotations

from torch import Tensor


def gaussian_gate(x: Tensor, center: Tensor, width: Tensor, dim: int, eps: float = 1e-8) -> Tensor:
    """x times the softmax along `dim` of sum_k log N(standardized x; center_k, width_k). center, width (K)."""
    mean, deviation = x.mean(dim, keepdim=True), (x.var(dim, keepdim=True) + eps).sqrt()
    precision = width.pow(-2)
    middle = (center * precision).sum() / precision.sum()
    return x * (-precision.sum() / 2 * ((x - mean) / deviation - middle) ** 2).softmax(dim)
