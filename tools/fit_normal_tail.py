"""Print the polynomials of `scaled_normal_tail` in csrc/formulas/math.h, and their errors.

    python tools/fit_normal_tail.py

What is left of the normal distribution's tail without its Gaussian, ``(1 - Phi(a)) * exp(a**2 / 2)``, is ``t`` times a
smooth function of ``u = 2 t - 1`` where ``t = k / (k + a)`` (after Shepherd and Laframboise, 1981). That function is
interpolated in Chebyshev's points. Needs mpmath.
"""

from __future__ import annotations

from typing import Any

from mpmath import mp

mp.dps = 60

# (type, k, largest a, degree): beyond the largest a the Gaussian is 0 in that type.
FITS = (("float", 4, 14.5, 9), ("double", 5, 39, 22))
CHECKED = 4001


def quotient(u: Any, k: int) -> Any:
    """``(1 - Phi(a)) * exp(a**2 / 2) / t`` at ``u``."""
    t = (u + 1) / 2
    a = k * (1 - t) / t
    return mp.exp(a * a / 2) * mp.erfc(a / mp.sqrt(2)) / 2 / t


def fit(k: int, largest: float, degree: int) -> tuple[list[Any], Any]:
    """Coefficients from the lowest power up, and the largest relative error."""
    low, high = 2 * mp.mpf(k) / (k + mp.mpf(largest)) - 1, mp.mpf(1)
    middle, half, count = (low + high) / 2, (high - low) / 2, degree + 1
    points = [middle + half * mp.cos(mp.pi * (2 * i + 1) / (2 * count)) for i in range(count)]
    powers = mp.matrix([[u**j for j in range(count)] for u in points])
    coefficients = list(mp.lu_solve(powers, mp.matrix([quotient(u, k) for u in points])))
    checks = (low + (high - low) * i / (CHECKED - 1) for i in range(CHECKED))
    return coefficients, max(abs(mp.polyval(coefficients[::-1], u) / quotient(u, k) - 1) for u in checks)


def main() -> None:
    """Print both polynomials."""
    for name, k, largest, degree in FITS:
        coefficients, error = fit(k, largest, degree)
        print(f"{name}: k = {k}, degree {degree}, relative error {mp.nstr(error, 2)} on [0, {largest}]")
        print("  " + ", ".join(mp.nstr(c, 18) for c in coefficients))


if __name__ == "__main__":
    main()
