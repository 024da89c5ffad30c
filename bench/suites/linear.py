"""Attention in linear time beside flash-linear-attention: chunks forward and backward, long sequences, decoding."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import attncc as ac
from bench import area
from bench.case import Case, Shape, Tensors
from bench.check import against_reference, relative_rms
from bench.fla import REP_MS, Peer, compiled_ahead, peers, tuning_briefly
from bench.run import NotReadyError, Run
from bench.timing import Timing, race

#: those of peers/README.md, so that figures can be laid beside it
SHAPE = {"b": 2, "h": 16, "d": 128}
LENGTHS = (8192, 2048, 32768)
#: where the reference, which has every pair of a head in float64, checks a case
CHECKED = 4096
#: and the reference of a recurrence, which goes from token to token
CHECKED_TOKENS = 1024
#: one sequence, ever longer: time and memory a token must not grow
TOKENS = (8192, 32768, 131072, 524288)
#: processes' worth of the peer's compiling, each a part of every kernel's configurations
SHARES = 14


def gates(shape: Shape, device: str) -> Tensors:
    """One gate a token and head, as logsigmoid makes them."""
    generator = torch.Generator(device).manual_seed(3)
    return {"g": F.logsigmoid(torch.randn(shape.b, shape.h, shape.n, generator=generator, device=device))}


def channel_gates(shape: Shape, device: str) -> Tensors:
    """One gate a token, head and channel, as GLA's layers make them."""
    generator = torch.Generator(device).manual_seed(3)
    size = (shape.b, shape.n, shape.h, shape.d)
    g = F.logsigmoid(torch.randn(size, generator=generator, device=device)) / 16
    return {"g": g.to(shape.dtype).transpose(1, 2)}


def factors(shape: Shape, device: str) -> Tensors:
    """How much each token replaces, as sigmoid makes it."""
    generator = torch.Generator(device).manual_seed(4)
    return {"beta": torch.sigmoid(torch.randn(shape.b, shape.h, shape.n, generator=generator, device=device))}


def gated_factors(shape: Shape, device: str) -> Tensors:
    """And the log of what it leaves of the state."""
    return {**factors(shape, device), "g": gates(shape, device)["g"] / 4}


def rates(name: str) -> Callable[[Shape, str], Tensors]:
    """The published rates of a variant that decays by head."""

    def make(shape: Shape, device: str) -> Tensors:
        default = ac.variants.get(name).graph.input("rates").default
        assert default is not None
        return {"rates": torch.tensor(default({"h": shape.h}), device=device)}

    return make


CASES = {
    name: Case(name, ac.variants.get(name), area.causal, inputs=make, differentiable=wanted)
    for name, make, wanted in (
        ("retention", rates("retention"), ("rates",)),
        ("simple_gla", gates, ("g",)),
        ("gla", channel_gates, ()),
        ("lightning", rates("lightning"), ("rates",)),
        ("linear_attention", lambda shape, device: {}, ()),
        ("delta_net", factors, ("beta",)),
        ("gated_delta_net", gated_factors, ("beta", "g")),
    )
}


def moved(shape: Shape) -> int:
    """Bytes of q, k, v read once and out written once."""
    return 2 * shape.b * shape.n * (shape.h * (shape.d + shape.dv) + shape.hkv * (shape.d + shape.dv))


def entry(timing: Timing, shape: Shape, passes: float) -> dict[str, float]:
    """One contestant's figures: GB/s counts q, k, v and out `passes` times."""
    gbps = passes * moved(shape) / timing.ms / 1e6
    return {"ms": float(f"{timing.ms:.5g}"), "gbps": float(f"{gbps:.4g}"), "spread": round(timing.spread, 4)}


def seq_first(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leaves laid out (B, T, H, D): we see them as views."""
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [(shape.b, shape.n, h, d) for h, d in ((shape.h, shape.d), (shape.hkv, shape.d), (shape.hkv, shape.dv))]
    q, k, v = (torch.randn(s, generator=generator, device="cuda", dtype=shape.dtype) for s in sizes)
    k = F.normalize(k.float(), dim=-1).to(shape.dtype)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def prepared(piece: tuple[str, str, int]) -> dict[str, Any]:
    """What a process ahead does for ("attncc", case, 0): compile and check it; for ("fla", case, share): compile that
    share of what the peer's tuning will time. Returns the errors of the check."""
    kind, name, share = piece
    case, shape = CASES[name], Shape(m=LENGTHS[0], **SHAPE)
    q, k, v = seq_first(shape)
    inputs = case.inputs(shape, "cuda")
    if kind == "fla":
        with compiled_ahead(share, SHARES):
            out = peers()[name](inputs)(q, k, v)
            with suppress(RuntimeError):  # it may refuse its backward on this machine
                torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
        return {}
    op = ac.compile(case.variant, plan="chunk")
    recurrent = case.variant.graph.recurrent
    checked = Shape(m=CHECKED_TOKENS if recurrent else CHECKED, unit_keys=recurrent, **SHAPE)
    errors = against_reference(op, case, checked)
    out = contestant(op, inputs)(q, k, v)
    torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    torch.cuda.synchronize()
    return errors


def contestant(op: Any, inputs: Tensors) -> Callable[..., torch.Tensor]:
    """An op of ours as a function of (B, T, H, D) tensors."""

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = op(*(x.transpose(1, 2) for x in (q, k, v)), **inputs)
        return out.transpose(1, 2)

    return ours


def measured(
    run: Run, results: Any, case: Case, length: int, theirs: Peer | None, errors: dict[str, Any]
) -> list[dict[str, Any]]:
    """Time forward and backward of a case beside the peer; one row a mode. `errors`: what its check ahead found."""
    shape = Shape(m=length, **SHAPE)
    head = {"case": case.name, **shape.row()}
    try:
        op = ac.compile(case.variant, plan="chunk")
        q, k, v = seq_first(shape)
        inputs = case.inputs(shape, "cuda")
        calls = {"attncc": contestant(op, inputs)}
        if theirs is not None:
            calls["fla"] = theirs(inputs)
        outs: dict[str, torch.Tensor] = {}
        broken: dict[str, str] = {}
        for name, call in calls.items():
            try:
                with tuning_briefly():
                    outs[name] = call(q, k, v)
            except Exception as error:
                if name == "attncc":
                    raise
                broken[name] = f"{type(error).__name__}: {str(error)[:200]}"
        check = {"reference": errors}
        if "fla" in outs:
            check["fla"] = relative_rms(outs["attncc"].detach(), outs["fla"].detach())
        grad = torch.randn_like(outs["attncc"])
        modes = {
            "forward": ({name: partial(calls[name], q, k, v) for name in outs}, 1.0),
            "backward": ({n: partial(_backward, out, (q, k, v), grad) for n, out in outs.items()}, 2.0),
        }
        rows = []
        for mode, (contestants, passes) in modes.items():
            entries: dict[str, Any] = {}
            for name, timed_call in contestants.items():
                try:  # a peer may refuse its backward on this machine
                    with tuning_briefly():
                        timed_call()
                    entries[name] = None
                except Exception as error:
                    if name == "attncc":
                        raise
                    broken[f"{name} {mode}"] = f"{type(error).__name__}: {str(error)[:200]}"
            timed = race({name: contestants[name] for name in entries})
            entries = {name: entry(timing, shape, passes) for name, timing in timed.items()}
            own = entries.pop("attncc")
            ratio = {name: round(e["ms"] / own["ms"], 3) for name, e in entries.items()}
            row = {**head, "mode": mode, "attncc": own, "peers": entries, "ratio": ratio}
            rows.append(results.add(**row, broken=broken, check=check))
            told = ", ".join(f"{name} {e['ms']:.3f} ms" for name, e in {"attncc": own, **entries}.items())
            run.console.print(f"{run.budget.elapsed():4.0f} s  {case.name} {length} {mode}: {told}", highlight=False)
        return rows
    except Exception as error:  # a broken case must cost its own rows, not those of the cases after it
        run.fail(results, f"{case.name} {shape}", error, **head)
        return []
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _backward(out: torch.Tensor, leaves: tuple[torch.Tensor, ...], grad: torch.Tensor) -> Any:
    return torch.autograd.grad(out, leaves, grad, retain_graph=True)


def by_length(run: Run, results: Any) -> list[dict[str, Any]]:
    """Nanoseconds and bytes a token of one sequence's forward, as it grows."""
    op = ac.compile("simple_gla", plan="chunk")
    rows = []
    for length in run.take(list(TOKENS), quick=2):
        shape = Shape(b=1, h=16, m=length, d=128)
        with torch.no_grad():
            q, k, v = (x.detach().transpose(1, 2) for x in seq_first(shape))
            inputs = gates(shape, "cuda")
            op(q, k, v, **inputs)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            timing = race({"attncc": partial(op, q, k, v, **inputs)})["attncc"]
            peak = torch.cuda.max_memory_allocated() - before
        row = {"case": "simple_gla, one sequence", **shape.row(), "ns_per_token": round(timing.ms * 1e6 / length, 2)}
        rows.append(results.add(**row, ms=timing.ms, bytes_per_token=round(peak / length, 1)))
        del q, k, v, inputs
        torch.cuda.empty_cache()
    return rows


def decoding(run: Run, results: Any, name: str) -> dict[str, Any]:
    """One token a sequence from a state: GB/s of the state, read and written."""
    op = ac.compile(name, plan="recurrent")
    shape = Shape(b=64, h=16, m=1, d=128, unit_keys=True)
    inputs = (gated_factors if name == "gated_delta_net" else gates)(shape, "cuda")
    with torch.no_grad():
        q, k, v = (x.detach() for x in shape.tensors())
        state = torch.randn(shape.b, shape.h, shape.d, shape.d, device="cuda")
        step = lambda: op(q, k, v, **inputs, initial_state=state, output_final_state=True)
        timing = race({"attncc": step})["attncc"]
    gbps = 2 * state.numel() * 4 / timing.ms / 1e6
    sizes = {"B": shape.b, "Hq": shape.h, "Dqk": shape.d}
    return dict(results.add(case=f"{name}, a step", **sizes, ms=timing.ms, gbps=round(gbps, 1)))


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("linear")
    known = peers()
    asked = run.options.get("variant") or list(CASES)
    names = run.take([name for name in CASES if name in asked], quick=2)
    # ours first: their checks take longest
    pieces = [("attncc", name, 0) for name in names]
    pieces += [("fla", name, share) for name in names if name in known for share in range(SHARES)]
    ready = dict(zip(pieces, run.ahead(prepared, pieces), strict=True))
    results.note("seconds ahead", round(run.budget.elapsed()))
    if known:
        results.note(
            "fla", f"tuned at {LENGTHS[0]} tokens, {REP_MS} ms a configuration; linear_attention with its maps"
        )
    for piece, done in ready.items():
        if done.error is not None and piece[0] == "attncc":
            run.fail(results, piece[1], NotReadyError(done.error), case=piece[1])
        elif done.error is not None:  # what it left, the tuning has to compile
            results.note(" ".join(map(str, piece)), done.error)
    sound = [name for name in names if ready["attncc", name, 0].error is None]
    shown = []
    for length in run.take(list(LENGTHS), quick=1):
        for name in sound:
            if run.out_of_time(results, f"{name} at {length}"):
                break
            found = ready["attncc", name, 0].value
            shown += measured(run, results, CASES[name], length, known.get(name), found)
    columns = ["case", "N", "mode", "ms", "GB/s", "fla ms", "/fla"]
    lines = [
        [
            *(row["case"], str(row["N"]), row["mode"], f"{row['attncc']['ms']:.3f}", f"{row['attncc']['gbps']:.0f}"),
            f"{row['peers']['fla']['ms']:.3f}" if "fla" in row["peers"] else "",
            f"{row['ratio']['fla']:.2f}" if "fla" in row["ratio"] else "",
        ]
        for row in shown
    ]
    run.show(f"linear, {results.meta['gpu']}", columns, lines)
    if not run.out_of_time(results, "long sequences"):
        grown = [[str(r["N"]), str(r["ns_per_token"]), str(r["bytes_per_token"])] for r in by_length(run, results)]
        run.show("one sequence", ["tokens", "ns a token", "bytes a token"], grown)
        steps = [decoding(run, results, name) for name in ("simple_gla", "gated_delta_net")]
        lines = [[found["case"], f"{found['ms']:.4f}", str(found["gbps"])] for found in steps]
        run.show("decoding", ["case", "ms", "GB/s"], lines)
    results.write()
