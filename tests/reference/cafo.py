"""CaFo in plain NumPy, from the paper's equations; nothing here is shared with the implementation.

Feedback alignment of the blocks is in `direct_feedback`: the last block's feedback is the read-out's weight.
"""

from __future__ import annotations

import itertools

import numpy as np


def ridge(X, Y, lam, *, centred=True):
    """Weights (D, C) and bias (C,) of the least-squares problem [Xc; sqrt(N lam) I] W = [Yc; 0], of minimum norm."""
    N, D = X.shape
    mean_x, mean_y = (X.mean(0), Y.mean(0)) if centred else (np.zeros(D), np.zeros(Y.shape[1]))
    stacked = np.vstack([X - mean_x, np.sqrt(N * lam) * np.eye(D)])
    W = np.linalg.lstsq(stacked, np.vstack([Y - mean_y, np.zeros((D, Y.shape[1]))]), rcond=1e-12)[0]
    return W, mean_y - mean_x @ W


def one_hot(y, classes):
    return np.eye(classes)[y]


def softmax(scores):
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def sparsemax(z):
    """Projection of one vector on the simplex: of the projections on its faces that stay inside, the nearest."""
    best = None
    for size in range(1, len(z) + 1):
        for face in itertools.combinations(range(len(z)), size):
            p = np.zeros(len(z))
            p[list(face)] = z[list(face)] - (z[list(face)].sum() - 1) / size
            if (p >= 0).all() and (best is None or ((p - z) ** 2).sum() < ((best - z) ** 2).sum()):
                best = p
    return best


def sparsemax_loss(z, y):
    """The Fenchel-Young loss of the projection: max_p (p.z - |p|^2 / 2) - z_y + 1/2."""
    p = sparsemax(z)
    return p @ z - p @ p / 2 - z[y] + 0.5


def predictor_step(X, y, W, b, *, lr, loss):
    """Loss, and W (D, C) and b after one step of gradient descent."""
    N, C = len(X), W.shape[1]
    Z = X @ W + b
    if loss == "ce":
        P = softmax(Z)
        value = -np.log(P[np.arange(N), y]).mean()
    else:
        P = np.array([sparsemax(z) for z in Z])
        value = np.mean([sparsemax_loss(z, label) for z, label in zip(Z, y, strict=True)])
    D = (P - one_hot(y, C)) / N
    return value, W - lr * X.T @ D, b - lr * D.sum(axis=0)
