"""Each head's output times a gate, causal: mixtures of heads, routed token by token or sequence by sequence.

Inputs: gate (B, H, M), or with sizes of 1 that broadcast: (B, H, 1) for one gate a sequence. It receives a gradient.
What a gate of 0 closes is not computed: a block of queries whose gates are all 0 is skipped, forward and backward, and
such a gate's own gradient is 0, as it is where routing has chosen other heads.
"""

import attncc as ac


def gated(weight, gate, b, h, q_idx, row, v_vec):
    """The row is scaled after its keys are summed."""
    return gate[b, h, q_idx] * row.sum(weight * v_vec)


def is_open(gate, b, h, q_idx):
    """A closed row sees no key."""
    return gate[b, h, q_idx] != 0


head_gates = ac.Variant(
    name="head_gates",
    mask=ac.causal & is_open,
    reduction=gated,
    inputs={"gate": ac.Input("b", "h", "q_idx", grad=True)},
    cites="MoH, arXiv:2410.11842; A Mixture of h-1 Heads, arXiv:2005.06537",
)
