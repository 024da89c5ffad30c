"""`LinearOp`: a variant with a linear-time form as a PyTorch operator, with three plans and optional states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from attncc.errors import InputError, UnsupportedError
from attncc.ir.graph import VariantGraph
from attncc.ir.symbols import KV_LEN, Q_LEN
from attncc.ir.text import formula
from attncc.ir.vocabulary import Read
from attncc.passes.decays import gates
from attncc.passes.linearize import Linear
from attncc.runtime import linear_library as library
from attncc.runtime.linear_calls import Calls, Kind, LinearCalls
from attncc.runtime.linear_cut import check_lengths, places
from attncc.runtime.linear_engine import DTYPES, LinearEngine
from attncc.runtime.linear_own import OwnWeight
from attncc.runtime.linear_terms import TokenTerms
from attncc.runtime.op import AttentionOp, autocast, is_traced, refuse_transforms, transformed
from attncc.runtime.refusals import kind_of
from attncc.runtime.remade import Remade
from attncc.runtime.replay import key_of
from attncc.runtime.shapes import Bound, bind, check_dimensions, output_names
from attncc.runtime.square_engine import SquareEngine
from attncc.schedule.device import Device, device_of
from attncc.schedule.linear import CHUNKS, LinearSizes, PlanName
from attncc.schedule.linear_cost import choose_plan
from attncc.schedule.problem import Precision

#: the log of what is 0 in float32
_NOTHING = -104.0


class LinearOp(Remade):
    """A compiled variant whose weights split. Call it as an AttentionOp; besides, a call may hand a state in and out.

    plan: "parallel" computes every pair, in quadratic time; "chunk" goes by chunks of tokens and a state; "recurrent"
    goes token after token; "auto" takes what the cost model finds fastest for the call. All give the same values.
    """

    engine: LinearEngine | SquareEngine
    #: what a plan may have besides its kernels: a weight of the token for itself; calls that can be replayed
    _own: OwnWeight | None = None
    _calls: Calls | None = None

    def __init__(
        self,
        graph: VariantGraph,
        linear: Linear,
        parallel: AttentionOp,
        plan: PlanName = "auto",
        precision: Precision | None = None,
    ):
        self.graph, self.linear, self.parallel = graph, linear, parallel
        self._made_of = (graph, linear, parallel, plan, precision)
        self.choice: PlanName = plan
        self._terms = TokenTerms(graph)
        self._set_up(precision)
        self._missing = self._gaps()
        of_bias = () if linear.bias is None else (*linear.bias, linear.step)
        reads = {r.input for e in of_bias if e is not None for r in e.atoms(Read)}
        self._gates = frozenset() if linear.decay == "channel" else gates(graph, linear.step)
        #: the arguments of a call whose gradients only the quadratic plan has
        self._underived = frozenset(self._terms.sources.get(name, name) for name in reads)

    def _set_up(self, precision: Precision | None) -> None:
        """Make the engine, and what stands beside it."""
        self.engine = self._kernels = LinearEngine(self.graph, self.linear, precision)
        self._rows = self._kernels.rows
        self._key = library.register(f"{self.graph.digest}:{precision}", self._kernels)
        by_kernels = self.linear.own in (None, 0) or (self.linear.diagonal or self.linear.product) is not None
        if not by_kernels:
            self._own = OwnWeight(self._terms.core, self.linear)
        elif not self._terms.names:
            self._calls = LinearCalls(self._kernels)

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
        traced = is_traced(q, k, v)
        if not traced and transformed():
            refuse_transforms(q, k, v, initial_state, *inputs.values())
        if torch._C._get_tracing_state() is not None:
            raise UnsupportedError(
                "torch.jit.trace does not go through an op in linear time", remedy="use torch.export, or torch.compile"
            )
        _check_kinds(initial_state, cu_seqlens, chunk_size, position)
        given = (scale, initial_state, output_final_state, chunk_size)
        if self._calls is not None and q.is_cuda and cu_seqlens is None and position is None and not traced:
            return self._eager(q, k, v, plan or self.choice, outputs, *given, inputs)
        names = output_names(outputs, self.graph)
        stateful = initial_state is not None or output_final_state
        needs_linear = stateful or cu_seqlens is not None or bool(position)
        chosen = self._chosen(q, k, v, plan or self.choice, names, needs_linear, cu_seqlens)
        chosen = self._with_gradients(chosen, plan or self.choice, needs_linear, {"q": q, "k": k, **inputs})
        if chosen == "parallel":
            return self.parallel(q, k, v, scale=scale, outputs=outputs, **self._bounded(inputs))
        bound = self._terms.join(bind(self.graph, q, k, v, scale, inputs), q, k)
        self._check_state(q, v, initial_state, cu_seqlens)
        stands = self._places(q, cu_seqlens, position, initial_state is not None)
        call = (initial_state, cu_seqlens, chosen == "recurrent", chunk_size, output_final_state)
        out, last = self._computed(bound, q, k, v, stands, *call)
        return (out, last) if output_final_state else out

    def _computed(
        self,
        bound: Bound,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stands: Tensor | None,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        stepwise: bool,
        chunk: int | None,
        want_last: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """out, and the last state or None. stands: where tokens of packed sequences stand."""
        rows = self._rows.tokens(bound, q.device, places=stands)
        constant = self._rows.constant(bound)
        then_backward = _wants_gradient(q, k, v, initial, *rows)
        out, _, last, *_ = library.forward_op(
            *(q, k, v, rows, constant, initial, cu_seqlens, stepwise, chunk, want_last),
            *(then_backward, [x.requires_grad for x in rows], self._key),
        )
        if self._own is not None:
            out = self._own.add(out, bound, q, k, v, stands)
        return out, last if want_last else None

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
        precision = self._calls.precision() if q.dtype == torch.float32 else None
        key = (key_of(q, k, v, scale, {**inputs, "initial_state": first}), asked, precision)
        kind = self._calls.known(key)
        if kind is None:
            needs_linear = first is not None or want_last
            chosen = self._chosen(q, k, v, plan, output_names(outputs, self.graph), needs_linear, None)
            chosen = self._with_gradients(chosen, plan, needs_linear, inputs)
            if chosen == "parallel":
                return self.parallel(q, k, v, scale=scale, outputs=outputs, **self._bounded(inputs))
            bound = bind(self.graph, q, k, v, scale, inputs)
            self._check_state(q, v, first, None)
            self._places(q, None, None, first is not None)
            constant = self._calls.constant(bound)
            kind = Kind(bound, constant, chosen == "recurrent", chunk, want_last, then_backward)
            kind = self._calls.keep(key, kind, tensors)
        out, last = self._calls(key, kind, q, k, v, first, tensors)
        return (out, last) if want_last else out

    def _gaps(self) -> dict[tuple[bool, bool], str | None]:
        """What formulas read that a packed sequence, or one that goes on, does not have: by whether a state comes in,
        and whether it is known how many tokens came before. Found once, for calls may be traced."""
        plan = self.linear
        of_call = (e for e in (plan.constant, plan.scale, *(plan.powers or ())) if {KV_LEN, Q_LEN} & e.free_symbols)
        length = next((f"'{formula(e)}' reads the length of the sequence" for e in of_call), None)
        kinds = [(state, placed) for state in (False, True) for placed in (False, True)]
        own = {kind: None if self._own is None else self._own.beyond(*kind) for kind in kinds}
        return {kind: length or self._rows.beyond(*kind) or own[kind] for kind in kinds}

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
                return self._fastest(sizes, device_of("cpu" if q.is_meta else q.device))
        if refusal is not None and needs_linear:
            raise UnsupportedError(
                refusal, remedy="leave out what is of a state (initial_state, output_final_state, cu_seqlens, position)"
            )
        if plan == "parallel" and needs_linear:
            raise UnsupportedError(
                "the quadratic plan has no state and no packed sequences", remedy="use plan='chunk' or plan='recurrent'"
            )
        if plan != "parallel" and refusal is not None:
            raise UnsupportedError(refusal, remedy="plan='parallel' computes it")
        return plan

    def _with_gradients(self, chosen: PlanName, plan: PlanName, needs_linear: bool, given: dict[str, Any]) -> PlanName:
        """The plan that was chosen for a call that asks for `plan`, or all pairs where those alone have a gradient.
        given: the arguments by name."""
        if chosen == "parallel" or not self._underived or not torch.is_grad_enabled():
            return chosen
        wanted = [n for n in sorted(self._underived) if isinstance(x := given.get(n), Tensor) and x.requires_grad]
        if not wanted:
            return chosen
        if plan == "auto" and not needs_linear:
            return "parallel"
        raise UnsupportedError(
            f"the weight has a part that is free of the score, whose gradient to '{wanted[0]}' is not derived yet",
            remedy="plan='parallel' has it, in quadratic time; or write that part by a component of q and k that is 1",
        )

    def _bounded(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs for all pairs, where sums of gates are subtracted: one of -inf would leave NaN, and one of -1e9 round
        the others away."""
        if not self._gates:
            return inputs
        return {n: x.clamp(min=_NOTHING) if n in self._gates and _is_float(x) else x for n, x in inputs.items()}

    def _fastest(self, sizes: LinearSizes, device: Device) -> PlanName:
        """The plan that the cost model takes to be the fastest."""
        return choose_plan(sizes, device, self.linear.causal)

    def without_state(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Why a call for `out` alone has no plan but the quadratic one, if that is so."""
        return self._refusal(q, k, v, ("out",))

    def _refusal(self, q: Tensor, k: Tensor, v: Tensor, names: tuple[str, ...]) -> str | None:
        """Why a call has no plan but the quadratic one, if that is so."""
        if names != ("out",):
            return f"the output '{next(n for n in names if n != 'out')}' is one of pairs, which a state does not keep"
        if v.shape[1] != k.shape[1]:
            return f"{k.shape[1]} heads of k meet {v.shape[1]} of v, and a state is of one of each"
        if self.linear.causal and q.shape[2] != k.shape[2]:
            return f"{q.shape[2]} queries and {k.shape[2]} keys are not the same tokens"
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

    def cannot_go_on(self) -> str | None:
        """Why no call can begin with the state of another, or None if one can."""
        return self._missing[True, True]

    def source(self, d_qk: int = 128, d_v: int | None = None) -> str:
        """The generated module of the chunk plan for these head dimensions."""
        return self.engine.source(d_qk, d_qk if d_v is None else d_v)

    def explain(self, *args: Any, **options: Any) -> str:
        """What `AttentionOp.explain` says, the linear form and its proof among it; the arguments are the same."""
        return self.parallel.explain(*args, **options)


def _check_kinds(initial: Any, cu_seqlens: Any, chunk: Any, position: Any) -> None:
    """InputError for what no call can have, whatever its shapes."""
    if initial is not None and not isinstance(initial, Tensor):
        raise InputError(
            f"initial_state is {kind_of(initial)}, not a tensor", remedy="pass the state that a call returned"
        )
    if cu_seqlens is not None:
        check_lengths(cu_seqlens)
    if position is not None and (not isinstance(position, int | torch.SymInt) or position < 0):
        remedy = "pass how many tokens came before, a Python number, or None"
        raise InputError(f"position is {position!r}, not a number of tokens", remedy=remedy)
    if chunk is not None and not isinstance(chunk, int | torch.SymInt):
        raise InputError(f"chunk_size is {chunk!r}, not a whole number", remedy="tokens a chunk, such as 64, or None")
    if chunk is not None and chunk not in CHUNKS:  # also where all pairs are computed, which have none
        raise InputError(f"chunk_size is {chunk!r}", remedy=f"one of {', '.join(map(str, CHUNKS))}")


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
