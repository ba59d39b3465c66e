"""Direct feedback alignment in plain NumPy; nothing here is shared with the implementation."""

from __future__ import annotations

import numpy as np


def gradients(x, y, weights, biases, feedback, W_out, b_out):
    """Loss, gradients of each layer's weights and biases, and those of the read-out. Weights are (out, in)."""
    a, inputs, zs = x, [], []
    for W, b in zip(weights, biases, strict=True):
        inputs.append(a)
        zs.append(a @ W.T + b)
        a = np.maximum(zs[-1], 0)
    s = a @ W_out.T + b_out
    P = np.exp(s - s.max(axis=1, keepdims=True))
    P /= P.sum(axis=1, keepdims=True)
    loss = -np.log(P[np.arange(len(y)), y]).mean()
    e = P.copy()
    e[np.arange(len(y)), y] -= 1
    e /= len(y)
    dzs = [(e @ B) * (z > 0) for B, z in zip(feedback, zs, strict=True)]
    layers = [(dz.T @ a_in, dz.sum(axis=0)) for dz, a_in in zip(dzs, inputs, strict=True)]
    return loss, layers, (e.T @ a, e.sum(axis=0))
