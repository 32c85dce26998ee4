"""Several GPUs: each array is computed where it is, by a launch there, of memory that is there.

They are stand-ins, which need no GPU, and refuse a pointer to memory of the other one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cupy")
from cuda_on_host.device import HostDevice
from gemmlet import kernels, nn
from gemmlet.backends import select
from gemmlet.backends.cuda.backend import CudaBackend
from gemmlet.data import augment
from support import f64, one_call_of_each, same_bits


class OneOfSeveral(HostDevice):
    """It knows its memory, and how often it launched."""

    def __init__(self, number: int) -> None:
        super().__init__(number=number)
        self.memory: list[tuple[int, int]] = []
        self.launches = 0

    def launch(
        self, kernel: Any, grid: Any, block: int, arguments: Sequence[np.generic], *rest: Any, **named: Any
    ) -> None:
        self.launches += 1
        for value in arguments:
            if isinstance(value, np.uint64) and value:
                assert any(start <= int(value) < end for start, end in self.memory), (
                    f"{kernel.name}: not of GPU {self.id}"
                )
        super().launch(kernel, grid, block, arguments, *rest, **named)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self._own(super().empty(shape, dtype))

    def array(self, array: np.ndarray) -> Any:
        return self._own(super().array(array))

    def _own(self, array: Any) -> Any:
        start = array.data.mem.ptr
        self.memory.append((start, start + max(array.data.mem.size, 1)))
        return array


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[OneOfSeveral]]:
    """Two, while they are all there is."""
    devices = [OneOfSeveral(number) for number in range(2)]
    monkeypatch.setitem(select._loaded, "cuda", CudaBackend(devices))
    yield devices
    # Graphs and counters of the backend go before the memory does.
    monkeypatch.undo()


def test_a_pointer_to_another_gpu_is_refused(gpus: list[OneOfSeveral]) -> None:
    kernel = gpus[0].kernels("elementwise.cuh", ["gemmlet::activation_forward<gemmlet::activations::relu, float>"])[0]
    here, there = (gpu.array(np.ones(4, np.float32)) for gpu in gpus)
    given = [np.uint64(here.data.ptr), np.uint64(there.data.ptr), np.float32(0), np.int64(4)]
    with pytest.raises(AssertionError, match="not of GPU 0"):
        gpus[0].launch(kernel, (1, 1, 1), 256, given)


@pytest.mark.parametrize("number", [0, 1])
def test_every_kernel_stays_where_its_arrays_are(
    number: int, gpus: list[OneOfSeveral], rng: np.random.Generator
) -> None:
    gpu, other = gpus[number], gpus[1 - number]
    x, w = rng.normal(size=(40, 30)).astype(np.float32), rng.normal(size=(30, 20)).astype(np.float32)
    labels = rng.integers(0, 20, 40)
    x_, w_, labels_ = (gpu.array(a) for a in (x, w, labels))
    y = kernels.linear(x_, w_, activation="tanh")
    loss, grad = kernels.softmax_cross_entropy(y, labels_)
    found = [y, grad, kernels.softmax(y), kernels.relu(x_), *kernels.linear_backward(grad, x_, w_, y, "tanh")]
    kernels.sgd_update(w_, found[-2], lr=0.1)
    with pytest.MonkeyPatch.context() as numpy_only:
        numpy_only.setattr(select, "_current", select.load("numpy"))
        exact = kernels.linear(x, w, activation="tanh")
        exact_loss, exact_grad = kernels.softmax_cross_entropy(exact, labels)
        expected = [exact, exact_grad, kernels.softmax(exact), kernels.relu(x)]
        expected += kernels.linear_backward(exact_grad, x, w, exact, "tanh")
    for got, wanted in zip(found, expected, strict=True):
        assert got.data.device_id == number
        np.testing.assert_allclose(gpu.view(got), wanted, rtol=1e-4, atol=1e-6)
    assert abs(loss - exact_loss) < 1e-6
    assert gpu.launches > 0
    assert other.launches == 0


def test_arrays_of_two_gpus_are_refused(gpus: list[OneOfSeveral]) -> None:
    first, second = (gpu.array(np.ones((4, 4), np.float32)) for gpu in gpus)
    for call in (
        lambda: kernels.matmul(first, second),
        lambda: kernels.linear(first, first, second[0]),
        lambda: kernels.relu(first, out=second),
        lambda: kernels.relu_backward(first, second, second),
        lambda: kernels.mean_squared_error(first, second),
        lambda: kernels.sgd_update(first, second, lr=0.1),
    ):
        with pytest.raises(ValueError, match=r"is on GPU \d, the other arguments on GPU \d; all must be in one place"):
            call()
    assert all(np.all(gpu.view(array) == 1) for gpu, array in zip(gpus, (first, second), strict=True))
    assert gpus[0].launches == gpus[1].launches == 0


def test_networks_compute_where_the_samples_are(gpus: list[OneOfSeveral], rng: np.random.Generator) -> None:
    images, labels = rng.integers(0, 256, (20, 12)).astype(np.uint8), rng.integers(0, 3, 20)
    weights = []
    for gpu in gpus:
        for other in gpus:
            other.launches = 0
        model = nn.MLP([12, 9, 3], "tanh", seed=0)
        model.fit(gpu.array(images), gpu.array(labels), epochs=2, batch_size=8)
        weights.append(model.parameters)
        results = model.predict(gpu.array(images)), model.predict_proba(gpu.array(images))
        assert all(result.data.device_id == gpu.id for result in results)
        model.evaluate(gpu.array(images), labels)
        gan = nn.GAN(4, [8, 12], [8, 1], seed=0)
        assert gan.sample(z=gpu.array(gan.noise(5))).data.device_id == gpu.id
        assert gpu.launches > 0
        assert all(other.launches == 0 for other in gpus if other is not gpu)
    assert all(same_bits(a, b) for a, b in zip(*weights, strict=True))


def test_images_are_augmented_where_they_are(gpus: list[OneOfSeveral], rng: np.random.Generator) -> None:
    images, labels = rng.integers(0, 256, (20, 4, 3), np.uint8), rng.integers(0, 3, 20)
    weights = []
    for gpu, other in zip(gpus, gpus[::-1], strict=True):
        before, there = len(other.memory), gpu.array(images)
        result = augment(there, rotate=20, seed=3)
        assert result.data.device_id == gpu.id
        np.testing.assert_array_equal(gpu.view(result), augment(images, rotate=20, seed=3))
        model = nn.MLP([12, 9, 3], "tanh", seed=0)
        model.fit(there, labels, epochs=2, batch_size=8, augment=nn.Augment())
        weights.append(model.parameters)
        assert len(other.memory) == before
    assert all(same_bits(a, b) for a, b in zip(*weights, strict=True))


def test_networks_of_numpy_arrays_go_to_the_first(gpus: list[OneOfSeveral], rng: np.random.Generator) -> None:
    with pytest.MonkeyPatch.context() as chosen:
        chosen.setattr(select, "_current", select.load("cuda"))
        for name, call in one_call_of_each(rng, np.dtype(np.float32), 5, 7).items():
            before = gpus[0].launches
            for result in call():
                assert result is None or np.all(np.isfinite(f64(np.asarray(result)))), name
            assert gpus[0].launches > before, name
    assert gpus[1].launches == 0
