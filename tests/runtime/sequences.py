"""Packed sequences by hand: a recurrence over each alone, in float64, with autograd's gradients."""

from itertools import pairwise

import torch


def by_sequence(recurrence, tensors, inputs, initial, ends, cotangents):
    """The output, the last states, and the gradients of q, k, v, the first states and the inputs.

    recurrence(q, k, v, inputs, state) -> (out, state) has one key head a query head; k and v have half as many. An
    empty sequence keeps its state.
    """
    leaves = [x.detach().double().requires_grad_() for x in (*tensors, initial, *inputs.values())]
    q, k, v, first = leaves[:4]
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    outs, states = [], []
    for i, (lo, hi) in enumerate(pairwise(ends)):
        own = {n: x[:, :, lo:hi] if x.dim() > 2 else x for n, x in zip(inputs, leaves[4:], strict=True)}
        if lo == hi:
            states.append(first[i : i + 1])
            continue
        out, state = recurrence(*(x[:, :, lo:hi] for x in (q, k, v)), own, first[i : i + 1])
        outs.append(out)
        states.append(state)
    results = torch.cat(outs, 2), torch.cat(states)
    return (*results, *torch.autograd.grad(results, leaves, [c.double() for c in cotangents]))
