"""How precise float32 matmuls are on a GPU."""

from __future__ import annotations

_CHOICES = ("highest", "high")
_chosen = "highest"


def set_float32_matmul_precision(precision: str) -> None:
    """Let float32 matmuls on a GPU round their operands, for speed; PyTorch has a function of this name.

    It holds for the whole process. On the CPU matmuls are always in float32, and so are those of `gemmlet.nn`'s own
    training on a GPU.

    Parameters
    ----------
    precision : str
        ``"highest"``, which is the default: float32 throughout. ``"high"``: operands are rounded to TensorFloat-32,
        which has 10 bits after the point, to nearest, ties away from zero; large matmuls on Hopper round one of the two
        as its copy engine does. That adds ``1.5 * 2**-10 * (abs(a) @ abs(b))`` at most to the error of ``a @ b``.
        Matmuls with at most four rows or columns stay float32: they would not be faster.

    Raises
    ------
    ValueError
        It is neither.
    """
    global _chosen
    if precision not in _CHOICES:
        raise ValueError(f"precision must be one of {', '.join(_CHOICES)}, got {precision!r}")
    _chosen = precision


def get_float32_matmul_precision() -> str:
    """Return what `set_float32_matmul_precision` set, else ``"highest"``."""
    return _chosen


def allows_tf32() -> bool:
    """Whether operands may be rounded to TensorFloat-32."""
    return _chosen == "high"
