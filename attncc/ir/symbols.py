"""The names that a formula may use, as sympy symbols: defined once, so that all passes share them."""

from __future__ import annotations

import re
from functools import cache

import sympy


def _index(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, nonnegative=True)


def _count(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, positive=True)


B, H, H_KV = _index("b"), _index("h"), _index("h_kv")
Q_IDX, KV_IDX = _index("q_idx"), _index("kv_idx")
Q_LEN, KV_LEN, NUM_HEADS = _count("q_len"), _count("kv_len"), _count("num_heads")

SCALE = sympy.Symbol("scale", positive=True)
#: dot(q_vec, k_vec), before any scale
QK = sympy.Symbol("qk", real=True)
#: one component of the query's and of the key's vector, and its index, over which sum_d adds
Q_VEC = sympy.Symbol("q_vec", real=True)
K_VEC = sympy.Symbol("k_vec", real=True)
COMPONENT = _index("d_idx")
#: the output of the similarity stage, which the score stage calls `score`
RAW_SCORE = sympy.Symbol("raw_score", real=True)
#: the output of the score stage, which the normalizer calls `score`
SCORE = sympy.Symbol("score", real=True)
WEIGHT = sympy.Symbol("weight", real=True)
V_VEC = sympy.Symbol("v_vec", real=True)
#: one element of a recurrence's state, which has a row per component of k_vec and a column per component of v_vec
STATE = sympy.Symbol("state", real=True)

#: row reductions, and the values that kernels keep with them: the next maximum, its first position, its number of
#: ties, a cotangent
ROW_NAME = r"row_(max|sum|root|part)_\d+(_[a-z]+)?(\[\d+\])?|row_unknown"
#: reductions over the queries that see a key, a pair's share of such a sum, and the mean that its gradient subtracts
COL_NAME = r"col_(max|sum|share|mean)_\d+(_[a-z]+)*"
#: the unknown of a row.root's equation; bound inside it
UNKNOWN = sympy.Symbol("row_unknown", real=True)

#: indices and lengths that every stage sees, by the user's names
INDICES: dict[str, sympy.Symbol] = {s.name: s for s in (B, H, H_KV, Q_IDX, KV_IDX, Q_LEN, KV_LEN, NUM_HEADS)}


def row_symbol(op: str, number: int) -> sympy.Symbol:
    """The symbol of the `number`-th reduction of its kind, e.g. `row_max_0`, or `col_max_0` for the op "col_max"."""
    return sympy.Symbol(f"{op}_{number}" if op.startswith("col_") else f"row_{op}_{number}", real=True)


def of_branch(symbol: sympy.Symbol, branch: int) -> sympy.Symbol:
    """The symbol of a value of one branch of several, e.g. `weight[1]`."""
    return sympy.Symbol(f"{symbol.name}[{branch}]", real=True)


def similarity_symbol(kind: str, number: int) -> sympy.Symbol:
    """The symbol of the `number`-th sum over the head dimension of its kind, e.g. `k_term_0`."""
    return sympy.Symbol(f"{kind}_{number}", real=True)


@cache
def is_row_name(name: str) -> bool:
    """Whether it is the name of a row reduction, or of a value that a kernel keeps with one."""
    return re.fullmatch(ROW_NAME, name) is not None


@cache
def is_col_name(name: str) -> bool:
    """Whether it is the name of a column reduction."""
    return re.fullmatch(COL_NAME, name) is not None


def scalar_symbol(name: str, is_int: bool) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True) if is_int else sympy.Symbol(name, real=True)


def input_symbol(name: str, is_int: bool) -> sympy.Symbol:
    """The tensor itself; only ever the first argument of a Read."""
    return scalar_symbol(name, is_int)
