"""T5's learned relative position bias, the bidirectional form of its encoder: 32 buckets, distances up to 128.

Inputs: table (32, H), the model's `relative_attention_bias.weight`; it receives a gradient. T5 does not scale its
scores: pass scale=1.0.

A bucket is the distance up to 7, then one of eight bins of equal size in log(distance), the last of which has no end;
keys ahead of the query have sixteen buckets of their own. The bins' first distances are 8 * 16 ** (i / 8), rounded up:
comparing integers with them is exact, where a logarithm in float32 is so only by luck.
"""

import attncc as ac

_BINS = (12, 16, 23, 32, 46, 64, 91)


def bucket(q_idx, kv_idx, q_len, kv_len):
    """The row of the table for a pair."""
    ahead = kv_idx - (q_idx + kv_len - q_len)
    distance = ac.abs(ahead)
    return 16 * ac.to_int(ahead > 0) + ac.minimum(distance, 8) + sum(ac.to_int(distance >= first) for first in _BINS)


t5_bias = ac.Variant(
    name="t5_bias",
    score=lambda score, h, q_idx, kv_idx, q_len, kv_len, table: score + table[bucket(q_idx, kv_idx, q_len, kv_len), h],
    inputs={"table": ac.Input("bucket", "h", grad=True)},
    cites="T5, arXiv:1910.10683",
)
