"""Which formulas split, into what; which do not, and the factor that is named."""

from __future__ import annotations

import pytest

import attncc as ac
from attncc.errors import UnsupportedError
from attncc.ir.text import formula
from attncc.passes.linearize import linearize
from attncc.passes.running import running_sums, without_running_sums


def distance(q_idx, kv_idx, q_len, kv_len):
    return q_idx + kv_len - q_len - kv_idx


def variant(normalizer, mask=ac.causal, **options):
    return ac.Variant(normalizer=normalizer, mask=mask, **options)


HEAD = {"rate": ac.Input("h", grad=True)}
TOKEN = {"g": ac.Input("b", "h", "kv_idx", grad=True)}
POSITION = ("q_idx", "kv_idx", "q_len", "kv_len")


def head_decay(score, h, rate, q_idx, kv_idx, q_len, kv_len):
    return score * ac.exp(rate[h] * distance(q_idx, kv_idx, q_len, kv_len))


def power(score, h, rate, q_idx, kv_idx, q_len, kv_len):
    return score * rate[h] ** distance(q_idx, kv_idx, q_len, kv_len)


def by_distance(score, h, rate, q_idx, kv_idx, q_len, kv_len):
    return score * ac.exp(-rate[h] * ac.abs(distance(q_idx, kv_idx, q_len, kv_len)))


def timed(score, b, h, rate, times, q_idx, kv_idx):
    return score * ac.exp(rate[h] * (times[b, q_idx] - times[b, kv_idx]))


def two_gates(score, b, h, g, rate, q_idx, kv_idx, q_len, kv_len):
    i = q_idx + kv_len - q_len
    return score * ac.exp(ac.cumsum(g[b, h, i]) - ac.cumsum(g[b, h, kv_idx]) - rate[h] * (i - kv_idx))


def delayed(score, b, h, g, q_idx, kv_idx, q_len, kv_len):
    """Read before the query's own gate: the last step is taken out again."""
    i = q_idx + kv_len - q_len
    return score * ac.exp(ac.cumsum(g[b, h, i]) - g[b, h, i] - ac.cumsum(g[b, h, kv_idx]))


def gate_of_query(score, b, h, g, beta, q_idx, kv_idx):
    """exp(-beta) has nothing to do with the decay."""
    return score * ac.exp(ac.cumsum(g[b, h, q_idx]) - beta[b, h, q_idx] - ac.cumsum(g[b, h, kv_idx]))


def polynomial(score, row):
    return (1 + score) / row.sum(1 + score)


def weighted(score, row, b, h, kv_idx, beta, tau):
    p = tau[h] * score * beta[b, h, kv_idx]
    return p / ac.maximum(ac.abs(row.sum(p)), 1)


WEIGHTS = {"beta": ac.Input("b", "h", "kv_idx", grad=True), "tau": ac.Input("h", grad=True)}
FOUND = {
    # what: (variant, decay, step, constant, row, col, bias, scale)
    "plain": (variant("identity"), "none", None, "scale", "1", "1", None, "1"),
    "by the sum": (variant("by_sum"), "none", None, "scale", "1", "1", None, "1/total"),
    "every key": (variant("by_sum", mask=True), "none", None, "scale", "1", "1", None, "1/total"),
    "a head": (variant(head_decay, inputs=HEAD), "head", "rate[h]", "scale", "1", "1", None, "1"),
    "a power": (variant(power, inputs=HEAD), "head", "log(rate[h])", "scale", "1", "1", None, "1"),
    "abs": (variant(by_distance, inputs=HEAD), "head", "-rate[h]", "scale", "1", "1", None, "1"),
    "timed": (
        variant(timed, inputs={**HEAD, "times": ac.Input("b", "kv_idx")}),
        *("token", "rate[h]*times[b, kv_idx] - rate[h]*times[b, kv_idx - 1]", "scale", "1", "1", None, "1"),
    ),
    "two gates": (
        variant(two_gates, inputs={**HEAD, **TOKEN}),
        *("token", "g[b, h, kv_idx] - rate[h]", "scale", "1", "1", None, "1"),
    ),
    "a gate of the query": (
        variant(gate_of_query, inputs={**TOKEN, "beta": ac.Input("b", "h", "q_idx")}),
        *("token", "g[b, h, kv_idx]", "scale", "exp(-beta[b, h, kv_idx])", "1", None, "1"),
    ),
    "degree 0": (variant(polynomial), "none", None, "scale", "1", "1", ("1", "1"), "1/total"),
    "a mean": (
        variant(lambda score, row: score / row.count()),
        *("none", None, "scale", "1/(kv_idx + 1)", "1", None, "1"),
    ),
    "by the mean": (
        variant(lambda score, row: score / row.mean(score)),
        *("none", None, "scale", "1", "1", None, "1/total"),
    ),
    "weighted": (
        variant(weighted, inputs=WEIGHTS),
        *("none", None, "scale", "tau[h]", "beta[b, h, kv_idx]", None, "1/maximum(abs(total), 1)"),
    ),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_splits(what):
    spec, decay, step, constant, row, col, bias, scale = FOUND[what]
    plan = linearize(spec.graph)
    assert plan.decay == decay
    assert (None if plan.step is None else formula(plan.step)) == step
    assert [formula(e) for e in (plan.constant, plan.row, plan.col, plan.scale)] == [constant, row, col, scale]
    assert (None if plan.bias is None else tuple(map(formula, plan.bias))) == bias
    assert plan.causal == (what != "every key")
    assert plan.total == ("total" in scale)


def test_a_late_gate_is_a_decay_times_a_factor():
    plan = linearize(variant(delayed, inputs=TOKEN).graph)
    assert formula(plan.step) in ("g[b, h, kv_idx]", "g[b, h, kv_idx - 1]")
    assert plan.decay == "token"


def test_features_of_both_sides():
    plan = linearize(ac.variants.get("linear_attention").graph)
    assert formula(plan.left) == "exp(minimum(0, q_vec)) + relu(q_vec)"
    assert formula(plan.right) == "exp(minimum(0, k_vec)) + relu(k_vec)"


def test_features_with_a_constant_are_one_dot_product():
    """A graph has them multiplied out: a matmul, sums of the query and of the key alone, and a number."""

    def elu1(x):
        return ac.where(x > 0, x, ac.exp(x) - 1) + 1

    plan = linearize(variant("by_sum", similarity=lambda q_vec, k_vec: ac.dot(elu1(q_vec), elu1(k_vec))).graph)
    assert formula(plan.left) == "where(q_vec > 0, q_vec, exp(q_vec) - 1) + 1"
    assert (formula(plan.scale), plan.bias) == ("1/total", None)
    one_side = variant("identity", similarity=lambda q_vec, k_vec, scale: scale * ac.dot(1 + q_vec, ac.exp(k_vec)))
    plan = linearize(one_side.graph)
    assert (formula(plan.left), formula(plan.right), plan.bias) == ("q_vec + 1", "exp(k_vec)", None)


def test_a_row_maximum_that_cancels_is_no_hindrance():
    """Softmax of a logarithm is the argument over its sum."""
    plan = linearize(ac.variants.get("lln").graph)
    assert (formula(plan.left), formula(plan.right), formula(plan.scale)) == ("exp(q_vec)", "exp(k_vec)", "1/total")
    assert "row.max: the output does not depend on it" in plan.proof[1]


def test_step_sizes_are_a_factor_of_the_key_and_a_decay():
    plan = linearize(ac.variants.get("ssd").graph)
    assert (formula(plan.col), formula(plan.step)) == ("dt[b, h, kv_idx]", "rate[h]*dt[b, h, kv_idx]")


def test_lengths_are_factors_of_tokens():
    cosine = variant("identity", similarity=lambda q_vec, k_vec: ac.dot(q_vec, k_vec) / ac.norm(q_vec) / ac.norm(k_vec))
    plan = linearize(cosine.graph)
    assert formula(plan.row) == "1/sqrt(q_term_0[b, h, kv_idx])"
    assert formula(plan.col) == "1/sqrt(k_term_0[b, h_kv, kv_idx])"


SQUARES = {
    # what: (variant, row, col, powers)
    "taylor": (variant("taylor"), "1", "1", ("1", "scale", "scale**2/2")),
    "no line": (variant(lambda score: 3 + score**2), "1", "1", ("3", "0", "scale**2")),
    "factors": (
        variant(
            lambda score, b, h, q_idx, kv_idx, q_len, kv_len, tau, beta: (
                (tau[h] * beta[b, h, kv_idx] * score) ** 2 - tau[h] * beta[b, h, kv_idx] * score
            ),
            inputs={"tau": ac.Input("h", grad=True), "beta": ac.Input("b", "h", "kv_idx", grad=True)},
        ),
        *("tau[h]", "beta[b, h, kv_idx]", ("0", "-scale", "scale**2")),
    ),
    "a power of a polynomial": (variant(lambda score: (1 + 2 * score) ** 2), "1", "1", ("1", "4*scale", "4*scale**2")),
}


@pytest.mark.parametrize("what", SQUARES)
def test_a_polynomial_of_degree_2(what):
    spec, row, col, powers = SQUARES[what]
    plan = linearize(spec.graph)
    assert plan.degree == 2
    assert (formula(plan.row), formula(plan.col), tuple(map(formula, plan.powers))) == (row, col, powers)
    assert "features(x) = [1, x, x (x) x]" in plan.proof[-1]


def past(score, b, h, g, q_idx, kv_idx, q_len, kv_len):
    """What a gate leaves up to the query's own step, which is not taken."""
    i = q_idx + kv_len - q_len
    return score * ac.exp(ac.cumsum(g[b, h, i]) - g[b, h, i] - ac.cumsum(g[b, h, kv_idx]))


def with_bonus(score, b, h, g, rate, q_idx, kv_idx, q_len, kv_len):
    own = kv_idx >= q_idx + kv_len - q_len
    return ac.where(own, rate[h] * score, past(score, b, h, g, q_idx, kv_idx, q_len, kv_len))


def half(score, h, rate, q_idx, kv_idx, q_len, kv_len):
    """The token itself counts half: the decay includes its own step."""
    d = distance(q_idx, kv_idx, q_len, kv_len)
    return ac.where(d > 0, 1.0, 0.5) * score * ac.exp(rate[h] * d)


def read_late(score, h, rate, q_idx, kv_idx, q_len, kv_len):
    d = distance(q_idx, kv_idx, q_len, kv_len)
    return score * ac.exp(rate[h] * (d - 1))


def before(q_idx, kv_idx, q_len, kv_len):
    return kv_idx < q_idx + kv_len - q_len


def rank_one(score, h, rate, q_idx, kv_idx):
    """Four terms, one product."""
    return score * (1 + rate[h] * kv_idx) * (2 - q_idx)


def rank_two(score, h, rate, q_idx, kv_idx):
    return score * (1 + rate[h] * kv_idx * q_idx)


@pytest.mark.parametrize("mask", [ac.causal(align="start"), None], ids=["causal", "every key"])
def test_a_sum_of_terms_that_is_one_product(mask):
    plan = linearize(variant("identity", score=rank_one, mask=mask, inputs=HEAD).graph)
    place = "q_idx" if mask is None else "kv_idx"
    found = {formula(e) for e in (plan.constant * plan.row, plan.col)}
    assert found in (
        {f"-scale*({place} - 2)", "kv_idx*rate[h] + 1"},
        {f"scale*({place} - 2)", "-kv_idx*rate[h] - 1"},
    )
    with pytest.raises(
        UnsupportedError, match=r"kv_idx\*q_idx\*rate\[h\] \+ 1.*is no product of a query's and a key's"
    ):
        linearize(variant("identity", score=rank_two, mask=mask, inputs=HEAD).graph)


OF_ITSELF = {
    # what: (variant, step, late, own)
    "a bonus": (
        variant("identity", score=with_bonus, inputs={**TOKEN, **HEAD}),
        *("g[b, h, kv_idx]", True, "scale*rate[h]*dot(k_vec, q_vec)"),
    ),
    "half of itself": (
        variant("identity", score=half, inputs=HEAD),
        *("rate[h]", False, "-0.5*scale*dot(k_vec, q_vec)"),
    ),
    "not itself": (variant("identity", mask=before), None, False, "-scale*dot(k_vec, q_vec)"),
    "a late read of those before it": (
        variant("identity", mask=before, score=read_late, inputs=HEAD),
        *("rate[h]", True, "0"),
    ),
    "any function of itself": (
        variant(
            lambda score, q_idx, kv_idx: ac.where(kv_idx == q_idx, ac.sigmoid(score), score),
            mask=ac.causal(align="start"),
        ),
        *(None, False, "sigmoid(scale*dot(k_vec, q_vec)) - scale*dot(k_vec, q_vec)"),
    ),
}


@pytest.mark.parametrize("what", OF_ITSELF)
def test_what_a_token_has_of_itself(what):
    spec, step, late, own = OF_ITSELF[what]
    plan = linearize(spec.graph)
    assert (None if plan.step is None else formula(plan.step)) == step
    assert (plan.late, formula(plan.own)) == (late, own)
    assert formula(plan.row) == formula(plan.col) == "1"


def test_a_late_read_of_channels():
    plan = linearize(ac.variants.get("rwkv6").graph)
    assert (plan.decay, plan.late, formula(plan.own)) == ("channel", True, "sum_d(k_vec*q_vec*u[h])")
    assert "read before its own step: D[i-1]" in " ".join(plan.proof)
    assert plan.proof[-1] == "out_t = q state_(t-1) + (sum_d(k_vec*q_vec*u[h])) * v_t"


def far(score, q_idx, kv_idx):
    return score * ac.exp(-0.1 * (q_idx - kv_idx) ** 2)


def fraction(score, q_idx, kv_idx):
    return score / (1 + q_idx - kv_idx)


def two_decays(score, h, rate, q_idx, kv_idx, q_len, kv_len):
    d = distance(q_idx, kv_idx, q_len, kv_len)
    return score * (ac.exp(rate[h] * d) + ac.exp(2 * rate[h] * d))


def clamped(score, row):
    return score / ac.maximum(row.sum(ac.abs(score)), 1)


def forgotten(q_vec, k_vec, b, h, q_idx, kv_idx, q_len, kv_len, g):
    between = ac.cumsum(g[b, h, q_idx + kv_len - q_len]) - ac.cumsum(g[b, h, kv_idx])
    return ac.sum_d(q_vec * k_vec * (1 - ac.exp(g[b, h, kv_idx])) * ac.exp(between))


REFUSED = {
    "the token before": (
        variant(lambda score, q_idx, kv_idx: ac.where(kv_idx == q_idx - 1, 2 * score, score)),
        "is neither of the token itself nor of all before it",
    ),
    "a share of itself": (
        variant(
            lambda score, row, q_idx, kv_idx: (
                ac.where(kv_idx == q_idx, 2.0, 1.0) * score / row.sum(ac.where(kv_idx == q_idx, 2.0, 1.0) * score)
            ),
            mask=ac.causal(align="start"),
        ),
        "'1/total' is of a row sum with a part of the token's own",
    ),
    "a bonus of pairs": (
        variant(
            lambda score, q_idx, kv_idx: ac.where(kv_idx == q_idx, score, ac.exp(score)), mask=ac.causal(align="start")
        ),
        "the factor 'exp(qk*scale)' depends on query and key together",
    ),
    "a number in a feature": (
        variant("identity", similarity=lambda q_vec, k_vec, scale: ac.dot(ac.exp(scale * q_vec), ac.exp(k_vec))),
        r"the features 'exp(q_vec*scale)' read 'scale'",
    ),
    "a head in a norm": (
        variant("identity", similarity=lambda q_vec, k_vec, h: ac.dot(q_vec, k_vec) / ac.sum_d(ac.exp(h * q_vec))),
        r"sum_d(exp(h*q_vec)) reads 'h' beside the vector",
    ),
    "softmax": (variant("softmax"), "the factor 'exp(qk*scale)' depends on query and key together"),
    "a maximum that stays": (
        variant(lambda score, row: score / ac.maximum(row.max(score), 1)),
        "depends on the row maximum",
    ),
    "sigmoid": (variant("sigmoid"), "the factor 'sigmoid("),
    "a cube": (variant(lambda score: score + score**3), "has degree 3 in the score, whose state is Dqk^3 x Dv"),
    "a square that decays": (
        variant(lambda score: score**2, score=ac.gate("g")),
        "has degree 2 in the score, and decays",
    ),
    "a square beside another factor": (
        variant(
            lambda score, b, h, kv_idx, beta: 1 + beta[b, h, kv_idx] * score + score**2,
            inputs={"beta": ac.Input("b", "h", "kv_idx")},
        ),
        "the part of degree 2 has the factor 'scale**2', where the part of degree 1 has 'scale*beta[b, h, kv_idx]'",
    ),
    "a part free of the score of a token's own": (
        variant(
            lambda score, h, kappa: kappa[h] + score + score**2,
            inputs={"kappa": ac.Input("h")},
        ),
        "the part of degree 0 has the factor 'kappa[h]'",
    ),
    "a square of the distance": (variant(far), "the factor 'exp(0.2*kv_idx*q_idx)'"),
    "a fraction": (variant(fraction), "the factor '1/(q_idx + 1 - kv_idx)'"),
    "two decays": (variant(two_decays, inputs=HEAD), "decay differently"),
    "another sum": (variant(clamped), "row.sum(abs(score)) is no multiple"),
    "a window": (variant("identity", mask=ac.causal & ac.sliding_window(8)), "shows neither every key nor"),
    "no dot product": (
        variant("identity", similarity=lambda h, w, kv_idx: w[h, kv_idx], inputs={"w": ac.Input("h", "kv_idx")}),
        "has no dot product",
    ),
    "branches": (ac.variants.get("differential"), "2 branches"),
    "a gate of a key's channels": (
        variant("identity", similarity=forgotten, inputs={"g": ac.Input("b", "h", "kv_idx", "d")}),
        "the features '-k_vec*(exp(g[b, h, kv_idx]) - 1)' read an input",
    ),
    "a weighted length": (
        variant(
            "identity",
            similarity=lambda q_vec, k_vec, h, w: ac.dot(q_vec, k_vec) / ac.sum_d(w[h] * q_vec**2),
            inputs={"w": ac.Input("h", "d")},
        ),
        "reads an input: no factor of a token does",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_split_is_named(what):
    spec, reason = REFUSED[what]
    with pytest.raises(UnsupportedError) as error:
        linearize(spec.graph)
    assert any(part in str(error.value) for part in reason.split("|")), str(error.value)
    assert "plan='parallel'" in str(error.value)


def test_running_sums_become_inputs_of_the_core():
    graph = ac.variants.get("simple_gla").graph
    (only,) = running_sums(graph)
    assert (only.name, only.of, only.axis) == ("g_sum", "g", 2)
    core = without_running_sums(graph)
    assert [(d.name, d.pattern, d.grad) for d in core.inputs] == [("g_sum", ("b", "h", "kv_idx"), True)]
    assert running_sums(core) == ()
    taken = ac.Variant(
        inputs={"g": ac.Input("b", "kv_idx", grad=True), "g_sum": ac.Scalar(1.0)},
        score=lambda score, g, g_sum, b, kv_idx: score + g_sum * ac.cumsum(g[b, kv_idx]),
    )
    assert running_sums(taken.graph)[0].name == "g_sum_"


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("score * cumsum(score)", "a running sum along the keys of a row"),
        ("score * cumsum(w[h])", "has not one index along the tokens"),
        ("score * cumsum(d[b, kv_idx])", "is an integer"),
    ],
)
def test_what_has_no_running_sum(text, finding):
    inputs = '[inputs]\nw = { index = ["h"] }\nd = { index = ["b", "kv_idx"], dtype = "int" }'
    with pytest.raises(ac.SpecError, match=finding):
        ac.loads_toml(f"[stages]\nscore = '{text}'\n{inputs}")
