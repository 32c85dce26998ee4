"""Whole trainings: the epoch of an MLP, the step of a GAN."""


def bench_epoch(run, case, side):  # type: ignore[no-untyped-def]
    run(case, side)


def bench_gan(run, case, side):  # type: ignore[no-untyped-def]
    run(case, side)
