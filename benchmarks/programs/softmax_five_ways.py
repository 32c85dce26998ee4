"""Five ways to write softmax, compared on rows, and softmax regression trained with each of them."""

import numpy as np


def softmax_naive(z):
    return np.exp(z) / np.sum(np.exp(z), axis=1, keepdims=True)


def softmax_stable(z):
    e = np.exp(z - np.max(z, axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def softmax_transposed(z):
    e = np.exp(z.T - np.max(z, axis=1))
    return (e / np.sum(e, axis=0)).T


def softmax_by_log(z):
    shifted = z - z.max(axis=-1)[:, None]
    log_sum = np.log(np.exp(shifted).sum(axis=-1))[:, None]
    return np.exp(shifted - log_sum)


def softmax_one_row(row):
    exps = np.exp(row - np.max(row))
    return exps / np.sum(exps)


def softmax_by_rows(z):
    return np.array([softmax_one_row(row) for row in z])


def train(softmax, X, y, steps, batch_size):
    rng = np.random.default_rng(0)
    W = np.zeros((X.shape[1], y.shape[1]))
    b = np.zeros(y.shape[1])
    for _ in range(steps):
        rows = rng.integers(0, len(X), batch_size)
        p = softmax(np.dot(X[rows], W) + b)
        error = p - y[rows]
        W -= 0.1 * np.dot(X[rows].T, error) / batch_size
        b -= 0.1 * np.mean(error, axis=0)
    p = softmax(np.dot(X, W) + b)
    return -np.sum(y * np.log(p)) / len(X)


rng = np.random.default_rng(11)
centers = rng.normal(size=(10, 20))
labels = rng.integers(0, 10, 1000)
X = centers[labels] + rng.normal(size=(1000, 20))
y = np.eye(10)[labels]

losses = []
for softmax in (softmax_naive, softmax_stable, softmax_transposed, softmax_by_log, softmax_by_rows):
    scores = rng.normal(0, 3, size=(500, 10))
    assert np.allclose(softmax(scores), softmax_stable(scores))
    assert np.allclose(softmax(scores).sum(axis=1), 1)
    losses.append(train(softmax, X, y, 1500, 40))
print("losses", *losses)
