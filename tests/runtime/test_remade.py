"""Ops are copied, pickled and saved, by themselves and in the module that holds them."""

import copy
import io
import pickle

import pytest
import torch

import attncc as ac

OPS = {
    "pairs": lambda: ac.compile("alibi"),
    "a formula of one's own": lambda: ac.compile(ac.Variant(score=lambda score: 2 * score, mask=ac.causal)),
    "auxiliary outputs": lambda: ac.compile(ac.Variant(mask=ac.causal, outputs={"entropy": ac.outputs.entropy})),
    "made inputs": lambda: ac.compile(ac.Variant(mask=ac.causal & ac.padding(), dead_rows="open")),
    "degree 1": lambda: ac.compile("retention", plan="chunk"),
    "degree 2": lambda: ac.compile("taylorshift", plan="chunk"),
    "recurrence": lambda: ac.compile("delta_net", precision="ieee"),
}


def tensors(heads=2, tokens=24, d=16):
    torch.manual_seed(0)
    return [torch.randn(1, heads, tokens, d) for _ in range(3)]


def arguments(op):
    sizes = {"b": 1, "h": 2, "h_kv": 2, "q_idx": 24, "kv_idx": 24}
    given = {}
    for decl in op.graph.inputs:
        if decl.default is None:
            shape = [sizes[dim] for dim in decl.pattern]
            given[decl.name] = torch.full(shape, 20, dtype=torch.int32) if decl.dtype == "int" else torch.rand(shape)
    return given


@pytest.mark.parametrize("made", OPS.values(), ids=OPS)
def test_pickled_op_computes_what_the_op_does(made):
    op = made()
    found = pickle.loads(pickle.dumps(op))
    assert found is not op
    assert (type(found), repr(found)) == (type(op), repr(op))
    given = arguments(op)
    assert torch.equal(found(*tensors(), **given), op(*tensors(), **given))


def test_pickled_op_keeps_what_was_asked_for():
    tiles = ac.KernelSchedule(block_m=16, block_n=32, num_warps=4, num_stages=2)
    asked = {"schedule": ac.Schedule(tiles, tiles, tiles, origin="user"), "precision": "ieee", "backend": "triton"}
    op = ac.compile("causal", **asked, deterministic=True)
    found = pickle.loads(pickle.dumps(op))
    assert found._made_of == op._made_of == (op.graph, *asked.values(), True)
    assert found.engine.precision() == "ieee"


def test_copy_of_an_op_that_is_bound_to_nothing_is_the_op_itself():
    op = ac.compile("alibi")
    assert copy.deepcopy(op) is op
    assert copy.deepcopy([op])[0] is op


class Biased(torch.nn.Module):
    """A layer as people port it from FlexAttention: its function reads the layer's own parameter."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.linspace(-1, 1, 8))
        self.op = ac.compile(
            ac.from_flex(lambda score, b, h, q_idx, kv_idx: score + self.bias.exp()[(q_idx - kv_idx).clamp(0, 7)])
        )

    def forward(self, q, k, v):
        return self.op(q, k, v)


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
def test_copy_of_a_module_reads_and_trains_its_own_parameter(copied):
    layer = Biased()
    before = layer(*tensors())
    other = copied(layer)
    assert torch.equal(other(*tensors()), before)

    with torch.no_grad():
        other.bias.zero_()
    assert torch.equal(layer(*tensors()), before)
    changed = other(*tensors())
    assert not torch.allclose(changed, before, atol=1e-2)

    changed.square().sum().backward()
    assert other.bias.grad is not None
    assert layer.bias.grad is None
