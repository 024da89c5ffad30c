"""Variants that other tools say in several calls, or only in plain PyTorch: differential attention, MLA, and four
normalizers of which `torch.compile` holds whole maps.

Each is compiled and checked ahead, side by side with its peers, and then timed alone; the peers of an absorbed call in
processes of their own, so that one which fails late costs no more than itself. The peer in plain PyTorch runs at
fewer heads, for it takes several M x N tensors a head; its bytes, and ours, are the peak of one forward and backward.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

import attncc as ac
from attncc.runtime.verify import check, eager
from bench import area, plain
from bench.case import Case, Shape, Tensors
from bench.check import CheckFailedError, against_reference, relative_rms, require
from bench.compare import MODES, Builder, compare, figures, table
from bench.dense_cases import CAUSAL, FULL
from bench.ours import schedule_of, tile, tilings
from bench.peers import Attend, flex, sdpa
from bench.record import Results
from bench.run import NotReadyError, Run
from bench.suites import variants
from bench.suites.decode import copy_rate
from bench.suites.memory import peak
from bench.timing import race

#: where all heads are held against the reference: several float64 maps of a head must fit, many times side by side
CHECKED = 4096
#: heads of the peer in plain PyTorch, of one sequence
PLAIN_HEADS = 4
#: of an absorbed MLA: RMS(error) / RMS(expected) beside a peer
PEER_TOLERANCE = 1e-2


def two_calls(case: Case, shape: Shape, inputs: Tensors) -> Attend:
    """Differential attention as two calls of FlexAttention on halves of q and k."""
    half = shape.d // 2
    once = flex(CAUSAL, replace(shape, d=half), {})
    factor = inputs["lam"][:, None, None].to(shape.dtype)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return once(q[..., :half], k[..., :half], v) - factor * once(q[..., half:], k[..., half:], v)

    return run


@dataclass(frozen=True)
class Entry:
    """A row of the table. `plain`: whether plain PyTorch runs beside."""

    case: Case
    shape: Shape
    peers: Mapping[str, Builder] = field(default_factory=dict)
    plain: bool = False


LONG = Shape(b=4, h=16, m=8192, d=128)
WIDE = Shape(b=4, h=16, m=8192, d=192, dv=128)
ENTRIES = {
    "differential": Entry(variants.case("differential"), LONG, {"two flex": two_calls}),
    "MLA": Entry(
        replace(CAUSAL, name="MLA"), WIDE, {"flex": flex, "cudnn": lambda case, shape, _: sdpa("cudnn", case, shape)}
    ),
    **{name: Entry(variants.case(name), LONG, plain=True) for name in plain.WEIGHTS},
}
#: the peers of an absorbed call
ABSORBED_PEERS = ("flex", "torch.compile")
#: decoding with absorbed projections: sequences, keys of each
CACHES = ((8, 8192), (64, 4096), (1, 65536))
ABSORBED = replace(variants.case("mla"), name="absorbed MLA", area=area.full)


def absorbed(batch: int, keys: int) -> Shape:
    """One query of 128 heads beside a latent cache."""
    return Shape(b=batch, h=128, m=1, d=576, hkv=1, n=keys, dv=512, tied=True)


def small(shape: Shape) -> Shape:
    """What plain PyTorch runs at."""
    return replace(shape, b=1, h=PLAIN_HEADS, hkv=PLAIN_HEADS)


def bytes_of(attend: Attend, shape: Shape) -> int:
    """The peak of memory of one forward and backward, the operands not counted."""
    operands = shape.tensors()
    grad = torch.randn_like(operands[0][..., : shape.dv])

    def call() -> Any:
        return torch.autograd.grad(attend(*operands), operands, grad)

    call()
    return int(peak(call)[1])


def prepared(name: str) -> dict[str, float]:
    """In another process: compile an entry and its peers into the caches. Returns the errors of its check."""
    entry = ENTRIES[name]
    op: Any = ac.compile(entry.case.variant, plan="parallel")
    checked = replace(entry.shape, m=CHECKED, n=CHECKED)
    errors = against_reference(op, entry.case, checked)
    inputs = entry.case.inputs(entry.shape, "cuda")
    ours = partial(op, **inputs)
    once(ours, entry.shape)
    for build in entry.peers.values():
        once(build(entry.case, entry.shape, inputs), entry.shape)
    if entry.plain:
        short = small(entry.shape)
        found = once(ours, short)
        once(plain.compiled(name, short), short)
        # The peer's formula in float32: entmax of scores that are rounded to 16 bits is 1.3e-2 from itself.
        with torch.no_grad():
            right = plain.attend(name, short)(*(x.float() for x in short.tensors()))
        errors["plain PyTorch"] = relative_rms(found, right)
        require({"out": errors["plain PyTorch"]}, PEER_TOLERANCE, "plain PyTorch")
    return errors


def once(attend: Callable[..., torch.Tensor], shape: Shape) -> torch.Tensor:
    """The result of one forward, and a backward for what it compiles: one that can be run again, as it is timed."""
    operands = shape.tensors()
    out = attend(*operands)
    torch.autograd.grad(out, operands, torch.randn_like(out), retain_graph=True)
    return out.detach()


def trained(run: Run, results: Results, name: str, errors: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of an entry, forward and backward."""
    entry = ENTRIES[name]
    rows = compare(run, results, entry.case, entry.shape, peers=entry.peers, checked=errors, rounds=2, rep_ms=60)
    if not (entry.plain and rows):
        return rows
    short = small(entry.shape)
    operands = short.tensors()
    op: Any = ac.compile(entry.case.variant, plan="parallel")
    peer = plain.compiled(name, short)
    out = peer(*operands)
    grad = torch.randn_like(out)
    calls: tuple[Callable[[], object], ...] = (
        partial(peer, *operands),
        lambda: torch.autograd.grad(out, operands, grad, retain_graph=True),
    )
    pairs = entry.case.area(short.m, short.n)
    for row, mode, call in zip(rows, MODES, calls, strict=True):
        entry_of_peer = figures(short, pairs, mode, race({"plain": call}, rounds=2, rep_ms=60)["plain"])
        row["peers"]["torch.compile"] = entry_of_peer
        row["ratio"]["torch.compile"] = round(row["attncc"]["tflops"] / entry_of_peer["tflops"], 3)
    held = {"heads": PLAIN_HEADS, "attncc": bytes_of(op, short), "torch.compile": bytes_of(peer, short)}
    rows[0]["peak_bytes"] = held
    results.write()
    return rows


def beside(name: str, shape: Shape, q: torch.Tensor, k: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A peer of an absorbed call."""
    if name == "flex":
        return partial(flex(FULL, shape, {}), q, k, k[..., : shape.dv])
    return partial(plain.latent(shape), q, k)


def decoded(results: Results, cache: tuple[int, int], broken: dict[str, Any]) -> dict[str, Any]:
    """The row of one absorbed call, held against the reference, and timed beside the peers that are not broken."""
    shape = absorbed(*cache)
    op: Any = ac.compile(ABSORBED.variant)
    q, k = (x.detach() for x in shape.tensors())
    calls: dict[str, Callable[[], torch.Tensor]] = {"attncc": partial(op, q, k)}
    out, again = op(q, k), op(q, k)
    if not torch.equal(out, again):
        raise CheckFailedError("the same call gave other bits")
    one = slice(shape.b - 1, None)
    exact = ac.reference(ABSORBED.variant, q[one].double(), k[one].double())
    found = check("out", out[one], exact, eager(ABSORBED.variant, q[one], k[one]), dtype=shape.dtype)
    if not found.ok:
        raise CheckFailedError(f"against the float64 reference: {found}")
    errors = {"reference": relative_rms(out[one], exact)}
    for name in ABSORBED_PEERS:
        if name not in broken:
            calls[name] = beside(name, shape, q, k)
            errors[name] = relative_rms(out, calls[name]())
    require({name: e for name, e in errors.items() if name != "reference"}, PEER_TOLERANCE, "a peer")
    moved = shape.b * shape.n * shape.d * shape.dtype.itemsize
    entries: dict[str, Any] = {
        name: {"ms": float(f"{t.ms:.5g}"), "tbps": float(f"{moved / t.ms / 1e9:.4g}"), "spread": round(t.spread, 4)}
        for name, t in race(calls, rounds=2, rep_ms=40).items()
    }
    ours = entries.pop("attncc")
    ratio = {name: round(ours["tbps"] / entry["tbps"], 3) for name, entry in entries.items()}
    ours["schedule"] = tilings(schedule_of(op, q, k), "forward")
    row = {"attncc": ours, "peers": entries | broken, "ratio": ratio, "check": errors}
    return results.add(case=ABSORBED.name, **shape.row(), mode="decode", **row)


def decoded_ahead(cache: tuple[int, int], name: str) -> None:
    """In another process: compile an absorbed call into the caches, ours or a peer's."""
    shape = absorbed(*cache)
    q, k = (x.detach() for x in shape.tensors())
    with torch.no_grad():
        call = partial(ac.compile(ABSORBED.variant), q, k) if name == "attncc" else beside(name, shape, q, k)
        call()


def work(piece: tuple[Any, ...]) -> Any:
    """What a process ahead does: one of the two kinds."""
    kind, *arguments = piece
    return prepared(*arguments) if kind == "trained" else decoded_ahead(*arguments)


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("shelf")
    names = run.take(list(ENTRIES), quick=1)
    caches = run.take(list(CACHES), quick=1)
    pieces = [
        *(("decoded", cache, "attncc") for cache in caches),
        *(("trained", name) for name in names),
        *(("decoded", cache, name) for cache in caches for name in ABSORBED_PEERS),
    ]
    ready = dict(zip(pieces, run.ahead(work, pieces), strict=True))
    results.note("seconds ahead", round(run.budget.elapsed()))
    results.note("copy_tbps", copy_rate())
    shown, lines = [], []
    for cache in caches:
        done = ready["decoded", cache, "attncc"]
        peers = {name: ready["decoded", cache, name].error for name in ABSORBED_PEERS}
        if run.out_of_time(results, f"{ABSORBED.name} {cache}"):
            break
        try:
            if done.error is not None:
                raise NotReadyError(done.error)
            with torch.no_grad():
                row = decoded(results, cache, {name: {"error": e[:200]} for name, e in peers.items() if e})
        except Exception as error:  # a broken case must cost its own row alone
            run.fail(results, ABSORBED.name, error, case=ABSORBED.name, **absorbed(*cache).row())
            continue
        contestants = (row["attncc"], *(row["peers"][name] for name in ABSORBED_PEERS))
        rates = [f"{e['tbps']:.2f}" if "tbps" in e else "cannot" for e in contestants]
        lines.append([str(cache), *rates, tile(row["attncc"]["schedule"]["forward"])])
    run.show("absorbed MLA, TB/s", ["sequences, keys", "attncc", "flex", "torch.compile", "schedule"], lines)
    for name in names:
        done = ready["trained", name]
        if run.out_of_time(results, name):
            break
        if done.error is not None:
            run.fail(results, name, NotReadyError(done.error), case=name, **ENTRIES[name].shape.row())
            continue
        shown += trained(run, results, name, done.value)
        gc.collect()
        torch.cuda.empty_cache()
    table(run, f"shelf, TFLOP/s, {results.meta['gpu']}", shown)
