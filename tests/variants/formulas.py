"""Shipped variants by hand: each a function of float64 tensors that a textbook would write, with nothing of attncc's.

k and v have as many heads as q. Positions are those of the last queries: i = q's row + N - M.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def places(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """(M, 1) and (N): where queries and keys stand."""
    m, n = q.shape[2], k.shape[2]
    return torch.arange(m)[:, None] + n - m, torch.arange(n)


def causal(q: Tensor, k: Tensor) -> Tensor:
    i, j = places(q, k)
    return j <= i


def dot(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(q.shape[-1])


def softmax(s: Tensor, visible: Any = True) -> Tensor:
    """Rows of weights; where nothing is visible, zeros."""
    visible = torch.as_tensor(visible).expand(s.shape)
    p = torch.where(visible, s, -torch.inf).softmax(-1)
    return torch.where(visible.any(-1, keepdim=True), p, 0.0)


def shares(p: Tensor, visible: Tensor, least: Callable[[Tensor], Tensor] = lambda total: total) -> Tensor:
    """p over its sum on what is visible, where there is any."""
    p = p * visible
    total = least(p.sum(-1, keepdim=True))
    return p / torch.where(visible.any(-1, keepdim=True), total, 1.0)


def per_head(x: Tensor) -> Tensor:
    return x[:, None, None]


def looked_up(table: Tensor, index: Tensor) -> Tensor:
    """(H, ...) of a table (H, L) by a common index; 0 beyond it."""
    inside = (index >= 0) & (index < table.shape[1])
    return torch.where(inside, table[:, index.clamp(0, table.shape[1] - 1)], 0.0)


def of_keys(ids: Tensor) -> Tensor:
    return ids[:, None, None, :].long()


def of_queries(ids: Tensor, q: Tensor) -> Tensor:
    """Ids of the keys at the queries' own positions; 0 before the first key, as a read outside of an input is."""
    m, n = q.shape[2], ids.shape[1]
    padded = F.pad(ids, (max(m - n, 0), 0))
    return padded[:, -m:, None].unsqueeze(1).long() if m else ids[:, None, :0, None]


def unnormalized_sigmoid(q, k, v):
    return (torch.sigmoid(dot(q, k)) * causal(q, k)) @ v


def elu1(q, k, v):
    visible = causal(q, k)
    return shares(F.elu(dot(q, k)) + 1, visible, lambda total: total + 1e-8) @ v


def bounded_sum(q, k, v):
    return shares(dot(q, k), causal(q, k), lambda total: total.abs().clamp(min=1)) @ v


def rela(q, k, v):
    return (F.relu(dot(q, k)) * causal(q, k)) @ v


def taylor_causal(q, k, v):
    s = dot(q, k)
    return shares(((s + 1).square() + 1) / 2, causal(q, k)) @ v


def taylorshift(q, k, v, tau):
    x = per_head(tau) * (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT)
    p = x.square() / 2 + x + 1
    return (p / p.sum(-1, keepdim=True)) @ v


def local_gaussian(q, k, v, center, reach):
    away = torch.arange(k.shape[2]) - center[..., None]
    visible = away.abs() <= reach
    return (softmax(dot(q, k), visible) * torch.exp(-(away**2) / (2 * (reach / 2) ** 2))) @ v


def ssmax(q, k, v, gain):
    i, _ = places(q, k)
    return softmax(dot(q, k) * per_head(gain) * (i + 1).clamp(min=1).double().log(), causal(q, k)) @ v


def bam(q, k, v, strength, power, skew):
    i, j = places(q, k)
    loc = per_head(2 * torch.sinh(skew))
    return (
        softmax(dot(q, k) - ((j - i - loc).abs() + 1e-5) ** per_head(power) * per_head(strength).exp(), causal(q, k))
        @ v
    )


def bee_rag(q, k, v, beta, doc):
    size = beta.shape[1]
    added = F.pad(beta, (0, 1)).gather(1, doc.long().clamp(max=size))  # a document beyond the last has none
    return softmax(dot(q, k) + added[:, None, None, :], causal(q, k)) @ v


def transformer_xl(q, k, v, content, lags):
    i, j = places(q, k)
    distance = (i - j).clamp(min=0).expand(*q.shape[:2], -1, -1)
    enough = F.pad(lags, (0, max(k.shape[2] - lags.shape[3], 0)))
    s = (q + content[:, None]) @ k.mT + enough.gather(-1, distance)
    return softmax(s / math.sqrt(q.shape[-1]), causal(q, k)) @ v


def meta_tokens(q, k, v, reach, tokens):
    i, j = places(q, k)
    return softmax(dot(q, k), (j <= i) & ((i - j <= reach) | (j < tokens))) @ v


def parallel_context(q, k, v, segment, query):
    mine, theirs = of_queries(segment, q), of_keys(segment)
    seen = (mine == theirs) | (theirs == 0) | (mine == query[:, None, None, None])
    return softmax(dot(q, k), causal(q, k) & seen) @ v


def arrow(q, k, v, segment):
    mine, theirs = of_queries(segment, q), of_keys(segment)
    return softmax(dot(q, k), (mine == theirs) | (mine * theirs == 0)) @ v


def isolation(q, k, v, subject, key_subject, reference):
    mine, theirs, extra = subject[:, None, :, None], of_keys(key_subject), of_keys(reference) != 0
    same = mine == theirs
    target = ~extra & (same | (mine == 0) | (theirs == 0))
    return softmax(dot(q, k), target | (extra & same & (mine > 0))) @ v


def split_heads(q, k, v, doc, full_heads):
    everything = (torch.arange(q.shape[1]) < full_heads)[:, None, None]
    return softmax(dot(q, k), everything | (of_queries(doc, q) == of_keys(doc))) @ v


def mega(q, k, v, table):
    i, j = places(q, k)
    s = q @ k.mT / (i + 1).clamp(min=1) + looked_up(table, i - j)
    laplace = 0.5 * (1 + torch.erf((s - 0.5**0.5) / ((4 * math.pi) ** -0.5 * 2**0.5)))
    return (laplace * causal(q, k)) @ v


def lln(q, k, v):
    p = q.exp() @ k.exp().mT
    return (p / p.sum(-1, keepdim=True)) @ v


def sdm(q, k, v, table, bits):
    hamming = torch.floor(bits * (1 - dot(q, k).clamp(-1, 1)) / 2).long()
    w = F.pad(table, (0, max(bits + 1 - len(table), 0)))[hamming]
    return (w / w.sum(-1, keepdim=True).clamp(min=1)) @ v


def faceformer(q, k, v, slopes, period):
    i, j = places(q, k)
    return softmax(dot(q, k) - per_head(slopes) * torch.div(i - j, period, rounding_mode="floor"), causal(q, k)) @ v


def alignment(q, k, v, keys):
    own = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
    for row in range(q.shape[2]):
        own[row, keys * row : keys * (row + 1)] = True
    return softmax(dot(q, k), own) @ v


def image_gain(q, k, v, gain, image):
    of_images = of_keys(image) == 1
    return softmax(dot(q, k) * (of_images * (per_head(gain) - 1) + 1), causal(q, k)) @ v


def key_gain(q, k, v, gain):
    return softmax(dot(q, k * gain[:, None, :, None])) @ v


def forgetting(q, k, v, f):
    i, j = places(q, k)
    # what of the gates lies between: added up, and not as a difference of running sums
    between = (j[:, None] < torch.arange(f.shape[2])) & (torch.arange(f.shape[2]) <= i[..., None])
    return softmax(dot(q, k) + torch.einsum("ijt,bht->bhij", between.to(f), f), causal(q, k)) @ v


def kerple(q, k, v, r1, r2):
    i, j = places(q, k)
    return softmax(dot(q, k) - per_head(r1) * torch.log(1 + per_head(r2) * (i - j).abs()), causal(q, k)) @ v


def softpick(q, k, v):
    s, visible = dot(q, k), causal(q, k)
    alive = visible.any(-1, keepdim=True)
    m = torch.where(alive, torch.where(visible, s, -torch.inf).amax(-1, keepdim=True), 0.0).clamp(min=0).detach()
    p = torch.where(visible, torch.exp(s - m) - torch.exp(-m), 0.0)
    return (F.relu(p) / (p.abs().sum(-1, keepdim=True) + 1e-6)) @ v


def object_queries(q, k, v, foreground):
    inside = (foreground != 0)[:, None, None, :]
    first = (torch.arange(q.shape[2]) < q.shape[2] // 2)[:, None]
    visible = torch.where(first, inside, ~inside)
    return softmax(dot(q, k), visible | ~visible.any(-1, keepdim=True)) @ v


def pooling(q, k, v, energy, keep):
    p = softmax(energy, keep != 0)[:, :, None]
    return (p @ v).expand(-1, -1, q.shape[2], -1)


def relative_bias(q, k, v, table):
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    return softmax(dot(q, k) + looked_up(table, j - i + q.shape[2] - 1)) @ v


def bico(q, k, v, far_q, far_k):
    far_k = far_k.repeat_interleave(q.shape[1] // far_k.shape[1], 1)
    return softmax(torch.where(causal(q, k), dot(q, k), dot(far_q, far_k))) @ v


def over_queries(s):
    return s.softmax(-2)


def slots(q, k, v):
    share = over_queries(dot(q, k)) + 1e-8
    return share / share.sum(-1, keepdim=True) @ v


def reversed_attention(q, k, v, gate):
    return over_queries(dot(q, k)) @ (v * gate.unsqueeze(-1))


def shared_weights(q, k, v, total):
    return (dot(q, k) - total.unsqueeze(-1)).exp() * causal(q, k) @ v


def ssd(q, k, v, dt, rate):
    i, j = places(q, k)
    time = dt.cumsum(-1)
    padded = F.pad(time, (max(q.shape[2] - k.shape[2], 0), 0))[..., -q.shape[2] :]
    kept = torch.exp(torch.where(j <= i, per_head(rate) * (padded[..., None] - time[..., None, :]), 0.0))
    return (q @ k.mT * kept * dt[..., None, :] * (j <= i)) @ v


def rwkv6(q, k, v, g, u):
    i, j = places(q, k)
    time = F.pad(g.cumsum(2), (0, 0, max(q.shape[2] - k.shape[2], 0), 0))[:, :, -q.shape[2] :]
    own = F.pad(g, (0, 0, max(q.shape[2] - k.shape[2], 0), 0))[:, :, -q.shape[2] :]
    before = (time - own)[:, :, :, None] - g.cumsum(2)[:, :, None]
    factor = torch.where((j < i)[..., None], before, 0.0).exp()
    factor = torch.where((j == i)[..., None], u[:, None, None], factor)
    return (torch.einsum("bhid,bhjd,bhijd->bhij", q, k, factor) * (j <= i)) @ v


BY_HAND: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        unnormalized_sigmoid,
        elu1,
        bounded_sum,
        rela,
        taylor_causal,
        taylorshift,
        local_gaussian,
        ssmax,
        bam,
        bee_rag,
        transformer_xl,
        meta_tokens,
        parallel_context,
        arrow,
        isolation,
        split_heads,
        mega,
        lln,
        sdm,
        faceformer,
        alignment,
        image_gain,
        key_gain,
        pooling,
        relative_bias,
        bico,
        forgetting,
        kerple,
        softpick,
        object_queries,
        slots,
        shared_weights,
        ssd,
        rwkv6,
    )
} | {"reversed": reversed_attention}
