"""Back-propagation through ReLU layers and a linear read-out in plain NumPy, with optional local heads."""

from __future__ import annotations

import numpy as np

from tests.reference.mono_forward import softmax


def gradients(x, y, weights, biases, W_out, b_out, heads=(), auxiliary_weight=0.0):
    """Losses and gradients of CE(a_L W_out^T + b_out) + auxiliary_weight * sum_i CE(a_i M_i^T).

    Returns:
        read-out loss, head losses, dWs, dbs, dW_out, db_out, dMs.
    """
    batch = len(x)
    Y = np.zeros((batch, len(W_out)))
    Y[np.arange(batch), y] = 1.0

    def cross_entropy(scores):
        P = softmax(scores)
        return -np.log(P[np.arange(batch), y]).mean(), (P - Y) / batch

    activations = [x]
    for W, b in zip(weights, biases, strict=True):
        activations.append(np.maximum(activations[-1] @ W.T + b, 0.0))
    loss, D = cross_entropy(activations[-1] @ W_out.T + b_out)
    dW_out, db_out = D.T @ activations[-1], D.sum(axis=0)
    da = D @ W_out
    dWs, dbs, dMs, head_losses = [], [], [], []
    for i in reversed(range(len(weights))):
        a = activations[i + 1]
        if i < len(heads):
            head_loss, D = cross_entropy(a @ heads[i].T)
            head_losses.insert(0, head_loss)
            dMs.insert(0, auxiliary_weight * D.T @ a)
            da = da + auxiliary_weight * D @ heads[i]
        dz = da * (a > 0)
        dWs.insert(0, dz.T @ activations[i])
        dbs.insert(0, dz.sum(axis=0))
        da = dz @ weights[i]
    return loss, head_losses, dWs, dbs, dW_out, db_out, dMs
