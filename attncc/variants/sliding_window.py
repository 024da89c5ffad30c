"""Causal attention to the last `window` tokens, the query's own counted: `0 <= q - k < window`.

This is the convention of Mistral, Gemma and gpt-oss. For flash-attn's, which counts distances, see `flash_window`:
`flash_window(left=W - 1)` is `sliding_window(window=W)`.
"""

import attncc as ac

sliding_window = ac.Variant(
    name="sliding_window",
    mask=ac.causal & ac.sliding_window("window"),
    inputs={"window": ac.Scalar(1024)},
    cites="Longformer, arXiv:2004.05150; Mistral 7B, arXiv:2310.06825",
)
