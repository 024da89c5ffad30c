"""Both forms of one variant give the identical IR."""

from __future__ import annotations

import math

import pytest

import attncc as ac
from attncc.ir.text import to_text
from tests.variants.shelf_texts import TEXTS

POSITION = "q_idx + kv_len - q_len"
CAUSAL = f"mask = 'kv_idx <= {POSITION}'"
H_GRAD = '{ index = ["h"], grad = true }'
BINS = " + ".join(f"int(abs(ahead) >= {first})" for first in (12, 16, 23, 32, 46, 64, 91))
SHIPPED = {
    "full": "",
    "causal": f"[stages]\n{CAUSAL}",
    "sliding_window": (
        f"[stages]\nmask = 'kv_idx <= {POSITION} and {POSITION} - kv_idx < window'\n[scalars]\nwindow = 9"
    ),
    "flash_window": (
        f"[stages]\nmask = '{POSITION} - kv_idx <= left and kv_idx - ({POSITION}) <= right'\n"
        "[scalars]\nleft = 1\nright = 2"
    ),
    "prefix_lm": (
        f"[stages]\nmask = 'kv_idx < prefix[b] or kv_idx <= {POSITION}'\n"
        '[inputs]\nprefix = { index = ["b"], dtype = "int" }'
    ),
    "document": (
        f"[stages]\nmask = 'kv_idx <= {POSITION} and doc[b, {POSITION}] == doc[b, kv_idx]'\n"
        '[inputs]\ndoc = { index = ["b", "kv_idx"], dtype = "int" }'
    ),
    "alibi": (
        f"[stages]\nscore = 'score + slopes[h] * (kv_idx - ({POSITION}))'\n{CAUSAL}\n[inputs]\nslopes = {H_GRAD}"
    ),
    "softcap": f"[stages]\nscore = 'cap * tanh(score / cap)'\n{CAUSAL}\n[scalars]\ncap = 50.0",
    "gemma2_global": f"[stages]\nscore = 'softcap(\"cap\")'\n{CAUSAL}",
    "gemma2_local": (
        "[stages]\nscore = 'cap * tanh(score / cap)'\n"
        f"mask = 'kv_idx <= {POSITION} and {POSITION} - kv_idx < window'\n[scalars]\ncap = 50.0\nwindow = 1"
    ),
    "t5_bias": (
        f"[stages]\nscore = '''\nahead = kv_idx - ({POSITION})\n"
        f"score + table[16 * int(ahead > 0) + minimum(abs(ahead), 8) + {BINS}, h]\n'''\n"
        '[inputs]\ntable = { index = ["bucket", "h"], grad = true }'
    ),
    "dense_bias": (
        "[stages]\nscore = 'score + bias[b, h, q_idx, kv_idx]'\n"
        '[inputs]\nbias = { index = ["b", "h", "q_idx", "kv_idx"], grad = true }'
    ),
    "entmax15": (
        f"[stages]\n{CAUSAL}\nnormalizer = '''\nhalf = score / 2\n"
        "tau = row.root(lambda t: row.sum(relu(half - t)**2) - 1, row.max(half) - 1, row.max(half))\n"
        "relu(half - tau)**2'''"
    ),
    "sparsemax": f"[stages]\n{CAUSAL}\nnormalizer = 'sparsemax'",
    "min_p": (
        f"[stages]\n{CAUSAL}\nnormalizer = '''\nm = row.max(score)\n"
        "p = where(score >= m + log(least), exp(score - m), 0)\np / row.sum(p)'''\n[scalars]\nleast = 0.5"
    ),
    "top_theta": (
        f"[stages]\n{CAUSAL}\nnormalizer = '''\nkeep = score > theta[h] or {POSITION} < dense_keys\n"
        "p = where(keep, exp(score - row.max(score)), 0)\ntotal = row.sum(p)\np / where(total > 0, total, 1)'''\n"
        '[inputs]\ntheta = { index = ["h"] }\n[scalars]\ndense_keys = 3'
    ),
    "softmax1": (
        f"[stages]\n{CAUSAL}\nnormalizer = '''\n"
        "m = maximum(row.max(score), 0)\np = exp(score - m)\np / (row.sum(p) + exp(-m))'''"
    ),
    "sink": (
        f"[stages]\n{CAUSAL}\nnormalizer = '''\nm = maximum(row.max(score), sink[h])\np = exp(score - m)\n"
        f"p / (row.sum(p) + exp(sink[h] - m))'''\n[inputs]\nsink = {H_GRAD}"
    ),
    "sigmoid": f"[stages]\n{CAUSAL}\nnormalizer = 'sigmoid(score - log(kv_len))'",
    "relu": "[stages]\nnormalizer = 'relu(score) / kv_len'",
    "relu2": "[stages]\nnormalizer = 'relu(score)**2 / kv_len'",
    "taylor": (
        "[stages]\nnormalizer = '(1 + score + score**2 / 2) / row.sum(1 + score + score**2 / 2)'\n"
        "reduction = 'row.sum(weight * v_vec)'"
    ),
    "cog": (
        f"[stages]\n{CAUSAL}\nnormalizer = '''\n"
        "e = exp(abs(score) - row.max(abs(score)))\nsign(score) * e / row.sum(e)'''"
    ),
    "qk_temperature": (
        f"[stages]\nscore = 'score * tau[b, h, q_idx]'\n{CAUSAL}\n"
        '[inputs]\ntau = { index = ["b", "h", "q_idx"], grad = true }'
    ),
    "head_gates": (
        f"[stages]\nmask = 'kv_idx <= {POSITION} and gate[b, h, q_idx] != 0'\n"
        "reduction = 'gate[b, h, q_idx] * row.sum(weight * v_vec)'\n"
        '[inputs]\ngate = { index = ["b", "h", "q_idx"], grad = true }'
    ),
    "differential": (
        f"branches = 2\n[stages]\n{CAUSAL}\nreduction = 'row.sum((weight[0] - lam[h] * weight[1]) * v_vec)'\n"
        f"[inputs]\nlam = {H_GRAD}"
    ),
    "mla": f'value = "k[:512]"\n[stages]\n{CAUSAL}',
}
AFA = """
[stages]
similarity = '''
e = exp(-rate[h] * abs(q_idx + kv_len - q_len - kv_idx))
residual = sum_d(q_vec**2) + e**2 * sum_d(k_vec**2) - 2 * e * dot(q_vec, k_vec)
variance = sigma2[h] * (1 - e**2) / (2 * rate[h]) + eta2[h] * e**2 + gamma2[h]
tau[h] ** 2 * (-log(variance) - log(1 + residual * 2 * scale**2 / (nu[h] * variance)))'''
mask = 'causal'
reduction = 'row.sum(weight * exp(-rate[h] * abs(q_idx + kv_len - q_len - kv_idx)) * v_vec)'
[inputs]
"""
MIXTURE = " + ".join(
    f"w[b, q_idx, {k}] / ({math.sqrt(2 * math.pi)} * sigma[b, q_idx, {k}]) "
    f"* exp(-(kv_idx - mu[b, q_idx, {k}])**2 / (2 * sigma[b, q_idx, {k}]**2))"
    for k in range(5)
)
SHIPPED |= {
    "cosine": (
        "[stages]\nsimilarity = '''\nlengths = maximum(sum_d(q_vec**2), 1e-24) * maximum(dot(k_vec, k_vec), 1e-24)\n"
        f"tau[h] * sum_d(q_vec * k_vec) / sqrt(lengths)'''\n[inputs]\ntau = {H_GRAD}"
    ),
    "squared_distance": f"[stages]\nsimilarity = 'scale * -dot(q_vec - k_vec, q_vec - k_vec)'\n{CAUSAL}",
    "trilinear": (
        "[stages]\nsimilarity = 'sum_d(w_q[h] * q_vec + w_k[h] * k_vec + w_qk[h] * q_vec * k_vec)'\n[inputs]\n"
        + "\n".join(f'{name} = {{ index = ["h", "d"], grad = true }}' for name in ("w_q", "w_k", "w_qk"))
    ),
    "location": (
        "[stages]\nsimilarity = 'dot(table[h, kv_idx], q_vec)'\n"
        '[inputs]\ntable = { index = ["h", "kv_idx", "d"], grad = true }'
    ),
    "gaussian_position": (
        f"[stages]\nsimilarity = '-(kv_idx - ({POSITION}) - center[h])**2 / (2 * spread[h]**2)'\n"
        f"[inputs]\ncenter = {H_GRAD}\nspread = {H_GRAD}"
    ),
    "gmm": (
        f"[stages]\nsimilarity = '{MIXTURE}'\nnormalizer = 'score'\n[inputs]\n"
        + "\n".join(f'{name} = {{ index = ["b", "q_idx", "component"], grad = true }}' for name in ("w", "mu", "sigma"))
    ),
    "afa": AFA + "\n".join(f"{name} = {H_GRAD}" for name in ("rate", "sigma2", "eta2", "gamma2", "nu", "tau")),
}
SHIPPED |= TEXTS
ELU1 = "(relu({0}) + exp(minimum(0, {0})))"
RATES = f"[stages]\nscore = 'score * exp(rates[h] * ({POSITION} - kv_idx))'\n{CAUSAL}\nnormalizer = 'identity'\n"
SHIPPED |= {
    "linear_attention": (
        f"[stages]\nsimilarity = 'dot({ELU1.format('q_vec')}, {ELU1.format('k_vec')})'\n{CAUSAL}\n"
        "normalizer = 'score / row.sum(score)'"
    ),
    "retention": f"{RATES}[inputs]\nrates = {H_GRAD}",
    "lightning": RATES.replace("[stages]\n", "[stages]\nsimilarity = 'dot(q_vec, k_vec)'\n")
    + f"[inputs]\nrates = {H_GRAD}",
    "gla": (
        f"[stages]\nsimilarity = '''\nbetween = cumsum(g[b, h, {POSITION}]) - cumsum(g[b, h, kv_idx])\n"
        f"scale * sum_d(q_vec * k_vec * exp(between))'''\n{CAUSAL}\nnormalizer = 'score'\n"
        '[inputs]\ng = { index = ["b", "h", "kv_idx", "d"], grad = true }'
    ),
    "simple_gla": (
        f"[stages]\nscore = 'score * exp(cumsum(g[b, h, {POSITION}]) - cumsum(g[b, h, kv_idx]))'\n{CAUSAL}\n"
        'normalizer = \'identity\'\n[inputs]\ng = { index = ["b", "h", "kv_idx"], grad = true }'
    ),
    "ssd": (
        "[stages]\nsimilarity = 'dot(q_vec, k_vec)'\nscore = '''\n"
        f"time = cumsum(dt[b, h, {POSITION}]) - cumsum(dt[b, h, kv_idx])\n"
        f"score * dt[b, h, kv_idx] * exp(rate[h] * time)'''\n{CAUSAL}\nnormalizer = 'identity'\n"
        f'[inputs]\ndt = {{ index = ["b", "h", "kv_idx"], grad = true }}\nrate = {H_GRAD}'
    ),
    "rwkv6": (
        f"[stages]\nsimilarity = '''\nposition = {POSITION}\n"
        "between = cumsum(g[b, h, position]) - g[b, h, position] - cumsum(g[b, h, kv_idx])\n"
        "own = sum_d(q_vec * k_vec * u[h])\n"
        f"own if kv_idx == position else sum_d(q_vec * k_vec * exp(between))'''\n{CAUSAL}\nnormalizer = 'score'\n"
        '[inputs]\ng = { index = ["b", "h", "kv_idx", "d"], grad = true }\n'
        'u = { index = ["h", "d"], grad = true }'
    ),
}
AWKWARD = [
    (
        "constants",
        ac.Variant(score=lambda score: 0.1 * score * 2.0 + 1 / 3 - 2**0.5 + 7 // 2 + 7 % 4 - (-3) ** 3),
        "[stages]\nscore = '0.1 * score * 2.0 + 1 / 3 - 2**0.5 + 7 // 2 + 7 % 4 - (-3)**3'",
    ),
    (
        "a float constant beside an index",
        ac.Variant(score=lambda score, kv_idx, q_idx: score + 1.0 * kv_idx - 2.0 * (q_idx // 3)),
        "[stages]\nscore = 'score + 1.0 * kv_idx - 2.0 * (q_idx // 3)'",
    ),
    (
        "functions on constants",
        ac.Variant(score=lambda score: ac.log(2) * score + ac.exp(1) * ac.sqrt(2) - ac.exp2(score) + ac.log2(8.0)),
        "[stages]\nscore = 'log(2) * score + exp(1) * sqrt(2) - exp2(score) + log2(8.0)'",
    ),
    (
        "choices and casts",
        ac.Variant(
            score=lambda score, q_idx, kv_idx: ac.where(
                ~(q_idx == kv_idx) & (q_idx > 3), ac.floor(score), -ac.to_float(kv_idx) + ac.to_int(score)
            )
        ),
        "[stages]\nscore = 'floor(score) if not q_idx == kv_idx and q_idx > 3 else -float(kv_idx) + int(score)'",
    ),
    (
        "casts as Python has them",
        ac.Variant(score=lambda score, kv_idx: score + ac.to_float(kv_idx) * ac.to_int(score)),
        "[stages]\nscore = 'score + to_float(kv_idx) * to_int(score)'",
    ),
    (
        "chained comparisons",
        ac.Variant(mask=lambda q_idx, kv_idx: (q_idx - kv_idx >= 0) & (q_idx - kv_idx < 4) | (kv_idx != 2)),
        "[stages]\nmask = '0 <= q_idx - kv_idx < 4 or kv_idx != 2'",
    ),
    (
        "composed masks",
        ac.Variant(mask=ac.causal & (ac.window(4, 1) | ac.prefix(3)) & ~ac.dilated(2) & (lambda kv_idx: kv_idx > 0)),
        "[stages]\nmask = 'causal and (window(4, right=1) | prefix(3)) & ~dilated(2) and kv_idx > 0'",
    ),
    (
        "composed modifiers",
        ac.Variant(score=ac.softcap(2.5) >> ac.alibi("m") >> ac.bias("z") >> ac.softcap("cap"), mask=ac.document()),
        '[stages]\nscore = \'softcap(2.5) >> alibi("m") >> bias("z") >> softcap("cap")\'\nmask = \'document()\'',
    ),
    (
        "reductions",
        ac.Variant(
            normalizer=lambda score, row, q_idx: (
                ac.softplus(score - row.mean(score)) / (row.count() + row.sum(score**2)) - row.min(score) * q_idx
            ),
            reduction=lambda weight, v_vec, row, kv_idx: row.sum(weight / (kv_idx + 1) * v_vec),
        ),
        "[stages]\nnormalizer = '''\ntotal = row.count() + row.sum(score**2)\n"
        "softplus(score - row.mean(score)) / total - row.min(score) * q_idx'''\n"
        "reduction = 'row.sum(weight / (kv_idx + 1) * v_vec)'",
    ),
    (
        "a scalar input and a boolean constant",
        ac.Variant(inputs={"gain": ac.Input(grad=True)}, score=lambda score, gain: gain * score, mask=lambda: True),
        "[stages]\nscore = 'gain * score'\nmask = 'True'\n[inputs]\ngain = { grad = true }",
    ),
]


def same(python: ac.Variant, text: ac.Variant) -> None:
    assert to_text(python.graph, header=False) == to_text(text.graph, header=False)
    assert python.graph.digest == text.graph.digest


def test_every_shipped_variant_is_here():
    """Recurrences are in test_recurrence.py."""
    assert SHIPPED.keys() == set(ac.variants.names())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_variants(name):
    same(ac.variants.get(name), ac.loads_toml(SHIPPED[name]))


@pytest.mark.parametrize(("python", "text"), [case[1:] for case in AWKWARD], ids=[case[0] for case in AWKWARD])
def test_awkward_ones(python, text):
    same(python, ac.loads_toml(text))


@pytest.mark.parametrize("name", ["softmax", "softmax1", "sigmoid", "relu", "relu2", "taylor", "cog"])
def test_normalizers_by_name(name):
    same(ac.Variant(normalizer=name), ac.loads_toml(f"[stages]\nnormalizer = '{name}'"))
