"""Augmentation on a GPU: a kernel of csrc/cuda/augment.cuh, launched once for any number of images."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ...formulas import augmentation
from ...formulas.augmentation import Draw, Settings
from .declarations import constant, struct
from .device import Device
from .types import address

SOURCE = "augment.cuh"

# Of csrc/cuda/augment.cuh.
_THREADS = {True: constant("staged_threads"), False: constant("unstaged_threads")}

# Images are staged that take at most this much shared memory, with what is made of them: five blocks or more share a
# multiprocessor of Hopper then, two of the smallest. By arithmetic; not measured yet.
MAX_STAGED_BYTES = 40 << 10


def _kernel(elastic: bool, staged: bool) -> str:
    return f"gemmlet::augment<{str(elastic).lower()}, {str(staged).lower()}>"


def expressions() -> dict[str, list[str]]:
    """Every kernel that this module launches, by source file."""
    return {SOURCE: [_kernel(elastic, staged) for elastic in (True, False) for staged in (True, False)]}


def is_staged(height: int, width: int) -> bool:
    """Whether images of this size are staged: then they may become what is made of them."""
    return _shared_bytes(height, width, staged=True) <= MAX_STAGED_BYTES


def _shared_bytes(height: int, width: int, *, staged: bool) -> int:
    """Dynamic shared memory of a block, as the kernel divides it."""
    quads = (height + 3) * (-(-width // 4) + 1) + 1 if staged else 0
    result = -(-height * width // 16) if staged else 0
    return 16 * (quads + augmentation.grid_spacing(height, width) + result)


@functools.lru_cache(maxsize=16)
def _parameter(settings: Settings, height: int, width: int) -> Any:
    """The kernel's parameter, but for what belongs to a call."""
    record = np.zeros((), struct("Augmentation"))
    record["settings"] = settings
    record["warps"], record["adds_noise"], record["erases"] = settings.warps(), settings.noise, settings.erase
    record["height"], record["width"] = height, width
    record["spacing"] = spacing = augmentation.grid_spacing(height, width)
    weights = augmentation.spline_weights(spacing, spacing)[:, :4]
    record["weights"][: 2 * spacing] = (weights[:, ::2] | weights[:, 1::2] << 16).reshape(-1)
    return record


def augment(device: Device, images: Any, settings: Settings, draw: Draw, out: Any, rows: Any = None) -> None:
    """See `Backend.augment`; all arrays are on the device, the samples of `draw` too."""
    count, height, width = out.shape
    staged = is_staged(height, width)
    p = _parameter(settings, height, width).copy()
    p["images"], p["rows"], p["samples"], p["out"] = map(address, (images, rows, draw.samples, out))
    p["seed"], p["epoch"] = np.uint64(draw.seed).view(np.int64), draw.epoch
    (kernel,) = device.kernels(SOURCE, [_kernel(settings.elastic != 0, staged)])
    shared = _shared_bytes(height, width, staged=staged)
    device.launch(kernel, (count, 1, 1), _THREADS[staged], (p[()],), shared)
