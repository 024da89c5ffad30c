"""Plain PyTorch matmuls in tf32 on any device: the yardstick for kernels whose matmuls are in tf32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_MATMULS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.bmm.default})
#: the bits of a float32's mantissa that tensor cores do not read
_UNREAD = 23 - 10


def cut(x: Tensor) -> Tensor:
    """A float32 tensor as tensor cores read one as tf32: the low bits of each mantissa are zero."""
    return (x.contiguous().view(torch.int32) >> _UNREAD << _UNREAD).view(torch.float32)


class Tf32Matmuls(TorchDispatchMode):
    """Within it each matmul of float32 tensors, autograd's too, has operands in tf32 and sums in float32.

    `torch.backends.cuda.matmul.allow_tf32` only permits that: cuBLAS multiplies in full float32 where an operand's rows
    are not aligned to 16 bytes, as those of 77 keys are not, and there is no tf32 on a CPU.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _MATMULS and args[0].dtype == torch.float32:
            args = tuple(cut(x) for x in args)
        return func(*args, **(kwargs or {}))
