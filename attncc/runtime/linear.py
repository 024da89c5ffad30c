"""A variant that is linear in time as a PyTorch operator: one spec, three plans, a state in and a state out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from attncc.errors import InputError, UnsupportedError
from attncc.ir.graph import VariantGraph
from attncc.ir.symbols import KV_LEN, Q_LEN
from attncc.ir.text import formula
from attncc.passes.linearize import Linear
from attncc.runtime import linear_library as library
from attncc.runtime.linear_calls import Kind, LinearCalls
from attncc.runtime.linear_cut import places
from attncc.runtime.linear_engine import DTYPES, LinearEngine
from attncc.runtime.linear_own import OwnWeight
from attncc.runtime.linear_terms import TokenTerms
from attncc.runtime.op import AttentionOp, autocast, is_traced
from attncc.runtime.replay import key_of
from attncc.runtime.shapes import bind, check_dimensions, output_names
from attncc.runtime.square import SquareCall
from attncc.runtime.square_engine import SquareEngine
from attncc.schedule.device import device_of
from attncc.schedule.linear import LinearSizes, PlanName, choose_plan
from attncc.schedule.problem import Precision
from attncc.schedule.square import LARGEST, choose_square


class LinearOp:
    """A compiled variant whose weights split. Call it as an AttentionOp; besides, a call may hand a state in and out.

    plan: "parallel" computes every pair, in quadratic time; "chunk" goes by chunks of tokens and a state; "recurrent"
    goes token after token; "auto" takes what the cost model finds fastest for the call. All give the same values.
    """

    #: what a plan has besides the kernels of degree 1: sums over the head dimension as factors of tokens, a weight of
    #: the token for itself, kernels of degree 2
    _terms: TokenTerms | None = None
    _own: OwnWeight | None = None
    _square: SquareCall | None = None
    #: calls that can be replayed
    _calls: LinearCalls | None = None

    def __init__(
        self,
        graph: VariantGraph,
        linear: Linear,
        parallel: AttentionOp,
        plan: PlanName = "auto",
        precision: Precision | None = None,
    ):
        self.graph, self.linear, self.parallel = graph, linear, parallel
        self.choice: PlanName = plan
        self._terms = terms = TokenTerms(graph)
        self._square = None if linear.degree == 1 else SquareCall(graph, terms.core, linear, precision)
        self.engine: LinearEngine | SquareEngine
        if self._square is not None:
            self.engine = self._square.engine
        else:
            self.engine = LinearEngine(graph, linear, precision)
            self._key = library.register(f"{graph.digest}:{precision}", self.engine)
        if linear.own is not None:
            engine = self.engine if isinstance(self.engine, LinearEngine) else None
            self._own = OwnWeight(terms.core, linear, engine, str(precision))
        self._missing = self._gaps()
        if self._own is None and isinstance(self.engine, LinearEngine) and not terms.names:
            self._calls = LinearCalls(self.engine)

    def __repr__(self) -> str:
        return f"<LinearOp {self.graph.name} {self.graph.digest} plan={self.choice}>"

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        outputs: str | Sequence[str] = "out",
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        chunk_size: int | None = None,
        position: int | None = None,
        plan: PlanName | None = None,
        **inputs: Any,
    ) -> Any:
        """out (B, Hq, N, Dv) in q's dtype; with `output_final_state` the pair (out, state).

        A state is float32 (B, Hq, Dqk, Dv): what the tokens so far left, the sum of decayed k v'. Where the variant
        divides by its row sums there is one more column, for the value 1, and where the weight has a part that is free
        of the score one more row, for the feature 1. A weight of degree 2 has both, and Dqk^2 rows before those, for
        the products of two components. It receives and passes on gradients.
        cu_seqlens (sequences + 1,) int: q, k, v are (1, H, total, D), sequences packed one behind the other; each has
        a state of its own, (sequences, Hq, Dqk, Dv). chunk_size: tokens a chunk, 16, 32, 64 or 128. position: how many
        tokens came before, for formulas of positions where a state comes in. Outputs besides `out` are those of the
        quadratic plan. Raises InputError where tensors do not match, UnsupportedError where the
        plan cannot do what the call asks.
        """
        check_dimensions(q, k, v)
        q, k, v = autocast(q, k, v)
        given = (scale, initial_state, output_final_state, chunk_size)
        if self._calls is not None and q.is_cuda and cu_seqlens is None and position is None and not is_traced(q, k, v):
            return self._eager(q, k, v, plan or self.choice, outputs, *given, inputs)
        names = output_names(outputs, self.graph)
        stateful = initial_state is not None or output_final_state
        needs_linear = stateful or cu_seqlens is not None or bool(position)
        chosen = self._chosen(q, k, v, plan or self.choice, names, needs_linear, cu_seqlens)
        if chosen == "parallel":
            return self.parallel(q, k, v, scale=scale, outputs=outputs, **inputs)
        bound = bind(self.graph, q, k, v, scale, inputs)
        bound = bound if self._terms is None else self._terms.join(bound, q, k)
        self._check_state(q, v, initial_state, cu_seqlens)
        stands = self._places(q, cu_seqlens, position, initial_state is not None)
        if self._square is not None:
            call = (initial_state, cu_seqlens, chosen == "recurrent", chunk_size, output_final_state)
            out, last = self._square(bound, q, k, v, stands, *call)
            out = out if self._own is None else self._own.add(out, bound, q, k, v, stands)
            return (out, last) if output_final_state else out
        assert isinstance(self.engine, LinearEngine)
        names, rows = self.engine.names, self.engine.rows.tokens(bound, q.device, places=stands)
        key, value, given_rows = k, v, rows
        if self._own is not None and self.linear.late:
            key, value, given_rows = self._own.before(k, v, names, rows, cu_seqlens)
        constant = self.engine.rows.constant(bound)
        then_backward = _wants_gradient(q, k, v, initial_state, *rows)
        stepwise = chosen == "recurrent"
        out, _, last = library.forward_op(
            *(q, key, value, given_rows, constant, initial_state, cu_seqlens, stepwise, chunk_size, output_final_state),
            *(then_backward, [x.requires_grad for x in given_rows], self._key),
        )
        if self._own is not None:
            out = self._own.add(out, bound, q, k, v, stands)
            if output_final_state and self.linear.late:
                last = self._own.behind(last, k, v, names, rows, cu_seqlens)
        return (out, last) if output_final_state else out

    def _eager(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: PlanName,
        outputs: str | Sequence[str],
        scale: float | None,
        first: Tensor | None,
        want_last: bool,
        chunk: int | None,
        inputs: dict[str, Any],
    ) -> Any:
        """A call whose tensors are on a GPU, and not seen by the dispatcher."""
        assert self._calls is not None
        tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
        then_backward = _wants_gradient(q, k, v, first, *tensors.values())
        asked = (plan, outputs if isinstance(outputs, str) else tuple(outputs), want_last, chunk, then_backward)
        precision = self._calls.engine.precision() if q.dtype == torch.float32 else None
        key = (key_of(q, k, v, scale, {**inputs, "initial_state": first}), asked, precision)
        kind = self._calls.known(key)
        if kind is None:
            needs_linear = first is not None or want_last
            chosen = self._chosen(q, k, v, plan, output_names(outputs, self.graph), needs_linear, None)
            if chosen == "parallel":
                return self.parallel(q, k, v, scale=scale, outputs=outputs, **inputs)
            bound = bind(self.graph, q, k, v, scale, inputs)
            self._check_state(q, v, first, None)
            self._places(q, None, None, first is not None)
            constant = self._calls.engine.rows.constant(bound)
            kind = Kind(bound, constant, chosen == "recurrent", chunk, want_last, then_backward)
            kind = self._calls.keep(key, kind, tensors)
        out, last = self._calls(key, kind, q, k, v, first, tensors)
        return (out, last) if want_last else out

    def _gaps(self) -> dict[tuple[bool, bool], str | None]:
        """What formulas read that a packed sequence, or one that goes on, does not have: by whether a state comes in,
        and whether it is known how many tokens came before. Found once, for calls may be traced."""
        plan = self.linear
        if self._square is not None:
            rows = self._square.rows
        else:
            assert isinstance(self.engine, LinearEngine)
            rows = self.engine.rows
        of_call = (e for e in (plan.constant, plan.scale, *(plan.powers or ())) if {KV_LEN, Q_LEN} & e.free_symbols)
        length = next((f"'{formula(e)}' reads the length of the sequence" for e in of_call), None)
        kinds = [(state, placed) for state in (False, True) for placed in (False, True)]
        own = {kind: None if self._own is None else self._own.beyond(*kind) for kind in kinds}
        return {kind: length or rows.beyond(*kind) or own[kind] for kind in kinds}

    def _places(self, q: Tensor, cu_seqlens: Tensor | None, position: int | None, with_state: bool) -> Tensor | None:
        """Where tokens stand in their own sequences, None where they count from 0. UnsupportedError where a formula
        needs more than a call has."""
        if cu_seqlens is not None and position is not None:
            raise InputError("position is of one sequence, and sequences are packed", remedy="leave it out")
        if cu_seqlens is not None or with_state:
            reason = self._missing[with_state, position is not None]
            if reason and cu_seqlens is not None:
                raise UnsupportedError(f"{reason}, and sequences are packed", remedy="call it for each sequence apart")
            if reason:
                remedy = (
                    "pass position=, how many tokens came before" if "position" in reason else "pass whole sequences"
                )
                raise UnsupportedError(f"{reason}, and a state comes in", remedy=remedy)
        if cu_seqlens is not None:
            return places(cu_seqlens, q.shape[2])
        return None if not position else torch.arange(position, position + q.shape[2], device=q.device)

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
        """The plan of a call, or why there is none."""
        if plan not in get_args(PlanName):
            raise InputError(f"plan is {plan!r}", remedy=f"one of {', '.join(get_args(PlanName))}")
        refusal = self._refusal(q, k, v, names)
        if not self.linear.causal and (needs_linear or plan == "recurrent"):
            raise UnsupportedError(
                "every query sees every key: there is no state from token to token",
                remedy="leave out states, cu_seqlens and plan='recurrent', or make the mask causal",
            )
        if plan == "auto":
            if refusal is not None:
                plan = "parallel"
            elif needs_linear or self.linear.decay == "channel":  # all pairs overflow where channels decay much
                plan = "recurrent" if q.shape[2] == 1 else "chunk"
            else:
                batch, heads, length, d_qk = q.shape
                sizes = LinearSizes(DTYPES.get(q.dtype, "fp32"), batch, heads, length, d_qk, v.shape[3])
                choose = choose_plan if self._square is None else choose_square
                chosen = choose(sizes, device_of(q.device), self.linear.causal)
                return chosen  # type: ignore[return-value]
        if plan == "parallel" and needs_linear:
            reason = refusal or "the quadratic plan has no state and no packed sequences"
            raise UnsupportedError(reason, remedy="use plan='chunk' or plan='recurrent'")
        if plan != "parallel" and refusal is not None:
            raise UnsupportedError(refusal, remedy="plan='parallel' computes it")
        return plan

    def _refusal(self, q: Tensor, k: Tensor, v: Tensor, names: tuple[str, ...]) -> str | None:
        """Why a call has no plan but the quadratic one, if that is so."""
        if names != ("out",):
            return f"the output '{next(n for n in names if n != 'out')}' is one of pairs, which a state does not keep"
        if v.shape[1] != k.shape[1]:
            return f"{k.shape[1]} heads of k meet {v.shape[1]} of v"
        if self.linear.causal and q.shape[2] != k.shape[2]:
            return f"{q.shape[2]} queries and {k.shape[2]} keys are not the same tokens"
        if self._square is not None and max(q.shape[-1], v.shape[-1]) > LARGEST:
            return f"a state of degree 2 for heads larger than {LARGEST} is too large"
        return None

    def _check_state(self, q: Tensor, v: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> None:
        if initial is None:
            return
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        wanted = (sequences, q.shape[1], *self.engine.state_shape(q.shape[3], v.shape[3]))
        if tuple(initial.shape) != wanted or initial.dtype != torch.float32 or initial.device != q.device:
            raise InputError(
                f"initial_state is {initial.dtype} {tuple(initial.shape)} on {initial.device}",
                remedy=f"pass torch.float32 {wanted} on {q.device}, or None for zeros",
            )
        if not initial.is_contiguous():
            raise InputError("initial_state is not contiguous", remedy="pass initial_state.contiguous()")

    def source(self, d_qk: int = 128, d_v: int | None = None) -> str:
        """The generated module of the chunk plan for these head dimensions."""
        return self.engine.source(d_qk, d_qk if d_v is None else d_v)

    def explain(self, *args: Any, **options: Any) -> str:
        """What `AttentionOp.explain` says, the linear form and its proof among it; the arguments are the same."""
        return self.parallel.explain(*args, **options)


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
