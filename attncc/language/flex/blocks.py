"""The block table of a BlockMask, if it differs from its mask_mod: pairs that it hides, or shows unconditionally."""

from __future__ import annotations

import sympy
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from attncc.ir import symbols as sym
from attncc.ir.vocabulary import floordiv
from attncc.language.flex.captures import Captures
from attncc.language.flex.cells import Cell
from attncc.language.values import Value

#: what the table holds for a block: hidden, as the mask_mod says, or whole
_HIDDEN, _PARTIAL, _WHOLE = 0, 1, 2


def with_table(mask: BlockMask, visible: Cell, captures: Captures) -> Cell:
    """What a BlockMask shows, given what its mask_mod does. The table becomes an input only if the two differ.

    A block that the table does not list is hidden, and one that it lists as full is shown, whatever the mask_mod says
    there: masks that choose blocks at run time consist of the table alone.
    """
    table = block_table(mask)
    if not _differs(mask, table):
        return visible
    q_size, kv_size = mask.BLOCK_SIZE
    index = [
        Value(sym.B) if table.shape[0] > 1 else 0,
        Value(sym.H) if table.shape[1] > 1 else 0,
        Value(floordiv(sym.Q_IDX, q_size)),
        Value(floordiv(sym.KV_IDX, kv_size)),
    ]
    q_len, kv_len = mask.seq_lengths
    entry = captures.read(table, index, name="blocks", limits={"q_idx": q_len, "kv_idx": kv_len}).value
    asked = sympy.And(sympy.Eq(entry.expr, _PARTIAL), visible.value.expr)
    return Cell(Value(sympy.Or(sympy.Eq(entry.expr, _WHOLE), asked)))


def block_table(mask: BlockMask) -> Tensor:
    """(B, H, row blocks, key blocks) bytes: what a BlockMask's lists say of each block."""
    table = _listed(mask.kv_num_blocks, mask.kv_indices) * _PARTIAL
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        table = torch.maximum(table, _listed(mask.full_kv_num_blocks, mask.full_kv_indices) * _WHOLE)
    return table


def _listed(counts: Tensor, indices: Tensor) -> Tensor:
    """1 for the first counts[..., r] of indices[..., r, :], else 0."""
    columns = indices.shape[-1]
    valid = torch.arange(columns, device=indices.device) < counts[..., None]
    places = torch.where(valid, indices.long(), columns)
    table = torch.zeros((*indices.shape[:-1], columns + 1), dtype=torch.uint8, device=indices.device)
    return table.scatter_(-1, places, 1)[..., :columns].contiguous()


def _differs(mask: BlockMask, table: Tensor) -> bool:
    """Whether the mask_mod shows a pair of a block that is not listed, or hides one of a full block. Checked by rows of
    blocks, so that no mask of the whole sequence is built."""
    q_size, kv_size = mask.BLOCK_SIZE
    q_len, kv_len = mask.seq_lengths
    batch, heads, rows, columns = table.shape
    for row in range(rows):
        first = row * q_size
        shown = create_mask(
            lambda b, h, q, kv, first=first: mask.mask_mod(b, h, q + first, kv),
            *(batch, heads, min(q_size, q_len - first), kv_len),
            device=str(table.device),
        )
        padding = (0, columns * kv_size - kv_len)
        blocks = [torch.nn.functional.pad(shown, padding, value=fill) for fill in (False, True)]
        some, every = (x.unflatten(-1, (columns, kv_size)).transpose(2, 3).flatten(3) for x in blocks)
        entries = table[:, :, row]
        if bool(((entries == _HIDDEN) & some.any(-1)).any() or ((entries == _WHOLE) & ~every.all(-1)).any()):
            return True
    return False
