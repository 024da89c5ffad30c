"""Taylor softmax: the second-order Taylor polynomial of exp over its row sum, every pair visible.

The polynomial is at least 1/2, so no row divides by zero. TaylorShift itself normalizes q and k before, and scales the
output by sqrt(N / Dqk) after: both stay outside, with scale set to its temperature. In linear time from about Dqk^2
tokens on.
"""

import attncc as ac

taylor = ac.Variant(
    name="taylor",
    normalizer=ac.taylor,
    cites="TaylorShift, arXiv:2403.02920",
)
