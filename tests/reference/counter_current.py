"""Counter-current learning in plain NumPy, from the paper's equations; shares nothing with the implementation."""

from __future__ import annotations

import numpy as np


def elu(z):
    return np.where(z > 0, z, np.expm1(np.minimum(z, 0)))


def elu_slope(z):
    return np.where(z > 0, 1.0, np.exp(np.minimum(z, 0)))


def forward(x, U):
    """a_0..a_L and the sums z_1..z_L; the last layer is linear."""
    a, z = [x], []
    for index, weight in enumerate(U):
        z.append(a[-1] @ weight.T)
        a.append(z[-1] if index == len(U) - 1 else elu(z[-1]))
    return a, z


def feedback(classes, V):
    """b_0..b_L from one row per class, and the sums q_l behind b_l; b_0 is linear."""
    b, q = [np.eye(classes)], []
    for index in range(len(V) - 1, -1, -1):
        q.append(b[-1] @ V[index].T)
        b.append(elu(q[-1]) if index else q[-1])
    return b[::-1], q[::-1]


def indicator(y, classes):
    M = np.zeros((len(y), classes))
    M[np.arange(len(y)), y] = 1.0
    return M


def dot_loss(a, b, M, s):
    """The released code's loss on plain products, and its derivatives by a and b."""
    weight = 256 * s / a.shape[1]
    E = a @ b.T - M
    G = 2 * weight * E / E.size
    return weight * (E**2).mean(), G @ b, G.T @ a


def cosine_loss(a, b, M, s, r):
    """Equation 2 with rows of length 1, and the anti-collapse terms of the appendix."""
    lengths = np.linalg.norm(a, axis=1, keepdims=True), np.linalg.norm(b, axis=1, keepdims=True)
    p, q = a / lengths[0], b / lengths[1]
    E = p @ q.T - M
    Ep, Eq = p @ p.T - np.eye(len(p)), q @ q.T - np.eye(len(q))
    loss = s * (E**2).mean() + r * (Ep**2).mean() + r * (Eq**2).mean()
    dp = 2 * s / E.size * E @ q + 4 * r / Ep.size * Ep @ p
    dq = 2 * s / E.size * E.T @ p + 4 * r / Eq.size * Eq @ q
    da = (dp - p * (p * dp).sum(1, keepdims=True)) / lengths[0]
    db = (dq - q * (q * dq).sum(1, keepdims=True)) / lengths[1]
    return loss, da, db


def cross_entropy(o, M):
    shifted = o - o.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return -(M * log_p).sum() / len(o), (np.exp(log_p) - M) / len(o)


def gradients(x, y, U, V, compare):
    """Losses of levels 0..L, and the gradients of all matrices; `compare(a, b, M)` rates levels below the output."""
    classes, depth = len(U[-1]), len(U)
    M = indicator(y, classes)
    a, z = forward(x, U)
    b, q = feedback(classes, V)
    losses, dU, dV = [], [], []
    for level in range(depth):
        loss, da, db = compare(a[level], b[level], M)
        losses.append(loss)
        if level:
            dU.append((da * elu_slope(z[level - 1])).T @ a[level - 1])
        dq = db * elu_slope(q[level]) if level else db
        dV.append(dq.T @ b[level + 1])
    loss, do = cross_entropy(a[-1], M)
    losses.append(loss)
    dU.append(do.T @ a[-2])
    return losses, dU, dV


def clipped(gradients, longest):
    """Scaled down together to a 2-norm of at most `longest`."""
    length = np.sqrt(sum((g**2).sum() for g in gradients))
    return [g * min(1.0, longest / length) for g in gradients]
