"""A hybrid as a PyTorch operator: it runs each part with its own plan and combines their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor

from attncc.errors import InputError, UnsupportedError
from attncc.ir.graph import LOOP_DIMS, VariantGraph
from attncc.ir.hybrid import HybridGraph
from attncc.ir.vocabulary import Read
from attncc.passes.continuation import SEQUENCE, continuation, packed
from attncc.runtime.closures import closure
from attncc.runtime.linear import LinearOp
from attncc.runtime.linear_cut import check_lengths, sequence_lengths
from attncc.runtime.op import AttentionOp, autocast
from attncc.runtime.recurrence import RecurrenceOp
from attncc.runtime.refusals import fail_scale, fail_unknown, kind_of
from attncc.runtime.remade import Remade
from attncc.runtime.shapes import Bound, bind, check_dimensions
from attncc.schedule.linear import PlanName

#: how rows lie: (B, H, M, Dv)
_AXES = {"b": 0, "h": 1, "h_kv": 1, "q_idx": 2}


class Seen(NamedTuple):
    """The state of a part over pairs: k (B, Hkv, n, Dqk) and v (B, Hkv, n, Dv) of the last n tokens, which are those
    that later queries can see, and the entries that inputs have for these keys."""

    k: Tensor
    v: Tensor
    inputs: dict[str, Tensor]


#: the state of each part, by its name: float32 (B, Hq, Dqk, Dv) for a part in linear time, see LinearOp
State = dict[str, Tensor | Seen]


class HybridOp(Remade):
    """A compiled hybrid. Call it as an AttentionOp; if all parts are causal, a call may also take and return a state.

    parts: the op of each part, which may be called by itself. The state of a part in linear time has a fixed size; a
    part over pairs keeps the keys and values that its mask shows to later tokens, which each call copies.
    """

    graph: HybridGraph  # type: ignore[assignment]

    def __init__(
        self,
        graph: HybridGraph,
        parts: Mapping[str, AttentionOp | LinearOp],
        make: Callable[[VariantGraph], AttentionOp] = AttentionOp,
    ):
        self.graph, self._made_of = graph, (graph, parts, make)
        self.parts = dict(parts)
        self._named = {name: _names(part) for name, part in graph.parts}
        self._pairs = {
            name: Pairs(name, part, self.parts[name], make)
            for name, part in graph.parts
            if not _has_state(self.parts[name])
        }
        self._known = _names(graph)
        #: takes a call q, k and v of the same tokens?
        self.same_tokens = len(self._pairs) < len(self.parts)
        #: which dimension of an input counts tokens
        self.along = {
            d.name: d.pattern.index(dim) for d in graph.inputs for dim in ("q_idx", "kv_idx") if dim in d.pattern
        }
        reads = sorted(graph.expr.atoms(Read), key=str)
        #: what the formula reads of inputs, by names that stand for it there
        self._reads = {f"read[{i}]": read.input for i, read in enumerate(reads)}
        named = {read: sympy.Symbol(name, real=True) for name, read in zip(self._reads, reads, strict=True)}
        self._combine = closure(graph.expr.xreplace(named))
        self._patterns = {d.name: d.pattern for d in graph.combine.inputs}
        self._integers = {d.name for d in graph.combine.inputs if d.dtype == "int"}

    def __repr__(self) -> str:
        return f"<HybridOp {self.graph.name} of {', '.join(self.parts)} {self.graph.digest}>"

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        outputs: str | Sequence[str] = "out",
        initial_state: State | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        chunk_size: int | None = None,
        position: int | None = None,
        plan: PlanName | None = None,
        **inputs: Any,
    ) -> Any:
        """out (B, Hq, M, Dv) in q's dtype, or with `output_final_state` the pair (outputs, state). `outputs` may also
        name parts, to get their rows before they are combined.

        q (B, Hq, M, Dqk), k (B, Hkv, N, Dqk), v (B, Hkv, N, Dv), and the inputs of all parts by name. `initial_state`
        is the state that an earlier call returned; the tokens of this call follow those of that one. cu_seqlens,
        chunk_size, position and plan mean what they mean for a LinearOp, and apply to parts in linear time; with
        cu_seqlens the other parts mask out other sequences, and have no state. Raises InputError if tensors do not
        match, UnsupportedError if a part cannot do what the call asks.
        """
        check_dimensions(q, k, v)
        q, k, v = autocast(q, k, v)
        if inputs.keys() - self._known:
            fail_unknown(self.graph, inputs)
        if scale is not None and not self.graph.has_scale:
            fail_scale(self.graph)
        names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
        unknown = [name for name in names if name != "out" and name not in self.parts]
        if unknown or not names:
            reason = f"there is no output '{unknown[0]}'" if unknown else "no output is asked for"
            raise InputError(reason, remedy=f"the outputs are: out, {', '.join(self.parts)}")
        states = self._states(initial_state)
        stateful = initial_state is not None or output_final_state
        numbers = None if cu_seqlens is None else _numbers(cu_seqlens, q)
        of_linear: dict[str, Any] = {
            "cu_seqlens": cu_seqlens,
            "chunk_size": chunk_size,
            "position": position,
            "plan": plan,
        }
        options = {key: x for key, x in of_linear.items() if x is not None}
        if not self.same_tokens and (chunk_size is not None or plan is not None):
            given = "chunk_size" if plan is None else "plan"
            raise InputError(f"{given} is for parts in linear time with a state, and there is none", remedy="drop it")
        rows: dict[str, Tensor] = {}
        last: State = {}
        for name, graph in self.graph.parts:
            own = {key: inputs[key] for key in self._named[name] if key in inputs}
            if scale is not None and graph.has_scale:
                own["scale"] = scale
            if name in self._pairs and stateful:
                rows[name], last[name] = self._pairs[name].after(q, k, v, states.get(name), numbers, own)
            elif name in self._pairs:
                rows[name] = self._pairs[name].rows(q, k, v, numbers, own)
            else:
                own |= options
                begin = {"initial_state": states[name]} if name in states else {}
                if output_final_state:
                    rows[name], last[name] = self.parts[name](q, k, v, output_final_state=True, **begin, **own)
                else:
                    rows[name] = self.parts[name](q, k, v, **begin, **own)
        combined = self._combined(rows, q, k, v, inputs) if "out" in names else None
        results = tuple(combined if name == "out" else rows[name] for name in names)
        result = results[0] if len(results) == 1 else results
        return (result, last) if output_final_state else result

    def cannot_go_on(self) -> str | None:
        """Why no call can begin with the state of another, or None if one can."""
        for name, op in self.parts.items():
            reason = self._pairs[name].cannot_go_on() if name in self._pairs else op.cannot_go_on()  # type: ignore[union-attr]
            if reason is not None:
                return f"{name}: {reason}"
        return None

    def free_sums(self) -> frozenset[str]:
        """As `AttentionOp.free_sums`: the gradients to which a part adds sums without a fixed order."""
        return frozenset().union(*(op.free_sums() for op in self.parts.values() if isinstance(op, AttentionOp)))

    def source(self, d_qk: int = 128, d_v: int | None = None) -> str:
        """The generated module of each part, one behind the other."""
        return "\n\n".join(f"# {name}\n{op.source(d_qk, d_v)}" for name, op in self.parts.items())

    def explain(self, *args: Any, **options: Any) -> str:
        """The combination, what goes on from call to call, and what each part's `explain` says; the arguments are those
        of `AttentionOp.explain`, where a scalar is for the parts that have it."""
        from attncc.runtime.explain import sizes_of
        from attncc.runtime.explain_hybrid import hybrid_facts, hybrid_text

        scalars = {s.name for s in self.graph.scalars}
        sizes = {key: x for key, x in options.items() if key not in scalars | {"dtype", "target"}}
        texts = [hybrid_text(hybrid_facts(self.graph, sizes_of(*args, **sizes)))]
        for (name, part), op in zip(self.graph.parts, self.parts.values(), strict=True):
            own = {key: x for key, x in options.items() if key not in scalars - {s.name for s in part.scalars}}
            texts.append(f"== {name}\n{op.explain(*args, **own)}")
        return "\n\n".join(texts)

    def _states(self, initial: Any) -> Mapping[str, Any]:
        """The states of the parts that a call begins with. InputError for what no call returned."""
        if initial is None:
            return {}
        if not isinstance(initial, Mapping) or set(initial) != set(self.parts):
            raise InputError(
                f"initial_state is {kind_of(initial)}, not a state of {', '.join(self.parts)}",
                remedy="pass the state that a call returned with output_final_state=True",
            )
        for name in self._pairs:
            if not isinstance(initial[name], Seen):
                raise InputError(f"initial_state['{name}'] is {kind_of(initial[name])}", remedy="pass it as it was")
        return initial

    def _combined(self, rows: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The rows combined in float32, in q's dtype."""
        own = {name: inputs[name] for name in _names(self.graph.combine) if name in inputs}
        bound = bind(self.graph.combine, q, k, v, None, own)
        env: dict[str, Any] = {name: row.float() for name, row in rows.items()} | bound.scalars
        env["num_heads"] = q.shape[1]
        for name, of in self._reads.items():
            env[name] = _along_rows(bound.tensors[of], self._patterns[of], bound, of not in self._integers)
        out: Tensor = self._combine(env)
        return out.to(q.dtype)


class Pairs:
    """A part over pairs: whole sequences, sequences that are packed, and tokens that come after others."""

    def __init__(self, name: str, graph: VariantGraph, op: Any, make: Callable[[VariantGraph], AttentionOp]):
        self._name, self._op = name, op
        self._packed = _made(lambda: make(packed(graph)))
        found = _made(lambda: continuation(graph))
        if isinstance(found, UnsupportedError):
            self._after: AttentionOp | UnsupportedError = found
        else:
            self._after, self._by_key = make(found.graph), found.by_key
            self._axes = {key: graph.input(key).pattern.index("kv_idx") for key in found.by_key}
            self._reach = None if found.reach is None else closure(found.reach)
            self._scalars = {s.name: s.default for s in graph.scalars}

    def cannot_go_on(self) -> str | None:
        """Why it has no state, or None if it has one."""
        return self._after.reason if isinstance(self._after, UnsupportedError) else None

    def rows(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor | None, inputs: dict[str, Any]) -> Tensor:
        """Its rows of a call without a state; numbers (1, N): of which packed sequence each token is."""
        op, own = self._op, {}
        if numbers is not None:
            op, own = self._possible(self._packed, "packed sequences"), {SEQUENCE: numbers}
        found: Tensor = op(q, k, v, **inputs, **own)
        return found

    def after(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Seen | None, numbers: Tensor | None, inputs: dict[str, Any]
    ) -> tuple[Tensor, Seen]:
        """Its rows of tokens that follow those seen, and what it keeps for later ones."""
        op = self._possible(self._after, "a state")
        if numbers is not None:
            raise UnsupportedError(
                f"sequences are packed, and the part '{self._name}' keeps keys of each",
                remedy="call the op for each sequence by itself",
            )
        if q.shape[2] != k.shape[2]:
            raise InputError(
                f"{q.shape[2]} queries and {k.shape[2]} keys are not the same tokens",
                remedy="with a state, q, k and v are of the tokens that come next",
            )
        held = {key: self._for_each_key(key, inputs, k.shape[2]) for key in self._by_key}
        if seen is not None:
            self._check(seen, k, v)
            k, v = torch.cat([seen.k, k], 2), torch.cat([seen.v, v], 2)
            held = {key: torch.cat(_alike(seen.inputs[key], x, axis), axis) for (key, x), axis in self._with_axes(held)}
        rows: Tensor = op(q, k, v, **{**inputs, **held})
        first = self._first_seen(k.shape[2], inputs)
        # copies: a view would hold on to all keys
        held = {key: x.narrow(axis, first, k.shape[2] - first).clone() for (key, x), axis in self._with_axes(held)}
        return rows, Seen(k[:, :, first:].clone(), v[:, :, first:].clone(), held)

    def _with_axes(self, held: dict[str, Tensor]) -> list[tuple[tuple[str, Tensor], int]]:
        return [(entry, self._axes[entry[0]]) for entry in held.items()]

    def _first_seen(self, length: int, inputs: dict[str, Any]) -> int:
        """The first of so many keys that the next token may see."""
        if self._reach is None:
            return 0
        reach = self._reach({**self._scalars, **inputs})
        return max(length - max(int(reach), 0), 0)

    def _for_each_key(self, key: str, inputs: dict[str, Any], length: int) -> Tensor:
        """An input with an entry for each key, also where it has one for all."""
        given, axis = inputs.get(key), self._axes[key]
        if not isinstance(given, Tensor) or given.dim() <= axis or given.shape[axis] not in (1, length):
            raise InputError(
                f"the input '{key}' is {kind_of(given)}, and goes with the keys that are kept",
                remedy=f"pass a tensor with an entry for each of the {length} keys",
            )
        return given.expand([length if a == axis else -1 for a in range(given.dim())])

    def _check(self, seen: Seen, k: Tensor, v: Tensor) -> None:
        for what, old, new in (("k", seen.k, k), ("v", seen.v, v)):
            same = old.dim() == 4 and (*old.shape[:2], old.shape[3]) == (*new.shape[:2], new.shape[3])
            if not same or old.dtype != new.dtype or old.device != new.device:
                kinds = [f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (old, new)]
                raise InputError(
                    f"initial_state['{self._name}'].{what} is {kinds[0]}, and {what} is {kinds[1]}",
                    remedy="pass the state of the same sequences",
                )

    def _possible(self, op: AttentionOp | UnsupportedError, what: str) -> AttentionOp:
        if isinstance(op, UnsupportedError):
            raise UnsupportedError(
                f"the part '{self._name}' has no form for {what}: {op.reason}",
                stage=op.stage,
                span=op.span,
                remedy=op.remedy,
            )
        return op


def _made(make: Callable[[], Any]) -> Any:
    """What is made, or the reason why not, which a call is told that asks for it."""
    try:
        return make()
    except UnsupportedError as error:
        return error.with_traceback(None)


def _has_state(op: AttentionOp | LinearOp) -> bool:
    """Whether the op of a part has a state of its own."""
    return isinstance(op, RecurrenceOp) or (isinstance(op, LinearOp) and op.linear.causal)


def _names(graph: VariantGraph | HybridGraph) -> frozenset[str]:
    """The inputs and scalars of a call."""
    return frozenset([*(d.name for d in graph.inputs), *(s.name for s in graph.scalars)])


def _numbers(cu_seqlens: Tensor, q: Tensor) -> Tensor:
    """(1, N) int32: of which packed sequence each token is."""
    check_lengths(cu_seqlens)
    ends = torch.tensor(sequence_lengths(cu_seqlens, q.shape[0], q.shape[2]), device=q.device)
    tokens = torch.arange(q.shape[2], device=q.device)
    return (torch.searchsorted(ends, tokens, right=True) - 1).int()[None]


def _alike(old: Tensor, new: Tensor, axis: int) -> list[Tensor]:
    """Two tensors that differ in size along `axis` alone: where one has size 1, it is the same at every index."""
    sizes = [max(a, b) for a, b in zip(old.shape, new.shape, strict=True)]
    return [x.expand([-1 if a == axis else size for a, size in enumerate(sizes)]) for x in (old, new)]


def _along_rows(x: Tensor, pattern: tuple[str, ...], bound: Bound, as_float: bool) -> Tensor:
    """An input of a combination, laid out to broadcast against rows (B, H, M, Dv)."""
    if "h_kv" in pattern and x.shape[pattern.index("h_kv")] != 1:
        x = x.repeat_interleave(bound.sizes["h"] // bound.sizes["h_kv"], pattern.index("h_kv"))
    order = sorted(range(len(pattern)), key=lambda i: _AXES[pattern[i]])
    x = x.permute(order)
    held = [_AXES[pattern[i]] for i in order]
    shape = [x.shape[held.index(axis)] if axis in held else 1 for axis in range(len(LOOP_DIMS) - 1)]
    x = x.reshape(shape)
    return x.float() if as_float else x
