"""What calls need of a plan, kept on disk: the same as from the passes, and enough for them."""

import json

import pytest
import torch

import attncc as ac
from attncc.codegen import plan as plan_module
from attncc.codegen import render
from attncc.codegen.facts import Facts, facts_of
from attncc.codegen.plan import Plan
from attncc.schedule.cache import Cache


@pytest.mark.parametrize("name", ac.variants.names())
def test_facts_survive_the_disk(name):
    facts = facts_of(Plan(ac.variants.get(name).graph))
    assert Facts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    assert facts.has_backward


def test_without_a_backward_the_forward_runs_and_a_gradient_is_refused(monkeypatch):
    def refuse(*_):
        raise ac.UnsupportedError("nobody knows its derivative")

    monkeypatch.setattr(plan_module, "differentiate", refuse)
    variant = ac.Variant(normalizer=lambda score, row: ac.exp(score - row.max(score)))
    op = ac.compile(variant)
    assert not op.plan.facts.has_backward
    q, k, v = torch.randn(3, 1, 1, 5, 16)
    out = op(q, k, v)
    torch.testing.assert_close(out.double(), ac.reference(variant, q, k, v), rtol=1e-4, atol=1e-4)
    out = ac.compile(variant)(q.requires_grad_(), k, v)  # whose facts come from the disk
    with pytest.raises(ac.UnsupportedError, match="nobody knows its derivative"):
        out.sum().backward()


@pytest.mark.parametrize("data", [None, {}, {"stored": []}, {"stored": 1, "saved": 2, "kind": "facts"}])
def test_anything_else_is_no_fact(data):
    assert Facts.from_json(data) is None


def test_only_gradients_with_an_entry_a_pair_have_a_pair_kernel():
    found = {name for name in ac.variants.names() if facts_of(Plan(ac.variants.get(name).graph)).pairs}
    assert found == {"dense_bias", "t5_bias", "relative_bias", "mega", "transformer_xl"}


def test_a_later_process_runs_no_pass_and_renders_nothing(monkeypatch):
    q, k, v = torch.randn(3, 1, 1, 20, 16).half()
    q.requires_grad_()

    def run():
        op = ac.compile("alibi")
        out = op(q, k, v, slopes=torch.tensor([0.1]))
        return torch.autograd.grad(out, q, torch.ones_like(out))[0]

    expected = run()

    def forbidden(*args):
        raise AssertionError("a warm call derives nothing")

    for name in ("stream", "differentiate", "fold", "tile_plan_of"):
        monkeypatch.setattr(plan_module, name, forbidden)
    monkeypatch.setattr(render, "environment", forbidden)
    assert torch.equal(run(), expected)
    assert {entry.kind for entry in Cache().list()} == {"facts", "source"}
    Cache().clear()
    with pytest.raises(AssertionError, match="derives nothing"):
        run()
