"""What ``gemmlet sample`` does: draw what a generator makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import nn
from . import common
from .errors import UserError

# Samples of a row of an interpolation.
STEPS = 10


@dataclass(frozen=True)
class Options:
    """The command line, unchecked."""

    model: Path
    count: int
    digit: int | None
    interpolate: bool
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
    if options.digit is not None and not 0 <= options.digit <= 9:
        raise UserError(f"--digit must be from 0 to 9, got {options.digit}")
    common.check_picture_path(options.out)
    common.use(options.backend, options.threads)
    model = common.load_network(options.model, nn.GAN)
    if model.features != 784:
        raise UserError(f"{options.model} makes samples of {model.features} numbers, expected 784 pixels")
    if options.digit is not None and options.digit >= model.n_classes:
        raise UserError(f"{options.model} was trained without labels of this digit: leave out --digit")
    count, what = options.count, "sample"
    noise = model.noise(count, seed=options.seed)
    labels = np.arange(count) % max(model.n_classes, 1) if options.digit is None else np.full(count, options.digit)
    if options.interpolate:
        # Each row leads from its noise to that of the row below, the last one back to the first.
        what, noise = "interpolation", nn.interpolate(noise, np.roll(noise, -1, axis=0), STEPS)
        noise, labels = noise.reshape(-1, model.latent_dim), np.repeat(labels, STEPS)
    samples = model.sample(z=noise, label=labels if model.n_classes else None)
    from . import plots

    plural = f"{count} {what}{'s' * (count > 1)}"
    plots.save_image(options.out, plots.sample_grid(samples, f"{plural} after {model.steps:,} steps"))
    print(f"{plural}: {options.out}")
    return 0
