"""Isolation of subjects: tokens see no other subject's, and only their own reference; the background sees all targets.

Inputs: subject (B, M) and key_subject (B, N) integers, the subjects of queries and keys, 0 for the background;
reference (B, N), 1 for keys of reference images.
"""

import attncc as ac


def isolated(subject, key_subject, reference, b, q_idx, kv_idx):
    """Targets of the same subject or the background; references of the same subject."""
    mine, theirs, target = subject[b, q_idx], key_subject[b, kv_idx], reference[b, kv_idx] == 0
    same = mine == theirs
    return (target & (same | (mine == 0) | (theirs == 0))) | (~target & same & (mine > 0))


_KEYS = ac.Input("b", "kv_idx", dtype="int")

isolation = ac.Variant(
    name="isolation",
    mask=isolated,
    inputs={"subject": ac.Input("b", "q_idx", dtype="int"), "key_subject": _KEYS, "reference": _KEYS},
    cites="IR-Diffusion, isolation attention for subjects",
)
