from __future__ import annotations

import numpy as np
import pytest
import torch

import attncc as ac
from attncc.errors import InputError
from attncc.runtime.shapes import REFERENCE_DTYPES, bind

GRAPH = ac.Variant(
    name="everything",
    inputs={
        "slopes": ac.Input("h", grad=True),
        "doc": ac.Input("b", "kv_idx", dtype="int"),
        "table": ac.Input("bucket", "h_kv"),
        "gain": ac.Input(),
        "window": ac.Scalar(8),
        "cap": ac.Scalar(30.0),
    },
    score=lambda score, b, h, h_kv, kv_idx, slopes, table, gain, cap: (
        cap * ac.tanh(score * slopes[h] / cap) + gain * table[kv_idx, h_kv]
    ),
    mask=lambda b, q_idx, kv_idx, doc, window: (doc[b, q_idx] == doc[b, kv_idx]) & (q_idx - kv_idx < window),
).graph
PLAIN = ac.Variant(name="plain").graph
B, HQ, HKV, M, N, DQK, DV = 2, 6, 3, 4, 5, 8, 7


def q(*size, **options):
    return torch.zeros(*(size or (B, HQ, M, DQK)), **options)


def k(*size, **options):
    return torch.zeros(*(size or (B, HKV, N, DQK)), **options)


def v(*size, **options):
    return torch.zeros(*(size or (B, HKV, N, DV)), **options)


def inputs(**changed):
    given = {
        "slopes": torch.zeros(HQ),
        "doc": torch.zeros(B, N, dtype=torch.int64),
        "table": torch.zeros(9, HKV),
        "gain": torch.zeros(()),
        **changed,
    }
    return {name: value for name, value in given.items() if value is not ...}


def test_a_call_is_bound():
    given = inputs(cap=20, window=3)
    bound = bind(GRAPH, q(), k(), v(), None, given)
    assert bound.sizes == {"b": B, "h": HQ, "h_kv": HKV, "q_idx": M, "kv_idx": N, "d_qk": DQK, "d_v": DV}
    assert bound.scale == DQK**-0.5
    assert bound.scalars == {"cap": 20.0, "window": 3}
    assert isinstance(bound.scalars["cap"], float)
    assert bound.tensors.keys() == {"slopes", "doc", "table", "gain"}
    assert all(bound.tensors[name] is given[name] for name in bound.tensors)
    assert bind(GRAPH, q(), k(), v(), 2, inputs()).scalars == {"cap": 30.0, "window": 8}
    assert bind(PLAIN, q(), k(), v(), 2, {}).scale == 2.0


def test_dimensions_of_size_one_and_free_dimensions():
    given = inputs(slopes=torch.zeros(1), doc=torch.zeros(1, 1, dtype=torch.uint8), table=torch.zeros(1, 1))
    assert bind(GRAPH, q(), k(), v(), None, given).tensors["slopes"].shape == (1,)


def test_views_and_single_columns_are_taken_as_they_are():
    view = torch.zeros(B, M, HQ, DQK).transpose(1, 2)
    bind(PLAIN, view, k(), v(), None, {})
    bind(PLAIN, q(B, HQ, M, DQK)[..., :1], k()[..., :1], v(), None, {})


@pytest.mark.parametrize(("b", "m", "n"), [(0, M, N), (B, 0, N), (B, M, 0)])
def test_empty_sizes_are_fine(b, m, n):
    assert bind(PLAIN, q(b, HQ, m, DQK), k(b, HKV, n, DQK), v(b, HKV, n, DV), None, {}).sizes["kv_idx"] == n


def test_defaults_are_made_for_the_call():
    variant = ac.Variant(
        inputs={
            "slopes": ac.Input("h", default=lambda sizes: [0.5] * sizes["h"]),
            "ids": ac.Input("kv_idx", dtype="int", default=lambda sizes: range(sizes["kv_idx"])),
            "gain": ac.Input(default=lambda sizes: 3),
        },
        score=lambda score, h, kv_idx, slopes, ids, gain: score * slopes[h] + ids[kv_idx] * gain,
    )
    tensors = bind(variant.graph, q(), k(), v(), None, {"gain": None}).tensors
    assert tensors["slopes"].tolist() == [0.5] * HQ
    assert tensors["slopes"].dtype == torch.float32
    assert tensors["ids"].tolist() == list(range(N))
    assert tensors["ids"].dtype == torch.int32
    assert tensors["gain"].item() == 3.0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (q(B, HQ, DQK), k(), v()),
            r"q has shape \(2, 6, 8\), expected 4 dimensions \(batch, heads, queries, head dim\)",
        ),
        ((q(), k(), v(N, DV)), "v has shape .* value dim"),
        ((q(), [1.0], v()), "k is of type list, not a tensor"),
        ((np.zeros((B, HQ, M, DQK), np.float32), k(), v()), "q is of type ndarray, not a tensor"),
        ((q(), None, v()), "k is None, not a tensor"),
        ((q(3, HQ, M, DQK), k(), v()), "q and k differ in their batch: 3 and 2"),
        ((q(), k(), v(3, HKV, N, DV)), "k and v differ in their batch: 2 and 3"),
        (
            (q(), k(), v(B, 4, N, DV)),
            "k and v differ in their number of key/value heads: 3 and 4, which is no multiple",
        ),
        ((q(), k(), v(B, HKV, 6, DV)), "k and v differ in their number of keys: 5 and 6"),
        ((q(B, HQ, M, 16), k(), v()), "q and k differ in their head dim: 16 and 8"),
        ((q(B, 4, M, DQK), k(), v()), r"4 query heads are no multiple of 3 key/value heads(.|\n)*transpose\(1, 2\)"),
        ((q(B, 0, M, DQK), k(), v()), "there is no head"),
        ((q(), k(B, 0, N, DQK), v(B, 0, N, DV)), "there is no head"),
        ((q(B, HQ, M, 0), k(B, HKV, N, 0), v()), "a head dim is 0"),
        ((q(), k(), v(B, HKV, N, 0)), "a head dim is 0"),
        ((q(), k(dtype=torch.float16), v()), "differ in dtype: float32, float16, float32"),
        ((q(dtype=torch.float64), k(dtype=torch.float64), v(dtype=torch.float64)), "float64(.|\n)*bfloat16, float16"),
        ((q(dtype=torch.int32), k(dtype=torch.int32), v(dtype=torch.int32)), "q, k and v are int32"),
        ((q(), k(device="meta"), v()), r"k is on meta, but q is on cpu(.|\n)*\.to\('cpu'\)"),
        ((q().to_sparse(), k(), v()), r"q is sparse_coo, not dense(.|\n)*q\.to_dense\(\)"),
        ((q(), k(), v(B, HKV, DV, N).mT), r"last dimension of v is not contiguous(.|\n)*v\.contiguous\(\)"),
    ],
)
def test_faults_of_q_k_v(args, message):
    with pytest.raises(InputError, match=message):
        bind(PLAIN, *args, None, {})


def test_the_reference_takes_float64():
    tensors = [t.double() for t in (q(), k(), v())]
    assert bind(PLAIN, *tensors, None, {}, REFERENCE_DTYPES).scale == DQK**-0.5


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (0.0, "scale is 0.0, expected a positive"),
        (-1, "positive"),
        (float("nan"), "finite"),
        (float("inf"), "finite"),
        (True, "scale is of type bool"),
        (torch.tensor(0.5), r"scale is a tensor of shape \(\)(.|\n)*score stage"),
    ],
)
def test_faults_of_scale(scale, message):
    with pytest.raises(InputError, match=message):
        bind(PLAIN, q(), k(), v(), scale, {})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"slopes": ...}, r"'everything' needs the input 'slopes' \[h\](.|\n)*slopes=\.\.\."),
        ({"slops": torch.zeros(HQ)}, r"no input 'slops'(.|\n)*did you mean 'slopes'"),
        ({"xyz": 1}, "no input 'xyz'(.|\n)*doc, gain, slopes, table, cap, window"),
        ({"slopes": 0.5}, r"'slopes' \[h\] is of type float, not a tensor"),
        ({"slopes": torch.zeros(1, HQ)}, r"shape \(1, 6\), expected 1 dimension: \[h\]"),
        ({"gain": torch.zeros(1)}, r"shape \(1,\), expected 0 dimensions"),
        (
            {"slopes": torch.zeros(HKV)},
            r"dimension 0 of the input 'slopes' \[h\] has size 3, expected 6, the size of h, or 1",
        ),
        ({"doc": torch.zeros(B, M, dtype=torch.int64)}, "dimension 1 of the input 'doc' .* size 4, expected 5"),
        ({"table": torch.zeros(9, HQ)}, "dimension 1 of the input 'table' .* size 6, expected 3, the size of h_kv"),
        ({"doc": torch.zeros(B, N)}, r"'doc' is float32, declared as int(.|\n)*doc\.to\(torch\.int32\)"),
        ({"doc": torch.zeros(B, N, dtype=torch.bool)}, r"'doc' is bool, declared as int(.|\n)*to\(torch\.int32\)"),
        (
            {"slopes": torch.zeros(HQ, dtype=torch.int64)},
            r"'slopes' is int64, declared as float(.|\n)*slopes\.float\(\)",
        ),
        (
            {"slopes": torch.zeros(HQ, dtype=torch.float64)},
            "'slopes' is float64, declared as float(.|\n)*supported: bfloat16",
        ),
        ({"slopes": torch.zeros(HQ, device="meta")}, "the input 'slopes' is on meta, but q is on cpu"),
        (
            {"table": torch.zeros(9, HKV, requires_grad=True)},
            r"declared without one(.|\n)*grad=True.*table\.detach\(\)",
        ),
        ({"cap": torch.tensor(3.0)}, r"scalar 'cap' is a tensor of shape \(\), expected a number(.|\n)*ac\.Input\(\)"),
        ({"window": 3.0}, r"scalar 'window' is of type float, expected an int(.|\n)*window=8"),
        ({"window": True}, "of type bool, expected an int"),
        ({"cap": "3"}, "of type str, expected a number"),
        ({"cap": float("inf")}, "'cap' is inf, expected a finite number"),
    ],
)
def test_faults_of_inputs(changed, message):
    with pytest.raises(InputError, match=message):
        bind(GRAPH, q(), k(), v(), None, inputs(**changed))


def test_a_variant_without_inputs_takes_none():
    with pytest.raises(InputError, match="'plain' has no input 'slopes'(.|\n)*it takes none"):
        bind(PLAIN, q(), k(), v(), None, {"slopes": torch.zeros(HQ)})


def test_without_gradients_a_parameter_may_be_passed_to_any_input():
    given = inputs(table=torch.nn.Parameter(torch.zeros(9, HKV)))
    with torch.no_grad():
        bind(GRAPH, q(), k(), v(), None, given)
