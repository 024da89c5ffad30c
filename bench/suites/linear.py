"""Attention in linear time beside flash-linear-attention: chunks forward and backward, long sequences, decoding.

And both plans of one variant, for the length from which chunks are faster than all pairs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import attncc as ac
from attncc.passes.linearize import linearize
from attncc.schedule.device import device_of
from attncc.schedule.linear import LinearSizes
from attncc.schedule.linear_cost import choose_plan, chunk_cost, quadratic_us
from bench import area
from bench.case import Case, Shape, Tensors
from bench.check import against_reference, relative_rms
from bench.fla import REP_MS, Peer, compiled_ahead, peers, tuning_briefly
from bench.run import NotReadyError, Run
from bench.timing import Timing, race

#: the sizes at which flash-linear-attention was first measured here, so that figures can be laid beside those
SHAPE = {"b": 2, "h": 16, "d": 128}
#: the peer has weights of degree 2 for heads up to 16
OWN = {"taylor_causal": {"d": 16, "dv": 128}}
LENGTHS = (8192, 2048, 32768)
#: where the reference, which has every pair of a head in float64, checks a case
CHECKED = 4096
#: and that of a recurrence, which goes from token to token; of rwkv6, which has a product a channel of each pair
CHECKED_TOKENS = 1024
#: ever longer sequences: one, and as many as fill the machine; time and memory a token must not grow
TOKENS, SEQUENCES = (8192, 32768, 131072, 524288), (1, 8)
#: where all pairs and chunks are laid side by side, for the length from which chunks are faster
AROUND = (512, 1024, 2048, 4096)
#: whose plans are laid side by side, and what is timed as sequences grow
CROSSED, GROWN = "simple_gla", ("lightning", "simple_gla")
PLANS = ("parallel", "chunk")
#: milliseconds of a round of a case and contestant
ROUND_MS = 50
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


def channel_gates_and_bonus(shape: Shape, device: str) -> Tensors:
    """And what a token's own product is weighed with."""
    generator = torch.Generator(device).manual_seed(5)
    u = torch.randn(shape.h, shape.d, generator=generator, device=device).to(shape.dtype)
    return {**channel_gates(shape, device), "u": u}


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
        ("rwkv6", channel_gates_and_bonus, ()),
        ("lightning", rates("lightning"), ("rates",)),
        ("linear_attention", lambda shape, device: {}, ()),
        ("taylor_causal", lambda shape, device: {}, ()),
        ("delta_net", factors, ("beta",)),
        ("gated_delta_net", gated_factors, ("beta", "g")),
    )
}


def shaped(name: str, length: int) -> Shape:
    """The shape of a case at a length."""
    return Shape(m=length, **{**SHAPE, **OWN.get(name, {})}, unit_keys=CASES[name].variant.graph.recurrent)


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
    share of what the peer's tuning will time; for ("around", case, length): both plans. Returns the check's errors."""
    kind, name, share = piece
    if kind == "around":
        side_by_side(name, share)
        return {}
    case, shape = CASES[name], shaped(name, LENGTHS[0])
    q, k, v = seq_first(shape)
    inputs = case.inputs(shape, "cuda")
    if kind == "fla":
        with compiled_ahead(share, SHARES):
            out = peers()[name](inputs)(q, k, v)
            with suppress(RuntimeError):  # it may refuse its backward on this machine
                torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
        return {}
    op = ac.compile(case.variant, plan="chunk")
    short = case.variant.graph.recurrent or name == "rwkv6"
    errors = against_reference(op, case, shaped(name, CHECKED_TOKENS if short else CHECKED))
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


def limit(case: Case, shape: Shape) -> dict[str, Any]:
    """What the cost model says of a forward by chunks: the unit that limits it, and the milliseconds of each. It knows
    nothing of recurrences, of degree 2, and of features and row totals."""
    plan = None if case.variant.graph.recurrent else linearize(case.variant.graph)
    if plan is None or plan.degree == 2 or plan.total:
        return {}
    rows = int(plan.decay != "none" and not plan.alike)
    sizes = LinearSizes("bf16", shape.b, shape.h, shape.m, shape.d, shape.dv, plan.decay == "channel", rows=rows)
    cost = chunk_cost(sizes, device_of(torch.device("cuda")))
    spent = {"ends": cost.ends, "least": cost.least, "all": cost.us}
    return {
        "limit": cost.limit,
        "predicted_ms": {k: float(f"{us / 1e3:.3g}") for k, us in {**cost.terms, **spent}.items()},
    }


def measured(
    run: Run, results: Any, case: Case, length: int, theirs: Peer | None, errors: dict[str, Any]
) -> list[dict[str, Any]]:
    """Time forward and backward of a case beside the peer; one row a mode. `errors`: what its check ahead found."""
    shape = shaped(case.name, length)
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
            timed = race({name: contestants[name] for name in entries}, rep_ms=ROUND_MS)
            entries = {name: entry(timing, shape, passes) for name, timing in timed.items()}
            own = entries.pop("attncc")
            if mode == "forward":
                own |= limit(case, shape)
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


def side_by_side(name: str, length: int) -> dict[str, Callable[[], object]]:
    """The forward of one sequence over all pairs, and by chunks."""
    shape = Shape(b=1, h=16, m=length, d=128)
    q, k, v = (x.detach() for x in seq_first(shape))
    inputs = CASES[name].inputs(shape, "cuda")
    calls = {plan: contestant(ac.compile(name, plan=plan), inputs) for plan in PLANS}
    for call in calls.values():
        call(q, k, v)
    return {plan: partial(call, q, k, v) for plan, call in calls.items()}


def crossing(run: Run, results: Any, name: str) -> list[dict[str, Any]]:
    """Milliseconds of both plans, and what the model says of them; one row a length."""
    rows = []
    device = device_of(torch.device("cuda"))
    for length in AROUND:
        timed = race(side_by_side(name, length))
        call = LinearSizes("bf16", 1, 16, length, 128, 128, rows=1)
        found = {plan: timing.ms for plan, timing in timed.items()}
        said = {"parallel": quadratic_us(call, device) / 1e3, "chunk": chunk_cost(call, device).us / 1e3}
        row = {"case": f"{name}, both plans", "N": length, "ms": found, "predicted_ms": said}
        rows.append(results.add(**row, chosen=choose_plan(call, device)))
    return rows


def by_length(run: Run, results: Any, name: str, sequences: int) -> list[dict[str, Any]]:
    """Nanoseconds and bytes a token of a forward, as sequences grow, up to what the GPU's memory holds."""
    op = ac.compile(name, plan="chunk")
    rows = []
    for length in run.take(list(TOKENS), quick=2):
        shape = Shape(b=sequences, h=16, m=length, d=128)
        if 4 * moved(shape) > torch.cuda.get_device_properties(0).total_memory:  # the rest is room for what is made
            break
        with torch.no_grad():
            q, k, v = (x.detach().transpose(1, 2) for x in seq_first(shape))
            inputs = CASES[name].inputs(shape, "cuda")
            op(q, k, v, **inputs)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            timing = race({"attncc": partial(op, q, k, v, **inputs)})["attncc"]
            peak = torch.cuda.max_memory_allocated() - before
        each = shape.b * length
        row = {"case": f"{name}, longer", **shape.row()}
        row |= {"ns_per_token": round(timing.ms * 1e6 / each, 2), "ms": timing.ms}
        rows.append(results.add(**row, bytes_per_token=round(peak / each, 1)))
        del q, k, v, inputs
        torch.cuda.empty_cache()
    return rows


def decoding(run: Run, results: Any, name: str) -> dict[str, Any]:
    """One token a sequence from a state: GB/s of the state, read and written, beside a copy of it."""
    op = ac.compile(name, plan="recurrent")
    shape = Shape(b=64, h=16, m=1, d=128, unit_keys=True)
    inputs = (gated_factors if name == "gated_delta_net" else gates)(shape, "cuda")
    with torch.no_grad():
        q, k, v = (x.detach() for x in shape.tensors())
        state = torch.randn(shape.b, shape.h, shape.d, shape.d, device="cuda")
        step = lambda: op(q, k, v, **inputs, initial_state=state, output_final_state=True)
        timed = race({"attncc": step, "copy": partial(torch.empty_like(state).copy_, state)})
    gbps = {name: round(2 * state.numel() * 4 / timing.ms / 1e6, 1) for name, timing in timed.items()}
    sizes = {"B": shape.b, "Hq": shape.h, "Dqk": shape.d}
    row = {"case": f"{name}, a step", **sizes, "ms": timed["attncc"].ms, "gbps": gbps["attncc"]}
    return dict(results.add(**row, peers={"copy": gbps["copy"]}))


def suite(run: Run) -> None:
    """Run the suite."""
    results = run.results("linear")
    known = peers()
    asked = run.options.get("variant") or list(CASES)
    names = run.take([name for name in CASES if name in asked], quick=2)
    # ours first: their checks take longest
    pieces = [("attncc", name, 0) for name in names]
    pieces += [("around", CROSSED, length) for length in AROUND]
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
        rows = [row for name in GROWN for b in SEQUENCES for row in by_length(run, results, name, b)]
        grown = [[str(row[key]) for key in ("case", "B", "N", "ns_per_token", "bytes_per_token")] for row in rows]
        run.show("longer sequences", ["", "B", "N", "ns a token", "bytes a token"], grown)
        steps = [decoding(run, results, name) for name in ("simple_gla", "gated_delta_net")]
        lines = [[r["case"], f"{r['ms']:.4f}", str(r["gbps"]), str(r["peers"]["copy"])] for r in steps]
        run.show("decoding", ["case", "ms", "GB/s", "of a copy"], lines)
        lines = [
            [str(row["N"]), row["chosen"], *(f"{row[of][p]:.4f}" for of in ("ms", "predicted_ms") for p in PLANS)]
            for row in crossing(run, results, CROSSED)
        ]
        run.show(
            "all pairs and chunks", ["N", "chosen", *(f"{p} {x}" for x in ("ms", "predicted") for p in PLANS)], lines
        )
    results.write()
