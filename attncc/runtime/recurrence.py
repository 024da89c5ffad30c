"""`RecurrenceOp`: a recurrence as a PyTorch operator, by chunks or token by token, with optional states."""

from __future__ import annotations

from typing import Any, get_args

from torch import Tensor

from attncc.errors import InputError, UnsupportedError
from attncc.ir.graph import VariantGraph
from attncc.passes.linearize import Linear
from attncc.passes.recur import Delta, recur
from attncc.runtime import linear_library as library
from attncc.runtime.delta_engine import DeltaEngine
from attncc.runtime.explain_recurrence import explain
from attncc.runtime.linear import LinearOp
from attncc.runtime.linear_calls import LinearCalls
from attncc.runtime.linear_engine import LinearEngine
from attncc.runtime.linear_terms import TokenTerms
from attncc.schedule.linear import STEPS, PlanName
from attncc.schedule.problem import Precision


class RecurrenceOp(LinearOp):
    """A compiled recurrence. Call it as a LinearOp; it has no plan "parallel", for it has no pairs.

    plan: "chunk", "recurrent", or "auto", which takes the latter for a few tokens. Both give the same values, and
    gradients are those of chunks.
    """

    def __init__(self, graph: VariantGraph, plan: PlanName = "auto", precision: Precision | None = None):
        if plan == "parallel":
            raise _no_pairs(graph)
        found: Linear | Delta = recur(graph)
        self.graph, self.choice, self._terms = graph, plan, TokenTerms(graph)
        self._made_of = (graph, plan, precision)
        engine = (DeltaEngine if isinstance(found, Delta) else LinearEngine)(graph, found, precision)  # type: ignore[arg-type]
        self.engine = self._kernels = engine
        self.linear, self._rows = engine.plan, engine.rows
        self._key = library.register(f"{graph.digest}:{precision}", engine)
        self._missing = self._gaps()
        self._underived = frozenset()
        self._calls = None if self._terms.names else LinearCalls(engine)

    def __repr__(self) -> str:
        return f"<RecurrenceOp {self.graph.name} {self.graph.digest} plan={self.choice}>"

    def _chosen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: PlanName,
        names: tuple[str, ...],
        needs_linear: bool,
        cu_seqlens: Tensor | None,
    ) -> PlanName:
        if plan not in get_args(PlanName):
            raise InputError(f"plan is {plan!r}", remedy=f"one of {', '.join(get_args(PlanName))}")
        if plan == "parallel":
            raise _no_pairs(self.graph)
        refusal = self._refusal(q, k, v, names)
        if refusal is not None:
            raise UnsupportedError(
                refusal,
                remedy="a recurrence has q, k and v of the same tokens, k and v of as many heads, and the output 'out'",
            )
        if plan == "auto":
            return "recurrent" if q.shape[2] <= STEPS else "chunk"
        return plan

    def explain(self, *args: Any, **options: Any) -> str:
        """What `attncc explain` says; the arguments are those of `AttentionOp.explain`, without scalars."""
        return explain(self.graph, *args, **options)


def _no_pairs(graph: VariantGraph) -> UnsupportedError:
    return UnsupportedError(
        f"'{graph.name}' is a recurrence: what a token writes depends on the state it finds, and there are no pairs",
        remedy="use plan='chunk' or plan='recurrent'",
    )
