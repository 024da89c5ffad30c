"""A call that asks for auxiliary outputs: the inputs it needs, the kernels it runs, the results it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from attncc.ir.graph import VariantGraph
from attncc.runtime import outputs_library
from attncc.runtime.kinds import Kinds
from attncc.runtime.outputs import OutputsEngine, check_extent
from attncc.runtime.refusals import no_statistic
from attncc.runtime.shapes import bind, output_names, refuse_gradient


class OutputsCall:
    """The calls of one op with one choice of auxiliary outputs."""

    def __init__(self, graph: VariantGraph, names: tuple[str, ...], core: Kinds, token: str):
        self.graph = graph.select(names)
        self.engine = OutputsEngine(self.graph, core)
        self._key = outputs_library.register(f"{self.graph.digest}:{','.join(names)}{token}", self.engine)
        self._stored = [name for name, _ in core.engine.plan.stored]

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        inputs: Mapping[str, Any],
        outputs: str | Sequence[str],
        traced: bool,
        differentiable: bool,
    ) -> Any:
        """The outputs that are asked for. `traced`: by the registered operator; `differentiable`: autograd records."""
        results: Any
        if traced:
            results = outputs_library.forward_op(*self.torch_args(q, k, v, scale, inputs))
        else:
            bound = bind(self.graph, q, k, v, scale, inputs)
            check_extent(self.graph, bound.sizes)
            if differentiable:
                for decl in self.graph.inputs:
                    if not decl.grad:
                        refuse_gradient(decl, inputs.get(decl.name))
                results = outputs_library.EagerOutputs.apply(self.engine, bound, q, k, v, *bound.tensors.values())
            else:
                core, values, _ = self.engine.forward(bound, q, k, v, with_residuals=False)
                results = [*core, *values]
        order = ("out", *self._stored, *(o.name for o in self.graph.outputs))
        found = dict(zip(order, results, strict=False))
        names = output_names(outputs, self.graph)
        if "lse" in names and "lse" not in found:
            raise no_statistic(self.graph, "lse")
        picked = [found[name] for name in names]
        return picked[0] if len(picked) == 1 else tuple(picked)

    def torch_args(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """The arguments with which a call reaches the registered operator."""
        bound = bind(self.graph, q, k, v, scale, inputs)
        check_extent(self.graph, bound.sizes)
        scalars = [float(x) for x in bound.scalars.values()]
        return (q, k, v, list(bound.tensors.values()), scalars, bound.scale, self._key)
