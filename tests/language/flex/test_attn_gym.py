"""Every score_mod and mask_mod that the attn-gym package publishes, traced, against FlexAttention itself."""

from __future__ import annotations

import importlib
import pkgutil
import random
from dataclasses import dataclass, field

import pytest
import torch

import attncc as ac
from tests.language.flex import oracle

attn_gym = pytest.importorskip("attn_gym")
masks, mods = attn_gym.masks, attn_gym.mods


@dataclass
class Case:
    """Functions, the sizes at which they make sense, and the captured tensors that want a gradient."""

    score_mod: object = None
    mask_mod: object = None
    sizes: tuple[int, int] = (24, 24)
    heads: int = 2
    batch: int = 1
    learned: list[torch.Tensor] = field(default_factory=list)
    plain: object = None  # where FlexAttention itself has no gradient: `out` by hand


def _offsets(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _graph():
    generator = torch.Generator().manual_seed(3)
    adjacency = torch.rand(2, 12, 12, generator=generator) < 0.2
    return adjacency | adjacency.mT


def _spatial():
    distances = mods.shortest_path_distances(_graph(), max_distance=3)
    table = torch.nn.Parameter(torch.randn(2, 5))
    return Case(mods.generate_graphormer_spatial_bias(table, distances), sizes=(12, 12), batch=2, learned=[table])


def _edges():
    kinds = torch.randint(0, 4, (2, 12, 12), generator=torch.Generator().manual_seed(1))
    path, lengths = mods.shortest_path_edge_types(_graph(), kinds, max_path_len=3)
    table = torch.nn.Parameter(torch.randn(2, 3, 4))
    return Case(mods.generate_graphormer_edge_bias(table, path, lengths), sizes=(12, 12), batch=2, learned=[table])


def _mla():
    query, key = torch.randn(1, 4, 10, 6, requires_grad=True), torch.randn(1, 1, 13, 6, requires_grad=True)
    mod = mods.generate_mla_rope_score_mod(query, key, num_heads=4, scale=0.3)

    def plain(q, k, v):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = q @ k.mT / 4 + 0.3 * query @ key.mT
        hidden = torch.ones(10, 13, dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v

    return Case(mod, masks.causal_mask, sizes=(10, 13), heads=4, learned=[query, key], plain=plain)


def _vsa(sizes):
    topk = torch.tensor([[[[0, 2], [1, 2], [0, 1]]] * 2])
    return Case(mask_mod=masks.generate_vsa_mask_mod(topk, 8, sizes))


def _jetspec_tree():
    ancestors = masks.build_tree_ancestor_matrix([-1, 0, 0, 1, 1, 2], device="cpu")
    return Case(mask_mod=masks.generate_jetspec_tree_causal_mask_mod(5, ancestors), sizes=(6, 11))


def _shared_prefix():
    return Case(mask_mod=masks.generate_shared_prefix_mask_mod(_offsets(6, 8, 10), torch.tensor([0, 0, 0])))


def _global():
    is_global = torch.zeros(24, dtype=torch.bool)
    is_global[[0, 17]] = True
    return Case(mask_mod=masks.generate_global_sliding_window(3, is_global))


def _flamingo():
    intervals = torch.tensor([[0, 9], [4, 20], [20, 24]])
    return Case(mask_mod=masks.generate_vision_cross_attention_mask_mod(intervals, 5), sizes=(24, 15))


def _sta(function, text, *shape):
    return Case(mask_mod=getattr(masks, function)(*shape, text_seq_len=text), sizes=(shape[0][0] * 16 + text,) * 2)


#: one or more cases under the name of each function that makes a score_mod or a mask_mod
CASES = {
    "causal_mask": lambda: Case(mask_mod=masks.causal_mask, sizes=(13, 21)),
    "batchify_mask_mod": lambda: Case(mask_mod=masks.batchify_mask_mod(masks.causal_mask, 7)),
    "generate_block_diffusion_mask": lambda: Case(mask_mod=masks.generate_block_diffusion_mask(12, 4)),
    "generate_dilated_sliding_window": lambda: Case(mask_mod=masks.generate_dilated_sliding_window(7, 2)),
    "generate_doc_mask_mod": lambda: Case(mask_mod=masks.generate_doc_mask_mod(masks.causal_mask, _offsets(5, 11, 8))),
    "generate_packed_causal_doc_mask_mod": lambda: Case(
        mask_mod=masks.generate_packed_causal_doc_mask_mod(_offsets(5, 11, 8))
    ),
    "generate_vision_cross_attention_mask_mod": _flamingo,
    "generate_global_sliding_window": _global,
    "generate_jetspec_training_mask_mod": lambda: Case(
        mask_mod=masks.generate_jetspec_training_mask_mod(6, 4), sizes=(12, 18)
    ),
    "generate_jetspec_tree_causal_mask_mod": _jetspec_tree,
    "generate_natten": lambda: Case(mask_mod=masks.generate_natten(6, 6, 3, 3), sizes=(36, 36)),
    "generate_tiled_natten": lambda: Case(mask_mod=masks.generate_tiled_natten(8, 8, 5, 3, 2, 4), sizes=(64, 64)),
    "generate_morton_natten": lambda: Case(mask_mod=masks.generate_morton_natten(8, 8, 3, 5), sizes=(64, 64)),
    "generate_prefix_lm_mask": lambda: Case(mask_mod=masks.generate_prefix_lm_mask(6)),
    "generate_shared_prefix_mask_mod": _shared_prefix,
    "generate_sliding_window": lambda: Case(mask_mod=masks.generate_sliding_window(4)),
    "generate_spatial_head_mask_mod": lambda: Case(
        mask_mod=masks.generate_spatial_head_mask_mod(3, 4, 6, 1, attn_sink=True, round_width=4), sizes=(27, 27)
    ),
    "generate_temporal_head_mask_mod": lambda: Case(
        mask_mod=masks.generate_temporal_head_mask_mod(3, 4, 6, 2), sizes=(27, 27)
    ),
    "generate_sta_mask_mod_2d": lambda: _sta("generate_sta_mask_mod_2d", 5, (4, 16), (2, 8), (2, 4)),
    "generate_sta_mask_mod_3d": lambda: _sta("generate_sta_mask_mod_3d", 3, (2, 4, 4), (2, 2, 4), (1, 2, 2)),
    "generate_vsa_mask_mod": lambda: _vsa(None),
    "generate_vsa_mask_mod/padded": lambda: _vsa(torch.tensor([8, 8, 5])),
    "generate_vsa_padding_mask_mod": lambda: Case(
        mask_mod=masks.vsa.generate_vsa_padding_mask_mod(torch.tensor([8, 3, 8]), 8)
    ),
    "generate_activation_score_mod": lambda: Case(mods.generate_activation_score_mod()),
    "generate_activation_score_mod/sigmoid": lambda: Case(
        mods.generate_activation_score_mod(torch.sigmoid, 0.5), masks.causal_mask
    ),
    "generate_alibi_bias": lambda: Case(mods.generate_alibi_bias(4), masks.causal_mask, heads=4),
    "generate_graphormer_spatial_bias": _spatial,
    "generate_graphormer_edge_bias": _edges,
    "generate_mla_rope_score_mod": _mla,
    "generate_sandwich_bias": lambda: Case(mods.generate_sandwich_bias(2, 24, d_bar=16), masks.causal_mask),
    "generate_tanh_softcap": lambda: Case(mods.generate_tanh_softcap(3)),
    "generate_tanh_softcap/approx": lambda: Case(mods.generate_tanh_softcap(3, approx=True), masks.causal_mask),
}


def test_every_published_mod_has_a_case():
    published = set()
    for package in (masks, mods):
        for module in pkgutil.iter_modules(package.__path__):
            names = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
            published |= {n for n in names if n.startswith("generate_") or n in ("causal_mask", "batchify_mask_mod")}
    assert published - {"generate_random_lengths"} == {name.partition("/")[0] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_flex_attention(name):
    random.seed(0)
    torch.manual_seed(0)
    case = CASES[name]()
    (m, n), group = case.sizes, 2 if case.heads == 4 else 1
    q = torch.randn(case.batch, case.heads, m, 16, requires_grad=True)
    k, v = (torch.randn(case.batch, case.heads // group, n, d, requires_grad=True) for d in (16, 8))
    op = ac.compile(ac.from_flex(case.score_mod, case.mask_mod))
    out, lse = op(q, k, v, outputs=("out", "lse"))
    flex_out, flex_lse = oracle.values(q, k, v, case.score_mod, case.mask_mod)
    torch.testing.assert_close(out, flex_out, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(lse, flex_lse, rtol=2e-5, atol=2e-6)
    leaves = (q, k, v, *case.learned)
    cotangent = torch.randn(out.shape)
    exact = case.plain(q, k, v) if case.plain else oracle.differentiable(q, k, v, case.score_mod, case.mask_mod)
    wanted = torch.autograd.grad(exact, leaves, cotangent)
    for got, want in zip(torch.autograd.grad(out, leaves, cotangent), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=5e-6)
