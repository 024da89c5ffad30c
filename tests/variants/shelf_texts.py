"""The text forms of shipped variants, as a user would write them."""

from __future__ import annotations

POSITION = "(q_idx + kv_len - q_len)"
BEHIND = f"{POSITION} - kv_idx"


def declared(**inputs: str) -> str:
    """An [inputs] table: name="h grad", name="b kv_idx int", name="h distance"."""
    lines = ["", "[inputs]"]
    for name, words in inputs.items():
        *index, last = words.split()
        options = {"grad": ", grad = true", "int": ', dtype = "int"'}
        dims = index if last in options else [*index, last]
        lines.append(f"{name} = {{ index = {str(dims).replace(chr(39), chr(34))}{options.get(last, '')} }}")
    return "\n".join(lines)


CAUSAL = f'mask = "kv_idx <= {POSITION}"\n'
TEXTS = {
    "additive": '[stages]\nsimilarity = "dot(tanh(k_vec + q_vec), v_a[h])"\n' + declared(v_a="h d grad"),
    "l1_distance": '[stages]\nsimilarity = "sum_d(abs(q_vec - k_vec)) * -scale"\n',
    "unnormalized_sigmoid": f'[stages]\n{CAUSAL}normalizer = "sigmoid(score)"',
    "elu1": (
        f"[stages]\n{CAUSAL}normalizer = '''\np = relu(score) + exp(minimum(score, 0))\np / (row.sum(p) + 1e-8)'''"
    ),
    "bounded_sum": f'[stages]\n{CAUSAL}normalizer = "score / maximum(abs(row.sum(score)), 1)"',
    "rela": f'[stages]\n{CAUSAL}normalizer = "relu(score)"',
    "slots": (
        "[stages]\nnormalizer = '''\np = exp(score - col.max(score))\nshare = p / col.sum(p) + 1e-8\n"
        "share / row.sum(share)'''"
    ),
    "reversed": (
        "[stages]\nnormalizer = '''\np = exp(score - col.max(score))\np / col.sum(p)'''\n"
        'reduction = "row.sum(weight * gate[b, h, kv_idx] * v_vec)"' + declared(gate="b h kv_idx grad")
    ),
    "shared_weights": (
        f'[stages]\n{CAUSAL}normalizer = "exp(score - total[b, h, q_idx])"' + declared(total="b h q_idx grad")
    ),
    "taylor_causal": f'[stages]\n{CAUSAL}normalizer = "taylor"',
    "taylorshift": (
        "[stages]\nsimilarity = '''\nlengths = maximum(sum_d(q_vec**2), 1e-24) * maximum(sum_d(k_vec**2), 1e-24)\n"
        "tau[h] * dot(q_vec, k_vec) / sqrt(lengths)'''\nnormalizer = 'taylor'" + declared(tau="h grad")
    ),
    "local_gaussian": (
        '[stages]\nmask = "abs(kv_idx - center[b, h, q_idx]) <= reach"\n'
        'reduction = "row.sum(weight * exp(-2 * ((kv_idx - center[b, h, q_idx]) / reach)**2) * v_vec)"'
        + declared(center="b h q_idx grad")
        + "\n[scalars]\nreach = 3.5"
    ),
    "ssmax": (
        f'[stages]\nscore = "score * gain[h] * log(maximum({POSITION} + 1, 1))"\n{CAUSAL}' + declared(gain="h grad")
    ),
    "bam": (
        "[stages]\nscore = '''\nloc = exp(skew[h]) - exp(-skew[h])\n"
        f"score - exp(strength[h] + power[h] * log(abs(kv_idx - {POSITION} - loc) + 1e-5))'''\n{CAUSAL}"
        + declared(strength="h grad", power="h grad", skew="h grad")
    ),
    "bee_rag": (
        f'[stages]\nscore = "score + beta[b, doc[b, kv_idx]]"\n{CAUSAL}'
        + declared(beta="b documents grad", doc="b kv_idx int")
    ),
    "transformer_xl": (
        f'[stages]\nsimilarity = "scale * (dot(q_vec + content[h], k_vec) + lags[b, h, q_idx, {BEHIND}])"\n{CAUSAL}'
        + declared(content="h d grad", lags="b h q_idx distance grad")
    ),
    "meta_tokens": (
        '[stages]\nmask = "causal and (window(reach) or kv_idx < tokens)"\n[scalars]\nreach = 2048\ntokens = 128'
    ),
    "parallel_context": (
        "[stages]\nmask = '''\n"
        f"own = segment[b, {POSITION}]\nother = segment[b, kv_idx]\n"
        "causal and (own == other or other == 0 or own == query[b])'''"
        + declared(segment="b kv_idx int", query="b int")
    ),
    "arrow": (
        "[stages]\nmask = '''\n"
        f"own = segment[b, {POSITION}]\nother = segment[b, kv_idx]\nown == other or own == 0 or other == 0'''"
        + declared(segment="b kv_idx int")
    ),
    "isolation": (
        "[stages]\nmask = '''\nmine = subject[b, q_idx]\n"
        "theirs = key_subject[b, kv_idx]\ntarget = reference[b, kv_idx] == 0\n"
        "target and (mine == theirs or mine == 0 or theirs == 0) or not target and mine == theirs and mine > 0'''"
        + declared(subject="b q_idx int", key_subject="b kv_idx int", reference="b kv_idx int")
    ),
    "split_heads": (
        f'[stages]\nmask = "doc[b, {POSITION}] == doc[b, kv_idx] or h < full_heads"'
        + declared(doc="b kv_idx int")
        + "\n[scalars]\nfull_heads = 8"
    ),
    "mega": (
        f"[stages]\nsimilarity = 'dot(q_vec, k_vec) / maximum({POSITION} + 1, 1) + table[h, {BEHIND}]'\n{CAUSAL}"
        "normalizer = '0.5 * (1 + erf((score - sqrt(0.5)) * sqrt(6.283185307179586)))'"
        + declared(table="h distance grad")
    ),
    "lln": '[stages]\nsimilarity = "log(dot(exp(q_vec), exp(k_vec)))"',
    "sdm": (
        "[stages]\nnormalizer = '''\nhamming = floor(bits * (1 - minimum(maximum(score, -1), 1)) / 2)\n"
        "table[hamming] / maximum(row.sum(table[hamming]), 1)'''" + declared(table="distance") + "\n[scalars]\nbits = 9"
    ),
    "faceformer": (
        f'[stages]\nscore = "score - slopes[h] * (({BEHIND}) // period)"\n{CAUSAL}'
        + declared(slopes="h grad")
        + "\n[scalars]\nperiod = 4"
    ),
    "alignment": '[stages]\nmask = "kv_idx // keys == q_idx"\n[scalars]\nkeys = 1',
    "image_gain": (
        f'[stages]\nscore = "score * (gain[h] if image[b, kv_idx] == 1 else 1)"\n{CAUSAL}'
        + declared(gain="h grad", image="b kv_idx int")
    ),
    "key_gain": '[stages]\nscore = "score * gain[b, kv_idx]"' + declared(gain="b kv_idx grad"),
    "pooling": (
        '[stages]\nsimilarity = "energy[b, h, kv_idx]"\nmask = "keep[b, h, kv_idx] != 0"'
        + declared(energy="b h kv_idx grad", keep="b h kv_idx int")
    ),
    "relative_bias": (
        '[stages]\nscore = "score + table[h, kv_idx - q_idx + q_len - 1]"' + declared(table="h distance grad")
    ),
    "bico": (
        "[stages]\nsimilarity = '''\nahead = dot(far_q[b, h, q_idx], far_k[b, h_kv, kv_idx])\n"
        f"scale * (dot(q_vec, k_vec) if kv_idx <= {POSITION} else ahead)'''"
        + declared(far_q="b h q_idx d grad", far_k="b h_kv kv_idx d grad")
    ),
    "forgetting": (
        f'[stages]\nscore = "score + cumsum(f[b, h, {POSITION}]) - cumsum(f[b, h, kv_idx])"\n{CAUSAL}'
        + declared(f="b h kv_idx grad")
    ),
    "kerple": (
        f'[stages]\nscore = "score - r1[h] * log(1 + r2[h] * abs({BEHIND}))"\n{CAUSAL}'
        + declared(r1="h grad", r2="h grad")
    ),
    "softpick": (
        f"[stages]\n{CAUSAL}normalizer = '''\nm = detach(maximum(row.max(score), 0))\np = exp(score - m) - exp(-m)\n"
        "relu(p) / (row.sum(abs(p)) + 1e-6)'''"
    ),
    "object_queries": (
        "dead_rows = 'open'\n[stages]\nmask = '''\n"
        "inside = foreground[b, kv_idx] != 0\nfirst = q_idx < q_len // 2\n"
        "inside and first or not inside and not first'''" + declared(foreground="b kv_idx int")
    ),
}
