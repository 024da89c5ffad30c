"""The value types of scheduling: `Problem`, what is scheduled, and `Schedule`, what the kernels are launched with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, Self, get_args

from attncc.errors import InputError
from attncc.passes.work import LiveTiles, PairCosts

Kernel = Literal["forward", "dkdv", "dq", "pair"]
Dtype = Literal["bf16", "fp16", "fp32"]
Precision = Literal["ieee", "tf32"]
Origin = Literal["model", "tuned", "shipped", "user"]
Backend = Literal["triton", "gluon"]
# What a generated forward is: a kernel in one of the backends, or that of either which splits the keys.
Form = Literal["triton", "gluon", "decode", "gluon_decode"]

# What every op with a backward runs; "pair" is the kernel of gradients that have an entry a pair, such as a bias's.
KERNELS: tuple[Kernel, ...] = ("forward", "dkdv", "dq")
DTYPE_BYTES: dict[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}

# The narrowest operand of a tensor-core matmul in Triton: narrower head dims are padded to it.
MIN_CHUNK = 16
# The widest: what the tensor memory accelerator copies at once, and the widest result of one instruction.
MAX_CHUNK = 256


@dataclass(frozen=True)
class SimilarityWork:
    """How a kernel computes a tile of raw scores.

    `dots`: matmuls over the head dimension of q and k; `plain_dot`: q @ k^T is one of them.
    `made_q`, `made_k`: operands of these matmuls that are computed from the tile of q or k and have their own
    gradients.
    `wide_q`, `wide_k`: inputs with an entry per component of each query or key, loaded with the tile as float32.
    `looped`: tiles of pairs that a sum over components, computed in a loop, keeps in registers, including operands of
    inputs that have gradients. The arithmetic of that loop counts as work per pair.
    """

    dots: int = 1
    plain_dot: bool = True
    made_q: int = 0
    made_k: int = 0
    wide_q: int = 0
    wide_k: int = 0
    looped: int = 0


PLAIN_DOT = SimilarityWork()


@dataclass(frozen=True)
class WarpWork:
    """What the warps of a Gluon kernel keep in registers besides their tiles.

    `vanishes`: a score of -inf suffices to hide a pair in the forward.
    `slope`: the backward keeps one value per pair until dp is there; otherwise two.
    `slope_by_row`: that value has a factor of the row, so it is no function of the weight and the score alone.
    `columns`: gradients that the backward sums per key; `columns_apart`: those that keep a further value per pair.
    `maps`: inputs of the score with an entry per pair, loaded as tiles.
    `tables`: inputs read by distance; `asked`: values read per query.
    `branches`: scores per pair.
    `passes_on`: dK includes a multiple of k, added after the last query.
    `means`: the gradient of a pair needs means over the queries of its key.
    `no_backward`: why only the Triton backend has this backward; empty if Gluon has it, too.
    """

    vanishes: bool = True
    slope: bool = True
    slope_by_row: bool = False
    columns: int = 0
    columns_apart: int = 0
    maps: int = 0
    tables: int = 0
    asked: int = 0
    branches: int = 1
    passes_on: bool = False
    means: bool = False
    no_backward: str = ""


PLAIN_WARPS = WarpWork()


@dataclass(frozen=True)
class KernelCosts:
    """The work of a variant: `forward` and `backward` (each of dkdv and dq) per live pair, `mask` per pair of a
    partially masked tile.

    `live(block_m, block_n)`: the tiles of that size that the mask leaves at the real lengths.
    `vectors`: inputs read by key alone, such as document numbers; each is loaded with the streamed tiles.
    `rows`: values that dkdv streams per query: its stored statistics, and delta.
    `distances`: the backward computes the distances between queries and keys of each tile.
    `nested`: in dkdv, the query heads that share a key head have a loop each, because their bounds or sums differ.
    `sweeps`: passes of the forward over the keys before its last one, each with a matmul of q and k; their work per
    pair is part of `forward`.
    `only_triton`: why only the Triton backend has this forward; empty if Gluon has it, too.
    `packs_heads`: query heads that share a key head may be rows of one tile.
    `whole_rows`: why the keys of a row cannot be split over several programs; empty if they can.
    """

    forward: PairCosts
    backward: PairCosts
    mask: PairCosts
    live: Callable[[int, int], LiveTiles]
    vectors: int = 0
    rows: int = 2
    distances: bool = False
    nested: bool = False
    similarity: SimilarityWork = PLAIN_DOT
    sweeps: int = 0
    only_triton: str = ""
    packs_heads: bool = True
    whole_rows: str = ""
    warps: WarpWork = PLAIN_WARPS

    def pair(self, kernel: Kernel) -> PairCosts:
        """The cost of one unmasked pair in `kernel`."""
        return self.forward if kernel == "forward" else self.backward


@dataclass(frozen=True)
class Problem:
    """One attention call as the scheduler sees it: dtypes, sizes and the variant's work; InputError if they clash.

    `precision`: how matmuls multiply float32 operands, "ieee" (no tensor cores) or "tf32"; ignored for 16-bit dtypes.
    `digest`: the variant's IR digest; if empty, no tuned schedule is looked up.
    `branches`: scores per pair, each over its own part of d_qk.
    `pairs`: an input has a gradient with an entry per pair, so there is a pair kernel to schedule.
    `values`: heads of v per weight; `value_of_key`: v is the first part of k and not loaded separately.
    `ordered`: all sums are in a fixed order, as deterministic mode asks.
    `spills`: (kernel, tiling, bytes per thread) of compiled kernels that spilled; one entry for tilings that are
    `alike`.
    """

    dtype: Dtype
    precision: Precision
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    d_qk: int
    d_v: int
    costs: KernelCosts
    digest: str = ""
    branches: int = 1
    pairs: bool = True
    values: int = 1
    value_of_key: bool = False
    ordered: bool = False
    spills: frozenset[tuple[Kernel, KernelSchedule, int]] = frozenset()

    def __post_init__(self) -> None:
        if self.dtype not in get_args(Dtype):
            raise InputError(f"dtype {self.dtype!r} is not one of {', '.join(get_args(Dtype))}")
        if self.precision not in get_args(Precision):
            raise InputError(f"precision {self.precision!r} is not one of {', '.join(get_args(Precision))}")
        for name in ("batch", "heads", "kv_heads", "q_len", "kv_len", "d_qk", "d_v"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise InputError(f"{self.heads} query heads are no multiple of {self.kv_heads} key/value heads")

    def spilled(self, kernel: Kernel, ks: KernelSchedule) -> int:
        """Bytes per thread that a kernel was seen to spill in this tiling; 0 if no spill was recorded."""
        return next((count for name, known, count in self.spills if name == kernel and known == alike(ks)), 0)

    @property
    def qk_chunks(self) -> tuple[int, ...]:
        """The head dimension of q and k, cut into tiles; no tile spans two branches, or v and the rest of a key."""
        if self.value_of_key and self.d_v < self.d_qk:
            return head_chunks(self.d_v) + head_chunks(self.d_qk - self.d_v)
        return head_chunks(self.d_qk // self.branches) * self.branches

    @property
    def v_chunks(self) -> tuple[int, ...]:
        """The head dimension of v, cut into tiles, for each of the `values` heads."""
        return head_chunks(self.d_v) * self.values

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element of q, k, v and out."""
        return DTYPE_BYTES[self.dtype]

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads


_SIZES = ("block_m", "block_n", "num_warps", "num_stages")
#: what is named only where there are any
_COUNTS = ("splits", "strips")


@dataclass(frozen=True)
class KernelSchedule:
    """The tiling of one kernel: tile rows (queries) and columns (keys), warps a program, stages of the load loop.

    `backend` is the language that the kernel is written in. A Gluon kernel has warps of its own for its loads, which
    `num_warps` does not count. `splits`: in how many parts the keys of a row are dealt to programs, by the forward that
    can do so, or the query heads of a group by the Gluon backward; 0 for kernels that own their rows. `strips`: of
    queries, in which the Gluon backward weighs a tile one after the other, for fewer registers; 0 for all at once.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    backend: Backend = "triton"
    splits: int = 0
    strips: int = 0

    @property
    def form(self) -> Form:
        """Which kernel a forward's schedule is for."""
        if self.splits:
            return "decode" if self.backend == "triton" else "gluon_decode"
        return self.backend

    def to_json(self) -> dict[str, Any]:
        """A plain dict for cache files and tuned tables; the backend is named where it is not Triton, and the number of
        splits, and of strips, where there are any."""
        named: dict[str, Any] = {name: getattr(self, name) for name in _SIZES}
        named |= {"backend": self.backend} if self.backend != "triton" else {}
        return named | {name: count for name in _COUNTS if (count := getattr(self, name))}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """The inverse of `to_json`; ValueError if `data` is not four positive integers, a backend, and numbers of
        splits and strips, under those names."""
        if not isinstance(data, dict) or set(data) - {"backend", *_COUNTS} != set(_SIZES):
            raise ValueError(f"a kernel schedule has exactly the fields {', '.join(_SIZES)}; got {data!r}")
        if not all(type(data[name]) is int and data[name] > 0 for name in set(data) - {"backend"}):
            raise ValueError(f"the fields of a kernel schedule are positive integers; got {data!r}")
        if data.get("backend", "triton") not in get_args(Backend):
            raise ValueError(f"the backend of a kernel schedule is one of {', '.join(get_args(Backend))}; got {data!r}")
        return cls(**data)

    def __str__(self) -> str:
        warps = "1 warp" if self.num_warps == 1 else f"{self.num_warps} warps"
        stages = "1 stage" if self.num_stages == 1 else f"{self.num_stages} stages"
        backend = "" if self.backend == "triton" else f", {self.backend}"
        splits = f", {self.splits} split{'s' * (self.splits > 1)}" if self.splits else ""
        strips = f", {self.strips} strips" if self.strips else ""
        return f"{self.block_m}x{self.block_n}, {warps}, {stages}{backend}{splits}{strips}"


@dataclass(frozen=True)
class Schedule:
    """The tilings of an op's kernels, and where they come from; `pair` is None where no input has a gradient a pair."""

    forward: KernelSchedule
    dkdv: KernelSchedule
    dq: KernelSchedule
    origin: Origin = "model"
    pair: KernelSchedule | None = None

    def of(self, kernel: Kernel) -> KernelSchedule:
        """The schedule of `kernel`; KeyError for a pair kernel that is not there."""
        schedule: KernelSchedule | None = getattr(self, kernel)
        if schedule is None:
            raise KeyError(kernel)
        return schedule

    def to_json(self) -> dict[str, Any]:
        """A plain dict for cache files and tuned tables."""
        pair = None if self.pair is None else self.pair.to_json()
        return {"origin": self.origin, **{kernel: self.of(kernel).to_json() for kernel in KERNELS}, "pair": pair}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """The inverse of `to_json`; ValueError if `data` is something else."""
        if not isinstance(data, dict) or set(data) != {"origin", *KERNELS, "pair"}:
            raise ValueError(f"a schedule has exactly the fields origin, {', '.join(KERNELS)}, pair; got {data!r}")
        if data["origin"] not in get_args(Origin):
            raise ValueError(
                f"the origin of a schedule is one of {', '.join(get_args(Origin))}; got {data['origin']!r}"
            )
        pair = None if data["pair"] is None else KernelSchedule.from_json(data["pair"])
        kernels = {kernel: KernelSchedule.from_json(data[kernel]) for kernel in KERNELS}
        return cls(origin=data["origin"], pair=pair, **kernels)


def alike(ks: KernelSchedule) -> KernelSchedule:
    """What stands for all tilings whose code has the same registers: in how many parts keys or heads are dealt is an
    argument, and so is the number of stages in Gluon."""
    ks = replace(ks, splits=min(ks.splits, 1))
    return replace(ks, num_stages=1) if ks.backend == "gluon" else ks


@cache
def head_chunks(dim: int, widest: int = MAX_CHUNK) -> tuple[int, ...]:
    """A head dimension as powers of two from 16 to `widest`, each one tile in a kernel: 96 -> (64, 32), 128 -> (128,).

    The last one is padded where that wastes at most a quarter of it: 112 -> (128,), 72 -> (64, 16). InputError below 1.
    """
    if dim < 1:
        raise InputError(f"a head dimension is {dim}; it must be at least 1")
    chunks: list[int] = []
    while dim > 0:
        padded = min(max(MIN_CHUNK, 1 << (dim - 1).bit_length()), widest)
        chunks.append(padded if padded - dim <= dim // 4 or dim < MIN_CHUNK else padded // 2)
        dim -= chunks[-1]
    return tuple(chunks)
