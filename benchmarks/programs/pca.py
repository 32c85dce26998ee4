"""Principal components by power iteration with deflation, compared with those of a singular value decomposition."""

import numpy as np


def power_iteration(A, rng, iterations=100):
    v = rng.normal(size=A.shape[0])
    v = v / np.linalg.norm(v)
    for _ in range(iterations):
        w = A @ v
        v = w / np.linalg.norm(w)
    return v @ A @ v, v


def pca_by_power_iteration(X, components, rng):
    centered = X - np.mean(X, axis=0)
    cov = centered.T @ centered / (len(X) - 1)
    values, vectors = [], []
    for _ in range(components):
        value, vector = power_iteration(cov, rng)
        values.append(value)
        vectors.append(vector)
        cov = cov - value * np.outer(vector, vector)
    return np.array(values), np.array(vectors)


def pca_by_svd(X, components):
    centered = X - X.mean(axis=0)
    U, S, Vt = np.linalg.svd(centered, full_matrices=False)
    return (S**2 / (len(X) - 1))[:components], Vt[:components]


rng = np.random.default_rng(8)
errors = []
for trial in range(220):
    basis = rng.normal(size=(20, 40))
    scales = 2.0 ** -np.arange(20)
    X = rng.normal(size=(400, 20)) * scales @ basis + 0.001 * rng.normal(size=(400, 40))
    values, vectors = pca_by_power_iteration(X, 6, rng)
    svd_values, svd_vectors = pca_by_svd(X, 6)
    assert np.allclose(values, svd_values, rtol=1e-3)
    projected = (X - X.mean(axis=0)) @ vectors.T
    restored = projected @ vectors + X.mean(axis=0)
    errors.append(np.mean((X - restored) ** 2))

print("error", np.mean(errors), "largest variance", values[0])
