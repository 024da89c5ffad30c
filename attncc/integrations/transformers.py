"""`attn_implementation="attncc"` for transformers: encoders and decoders run on ops that attncc compiles.

    from attncc.integrations.transformers import register

    register()
    model = AutoModel.from_pretrained(path, attn_implementation="attncc")

What a model asks of its attention becomes a formula of attncc's language: causal, sliding window, bidirectional
window, packed sequences, padding on the left or the right, softcap, position bias, learnable sinks, grouped heads,
scale. What no formula here says (dropout, attention weights, a mask of another form, a static cache) raises
UnsupportedError: nothing is ignored, and nothing falls back to another implementation. Rows of padding tokens hold
unspecified values.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

import attncc as ac
from attncc.errors import UnsupportedError
from attncc.integrations.transformers_masks import AttentionMask, Pattern, attention_mask, from_tensor, unmasked

NAME = "attncc"


@cache
def _op(pattern: Pattern) -> Any:
    return ac.compile(pattern.variant())


#: keyword arguments that reach the attention function and say nothing about its result
_HARMLESS = {
    "cache_position",
    "deterministic",
    "encoder_attention_mask",
    "encoder_hidden_states",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "use_cache",
}
#: keyword arguments that change the result in a way that no formula here says
_REFUSED = {
    "output_attentions": "attention weights are never formed",
    "head_mask": "weights are not multiplied by a head mask",
    "cache": "paged caches are not read",
    "cu_seq_lens_q": "sequences packed by cu_seq_lens are not split; pass position_ids that restart instead",
    "cu_seq_lens_k": "sequences packed by cu_seq_lens are not split; pass position_ids that restart instead",
    "seq_idx": "sequences packed by seq_idx are not split; pass position_ids that restart instead",
    "max_length_q": "sequences packed by cu_seq_lens are not split; pass position_ids that restart instead",
    "max_length_k": "sequences packed by cu_seq_lens are not split; pass position_ids that restart instead",
    "indices": "keys are not selected by index",
    "block_indices": "keys are not selected by index",
    "block_table": "paged caches are not read",
}


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: AttentionMask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface.

    query (B, Hq, M, D), key (B, Hkv, N, D), value (B, Hkv, N, Dv), in any strides. `attention_mask` is what the mask
    interface made; None means causal or full, as `is_causal` or else `module.is_causal` says; a 4-dimensional tensor is
    taken if it is padding, causal or not. position_bias (B or 1, Hq, M, N) and the sinks s_aux (Hq,) get gradients.
    Returns the output (B, M, Hq, Dv) and None in place of the weights; UnsupportedError for what cannot be honoured.
    """
    if dropout:
        raise UnsupportedError(
            f"attention dropout of {dropout} in training", remedy="set the config's attention dropout to 0"
        )
    _refuse(kwargs)
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if attention_mask is None:
        mask = unmasked(query.shape[2], key.shape[2], is_causal, sliding_window)
    elif isinstance(attention_mask, AttentionMask):
        mask = attention_mask  # it has the model's window and causality already
    else:
        mask = from_tensor(attention_mask, query.shape[2], key.shape[2], is_causal, sliding_window)
    pattern = replace(mask.pattern, softcap=softcap, bias=position_bias is not None, sink=s_aux is not None)
    inputs = mask.inputs(query.device)
    if position_bias is not None:
        inputs["position_bias"] = position_bias
    if s_aux is not None:
        inputs["sink"] = s_aux
    out = _op(pattern)(query, key, value, scale=scaling, **inputs)
    return out.transpose(1, 2).contiguous(), None


def _refuse(kwargs: dict[str, Any]) -> None:
    """UnsupportedError for the first keyword that is given and either cannot be honoured or is not known."""
    for name, value in kwargs.items():
        if value is None or value is False or name in _HARMLESS:
            continue
        why = _REFUSED.get(name, "attncc does not know whether it changes the result")
        raise UnsupportedError(f"{name}: {why}", remedy="run this model with another attn_implementation")


def register() -> None:
    """Make `attn_implementation="attncc"` known to transformers; safe to call again."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
