"""Local learning with MAN's auxiliary on two linear blocks, in plain NumPy; nothing is shared with the implementation.

Shapes: B samples, f_i: h_i = h_{i-1} W_i^T. Block 1 has a momentum copy A and a trainable twin T of W_2, and a head C:
scores (h_1 A^T + h_1 T^T) C^T. Block 2 has the read-out R with bias r.
"""

from __future__ import annotations

import numpy as np


def errors(scores, y):
    """Mean cross-entropy, and its gradient with respect to the scores."""
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    P = shifted / shifted.sum(axis=1, keepdims=True)
    loss = -np.log(P[np.arange(len(y)), y]).mean()
    P[np.arange(len(y)), y] -= 1
    return loss, P / len(y)


def train(x, y, W1, W2, A, T, C, R, r, *, lr, momentum, steps, update):
    """Plain gradient descent on one batch; A reads W2 "before" or "after" a step (`update`), or is not there.

    Returns the arrays after the last step and the losses of both blocks in every step.
    """
    W1, W2, A, T, C, R, r = (value.copy() for value in (W1, W2, A, T, C, R, r))
    losses = []
    for _ in range(steps):
        h1 = x @ W1.T
        auxiliary = A + T if update else T
        first, D = errors(h1 @ auxiliary.T @ C.T, y)
        dC = D.T @ (h1 @ auxiliary.T)
        dT = C.T @ D.T @ h1
        dW1 = auxiliary.T @ C.T @ D.T @ x
        h2 = h1 @ W2.T
        second, D = errors(h2 @ R.T + r, y)
        dR, dr = D.T @ h2, D.sum(axis=0)
        dW2 = R.T @ D.T @ h1
        if update == "before":
            A = momentum * A + (1 - momentum) * W2
        W1, W2, T, C = W1 - lr * dW1, W2 - lr * dW2, T - lr * dT, C - lr * dC
        R, r = R - lr * dR, r - lr * dr
        if update == "after":
            A = momentum * A + (1 - momentum) * W2
        losses.append((first, second))
    return (W1, W2, A, T, C, R, r), losses


def momentum_average(start, history, momentum):
    """E_T = m^T E_0 + (1 - m) sum_t m^(T-1-t) u_t, in closed form."""
    count = len(history)
    weights = (1 - momentum) * momentum ** np.arange(count - 1, -1, -1.0)
    return momentum**count * start + np.tensordot(weights, np.stack(history), 1)


def supervised_contrast(z, y, temperature):
    """Khosla et al.'s loss, one pair after another."""
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    total = 0.0
    for i in range(len(y)):
        positives = [p for p in range(len(y)) if p != i and y[p] == y[i]]
        partition = sum(np.exp(z[i] @ z[a] / temperature) for a in range(len(y)) if a != i)
        for p in positives:
            total -= np.log(np.exp(z[i] @ z[p] / temperature) / partition) / len(positives)
    return total / len(y)


def bilinear(image, height, width):
    """(h, w) -> (height, width), corners aligned."""
    out = np.empty((height, width))
    for row in range(height):
        for column in range(width):
            y = row * (image.shape[0] - 1) / (height - 1)
            x = column * (image.shape[1] - 1) / (width - 1)
            top, left = min(int(y), image.shape[0] - 2), min(int(x), image.shape[1] - 2)
            dy, dx = y - top, x - left
            corner = image[top : top + 2, left : left + 2]
            out[row, column] = np.array([1 - dy, dy]) @ corner @ np.array([1 - dx, dx])
    return out
