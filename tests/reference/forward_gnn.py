"""ForwardGNN over GCN layers in plain NumPy, from the equations; nothing here is shared with the implementation.

Graphs are dense: A[i, j] counts the edges j -> i.
"""

from __future__ import annotations

import numpy as np


def norm(h):
    return h / (np.sqrt((h**2).sum(axis=1, keepdims=True)) + 1e-8)


def softmax(scores):
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def softplus(v):
    return np.logaddexp(0, v)


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def adjacency(edges, nodes):
    A = np.zeros((nodes, nodes))
    for source, target in edges.T:
        A[target, source] += 1
    return A


def a_hat(A):
    """D^-1/2 (A + I) D^-1/2; a self-loop that is there already counts once."""
    A = A.copy()
    np.fill_diagonal(A, 1)
    d = 1 / np.sqrt(A.sum(axis=1))
    return d[:, None] * A * d[None, :]


def tie(A, X, virtual, nodes, labels, both=True):
    """The graph with one node per class, tied to `nodes` by their labels."""
    n, C = len(X), len(virtual)
    tied = np.zeros((n + C, n + C))
    tied[:n, :n] = A
    for node, label in zip(nodes, labels, strict=True):
        tied[n + label, node] += 1
        if both:
            tied[node, n + label] += 1
    return tied, np.vstack([X, virtual])


def forward(A, X, W, b):
    z = a_hat(A) @ X @ W + b
    return np.maximum(z, 0)


def gradients(A, X, W, b, dH):
    """dW, db of one layer from the gradient of its output; X is what the convolution sees, norm(.) included."""
    z = a_hat(A) @ X @ W + b
    dz = dH * (z > 0)
    return (a_hat(A) @ X).T @ dz, dz.sum(axis=0)


def prototypes(H, T, C, y, tau):
    """Loss and gradient of CE(softmax(H_T H_V^T / tau), y), the virtual nodes being the last C rows."""
    H_T, H_V = H[T], H[-C:]
    P = softmax(H_T @ H_V.T / tau)
    loss = -np.log(P[np.arange(len(T)), y]).mean()
    G = P.copy()
    G[np.arange(len(T)), y] -= 1
    G /= len(T) * tau
    dH = np.zeros_like(H)
    np.add.at(dH, T, G @ H_V)
    dH[-C:] += G.T @ H_T
    return loss, dH


def says(H, nodes, C, tau):
    return softmax(H[nodes] @ H[-C:].T / tau)


def sf(A, X, virtual, T, y, weights, biases, *, tau, lr, steps, both=True):
    """Greedy single forward by gradient descent; the layers' losses, step by step."""
    C = len(virtual)
    A, H = tie(A, X, virtual, T, y, both)
    losses = []
    for W, b in zip(weights, biases, strict=True):
        for _ in range(steps):
            loss, dH = prototypes(forward(A, norm(H), W, b), T, C, y, tau)
            dW, db = gradients(A, norm(H), W, b, dH)
            W -= lr * dW
            b -= lr * db
            losses.append(loss)
        H = forward(A, norm(H), W, b)
    return losses


def sf_evidence(A, X, virtual, T, y, weights, biases, nodes, *, tau, both=True):
    A, H = tie(A, X, virtual, T, y, both)
    total = 0
    for W, b in zip(weights, biases, strict=True):
        H = forward(A, norm(H), W, b)
        total = total + says(H, nodes, len(virtual), tau)
    return total


def goodness(views, T, theta, symba):
    """Loss and the gradients of the views' outputs; the first view is the positive one. alpha of SymBa is 4."""
    qs = [(H[T] ** 2).sum(axis=1) for H in views]
    m, k = len(T), len(views) - 1
    dq = [np.zeros(m) for _ in views]
    if symba:
        loss = np.mean([softplus(-4 * (qs[0] - q)) for q in qs[1:]])
        for j, q in enumerate(qs[1:], 1):
            slope = 4 * sigmoid(-4 * (qs[0] - q)) / (m * k)
            dq[0] -= slope
            dq[j] += slope
    else:
        loss = softplus(theta - qs[0]).mean() + np.mean([softplus(q - theta) for q in qs[1:]])
        dq[0] = -sigmoid(theta - qs[0]) / m
        for j, q in enumerate(qs[1:], 1):
            dq[j] = sigmoid(q - theta) / (m * k)
    dHs = []
    for H, slope in zip(views, dq, strict=True):
        dH = np.zeros_like(H)
        dH[T] = 2 * H[T] * slope[:, None]
        dHs.append(dH)
    return loss, dHs


def ff(graphs, inputs, T, weights, biases, *, theta, symba, lr, shared):
    """One step of each layer of FF-LA or FF-VN. `shared`: the next layer sees the positive view's features only."""
    losses, Hs = [], list(inputs)
    for W, b in zip(weights, biases, strict=True):
        outs = [forward(A, norm(H), W, b) for A, H in zip(graphs, Hs, strict=True)]
        loss, dHs = goodness(outs, T, theta, symba)
        grads = [gradients(A, norm(H), W, b, dH) for A, H, dH in zip(graphs, Hs, dHs, strict=True)]
        W -= lr * sum(dW for dW, _ in grads)
        b -= lr * sum(db for _, db in grads)
        losses.append(loss)
        Hs = [forward(A, norm(H), W, b) for A, H in zip(graphs, Hs, strict=True)]
        if shared:
            Hs = [Hs[0]] * len(Hs)
    return losses


def ff_evidence(graphs, inputs, nodes, weights, biases, *, theta):
    """(M, C): one graph per candidate class."""
    columns = []
    for A, H in zip(graphs, inputs, strict=True):
        total = 0
        for W, b in zip(weights, biases, strict=True):
            H = forward(A, norm(H), W, b)
            total = total + (H[nodes] ** 2).mean(axis=1) - theta
        columns.append(total)
    return np.stack(columns, axis=1)


def links_ce(H, pairs, t):
    u, v = pairs
    s = (H[u] * H[v]).sum(axis=1)
    loss = (softplus(s) - t * s).mean()
    g = (sigmoid(s) - t) / len(t)
    dH = np.zeros_like(H)
    np.add.at(dH, u, g[:, None] * H[v])
    np.add.at(dH, v, g[:, None] * H[u])
    return loss, dH


def links_ff(H, pairs, t, theta):
    u, v = pairs
    e = H[u] * H[v]
    q = (e**2).sum(axis=1)
    loss = softplus(theta - q)[t == 1].mean() + softplus(q - theta)[t == 0].mean()
    dq = np.where(t == 1, -sigmoid(theta - q) / (t == 1).sum(), sigmoid(q - theta) / (t == 0).sum())
    de = 2 * e * dq[:, None]
    dH = np.zeros_like(H)
    np.add.at(dH, u, de * H[v])
    np.add.at(dH, v, de * H[u])
    return loss, dH


def links(A, X, pairs, t, weights, biases, *, lr, theta=None):
    """One step of each layer, layer after layer."""
    losses, H = [], X
    for W, b in zip(weights, biases, strict=True):
        out = forward(A, norm(H), W, b)
        loss, dH = links_ce(out, pairs, t) if theta is None else links_ff(out, pairs, t, theta)
        dW, db = gradients(A, norm(H), W, b, dH)
        W -= lr * dW
        b -= lr * db
        losses.append(loss)
        H = forward(A, norm(H), W, b)
    return losses


def label_matrix(n, C, T, y):
    top = np.full((n + C, C), 1 / C)
    top[T] = np.eye(C)[y]
    top[n:] = np.eye(C)
    return norm(top)


class TopToInput:
    """SF-Top-To-Input: layer l sees [norm(s_{l-1}) | norm(s_{l+1})]; odd layers first, then even ones."""

    def __init__(self, A, X, virtual, T, y, weights, biases, tau):
        self.n, self.C, self.T, self.y, self.tau = len(X), len(virtual), T, y, tau
        self.A, self.X = tie(A, X, virtual, T, y)
        self.top = label_matrix(self.n, self.C, T, y)
        self.weights, self.biases = weights, biases
        self.order = [*range(0, len(weights), 2), *range(1, len(weights), 2)]
        self.states = self.bottom_up()

    def bottom_up(self):
        states, below = [], norm(self.X)
        for W, b in zip(self.weights, self.biases, strict=True):
            above = np.zeros((len(below), len(W) - below.shape[1]))
            states.append(norm(forward(self.A, np.hstack([below, above]), W, b)))
            below = states[-1]
        return states

    def input(self, layer, states):
        below = norm(self.X) if layer == 0 else states[layer - 1]
        above = self.top if layer == len(states) - 1 else states[layer + 1]
        return np.hstack([below, above])

    def step(self, lr):
        losses, updates = {}, {}
        for layer in self.order:
            W, b, X = self.weights[layer], self.biases[layer], self.input(layer, self.states)
            H = forward(self.A, X, W, b)
            losses[layer], dH = prototypes(H, self.T, self.C, self.y, self.tau)
            updates[layer] = gradients(self.A, X, W, b, dH)
            self.states[layer] = norm(H)
        for layer, (dW, db) in updates.items():
            self.weights[layer] -= lr * dW
            self.biases[layer] -= lr * db
        return [losses[layer] for layer in range(len(losses))]

    def evidence(self, nodes):
        states, total = self.bottom_up(), 0
        for step in range(10):
            for layer in self.order:
                H = forward(self.A, self.input(layer, states), self.weights[layer], self.biases[layer])
                states[layer] = norm(H)
                if step >= 2:
                    total = total + says(H, nodes, self.C, self.tau)
        return total


class TopToLoss:
    """SF-Top-To-Loss: the loss is that of mean(h_l, s_{l+1}, .., s_L); gradients are clipped to norm 1 per layer."""

    def __init__(self, A, X, virtual, T, y, weights, biases, tau, raw=False):
        self.C, self.T, self.y, self.tau, self.raw = len(virtual), T, y, tau, raw
        self.A, self.X = tie(A, X, virtual, T, y)
        self.weights, self.biases = weights, biases
        self.states = self.bottom_up()[1]

    def bottom_up(self):
        keep = (lambda h: h) if self.raw else norm
        outputs, states, below = [], [], keep(self.X)
        for W, b in zip(self.weights, self.biases, strict=True):
            outputs.append(forward(self.A, below, W, b))
            states.append(keep(outputs[-1]))
            below = states[-1]
        return outputs, states

    def step(self, lr):
        losses, updates, fresh = [], [], []
        for layer, (W, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            X = norm(self.X) if layer == 0 else self.states[layer - 1]
            H = forward(self.A, X, W, b)
            mixed = [H, *self.states[layer + 1 :]]
            loss, dE = prototypes(np.mean(mixed, axis=0), self.T, self.C, self.y, self.tau)
            dW, db = gradients(self.A, X, W, b, dE / len(mixed))
            clip = min(1, 1 / (np.sqrt((dW**2).sum() + (db**2).sum()) + 1e-6))
            updates.append((clip * dW, clip * db))
            fresh.append(norm(H))
            losses.append(loss)
        for layer, (dW, db) in enumerate(updates):
            self.weights[layer] -= lr * dW
            self.biases[layer] -= lr * db
        self.states = fresh
        return losses

    def evidence(self, nodes):
        outputs, states = self.bottom_up()
        mixes = [np.mean([H, *states[layer + 1 :]], axis=0) for layer, H in enumerate(outputs)]
        return sum(says(mix, nodes, self.C, self.tau) for mix in mixes)
