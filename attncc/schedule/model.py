"""The fitted constants of the cost model, read from `schedules/model.toml`, which explains each of them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from attncc import resources
from attncc.errors import AttnccError


@dataclass(frozen=True)
class TritonFit:
    """Kernels in Triton that go over the keys, or the queries, in one loop."""

    unhidden: tuple[float, ...]
    matmul_gap: float
    exchange: float
    loop_instructions: float
    row_work: float
    program_latency: float
    loop_latency: float
    tensor_efficiency: float
    overlap: float
    lockstep: float
    side_by_side: float
    spill_accesses: float
    spill_risk: float
    spill_seen: float
    spill_bytes: float
    cache_share: float

    def waiting(self, stages: int) -> float:
        """The share of a load's latency that a pipeline leaves unhidden."""
        return self.unhidden[stages - 1] if stages <= len(self.unhidden) else 0.0


@dataclass(frozen=True)
class DecodeFit:
    """Kernels that deal the keys of a row to several programs."""

    tile_chain: float
    hidden: float
    overlap: float
    program_ends: float
    merge_us: float
    matmul_share: dict[str, float]


@dataclass(frozen=True)
class GluonDecodeFit:
    """The table [gluon_decode]: of keys that hold their values, dealt to several programs."""

    tensor_efficiency: float
    turn: float
    program_ends: float


@dataclass(frozen=True)
class GluonForwardFit:
    """The forward in Gluon."""

    turn: float
    gap: float
    block_overhead: float
    tensor_efficiency: float


@dataclass(frozen=True)
class GluonBackwardFit:
    """The backward in Gluon."""

    turn: float
    block_overhead: float
    tensor_efficiency: float
    strips: tuple[float, ...]
    wide_efficiency: float


@dataclass(frozen=True)
class LinearFit:
    """The plans of a variant that is linear in time."""

    pairs_rate: float
    chunk_rate: float
    turn_gap: tuple[float, float]
    turn_work: float
    states_turn: float
    program_ends: float
    prepare_chunk: float
    square_rate: float


@dataclass(frozen=True)
class Model:
    """Everything that was fitted."""

    triton: TritonFit
    decode: DecodeFit
    gluon_decode: GluonDecodeFit
    gluon_forward: GluonForwardFit
    gluon_backward: GluonBackwardFit
    linear: LinearFit


@cache
def model() -> Model:
    """The shipped constants."""
    return parse_model(resources.path("schedules") / "model.toml")


def parse_model(path: Path) -> Model:
    """The constants of a file; AttnccError naming it, the table and the field if something is missing or unknown."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise AttnccError(f"{path}: not a TOML file: {error}") from error
    return Model(
        triton=_fit(TritonFit, "triton", data, path),
        decode=_fit(DecodeFit, "decode", data, path),
        gluon_decode=_fit(GluonDecodeFit, "gluon_decode", data, path),
        gluon_forward=_fit(GluonForwardFit, "gluon_forward", data, path),
        gluon_backward=_fit(GluonBackwardFit, "gluon_backward", data, path),
        linear=_fit(LinearFit, "linear", data, path),
    )


_Fit = TypeVar("_Fit", TritonFit, DecodeFit, GluonDecodeFit, GluonForwardFit, GluonBackwardFit, LinearFit)


def _fit(kind: type[_Fit], name: str, data: dict[str, Any], path: Path) -> _Fit:
    table, known = data.get(name, {}), {entry.name for entry in fields(kind)}
    if wrong := sorted(set(table) ^ known):
        raise AttnccError(
            f"{path}: the table [{name}] has exactly the fields of {kind.__name__}: see {', '.join(wrong)}"
        )
    values: dict[str, Any] = {field: tuple(v) if isinstance(v, list) else v for field, v in table.items()}
    return kind(**values)
