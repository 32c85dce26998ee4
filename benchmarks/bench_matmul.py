"""Matrix products and linear layers, in the shapes of the networks, and square."""


def bench_matmul(run, case, side):  # type: ignore[no-untyped-def]
    run(case, side)


def bench_linear(run, case, side):  # type: ignore[no-untyped-def]
    run(case, side)
