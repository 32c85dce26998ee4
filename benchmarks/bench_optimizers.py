"""Optimizer updates, in place."""


def bench_optimizers(run, case, side):  # type: ignore[no-untyped-def]
    run(case, side)
