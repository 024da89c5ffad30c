"""The shipped variants that the Gluon kernels for Hopper leave to Triton at heads of 64, each with the reason: by the
beginning of what the scheduler says. Whatever is not here is served."""

_OTHER = "the Gluon backend multiplies q with k"
NO_FORWARD = {
    "entmax15": "Gluon kernels go over the keys once",
    "sparsemax": "Gluon kernels go over the keys once",
    "min_p": "Gluon kernels go over the keys once",
    **dict.fromkeys(("lln", "trilinear", "bico", "location", "pooling"), _OTHER),
    **dict.fromkeys(("gaussian_position", "gmm", "linear_attention", "gla", "rwkv6"), _OTHER),
    **dict.fromkeys(("additive", "l1_distance"), _OTHER),
    "afa": "no tiling fits",
    "mla": "where keys hold their values",
}
_MORE = "the Gluon backward multiplies q with k alone"
NO_BACKWARD = {
    **NO_FORWARD,
    "transformer_xl": _MORE,
    **dict.fromkeys(("afa", "ssd"), "no tiling fits"),
    "forgetting": "an input has gradients by key and by query",
    "dense_bias": "an input with an entry a pair",
    "mla": "Gluon's backward loads v for itself",
    "sdm": "q and k have no gradient",
}
