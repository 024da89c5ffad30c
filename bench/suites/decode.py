"""Few queries beside a long cache: TB/s of keys and values read, beside cuDNN, FlashAttention-2 and FlexAttention."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import attncc as ac
from attncc.runtime.verify import check, eager
from bench import area
from bench.case import Case, FlexForm, Shape
from bench.check import CheckFailedError, poison, relative_rms, require, slice_inputs
from bench.compare import Builder, standard_peers
from bench.dense_cases import CAP, alibi_score, slopes, softcap_score
from bench.ours import schedule_of, tile, tilings
from bench.record import Results
from bench.run import Run
from bench.timing import Timing, race

# One query sees every key, causal or not, so no case has a mask.
FULL = Case("full", ac.Variant(name="full"), area.full, flex=FlexForm(), sdpa={"is_causal": False})
SOFTCAP = Case("softcap", ac.Variant(name="softcap", score=ac.softcap(CAP)), area.full, flex=FlexForm(softcap_score))
ALIBI = Case("alibi", ac.Variant(name="alibi", score=ac.alibi()), area.full, inputs=slopes, flex=FlexForm(alibi_score))
SIGMOID = Case("sigmoid", ac.Variant(name="sigmoid", normalizer="sigmoid"), area.full)
#: (sequences, keys of each)
CACHES = ((1, 65536), (8, 8192), (64, 8192), (8, 65536))
#: RMS(error) / RMS(expected) beside FlexAttention, whose own error comes on top of ours
PEER_TOLERANCE = 1e-2


def shape(batch: int, keys: int, queries: int = 1) -> Shape:
    """A call of the suite: 32 heads over 8, D=128."""
    return Shape(b=batch, h=32, m=queries, d=128, hkv=8, n=keys)


CELLS = (
    *((FULL, shape(*cache)) for cache in CACHES),
    *((case, shape(*cache)) for case in (SOFTCAP, ALIBI, SIGMOID) for cache in CACHES[:2]),
    *((FULL, shape(8, 8192, queries)) for queries in (4, 16)),
)


def checked(op: Any, case: Case, wanted: Shape, device: str = "cuda") -> float:
    """The relative RMS error of the last (batch, key head) slice of a call, held against the float64 reference.

    CheckFailedError where it breaks the project's rules, or a second call has other bits.
    """
    q, k, v = (t.detach() for t in wanted.tensors(device, seed=1))
    inputs = case.inputs(wanted, device)
    b, kv_head = wanted.b - 1, wanted.hkv - 1
    heads, one, kv = slice(kv_head * wanted.group, wanted.h), slice(b, None), slice(kv_head, None)
    poison(q)
    out, again = (op(q, k, v, **inputs) for _ in range(2))
    if not torch.equal(out, again):
        raise CheckFailedError("the same call gave other bits")
    own = slice_inputs(case.variant, inputs, b, heads, slice(kv_head, None))
    sliced = q[one, heads], k[one, kv], v[one, kv]
    wide = {name: t.double() if t.is_floating_point() else t for name, t in own.items()}
    exact = ac.reference(case.variant, *(t.double() for t in sliced), **wide)
    plain = eager(case.variant, *sliced, **own)
    part = out[one, heads]
    found = check("out", part, exact, plain, dtype=wanted.dtype)
    if not found.ok:
        raise CheckFailedError(
            f"against the float64 reference: largest error {found.max_err:.2e} (at most {found.max_allowed:.2e}), RMS "
            f"{found.rms:.2e} (at most {found.rms_allowed:.2e})"
        )
    return float(f"{relative_rms(part, exact):.3g}")


def figures(wanted: Shape, timing: Timing) -> dict[str, float]:
    """One contestant's entry in a row: milliseconds, and TB/s of keys and values."""
    moved = wanted.b * wanted.hkv * wanted.n * (wanted.d + wanted.dv) * wanted.dtype.itemsize
    return {
        "ms": float(f"{timing.ms:.5g}"),
        "tbps": float(f"{moved / timing.ms / 1e9:.4g}"),
        "spread": round(timing.spread, 4),
    }


def cell(results: Results, case: Case, wanted: Shape) -> dict[str, Any]:
    """Check one case, then time it beside its peers."""
    op = ac.compile(case.variant)
    error = checked(op, case, wanted)
    q, k, v = (t.detach() for t in wanted.tensors())
    inputs = case.inputs(wanted, "cuda")
    peers: dict[str, Builder] = standard_peers(case)
    if wanted.m > 1:
        peers.pop("flex", None)  # compiles anew for each length
    contestants: dict[str, Callable[[], torch.Tensor]] = {"attncc": partial(op, q, k, v, **inputs)}
    broken, errors = {}, {"reference": error}
    for name, build in peers.items():
        try:
            attend = build(case, wanted, inputs)
            errors[name] = relative_rms(contestants["attncc"](), attend(q, k, v))
            contestants[name] = partial(attend, q, k, v)
        except Exception as failure:
            broken[name] = f"{type(failure).__name__}: {str(failure)[:200]}"
    require({name: e for name, e in errors.items() if name != "reference"}, PEER_TOLERANCE, "a peer")
    entries: dict[str, Any] = {name: figures(wanted, timing) for name, timing in race(contestants).items()}
    ours = entries.pop("attncc")
    ratio = {name: round(ours["tbps"] / entry["tbps"], 3) for name, entry in entries.items()}
    ours["schedule"] = tilings(schedule_of(op, q, k, v, **inputs), "forward")
    entries |= {name: {"error": error} for name, error in broken.items()}
    return results.add(
        case=case.name, **wanted.row(), mode="forward", attncc=ours, peers=entries, ratio=ratio, check=errors
    )


def copy_rate() -> float:
    """TB/s of a copy of 1 GiB, read and written: what the memory gives."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    timing = race({"copy": lambda: target.copy_(source)})["copy"]
    return float(f"{2 * source.numel() / timing.ms / 1e9:.4g}")


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("decode")
    results.note("copy_tbps", copy_rate())
    rows = []
    with torch.no_grad():
        for case, wanted in run.take(list(CELLS), quick=2):
            if run.out_of_time(results, f"{case.name} {wanted}"):
                break
            try:
                rows.append(cell(results, case, wanted))
            except Exception as error:  # a broken case must cost its own row alone
                run.fail(results, f"{case.name} {wanted}", error, case=case.name, **wanted.row())
            gc.collect()
            torch.cuda.empty_cache()
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    columns = ["case", "B", "M", "N", "attncc", *names, *(f"/{name}" for name in names), "of copy", "schedule"]
    run.show(
        f"decode, TB/s, {results.meta['gpu']}", columns, [_line(row, names, results.meta["copy_tbps"]) for row in rows]
    )


def _line(row: dict[str, Any], names: list[str], copy: float) -> list[str]:
    ours, peers, ratio = row["attncc"], row["peers"], row["ratio"]
    rates = [f"{peers[n]['tbps']:.2f}" if "tbps" in peers.get(n, {}) else "" for n in names]
    ratios = [f"{ratio[n]:.2f}" if n in ratio else "" for n in names]
    sizes = [str(row[s]) for s in ("B", "M", "N")]
    return [
        row["case"],
        *sizes,
        f"{ours['tbps']:.2f}",
        *rates,
        *ratios,
        f"{ours['tbps'] / copy:.2f}",
        tile(ours["schedule"]["forward"]),
    ]
