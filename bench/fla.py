"""flash-linear-attention as a peer: its functions, and its tuning made affordable.

The first call of one of its operators compiles up to 48 configurations of each kernel one after the other, and times
each for an eighth of a second: one to four minutes an operator. What it chooses is its own, and chosen by its own
measurement in the process that then races it, on a quiet GPU; only what comes before and how long are another's:

- `compiled_ahead` compiles a share of every kernel's configurations into Triton's cache on disk, and launches none of
  them, so that many processes compile at once;
- `tuning_briefly` times each configuration for a shorter while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from triton.compiler.errors import CompilationError
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

from bench.case import Tensors

#: from our inputs to a function of q, k, v (B, T, H, D)
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Peer = Callable[[Tensors], Attend]

#: milliseconds for which a configuration runs before, and while, it is timed; Triton's own are 25 and 100
WARMUP_MS, REP_MS = 5, 20
#: what a tuner does when it is called
_RUN = Autotuner.run


def peers() -> dict[str, Peer]:
    """flash-linear-attention's function of each case; none where it is not installed."""
    if find_spec("fla") is None:
        return {}
    from fla.ops.based import fused_chunk_based
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.lightning_attn import chunk_lightning_attn
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.retention import chunk_retention
    from fla.ops.rwkv6 import chunk_rwkv6
    from fla.ops.simple_gla import chunk_simple_gla

    def features(x: torch.Tensor) -> torch.Tensor:
        return F.elu(x) + 1

    def of(function: Callable[..., Any], *names: str, **options: Any) -> Peer:
        """Its inputs are (B, T, H, ...) and contiguous: made so before the clock runs."""

        def given(inputs: Tensors) -> Attend:
            own = {name: inputs[name].transpose(1, 2).contiguous() for name in names}
            own |= {name: x for name, x in inputs.items() if name == "u"}  # of heads alone
            own |= {name: own[name].bfloat16() for name in ("beta",) if name in own}  # as its layers make it
            return lambda q, k, v: function(q, k, v, **own, **options)[0]

        return given

    return {
        "retention": of(chunk_retention),
        "simple_gla": of(chunk_simple_gla, "g"),
        "lightning": of(chunk_lightning_attn, layer_idx=0, num_layers=24, scale=1.0),
        "linear_attention": of(lambda q, k, v: chunk_linear_attn(features(q), features(k), v, scale=1.0)),
        "gla": of(chunk_gla, "g"),
        "rwkv6": of(lambda q, k, v, g, u: chunk_rwkv6(q, k, v, g, u, scale=1.0), "g"),
        "taylor_causal": of(lambda q, k, v: (fused_chunk_based(q, k, v),)),
        "delta_net": of(chunk_delta_rule, "beta"),
        "gated_delta_net": of(chunk_gated_delta_rule, "g", "beta"),
    }


@contextmanager
def _tuners(**attributes: Any) -> Iterator[None]:
    """Triton's tuners with other attributes, until the block ends."""
    plain = {name: Autotuner.__dict__[name] for name in attributes}
    for name, value in attributes.items():
        setattr(Autotuner, name, value)
    try:
        yield
    finally:
        for name, value in plain.items():
            setattr(Autotuner, name, value)


@contextmanager
def compiled_ahead(share: int, shares: int) -> Iterator[None]:
    """Inside, a kernel with a tuner is compiled for one of every `shares` configurations, and not launched: what the
    calls give is not theirs. What a configuration cannot have (shared memory) is left to the tuner to find out. Of a
    kernel whose tuning an earlier run left in Triton's cache only what it chose is compiled."""
    met = 0

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal met
        for constants in _chosen(self, args, kwargs):
            met += 1  # counted over all kernels, for some have fewer configurations than there are shares
            if met % shares == share:
                with suppress(CompilationError, OutOfResources, PTXASError):
                    self.fn.run(*args, **{**kwargs, "warmup": True}, **constants)

    with _tuners(run=run):
        yield


class _UntunedError(Exception):
    """A tuner would have to measure."""


class _Unlaunched:
    """A tuner's kernel, whose launches are noted alone."""

    def __init__(self, fn: Any):
        self.fn, self.constants = fn, []

    def run(self, *args: Any, **kwargs: Any) -> None:
        self.constants.append(kwargs)


def _chosen(tuner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """The constants of the configuration that a tuner launches, or of all that it would measure before it knows."""
    kernel = tuner.fn

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise _UntunedError

    tuner.fn = unlaunched = _Unlaunched(kernel)
    try:
        with _tuners(_bench=refuse):
            _RUN(tuner, *args, **kwargs)
        return [{name: x for name, x in found.items() if name not in kwargs} for found in unlaunched.constants]
    except _UntunedError:
        return [config.all_kwargs() for config in tuner.prune_configs(kwargs)]
    finally:
        tuner.fn = kernel


@contextmanager
def tuning_briefly() -> Iterator[None]:
    """Inside, a tuner times each configuration for `REP_MS`, some forty launches of what takes half a millisecond."""
    with _tuners(do_bench=property(lambda self: partial(do_bench, warmup=WARMUP_MS, rep=REP_MS))):
        yield
