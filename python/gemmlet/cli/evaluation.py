"""How good a classifier is, and how good the samples of a generator are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# A sample counts as confident if the classifier gives its class at least this probability.
CONFIDENT = 0.9


@dataclass(frozen=True)
class RocCurve:
    """One class against the rest: `true_positive` over `false_positive` rates, and the area `auc` under it."""

    label: int
    false_positive: Array
    true_positive: Array
    auc: float


def roc_curves(labels: Array, probabilities: Array) -> list[RocCurve]:
    """One curve for each class that some rows have and others have not.

    The rows of `probabilities` (n, classes) need not sum to 1: sigmoid outputs do not.
    """
    from sklearn.metrics import auc, roc_curve

    curves = []
    for label in range(probabilities.shape[1]):
        positive = labels == label
        if positive.any() and not positive.all():
            false_positive, true_positive, _ = roc_curve(positive, probabilities[:, label])
            curves.append(RocCurve(label, false_positive, true_positive, float(auc(false_positive, true_positive))))
    return curves


def classification(labels: Array, predicted: Array, curves: list[RocCurve]) -> dict[str, float | None]:
    """Accuracy, and macro averages: each class counts the same. The area is that of `roc_curves`, None without any.

    A class that is never predicted has precision 0.
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
    return {
        "test_accuracy": float(accuracy_score(labels, predicted)),
        "macro_precision": float(precision),
        "macro_recall": float(recall),
        "macro_f1": float(f1),
        "roc_auc": float(np.mean([curve.auc for curve in curves])) if curves else None,
    }


def frechet_distance(a: Array, b: Array) -> float:
    """Fréchet distance between two sets of features, each taken as a normal distribution.

    ``|mean_a - mean_b|² + trace(C_a + C_b - 2 (C_a C_b)^½)`` with the covariances C; 0 for equal distributions. Heusel
    et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017. It depends on the
    features and on how many rows there are: compare only distances from the same classifier and the same counts. `a`
    and `b`, shapes (n, features) and (m, features), have at least two rows each.
    """
    from threadpoolctl import threadpool_limits

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"a and b have shapes {a.shape} and {b.shape}; expected two rows or more, of the same features"
        )
    # The number of BLAS threads might change the last bits.
    with threadpool_limits(1, user_api="blas"):
        cov_a, cov_b = (np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (a, b))
        # The trace of (C_a C_b)^½ is the sum of the singular values of C_a^½ C_b^½, which needs no root of a matrix
        # that is not symmetric.
        cross = np.linalg.svd(_root(cov_a) @ _root(cov_b), compute_uv=False).sum()
    shift = a.mean(axis=0) - b.mean(axis=0)
    return max(0.0, float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))


def _root(covariance: Array) -> Array:
    """Return the symmetric root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(covariance)
    root: Array = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    return root


def sample_quality(probabilities: Array, features: Array, real_features: Array) -> dict[str, Any]:
    """Judge samples by what a digit classifier makes of them: the `probabilities` (n, 10) that it gives them.

    Features are those of its last hidden layer, for the samples (n, features) and for real digits (m, features).
    """
    digits = np.bincount(probabilities.argmax(axis=1), minlength=probabilities.shape[1])
    return {
        "confident_share": float((probabilities.max(axis=1) >= CONFIDENT).mean()),
        "class_shares": (digits / len(probabilities)).tolist(),
        "frechet_distance": frechet_distance(features, real_features),
    }
