"""The measured tables of README.md and of bench/results/README.md, made from the committed result files alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench import linear_rows
from bench.record import RESULTS, ROOT, load

#: the pages with tables between markers: the comparison with the best peers, and all else that was measured
PAGES = (ROOT / "README.md", RESULTS / "README.md")
#: the card whose figures the pages show, as its results folder is called
SHOWN_GPU = "nvidia-h100-80gb-hbm3"
#: the card on which flash-linear-attention ran beside
LINEAR_GPU = "nvidia-h100-80gb-hbm3"

#: what stands behind the linear table (long sequences, steps of decoding, both plans), of the last run with time for it
LONG = "linear-long"

TITLES = {
    "full": "full",
    "causal": "causal",
    "alibi": "ALiBi + causal",
    "softcap": "softcap + causal",
    "window1024": "window of 1024",
    "documents1024": "documents of 1024",
    "MLA": "causal (MLA)",
    "S=6000": "causal",
    "D=96": "causal",
    "28/4 heads": "causal, 28/4 heads",
}


#: the cost model's units, and the peers of the suite `shelf`
UNITS = {"tensor": "matmuls", "sfu": "exp, tanh", "alu": "arithmetic", "memory": "memory", "launch": "start"}
PEERS = {
    "flex": "FlexAttention",
    "two flex": "two FlexAttention calls",
    "cudnn": "cuDNN",
    "torch.compile": "plain PyTorch, compiled",
}


def results(folder: Path, suite: str, card: str = SHOWN_GPU, failures: bool = False) -> dict[str, Any]:
    """The committed results of a suite on a card; ValueError for files that must not be published. `failures`: the
    table says which rows failed."""
    data = load(folder / card / f"{suite}.json")
    if data.get("quick"):
        raise ValueError(f"{suite}.json comes from a --quick run")
    broken = [row for row in data["rows"] if "error" in row]
    if broken and not failures:
        raise ValueError(f"{suite}.json has failed rows: {', '.join(str(row.get('case')) for row in broken)}")
    return data


def _provenance(data: dict[str, Any]) -> str:
    commit = (data["commit"] or "unknown")[:12]
    return (
        f"{data['gpu']}, torch {data['torch']}, triton {data['triton']}, cuDNN {data['cudnn']}, "
        f"{data['date'][:10]}, commit {commit}: `{data['command']}`."
    )


def _entry(entry: dict[str, Any] | None) -> str:
    return "-" if entry is None or "tflops" not in entry else f"{entry['tflops']:.0f}"


def dense_table(folder: Path) -> str:
    """TFLOP/s forward / backward of the dense suite, beside each peer, and our ratios to FlexAttention."""
    data = results(folder, "dense")
    cells: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in data["rows"]:
        cells.setdefault((row["case"], row["M"]), {})[row["mode"]] = row
    lines = [
        "| TFLOP/s forward / backward | S | attncc | FlexAttention | ratio | attncc in Triton | ratio | cuDNN | "
        "FlashAttention-2 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (case, length), modes in cells.items():
        rows = [modes[mode] for mode in ("forward", "backward")]
        ours = " / ".join(f"{row['attncc']['tflops']:.0f}" for row in rows)
        peers = {name: [_entry(row["peers"].get(name)) for row in rows] for name in ("triton", "flex", "cudnn", "fa2")}
        shown = {name: "" if set(pair) == {"-"} else " / ".join(pair) for name, pair in peers.items()}
        fields = (
            *(TITLES[case], f"{length // 1024}k", f"**{ours}**", shown["flex"], _over_flex(rows, "attncc")),
            *(shown["triton"], _over_flex(rows, "triton"), shown["cudnn"], shown["fa2"]),
        )
        lines.append(f"| {' | '.join(fields)} |")
    lines += ["", f"bf16, D=128, H=16, 32k tokens, exact mask area. {_provenance(data)}"]
    return "\n".join(lines)


def _over_flex(rows: list[dict[str, Any]], name: str) -> str:
    """A contestant's TFLOP/s over FlexAttention's, a figure a row."""
    found = []
    for row in rows:
        entries = {**row["peers"], "attncc": row["attncc"]}
        pair = [entries.get(each, {}).get("tflops") for each in (name, "flex")]
        found.append(f"{pair[0] / pair[1]:.2f}x" if all(pair) else "-")
    return "" if set(found) == {"-"} else " / ".join(found)


def hopper_table(folder: Path) -> str:
    """TFLOP/s forward / backward of plain attention at each head dimension, beside FlashAttention-4 and cuDNN."""
    data = results(folder, "hopper")
    lines = [
        "| TFLOP/s forward / backward | S | D | attncc | FlashAttention-4 | cuDNN | ratio to the better |",
        "|---|---|---|---|---|---|---|",
    ]
    for (case, length, dim), modes in _plain_cells(data).items():
        rows = [modes[mode] for mode in ("forward", "backward")]
        ours = " / ".join(f"{row['attncc']['tflops']:.0f}" for row in rows)
        peers = [" / ".join(_entry(row["peers"].get(name)) for row in rows) for name in ("fa4", "cudnn")]
        best = [max(row["peers"].get(name, {}).get("tflops", 0) for name in ("fa4", "cudnn")) for row in rows]
        ratios = " / ".join(f"{row['attncc']['tflops'] / b:.2f}x" for row, b in zip(rows, best, strict=True))
        dims = f"{dim}" if rows[0]["Dv"] == dim else f"{dim}/{rows[0]['Dv']}"
        size = f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"
        fields = (TITLES.get(case, case), size, dims, f"**{ours}**", *peers, ratios)
        lines.append(f"| {' | '.join(fields)} |")
    return "\n".join([*lines, "", f"bf16, about 32k tokens. {_provenance(data)}"])


def _plain_cells(data: dict[str, Any]) -> dict[tuple[str, int, int], dict[str, dict[str, Any]]]:
    """The rows by mode of each case, length and width that ran beside a kernel written by hand."""
    cells: dict[tuple[str, int, int], dict[str, dict[str, Any]]] = {}
    for row in data["rows"]:
        if any(name in row["peers"] for name in ("fa4", "cudnn")):
            cells.setdefault((row["case"], row["M"], row["Dqk"]), {})[row["mode"]] = row
    return cells


def formulas_table(folder: Path) -> str:
    """TFLOP/s forward / backward of other formulas, in the run of `hopper_table`: beside FlexAttention where it can say
    them at such a cost, else beside our own softmax under the same mask."""
    data = results(folder, "hopper")
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in data["rows"]:
        if any(name in row["peers"] for name in ("flex", "own softmax")):
            cells.setdefault(row["case"], {})[row["mode"]] = row
    lines = [
        "| TFLOP/s forward / backward | attncc | FlexAttention | our softmax | ratio |",
        "|---|---|---|---|---|",
    ]
    for case, modes in cells.items():
        rows = [modes[mode] for mode in ("forward", "backward")]
        ours = " / ".join(f"{row['attncc']['tflops']:.0f}" for row in rows)
        names = ("flex", "own softmax")
        peers = [" / ".join(_entry(row["peers"][name]) for row in rows if name in row["peers"]) for name in names]
        ratios = " / ".join(f"{row['reached']:.2f}x" for row in rows)
        lines.append(f"| {' | '.join((TITLES.get(case, case), f'**{ours}**', *peers, ratios))} |")
    first = next(iter(cells.values()))["forward"]
    lines += ["", f"bf16, S={first['M'] // 1024}k, D={first['Dqk']}. {_provenance(data)}"]
    return "\n".join(lines)


def sigmoid_table(folder: Path) -> str:
    """Sigmoid attention beside our own softmax and plain PyTorch: TFLOP/s forward / backward / one after the other."""
    data = results(folder, "sigmoid")
    cells: dict[int, dict[str, dict[str, Any]]] = {}
    for row in data["rows"]:
        if row["case"] == "sigmoid":
            cells.setdefault(row["M"], {})[row["mode"]] = row
    lines = [
        "| TFLOP/s forward / backward / both | S | attncc | our softmax | ratio | plain PyTorch, compiled | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for length, modes in cells.items():
        rows = [modes[mode] for mode in ("forward", "backward", "both")]
        fields = [f"**{' / '.join(_entry(row['attncc']) for row in rows)}**"]
        for peer in ("own softmax", "torch.compile"):
            fields.append(" / ".join(_entry(row["peers"][peer]) for row in rows))
            fields.append(" / ".join(f"{row['ratio'][peer]:.2f}x" for row in rows))
        lines.append(f"| sigmoid + causal | {length // 1024}k | {' | '.join(fields)} |")
    lines += ["", f"Plain PyTorch holds whole maps, so it has two sequences. {_provenance(data)}"]
    return "\n".join(lines)


def latency_table(folder: Path) -> str:
    """Seconds to the first result, and microseconds of host time a call, beside the peers that were ready in time."""
    compiled, host = results(folder, "compile"), results(folder, "host", failures=True)
    seconds = {(row["case"], row["cache"]): row["total_s"] for row in compiled["rows"]}
    lines = ["| | attncc | FlexAttention | SDPA |", "|---|---|---|---|"]
    for cache, what in (("cold", "with empty caches"), ("warm disk cache", "in a new process with warm caches")):
        ours, theirs = (
            f"{seconds[name, cache]:.2f} s" if (name, cache) in seconds else "" for name in ("attncc", "flex")
        )
        lines.append(f"| formula to first result, forward and backward, {what} | **{ours}** | {theirs} | |")
        for name in dict.fromkeys(case for case, _ in seconds if case not in ("attncc", "flex")):
            lines.append(f"| the same of `{name}` by chunks, {what} | **{seconds[name, cache]:.2f} s** | | |")
    for row in (row for row in host["rows"] if "us" in row):
        us = {name: f"{value:.0f} us" for name, value in row["us"].items()}
        fields = (f"host time: {TITLES.get(row['case'], row['case'])}, {row['mode']}", f"**{us['attncc']}**")
        lines.append(f"| {' | '.join(fields)} | {us.get('flex', '')} | {us.get('sdpa', '')} |")
    errors = dict.fromkeys(row["error"] for row in host["rows"] if "error" in row)
    missing = f"What is not shown of the host's time failed: {'; '.join(errors)}. " if errors else ""
    lines += ["", f"Seconds are beyond imports and the CUDA context. {_provenance(compiled)}"]
    lines += ["", f"{missing}{_provenance(host)}"]
    return "\n".join(lines)


def decode_table(folder: Path) -> str:
    """TB/s of keys and values read of the decode suite's calls with one query, beside each peer."""
    data = results(folder, "decode")
    names = ("cudnn", "fa2", "flex")
    lines = ["| | sequences x keys | attncc | cuDNN | FlashAttention-2 | FlexAttention |", "|---|---|---|---|---|---|"]
    for row in data["rows"]:
        if row["M"] == 1:
            peers = [row["peers"].get(name, {}).get("tbps") for name in names]
            shown = ["" if tbps is None else f"{tbps:.2f}" for tbps in peers]
            what, size = TITLES.get(row["case"], row["case"]), f"{row['B']} x {row['N'] // 1024}k"
            lines.append(f"| {what} | {size} | **{row['attncc']['tbps']:.2f}** | {' | '.join(shown)} |")
    lines += ["", f"bf16. {_provenance(data)}"]
    return "\n".join(lines)


def variants_table(folder: Path) -> str:
    """TFLOP/s of every shipped variant, the share of plain causal attention's, and what limits those below it; behind
    the table, those that the run had no figure for: they failed, or it was stopped while it measured them."""
    data = results(folder, "variants", failures=True)
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    missing = _missing(row["case"] for row in data["rows"] if "passes" not in row)
    for row in data["rows"]:
        if "passes" in row:
            cases.setdefault(row["case"], {})[row["mode"]] = row
    lines = [
        "| TFLOP/s forward / backward | passes | attncc | of plain causal | limited by (busy) |",
        "|---|---|---|---|---|",
    ]
    for case, modes in cases.items():
        rows = [modes[mode] for mode in ("forward", "backward") if mode in modes]
        ours = " / ".join(f"{row['attncc']['tflops']:.0f}" for row in rows)
        ratio = " / ".join(f"{each:.2f}x" for row in rows for each in row["ratio"].values())
        limits = " / ".join(_limit(row["attncc"]["limits"]) for row in rows)
        lines.append(f"| `{case}` | {rows[0]['passes']} | **{ours}** | {ratio} | {limits} |")
    shape = data["rows"][0]
    size = f"B={shape['B']}, H={shape['Hq']}, S={shape['M']}, D={shape['Dqk']}"
    lines += ["", f"bf16, {size}, exact mask area; the unit is the cost model's.{missing} {_provenance(data)}"]
    return "\n".join(lines)


def _missing(cases: Iterable[str]) -> str:
    """The sentence that names the cases for which a run has no figure, each once."""
    names = dict.fromkeys(f"`{case}`" for case in cases)
    return f" Without a figure in this run: {', '.join(names)}." if names else ""


def _limit(limits: dict[str, Any]) -> str:
    """The unit that the slowest kernel of a mode waits for, and the share of its time that the unit is busy."""
    slowest = max(limits.values(), key=lambda kernel: kernel["ms"])
    return f"{UNITS[slowest['unit']]} {slowest['busy'].get(slowest['unit'], 0):.0%}"


def shelf_table(folder: Path) -> str:
    """What other tools say in several calls, or with whole maps: TFLOP/s and ratios, then TB/s of absorbed MLA."""
    data = results(folder, "shelf")
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    absorbed = []
    for row in data["rows"]:
        if row["mode"] == "decode":
            absorbed.append(row)
        else:
            cases.setdefault(row["case"], {})[row["mode"]] = row
    lines = ["| | S | D | attncc | beside | TFLOP/s | ratio | bytes |", "|---|---|---|---|---|---|---|---|"]
    for case, modes in cases.items():
        rows = [modes[mode] for mode in ("forward", "backward")]
        ours = " / ".join(f"{row['attncc']['tflops']:.0f}" for row in rows)
        dims = f"{rows[0]['Dqk']}" if rows[0]["Dv"] == rows[0]["Dqk"] else f"{rows[0]['Dqk']}/{rows[0]['Dv']}"
        held = rows[0].get("peak_bytes")
        for name in rows[0]["peers"]:
            theirs = " / ".join(_entry(row["peers"][name]) for row in rows)
            ratio = " / ".join(f"{row['ratio'][name]:.1f}x" if name in row["ratio"] else "-" for row in rows)
            memory = f"{held['attncc'] / 2**20:,.0f} : {held[name] / 2**20:,.0f} MiB" if held and name in held else ""
            size = f"{rows[0]['M'] // 1024}k"
            fields = (TITLES.get(case, case), size, dims, f"**{ours}**", PEERS[name], theirs, ratio, memory)
            lines.append(f"| {' | '.join(fields)} |")
    lines += ["", "| TB/s of the latent cache | sequences x keys | attncc | FlexAttention | plain PyTorch |"]
    lines += ["|---|---|---|---|---|"]
    for row in absorbed:
        rates = [row["peers"].get(name, {}).get("tbps") for name in ("flex", "torch.compile")]
        shown = " | ".join("cannot" if rate is None else f"{rate:.2f}" for rate in rates)
        size = f"{row['B']} x {row['N'] // 1024}k"
        lines.append(
            f"| {row['case']}, {row['Hq']} heads, 576/512 | {size} | **{row['attncc']['tbps']:.2f}** | {shown} |"
        )
    lines += ["", f"bf16, forward / backward. {_provenance(data)}"]
    return "\n".join(lines)


def linear_table(folder: Path) -> str:
    """Milliseconds forward / backward in linear time, beside flash-linear-attention."""
    data = results(folder, "linear", LINEAR_GPU, failures=True)
    cells: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in data["rows"]:
        if "mode" in row:
            cells.setdefault((row["case"], row["N"]), {})[row["mode"]] = row
    names = list(dict.fromkeys(case for case, _ in cells))
    lines = ["| ms forward / backward | tokens | attncc | flash-linear-attention | ratio |", "|---|---|---|---|---|"]
    for case, length in sorted(cells, key=lambda cell: (names.index(cell[0]), cell[1])):
        rows = [cells[case, length][mode] for mode in ("forward", "backward")]
        ours = " / ".join(f"{row['attncc']['ms']:.2f}" for row in rows)
        peers = [row["peers"].get("fla", {}).get("ms") for row in rows]
        theirs = " / ".join("refuses" if ms is None else f"{ms:.2f}" for ms in peers)
        ratio = " / ".join(
            "-" if ms is None else f"{ms / r['attncc']['ms']:.2f}x" for r, ms in zip(rows, peers, strict=True)
        )
        shown = f"`{case}`{linear_rows.dims(rows[0], data['rows'])}"
        lines.append(f"| {shown} | {length // 1024}k | **{ours}** | {theirs} | {ratio} |")
    failed = [row["case"] for row in data["rows"] if "error" in row]
    first = next(row for row in data["rows"] if "mode" in row)
    size = f"bf16, B={first['B']}, H={first['Hq']}, D={first['Dqk']}."
    missing = f" Not shown, for a gradient was off by more than is allowed: {', '.join(failed)}." if failed else ""
    lines += ["", f"{size}{missing} {_provenance(data)}"]
    lines += linear_rows.limited(data["rows"])
    told = linear_rows.behind(data["rows"])
    if not told and (folder / LINEAR_GPU / f"{LONG}.json").exists():
        longer = results(folder, LONG, LINEAR_GPU)
        told = [*linear_rows.behind(longer["rows"]), "", _provenance(longer)]
    return "\n".join([*lines, *told])


def outputs_table(folder: Path) -> str:
    """Milliseconds of the forward alone, and with an auxiliary output."""
    data = results(folder, "outputs", failures=True)
    lengths = sorted({row["M"] for row in data["rows"]})
    cases: dict[str, dict[int, dict[str, Any]]] = {}
    missing = _missing(row["case"] for row in data["rows"] if "error" in row)
    for row in (row for row in data["rows"] if "error" not in row):
        cases.setdefault(row["case"], {})[row["M"]] = row
    columns = " | ".join(f"S={length // 1024}k | more" for length in lengths)
    lines = [
        f"| ms, forward alone and with the output | {columns} |",
        f"|---|{'---|---|' * len(lengths)}",
    ]
    for case, by_length in cases.items():
        rows = [by_length[length] for length in lengths]
        shown = " | ".join(f"{row['forward_ms']:.2f} -> {row['ms']:.2f} | {row['more']:+.0%}" for row in rows)
        lines.append(f"| `{case}` | {shown} |")
    lines += ["", f"Causal, bf16, D={data['rows'][0]['Dqk']}, H={data['rows'][0]['Hq']}.{missing} {_provenance(data)}"]
    return "\n".join(lines)


#: what stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`
TABLES: dict[str, Callable[[Path], str]] = {
    "dense": dense_table,
    "hopper": hopper_table,
    "formulas": formulas_table,
    "sigmoid": sigmoid_table,
    "decode": decode_table,
    "latency": latency_table,
    "linear": linear_table,
    "variants": variants_table,
    "shelf": shelf_table,
    "outputs": outputs_table,
}


def refresh(text: str, folder: Path = RESULTS) -> str:
    """A page's `text` with every marked table made anew. ValueError: an unknown marker, or one that is not closed."""
    for name in re.findall(r"<!-- bench:([\w-]+) -->", text):
        if name not in TABLES:
            raise ValueError(f"a page marks a table bench:{name}; there are {', '.join(TABLES)}")
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"a page opens {begin} and does not close it")
        text = f"{before}{begin}\n{TABLES[name](folder)}\n{end}{after}"
    return text
