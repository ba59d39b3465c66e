"""Class goodness in plain NumPy, from the papers' equations; nothing here is shared with the implementation."""

from __future__ import annotations

import numpy as np

EPS = 1e-5


def softmax(scores):
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def sizes(channels, classes):
    """Channels of each class: as even as can be, the larger groups first."""
    return [channels // classes + (k < channels % classes) for k in range(classes)]


def class_goodness(h, classes, squared):
    """(B, channels, ..) -> (B, K), value by value."""
    G, start = np.zeros((len(h), classes)), 0
    for k, size in enumerate(sizes(h.shape[1], classes)):
        values = h[:, start : start + size].reshape(len(h), -1)
        G[:, k] = (values**2 if squared else values).sum(axis=1) / values.shape[1]
        start += size
    return G


def auxiliary_goodness(h, M):
    """(B, channels, positions) and (K, channels) -> (B, K)."""
    return (np.einsum("bcp,kc->bkp", h, M) ** 2).mean(axis=2)


def normalized(v):
    return (v - v.mean(axis=1, keepdims=True)) / np.sqrt(v.var(axis=1, keepdims=True) + EPS)


def normalized_groups(h, classes):
    edges = np.cumsum(sizes(h.shape[1], classes))[:-1]
    parts = [normalized(part.reshape(len(h), -1)).reshape(part.shape) for part in np.split(h, edges, axis=1)]
    return np.concatenate(parts, axis=1)


def layer(z, W, b, y, classes, *, squared):
    """One fully connected ReLU layer: activities, loss, gradients of W and b."""
    batch, a = len(z), z @ W.T + b
    h = np.maximum(a, 0)
    P = softmax(class_goodness(h, classes, squared))
    loss = -np.log(P[np.arange(batch), y]).mean()
    D = (P - np.eye(classes)[y]) / batch
    group = np.repeat(np.arange(classes), sizes(h.shape[1], classes))
    dh = D[:, group] / np.array(sizes(h.shape[1], classes))[group]
    da = dh * (2 * h if squared else 1.0) * (a > 0)
    return h, loss, da.T @ z, da.sum(axis=0)


def auxiliary_layer(z, W, b, M, y):
    """The same with an auxiliary map M (K, N)."""
    batch, a = len(z), z @ W.T + b
    h = np.maximum(a, 0)
    answers = h @ M.T
    P = softmax(answers**2)
    loss = -np.log(P[np.arange(batch), y]).mean()
    dA = (P - np.eye(len(M))[y]) / batch * 2 * answers
    da = (dA @ M) * (a > 0)
    return h, loss, da.T @ z, da.sum(axis=0), dA.T @ h
