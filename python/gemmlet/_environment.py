"""The environment variables that gemmlet reads."""

from __future__ import annotations

import os

# What each chooses. An unknown value is a ValueError that names the variable, where it is first used.
VARIABLES = {
    "GEMMLET_BACKEND": "the backend: cpu, cuda, numba or numpy; else the first of cpu, numba and numpy that works",
    "GEMMLET_ISA": "the cpu backend's instruction set: x86-64-v4, x86-64-v3 or baseline; else the best that runs here",
    "GEMMLET_NUM_THREADS": "how many threads a kernel uses; else OMP_NUM_THREADS, else as many as there are processors",
    "GEMMLET_DATA_DIR": "the folder with the four files of MNIST; else the download, else the embedded sample",
    "GEMMLET_CACHE_DIR": "the folder that keeps compiled CUDA kernels; else gemmlet in the user's folder of caches",
}


def read(name: str) -> str:
    """Return the value of one of `VARIABLES`; empty if it is not set."""
    assert name in VARIABLES
    return os.environ.get(name, "")
