"""NoProp in plain NumPy, from the paper's equations; nothing here is shared with the implementation."""

from __future__ import annotations

import numpy as np


def cosine_alpha_bars(T, low, high, s=0.008):
    """abar_0..abar_T: small at t = 0, which is noise, and close to 1 at t = T, which is the label."""
    bars = []
    for t in range(T + 1):
        signal = np.cos(((1 - t / T) + s) / (1 + s) * np.pi / 2) ** 2
        bars.append(min(max(signal / np.cos(s / (1 + s) * np.pi / 2) ** 2, low), high))
    return np.array(bars)


def alphas(abar):
    """alpha_t with abar_t = alpha_t alpha_{t+1} .. alpha_T."""
    T = len(abar) - 1
    return np.array([abar[t] / abar[t + 1] for t in range(T)] + [abar[T]])


def coefficients(abar):
    """a_t, b_t, c_t of q(z_t | z_{t-1}, y) for t = 1..T."""
    alpha = alphas(abar)
    t = np.arange(1, len(abar))
    a = np.sqrt(abar[t]) * (1 - alpha[t - 1]) / (1 - abar[t - 1])
    b = np.sqrt(alpha[t - 1]) * (1 - abar[t]) / (1 - abar[t - 1])
    c = (1 - abar[t]) * (1 - alpha[t - 1]) / (1 - abar[t - 1])
    return a, b, c


def snr_steps(abar):
    """SNR(t) - SNR(t-1) for t = 1..T."""
    snr = abar / (1 - abar)
    return snr[1:] - snr[:-1]


def softmax(scores):
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def cross_entropy(scores, y):
    return -np.log(softmax(scores)[np.arange(len(y)), y]).mean()


def prior(abar_0, u):
    """KL(N(sqrt(abar_0) u, (1 - abar_0) I) || N(0, I)), from the formula for two Gaussians, mean over rows."""
    variance = 1 - abar_0
    total = 0.0
    for row in u:
        mean = np.sqrt(abar_0) * row
        total += sum(0.5 * (variance + m**2 - 1 - np.log(variance)) for m in mean)
    return total / len(u)


def dt_block(t, x, y, e_before, e_last, A, B, bias, W_E, F, f, *, abar, eta):
    """Block t with logits x A^T + z B^T + bias: terms of its loss and gradients of A, B, bias, F, f and W_E.

    Args:
        t: 1..T.
        e_before: noise of z_{t-1}, (batch, d).
        e_last: noise of z_T.
        W_E: (C, d) embeddings.
        F: (C, d) weights of f_out, and f its bias.
    """
    batch, T = len(x), len(abar) - 1
    Y = np.eye(len(W_E))[y]
    u = Y @ W_E
    z = np.sqrt(abar[t - 1]) * u + np.sqrt(1 - abar[t - 1]) * e_before
    z_T = np.sqrt(abar[T]) * u + np.sqrt(1 - abar[T]) * e_last
    P = softmax(x @ A.T + z @ B.T + bias)
    error = P @ W_E - u
    weight = T / 2 * eta * snr_steps(abar)[t - 1]
    scores = z_T @ F.T + f
    terms = {
        "denoising": weight * (error**2).sum(axis=1).mean(),
        "read-out": cross_entropy(scores, y),
        "prior": prior(abar[0], u),
    }
    d_error = 2 * weight * error / batch
    d_P = d_error @ W_E.T
    d_logits = P * (d_P - (P * d_P).sum(axis=1, keepdims=True))
    d_scores = (softmax(scores) - Y) / batch
    # W_E is in the target, in the estimate's projection, in z_{t-1}, in z_T and in the prior
    d_u = -d_error + np.sqrt(abar[t - 1]) * d_logits @ B + np.sqrt(abar[T]) * d_scores @ F + abar[0] * u / batch
    gradients = {
        "A": d_logits.T @ x,
        "B": d_logits.T @ z,
        "bias": d_logits.sum(axis=0),
        "F": d_scores.T @ z_T,
        "f": d_scores.sum(axis=0),
        "W_E": Y.T @ d_u + P.T @ d_error,
    }
    return terms, gradients


def gamma(t, low, span, slopes, shifts, heights):
    """gamma(t), with gamma(1) = low and gamma(0) = low + span, from positive slopes and heights."""

    def grow(moment):
        return sum(h / (1 + np.exp(-(s * moment + b))) for s, b, h in zip(slopes, shifts, heights, strict=True))

    return low + span * (1 - (grow(t) - grow(0.0)) / (grow(1.0) - grow(0.0)))


def ct_terms(t, x, y, e_before, e_last, A, B, w, bias, F, f, *, schedule, eta):
    """NoProp-CT with one-hot embeddings and logits x A^T + z B^T + t w + bias, times t (batch,)."""
    classes = len(F)
    u = np.eye(classes)[y]
    values = np.array([gamma(moment, *schedule) for moment in t])
    h = 1e-6
    rates = np.array([(gamma(m + h, *schedule) - gamma(m - h, *schedule)) / (2 * h) for m in t])
    abar = 1 / (1 + np.exp(values))
    z = np.sqrt(abar)[:, None] * u + np.sqrt(1 - abar)[:, None] * e_before
    ends = 1 / (1 + np.exp(np.array([gamma(0.0, *schedule), gamma(1.0, *schedule)])))
    z_1 = np.sqrt(ends[1]) * u + np.sqrt(1 - ends[1]) * e_last
    P = softmax(x @ A.T + z @ B.T + t[:, None] * w + bias)
    return {
        "denoising": 0.5 * eta * (-rates * np.exp(-values) * ((P - u) ** 2).sum(axis=1)).mean(),
        "read-out": cross_entropy(z_1 @ F.T + f, y),
        "prior": prior(ends[0], u),
    }


def fm_terms(t, x, y, e_start, e_path, A, B, w, bias, W_E, F, f, *, sigma, eta):
    """NoProp-FM with the same logits; e_start is z_0."""
    u = W_E[y]
    z = t[:, None] * u + (1 - t[:, None]) * e_start + sigma * e_path
    v = (x @ A.T + z @ B.T + t[:, None] * w + bias) @ W_E
    end = z + (1 - t[:, None]) * v
    return {
        "denoising": eta * ((v - (u - e_start)) ** 2).sum(axis=1).mean(),
        "read-out": cross_entropy(end @ F.T + f, y),
    }
