"""k-means from several random starts, and the best of them."""

import numpy as np


def assign(X, centers):
    distances = np.zeros((len(X), len(centers)))
    for k, center in enumerate(centers):
        distances[:, k] = np.sqrt(np.sum((X - center) ** 2, axis=1))
    return np.argmin(distances, axis=1), np.min(distances, axis=1)


def update(X, labels, centers):
    new_centers = np.zeros_like(centers)
    for k in range(len(centers)):
        members = X[labels == k]
        new_centers[k] = members.mean(axis=0) if len(members) > 0 else centers[k]
    return new_centers


def kmeans(X, k, rng, max_iter=50):
    centers = X[rng.choice(len(X), k, replace=False)]
    for _ in range(max_iter):
        labels, distances = assign(X, centers)
        new_centers = update(X, labels, centers)
        if np.linalg.norm(new_centers - centers) < 1e-6:
            break
        centers = new_centers
    return centers, labels, np.sum(distances**2)


rng = np.random.default_rng(4)
true_centers = rng.uniform(-10, 10, size=(8, 3))
X = np.vstack([center + rng.normal(size=(200, 3)) for center in true_centers])
rng.shuffle(X)

best = np.inf
for start in range(100):
    centers, labels, inertia = kmeans(X, 8, rng)
    if inertia < best:
        best, best_labels = inertia, labels

print("inertia", best, "largest cluster", np.bincount(best_labels).max())
