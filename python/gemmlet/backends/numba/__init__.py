"""The Numba backend: loops compiled at their first use."""
