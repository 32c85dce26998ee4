"""How near generated samples are to genuine ones."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import _checks as checks
from ._checks import Array


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """The Fréchet distance between two sets of features, each taken as a normal distribution.

    ``|mean_a - mean_b|² + trace(C_a + C_b - 2 (C_a C_b)^½)`` with the covariances C; 0 for equal distributions. Heusel
    et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017. It depends on the
    features and on how many rows there are: compare only distances from the same classifier and the same counts. `a`
    and `b`, shapes (n, features) and (m, features), have at least two rows each.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    a, b = checks.as_numbers(a, "a"), checks.as_numbers(b, "b")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"a and b have shapes {a.shape} and {b.shape}; expected two rows or more, of the same features"
        )
    with _one_blas_thread():
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


def _one_blas_thread() -> contextlib.AbstractContextManager[Any]:
    """Keep NumPy's BLAS to one thread, whose number might change the last bits, if threadpoolctl is installed."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return contextlib.nullcontext()
    return threadpool_limits(1, user_api="blas")  # type: ignore[no-any-return]
