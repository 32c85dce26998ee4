"""Every activation of the registry, and its gradient."""


def bench_activations(run, case, side):  # type: ignore[no-untyped-def]
    run(case, side)
