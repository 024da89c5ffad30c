"""Linear attention: from a chunk plan (the form of `passes.linearize`) and head dimensions to the source of a module.

One kernel does all the work. With s the decay between tokens, linear attention is

    scan(a, b, c)_i = sum over the tokens j that i sees of (a_i . b_j) s_ij c_j

and its gradients are the same sum over other operands, where the state holds the tokens before or after a token:

    out = scan(q, k, v)       dq = scan(dout, v, k)       dk = scan'(v, dout, q)       dv = scan'(k, q, dout)

with scan' from the last token to the first. Each is rendered from one template, with its own factors of tokens. A
sequence is cut into segments that run in parallel: first the sum that each adds to the state (`states`, `dstates`),
then the state at the start of each segment (`link`), so that no state of a chunk is ever stored.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import sympy

from attncc.codegen.chunk_module import Tile, header
from attncc.codegen.lower import Leaf, Lowering
from attncc.codegen.render import environment, tidy
from attncc.ir import symbols as sym
from attncc.ir.graph import VariantGraph
from attncc.ir.levels import Level
from attncc.passes.calculus import derivative
from attncc.passes.fold import lower_exp
from attncc.passes.linearize import TOTAL, Linear

#: first numbers of the names in maps of tiles, above those in the tiles of q and k
_NAMES = {"choice": 8, "power": 8, "smaller": 8, "larger": 8, "product": 8, "shifted": 8}


@dataclass(frozen=True)
class MappedTile(Tile):
    """A tile of head `head`, mapped by `lines` to `text` if at all."""

    head: str
    lines: tuple[str, ...] | None = None
    text: str = ""


@dataclass(frozen=True)
class Role:
    """One use of the scan, out_i = sum_j (a_i . b_j) s_ij c_j. `rows`: the factors of tokens that it loads; a_row,
    b_row, c_row: the factors of its operands.

    lift: the operands have one more feature, alpha for a and beta for b (1 each unless the plan has a bias).
    total: the row sums are stored. last: the state's column for the constant value 1.
    contracted: the sum over features is multiplied by `constant`. In reverse, `scaled` has it instead, as part of the
    query's factor, because the gradient of the state contains it, too.
    channel: each feature has a decay of its own. diagonal: a token's own product has a factor per feature.

    own: the vector whose gradient the result is. product: the product of the features with it is stored, per token.
    steps: so is the gradient of the decay's steps, for which the states between chunks are kept, `kept_size` values
    each. Finally the result is multiplied by `settled` and, if `scaled_later`, by `constant`. inner: the term of the
    row totals is computed from the result itself, in programs that have all of its columns."""

    name: str
    doc: str
    out: str
    a: MappedTile
    b: MappedTile
    c: MappedTile
    reverse: bool
    decay: bool
    rows: tuple[str, ...]
    state_row: int
    state_col: int
    state_size: int
    row_size: int
    contracted: bool = False
    scaled: str = ""
    a_row: str = ""
    b_row: str = ""
    c_row: str = ""
    lift: bool = False
    alpha: str = ""
    beta: str = "1.0"
    total: bool = False
    last: str = ""
    product: bool = False
    steps: bool = False
    kept_size: int = 0
    settled: str = ""
    inner: bool = False
    scaled_later: bool = False
    own: MappedTile | None = None
    channel: bool = False
    diagonal: bool = False
    epilogue: tuple[str, ...] = ()

    @property
    def rows_of_step(self) -> tuple[str, ...]:
        """The factors of tokens, with each token's own step instead of the decay since its chunk began."""
        return tuple("step" if name == "run" else name for name in self.rows)

    @property
    def alpha_pair(self) -> str:
        """The term of the constant feature in a pair, as text."""
        left = f"{self.alpha}[:, None]" if self.alpha else ""
        right = f"{self.beta}[None, :]" if self.beta != "1.0" else ""
        return " * ".join(x for x in (left, right) if x)

    @property
    def alpha_state(self) -> str:
        """The term of the constant feature in the read of the state, as text."""
        return f"{self.alpha}[:, None] * lifted[None, :]" if self.alpha else "lifted[None, :]"

    @property
    def alpha_count(self) -> str:
        """The term of the constant feature in the column of the constant value 1, as text."""
        return f"{self.alpha} * count"


@dataclass
class LinearSlots:
    """The template slots of one plan at its head dimensions. Only `helpers`, the functions that the text calls,
    grows."""

    graph: VariantGraph
    plan: Linear
    d_qk: int
    d_v: int
    helpers: set[str] = field(default_factory=set)

    @property
    def extra(self) -> tuple[int, int]:
        """Rows and columns of the state for the constant feature 1 and the constant value 1: 0 or 1 each."""
        return int(self.plan.bias is not None), int(self.plan.total)

    @property
    def runs(self) -> bool:
        """Whether all channels share one decay that differs by token, so that chunks need its running sum."""
        return self.plan.decay not in ("none", "channel") and not self.plan.alike

    @property
    def state_shape(self) -> tuple[int, int]:
        """The number of features and values of the state."""
        return self.d_qk + self.extra[0], self.d_v + self.extra[1]

    @property
    def plain_diagonal(self) -> bool:
        """Whether a token's own product q.k is one of the pairs, without a factor."""
        return not self.plan.late or self.plan.diagonal == 1

    @property
    def has_diagonal(self) -> bool:
        """Whether a token's own product has a factor per channel."""
        return self.plan.diagonal not in (None, 1)

    @property
    def diagonal_by_token(self) -> bool:
        """Whether that factor differs by token."""
        return self.plan.diagonal is not None and sym.KV_IDX in self.plan.diagonal.free_symbols

    def tiles(self) -> dict[str, MappedTile]:
        """q, k, v, do as the kernels read them; q and k are features if there is a feature map."""
        return {
            "q": MappedTile("q", self.d_qk, "h"),
            "k": MappedTile("k", self.d_qk, "h_kv"),
            "v": MappedTile("v", self.d_v, "h_kv"),
            "do": MappedTile("do", self.d_v, "h"),
        }

    def features(self) -> dict[str, MappedTile]:
        """The tiles of q and k that have a feature map, with the lines that compute it."""
        names: Counter[str] = Counter()
        sides = (("q", self.plan.left, sym.Q_VEC), ("k", self.plan.right, sym.K_VEC))
        return {n: self._mapped(self.tiles()[n], map_, vector, names) for n, map_, vector in sides if map_ != vector}

    def _mapped(
        self, tile: MappedTile, expr: sympy.Expr, vector: sympy.Symbol, names: Counter[str], leaf: str | None = None
    ) -> MappedTile:
        if expr == vector:
            return tile
        lines, text = self._tile(expr, vector, leaf or f"{tile.name}_raw", names)
        return replace(tile, lines=lines, text=text)

    def _tile(
        self, expr: sympy.Expr, vector: sympy.Symbol, leaf: str, names: Counter[str]
    ) -> tuple[tuple[str, ...], str]:
        """Lines that compute a vector expression over the tile `leaf`, and its text."""
        leaves = {vector.name: Leaf(leaf, Level.PAIR)}
        scope = Lowering(self.graph, leaves, helpers=self.helpers, blank=f"tl.zeros_like({leaf})", _names=names)
        lowered = lower_exp(expr)
        scope.count([lowered])
        text = scope.tile(lowered)
        return (*scope.outer, *scope.body), text

    def rows(self, *names: str) -> tuple[str, ...]:
        """The given factors of tokens without empty ones, and the decay: since the chunk began, or of a step if all
        steps are equal."""
        decay = "" if self.plan.decay == "none" else "step" if self.plan.alike else "run"
        return tuple(n for n in (*names, decay) if n)

    def row(self, name: str) -> str:
        """The factor of tokens of this name, or "" if the plan has none."""
        known = {
            "row": self.plan.row != 1,
            "col": self.plan.col != 1,
            "weight": self.plan.total,
            "alpha": self.plan.bias is not None,
            "beta": self.plan.bias is not None,
            "dtotal": self.plan.total,
            "slope": self.plan.total and self.plan.bias is None,
            "gain": self.plan.gain != 1,
        }
        return name if known[name] else ""

    @property
    def strides(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The strides of the state in memory: as in the forward's scan, with a row per feature, and transposed, with a
        column per feature, for scans whose result has features."""
        size_q, size_v = self.state_shape
        common: dict[str, Any] = {
            "decay": self.plan.decay != "none",
            "state_size": size_q * size_v,
            "row_size": size_v,
        }
        return {"state_row": size_v, "state_col": 1, **common}, {"state_row": 1, "state_col": size_v, **common}

    @property
    def scaled(self) -> str:
        """The query's factor times the plan's constant, as text; "" if the constant is 1."""
        if self.plan.constant == 1:
            return ""
        row = self.row("row")
        return f"{row} * constant" if row else "tl.where(live, constant, 0.0)"

    def roles(self, backward: bool = True) -> dict[str, Role]:
        """The uses of the scan, by kernel; with `backward` False only those of the forward."""
        forward = self._forward()
        rows = self.rows(self.row("col"), self.row("beta"))
        states = replace(forward, name="states", doc="The sum that each segment adds to the state.", rows=rows)
        found = {"forward": forward, "states": states}
        if not backward:
            return found
        found["dq"] = self._to_vector(self._dq(), "q", sym.Q_VEC, self.row("row"))
        found["dk"] = self._to_vector(self._dk(), "k", sym.K_VEC, self.row("col"))
        found["dv"] = self._dv()
        rows = self.rows(*(self.row(name) for name in ("weight", "row", "alpha", "dtotal")))
        found["dstates"] = replace(
            found["dv"],
            name="dstates",
            doc="The sum that each segment adds to the gradient of the state, from the last token to the first.",
            rows=rows,
            last=self.row("dtotal"),
        )
        return found

    def _forward(self) -> Role:
        tiles, total = self.tiles(), self.plan.total
        row, col, alpha, beta, gain = (self.row(name) for name in ("row", "col", "alpha", "beta", "gain"))
        return Role(
            name="forward",
            doc="out, by chunks of tokens with a state between them.",
            out="out",
            a=tiles["q"],
            b=tiles["k"],
            c=tiles["v"],
            reverse=False,
            rows=self.rows(row, col, alpha, beta, gain),
            contracted=True,
            a_row=row,
            b_row=col,
            lift=self.plan.bias is not None,
            alpha=alpha,
            beta=beta or "1.0",
            total=total,
            last="1.0" if total else "",
            epilogue=self._gained(),
            **self.strides[0],
        )

    def _dq(self) -> Role:
        """The gradient of q's features."""
        tiles = self.tiles()
        weight, row, col, dtotal, slope = (self.row(name) for name in ("weight", "row", "col", "dtotal", "slope"))
        return Role(
            name="dq",
            doc="The gradient of q: the forward's sum over k, with dout.v as the weights.",
            out="dq",
            a=tiles["do"],
            b=tiles["v"],
            c=tiles["k"],
            reverse=False,
            rows=self.rows(weight, row, col, dtotal, slope),
            a_row=weight,
            c_row=col,
            inner=bool(slope),
            lift=self.plan.total,
            alpha=dtotal,
            **self.strides[1],
        )

    def _dk(self) -> Role:
        """The gradient of k's features."""
        tiles = self.tiles()
        weight, row, col, dtotal = (self.row(name) for name in ("weight", "row", "col", "dtotal"))
        return Role(
            name="dk",
            doc="The gradient of k: a sum over the queries after a token.",
            out="dk",
            a=tiles["v"],
            b=tiles["do"],
            c=tiles["q"],
            reverse=True,
            rows=self.rows(weight, row, col, dtotal),
            scaled=self.scaled,
            b_row=weight,
            c_row="scaled" if self.scaled else row,
            lift=self.plan.total,
            beta=dtotal or "1.0",
            **self.strides[1],
        )

    def _dv(self) -> Role:
        tiles = self.tiles()
        weight, row, col, alpha, beta = (self.row(name) for name in ("weight", "row", "col", "alpha", "beta"))
        return Role(
            name="dv",
            doc="The gradient of v: the forward's sum, from the last token to the first.",
            out="dv",
            a=tiles["k"],
            b=tiles["q"],
            c=tiles["do"],
            reverse=True,
            rows=self.rows(weight, row, col, alpha, beta),
            scaled=self.scaled,
            a_row=col,
            b_row="scaled" if self.scaled else row,
            c_row=weight,
            lift=self.plan.bias is not None,
            alpha=beta,
            beta=alpha or "1.0",
            **self.strides[0],
        )

    def _to_vector(self, role: Role, side: str, vector: sympy.Symbol, factor: str) -> Role:
        """The gradient of q or k (`side`) from that of its features: through its factor of tokens and its feature map.
        With a decay or a factor, also the products with the vector, from which their gradients are computed."""
        plan = self.plan
        map_ = plan.left if side == "q" else plan.right
        own = self._mapped(MappedTile("own", self.d_qk, self.tiles()[side].head), map_, vector, Counter(_NAMES), "own")
        decays, constant = plan.decay != "none", plan.constant != 1
        lines = self._settled(own, map_, vector, factor)
        if side == "q" and constant:
            lines = ("out = out * constant", *lines)
        needs_vector = decays or bool(factor) or map_ != vector or role.inner
        return replace(
            role,
            product=bool(factor),
            steps=decays,
            kept_size=self.state_shape[1] * self.d_qk,
            settled=factor,
            scaled_later=constant,
            own=own if needs_vector else None,
            epilogue=lines,
        )

    def channel_roles(self) -> dict[str, Role]:
        """The roles if each channel has its own decay. Scans that sum over features have the decay in their operands,
        `asked` and `left`; scans whose result has features split chunks in halves."""
        tiles, plan = self.tiles(), self.plan
        asked, left = MappedTile("asked", self.d_qk, "h"), MappedTile("left", self.d_qk, "h")
        made = {"q": asked, "k": left}
        by_rows, by_cols = self.strides
        scaled = plan.constant != 1
        found = {}
        for name, kept in self.roles().items():
            alike: dict[str, Any] = {"name": name, "doc": kept.doc, "out": kept.out, "reverse": kept.reverse}
            if name in ("dq", "dk"):
                found[name] = Role(
                    **{**alike, "a": kept.a, "b": kept.b, "c": kept.c, **by_cols},
                    channel=True,
                    rows=("step",),
                    contracted=scaled and name == "dq",
                    scaled="constant" if scaled and name == "dk" else "",
                    steps=True,
                    kept_size=self.state_shape[1] * self.d_qk,
                    own=MappedTile("own", self.d_qk, tiles[name[1]].head),
                    diagonal=self.has_diagonal,
                )
                continue
            rows = ("through",) if name in ("states", "dstates") else ("pair", "through")
            own = {"a": made.get(kept.a.name, kept.a), "b": made.get(kept.b.name, kept.b), "c": kept.c}
            found[name] = Role(**{**alike, **own, **by_rows}, rows=rows)
        return found

    def full_roles(self) -> dict[str, Role]:
        """The roles without a mask: one state of all tokens of one side, read by each token of the other.

        The factors of the summed side are part of the state.
        """
        row, col, weight, gain = (self.row(name) for name in ("row", "col", "weight", "gain"))
        alpha, beta, dtotal = (self.row(name) for name in ("alpha", "beta", "dtotal"))
        own = {
            "forward": self.rows(row, alpha, gain),
            "dq": self.rows(weight, row, dtotal),
            "dk": self.rows(col),
            "dv": self.rows(col, beta),
        }
        found = self.roles()
        return {name: replace(role, rows=own.get(name, role.rows)) for name, role in found.items()}

    def _gained(self) -> tuple[str, ...]:
        """Lines from the sum of weighted values to `out`."""
        lines: list[str] = []
        factors = []
        if self.plan.total:
            scope = Lowering(self.graph, {TOTAL.name: Leaf("total", Level.ROW)}, helpers=self.helpers)
            lowered = lower_exp(self.plan.scale)
            scope.count([lowered])
            text = scope.hoisted(lowered)
            lines += [*scope.outer, *scope.body]
            factors.append(text)
        if self.plan.gain != 1:
            factors.append("gain")
        lines += [f"out = out * {factor}[:, None]" for factor in factors]
        return tuple(lines)

    def _settled(self, own: MappedTile, map_: sympy.Expr, vector: sympy.Symbol, factor: str) -> tuple[str, ...]:
        """Lines from the gradient of the features to that of the vector, which also store their product with it."""
        lines: list[str] = []
        if factor:
            place = "PRODUCT_PTR + _wide(block) * stride_product + line + t"
            text = own.text if own.lines is not None else "own"
            lines.append("if WANT_PRODUCT:")
            lines += [f"    {line}" for line in own.lines or ()]
            lines.append(f"    tl.store({place}, tl.sum({text} * out, 1), mask=live)")
            lines.append(f"out = out * {factor}[:, None]")
        if map_ != vector:
            found, text = self._tile(derivative(map_, vector), vector, "own", Counter(_NAMES))
            lines += [*found, f"out = out * ({text})"]
        return tuple(lines)


def _stepwise(slots: LinearSlots, forward: Role, features: dict[str, MappedTile]) -> Role:
    """The forward token by token, which maps each token to its features itself, and applies its decay step."""
    tiles = {**slots.tiles(), **features}
    channel = slots.plan.decay == "channel"
    return replace(forward, a=tiles["q"], b=tiles["k"], channel=channel, rows=("step",) if channel else forward.rows)


def render_linear(graph: VariantGraph, plan: Linear, d_qk: int, d_v: int) -> str:
    """The module's source. Sizes and schedules are arguments of its functions."""
    slots = LinearSlots(graph, plan, d_qk, d_v)
    channel = plan.decay == "channel"
    roles = slots.channel_roles() if channel else slots.roles() if plan.causal else slots.full_roles()
    states = f"linear_{'channel_' if channel else ''}states.py.j2"
    scans = dict.fromkeys(("forward", "dq", "dk", "dv"), "linear_scan.py.j2")
    if channel:
        scans = {name: f"linear_channel{'' if name in ('dq', 'dk') else '_carry'}.py.j2" for name in scans}
    env = environment()
    sizes: dict[str, Any] = {
        "d_qk": d_qk,
        "d_v": d_v,
        "width_v": slots.tiles()["v"].width,
        "tma": False,
        "channel": channel,
    }
    context = {**sizes, "slots": slots, "plan": plan, "roles": roles, "runs": slots.runs}

    def text(template: str, role: str = "") -> str:
        return str(env.get_template(template).render({**context, "r": roles[role]} if role else context))

    context["mapped"] = features = slots.features()
    roles["step"] = _stepwise(slots, roles["forward"], features)
    maps = [str(env.get_template("linear_features.py.j2").render({**context, "x": x})) for x in features.values()]
    parts = [*maps, text("linear_runs.py.j2")] if context["runs"] else maps
    parts += [text("linear_channel_prepare.py.j2", "step")] if channel else []
    parts += [text(states, name) for name in ("states", "dstates")]
    if plan.causal:
        parts += [text("linear_link.py.j2"), *(text(scan, name) for name, scan in scans.items())]
        parts.append(text("linear_step.py.j2", "step"))
    else:
        parts += [text("linear_apply.py.j2", name) for name in ("forward", "dq", "dk", "dv")]
    if plan.total:
        parts.append(text("linear_delta.py.j2"))
    parts.append(text("linear_host.py.j2" if plan.causal else "linear_full_host.py.j2"))
    if plan.product is not None:
        parts.append(text("linear_own.py.j2"))
    slots.helpers |= {"_expm1"} if plan.decay != "none" else set()
    slots.helpers |= {"_bounded"} if channel or slots.runs or plan.alike else set()
    slots.helpers |= {"_summed"} if channel else set()
    parts.insert(0, env.get_template("helpers.py.j2").render({**context, "helpers": slots.helpers}))
    parts.insert(0, header(graph, "Attention in linear time for", "linear form", plan.proof, d_qk, d_v))
    return tidy("\n\n\n".join(p.strip("\n") for p in parts) + "\n")
