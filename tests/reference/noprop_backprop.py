"""Back-propagation through NoProp's gated chain, with one-hot embeddings, written out in NumPy."""

import numpy as np

from tests.reference.noprop import cross_entropy, softmax


def chain(x, y, z_0, blocks, w, F, f):
    """Loss and its gradients; blocks are (A, B, bias) with logits x A^T + z B^T + bias, gates k = tanh(w)."""
    gates = np.tanh(w)
    z, kept = z_0, []
    for (A, B, bias), k in zip(blocks, gates, strict=True):
        P = softmax(x @ A.T + z @ B.T + bias)
        kept.append((z, P))
        z = (1 - k) * z + k * P
    scores = z @ F.T + f
    d_scores = (softmax(scores) - np.eye(len(F))[y]) / len(y)
    d_z = d_scores @ F
    d_w, d_blocks = np.zeros_like(w), []
    for t in reversed(range(len(blocks))):
        before, P = kept[t]
        k = gates[t]
        d_w[t] = (d_z * (P - before)).sum() * (1 - k**2)
        d_P = k * d_z
        d_logits = P * (d_P - (d_P * P).sum(axis=1, keepdims=True))
        d_blocks.insert(0, (d_logits.T @ x, d_logits.T @ before, d_logits.sum(axis=0)))
        d_z = (1 - k) * d_z + d_logits @ blocks[t][1]
    return cross_entropy(scores, y), d_blocks, d_w, d_scores.T @ z, d_scores.sum(axis=0)
