"""Mono-Forward in plain NumPy, from the paper's equations; nothing here is shared with the implementation."""

from __future__ import annotations

import numpy as np


def softmax(scores: np.ndarray) -> np.ndarray:
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def layer(x, W, b, M, y):
    """One layer: activations, loss, and the gradients of M, W, b from its local cross-entropy."""
    batch = len(x)
    z = x @ W.T + b
    a = np.where(z > 0, z, 0.0)
    G = a @ M.T
    P = softmax(G)
    loss = -np.log(P[np.arange(batch), y]).mean()
    Y = np.zeros_like(P)
    Y[np.arange(batch), y] = 1.0
    D = (P - Y) / batch
    dM = D.T @ a
    dz = (D @ M) * (z > 0)
    dW = dz.T @ x
    db = dz.sum(axis=0)
    return a, loss, dM, dW, db


def train(x, y, weights, biases, projections, *, lr, steps):
    """Plain gradient descent on one batch, every layer at once, activations passed on from before the update."""
    weights, biases, projections = ([v.copy() for v in vs] for vs in (weights, biases, projections))
    losses = []
    for _ in range(steps):
        a, step_losses, updates = x, [], []
        for W, b, M in zip(weights, biases, projections, strict=True):
            a, loss, dM, dW, db = layer(a, W, b, M, y)
            step_losses.append(loss)
            updates.append((dW, db, dM))
        for i, (dW, db, dM) in enumerate(updates):
            weights[i] -= lr * dW
            biases[i] -= lr * db
            projections[i] -= lr * dM
        losses.append(step_losses)
    return weights, biases, projections, losses
