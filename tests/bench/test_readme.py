import json
import re

import pytest

from bench import readme
from bench.readme import SHOWN_GPU, dense_table, latency_table, refresh
from bench.suites.sigmoid import ratios, together

HEAD = {
    "suite": "dense",
    "gpu": "Some GPU",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "cudnn": 91900,
    "date": "2026-11-22T10:00:00+00:00",
    "commit": "0123456789abcdef",
    "command": "python -m bench dense",
}


def row(case, mode, ours, flex, **peers):
    entries = {"flex": {"ms": 1.0, "tflops": flex}, **{n: {"ms": 1.0, "tflops": t} for n, t in peers.items()}}
    return {
        "case": case,
        "M": 8192,
        "mode": mode,
        "attncc": {"ms": 1.0, "tflops": ours, "schedule": "x"},
        "peers": entries,
        "ratio": {name: ours / entry["tflops"] for name, entry in entries.items()},
    }


ROWS = [
    row("causal", "forward", 500.0, 400.0, triton=420.0, cudnn=559.4, fa2=335.0),
    row("causal", "backward", 300.0, 400.0, triton=280.0, cudnn=504.0, fa2=291.0),
    row("softcap", "forward", 300.0, 199.0),
    row("softcap", "backward", 250.0, 197.0),
]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, {**HEAD, "rows": ROWS})
    return tmp_path


def write(folder, data):
    path = folder / SHOWN_GPU / "dense.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data))


def test_the_table_shows_figures_ratios_and_provenance(folder):
    text = dense_table(folder)
    assert "| causal | 8k | **500 / 300** | 400 / 400 | 1.25x / 0.75x | 420 / 280 | 1.05x / 0.70x | 559 / 504 |" in text
    assert "| softcap + causal | 8k | **300 / 250** | 199 / 197 | 1.51x / 1.27x |  |  |  |  |" in text
    assert "Some GPU, torch 2.11.0, triton 3.6.0, cuDNN 91900, 2026-11-22, commit 0123456789ab" in text


def test_plain_attention_is_shown_beside_the_better_of_the_best_peers(folder):
    head = {"M": 8192, "Dqk": 192, "Dv": 128}
    rows = [
        {**row("MLA", "forward", 600.0, 1.0, fa4=660.0, cudnn=500.0), **head},
        {**row("MLA", "backward", 300.0, 1.0, cudnn=400.0), **head},
        row("cog", "forward", 300.0, 1.0),
    ]
    (folder / SHOWN_GPU / "hopper.json").write_text(json.dumps({**HEAD, "rows": rows}))
    text = readme.hopper_table(folder)
    assert "| causal (MLA) | 8k | 192/128 | **600 / 300** | 660 / - | 500 / 400 | 0.91x / 0.75x |" in text
    assert "cog" not in text


def test_other_formulas_are_shown_beside_whom_they_ran_with(folder):
    def shown(case, mode, ours, reached, **peers):
        entries = {name.replace("_", " "): {"ms": 1.0, "tflops": t} for name, t in peers.items()}
        return {**row(case, mode, ours, 1.0), "peers": entries, "reached": reached, "Dqk": 128}

    rows = [
        shown("softcap", "forward", 520.0, 2.6, flex=200.0, triton=400.0),
        shown("softcap", "backward", 500.0, 2.5, flex=200.0, triton=400.0),
        shown("sink", "forward", 600.0, 0.923, own_softmax=650.0),
        shown("sink", "backward", 500.0, 0.909, own_softmax=550.0),
        shown("causal", "forward", 600.0, 1.0, fa4=600.0),
    ]
    (folder / SHOWN_GPU / "hopper.json").write_text(json.dumps({**HEAD, "rows": rows}))
    text = readme.formulas_table(folder)
    assert "| softcap + causal | **520 / 500** | 200 / 200 |  | 2.60x / 2.50x |" in text
    assert "| sink | **600 / 500** |  | 650 / 550 | 0.92x / 0.91x |" in text
    assert "| causal |" not in text


def test_sigmoid_is_shown_by_mode_and_as_a_training_step(folder):
    def timed(mode, ms, ours):
        peers = {"own softmax": {"ms": ms, "tflops": 500.0}, "torch.compile": {"ms": 4 * ms, "tflops": 100.0}}
        found = {**row("sigmoid", mode, ours, 1.0), "attncc": {"ms": ms, "tflops": ours, "schedule": {}}}
        return {**found, "peers": peers, "ratio": ratios({**found, "peers": peers})}

    rows = [timed("forward", 2.0, 900.0), timed("backward", 6.0, 500.0)]
    rows.append(together(rows))
    (folder / SHOWN_GPU / "sigmoid.json").write_text(json.dumps({**HEAD, "rows": rows}))
    text = readme.sigmoid_table(folder)
    assert "| sigmoid + causal | 8k | **900 / 500 / 600** | 500 / 500 / 500 | 1.80x / 1.00x / 1.20x |" in text
    assert "| 100 / 100 / 100 | 9.00x / 5.00x / 6.00x |" in text


def test_decoding_is_shown_in_bytes_a_second(folder):
    one = {"case": "causal", "B": 8, "M": 1, "N": 65536, "attncc": {"tbps": 3.0}, "peers": {"cudnn": {"tbps": 3.031}}}
    (folder / SHOWN_GPU / "decode.json").write_text(json.dumps({**HEAD, "rows": [one, {**one, "M": 4}]}))
    text = readme.decode_table(folder)
    assert text.count("causal") == 1
    assert "| causal | 8 x 64k | **3.00** | 3.03 |  |  |" in text


def test_a_peer_that_failed_shows_no_figure(folder):
    broken = [dict(r) for r in ROWS[:2]]
    for r in broken:
        r["peers"] = {**r["peers"], "cudnn": {"error": "RuntimeError"}}
    write(folder, {**HEAD, "rows": broken})
    assert "1.25x / 0.75x | 420 / 280 | 1.05x / 0.70x |  | 335 / 291 |" in dense_table(folder)


def test_only_what_is_between_the_markers_changes(folder):
    text = "before\n<!-- bench:dense -->\nold\n<!-- /bench:dense -->\nafter\n"
    new = refresh(text, folder)
    assert new.startswith("before\n<!-- bench:dense -->\n| TFLOP/s")
    assert new.endswith("<!-- /bench:dense -->\nafter\n")
    assert "old" not in new
    assert refresh(new, folder) == new


def test_text_without_markers_stays(folder):
    assert refresh("nothing measured", folder) == "nothing measured"


def test_an_unknown_marker_is_an_error(folder):
    with pytest.raises(ValueError, match="bench:speed"):
        refresh("<!-- bench:speed --><!-- /bench:speed -->", folder)


def test_an_open_marker_is_an_error(folder):
    with pytest.raises(ValueError, match="does not close"):
        refresh("<!-- bench:dense -->\n", folder)


def test_a_quick_run_is_not_published(folder):
    write(folder, {**HEAD, "quick": True, "rows": ROWS})
    with pytest.raises(ValueError, match="quick"):
        dense_table(folder)


def test_failed_rows_are_not_published(folder):
    write(folder, {**HEAD, "rows": [*ROWS, {"case": "alibi", "error": "CheckFailedError: wrong"}]})
    with pytest.raises(ValueError, match="alibi"):
        dense_table(folder)


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.parent.name)
def test_the_committed_pages_show_the_committed_results(page):
    text = page.read_text()
    assert refresh(text) == text, "run `python -m bench readme`"


def test_every_table_is_on_one_page():
    marked = [name for page in readme.PAGES for name in re.findall(r"<!-- bench:([\w-]+) -->", page.read_text())]
    assert sorted(marked) == sorted(readme.TABLES)


def test_the_latency_table_shows_seconds_and_microseconds(tmp_path):
    starts = [("attncc", "cold", 2.04), ("attncc", "warm disk cache", 0.171), ("flex", "cold", 13.9)]
    starts.append(("flex", "warm disk cache", 6.0))
    compiled = [{"case": case, "cache": cache, "total_s": seconds} for case, cache, seconds in starts]
    host = [{"case": "causal", "mode": "no_grad", "us": {"attncc": 19.6, "flex": 63.0, "sdpa": 27.2}}]
    host.append({"case": "alibi", "mode": "autograd", "us": {"attncc": 33.0, "flex": 140.0}})
    for suite, rows in (("compile", compiled), ("host", host)):
        path = tmp_path / SHOWN_GPU / f"{suite}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**HEAD, "suite": suite, "command": f"python -m bench {suite}", "rows": rows}))
    text = latency_table(tmp_path)
    assert "forward and backward, with empty caches | **2.04 s** | 13.90 s | |" in text
    assert "in a new process with warm caches | **0.17 s** | 6.00 s | |" in text
    assert "| host time: causal, no_grad | **20 us** | 63 us | 27 us |" in text
    assert "| host time: ALiBi + causal, autograd | **33 us** | 140 us |  |" in text
    assert "`python -m bench host`" in text
    assert "failed" not in text
    put(tmp_path, "host", [{"case": "causal", "error": "NotReadyError: late"}, *host])
    assert "What is not shown of the host's time failed: NotReadyError: late." in latency_table(tmp_path)


def limited(unit, ms, busy):
    return {"unit": unit, "ms": ms, "busy": {unit: busy}}


def put(folder, suite, rows, card=SHOWN_GPU):
    (folder / card).mkdir(exist_ok=True)
    (folder / card / f"{suite}.json").write_text(json.dumps({**HEAD, "suite": suite, "rows": rows}))


SIZES = {"B": 4, "Hq": 16, "M": 4096, "N": 4096, "Dqk": 128, "Dv": 128}


def test_variants_are_shown_with_what_limits_their_slowest_kernel(folder):
    def of(case, mode, tflops, ratio, **limits):
        ours = {"tflops": tflops, "limits": limits}
        return {"case": case, "mode": mode, **SIZES, "attncc": ours, "ratio": ratio, "passes": 1}

    rows = [
        of("our causal", "forward", 600.0, {}, forward=limited("tensor", 1.0, 0.8)),
        of("our causal", "backward", 500.0, {}, dkdv=limited("tensor", 2.0, 0.7)),
        of("softcap", "forward", 510.0, {"our causal": 0.85}, forward=limited("sfu", 1.2, 0.75)),
        of(
            "softcap", "backward", 400.0, {"our causal": 0.8}, dkdv=limited("tensor", 2, 0.5), dq=limited("alu", 3, 0.9)
        ),
    ]
    unfinished = {name: value for name, value in rows[0].items() if name != "passes"}
    put(folder, "variants", [*rows, {"case": "cog", "error": "not finished in time"}, {**unfinished, "case": "min_p"}])
    text = readme.variants_table(folder)
    assert "Without a figure in this run: `cog`, `min_p`." in text
    assert "| `our causal` | 1 | **600 / 500** |  | matmuls 80% / matmuls 70% |" in text
    assert "| `softcap` | 1 | **510 / 400** | 0.85x / 0.80x | exp, tanh 75% / arithmetic 90% |" in text
    assert "B=4, H=16, S=4096, D=128" in text


def test_the_shelf_is_shown_beside_each_peer_with_its_memory(folder):
    def of(mode, ours, theirs, **more):
        entry = {"attncc": {"tflops": ours}, "peers": {"torch.compile": {"tflops": theirs}}}
        return {"case": "cog", "mode": mode, **SIZES, **entry, "ratio": {"torch.compile": ours / theirs}, **more}

    held = {"heads": 4, "attncc": 2**25, "torch.compile": 2**33}
    decode = {"case": "absorbed MLA", "mode": "decode", "B": 8, "Hq": 128, "N": 8192, "M": 1, "Dqk": 576, "Dv": 512}
    decode |= {"attncc": {"tbps": 2.5}, "peers": {"flex": {"error": "x"}, "torch.compile": {"tbps": 0.6}}, "ratio": {}}
    put(
        folder,
        "shelf",
        [decode, of("forward", 500.0, 50.0, peak_bytes=held), of("backward", 400.0, 100.0)],
    )
    text = readme.shelf_table(folder)
    assert (
        "| cog | 4k | 128 | **500 / 400** | plain PyTorch, compiled | 50 / 100 | 10.0x / 4.0x | 32 : 8,192 MiB |"
        in text
    )
    assert "| absorbed MLA, 128 heads, 576/512 | 8 x 8k | **2.50** | cannot | 0.60 |" in text


def test_outputs_are_shown_beside_the_forward_alone(folder):
    rows = [
        {"case": "received", **SIZES, "M": length, "forward_ms": 1.0, "ms": ms, "more": ms - 1}
        for length, ms in ((8192, 1.58), (4096, 1.65))
    ]
    late = {"case": "entropy", "M": 4096, "error": "NotReadyError: not finished in time"}
    put(folder, "outputs", [*rows, late])
    text = readme.outputs_table(folder)
    assert "| S=4k | more | S=8k | more |" in text
    assert "Without a figure in this run: `entropy`." in text
    assert "| `received` | 1.00 -> 1.65 | +65% | 1.00 -> 1.58 | +58% |" in text


def test_linear_time_is_shown_by_mechanism_and_length_with_what_refuses_and_what_failed(folder):
    sizes = {"B": 2, "Hq": 16, "Dqk": 128}

    def timed(case, length, mode, ours, theirs):
        peers = {} if theirs is None else {"fla": {"ms": theirs}}
        return {"case": case, **sizes, "N": length, "mode": mode, "attncc": {"ms": ours}, "peers": peers}

    rows = [
        {"case": "delta_net", "error": "dk is off"},
        timed("ssd", 8192, "forward", 0.2, 0.3),
        timed("ssd", 8192, "backward", 0.5, None),
        timed("ssd", 2048, "forward", 0.1, 0.25),
        timed("ssd", 2048, "backward", 0.2, 0.5),
        {"case": "ssd, a step", **sizes, "ms": 0.05},
        {"case": "ssd, longer", **sizes, "B": 1, "N": 8192, "ns_per_token": 11.04},
        {"case": "ssd, longer", **sizes, "B": 1, "N": 32768, "ns_per_token": 10.0},
        {"case": "ssd, longer", **sizes, "B": 8, "N": 8192, "ns_per_token": 7.0},
        {"case": "ssd, a step", **sizes, "B": 64, "ms": 0.04, "gbps": 3110.0, "peers": {"copy": 3600.0}},
        {"case": "ssd, both plans", "N": 512, "ms": {"parallel": 0.02, "chunk": 0.05}, "chosen": "parallel"},
        {"case": "ssd, both plans", "N": 4096, "ms": {"parallel": 0.14, "chunk": 0.075}, "chosen": "chunk"},
    ]
    rows[1]["attncc"] |= {"limit": "chain", "predicted_ms": {"chain": 0.14, "least": 0.056, "all": 0.172}}
    put(folder, "linear", rows, readme.LINEAR_GPU)
    text = readme.linear_table(folder)
    assert "| `ssd` | 2k | **0.10 / 0.20** | 0.25 / 0.50 | 2.50x / 2.50x |\n| `ssd` | 8k | **0.20 / 0.50** |" in text
    assert "| 0.30 / refuses | 1.50x / - |" in text
    assert "Not shown, for a gradient was off by more than is allowed: delta_net." in text
    assert (
        "`ssd` by a chunk's matmuls, which wait for one another and for their loads (0.14 ms of 0.17 predicted" in text
    )
    assert "To move q, k, v and out once takes 0.06 ms." in text
    assert "| `ssd` | 1 | 11.0 | 10.0 |\n| `ssd` | 8 | 7.0 |  |" in text
    assert "A step of decoding, 64 sequences, TB/s of the state, read and written: `ssd` 3.11 (a copy 3.60)." in text
    assert "512 tokens 0.020 / 0.050 (pairs), 4096 tokens 0.140 / 0.075 (chunks)." in text
    # a later run had no time for what stands behind the table
    put(folder, "linear-long", rows[5:], readme.LINEAR_GPU)
    put(folder, "linear", rows[1:5], readme.LINEAR_GPU)
    later = readme.linear_table(folder)
    assert "| `ssd` | 1 | 11.0 | 10.0 |" in later
    assert (text.count("Some GPU"), later.count("Some GPU")) == (1, 2)  # each with its own run
