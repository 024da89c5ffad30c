"""Sums along the queries in Gluon: the text of the pass on a model of the machine, beside the reference."""

import pytest
import torch

import attncc as ac
from attncc.codegen.crosscompile import cross_compile, kernel_names
from attncc.codegen.module import load_source
from attncc.codegen.plan import Plan
from attncc.codegen.problem import problem_of
from attncc.codegen.render_outputs import render_outputs, saved_rows
from attncc.passes.outputs import final_weight
from attncc.runtime.reference import reference
from attncc.runtime.samples import Shape, sample_inputs
from attncc.runtime.shapes import bind
from attncc.schedule.choose import choose
from attncc.schedule.device import device_for
from tests.codegen import machine
from tests.codegen.hopper_calls import OPTIONS

OUTPUTS = {
    "received": ac.outputs.received,
    "recent": lambda weight, col, q_idx, q_len: col.sum(ac.where(q_idx >= q_len - 40, weight, 0.0)),
    "seen": lambda col: col.count(),
    "highest": lambda score, col: col.max(score),
}


@pytest.mark.parametrize(
    ("name", "output", "shape"),
    [
        (
            "causal",
            "received",
            Shape(1, 2, 1, 300, 260, 64, 64),
        ),  # two blocks of keys, a last tile of queries that is cut
        ("causal", "recent", Shape(1, 2, 2, 150, 300, 96, 64, strided=True)),
        ("document", "received", Shape(1, 2, 1, 200, 200, 64, 64)),  # bounds are found apart
        ("sliding_window", "seen", Shape(1, 1, 1, 250, 200, 64, 64)),
        ("t5_bias", "received", Shape(1, 2, 1, 90, 130, 64, 64)),  # the forward has tables by distance, this pass none
        ("sigmoid", "highest", Shape(1, 1, 1, 130, 70, 64, 64)),  # no stored rows
        ("causal", "received", Shape(1, 1, 1, 140, 20, 64, 64)),  # queries that see nothing
    ],
)
def test_values(name, output, shape):
    graph = ac.compile(ac.variants.get(name).with_outputs(y=OUTPUTS[output])).graph
    plan = Plan(graph)
    s = sample_inputs(graph, shape, torch.float16)
    bound = bind(graph, s.q, s.k, s.v, None, s.inputs)
    stored = saved_rows(plan, final_weight(graph))
    exact = reference(graph, s.q.double(), s.k.double(), s.v.double(), **s.inputs, outputs=("y", *stored))
    wanted, rows = (exact[0], exact[1:]) if isinstance(exact, tuple) else (exact, ())
    module = machine.load(render_outputs(plan, shape.d_qk, hopper=True), name)
    tiles = {"BLOCK_M": 128, "BLOCK_N": 192, "STAGES": 2, "programs": 2}
    found, *_ = module.outputs(
        *(s.q, s.k, *bound.tensors.values(), *bound.scalars.values(), bound.scale),
        *(tuple(row.float() for row in rows), {"by_key_in_warps": tiles}, OPTIONS),
    )
    torch.testing.assert_close(found.double(), wanted.double(), rtol=2e-3, atol=2e-3)


def test_every_kind_of_sum_compiles():
    """The model knows of no layouts, and a count is a tile that no score is in."""
    variant = ac.variants.get("causal").with_outputs(**{name: OUTPUTS[name] for name in OUTPUTS})
    graph = ac.compile(variant).graph
    module = load_source(render_outputs(Plan(graph), 64, hopper=True), "outputs")
    device = device_for("h100")
    sizes = {"b": 1, "h": 2, "h_kv": 2, "q_idx": 512, "kv_idx": 512, "d_qk": 64, "d_v": 64}
    schedule = choose(problem_of(Plan(graph.core), sizes, "bf16", "ieee", {}), device)
    names = tuple(name for name in kernel_names(module) if name.startswith("by_key_in_warps"))
    assert names
    compiled = cross_compile(module, graph, schedule, device, "bf16", only=names)
    assert all(kernel.registers and not kernel.faults for kernel in compiled.values())
