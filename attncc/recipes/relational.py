"""Relational attention with linear relations: symbols and relations of a query to its keys, in one kernel.

    out = sum_j weight_ij (s_j + W_r r_ij),  r_ij,l = q_rel_l,i . k_rel_l,j / sqrt(Dr)

Linear in the weights, so that sum_j weight_ij k_rel_j is all that relations ask: the values are symbols beside the R
relations' keys, Dv + R Dr wide, and the product with q_rel comes behind.

Source: Disentangling and Integrating Relational and Sensory Information, arXiv:2405.16727.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attncc.runtime.op import AttentionOp


def relational(
    op: AttentionOp, q: Tensor, k: Tensor, symbols: Tensor, q_rel: Tensor, k_rel: Tensor, w_rel: Tensor
) -> Tensor:
    """(B, H, M, Dv). symbols (B, Hkv, N, Dv); q_rel (B, R, M, Dr), k_rel (B, R, N, Dr); w_rel (H, Dv, R)."""
    keys = k_rel.transpose(1, 2).flatten(2)[:, None].expand(-1, k.shape[1], -1, -1)
    out = op(q, k, torch.cat([symbols, keys], -1))
    content, met = out.split([symbols.shape[-1], keys.shape[-1]], -1)
    met = met.unflatten(-1, (k_rel.shape[1], -1))
    relations = torch.einsum("brmd,bhmrd->bhmr", q_rel, met) * k_rel.shape[-1] ** -0.5
    combined: Tensor = content + torch.einsum("bhmr,hdr->bhmd", relations, w_rel)
    return combined
