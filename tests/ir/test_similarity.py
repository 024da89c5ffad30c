"""What the sums of a similarity become: terms of rows and columns, matmuls, and what is left for a loop."""

from __future__ import annotations

import pytest

import attncc as ac
from attncc.codegen.plan import Plan
from attncc.codegen.render import render
from attncc.errors import UnsupportedError
from attncc.ir.formulas import stage_texts
from attncc.ir.text import formula

VECTOR = ac.Input("h", "d", grad=True)


def pieces(similarity, **inputs):
    graph = ac.Variant(similarity=similarity, inputs=inputs).graph
    return formula(graph["raw_score"].expr), {s.name: formula(s.expr) for s in graph.sums_d}


def test_plain_attention_has_no_stage_of_its_own():
    graph = ac.Variant(similarity=lambda q_vec, k_vec, scale: scale * ac.dot(q_vec, k_vec)).graph
    assert graph == ac.variants.get("full").graph
    assert graph.sums_d == ()


@pytest.mark.parametrize(
    ("similarity", "raw", "sums"),
    [
        (
            lambda q_vec, k_vec: -ac.sum_d((q_vec - k_vec) ** 2),
            "2*qk - k_term_0 - q_term_0",
            {"q_term_0": "q_vec**2", "k_term_0": "k_vec**2"},
        ),
        (
            lambda q_vec, k_vec: ac.dot(q_vec / ac.norm(q_vec), k_vec),
            "qk/sqrt(q_term_0)",
            {"q_term_0": "q_vec**2"},
        ),
        (lambda q_vec, k_vec: ac.dot(2 * q_vec, k_vec) + ac.dot(k_vec, q_vec), "3*qk", {}),
        (
            lambda q_vec, k_vec: ac.dot(ac.exp(q_vec), ac.exp(k_vec)),
            "dot_0",
            {"dot_0": "exp(k_vec)*exp(q_vec)"},
        ),
        (lambda q_vec, k_vec: ac.sum_d(ac.tanh(q_vec + k_vec)), "pair_0", {"pair_0": "tanh(k_vec + q_vec)"}),
        (
            lambda q_vec, k_vec: ac.sum_d(ac.relu(q_vec) ** 2) + ac.sum_d(k_vec),
            "k_term_0 + q_term_0",
            {"q_term_0": "relu(q_vec)**2", "k_term_0": "k_vec"},
        ),
        (lambda q_idx, kv_idx: q_idx - kv_idx + 0.5, "q_idx + 0.5 - kv_idx", {}),
    ],
)
def test_what_a_similarity_becomes(similarity, raw, sums):
    assert pieces(similarity) == (raw, sums)


def test_products_with_one_side_in_common_are_one_matmul():
    found = pieces(
        lambda q_vec, k_vec, h, kv_idx, w, g: ac.dot(q_vec, k_vec) + ac.dot(w[h] * q_vec, k_vec + g[kv_idx]),
        w=VECTOR,
        g=ac.Input("kv_idx", "d", grad=True),
    )
    assert found[0] == "dot_0 + dot_1"
    assert found[1] == {"dot_0": "k_vec*(q_vec*w[h] + q_vec)", "dot_1": "q_vec*g[kv_idx]*w[h]"}
    found = pieces(
        lambda q_vec, k_vec, h, kv_idx, w, g: ac.dot(w[h] * q_vec, k_vec + g[kv_idx]),
        w=VECTOR,
        g=ac.Input("kv_idx", "d", grad=True),
    )
    assert found == ("dot_0", {"dot_0": "q_vec*(k_vec + g[kv_idx])*w[h]"})


def test_a_bias_on_the_query_is_a_term_of_the_key():
    raw, sums = pieces(lambda q_vec, k_vec, h, u, scale: scale * ac.dot(q_vec + u[h], k_vec), u=VECTOR)
    assert (raw, sums) == ("scale*(k_term_0 + qk)", {"k_term_0": "k_vec*u[h]"})


def test_a_table_by_distance_is_a_band():
    raw, sums = pieces(
        lambda q_vec, k_vec, h, q_idx, kv_idx, r, u: ac.dot(q_vec, k_vec) + ac.dot(q_vec + u[h], r[h, q_idx - kv_idx]),
        r=ac.Input("h", "dist", "d", grad=True),
        u=VECTOR,
    )
    assert (raw, sums) == ("band_0 + qk", {"band_0": "(q_vec + u[h])*r[h, q_idx - kv_idx]"})


def test_a_sum_inside_another_is_a_factor_or_refused():
    with pytest.raises(UnsupportedError, match="similarity(.|\n)*stands inside another") as error:
        ac.Variant(similarity=lambda q_vec, k_vec: ac.sum_d(ac.tanh(q_vec / ac.norm(q_vec) + k_vec)))
    assert "normalize q or k" in str(error.value)


@pytest.mark.parametrize("name", ["cosine", "squared_distance", "trilinear", "location", "gmm", "afa"])
def test_the_printed_similarity_is_the_similarity(name):
    graph = ac.variants.get(name).graph
    text = stage_texts(graph)["similarity"]
    inputs = "\n".join(f"{d.name} = {{ index = {list(d.pattern)}, grad = true }}" for d in graph.inputs)
    again = (
        ac.loads_toml(f"[stages]\nsimilarity = '{text}'\n[inputs]\n{inputs.replace(chr(39), chr(34))}").graph
        if name != "afa"
        else None
    )
    if again is not None:
        assert again["raw_score"].expr == graph["raw_score"].expr
        assert [(s.name, s.expr) for s in again.sums_d] == [(s.name, s.expr) for s in graph.sums_d]


def kernel(text, name):
    return text.partition(f"def {name}(")[2].partition("@triton.jit")[0]


def matmuls(body):
    """Those that a kernel writes, and those that it adds to a sum."""
    return body.count("tl.dot(") + body.count("_add_product(")


def test_a_kernel_reads_and_multiplies_no_more_than_it_needs():
    positional = render(Plan(ac.variants.get("gaussian_position").graph), 64, 64, True)
    for name, dots in (("forward_kernel", 1), ("dkdv_kernel", 2), ("dq_kernel", 1)):
        body = kernel(positional, name)
        assert matmuls(body) == dots
        assert " q_0" not in body
        assert " k_0" not in body
    located = render(Plan(ac.variants.get("location").graph), 64, 64, True)
    assert "k_base" not in located
    assert matmuls(kernel(located, "forward_kernel")) == 2
    distance = render(Plan(ac.variants.get("squared_distance").graph), 64, 64, True)
    assert matmuls(kernel(distance, "forward_kernel")) == 2
    assert "k_0 * k_0" not in kernel(distance, "forward_kernel")  # the keys' norms are made once, by a kernel of theirs
