"""Format the facts about a variant as the text of `attncc explain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attncc.runtime.explain_linear import linear_lines
from attncc.runtime.explain_outputs import output_lines
from attncc.schedule.problem import KernelSchedule


def text_of(found: Mapping[str, Any]) -> str:
    """Facts as text."""
    s, device = found["sizes"], found["device"]
    heads = f"{s['h']}/{s['h_kv']}" if s["h"] != s["h_kv"] else f"{s['h']}"
    dims = f"{s['d_qk']}/{s['d_v']}" if s["d_qk"] != s["d_v"] else f"{s['d_qk']}"
    call = f"B={s['b']} H={heads} M={s['q_idx']} N={s['kv_idx']} D={dims} {found['dtype']}"
    numbers = "".join(f" {name}={value}" for name, value in found["scalars"].items())
    parts = [
        f"{found['name']}  {call}{numbers}  on {device['title']} ({device['target']})",
        _section("formula", [f"{stage:<10} = {text}" for stage, text in found["stages"].items()]),
        *([_section("made before, by an op of its own", _assigned(found["made"]))] if found["made"] else []),
        *_sweep_texts(found),
        _section(f"forward: {_passes(found)} over the keys, because", found["proof"]),
        _section("merge of two parts of the keys: each accumulator is scaled, then added", _assigned(found["merge"])),
        _section("backward, derived", _backward_lines(found["backward"])),
    ]
    parts.append(_section("in linear time", linear_lines(found["linear"])))
    if found["outputs"]:
        parts.append(_section("outputs, where a call asks for them", output_lines(found["outputs"])))
    origin = {
        "model": "the cost model's first choice",
        "tuned": "measured on this machine and cached",
        "shipped": "measured, and shipped with attncc",
        "user": "as given",
    }[found["origin"]]
    with_dq = not found["dq_passed_on"]
    parts += [_kernel_text(name, kernel, found["sizes"], with_dq) for name, kernel in found["kernels"].items()]
    if found["dq_apart"] is not None:
        if found["dq_of_rows"]:
            wanted = " and ".join(found["dq_apart"])
            wanted = f"; dq makes it where gradients of {wanted} are wanted" if wanted else ""
            parts.append(f"of heads as wide a second kernel in Gluon makes dQ{wanted}")
        elif found["dq_passed_on"]:
            parts.append("dq makes dQ, with what terms of the similarity pass on to it")
        else:
            parts.append(_sums_text(found))
    parts.append(
        f"the schedule is {origin}: the lines with ->\n"
        "times are predicted, in us: of all, then of each unit, where * limits; registers are estimated "
        "(attncc compile counts them)"
    )
    return "\n\n".join(parts)


def _sums_text(found: Mapping[str, Any]) -> str:
    """What a Gluon dkdv sums besides dK and dV, in which order, and where it does not."""
    reasons = [f"the gradient of {name} is wanted" for name in found["dq_apart"]]
    if found["ordered"] and not found["dq_in_turn"]:
        return "dq makes dQ, for the order of sums is fixed"
    if found["ordered"]:
        return f"dkdv sums dQ in a fixed order, in which its programs take turns{_apart(reasons)}"
    turns = "; its programs take turns where the order must be fixed" if found["dq_in_turn"] else ""
    reasons = reasons if found["dq_in_turn"] else ["the order must be fixed", *reasons]
    dealt = "; a program has block after block of keys in that order" if found["dealt"] else ""
    sums = " and ".join(["dQ", *(f"the gradient of {name}" for name in found["by_distance"])])
    return f"dkdv sums {sums} in a free order{dealt}{turns}{_apart(reasons)}"


def _apart(reasons: Sequence[str]) -> str:
    return f"; dq makes dQ where {', or '.join(reasons)}" if reasons else ""


def _passes(found: Mapping[str, Any]) -> str:
    count = found["passes"]
    return "1 pass" if count == 1 else f"the last of {count} passes"


def _sweep_texts(found: Mapping[str, Any]) -> list[str]:
    """The passes before the last one."""
    texts = []
    for sweep in found["sweeps"]:
        title = f"forward: {sweep['pass']} over the keys, because {sweep['reason']}"
        texts.append(_section(title, [*_assigned(sweep["completes"]), *sweep["proof"]]))
    return texts


def _section(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)])


#: a name longer than this, as of an entry of a table by a long index, does not push all others' right sides away
_WIDEST_NAME = 40


def _assigned(values: Mapping[str, str]) -> list[str]:
    width = max((len(name) for name in values if len(name) <= _WIDEST_NAME), default=0)
    return [f"{name:<{width}} = {text}" for name, text in values.items()]


def _backward_lines(backward: Mapping[str, Any]) -> list[str]:
    if "none" in backward:
        return [f"none: {line}" if i == 0 else line for i, line in enumerate(backward["none"].splitlines())]
    rows: dict[str, str] = {}
    branches = backward.get("branches", [backward])
    for i, own in enumerate(branches):
        tag = f"_{i}" if len(branches) > 1 else ""
        rows |= {f"{name} (saved by the forward)": text for name, text in own["saved"].items()}
        rows |= {f"weight{tag}": own["weight"], "dp": "dot(dout, v_vec)"}
        delta = own["delta"] and own["delta"].replace("out)", f"share{tag})" if tag else "out)")
        rows |= {f"delta{tag}": delta} if delta else {}
        rows |= {f"{name} (a sweep of its own)": text for name, text in own["parts"].items()}
        rows |= own["cotangents"]
        rows |= {f"{name} (a sweep of its own)": text for name, text in own["columns"].items()}
        looped = dict(own["looped"])
        by_dot = not looped or own["dqk"] != "0"
        rows |= {f"dqk{tag}": own["dqk"]} if by_dot else {}
        rows |= {name: text for name, text in looped.items() if not name.endswith("_vec")}
        for name, text in (("dq_vec", f"dqk{tag}*k_vec{tag}"), ("dk_vec", f"dqk{tag}*q_vec{tag}")):
            terms = [text] * by_dot + [looped.get(name, "0")]
            rows[f"{name}{tag}"] = " + ".join(t for t in terms if t != "0") or "0"
    weights = " + ".join(f"weight_{i}" for i in range(len(branches)))
    rows["dv_vec"] = "weight*dout" if len(branches) == 1 else f"({weights})*dout"
    for name, terms in backward["inputs"].items():
        rows[name] = ", plus ".join(terms)
    return _assigned(rows)


def _kernel_text(name: str, kernel: Mapping[str, Any], sizes: Mapping[str, int], with_dq: bool) -> str:
    """A kernel's candidates; `with_dq`: in Gluon, dkdv computes dQ, too."""
    tiles = kernel["tiles"]
    live = tiles["full"] + tiles["mixed"]
    chosen = KernelSchedule(**kernel["chosen"])
    reason = f" ({kernel['why_backend']})" if kernel["why_backend"] else ""
    written = f"{name}{', in Triton' + reason if reason else ''}"
    if chosen.backend == "gluon":
        written = f"{name}, in Gluon{reason}{', with dQ' if name == 'dkdv' and with_dq else ''}"
    if chosen.splits and name == "dkdv":
        written += ", a program for each query head of a group; they add up dK and dV in turns"
    elif chosen.splits:
        written += f", the keys in {chosen.splits} parts" if chosen.splits > 1 else ", the heads of a group in one tile"
    if chosen.strips:
        written += f", a tile in {chosen.strips} strips of queries, which take fewer registers"
    lines = [
        written,
        f"    tiles of {chosen.block_m} x {chosen.block_n}, a head: {tiles['full']} full, "
        f"{tiles['mixed']} mixed, {tiles['empty']} empty ({live / tiles['total']:.0%} visited)",
        *_candidate_lines(kernel["candidates"]),
    ]
    more = kernel["considered"] - len(kernel["candidates"])
    lines += [f"    ... and {more} more"] if more > 0 else []
    languages = {KernelSchedule(**c["schedule"]).backend for c in kernel["candidates"]}
    if name == "dkdv" and with_dq and chosen.backend == "gluon" and "triton" in languages:
        lines.append("    those in Gluon make dQ, too; beside those in Triton there is the kernel dq")
    return "\n".join(lines)


def _candidate_lines(candidates: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a candidate: predicted microseconds in all and of each unit, with a star at the one that limits; shared
    memory in KiB."""
    tilings = [KernelSchedule(**c["schedule"]) for c in candidates]
    width = max(5, *(len(_block(ks)) for ks in tilings))
    units = list(candidates[0]["terms"])
    lines = [f"   {'block':>{width}} warps stages    us smem regs " + " ".join(f"{unit:>4} " for unit in units)]
    for ks, c in zip(tilings, candidates, strict=True):
        times = (f"{_us(c['terms'][unit]):>{max(len(unit), 4)}}{'*' if unit == c['limit'] else ' '}" for unit in units)
        lines.append(
            f"{'->' if c['chosen'] else '  '} {_block(ks):>{width}} {ks.num_warps:>5} {ks.num_stages:>6} "
            f"{_us(c['us']):>5} {c['shared_bytes'] / 1024:>3.0f}K {c['registers_estimate']:>4} {' '.join(times)}"
            f"{_spilled(c['spilled_bytes'])}"
        )
    return [line.rstrip() for line in lines]


def _spilled(count: int) -> str:
    """What a kernel that was compiled was seen to spill."""
    return f"  spills {count} bytes" if count else ""


def _us(time: float) -> str:
    return f"{time:.0f}" if time >= 100 else f"{time:.1f}"


def _block(ks: KernelSchedule) -> str:
    """A tile's sizes, in how many parts the keys, or the heads of a group, are dealt out, and the strips of a tile."""
    splits = f", {ks.splits} part{'s' * (ks.splits > 1)}" if ks.splits else ""
    strips = f", {ks.strips} strips" if ks.strips else ""
    return f"{'gluon ' if ks.backend == 'gluon' else ''}{ks.block_m}x{ks.block_n}{splits}{strips}"
