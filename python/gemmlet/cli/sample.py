"""What ``gemmlet sample`` does: draw what a generator makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import nn
from . import common
from .errors import UserError


@dataclass(frozen=True)
class Options:
    """The command line, unchecked."""

    model: Path
    count: int
    seed: int | None
    out: Path
    backend: str | None
    threads: int | None


def run(options: Options) -> int:
    """Write a picture of samples, and return the exit status."""
    if not 1 <= options.count <= 10_000:
        raise UserError(f"-n must be from 1 to 10,000, got {options.count}")
    if options.seed is not None and options.seed < 0:
        raise UserError(f"--seed must be at least 0, got {options.seed}")
    common.check_picture_path(options.out)
    common.use(options.backend, options.threads)
    model = common.load_network(options.model, nn.GAN)
    if model.features != 784:
        raise UserError(f"{options.model} makes samples of {model.features} numbers, expected 784 pixels")
    samples = model.sample(options.count, z=model.noise(options.count, seed=options.seed))
    from . import plots

    plots.save_image(
        options.out,
        plots.sample_grid(samples, f"{options.count} sample{'s' * (options.count > 1)} after {model.steps:,} steps"),
    )
    print(f"{options.count} sample{'s' * (options.count > 1)}: {options.out}")
    return 0
