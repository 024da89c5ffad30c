"""Random specs: a hypothesis strategy over the grammar of the text form, with shapes and inputs at which to run them.

A drawn spec is a TOML text, so that a failure prints as a file that `attncc verify` takes. Formulas are continuous in
the score and well conditioned: what a kernel gets wrong is wrong, and no accident of rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import reject
from hypothesis import strategies as st

import attncc as ac
from attncc.errors import SpecError
from attncc.runtime.samples import Shape

Draw = Callable[[Any], Any]

#: inputs by name: index pattern, dtype, and how a formula reads one number of it
INPUTS: dict[str, tuple[list[str], str, tuple[str, ...]]] = {
    "slope": (["h"], "float", ("slope[h]",)),
    "shared": (["h_kv"], "float", ("shared[h_kv]",)),
    "number": ([], "float", ("number",)),
    "by_key": (["b", "kv_idx"], "float", ("by_key[b, kv_idx]", "by_key[b, kv_idx - 1]")),
    "row_bias": (["b", "h", "q_idx"], "float", ("row_bias[b, h, q_idx]",)),
    "near": (
        ["h", "distance"],
        "float",
        ("near[h, minimum(abs(q_idx - kv_idx), 7)]", "near[h, q_idx - kv_idx + 5]", "near[h, (kv_idx - q_idx) % 6]"),
    ),
    "table": (["bucket"], "float", ("table[(q_idx + 2 * kv_idx) % 7]", "table[8 * (q_idx % 3) + kv_idx // 4]")),
    "dense": (["b", "h", "q_idx", "kv_idx"], "float", ("dense[b, h, q_idx, kv_idx]",)),
    "by_doc": (["b", "docs"], "float", ("by_doc[b, doc[b, kv_idx]]", "by_doc[b, doc[b, q_idx] + doc[b, kv_idx]]")),
    "doc": (["b", "kv_idx"], "int", ("doc[b, kv_idx]",)),
    "length": (["b"], "int", ("length[b]",)),
}
SCALARS = {"cap": 2.5, "window": 5}
_FLOATS = tuple(name for name, (_, dtype, _) in INPUTS.items() if dtype == "float")
_POSITION = "(q_idx + kv_len - q_len)"

#: functions of the score that are continuous, and do not grow faster than it
_MODIFIERS = (
    "{s}",
    "-({s})",
    "0.7 * ({s})",
    "3 * tanh(({s}) / 3)",
    "cap * tanh(({s}) / cap)",
    "maximum({s}, 0.5)",
    "minimum({s}, 1.5) * 0.5",
    "abs({s})",
    "relu({s}) - 0.5",
    "gelu({s})",
    "silu({s}) * 2",
    "softplus({s})",
    "sin({s})",
    "erf({s}) + 0.1 * ({s})",
    "({s}) * sigmoid({s})",
    "({s}) / (1 + h)",
    "({s}) * float(1 + kv_idx % 3)",
    "({s}) * kv_idx / kv_len",
    "where({c}, {s}, 0.3 * ({s}))",
    "({s}) - 0.1 * abs(q_idx - kv_idx)",
    "({s}) + {x}",
    "({s}) + {x} * (kv_idx - q_idx) * 0.1",
    "({s}) * {x}",
    "({s}) * (1 + 0.5 * tanh({x}))",
    "({s}) + 0.5 * {x} * {y}",
    "({s}) - log(1 + exp({x}))",
)
_NORMALIZERS = (
    "softmax",
    "softmax",
    "softmax1",
    "cog",
    "taylor",
    "sigmoid",
    "relu",
    "sigmoid(score)",
    "softplus(score) / row.count()",
    "exp(-score ** 2)",
    "erf(score)",
    "p = exp(score - row.max(score))\np / sqrt(row.sum(p * p))",
    "p = exp(score - row.max(score))\np / (row.sum(p) + exp(-row.max(score)))",
    "p = exp(2 * score - 2 * row.max(score))\np / row.sum(p)",
    "p = exp(score - row.max(score))\np * p / row.sum(p * p)",
    "p = exp(score - row.max(score)) * (1 + sigmoid(score))\np / row.sum(p)",
    "p = exp(row.min(score) - score)\np / row.sum(p)",
    "p = 1 + abs(score)\np / row.sum(p)",
    "score ** 2 / (row.sum(score ** 2) + 1)",
    "p = exp(score - row.max(score))\np * (1 + 0.3 * {x}) / row.sum(p)",
    "m = maximum(row.max(score), {r})\np = exp(score - m)\np / (row.sum(p) + exp({r} - m))",
    "p = exp(score - row.max(score)) * (1 + {j} ** 2)\np / row.sum(p)",
    "relu(score) ** 2 / (1 + {r} ** 2)",
)
#: those that take several passes, or a gradient through row statistics
SEVERAL_PASSES = (
    "relu(score - row.mean(score))",
    "relu(score - row.max(score) + 1)",
    "entmax15",
    "sparsemax",
    "score / maximum(abs(row.sum(score)), 1)",
    "score / detach(maximum(row.sum(abs(score)), 1))",
    "p = exp(score - row.max(score))\nkept = relu(p / row.sum(p) - 0.05)\nkept / (row.sum(kept) + 0.1)",
    "low = row.min(score)\nx = (score - low) / (row.max(score) - low + 0.3)\nx / (row.sum(x) + 1)",
    "p = exp(score - {r})\np / (1 + row.sum(p))",
    "top = row.max(score)\nt = row.root(lambda t: row.sum(sigmoid(2 * (score - t))) - 0.7, top - 9, top + 9)\n"
    "sigmoid(2 * (score - t))",
)
#: those over the queries, and some of rows for which rows without keys matter
OVER_QUERIES = (
    "p = exp(score - col.max(score))\np / col.sum(p)",
    "p = exp(score - col.max(score))\ns = p / col.sum(p) + 0.01\ns / row.sum(s)",
    "p = exp(score - col.max(score))\ns = p / col.sum(p)\nq = exp(s - row.max(s))\nq / row.sum(q)",
    "p = sigmoid(score)\np / col.sum(p)",
    "relu(score) / (1 + col.sum(relu(score)))",
    "softmax",
    "sigmoid",
    "cog",
)
_REDUCTIONS = (
    *("weight * v_vec",) * 5,
    "weight / (1 + kv_idx) * v_vec",
    "where({c}, 1, -0.5) * weight * v_vec",
    "weight * (1 + {k}) * v_vec",
    "weight * sigmoid({r}) * v_vec",
)
#: what is one value a row or a head, and what is one a key: where no other may stand
_OF_ROWS = ("slope", "shared", "number", "row_bias")
_OF_KEYS = ("slope", "number", "by_key")


@dataclass
class Spec:
    """A drawn variant as text, and the call that it is tried at."""

    toml: str
    shape: Shape
    seed: int
    variant: ac.Variant = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.variant = ac.loads_toml(self.toml)

    def __repr__(self) -> str:
        return f"Spec('''\n{self.toml}''', {self.shape}, seed={self.seed})"


class _Writer:
    """Draws the pieces of one spec, and remembers which inputs they read."""

    def __init__(self, draw: Draw, most_inputs: int):
        self.draw, self.used, self.most = draw, set[str](), most_inputs

    def one(self, choices: Any) -> Any:
        return self.draw(st.sampled_from(tuple(choices)))

    def read(self, names: tuple[str, ...] = _FLOATS) -> str:
        """A number of some input; of one that is read already, if there are enough."""
        floats = [n for n in self.used if n in _FLOATS]
        allowed = names if len(floats) < self.most else [n for n in names if n in floats]
        if not allowed:
            return self.one(("0.4", "1.3"))
        text = self.one(INPUTS[self.one(allowed)][2])
        self.used |= {name for name in INPUTS if f"{name}[" in text or name == text}
        return str(text)

    def fill(self, template: str, s: str = "") -> str:
        """A template's blanks: s a score, c a condition, x and y any input, r one of rows, k one of keys, j one that
        differs between keys: what all have would cancel, and its gradient be rounding alone."""
        blanks: dict[str, Callable[[], str]] = {
            "s": lambda: s,
            "c": lambda: self.condition(1),
            "x": self.read,
            "y": self.read,
            "r": lambda: self.read(_OF_ROWS),
            "k": lambda: self.read(_OF_KEYS),
            "j": lambda: self.read(("by_key",)),
        }
        return template.format(**{name: make() for name, make in blanks.items() if f"{{{name}}}" in template})

    def term(self) -> str:
        """An integer."""
        base = self.one(("q_idx", "kv_idx", "q_idx - kv_idx", "2 * kv_idx - q_idx", "kv_idx - q_idx", _POSITION))
        shifted = f"({base} + {self.draw(st.integers(-6, 6))})"
        return shifted if self.draw(st.booleans()) else f"({shifted} // {self.draw(st.integers(1, 5))})"

    def atom(self) -> str:
        kind = self.draw(st.integers(0, 9))
        small = self.draw(st.integers(-6, 6))
        if kind <= 2:
            relation = self.one(("<", "<=", ">", ">=", "==", "!="))
            return f"{self.term()} {relation} {self.term() if self.draw(st.booleans()) else small}"
        if kind == 3:
            return f"{self.term()} % {self.draw(st.integers(2, 4))} == {self.draw(st.integers(0, 1))}"
        if kind == 4:
            return f"abs({self.term()}) < {abs(small) + 1}"
        if kind == 5:
            return f"h < {self.draw(st.integers(0, 2))}"
        if kind == 6:
            self.used.add("doc")
            return f"doc[b, {_POSITION}] {self.one(('==', '>=', '!='))} doc[b, kv_idx]"
        if kind == 7:
            self.used.add("length")
            return f"kv_idx < length[b] + {small}"
        if kind == 8:
            return f"{_POSITION} - kv_idx < window"
        return f"kv_idx <= {_POSITION} + {small}"

    def condition(self, depth: int) -> str:
        kind = self.draw(st.integers(0, 5)) if depth else 0
        if kind <= 2:
            return self.atom()
        if kind == 3:
            return f"(not ({self.condition(depth - 1)}))"
        joined = " and " if kind == 4 else " or "
        return f"({self.condition(depth - 1)}{joined}{self.condition(depth - 1)})"


@st.composite
def specs(
    draw: Draw,
    longest: int = 24,
    most_inputs: int = 2,
    normalizers: tuple[str, ...] = _NORMALIZERS,
    dead_rows: tuple[str, ...] = (),
) -> Spec:
    """A variant, sizes up to `longest` tokens, and a seed for the numbers; `dead_rows` are policies to choose from."""
    writer = _Writer(draw, most_inputs)
    score = "score"
    for _ in range(draw(st.integers(0, 3))):
        score = writer.fill(writer.one(_MODIFIERS), score)
    stages = {
        "score": score,
        "mask": writer.condition(2) if draw(st.integers(0, 3)) else "True",
        "normalizer": writer.fill(writer.one(normalizers)),
        "reduction": f"row.sum({writer.fill(writer.one(_REDUCTIONS))})",
    }
    grads = {name: dtype == "float" and draw(st.integers(0, 4)) > 0 for name, (_, dtype, _) in INPUTS.items()}
    shape, number = draw(shapes(longest)), draw(st.integers(0, 5))
    declared = writer.used | {name for name in SCALARS if name in "\n".join(stages.values())}
    policy = f'dead_rows = "{writer.one(dead_rows)}"\n' if dead_rows else ""
    try:
        return Spec(policy + _toml(stages, declared, grads), shape, number)
    except SpecError as error:
        # algebra may have no use for what a text reads: kv_idx < length[b] or not (kv_idx < length[b])
        if "is declared but no stage reads it" not in error.reason:
            raise
        reject()


def _toml(stages: dict[str, str], declared: set[str], grads: dict[str, bool]) -> str:
    lines = ["[stages]", *(f"{name} = {json.dumps(text)}" for name, text in stages.items())]
    inputs = [name for name in INPUTS if name in declared]
    lines += ["[inputs]"] if inputs else []
    for name in inputs:
        pattern, dtype, _ = INPUTS[name]
        grad = ", grad = true" if grads[name] else ""
        lines.append(f'{name} = {{ index = {json.dumps(pattern)}, dtype = "{dtype}"{grad} }}')
    scalars = [name for name in SCALARS if name in declared]
    lines += ["[scalars]", *(f"{name} = {SCALARS[name]}" for name in scalars)] if scalars else []
    return "\n".join(lines) + "\n"


@st.composite
def shapes(draw: Draw, longest: int = 24) -> Shape:
    """Small sizes of a call: lengths that differ, grouped heads, any head dimension, views, broadcast inputs."""
    kv_heads = draw(st.integers(1, 2))
    group = draw(st.sampled_from((1, 1, 2, 3)))
    return Shape(
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        q_len=draw(st.integers(1, longest)),
        kv_len=draw(st.integers(1, longest)),
        d_qk=draw(st.sampled_from((4, 8, 16, 24))),
        d_v=draw(st.sampled_from((4, 8, 16, 20))),
        strided=draw(st.booleans()),
        broadcast=draw(st.sampled_from(((), (), ("b",), ("h",), ("b", "q_idx"), ("kv_idx",)))),
    )
