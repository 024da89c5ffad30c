import math
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import attncc as ac
from attncc.demo import kernel, sentences
from attncc.demo.__main__ import EXAMPLE, main
from attncc.demo.sentences import Encoding, largest_difference


def demo(*arguments):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def no_model(monkeypatch):
    """The part with the pretrained model succeeds without being run."""
    monkeypatch.setattr(sentences, "run", lambda console, device: True)


def test_the_demo_takes_a_spec_to_a_checked_kernel_file(no_model, tmp_path):
    output = tmp_path / "deep" / "kernel.py"
    result = demo(EXAMPLE, "-o", output)
    assert result.exit_code == 0, result.output
    assert "def forward_kernel(" in output.read_text()
    for shown in ("cap * tanh(score / cap)", "one pass over the keys", "visited)", "spilled", "dkdv_kernel", "█"):
        assert shown in result.output
    assert result.output.count("right") == 5  # out, lse, dq, dk, dv


def test_a_wrong_model_fails_the_demo(monkeypatch):
    monkeypatch.setattr(kernel, "run", lambda *arguments: True)
    monkeypatch.setattr(sentences, "run", lambda console, device: False)
    result = demo()
    assert result.exit_code == 1
    assert "wrong result" in result.output


def test_a_wrong_kernel_fails_the_demo(no_model, monkeypatch):
    monkeypatch.setattr(kernel, "run", lambda *arguments: False)
    assert demo().exit_code == 1


def test_a_wrong_spec_is_pointed_at(no_model, tmp_path):
    spec = tmp_path / "wrong.toml"
    spec.write_text('name = "wrong"\n[stages]\nmask = "q_idx - kv_idx"\n')
    result = demo(spec)
    assert result.exit_code == 1
    assert "wrong.toml:3" in result.output.replace("\n", "")
    assert "^^^" in result.output


def test_a_wrong_op_is_not_called_right(capsys):
    from rich.console import Console

    variant = ac.variants.get("causal")
    right = ac.compile(variant)

    def off(q, k, v, *, outputs):
        out, lse = right(q, k, v, outputs=outputs)
        return out * 1.001, lse

    assert not kernel.verified(Console(), off, variant, "cpu")
    assert "WRONG" in capsys.readouterr().out


def test_the_largest_difference_is_over_real_tokens_and_sentence_vectors():
    tokens = torch.tensor([[True, False]])
    zero = Encoding(torch.zeros(1, 2, 3), torch.zeros(1, 3), 0.0)
    padding = Encoding(torch.tensor([[[0.0] * 3, [9.0] * 3]]), torch.zeros(1, 3), 0.0)
    vector = Encoding(torch.zeros(1, 2, 3), torch.full((1, 3), 0.5), 0.0)
    broken = Encoding(torch.full((1, 2, 3), float("nan")), torch.zeros(1, 3), 0.0)
    assert largest_difference(zero, padding, tokens) == 0
    assert largest_difference(zero, vector, tokens) == 0.5
    assert math.isnan(largest_difference(zero, broken, tokens))


def test_a_missing_model_is_named(monkeypatch):
    monkeypatch.setattr(kernel, "run", lambda *arguments: True)
    monkeypatch.setattr(sentences, "PACKAGE", "no_such_model_package")
    result = demo()
    assert result.exit_code == 1
    assert "no_such_model_package" in result.output


@pytest.mark.slow
def test_the_pretrained_model_gives_the_same_embeddings(capsys):
    pytest.importorskip("transformers")
    pytest.importorskip(sentences.PACKAGE)
    from rich.console import Console

    assert sentences.run(Console(width=100), "cpu")
    assert "largest difference" in capsys.readouterr().out


def test_the_example_ships_with_the_package():
    assert EXAMPLE.is_relative_to(Path(ac.__file__).parent)
