"""The reference: the meaning of a variant, in float64 and plain PyTorch. Quadratic, differentiable, the one oracle.

Masked pairs do not exist here: the stages are evaluated on the list of visible pairs only, so that the value of a
formula at masked pairs (log of a negative distance, an infinite bias) cannot reach a result or a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor

from attncc import variants
from attncc.errors import InputError, UnsupportedError
from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.graph import LOOP_DIMS, InputDecl, Stage, VariantGraph
from attncc.ir.hybrid import HybridGraph
from attncc.ir.levels import varies_by_key
from attncc.ir.outputs import Output, Reduction
from attncc.ir.text import formula
from attncc.language.hybrid import Hybrid
from attncc.language.textform import load_toml
from attncc.language.variant import Variant
from attncc.runtime.cells import finish
from attncc.runtime.evaluate import evaluate
from attncc.runtime.recompute import recomputed
from attncc.runtime.recurrence_reference import recurrence
from attncc.runtime.shapes import (
    OUTPUTS,
    REFERENCE_DTYPES,
    Bound,
    auxiliary_names,
    bind,
    output_names,
    read_inputs,
    value_of,
)

#: bisections of a bracket: more than float64 has bits
_HALVINGS = 80


def graph_of(variant: Variant | VariantGraph | str | Path) -> VariantGraph:
    """The graph of a Variant, of a shipped name, or of a TOML file. Raises InputError for anything else."""
    graph = spec_of(variant)
    if isinstance(graph, HybridGraph):
        raise InputError(f"'{graph.name}' is a hybrid, no single variant", remedy="pass one of its parts")
    return graph


def spec_of(variant: Variant | Hybrid | VariantGraph | HybridGraph | str | Path) -> VariantGraph | HybridGraph:
    """The same, of a Hybrid as well."""
    if isinstance(variant, VariantGraph | HybridGraph):
        return variant
    if isinstance(variant, str | Path):
        variant = load_toml(variant) if str(variant).endswith(".toml") else variants.get(str(variant))
    if not isinstance(variant, Variant | Hybrid):
        raise InputError(f"{type(variant).__name__} is no variant", remedy="pass an ac.Variant, a name, or a TOML file")
    return variant.graph


def reference(
    variant: Variant | Hybrid | VariantGraph | HybridGraph | str | Path,
    /,
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    outputs: str | Sequence[str] = ("out",),
    **inputs: Any,
) -> Any:
    """The variant's outputs in float64, with autograd to q, k, v and every float input: a tensor, or a tuple of them.

    `variant` may also be a shipped name or the path of a TOML file.
    q (B, Hq, M, Dqk), k (B, Hkv, N, Dqk), v (B, Hkv, N, Dv) of any float dtype; `out` is (B, Hq, M, Dv), `lse` is
    (B, Hq, M), an auxiliary output as its domain has it. A row that sees no key gives 0, lse = -inf, and zero
    gradients. For a recurrence initial_state, output_final_state and cu_seqlens are what they are for its op, in
    float64. Of a Hybrid, `outputs` may also name parts. Raises InputError for tensors that do not fit, UnsupportedError
    for the lse of a normalizer that has none.
    """
    graph = spec_of(variant)
    if isinstance(graph, HybridGraph):
        exact = (q.double(), k.double(), v.double())  # type: ignore[union-attr]
        results = evaluated(graph, *exact, scale, inputs, outputs, torch.float64)
        return results[0] if len(results) == 1 else results
    v = value_of(graph, k, v)
    if graph.recurrent:
        stateful = {name: inputs.pop(name, None) for name in ("initial_state", "cu_seqlens")}
        keep = inputs.pop("output_final_state", False)
        names = output_names(outputs, graph)
        given = (q.double(), k.double(), v.double(), scale, inputs, names)
        found = _recurrence(graph, *given, torch.float64, **stateful)
        return found if keep else found[0]
    results = evaluated(graph, q.double(), k.double(), v.double(), scale, inputs, outputs, torch.float64)
    return results[0] if len(results) == 1 else results


def evaluated(
    graph: VariantGraph | HybridGraph,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    inputs: Mapping[str, Any],
    outputs: str | Sequence[str],
    number: torch.dtype,
) -> tuple[Tensor, ...]:
    """The outputs by `dense`, with the inputs that they need."""
    if isinstance(graph, HybridGraph):
        rows = _hybrid(graph, q, k, v, scale, inputs, number)
        return tuple(rows[name] for name in ((outputs,) if isinstance(outputs, str) else outputs))
    names = output_names(outputs, graph)
    if graph.recurrent:
        return (_recurrence(graph, q, k, v, scale, inputs, names, number)[0],)
    chosen = graph.select(auxiliary_names(graph, outputs))
    bound = bind(chosen, q, k, v, scale, read_inputs(graph, chosen, inputs), REFERENCE_DTYPES)
    run = dense(chosen, q, k, v, bound, number)
    return tuple(run.named(name) for name in names)


def _hybrid(
    graph: HybridGraph,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    inputs: Mapping[str, Any],
    number: torch.dtype,
) -> dict[str, Tensor]:
    """The rows of each part, by name, and `out`, in which they are combined."""

    def own(part: VariantGraph) -> dict[str, Any]:
        names = [d.name for d in part.inputs] + [s.name for s in part.scalars]
        return {name: inputs[name] for name in names if name in inputs}

    rows: dict[str, Tensor] = {}
    for name, part in graph.parts:
        rows[name] = evaluated(part, q, k, v, scale if part.has_scale else None, own(part), "out", number)[0]
    bound = bind(graph.combine, q, k, v, None, own(graph.combine), REFERENCE_DTYPES)
    env: dict[str, Any] = {**rows, **bound.scalars}
    for decl in graph.combine.inputs:
        env[decl.name] = bound.tensors[decl.name].expand([bound.sizes[dim] for dim in decl.pattern])
    for axis, name in enumerate(("b", "h", "q_idx")):
        shape = [bound.sizes[name] if a == axis else 1 for a in range(4)]
        env[name] = torch.arange(bound.sizes[name], device=q.device).reshape(shape)
    env["h_kv"] = env["h"] // (bound.sizes["h"] // bound.sizes["h_kv"])
    env["num_heads"] = bound.sizes["h"]
    rows["out"] = evaluate(graph.expr, env, number, q.device).to(q.dtype)
    return rows


def _recurrence(
    graph: VariantGraph,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    inputs: Mapping[str, Any],
    names: tuple[str, ...],
    number: torch.dtype,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out and the last state, token after token."""
    if names != ("out",):
        raise UnsupportedError(
            f"'{graph.name}' is a recurrence, whose one output is 'out'", remedy="output_final_state=True has the state"
        )
    bound = bind(graph, q, k, v, scale, inputs, REFERENCE_DTYPES)
    if bound.sizes["q_idx"] != bound.sizes["kv_idx"] or v.shape[1] != k.shape[1]:
        raise InputError("a recurrence has q, k and v of the same tokens, and as many heads of v as of k")
    return recurrence(graph, q, k, v, bound, number, initial_state, cu_seqlens)


@torch.no_grad()
def largest_score(
    variant: Variant | VariantGraph | str | Path,
    /,
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    **inputs: Any,
) -> float:
    """The largest |score| that the mask shows, what rounding in the exponents is proportional to."""
    graph = graph_of(variant)
    v = value_of(graph, k, v)
    core = graph.select(())
    bound = bind(core, q, k, v, scale, read_inputs(graph, core, inputs), REFERENCE_DTYPES)
    return dense(core, q.double(), k.double(), v.double(), bound, torch.float64).largest_score()


def dense(
    graph: VariantGraph, q: Tensor, k: Tensor, v: Tensor, bound: Bound, number: torch.dtype
) -> Dense | DenseBranches:
    """A variant evaluated on every visible pair, in the dtype of q, k, v; `number` is the dtype of index arithmetic."""
    return (Dense if graph.branches == 1 else DenseBranches)(graph, q, k, v, bound, number)


class DenseBranches:
    """A variant with several branches: each has its own part of the last dimension of q, and of k where k has parts."""

    def __init__(self, graph: VariantGraph, q: Tensor, k: Tensor, v: Tensor, bound: Bound, number: torch.dtype):
        self.graph = graph
        dim = q.shape[3] // graph.branches
        keys = k.split(dim, -1) if k.shape[3] > dim else (k,) * graph.branches
        branches = zip(graph.parts, q.split(dim, -1), keys, strict=True)
        self.parts = [Dense(part, own_q, own_k, v, bound, number) for part, own_q, own_k in branches]

    def named(self, name: str) -> Tensor:
        """out, or lse, which there is not."""
        return self.out() if name == "out" else self.lse()

    def largest_score(self) -> float:
        """The largest |score| of all branches."""
        return max(part.largest_score() for part in self.parts)

    def out(self) -> Tensor:
        """(B, Hq, M, Dv): the sum of what the branches give."""
        return torch.stack([part.out() for part in self.parts]).sum(0)

    def lse(self) -> Tensor:
        raise no_lse_of_branches(self.graph)


def no_lse_of_branches(graph: VariantGraph) -> UnsupportedError:
    """The error for `lse` of a variant with several branches, which have one each."""
    return UnsupportedError(
        f"'{graph.name}' has {graph.branches} branches, each with an lse of its own",
        remedy="compile a branch as a variant of its own, for its lse",
    )


class Dense:
    """A variant evaluated on every visible pair, in the dtype of q, k, v. `number` is the dtype of index arithmetic.

    Float inputs are cast to `number` where that is wider than what they have.
    """

    def __init__(self, graph: VariantGraph, q: Tensor, k: Tensor, v: Tensor, bound: Bound, number: torch.dtype):
        self.graph, self.number, self.device = graph, number, q.device
        self.v = v
        sizes = bound.sizes
        b, h, m, n = self.shape = tuple(sizes[d] for d in ("b", "h", "q_idx", "kv_idx"))
        self.h_kv, self.group = sizes["h_kv"], h // sizes["h_kv"]
        self.constants: dict[str, Any] = {
            "scale": bound.scale,
            "q_len": m,
            "kv_len": n,
            "num_heads": h,
            **bound.scalars,
            **{d.name: self._input(d, bound.tensors[d.name], sizes) for d in graph.inputs},
        }
        self.bound = bound
        self.used = {s.name for stage in graph.stages for s in stage.expr.free_symbols}
        self.used |= {s.name for output in graph.outputs for s in output.free_symbols}
        mask = self._mask()
        dead = ~mask.any(-1)
        if graph.dead_rows != "zero":
            mask = mask | dead[..., None]
        #: flat positions: in (B, H, M, N) of the pairs that the mask shows, in (B, H, M) of the rows that see a key
        self.visible = mask.reshape(-1).nonzero().squeeze(1)
        self.live = mask.any(-1).reshape(-1).nonzero().squeeze(1)
        self.row_count = b * h * m
        self.row_of_pair = self.visible // max(n, 1)
        self.pairs: dict[str, Any] = {**self.constants, **self._indices(self.visible, n)}
        if graph.has_dot:
            grouped = q.reshape(b, self.h_kv, self.group, m, q.shape[3])
            self.pairs["qk"] = (grouped @ k.unsqueeze(2).mT).reshape(-1)[self.visible]
        for stage in graph.sums_d:
            self.pairs[stage.name] = self._sum_d(stage, q, k)
        #: (B * H * M) values of each row reduction; those of rows that see no key are never read
        self.rows: dict[str, Tensor] = {}
        for stage in graph.stages:
            if stage.op is None and stage.name != "mask":
                self.pairs[stage.name] = self._on_pairs(stage.expr)
                if stage.name == "score" and graph.dead_rows == "uniform":
                    alike = dead.reshape(-1)[self.row_of_pair]
                    self.pairs["score"] = torch.where(alike, 1.0, self.pairs["score"])
            elif stage in graph.cols:
                self.pairs[stage.name] = self._over_queries(stage)
            elif stage in graph.rows:
                self.rows[stage.name] = self._reduce(stage)
                self.pairs[stage.name] = self.rows[stage.name].index_select(0, self.row_of_pair)

    def named(self, name: str) -> Tensor:
        """An output by its name: out, lse, or an auxiliary one."""
        return getattr(self, name)() if name in OUTPUTS else self.auxiliary(self.graph.output(name))

    def auxiliary(self, output: Output) -> Tensor:
        """An auxiliary output; counts and positions are int64."""
        values = {r.symbol.name: self._cells(output, r) for r in output.reductions}
        return finish(self.graph, output, values, self.bound, self.number)

    def _cells(self, output: Output, reduction: Reduction) -> Tensor:
        """One reduction over the visible pairs of every cell."""
        b, h, m, n = self.shape
        shape = (b, h, *output.domain.shape(m, n))
        cells = torch.zeros(shape, device="meta")
        index = self._indices(self.visible, n, all_names=True)
        env = {**self.pairs, **index}
        at, inside = torch.zeros_like(self.visible), torch.ones_like(self.visible, dtype=torch.bool)
        places = (index["b"], index["h"], *(self._pairwise(e, env) for e in output.domain.cell()))
        for place, size, stride in zip(places, shape, cells.stride(), strict=True):
            inside = inside & (place >= 0) & (place < size)
            at = at + place * stride
        chosen = (inside & self._pairwise(reduction.when, env)).nonzero().squeeze(1)
        at, count = at[chosen], cells.numel()
        if reduction.op == "count":
            return torch.bincount(at, minlength=count).reshape(shape)
        small = voc.maximum(sym.WEIGHT, sympy.Float(2.0**-126))
        values = self._pairwise(reduction.expr.xreplace({sympy.log(sym.WEIGHT): sympy.log(small)}), env)[chosen]
        values = values.to(torch.promote_types(values.dtype, self.number))
        if reduction.op == "sum":
            return values.new_zeros(count).index_add(0, at, values).reshape(shape)
        largest = values.new_full((count,), -torch.inf).scatter_reduce(0, at, values, "amax")
        if reduction.op == "max":
            return largest.reshape(shape)
        best = values == largest[at]
        along = index["kv_idx" if output.domain.kind == "row" else "q_idx"][chosen][best]
        first = at.new_full((count,), max(m, n)).scatter_reduce(0, at[best], along, "amin")
        return torch.where(first == max(m, n), -1, first).reshape(shape)

    def _pairwise(self, expr: Any, env: dict[str, Any]) -> Tensor:
        return evaluate(expr, env, self.number, self.device).expand(self.visible.shape)

    def largest_score(self) -> float:
        """The largest |score| that the mask shows; 0 where it shows none."""
        scores = self.pairs["score"]
        return float(scores.abs().max()) if scores.numel() else 0.0

    def out(self) -> Tensor:
        """(B, Hq, M, Dv): the sum over the keys of the pair's factor times v."""
        b, _, m, n = self.shape
        factor = self.factor()
        dense = self._spread(factor, 0.0).to(self.v.dtype).reshape(b, self.h_kv, self.group, 1, m, n)
        values = self.v.unflatten(1, (self.h_kv, -1)).unsqueeze(2)  # with the heads of v that share a weight
        return (dense @ values).flatten(1, 3)

    @property
    def parts(self) -> tuple[Dense, ...]:
        """The parts that add up to the output: one per branch."""
        return (self,)

    def factor(self) -> Tensor:
        """The factor of v, for each visible pair."""
        return self._on_pairs(self.graph["out"].expr.coeff(sym.V_VEC))

    def lse(self) -> Tensor:
        """(B, Hq, M): the log of the denominator, -inf where a row sees no key."""
        b, h, m, n = self.shape
        values = {name: value[self.live] for name, value in self.rows.items()}
        env = {**self.constants, **self._indices(self.live * n, n), **values}
        value = evaluate(log_denominator(self.graph), env, self.number, self.device).expand(self.live.shape)
        if not value.is_floating_point():  # a constant denominator
            value = value.to(self.number)
        empty = torch.full((b * h * m,), -torch.inf, dtype=value.dtype, device=self.device)
        return empty.index_put((self.live,), value).reshape(b, h, m)

    def _input(self, decl: InputDecl, tensor: Tensor, sizes: dict[str, int]) -> Tensor:
        """An input with its loop dimensions expanded; a dimension of size 1 is broadcast."""
        if tensor.is_floating_point():
            tensor = tensor.to(torch.promote_types(tensor.dtype, self.number))
        return tensor.expand([sizes[d] if d in LOOP_DIMS else -1 for d in decl.pattern])

    def _mask(self) -> Tensor:
        """The mask over all pairs: (B, H, M, N), boolean."""
        env = dict(self.constants)
        for axis, name in enumerate(("b", "h", "q_idx", "kv_idx")):
            size = self.shape[axis]
            env[name] = torch.arange(size, device=self.device).reshape([size if a == axis else 1 for a in range(4)])
        env["h_kv"] = env["h"] // max(self.group, 1)
        return evaluate(self.graph["mask"].expr, env, self.number, self.device).expand(self.shape)

    def _indices(self, flat: Tensor, n: int, all_names: bool = False) -> dict[str, Tensor]:
        """The values of those of b, h, h_kv, q_idx and kv_idx that a stage uses, at flat positions of (B, H, M, N)."""
        h, m, n, group = (max(size, 1) for size in (self.shape[1], self.shape[2], n, self.group))
        formulas = {
            "b": lambda: flat // (n * m * h),
            "h": lambda: flat // (n * m) % h,
            "h_kv": lambda: flat // (n * m) % h // group,
            "q_idx": lambda: flat // n % m,
            "kv_idx": lambda: flat % n,
        }
        return {name: compute() for name, compute in formulas.items() if all_names or name in self.used}

    def _on_pairs(self, expr: Any) -> Tensor:
        return evaluate(expr, self.pairs, self.number, self.device).expand(self.visible.shape)

    def _sum_d(self, stage: Stage, q: Tensor, k: Tensor) -> Tensor:
        """A sum over the head dimension, at every visible pair: one component after the other, as the formula says."""
        m, n = self.shape[2:]
        rows = self.row_of_pair
        cols = (rows // max(m * self.group, 1)) * n + self.visible % max(n, 1)
        total = torch.zeros(self.visible.shape, dtype=self.number, device=self.device)

        def add(total: Tensor, d: int, q_d: Tensor, k_d: Tensor) -> Tensor:
            env = {**self.pairs, "q_vec": q_d.index_select(0, rows), "k_vec": k_d.index_select(0, cols), "d_idx": d}
            return total + evaluate(stage.expr, env, self.number, self.device)

        for d in range(q.shape[3]):
            # recomputed in the backward: the components of every pair would not fit
            components = q[..., d].reshape(-1), k[..., d].reshape(-1)
            total = recomputed(add, total, d, *components, preserve_rng_state=False)
        return total

    def _spread(self, values: Tensor, fill: float) -> Tensor:
        """Values of the visible pairs as rows of N keys, with `fill` for masked ones: (B * H * M, N)."""
        b, h, m, n = self.shape
        if not values.is_floating_point():
            values = values.to(self.number)
        dense = torch.full((b * h * m * n,), fill, dtype=values.dtype, device=self.device)
        return dense.index_put((self.visible,), values).reshape(b * h * m, n)

    def _reduce(self, stage: Stage) -> Tensor:
        if stage.op == "root":
            return self._solve(stage)
        values = self._on_pairs(stage.expr)
        if stage.op == "sum":
            return self._spread(values, 0.0).sum(-1)
        dense = self._spread(values, -torch.inf)
        return dense.amax(-1) if dense.shape[1] else dense.sum(-1)

    def _over_queries(self, stage: Stage) -> Tensor:
        """A reduction over the queries that see a key, at every visible pair."""
        b, h, m, n = self.shape
        column = self.row_of_pair // max(m, 1) * n + self.visible % max(n, 1)
        values = self._on_pairs(stage.expr)
        values = values.to(torch.promote_types(values.dtype, self.number))
        if stage.op == "col_sum":
            return values.new_zeros(b * h * n).index_add(0, column, values)[column]
        return values.new_full((b * h * n,), -torch.inf).scatter_reduce(0, column, values, "amax")[column]

    def _solve(self, stage: Stage) -> Tensor:
        """(B * H * M): the root of a stage's equation, by bisection; its gradient is that of the implicit function.

        The bracket is halved until it cannot be; where both ends have one sign, the root is taken to be the upper end.
        Rows that see no key have 0.
        """
        term, rest, lo, hi = stage.expr.args
        rows = {name: value[self.live] for name, value in self.rows.items()}
        on_rows = {**self.constants, **self._indices(self.live * max(self.shape[3], 1), self.shape[3]), **rows}

        def row(expr: Any, t: Tensor) -> Tensor:
            env = {**on_rows, sym.UNKNOWN.name: t}
            return evaluate(expr, env, self.number, self.device).expand(self.live.shape)

        def total(t: Tensor, term: Any, rest: Any) -> Tensor:
            spread = torch.zeros(self.row_count, dtype=t.dtype, device=self.device).index_put((self.live,), t)
            env = {**self.pairs, sym.UNKNOWN.name: spread.index_select(0, self.row_of_pair)}
            values = evaluate(term, env, self.number, self.device).expand(self.visible.shape)
            return self._spread(values, 0.0).sum(-1)[self.live] + row(rest, t)

        with torch.no_grad():
            t = torch.zeros(self.live.shape, dtype=self.number, device=self.device)
            low, high = row(lo, t).to(self.number), row(hi, t).to(self.number)
            slopes = term.diff(sym.UNKNOWN), rest.diff(sym.UNKNOWN)
            slope = total(low, *slopes)
            rising = (slope > 0) | ((slope == 0) & (total(low, term, rest) < 0))
            for _ in range(_HALVINGS):
                t = (low + high) / 2
                low_side = (total(t, term, rest) < 0) == rising
                low, high = torch.where(low_side, t, low), torch.where(low_side, high, t)
            t = (low + high) / 2
            slope = total(t, *slopes)
        residual = total(t, term, rest)
        # at the root the residual is 0, and only its gradient is left
        t = t - torch.where(slope == 0, 0.0, (residual - residual.detach()) / slope)
        return torch.zeros(self.row_count, dtype=t.dtype, device=self.device).index_put((self.live,), t)


def log_denominator(graph: VariantGraph) -> sympy.Expr:
    """lse as an expression of row values: log Z, where the weight is a(pair) * exp(x(pair)) / Z.

    With the weight as a product, its factors that are the same for a whole row are G, and the exponent is x minus M,
    which is the same for a whole row: Z = exp(M) / G. Raises UnsupportedError where no row reduction is part of it, or
    where there is one of each branch.
    """
    if graph.branches > 1:
        raise no_lse_of_branches(graph)
    stage = graph["weight"]
    for weight in (stage.expr, sympy.factor_terms(stage.expr), sympy.factor(stage.expr)):
        factors = sympy.Mul.make_args(weight)
        row_factors = [f for f in factors if not varies_by_key(f)]
        pair_factors = [f for f in factors if varies_by_key(f)]
        exponents = [sympy.expand(f.args[0]) for f in pair_factors if isinstance(f, sympy.exp)]
        terms = [t for e in exponents for t in sympy.Add.make_args(e)]
        shift = -sympy.Add(*(t for t in terms if not varies_by_key(t)))
        rest = [f for f in pair_factors if not isinstance(f, sympy.exp)] + [t for t in terms if varies_by_key(t)]
        if any(_names(f) & {s.name for s in graph.rows} for f in rest):
            continue  # a row reduction is tied to the pair in another way than as a factor or a shift
        # the sign of a constant is the weight's own
        result = shift - sympy.Add(*(sympy.log(abs(f) if f.is_number else f) for f in row_factors))
        if _names(result) & {s.name for s in graph.rows}:
            return result
        break
    raise UnsupportedError(
        "this normalizer has no row statistic, and so no lse",
        stage="normalizer",
        span=stage.span,
        remedy=f"lse is the log of a row's denominator; the weight is {formula(stage.expr)}",
    )


def _names(expr: Any) -> set[str]:
    return {s.name for s in expr.free_symbols}
