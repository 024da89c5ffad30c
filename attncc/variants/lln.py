"""Linear log-normal attention as one kernel: the weight exp(q) . exp(k) over its sum, a softmax of a log-sum-exp.

q and k come with their moment-matching factors, alpha q and beta k. The linear form has the same values.
"""

import attncc as ac

lln = ac.Variant(
    name="lln",
    similarity=lambda q_vec, k_vec: ac.log(ac.dot(ac.exp(q_vec), ac.exp(k_vec))),
    cites="Linear Log-Normal Attention, arXiv:2311.13541",
)
