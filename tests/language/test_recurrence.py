"""Recurrences as a user writes them: both forms give one graph, and what is wrong is said with its place."""

from __future__ import annotations

import pytest

import attncc as ac
from attncc.errors import SpecError, UnsupportedError
from attncc.ir.text import to_text
from attncc.passes.linearize import Linear
from attncc.passes.lint import lint
from attncc.passes.recur import Delta, recur

GATE = 'g = { index = ["b", "h", "kv_idx"], grad = true }'
BETA = 'beta = { index = ["b", "h", "kv_idx"], grad = true }'
WIDE = 'w = { index = ["h", "d"] }'
GATED = f'''
name = "gated_delta_net"
[recurrence]
state = """
kept = exp(g[b, h, kv_idx]) * state
kept + beta[b, h, kv_idx] * k_vec * (v_vec - dot(k_vec, kept))"""
out = "scale * dot(q_vec, state)"
[inputs]
{BETA}
{GATE}
'''


def text(state, out="scale * dot(q_vec, state)"):
    inputs = "\n".join(line for name, line in (("beta[", BETA), ("g[", GATE), ("w[", WIDE)) if name in state + out)
    return f'[recurrence]\nstate = "{state}"\nout = "{out}"\n[inputs]\n{inputs}\n'


def test_both_forms_are_one_graph():
    shipped = ac.variants.get("gated_delta_net").graph
    assert ac.loads_toml(GATED).graph == shipped
    assert ac.loads_toml(GATED.replace('out = "scale * dot(q_vec, state)"\n', "")).graph == shipped
    delta = "state + beta[b, h, kv_idx] * k_vec * (v_vec - dot(k_vec, state))"
    assert ac.loads_toml(text(delta)).graph == ac.variants.get("delta_net").graph
    printed = to_text(shipped)
    assert "update = scan(" in printed
    assert "out    = read(scale*dot(q_vec, state))" in printed
    assert shipped.recurrent
    assert not ac.variants.get("causal").graph.recurrent


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("state + q_idx * k_vec * v_vec", "does not see the name 'q_idx'"),
        ("state + score", "does not see the name 'score'"),
        ("tanh(state)", "'tanh(state)' is no matrix"),
        ("k_vec * state", "is no matrix"),
        ("state + dot(v_vec, state)", "dot takes vectors, and 'v_vec' is none"),
        ("state + k_vec * beta[b, h]", "has 3 dimensions"),
    ],
)
def test_what_is_wrong_is_said_at_its_place(state, said):
    with pytest.raises(SpecError) as caught:
        ac.loads_toml(text(state))
    assert said in str(caught.value)
    assert caught.value.span is not None
    assert caught.value.span.line == 2
    assert "^" in str(caught.value)


def test_python_has_places_too():
    with pytest.raises(SpecError, match="does not see the name 'weight'") as caught:
        ac.Variant(recurrence=ac.recurrence(lambda state, k_vec, v_vec, weight: state + weight * k_vec * v_vec))
    assert caught.value.span is not None
    assert caught.value.span.file == __file__
    with pytest.raises(SpecError, match="no row of values"):
        ac.Variant(recurrence=ac.recurrence(lambda state, k_vec, v_vec: state + k_vec * v_vec, out=lambda state: state))
    with pytest.raises(SpecError, match="not a function"):
        ac.recurrence("state")
    with pytest.raises(SpecError, match="'beta' is declared, but"):
        ac.Variant(
            recurrence=ac.recurrence(lambda state, k_vec, v_vec: state + k_vec * v_vec),
            inputs={"beta": ac.Input("b", "h", "kv_idx")},
        )


@pytest.mark.parametrize("stage", [{"mask": ac.causal}, {"normalizer": "identity"}, {"branches": 2}])
def test_a_recurrence_stands_alone(stage):
    with pytest.raises(SpecError, match=f"a recurrence and '{next(iter(stage))}'"):
        ac.Variant(recurrence=ac.recurrence(lambda state, k_vec, v_vec: state + k_vec * v_vec), **stage)
    with pytest.raises(SpecError, match="a recurrence and 'stages'"):
        ac.loads_toml(text("state + k_vec * v_vec") + '[stages]\nmask = "causal"\n')
    with pytest.raises(SpecError, match="a recurrence and 'outputs'"):
        ac.variants.get("delta_net").with_outputs(entropy=ac.outputs.entropy)


def test_tables_of_the_text_form():
    with pytest.raises(SpecError, match="unknown key 'read'"):
        ac.loads_toml('[recurrence]\nstate = "state + k_vec * v_vec"\nread = "state"\n')
    with pytest.raises(SpecError, match="no state"):
        ac.loads_toml("[recurrence]\nout = 'dot(q_vec, state)'\n")
    with pytest.raises(SpecError, match="must be a string"):
        ac.loads_toml("[recurrence]\nstate = 3\n")


KEPT = "exp(g[b, h, kv_idx])"


@pytest.mark.parametrize(
    ("state", "family", "proof"),
    [
        ("state + k_vec * v_vec", Linear, "state_t = state_(t-1) + k v'"),
        (f"{KEPT} * state + k_vec * v_vec", Linear, "leaves of the state: g[b, h, kv_idx]"),
        ("0.5 * state + beta[b, h, kv_idx] * k_vec * v_vec", Linear, "(beta[b, h, kv_idx]) * k v'"),
        (f"{KEPT} * (state - k_vec * dot(k_vec, state)) + k_vec * v_vec", Delta, "(I - (1) * k k')"),
        ("state - 2 * dot(k_vec, state) * k_vec + k_vec * v_vec", Delta, "A_ij = (2) * (k_i . k_j)"),
        (
            "(1 - g[b, h, kv_idx]) * (state - beta[b, h, kv_idx] * k_vec * dot(state, k_vec)) + k_vec * v_vec / 2",
            Delta,
            "leaves of the state: log(1 - g[b, h, kv_idx])",
        ),
    ],
)
def test_families(state, family, proof):
    found = recur(ac.loads_toml(text(state)).graph)
    assert isinstance(found, family)
    assert any(proof in line for line in found.proof)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("tanh(state) + k_vec * v_vec", "the factor 'tanh(state)' is not linear"),
        ("state * state + k_vec * v_vec", "the term 'state**2' is not linear in the state"),
        ("k_vec * state + k_vec * v_vec", "the term 'k_vec*state' is neither"),
        ("state + v_vec", "the term 'v_vec' is no factor times the outer product"),
        ("state + relu(k_vec) * v_vec", "the factor 'relu(k_vec)' is not linear"),
        ("state * dot(k_vec, k_vec) + k_vec * v_vec", "sum_d(k_vec**2) is no dot product"),
        ("k_vec * v_vec - 0 * state", "nothing is kept of the state"),
        ("v_vec * k_vec * k_vec + state", "no factor times the outer product"),
        ("k_vec * v_vec - state", "kept by the factor '-1', which is not positive"),
        (f"{KEPT} * state + k_vec * (v_vec - dot(k_vec, state))", "is of the state before it decays by"),
        (
            "exp(w[h]) * state + k_vec * (v_vec - dot(k_vec, exp(w[h]) * state))",
            "the key finds a state that each channel keeps on its own, by 'exp(w[h])'",
        ),
    ],
)
def test_what_is_of_no_family_is_refused_by_its_term(state, said):
    with pytest.raises(UnsupportedError) as caught:
        ac.compile(ac.loads_toml(text(state)))
    assert said in caught.value.reason
    assert caught.value.span is not None


def test_a_factor_that_may_be_0_is_warned_of():
    """Chunks multiply what is kept by adding logarithms."""
    for kept, warned in (
        ("(1 - g[b, h, kv_idx])", True),
        ("g[b, h, kv_idx]", True),
        ("exp(g[b, h, kv_idx])", False),
        ("sigmoid(g[b, h, kv_idx]) / 2", False),
        ("(0.5 + relu(g[b, h, kv_idx]))", False),
    ):
        found = lint(ac.loads_toml(text(f"{kept} * (state - k_vec * dot(k_vec, state)) + k_vec * v_vec")).graph)
        assert [f.level for f in found] == ["warning"] * warned
        assert all("where it is below 0 the result is NaN" in str(f) and "as exp(g)" in str(f) for f in found)


def test_what_is_read_is_refused_by_its_factor():
    for out, said in (("dot(q_vec, state) + 1", "'1' is no factor"), ("tanh(dot(q_vec, state))", "is not linear")):
        with pytest.raises(UnsupportedError, match=said.replace("(", r"\(")):
            ac.compile(ac.loads_toml(text("state + k_vec * v_vec", out)))
    channels = ac.Variant(
        recurrence=ac.recurrence(
            lambda state, k_vec, v_vec, b, h, kv_idx, g: (
                ac.exp(g[b, h, kv_idx]) * (state - k_vec * ac.dot(k_vec, state)) + k_vec * v_vec
            )
        ),
        inputs={"g": ac.Input("b", "h", "kv_idx", "d", grad=True)},
    )
    with pytest.raises(UnsupportedError, match="one of each channel"):
        ac.compile(channels)
