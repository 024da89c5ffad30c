"""attncc: a compiler for attention kernels. Write the formula; forward, backward and merge are derived from it."""

from attncc.errors import AttnccError, InputError, ScheduleError, SpecError, UnsupportedError
from attncc.language.functions import (
    absolute,
    cos,
    erf,
    exp,
    exp2,
    floor,
    gelu,
    log,
    log2,
    maximum,
    minimum,
    sign,
    silu,
    sin,
    softplus,
    sqrt,
    tanh,
    to_float,
    to_int,
    where,
)
from attncc.language.functions import absolute as abs
from attncc.language.masks import (
    block_diagonal,
    causal,
    dilated,
    document,
    full,
    padding,
    prefix,
    sliding_window,
    window,
)
from attncc.language.mods import alibi, alibi_slopes, bias, softcap
from attncc.language.normalizers import cog, softmax, softmax1, taylor
from attncc.language.textform import load_toml, loads_toml
from attncc.language.variant import Input, Scalar, Variant
