"""What ``gemmlet augment`` does: draw digits, and what augmentation makes of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .. import nn
from ..data import augment
from . import common
from .errors import UserError

# A row has a digit, and what it is in so many epochs.
_EPOCHS = 9


@dataclass(frozen=True)
class Options:
    """The command line, unchecked."""

    data_dir: Path | None
    rotate: float
    scale: float
    shear: float
    shift: float
    elastic: float
    noise: float
    erase: float
    seed: int
    out: Path
    backend: str | None


def run(options: Options) -> int:
    """Write the picture, and return the exit status."""
    common.check_picture_path(options.out)
    if options.seed < 0 or options.seed >> 64:
        raise UserError(f"--seed must be from 0 to 2**64 - 1, got {options.seed}")
    try:
        settings = nn.Augment(**{name: getattr(options, name) for name in nn.Augment.__dataclass_fields__})
    except ValueError as error:
        raise UserError(f"--{error}") from error
    common.use(options.backend, None)
    data = common.load_data(options.data_dir)
    labels, chosen = np.unique(data.y_train, return_index=True)
    digits = data.x_train[chosen].reshape(-1, 28, 28)
    epochs = [augment(digits, **asdict(settings), seed=options.seed, epoch=i, indices=chosen) for i in range(_EPOCHS)]
    from . import plots

    cells = np.stack([digits, *epochs], axis=1).reshape(-1, 784) / 255
    title = f"{len(labels)} digits, and what they are in {_EPOCHS} epochs"
    plots.save_image(options.out, plots.sample_grid(cells, title, columns=1 + _EPOCHS))
    print(f"{settings}: {options.out}")
    return 0
