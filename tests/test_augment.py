"""Augmentation: the same bytes on every backend, what the parameters promise, and what is refused."""

from __future__ import annotations

import ctypes
import doctest
import hashlib
import importlib
import inspect
import mmap
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemmlet import nn, set_num_threads
from gemmlet.data import augment
from gemmlet.formulas import augmentation
from gemmlet.formulas.augmentation import MAX_SIDE, Draw

ALL = {"rotate": 12, "scale": 0.12, "shear": 0.12, "shift": 1, "elastic": 1.2, "noise": 9, "erase": 0.4}
MOST = {"rotate": 180, "scale": 0.5, "shear": 1, "shift": 1024, "elastic": 32, "noise": 255, "erase": 1}
WARP = {name: ALL[name] for name in ("rotate", "scale", "shear", "shift", "elastic")}
# Below, at and above the widths of vectors; single rows and columns; images of several strips.
SIDES = [
    (28, 28), (1, 1), (1, 40), (40, 1), (2, 3), (15, 16), (17, 15), (16, 33), (31, 65), (48, 100), (300, 9), (64, 64),
    (9, 29), (13, 32), (7, 60), (5, 61),
]  # fmt: skip


def pictures(rng: np.random.Generator, count: int, height: int, width: int) -> Any:
    """Images with black and white, and with grey."""
    return np.clip(rng.integers(-200, 456, (count, height, width)), 0, 255).astype(np.uint8)


def settings_of(**given: float) -> Any:
    return nn.Augment(**dict.fromkeys(ALL, 0) | given).settings


def draw_of(count: int, seed: int = 3, epoch: int = 5) -> Draw:
    return Draw(seed, epoch, np.arange(count))


def by_reference(images: Any, seed: int, epoch: int, **given: float) -> Any:
    return augmentation.augmented(images, settings_of(**given), draw_of(len(images), seed, epoch))


# The same bytes everywhere.


CASES = [(sides, given) for sides in SIDES for given in (ALL, MOST)]
CASES += [(sides, {name: value}) for sides in SIDES[:3] for name, value in ALL.items()]


@pytest.mark.parametrize(("sides", "given"), CASES, ids=str)
def test_every_backend_gives_the_same_bytes(backend: Any, rng: Any, sides: tuple[int, int], given: Any) -> None:
    images = pictures(rng, 3, *sides)
    result = augment(images, seed=11, epoch=2, **given)
    np.testing.assert_array_equal(result, by_reference(images, 11, 2, **given))


@given(
    data=st.data(),
    sides=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    count=st.integers(0, 3),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**40 - 1),
)
def test_any_size_and_setting(backend: Any, data: Any, sides: Any, count: int, seed: int, epoch: int) -> None:
    given = {name: data.draw(st.floats(0, most) | st.just(0.0)) for name, most in MOST.items()}
    images = pictures(np.random.default_rng(seed), count, *sides)
    result = augment(images, seed=seed, epoch=epoch, **given)
    np.testing.assert_array_equal(result, by_reference(images, seed, epoch, **given))


@pytest.mark.parametrize("sides", [(28, 28), (29, 60), (40, 61)], ids=str)
@pytest.mark.parametrize("elastic", [0, 1.2, 32])
def test_what_is_black_may_be_passed_over(any_threads_backend: Any, rng: Any, sides: Any, elastic: float) -> None:
    """Images with something in some rows alone, in one pixel, or nowhere."""
    images = np.zeros((40, *sides), np.uint8)
    for image in images[3:]:
        first, last = sorted(rng.integers(0, sides[0], 2))
        image[first : last + 1, rng.integers(0, sides[1]) :] = rng.integers(1, 256)
    images[1, 0, 0] = images[2, -1, -1] = 255
    given = WARP | {"elastic": elastic, "rotate": 40}
    np.testing.assert_array_equal(augment(images, seed=1, **given), by_reference(images, 1, 0, **given))


@pytest.mark.parametrize("sides", [(MAX_SIDE, MAX_SIDE), (3, MAX_SIDE), (MAX_SIDE, 2), (256, 256)], ids=str)
def test_the_largest_images(any_threads_backend: Any, rng: Any, sides: tuple[int, int]) -> None:
    """No number overflows, of which the reference has 64 bits."""
    images = pictures(rng, 1, *sides)
    for epoch in range(3 if min(sides) < 9 else 1):
        result = augment(images, epoch=epoch, **MOST)
        np.testing.assert_array_equal(result, by_reference(images, 0, epoch, **MOST))


def test_the_bytes_are_known(any_threads_backend: Any) -> None:
    """Those of all versions and machines: a network is trained again with the same images."""
    images = (np.arange(5 * 28 * 28) % 251).astype(np.uint8).reshape(5, 28, 28)
    digest = hashlib.sha256(augment(images, seed=1, epoch=4, **ALL).tobytes()).hexdigest()
    assert digest[:16] == "75dcdfab07966d6b"


def test_threads_change_nothing(any_threads_backend: Any, rng: Any) -> None:
    images = pictures(rng, 1000, 28, 28)
    results = []
    for threads in (1, 2, 5):
        set_num_threads(threads)
        any_threads_backend.set_num_threads(threads)
        results.append(augment(images[: 100 if any_threads_backend.name in ("numpy", "cuda") else 1000], **ALL))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_no_thread_writes_after_an_error(rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the caller's part fails, or is interrupted, the other threads have ended when the call does."""
    numba = pytest.importorskip("gemmlet.backends.numba.backend")
    backend, written = numba.NumbaBackend(), []
    backend.set_num_threads(2)

    def run(part: slice) -> None:
        if not part.start:
            raise KeyboardInterrupt
        time.sleep(0.2)
        written.append(part)

    with pytest.raises(KeyboardInterrupt):
        backend._split(2 * numba._ELEMENTS_PER_THREAD, 1, run)
    count = len(written)
    time.sleep(0.3)
    assert len(written) == count


def test_an_image_has_its_own_transform(any_threads_backend: Any, rng: Any) -> None:
    """Wherever it stands in a call."""
    images = pictures(rng, 20, 28, 28)
    whole, chosen = augment(images, seed=3, **ALL), rng.permutation(20)[:7]
    np.testing.assert_array_equal(augment(images[chosen], seed=3, indices=chosen, **ALL), whole[chosen])
    np.testing.assert_array_equal(augment(images[::-3], seed=3, indices=np.arange(20)[::-3], **ALL), whole[::-3])
    one = np.repeat(images[:1], 4, axis=0)
    for others in (
        augment(one, **ALL),
        np.concatenate([augment(one[:1], epoch=epoch, **ALL) for epoch in range(4)]),
        np.concatenate([augment(one[:1], seed=seed, **ALL) for seed in (0, 1, 2**32, 2**64 - 1)]),
        augment(one, indices=[0, 1, 2**32, 2**40 - 1], **ALL),
    ):
        assert len({other.tobytes() for other in others}) == 4


@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_nothing_changes_nothing(any_threads_backend: Any, rng: Any, sides: tuple[int, int]) -> None:
    images = pictures(rng, 2, *sides)
    np.testing.assert_array_equal(augment(images), images)
    # Even where pixels are moved, by 0.
    maps = augmentation.affine_maps(settings_of(), *sides, draw_of(2))
    np.testing.assert_array_equal(maps, np.broadcast_to([[65536, 0, 0], [0, 65536, 0]], (2, 2, 3)))
    np.testing.assert_array_equal(augment(images, shift=1e-9), images)
    np.testing.assert_array_equal(augment(images, elastic=1e-9), images)


# Memory.


def test_results_go_to_out(any_threads_backend: Any, rng: Any) -> None:
    images = pictures(rng, 9, 28, 30)
    expected = augment(images, **ALL)
    out = np.empty_like(images)
    assert augment(images, out=out, **ALL) is out
    np.testing.assert_array_equal(out, expected)
    for layout in (np.asfortranarray, lambda a: np.repeat(a, 2, axis=2)[..., ::2], lambda a: a[::-1].copy()[::-1]):
        given = layout(images)
        np.testing.assert_array_equal(augment(given, **ALL), expected)
        augment(images, out=given, **ALL)
        np.testing.assert_array_equal(given, expected)
    memory = np.concatenate([images.ravel(), np.zeros(100, np.uint8)])
    for shift in (0, 1, 100):
        moved = memory.copy()
        given, out = (part[: images.size].reshape(images.shape) for part in (moved, moved[shift:]))
        augment(given, out=out, **ALL)
        np.testing.assert_array_equal(out, expected)


def guarded(images: Any, *, at_end: bool) -> Any:
    """A copy with a page beside it that must not be touched: before it, or after it."""
    page, no_access = mmap.PAGESIZE, 0
    pages = -(-images.nbytes // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    whole = np.frombuffer(memory, np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for guard in (0, (pages + 1) * page):
        assert protect(ctypes.c_void_p(whole.ctypes.data + guard), ctypes.c_size_t(page), no_access) == 0
    begin = (pages + 1) * page - images.nbytes if at_end else page
    copy = whole[begin : begin + images.nbytes].reshape(images.shape)
    copy[...] = images
    return copy


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_nothing_outside_is_touched(any_threads_backend: Any, rng: Any, sides: tuple[int, int], at_end: bool) -> None:
    images = pictures(rng, 2, *sides)
    given, out = guarded(images, at_end=at_end), guarded(images, at_end=at_end)
    for settings in (WARP, {"noise": 5}, MOST):
        np.testing.assert_array_equal(augment(given, out=out, **settings), augment(images, **settings))
    np.testing.assert_array_equal(given, images)


# What the parameters promise.

COUNT = 20_000


def maps_of(**given: float) -> Any:
    """The matrices (n, 2, 2), and the places of the pixel (0, 0), of images 29 x 21."""
    maps = augmentation.affine_maps(settings_of(**given), 29, 21, draw_of(COUNT)) / 65536
    return maps[..., :2], maps[..., 2]


def assert_uniform(values: Any, most: float, rounding: float = 2**-15) -> None:
    """Values within [-most, most], with the moments of a uniform distribution: within five standard errors."""
    unit = np.asarray(values) / most
    assert np.abs(unit).max() <= 1 + rounding / most
    assert np.abs(unit).max() > 1 - 20 / unit.size - rounding / most
    for power, mean in ((1, 0), (2, 1 / 3), (3, 0), (4, 1 / 5)):
        error = np.sqrt((1 / (2 * power + 1) - mean**2) / unit.size)
        assert abs(np.mean(unit**power) - mean) < 5 * error + rounding / most


def test_rotations() -> None:
    matrices, _ = maps_of(rotate=170)
    angles = np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert_uniform(angles, 170)
    radians = np.radians(angles)
    turned = np.stack([np.cos(radians), -np.sin(radians), np.sin(radians), np.cos(radians)], axis=-1).reshape(-1, 2, 2)
    np.testing.assert_allclose(matrices, turned, atol=2e-5)


def test_scales() -> None:
    matrices, _ = maps_of(scale=0.3)
    np.testing.assert_array_equal(matrices[:, [0, 1], [1, 0]], 0)
    x, y = 1 / matrices[:, 0, 0] - 1, 1 / matrices[:, 1, 1] - 1
    assert_uniform(x, 0.3)
    assert_uniform(y, 0.3)
    assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(COUNT)


def test_shears() -> None:
    matrices, _ = maps_of(shear=0.5)
    assert_uniform(matrices[:, 0, 1], 0.5)
    np.testing.assert_array_equal(matrices[:, [0, 1, 1], [0, 0, 1]], np.broadcast_to([1, 0, 1], (COUNT, 3)))


def test_shifts() -> None:
    matrices, offsets = maps_of(shift=3)
    np.testing.assert_array_equal(matrices, np.broadcast_to(np.eye(2), matrices.shape))
    assert_uniform(offsets[:, 0], 3)
    assert_uniform(offsets[:, 1], 3)
    assert abs(np.corrcoef(offsets.T)[0, 1]) < 5 / np.sqrt(COUNT)


def test_the_middle_stays_where_it_is() -> None:
    matrices, offsets = maps_of(rotate=180, scale=0.5, shear=1)
    middle = np.array([10, 14])
    np.testing.assert_allclose(matrices @ middle + offsets, np.broadcast_to(middle, (COUNT, 2)), atol=1e-3)


def test_elastic_displacements() -> None:
    """Their deviation is that asked for, and neighbours go together."""
    points = augmentation.control_points(settings_of(elastic=1.5), draw_of(4000))
    assert_uniform(points / 256, 1.5 * np.sqrt(3) * 315 / 151, rounding=2**-8)
    assert np.abs(np.corrcoef(points.reshape(4000, -1).T) - np.eye(98)).max() < 6 / np.sqrt(4000)
    moved = augmentation.displacements(points, 28, 28) / 65536
    assert abs(moved.mean()) < 0.02
    assert abs(moved.std() - 1.5) < 0.02
    for axis in (2, 3):
        steps = np.diff(moved, axis=axis)
        assert steps.std() < 0.3 * 1.5
        assert np.diff(steps, axis=axis).std() < 0.1 * 1.5


def test_noise() -> None:
    added = augmentation.noise(settings_of(noise=20), 28, 28, draw_of(300)).astype(float)
    assert abs(added.mean()) < 5 * 20 / np.sqrt(added.size)
    assert abs(added.std() - 20) < 0.2
    assert np.abs(added).max() <= 3.46 * 20
    kurtosis = np.mean(added**4) / np.mean(added**2) ** 2
    assert abs(kurtosis - 2.7) < 0.05  # of the sum of four uniform numbers; of normal ones it is 3
    flat = added.reshape(300, -1)
    for lag in (1, 2, 392):
        assert abs(np.mean(flat[:, lag:] * flat[:, :-lag])) / 400 < 5 / np.sqrt(added.size / 2)
    assert abs(np.corrcoef(flat[:-1].ravel(), flat[1:].ravel())[0, 1]) < 5 / np.sqrt(added.size)


def test_erased_rectangles() -> None:
    top, bottom, left, right = augmentation.corners(settings_of(erase=0.3), 100, 80, draw_of(COUNT)).T
    there = bottom > top
    assert abs(there.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / COUNT)
    height, width, top, left = (a[there] for a in (bottom - top, right - left, top, left))
    assert (top.min(), left.min(), (top + height).max(), (left + width).max()) == (0, 0, 100, 80)
    area, whole = height * width / 8000, (height < 100) & (width < 80)
    assert area.min() > 0.015
    assert area.max() < 0.41
    assert 0.28 < (height / width)[whole].min() < 0.35
    assert 3 < (height / width)[whole].max() < 3.5
    # Anywhere where there is room.
    place = (top / np.maximum(1, 100 - height))[height < 90]
    assert abs(place.mean() - 0.5) < 0.02
    (erased,) = augment(np.full((1, 28, 28), 200, np.uint8), erase=1) == 0
    assert 0.015 * 784 < erased.sum() == erased.any(axis=0).sum() * erased.any(axis=1).sum() < 0.45 * 784


def test_samples_and_epochs_are_independent() -> None:
    def parameters(epoch: int) -> Any:
        maps = augmentation.affine_maps(settings_of(**ALL), 28, 28, draw_of(COUNT, epoch=epoch))
        return maps.reshape(COUNT, 6).astype(float)

    first, second = parameters(0), parameters(1)
    for a, b in ((first[:-1], first[1:]), (first, second)):
        of_both = np.corrcoef(a.T, b.T)[:6, 6:]
        assert np.abs(of_both).max() < 5 / np.sqrt(COUNT)


def test_pixels_are_interpolated(rng: Any) -> None:
    """SciPy says the same, but for weights of 6 bits."""
    ndimage = pytest.importorskip("scipy.ndimage")
    images = pictures(rng, 20, 28, 31)
    smooth = np.stack([ndimage.gaussian_filter(image, 2) for image in images])
    given = {"rotate": 30, "scale": 0.2, "shear": 0.3, "shift": 2}
    maps = augmentation.affine_maps(settings_of(**given), 28, 31, draw_of(20)) / 65536
    moved = augmentation.displacements(augmentation.control_points(settings_of(elastic=2), draw_of(20)), 28, 31) / 65536
    y, x = np.mgrid[:28, :31]
    for elastic in (0, 2):
        result = augment(smooth, seed=3, epoch=5, elastic=elastic, **given)
        for image, got, (by_x, by_y), shift in zip(smooth, result, maps, moved * (elastic > 0), strict=True):
            from_x = by_x[0] * x + by_x[1] * y + by_x[2] + shift[0]
            from_y = by_y[0] * x + by_y[1] * y + by_y[2] + shift[1]
            exact = ndimage.map_coordinates(image.astype(float), [from_y, from_x], order=1, mode="grid-constant")
            assert np.abs(got - exact).max() < 8


# What is refused.


def refused(error: type[Exception], message: str, *given: Any, **named: Any) -> None:
    images = given[0] if given else np.zeros((2, 5, 7), np.uint8)
    with pytest.raises(error, match=message):
        augment(images, **named)


@pytest.mark.parametrize("name", list(ALL))
def test_settings_have_ranges(name: str) -> None:
    for make in (nn.Augment, lambda **given: augment(np.zeros((1, 2, 2), np.uint8), **given)):
        for bad in (-0.1, MOST[name] * 1.01, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"^{name} must be within .*, got"):
                make(**{name: bad})
        for bad in ("1", None, True, 1j):
            with pytest.raises(TypeError, match=f"^{name} must be a real number, got"):
                make(**{name: bad})
    assert getattr(nn.Augment(**{name: MOST[name]}), name) == MOST[name]


def test_images_that_are_refused() -> None:
    zeros: Callable[..., Any] = np.zeros
    refused(TypeError, "^images has dtype float64, expected uint8", zeros((2, 5, 7)))
    refused(TypeError, "^images has dtype int8, expected uint8", zeros((2, 5, 7), np.int8))
    refused(TypeError, "^images is None", None)
    refused(ValueError, r"^images has shape \(2, 784\), .*reshape\(-1, 28, 28\)", zeros((2, 784), np.uint8))
    refused(ValueError, r"^images has shape \(5,\), expected \(n, h, w\)$", zeros(5, np.uint8))
    refused(ValueError, "^images has shape .*from 1 to 1024", zeros((2, 0, 7), np.uint8))
    refused(ValueError, "^images has shape .*from 1 to 1024", zeros((1, 2, 1025), np.uint8))


def test_numbers_that_are_refused() -> None:
    refused(ValueError, "^seed must be at least 0, got -1", seed=-1)
    refused(ValueError, r"^seed must be below 2\*\*64", seed=2**64)
    refused(TypeError, "^seed must be an integer", seed=0.5)
    refused(ValueError, r"^epoch must be below 2\*\*40", epoch=2**40)
    refused(ValueError, "^epoch must be at least 0", epoch=-1)
    refused(TypeError, "^indices has dtype float64", indices=[0.0, 1.0])
    refused(ValueError, r"^indices has shape \(3,\), expected \(2,\)", indices=[0, 1, 2])
    refused(ValueError, "^indices must be from 0 to .*, got -1 to 1", indices=[-1, 1])
    refused(ValueError, "^indices must be from 0 to ", indices=[0, 2**40])


def test_outputs_that_are_refused() -> None:
    refused(ValueError, r"^out has shape \(2, 5, 6\)", out=np.zeros((2, 5, 6), np.uint8))
    refused(TypeError, "^out has dtype int8", out=np.zeros((2, 5, 7), np.int8))
    frozen = np.zeros((2, 5, 7), np.uint8)
    frozen.flags.writeable = False
    refused(ValueError, "^out is read-only", out=frozen)
    refused(
        ValueError,
        "^out is a broadcast view",
        out=np.lib.stride_tricks.as_strided(np.zeros(99, np.uint8), (2, 5, 7), (0, 7, 1)),
    )


def test_settings_are_a_value() -> None:
    settings = nn.Augment(rotate=np.float32(10), shift=2)
    assert settings == nn.Augment(10.0, 0.12, 0.12, 2.0, 1.2, 0.0, 0.0)
    assert type(settings.rotate) is float
    assert [field.name for field in fields(settings)] == list(settings.settings._fields)
    with pytest.raises(FrozenInstanceError):
        settings.rotate = 3  # type: ignore[misc]
    images = np.zeros((1, 9, 9), np.uint8)
    np.testing.assert_array_equal(augment(images, **vars(settings)), images)
    assert list(inspect.signature(augment).parameters)[1:8] == list(ALL)


@pytest.mark.parametrize("module", ["gemmlet.data.augmentation", "gemmlet.nn.augment"])
def test_the_examples_run(module: str) -> None:
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted
    assert not results.failed
