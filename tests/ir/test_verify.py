from __future__ import annotations

import pytest
import sympy

from attncc.errors import SpecError
from attncc.ir import symbols as sym
from attncc.ir import vocabulary as voc
from attncc.ir.graph import InputDecl, Stage, VariantGraph
from attncc.ir.verify import verify

SCORE, WEIGHT, V = sym.SCORE, sym.WEIGHT, sym.V_VEC


def graph(inputs=(), **changed) -> VariantGraph:
    """Unnormalized attention, with some stages changed; None leaves one out."""
    exprs = {
        "raw_score": sym.SCALE * sym.QK,
        "score": sym.RAW_SCORE,
        "mask": sympy.true,
        "weight": SCORE,
        "out": WEIGHT * V,
        **changed,
    }
    ops = {"out": "sum", "row_max_0": "max"}
    stages = [Stage(name, expr, ops.get(name)) for name, expr in exprs.items() if expr is not None]
    return VariantGraph("test", stages, inputs)


def bias(**changed) -> InputDecl:
    return InputDecl(**{"name": "bias", "pattern": ("h", "kv_idx"), "grad": True, **changed})


BIAS = sym.input_symbol("bias", False)


def test_a_sound_graph_passes():
    verify(graph())
    verify(graph([bias()], score=sym.RAW_SCORE + voc.Read(BIAS, sym.H, sym.KV_IDX)))
    verify(graph([bias(grad=False)], weight=voc.Read(BIAS, sym.H, voc.floor(SCORE))))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": None}, "no stage 'weight'"),
        ({"score": sym.RAW_SCORE + WEIGHT, "weight": SCORE}, "circle: .*score"),
        ({"weight": SCORE * sympy.Symbol("foo", real=True)}, "'foo' is not defined"),
        ({"weight": SCORE * V}, "'v_vec' is not defined"),
        ({"mask": sym.Q_IDX - sym.KV_IDX}, "expected bool, got int"),
        ({"row_max_0": sym.KV_IDX > 3}, "row.max of a boolean"),
        ({"weight": sympy.gamma(SCORE)}, r"'gamma\(score\)' is not part of the vocabulary"),
        ({"weight": sympy.Abs(SCORE)}, "not part of the vocabulary"),
        ({"weight": SCORE + sympy.oo}, "not part of the vocabulary"),
        ({"weight": sympy.I * SCORE}, "not part of the vocabulary"),
        ({"out": WEIGHT * V**2}, "not linear in v_vec"),
        ({"out": WEIGHT * V + WEIGHT}, "not linear in v_vec"),
        ({"out": WEIGHT * SCORE}, "not linear in v_vec"),
        ({"out": WEIGHT * sympy.exp(V)}, "not linear in v_vec"),
    ],
)
def test_faults(changed, message):
    with pytest.raises(SpecError, match=message):
        verify(graph(**changed))


@pytest.mark.parametrize(
    ("decl", "score", "message"),
    [
        (bias(), sym.RAW_SCORE + BIAS, "'bias' is used without an index"),
        (bias(), voc.Read(BIAS, sym.H), "'bias' has 2 dimensions, read with 1"),
        (bias(), voc.Read(BIAS, sym.H, voc.floor(sym.RAW_SCORE)), "indexed by the score in dimension 'kv_idx'"),
    ],
)
def test_faulty_reads(decl, score, message):
    with pytest.raises(SpecError, match=message):
        verify(graph([decl], score=score))


def test_a_graph_is_frozen_and_ordered():
    g = graph(weight=SCORE - sympy.Symbol("row_max_0", real=True), row_max_0=SCORE)
    names = [s.name for s in g.stages]
    assert names.index("score") < names.index("row_max_0") < names.index("weight") < names.index("out")
    assert [s.name for s in g.rows] == ["row_max_0"]
    with pytest.raises(Exception, match="[Ff]rozen"):
        g.dag.add_node("more")


def test_the_stages_are_a_networkx_graph_for_those_who_want_one():
    made = graph()
    assert set(made.dag.nodes) == {stage.name for stage in made.stages}
    assert made.dag.nodes["score"]["stage"] is made["score"]
    assert set(made.dag.edges) == {(used, name) for name, uses in made.uses.items() for used in uses}
    assert ("raw_score", "score") in made.dag.edges
