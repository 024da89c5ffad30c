"""What is measured: a variant in attncc's public language beside the same formula in FlexAttention's, and its shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Mod = Callable[..., torch.Tensor]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of one call. `hkv` and `dv` default to `h` and `d`, `n` to `m`. `tied`: v is part of k, and not passed.
    `unit_keys`: keys have length 1, as the delta rule needs."""

    b: int
    h: int
    m: int
    d: int
    hkv: int = 0
    n: int = 0
    dv: int = 0
    dtype: torch.dtype = torch.bfloat16
    tied: bool = False
    unit_keys: bool = False

    def __post_init__(self) -> None:
        for name, default in (("hkv", self.h), ("n", self.m), ("dv", self.d)):
            if not getattr(self, name):
                object.__setattr__(self, name, default)

    @property
    def group(self) -> int:
        """Query heads a key/value head."""
        return self.h // self.hkv

    def tensors(self, device: str = "cuda", seed: int = 0) -> tuple[torch.Tensor, ...]:
        """Fresh random q, k and, unless it is part of k, v, each a leaf that wants its gradient."""
        generator = torch.Generator(device).manual_seed(seed)
        sizes = (
            (self.b, self.h, self.m, self.d),
            (self.b, self.hkv, self.n, self.d),
            (self.b, self.hkv, self.n, self.dv),
        )
        drawn = [
            torch.randn(size, generator=generator, device=device, dtype=self.dtype)
            for size in sizes[: 2 if self.tied else 3]
        ]
        if self.unit_keys:
            drawn[1] = torch.nn.functional.normalize(drawn[1].float(), dim=-1).to(self.dtype)
        return tuple(x.requires_grad_() for x in drawn)

    def flops(self, area: int, mode: str) -> int:
        """Floating-point operations of the matmuls over `area` pairs a head: 2 of them forward, 5 backward."""
        per_pair = 2 * (self.d + self.dv) if mode == "forward" else 2 * (3 * self.d + 2 * self.dv)
        return self.b * self.h * area * per_pair

    def __str__(self) -> str:
        sizes = {"B": self.b, "Hq": self.h, "Hkv": self.hkv, "M": self.m, "N": self.n, "Dqk": self.d, "Dv": self.dv}
        return " ".join(f"{name}{size}" for name, size in sizes.items())

    def row(self) -> dict[str, Any]:
        """The sizes as they stand in a result row."""
        return {
            "B": self.b,
            "Hq": self.h,
            "Hkv": self.hkv,
            "M": self.m,
            "N": self.n,
            "Dqk": self.d,
            "Dv": self.dv,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


@dataclass(frozen=True)
class FlexForm:
    """A formula for FlexAttention: functions that make its score_mod and mask_mod from the shape and the inputs."""

    score_mod: Callable[[Shape, Tensors], Mod] | None = None
    mask_mod: Callable[[Shape, Tensors], Mod] | None = None


@dataclass(frozen=True)
class Case:
    """One row of a table: a variant, its exact mask area, its inputs, and how the peers say the same thing."""

    name: str
    variant: Any
    area: Callable[[int, int], int]
    inputs: Callable[[Shape, str], Tensors] = lambda shape, device: {}
    flex: FlexForm | None = None
    sdpa: Mapping[str, Any] | None = None
    #: names of the inputs whose gradients the check compares; timing asks for those of q, k and v alone
    differentiable: tuple[str, ...] = field(default=())
