"""A learned sink: each head's softmax has one more logit, which takes weight and has no value. Causal (gpt-oss).

Inputs: sink (H,), the logits; it receives a gradient. lse includes the sink. In every other layer gpt-oss adds a
sliding window of 128 tokens.
"""

import attncc as ac


def softmax_with_sink(score, row, h, sink):
    """exp(s) / (exp(sink) + sum exp(s))."""
    m = ac.maximum(row.max(score), sink[h])
    p = ac.exp(score - m)
    return p / (row.sum(p) + ac.exp(sink[h] - m))


sink = ac.Variant(
    name="sink",
    mask=ac.causal,
    normalizer=softmax_with_sink,
    inputs={"sink": ac.Input("h", grad=True)},
    cites="gpt-oss, arXiv:2508.10925; StreamingLLM, arXiv:2309.17453",
)
