"""`attncc.compile`: create the operator of a variant, with the plans it has."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from attncc.collector import held
from attncc.errors import InputError, SpecError, UnsupportedError, calling_line, warn
from attncc.ir.graph import VariantGraph
from attncc.ir.hybrid import HybridGraph
from attncc.language.hybrid import Hybrid
from attncc.language.textform import load_toml
from attncc.language.variant import Variant
from attncc.passes.linearize import Linear, at_origin, linearize
from attncc.runtime.op import AttentionOp
from attncc.schedule.linear import PlanName
from attncc.schedule.problem import Backend, Precision, Schedule

if TYPE_CHECKING:
    from attncc.runtime.hybrid import HybridOp
    from attncc.runtime.linear import LinearOp
    from attncc.runtime.recurrence import RecurrenceOp


def compile(
    variant: Variant | Hybrid | VariantGraph | HybridGraph | str | Path,
    *,
    backend: Backend | None = None,
    schedule: Schedule | None = None,
    precision: Precision | None = None,
    plan: PlanName = "auto",
    deterministic: bool = False,
) -> AttentionOp | LinearOp | RecurrenceOp | HybridOp:
    """Compile a variant: a Variant, the name of a shipped one, or the path of a TOML file.

    Returns an AttentionOp; a LinearOp if the variant has a linear-time form, as `attncc explain` shows; a RecurrenceOp
    if it is a recurrence; a HybridOp for a Hybrid, each of whose parts is compiled with the same options.

    backend: "triton" or "gluon" (forward and backward on Hopper GPUs). If Gluon has no kernel for a call, Triton's is
        used, and `explain` says why. None leaves the choice to the scheduler.
    schedule: fixes the tiling, for the plan over all pairs; by default it is tuned, shipped, or the model's choice.
    precision: of float32 matmuls, "ieee" or "tf32"; default: as `torch.backends.cuda.matmul.allow_tf32` says.
    plan: "auto", "parallel" (all pairs), "chunk" or "recurrent", see `LinearOp`.
    deterministic: fix the order of every sum, as PyTorch's deterministic mode does. Otherwise only Gluon's backward has
        sums without a fixed order, see `AttentionOp.free_sums`.

    Kernels are generated and compiled at the first call of each kind, and the op keeps them: compile once, call often.
    Raises SpecError if the spec is wrong, UnsupportedError if it cannot be compiled yet.
    """
    if backend not in (None, *get_args(Backend)):
        raise UnsupportedError(f"there is no backend '{backend}'", remedy=f"backends: {', '.join(get_args(Backend))}")
    if precision not in (None, "ieee", "tf32"):
        raise InputError(f"precision is {precision!r}", remedy="one of 'ieee', 'tf32'")
    given: object = schedule
    if not isinstance(given, Schedule | None):
        remedy = "pass ac.Schedule(forward, dkdv, dq), each an ac.KernelSchedule"
        raise InputError(f"schedule is of type {type(given).__name__}, not Schedule", remedy=remedy)
    if isinstance(variant, str | Path):
        variant = _named(variant)
    graph = variant.graph if isinstance(variant, Variant | Hybrid) else variant
    if isinstance(graph, HybridGraph):
        if schedule is not None:
            raise UnsupportedError("a schedule is of one variant", remedy="compile the parts by themselves")
        options = {"backend": backend, "precision": precision, "deterministic": deterministic}
        return _hybrid(graph, plan, options)
    if not isinstance(graph, VariantGraph):
        raise SpecError(
            f"compile takes a Variant, the name of one that ships, or a TOML file, and got {type(variant).__name__}",
            remedy="write ac.Variant(score=...), or ac.from_flex(score_mod=...) for a function of FlexAttention's",
        )
    if schedule is None:
        _note_again(graph)
    if graph.recurrent:
        if schedule is not None or backend == "gluon":
            given = "a schedule" if schedule is not None else "backend='gluon'"
            raise UnsupportedError(f"{given} is of pairs, and '{graph.name}' is a recurrence", remedy="leave it out")
        from attncc.runtime.recurrence import RecurrenceOp  # most variants need neither: imported where one does

        return RecurrenceOp(graph, plan, precision)
    with held():
        parallel = AttentionOp(graph, schedule, precision, backend, deterministic)
        linear = _linear(graph, plan) if schedule is None else None
    if linear is None:
        return parallel
    if linear.degree == 2:
        from attncc.runtime.square_op import SquareOp

        return SquareOp(graph, linear, parallel, plan, precision)
    from attncc.runtime.linear import LinearOp

    return LinearOp(graph, linear, parallel, plan, precision)


def _hybrid(graph: HybridGraph, plan: PlanName, options: dict[str, Any]) -> HybridOp:
    """Compile each part; `plan` applies to those that have a linear-time form."""
    from attncc.runtime.hybrid import HybridOp

    parts: dict[str, AttentionOp | LinearOp] = {}
    for name, part in graph.parts:
        own = {"precision": options["precision"]} if part.recurrent else options
        chosen = plan if part.recurrent or _linear(part, "auto") is not None else "auto"
        parts[name] = compile(part, plan=chosen, **own)  # type: ignore[assignment]
    return HybridOp(graph, parts, functools.partial(AttentionOp, **options))


#: the number of compilations of one formula at one line at which the warning is given
OFTEN = 64
_compiled: Counter[tuple[str, int, str]] = Counter()


def _note_again(graph: VariantGraph) -> None:
    """Warn, once, a caller who compiles a formula in every call, because each op loads its kernels anew."""
    line = (*calling_line(), graph.digest)
    _compiled[line] += 1
    if _compiled[line] == OFTEN:
        warn(
            f"'{graph.name}' was compiled {OFTEN} times at this line, and each op loads kernels of its own: compile "
            "once, where the model is made, and call the op"
        )


def _linear(graph: VariantGraph, plan: PlanName) -> Linear | None:
    """The linear-time form if a call may use it, else None. UnsupportedError: `plan` asks for a form that does not
    exist."""
    if plan not in get_args(PlanName):
        raise InputError(f"plan is {plan!r}", remedy=f"one of {', '.join(get_args(PlanName))}")
    if plan == "parallel":
        return None
    try:
        return linearize(graph)
    except UnsupportedError as error:
        if plan != "auto":
            raise at_origin(graph, error) from None
        return None


def _named(spec: str | Path) -> Variant | Hybrid:
    from attncc import variants

    return load_toml(spec) if str(spec).endswith(".toml") else variants.get(str(spec))
