"""Forward-Forward in plain NumPy, from the papers' equations; nothing here is shared with the implementation."""

from __future__ import annotations

import numpy as np


def sigmoid(u):
    return np.where(u >= 0, 1 / (1 + np.exp(-np.abs(u))), np.exp(-np.abs(u)) / (1 + np.exp(-np.abs(u))))


def softplus(u):
    return np.maximum(u, 0) + np.log1p(np.exp(-np.abs(u)))


def softmax(scores):
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def rms_normalized(v):
    return v / np.sqrt(np.mean(v**2, axis=1, keepdims=True))


def labelled(x, y, classes, strength=1.0):
    """The label over the first values of x."""
    rows = x.copy()
    rows[:, :classes] = strength * np.eye(classes)[y]
    return rows


def neutral(x, classes, strength=1.0):
    rows = x.copy()
    rows[:, :classes] = strength / classes
    return rows


def activities(rows, weights, biases, *, unit=False):
    """Inputs z_{l-1}, of |z|^2 = N or 1, and activities h_l of every layer."""

    def normalized(v):
        return rms_normalized(v) / np.sqrt(v.shape[1] if unit else 1)

    z, passed = normalized(rows), []
    for W, b in zip(weights, biases, strict=True):
        h = np.maximum(z @ W.T + b, 0)
        passed.append((z, h))
        z = normalized(np.where(h.any(axis=1, keepdims=True), h, 1e-300))
        z = np.where(h.any(axis=1, keepdims=True), z, 0)
    return passed


def threshold_layer(z, h, *, mean, theta, temperature, gamma=0.0):
    """Loss and gradients of W and b of one layer; the first half of the rows is positive."""
    rows, width = h.shape
    s = np.where(np.arange(rows) < rows // 2, 1.0, -1.0)
    c = 1 / width if mean else 1.0
    u = (c * (h**2).sum(axis=1) + gamma - theta) / temperature
    loss = softplus(-s * u).mean()
    dg = -s * sigmoid(-s * u) / (rows * temperature)
    da = dg[:, None] * 2 * c * h
    return loss, da.T @ z, da.sum(axis=0)


def symba_layer(z, h, *, mean, alpha):
    half, width = len(h) // 2, h.shape[1]
    c = 1 / width if mean else 1.0
    delta = c * (h[:half] ** 2).sum(axis=1) - c * (h[half:] ** 2).sum(axis=1)
    loss = softplus(-alpha * delta).mean()
    weight = alpha * sigmoid(-alpha * delta)[:, None] / half
    dW = -(2 * c) * ((weight * h[:half]).T @ z[:half] - (weight * h[half:]).T @ z[half:])
    db = -(2 * c) * ((weight * h[:half]).sum(axis=0) - (weight * h[half:]).sum(axis=0))
    return loss, dW, db


def matlab_training(x, y, weights, biases, heads, *, epsilon, head_epsilon, peer, steps, delay=0.9):
    """Hinton's procedure for two classes, in the form of his code: ascent, smoothed gradients, no factor of 2.

    With two classes the wrong label is known. The read-out reads all layers but the first.
    """
    weights, biases, heads = ([v.copy() for v in vs] for vs in (weights, biases, heads))
    classes, images = 2, len(x)
    smooth_w, smooth_b, smooth_u = ([np.zeros_like(v) for v in vs] for vs in (weights, biases, heads))
    means = [np.full(len(b), 0.5) for b in biases]
    for _ in range(steps):
        hidden = activities(neutral(x, classes), weights, biases)
        read = [rms_normalized(h) for _, h in hidden[1:]]
        probabilities = softmax(sum(z @ U.T for z, U in zip(read, heads, strict=True)))
        positive = activities(labelled(x, y, classes), weights, biases)
        negative = activities(labelled(x, 1 - y, classes), weights, biases)
        for i, ((z_p, h_p), (z_n, h_n)) in enumerate(zip(positive, negative, strict=True)):
            width = len(biases[i])
            p_p, p_n = (sigmoid((h**2).sum(axis=1) - width)[:, None] for h in (h_p, h_n))
            means[i] = 0.9 * means[i] + 0.1 * h_p.mean(axis=0)
            up = (1 - p_p) * h_p + peer * (means[i].mean() - means[i])
            down = -p_n * h_n
            gradient_w, gradient_b = (up.T @ z_p + down.T @ z_n) / images, (up.sum(0) + down.sum(0)) / images
            smooth_w[i] = delay * smooth_w[i] + (1 - delay) * gradient_w
            smooth_b[i] = delay * smooth_b[i] + (1 - delay) * gradient_b
        for i, (z, U) in enumerate(zip(read, heads, strict=True)):
            gradient = (np.eye(classes)[y] - probabilities).T @ z / images
            smooth_u[i] = delay * smooth_u[i] + (1 - delay) * gradient
            heads[i] = U + head_epsilon * smooth_u[i]
        for i in range(len(weights)):
            weights[i] = weights[i] + epsilon * smooth_w[i]
            biases[i] = biases[i] + epsilon * smooth_b[i]
    return weights, biases, heads


def label_goodness(x, weights, biases, classes, strength=1.0, *, unit=False):
    """(L, B, C) sums of squares, one label after another."""
    shown = [labelled(x, np.full(len(x), k), classes, strength) for k in range(classes)]
    columns = [[(h**2).sum(axis=1) for _, h in activities(rows, weights, biases, unit=unit)] for rows in shown]
    return np.stack([np.stack(layers) for layers in columns], axis=2)
