"""Losses with their gradients, and functions of rows."""


def bench_losses(run, case, side):  # type: ignore[no-untyped-def]
    run(case, side)
