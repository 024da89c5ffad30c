"""One small call of each family of kernels, with everything that it computes: for what looks at launches one by one.

`python -m tests.gpu.kernels FAMILY...` makes the calls once, as `compute-sanitizer` runs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import attncc as ac
from attncc.runtime.samples import Shape, sample_inputs


@dataclass(frozen=True)
class Family:
    """A shipped variant at a shape that makes its kernels' loops turn: partial tiles at both ends, grouped heads.
    `options` are those of `ac.compile`, `outputs` what is asked for; `hopper`: there alone."""

    variant: str
    shape: Shape
    gradients: bool = True
    hopper: bool = False
    outputs: tuple[str, ...] = ("out",)
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Callable[[], dict[str, Tensor]]:
        """The call: its outputs by name, then its gradients."""
        graph = ac.variants.get(self.variant).graph
        sample = sample_inputs(graph, self.shape, torch.bfloat16, "cuda")
        op = ac.compile(self.variant, **self.options)
        leaves = {n: getattr(sample, n) for n in "qkv" if getattr(sample, n) is not None}
        differentiable = {d.name: sample.inputs[d.name] for d in graph.inputs if d.grad} if self.gradients else {}
        wanted = [t.requires_grad_(self.gradients) for t in (*leaves.values(), *differentiable.values())]
        names = [f"d{name}" for name in (*leaves, *differentiable)]

        def call() -> dict[str, Tensor]:
            found = op(*leaves.values(), outputs=self.outputs, **sample.inputs)
            results = found if isinstance(found, tuple) else (found,)
            named = dict(zip(self.outputs, (r.detach() for r in results), strict=True))
            if not self.gradients:
                return named
            moving = [r for r in results if r.requires_grad]
            gradients = torch.autograd.grad(moving, wanted, [torch.ones_like(r) for r in moving])
            return named | dict(zip(names, gradients, strict=True))

        return call


def _shape(d_qk: int, d_v: int, m: int = 333, n: int = 517) -> Shape:
    return Shape(2, 4, 2, m, n, d_qk, d_v)


def _gluon(variant: str, shape: Shape, gradients: bool = True) -> Family:
    return Family(variant, shape, gradients, hopper=True, options={"backend": "gluon", "deterministic": True})


def _triton(variant: str, shape: Shape, gradients: bool = True, **more: Any) -> Family:
    return Family(variant, shape, gradients, options={"backend": "triton", "plan": "parallel"}, **more)


def _linear(variant: str, plan: str) -> Family:
    return Family(variant, _shape(64, 64, 300, 300), plan == "chunk", options={"plan": plan})


FAMILIES = {
    "gluon forward 64": _gluon("causal", _shape(64, 64), gradients=False),
    "gluon forward 128, as many tiles as are dealt": _gluon("softcap", Shape(2, 16, 8, 2048, 2048, 128, 128), False),
    "gluon forward 192/128": _gluon("causal", _shape(192, 128), gradients=False),
    "gluon forward 256": _gluon("sliding_window", _shape(256, 256), gradients=False),
    "gluon backward 64": _gluon("sink", _shape(64, 64)),
    "gluon backward 128": _gluon("alibi", _shape(128, 128)),
    "gluon backward 192/128": _gluon("causal", _shape(192, 128)),
    "gluon backward 256": _gluon("causal", _shape(256, 256)),
    "gluon documents": _gluon("document", _shape(128, 128, 512, 512)),
    "triton 128": _triton("causal", _shape(128, 128), outputs=("out", "lse")),
    "triton 80/128": _triton("alibi", _shape(80, 128)),
    "triton documents": _triton("document", _shape(64, 64, 512, 512)),
    "triton, a bias a pair": _triton("dense_bias", _shape(64, 64, 256, 256)),
    "triton, several passes": _triton("sparsemax", _shape(64, 64), gradients=False),
    "triton, two branches": _triton("differential", _shape(64, 64)),
    "decoding": _triton("softcap", Shape(2, 8, 2, 1, 5000, 128, 128), gradients=False),
    "chunks": _linear("simple_gla", "chunk"),
    "chunks, a decay a channel": _linear("gla", "chunk"),
    "tokens one by one": _linear("retention", "recurrent"),
    "delta rule": _linear("gated_delta_net", "chunk"),
}


def main(names: list[str]) -> None:
    """Make the calls, and say each that was made."""
    on_hopper = torch.cuda.get_device_capability() == (9, 0)
    for name in names or FAMILIES:
        if FAMILIES[name].hopper and not on_hopper:
            continue
        results = FAMILIES[name].make()()
        torch.cuda.synchronize()
        wrong = [n for n, x in results.items() if x.isnan().any()]
        print(f"{name}: {', '.join(results)}{' NaN in ' + ', '.join(wrong) if wrong else ''}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
