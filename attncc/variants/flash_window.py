"""A band of keys: at most `left` behind and `right` ahead of the query, both inclusive: `-right <= q - k <= left`.

This is flash-attn's `window_size=(left, right)`: with the defaults a query sees 1025 keys, its own counted. For the
convention that counts tokens see `sliding_window`.
"""

import attncc as ac

flash_window = ac.Variant(
    name="flash_window",
    mask=ac.window("left", "right"),
    inputs={"left": ac.Scalar(1024), "right": ac.Scalar(0)},
    cites="FlashAttention-2, arXiv:2307.08691",
)
