"""What the README says of the suite `linear` behind its table: limits, longer sequences, decoding, both plans."""

from __future__ import annotations

from typing import Any

#: those of the model of calls in linear time, and the length at which they are said
UNITS = {
    "memory": "memory",
    "tensor": "matmuls",
    "chain": "a chunk's matmuls, which wait for one another and for their loads",
    "prepare": "the arithmetic of pairs whose channels decay apart",
}
LIMITED_AT = 8192
CHOSEN = {"parallel": "pairs", "chunk": "chunks", "recurrent": "tokens"}


def dims(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The head dimensions of a row, where they are not those of the first."""
    first = next(row for row in rows if "mode" in row)
    return "" if row["Dqk"] == first["Dqk"] else f", D={row['Dqk']}/{row['Dv']}"


def limited(rows: list[dict[str, Any]]) -> list[str]:
    """What the cost model says limits the forwards at one length."""
    by_unit: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("N") == LIMITED_AT and "limit" in row.get("attncc", {}):
            by_unit.setdefault(row["attncc"]["limit"], []).append(row)
    parts = []
    for unit, found in by_unit.items():
        names = ", ".join(f"`{row['case']}`" for row in found)
        expected, ms = found[0]["attncc"]["predicted_ms"], found[0]["attncc"]["ms"]
        parts.append(
            f"{names} by {UNITS[unit]} ({expected[unit]:.2f} ms of {expected['all']:.2f} predicted, {ms:.2f} measured)"
        )
    if not parts:
        return []
    least = next(iter(by_unit.values()))[0]["attncc"]["predicted_ms"]["least"]
    said = f"What limits the forwards of {LIMITED_AT // 1024}k tokens, by the cost model: {'; '.join(parts)}."
    return ["", f"{said} To move q, k, v and out once takes {least:.2f} ms."]


def longer(rows: list[dict[str, Any]]) -> list[str]:
    """Nanoseconds a token as sequences grow."""
    grown: dict[tuple[str, int], dict[int, float]] = {}
    for row in rows:
        if row["case"].endswith(", longer"):
            grown.setdefault((row["case"].removesuffix(", longer"), row["B"]), {})[row["N"]] = row["ns_per_token"]
    if not grown:
        return []
    lengths = sorted({length for each in grown.values() for length in each})
    head = " | ".join(f"{length // 1024}k" for length in lengths)
    lines = ["", f"| ns a token, forward, 16 heads | sequences | {head} |", f"|---|---|{'---|' * len(lengths)}"]
    for (case, sequences), each in grown.items():
        cells = " | ".join(f"{each[length]:.1f}" if length in each else "" for length in lengths)
        lines.append(f"| `{case}` | {sequences} | {cells} |")
    return lines


def steps(rows: list[dict[str, Any]]) -> list[str]:
    """A step of decoding beside a copy of the state."""
    found = [row for row in rows if row["case"].endswith(", a step") and "peers" in row]
    parts = [
        f"`{row['case'].removesuffix(', a step')}` {row['gbps'] / 1e3:.2f} (a copy {row['peers']['copy'] / 1e3:.2f})"
        for row in found
    ]
    if not parts:
        return []
    return [
        "",
        f"A step of decoding, {found[0]['B']} sequences, TB/s of the state, read and written: {', '.join(parts)}.",
    ]


def both(rows: list[dict[str, Any]]) -> list[str]:
    """All pairs beside chunks, and which the model chooses."""
    found = [row for row in rows if row["case"].endswith(", both plans")]
    if not found:
        return []
    parts = [
        f"{row['N']} tokens {row['ms']['parallel']:.3f} / {row['ms']['chunk']:.3f} ({CHOSEN[row['chosen']]})"
        for row in found
    ]
    case = found[0]["case"].removesuffix(", both plans")
    return ["", f"`{case}`, one sequence, ms over all pairs / by chunks, and what `auto` takes: {', '.join(parts)}."]


def behind(rows: list[dict[str, Any]]) -> list[str]:
    """All that a run says of longer sequences, of decoding and of both plans."""
    return [*longer(rows), *steps(rows), *both(rows)]
