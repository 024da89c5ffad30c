"""Variants as plain PyTorch under torch.compile, as far as nobody has a kernel for them: an M x N tensor a head."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.case import Shape
from bench.peers import Attend

Weights = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def cog(score: torch.Tensor, visible: torch.Tensor, keys: int) -> torch.Tensor:
    """Softmax of the magnitudes, with the signs of the scores."""
    return torch.sign(score) * torch.softmax(torch.where(visible, score.abs(), float("-inf")), -1)


def taylor(score: torch.Tensor, visible: torch.Tensor, keys: int) -> torch.Tensor:
    """1 + s + s**2 / 2 in the place of exp(s)."""
    p = torch.where(visible, 1 + score + score.square() / 2, 0)
    return p / p.sum(-1, keepdim=True)


def relu2(score: torch.Tensor, visible: torch.Tensor, keys: int) -> torch.Tensor:
    """The square of what is positive, over the number of keys."""
    return torch.where(visible, torch.relu(score).square() / keys, 0)


def entmax15(score: torch.Tensor, visible: torch.Tensor, keys: int) -> torch.Tensor:
    """Entmax of 1.5, exactly: sorting says which keys are in the support, and from these alone come the threshold and
    its gradient (Peters et al., arXiv:1905.05702, algorithm 2)."""
    x = torch.where(visible, score / 2, float("-inf"))
    x = x - x.amax(-1, keepdim=True).detach()
    with torch.no_grad():
        ordered = x.sort(-1, descending=True).values.clamp_min(-2)  # further down there is no weight
        count = torch.arange(1, keys + 1, device=x.device, dtype=x.dtype)
        mean, square = ordered.cumsum(-1) / count, ordered.square().cumsum(-1) / count
        spread = count * (square - mean.square())
        bound = mean - ((1 - spread) / count).clamp_min(0).sqrt()
        size = (bound <= ordered).sum(-1, keepdim=True)
        support = x > bound.gather(-1, size - 1)
    count = support.sum(-1, keepdim=True)
    inside = torch.where(support, x, 0)
    mean, square = inside.sum(-1, keepdim=True) / count, inside.square().sum(-1, keepdim=True) / count
    threshold = mean - ((1 - count * (square - mean.square())) / count).clamp_min(0).sqrt()
    return torch.where(support, x - threshold, 0).square()


WEIGHTS: dict[str, Weights] = {"cog": cog, "taylor": taylor, "relu2": relu2, "entmax15": entmax15}
#: of these, those that see all keys
FULL = ("taylor", "relu2")


def attend(name: str, shape: Shape, device: str = "cuda") -> Attend:
    """A shipped variant in plain PyTorch; scores are those of a matmul in the operands' dtype, all else is float32."""
    visible = torch.ones(shape.m, shape.n, dtype=torch.bool, device=device)
    if name not in FULL:
        visible = visible.tril(shape.n - shape.m)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        score = (q @ k.transpose(-1, -2)).float() * shape.d**-0.5
        return WEIGHTS[name](score, visible, shape.n).to(q.dtype) @ v

    return run


def compiled(name: str, shape: Shape) -> Attend:
    """The same under torch.compile."""
    run: Attend = torch.compile(attend(name, shape), dynamic=False)
    return run


def latent(shape: Shape) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """One query beside keys whose first part is the value, one head of them: two matmuls, and the softmax between."""

    def run(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        rows, keys = q.transpose(1, 2).flatten(1, 2), k[:, 0]
        score = (rows @ keys.transpose(-1, -2)).float() * shape.d**-0.5
        out = score.softmax(-1).to(q.dtype) @ keys[..., : shape.dv]
        return out.unflatten(1, (shape.m, shape.h)).transpose(1, 2)

    compiled: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.compile(run, dynamic=False)
    return compiled
