"""Cases of augmentation: images of MNIST, each with a transform of its own.

All are checked by the same transforms. gemmlet draws them; the peers are given the matrices, and draw the elastic
fields alone: smooth noise (Simard et al., 2003), in NumPy a grid of splines. Torchvision is left out: its transforms
cannot be given a matrix, and are one for all images of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gemmlet import nn
from gemmlet.data import augment as gemmlet_augment
from gemmlet.formulas import augmentation
from gemmlet.nn import Augment

from .case import Array, Case, Factory, Prepared, Settings
from .implementations import OURS
from .training import BATCH, LR, digits, mlp_case, task
from .training import Task as TrainingTask

# Of the networks of epochs.
_SEED = 0
COUNT, SIDE = 256, 28
# Simard's smooth noise: its deviation, and that of the displacement in pixels.
SIGMA, AMPLITUDE = 4.0, 1.2


class Task(NamedTuple):
    """Images, and the transforms that they are checked by, in pixels."""

    images: Array
    settings: Augment
    matrices: Array  # (n, 2, 3): from (x, y, 1) of a pixel to the place (x, y) that it comes from
    fields: Array  # (n, 2, h, w): how far it is displaced besides


def _task(settings: Settings, given: Augment) -> Task:
    images = digits(settings, COUNT)[0].reshape(COUNT, SIDE, SIDE)
    draw = augmentation.Draw(0, 0, np.arange(COUNT))
    numbers = augmentation.numbers(given.settings, SIDE, SIDE, draw)
    fields = augmentation.displacements(numbers.points, SIDE, SIDE)
    return Task(images, given, numbers.maps / 65536, fields / 65536)


def _places(matrices: Array, fields: Array) -> Array:
    """Where each pixel comes from: (n, 2, h, w)."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(fields.dtype)
    pixels = np.stack([x, y, np.ones_like(x)])
    return np.asarray(np.einsum("nij,jhw->nihw", matrices.astype(fields.dtype), pixels) + fields)


def _bilinear(images: Array, places: Array) -> Array:
    """In the dtype of the places; beyond the images is 0."""
    around = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    low = np.floor(places)
    right, down = places[:, 0] - low[:, 0], places[:, 1] - low[:, 1]
    column, row = np.clip(low.astype(np.int32) + 2, 0, SIDE + 2).swapaxes(0, 1)
    image = np.arange(len(images))[:, None, None]

    def side(column: Array) -> Any:
        return around[image, row, column] * (1 - down) + around[image, row + 1, column] * down

    return np.asarray(side(column) * (1 - right) + side(column + 1) * right)


def _ours(t: Task) -> Any:
    return partial(gemmlet_augment, t.images, **vars(t.settings), out=np.empty_like(t.images))


def _checked_and_timed(t: Task, warp: Callable[[Array], Any], field: Callable[[], Array]) -> Prepared:
    """`warp` by the fields of the task, and by those that `field` draws, if there are any."""
    if not t.settings.elastic:
        return Prepared(partial(warp, t.fields), partial(warp, t.fields))
    return Prepared(lambda: warp(field()), lambda: warp(t.fields))


def _numpy(t: Task) -> Prepared:
    rng = np.random.default_rng(0)
    of_row, of_column = (
        weights.astype("f") / 2**augmentation.WEIGHT_BITS for weights in augmentation.grid_weights(SIDE, SIDE)
    )
    points = (COUNT, 2, augmentation.CONTROL_POINTS, augmentation.CONTROL_POINTS)

    def field() -> Array:
        return np.asarray(of_row @ (rng.uniform(-4.3, 4.3, points).astype("f") @ of_column.T))

    def warp(fields: Array) -> Array:
        return _bilinear(t.images, _places(t.matrices, fields.astype("f")))

    return _checked_and_timed(t, warp, field)


def _smooth_noise(blur: Callable[[Array], Array]) -> Array:
    """An elastic field of one image, (2, h, w); what is smoothed keeps 1 / (2 sqrt(pi) sigma) of its deviation."""
    noise = np.random.default_rng().uniform(-1, 1, (2, SIDE, SIDE)).astype("f")
    return np.stack([blur(each) for each in noise]) * np.float32(AMPLITUDE * 2 * np.sqrt(3 * np.pi) * SIGMA)


def _by_image(
    t: Task, affine: Callable[[Array, Array], Array], remap: Callable[[Array, Array], Array], blur: Any
) -> Prepared:
    """A package that transforms one image at a time, by a matrix, or by the place that each pixel comes from."""

    def warp(fields: Array | None) -> Array:
        if not t.settings.elastic:
            return np.stack([affine(image, matrix) for image, matrix in zip(t.images, t.matrices, strict=True)])
        y, x = np.mgrid[:SIDE, :SIDE].astype("f")
        ones, results = np.ones_like(x), []
        for i, image in enumerate(t.images):
            field = _smooth_noise(blur) if fields is None else fields[i].astype("f")
            places = np.tensordot(t.matrices[i].astype("f"), np.stack([x, y, ones]), 1) + field
            results.append(remap(image, places))
        return np.stack(results)

    return Prepared(partial(warp, None), partial(warp, t.fields))


def _scipy(t: Task) -> Prepared:
    from scipy import ndimage

    # Its axes are y and x.
    return _by_image(
        t,
        lambda image, m: ndimage.affine_transform(
            image, m[::-1, 1::-1], m[::-1, 2], order=1, mode="grid-constant", output=np.float32
        ),
        lambda image, places: ndimage.map_coordinates(
            image, places[::-1], order=1, mode="grid-constant", output=np.float32
        ),
        partial(ndimage.gaussian_filter, sigma=SIGMA, mode="wrap"),
    )


def _opencv(t: Task) -> Prepared:
    import cv2

    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return _by_image(
        t,
        lambda image, matrix: cv2.warpAffine(image, matrix, (SIDE, SIDE), flags=flags),
        lambda image, places: cv2.remap(image, places[0], places[1], cv2.INTER_LINEAR),
        lambda noise: cv2.GaussianBlur(noise, (0, 0), SIGMA),
    )


def _tensor_fields(torch: Any) -> Callable[[], Any]:
    """Smooth noise for all images, (n, 2, h, w), by two convolutions."""
    reach = int(3 * SIGMA)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * SIGMA**2))
    kernel = (kernel / kernel.sum())[None, None]
    conv = partial(torch.nn.functional.conv2d, padding="same")

    def fields() -> Any:
        noise = torch.rand(2 * COUNT, 1, SIDE, SIDE) * 2 - 1
        smooth = conv(conv(noise, kernel[:, :, None]), kernel[..., None])
        return smooth.reshape(COUNT, 2, SIDE, SIDE) * (AMPLITUDE * 2 * (3 * np.pi) ** 0.5 * SIGMA)

    return fields


def _pytorch(t: Task) -> Prepared:
    """All images in one call of `grid_sample`, which takes places within [-1, 1]."""
    import torch

    to_unit, from_unit = np.diag([2 / (SIDE - 1)] * 2), np.diag([(SIDE - 1) / 2] * 2 + [1.0])
    from_unit[:2, 2] = (SIDE - 1) / 2
    theta = to_unit @ t.matrices @ from_unit
    theta[:, :, 2] -= 1
    theta, images = torch.from_numpy(theta.astype("f")), torch.from_numpy(t.images)[:, None]
    shape = (COUNT, 1, SIDE, SIDE)

    def warp(fields: Any) -> Any:
        grid = torch.nn.functional.affine_grid(theta, shape, align_corners=True)
        if t.settings.elastic:
            grid = grid + torch.as_tensor(fields, dtype=torch.float32).permute(0, 2, 3, 1) * (2 / (SIDE - 1))
        return torch.nn.functional.grid_sample(images.float(), grid, align_corners=True)[:, 0]

    return _checked_and_timed(t, warp, _tensor_fields(torch))


def _kornia(t: Task) -> Prepared:
    import torch
    from kornia.geometry import transform

    images = torch.from_numpy(t.images)[:, None]
    square = np.concatenate([t.matrices, np.broadcast_to([[[0.0, 0.0, 1.0]]], (COUNT, 1, 3))], axis=1)
    forward = torch.from_numpy(np.linalg.inv(square)[:, :2].astype("f"))
    matrices = torch.from_numpy(t.matrices.astype("f"))
    y, x = torch.meshgrid(torch.arange(SIDE).float(), torch.arange(SIDE).float(), indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)]).reshape(3, -1)

    def warp(fields: Any) -> Any:
        if not t.settings.elastic:
            return transform.warp_affine(images.float(), forward, (SIDE, SIDE), align_corners=True)[:, 0]
        places = (matrices @ pixels).reshape(COUNT, 2, SIDE, SIDE) + torch.as_tensor(fields, dtype=torch.float32)
        return transform.remap(images.float(), places[:, 0], places[:, 1], align_corners=True)[:, 0]

    return _checked_and_timed(t, warp, _tensor_fields(torch))


_PEERS: dict[str, Factory] = {
    "numpy": _numpy, "scipy": _scipy, "opencv": _opencv, "pytorch": _pytorch, "kornia": _kornia,
}  # fmt: skip


def _epoch(augment: Augment, t: TrainingTask, *, plain: bool = False) -> Prepared:
    """An epoch of `nn.MLP.fit`; a plain one is timed on the images as they are."""
    model, images = nn.MLP(list(t.layers), "tanh", seed=_SEED), t.given.reshape(-1, SIDE, SIDE)
    settings: dict[str, Any] = {"epochs": 1, "batch_size": t.batch, "optimizer": nn.SGD(LR)}
    checked = {"x": t.x} if plain else {"x": images, "augment": augment}

    def result() -> list[Array]:
        model.fit(y=t.labels, shuffle=False, **checked, **settings)
        return model.parameters

    return Prepared(partial(model.fit, images, t.labels, augment=None if plain else augment, **settings), result)


def _epoch_case(settings: Settings, name: str, hidden: int, given: Augment) -> Case:
    """Training on images that are augmented, beside training on the same ones as they are."""
    count, layers = 6_400 if settings.quick else 60_000, (SIDE * SIDE, hidden, 10)

    def inputs() -> TrainingTask:
        made = task(layers, *digits(settings, count), BATCH, "float32")
        model, images = nn.MLP(list(layers), "tanh", seed=_SEED), made.given.reshape(-1, SIDE, SIDE)
        augmented = gemmlet_augment(images, **vars(given), seed=model.augment_seed).reshape(count, -1)
        x = augmented / np.float32(255)
        return replace(made, x=x, parameters=[p.copy() for p in model.parameters])

    case = mlp_case("MNIST", inputs, layers, count, BATCH, "float32", (OURS,), "augment")
    return replace(
        case,
        name=f"epoch {'-'.join(map(str, layers))}, {name}",
        implementations={OURS: partial(_epoch, given), "gemmlet plain": partial(_epoch, given, plain=True)},
        labels={**case.labels, "hidden": hidden},
    )


def augment(settings: Settings) -> Iterator[Case]:
    """Digits rotated, scaled, sheared and shifted, and bent besides; and epochs of training on them."""
    affine = {"rotate": 12, "scale": 0.12, "shear": 0.12, "shift": 1, "elastic": 0}
    for hidden, name, elastic in ((128, "affine", 0.0), (256, "affine, elastic", AMPLITUDE)):
        yield _epoch_case(settings, name, hidden, Augment(**{**affine, "elastic": elastic}))
    for name, elastic in (("affine", 0.0), ("affine, elastic", AMPLITUDE)):
        yield Case(
            "augment",
            f"{name} {SIDE}x{SIDE}",
            partial(_task, settings, Augment(**{**affine, "elastic": elastic})),
            {OURS: _ours, "gemmlet-numba": _ours, **_PEERS},
            lambda t: _bilinear(t.images, _places(t.matrices, t.fields)),
            rtol=0.0,
            atol=10.0,  # grey levels of 256: places are rounded to 1/64 of a pixel, in OpenCV to 1/32
            units=COUNT,
            unit="image",
            labels={"kernel": "augment", "elastic": elastic > 0},
        )
