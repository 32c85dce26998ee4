"""Index arrays that are broken: from the start, by a callback, by another thread; and shapes and dtypes that one sets.

In a child, as a crash is looked for.

``python tests/test_broken_indices.py SECONDS SEED`` goes on for longer, on the backend in use.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from gemmlet import kernels
from gemmlet.backends import select
from gemmlet.formulas.losses import ROW_LOSSES
from gemmlet.nn import GAN, MLP
from support import arguments_of, run_on

# More than a block of features that are looked at together, and more rows than a thread takes at once.
ROWS, FEATURES, CLASSES = 90, 70, 5

# Seconds without a new case that count as a hang, and those for which a thread changes what calls read.
PATIENCE, RACE = 300, 0.02
# Those for which it sets shape and dtype of what one entry reads.
FLIPPING = 0.06

REFUSALS = (TypeError, ValueError, MemoryError)


class Case(NamedTuple):
    """A call; `is_bad` says that it must be refused."""

    name: str
    call: Callable[[], object]
    is_bad: bool


# Faults of an index array from the start.


def broken(good: Any, high: int, rng: np.random.Generator) -> Iterator[tuple[str, Any, bool]]:
    """Variants of class or column indices within [0, high), and whether they are bad."""
    place = int(rng.integers(len(good)))
    for dtype in (good.dtype, np.int8, np.int32, np.int64, np.uint64, ">i4", ">i8"):
        limits = np.iinfo(dtype)
        yield str(dtype), good.astype(dtype), False
        for value in (-1, high, -(2**31), 2**31 - 1, 2**32, -(2**63), 2**62, 2**63, 2**64 - 1):
            if limits.min <= value <= limits.max:
                wrong = good.astype(dtype)
                wrong[[0, place, -1][int(rng.integers(3))]] = value
                yield f"{dtype} {value}", wrong, True
    for name, wrong in {
        "nan": np.full(len(good), np.nan),
        "float": good.astype(np.float64),
        "bool": good.astype(bool),
        "text": good.astype("U20"),
        "objects": good.astype(object),
        "complex": good.astype(complex),
        "short": good[:-1],
        "nothing": good[:0],
        "matrix": np.stack([good, good]),
        "scalar": good[0],
        "none": None,
    }.items():
        yield name, wrong, True
    yield "every second", np.repeat(good, 2)[::2], False
    unaligned = np.empty(good.nbytes + 1, np.uint8)[1:].view(good.dtype)
    unaligned[:] = good
    yield "unaligned", unaligned, False


def broken_offsets(good: Any, rng: np.random.Generator) -> Iterator[tuple[str, Any, bool]]:
    """Variants of the `indptr` of a sparse matrix."""
    most = int(good[-1])
    for at in (0, int(rng.integers(1, len(good) - 1)), len(good) - 1):
        for value in (-1, most + 1, 2**31 - 1, -(2**31), 2**40, -(2**63), 2**63 - 1):
            wrong = good.astype(np.int64)
            wrong[at] = value
            yield f"{value} at {at}", wrong, True
    yield "descending", good[::-1].copy(), True
    yield "later", good + 1, True
    yield "long", np.append(good, most), True
    for name, wrong, is_bad in broken(good, most + 1, rng):
        if is_bad and "int" not in name and "i" not in name[:2]:
            yield name, wrong, True


# What goes on meanwhile.


def garbage(array: Any, rng: np.random.Generator) -> Any:
    """Values of an integer array's dtype, small, large and negative."""
    limits = np.iinfo(array.dtype)
    values = rng.integers(limits.min, limits.max, array.shape, array.dtype, endpoint=True)
    return np.where(rng.random(array.shape) < 0.5, rng.integers(-3, FEATURES + 3, array.shape), values)


def spoil(array: Any, how: str, rng: np.random.Generator) -> None:
    """Change an index array in its place."""
    if how == "values":
        array[...] = garbage(array, rng)
    elif how == "shape":
        array.shape = (-1, 1)
    elif how == "dtype":
        array.dtype = np.int8
    else:
        array.resize({"shrunk": 1, "grown": 10_000_000}[how], refcheck=False)


def race(call: Callable[[], object], arrays: list[Any], rng: np.random.Generator) -> None:
    """Call it again and again while a thread changes arrays and puts them back; it may refuse what it finds."""
    stopped, pairs = threading.Event(), [(array, (garbage(array, rng), array.copy())) for array in arrays]

    def change() -> None:
        while not stopped.is_set():
            for array, values in pairs:
                for value in values:
                    array[...] = value
            time.sleep(0)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        end = time.perf_counter() + RACE
        while time.perf_counter() < end:
            with contextlib.suppress(*REFUSALS):
                call()
    finally:
        stopped.set()
        thread.join()


# The cases.


def label_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Every entry that takes class indices."""
    dtype = rng.choice([np.float32, np.float64])
    x = rng.random((ROWS, FEATURES)).astype(dtype)
    for loss, columns, smoothing in itertools.product(ROW_LOSSES, (1, CLASSES, 100), (0.0, 0.1)):
        logits, good = rng.normal(size=(ROWS, columns)).astype(dtype), rng.integers(0, columns, ROWS)
        kernel = getattr(kernels, loss)

        def evaluate(labels: Any, logits: Any = logits, kernel: Any = kernel, smoothing: float = smoothing) -> None:
            kernel(logits, labels, label_smoothing=smoothing)

        for name, labels, is_bad in broken(good, columns, rng):
            # Labels of a floating dtype are probabilities, of which a row of logits needs a row: "float" is refused.
            yield Case(f"{loss} {columns} {smoothing} {name}", lambda e=evaluate, y=labels: e(y), is_bad)
        many = rng.normal(size=(20_000, columns)).astype(dtype)

        def racing(many: Any = many, columns: int = columns, evaluate: Any = evaluate) -> None:
            labels = rng.integers(0, columns, len(many))
            race(lambda: evaluate(labels, many), [labels], rng)

        yield Case(f"{loss} {columns} {smoothing} in a thread", racing, False)
    for output, outputs in (("softmax", CLASSES), ("sigmoid", 1), ("sigmoid", CLASSES)):
        classes = max(outputs, 2)

        def entries(labels: Any, output: str = output, outputs: int = outputs, dtype: Any = dtype) -> Iterator[Any]:
            model = MLP([FEATURES, 20, outputs], output=output, dtype=dtype)
            yield "fit", lambda **more: model.fit(x, labels, 2, 16, **more)
            good = np.zeros(ROWS, int)
            yield "validation", lambda **more: model.fit(x, good, 2, 16, validation_data=(x, labels), **more)
            yield "evaluate", lambda: model.evaluate(x, labels)
            yield "loss_and_gradients", lambda: model.loss_and_gradients(x, labels)

        good = rng.integers(0, classes, ROWS)
        for name, labels, is_bad in broken(good, classes, rng):
            for entry, call in entries(labels):
                # Labels may be of other dtypes. Bools are two classes, or 0 and 1 unless they decide what classes are.
                is_label = name in ("float", "text", "objects") or (name == "bool" and (classes == 2 or entry != "fit"))
                yield Case(f"{entry} {output} {outputs} labels {name}", call, is_bad and not is_label)
        yield from meanwhile(f"{output} {outputs} labels", lambda good=good: (good.copy(), []), entries, rng)


def sparse_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Every entry that takes a sparse matrix, in each format that has indices."""
    sparse = pytest.importorskip("scipy.sparse")
    dtype = rng.choice([np.float32, np.float64, np.uint8])
    numbers = np.float32 if dtype == np.uint8 else dtype
    dense = rng.integers(1, 200, (ROWS, FEATURES)).astype(dtype)
    dense[rng.random(dense.shape) < 0.7] = 0
    y = rng.integers(0, CLASSES, ROWS)

    def entries(x: Any) -> Iterator[Any]:
        model = MLP([FEATURES, 20, CLASSES], dtype=numbers)
        for batch in (1, 16):
            yield f"fit {batch}", lambda batch=batch, **more: model.fit(x, y, 2, batch, "sgd", **more)
        yield "validation", lambda **more: model.fit(dense, y, 2, 16, validation_data=(x, y), **more)
        yield "evaluate", lambda: model.evaluate(x, y)
        yield "loss_and_gradients", lambda: model.loss_and_gradients(x, y)
        for name in ("predict", "predict_proba", "features"):
            yield name, lambda name=name: getattr(model, name)(x)

    for form in ("csr", "csc", "coo", "bsr"):
        good = sparse.csr_matrix(dense).asformat(form)
        faults: dict[str, Any] = {}
        if form == "coo":
            faults |= {"row": broken(good.row, ROWS, rng), "col": broken(good.col, FEATURES, rng)}
        else:
            high = ROWS if form == "csc" else FEATURES
            faults |= {"indices": broken(good.indices, high, rng), "indptr": broken_offsets(good.indptr, rng)}
        for part, variants in faults.items():
            for name, array, is_bad in variants:
                wrong = good.copy()
                try:
                    setattr(wrong, part, array)
                except REFUSALS:
                    continue  # SciPy has refused it
                is_bad = is_bad and getattr(wrong, part) is array  # else SciPy has converted it
                calls = list(entries(wrong))
                for entry, call in (*calls[:1], calls[int(rng.integers(1, len(calls)))]):
                    yield Case(f"{entry} {form} {part} {name}", call, is_bad)
        short = good.copy()
        short.data = short.data[:-1]
        for entry, call in entries(short):
            yield Case(f"{entry} {form} short data", call, True)
    csr = sparse.csr_matrix(dense)
    for part in ("indices", "indptr"):

        def fresh(part: str = part) -> tuple[Any, list[Any]]:
            x = csr.copy()
            return x, [getattr(x, part)]

        yield from meanwhile(f"csr {part}", fresh, entries, rng)


def meanwhile(
    name: str,
    fresh: Callable[[], tuple[Any, list[Any]]],
    entries: Callable[[Any], Iterator[Any]],
    rng: np.random.Generator,
) -> Iterator[Case]:
    """Cases in which index arrays change; ``fresh()`` gives an argument and its index arrays, none: itself."""
    for number, (entry, _) in enumerate(entries(fresh()[0])):

        def call(number: int = number) -> tuple[list[Any], Any]:
            value, arrays = fresh()
            return arrays or [value], next(itertools.islice(entries(value), number, None))[1]

        for how in ("values", "shape", "dtype", "shrunk", "grown"):
            if not entry.startswith(("fit", "validation")):
                continue

            def by_callback(call: Any = call, how: str = how) -> None:
                arrays, fit = call()

                def callback(progress: Any) -> None:
                    for array in arrays:
                        with contextlib.suppress(*REFUSALS):  # of NumPy, as the array is in use
                            spoil(array, how, rng)

                fit(callback=callback, callback_every=str(rng.choice(["batch", "call", "epoch"])))

            yield Case(f"{entry} {name} {how} by a callback", by_callback, False)

        def by_thread(call: Any = call) -> None:
            arrays, entry = call()
            race(entry, arrays, rng)

        yield Case(f"{entry} {name} in a thread", by_thread, False)


def run(seed: int, seconds: float = 0.0) -> int:
    """Try all cases, with one seed after the other for as long as that; return how many."""
    started, count = time.perf_counter(), 0
    for number in itertools.count(seed):
        rng = np.random.default_rng(number)
        for case in itertools.chain(label_cases(rng), sparse_cases(rng)):
            # What a crash leaves behind.
            print(f"seed {number}: {case.name}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            try:
                with np.errstate(all="ignore"):
                    case.call()
            except REFUSALS:
                refused = True
            else:
                refused = False
            assert refused or not case.is_bad, f"seed {number}: {case.name}: accepted"
            count += 1
        faulthandler.cancel_dump_traceback_later()
        if time.perf_counter() - started >= seconds:
            return count
    raise AssertionError("seeds do not end")


@pytest.mark.parametrize("seed", [0])
def test_broken_indices(seed: int, any_threads_backend: Any) -> None:
    script = f"import test_broken_indices\nprint(test_broken_indices.run({seed}))"
    assert int(run_on(any_threads_backend, script, PYTHONFAULTHANDLER="1", GEMMLET_NUM_THREADS="2")) > 500


NOT_FINITE = """
import numpy as np, scipy.sparse
from gemmlet.nn.dataset import Samples
x = scipy.sparse.csr_matrix(np.full((1, 4), np.nan))
samples = Samples(x, 4, None, sparse=True)
x.indices[:] = 2**31 - 1
print(samples.not_finite())
"""


def test_a_row_is_named_without_its_columns() -> None:
    """Which another thread may have changed since they were checked."""
    pytest.importorskip("scipy")
    assert run_on(select.load("numpy"), NOT_FINITE) == "x must be finite, got nan in row 0\n"


# Arrays whose shape and dtype another thread sets, and puts back.


def flip(arrays: list[Any], stopped: threading.Event) -> None:
    """Set them in one go, which is seen without the GIL alone; and by calls, between which threads may change."""
    while not stopped.is_set():
        for array in arrays:
            shape, dtype = array.shape, array.dtype
            for _ in range(100):
                array.dtype = np.int8
                array.dtype = dtype
            for name, value in (("dtype", np.int8), ("dtype", dtype), ("shape", shape[::-1]), ("shape", shape)):
                setattr(array, name, value)


def flipping_cases(rng: np.random.Generator) -> Iterator[tuple[str, Callable[[], object], list[Any]]]:
    """Every kernel, and what networks do, with the arrays that they read and write."""
    # Numba would compile for a minute: some of each kind, and no training.
    is_numba = select.current().name == "numba"
    for name in kernels.__all__[:: 3 if is_numba else 1]:
        arguments = arguments_of(name, rng, rng.choice([np.float32, np.float64]), ROWS, FEATURES)
        arrays = [array for array in arguments.values() if isinstance(array, np.ndarray)]
        yield name, lambda name=name, arguments=arguments: getattr(kernels, name)(**arguments), arrays
    # Where a wrong size goes far beyond the end.
    x, w, wide = (np.ones(shape, np.float32) for shape in ((64, 512), (512, 512), (512, 4096)))
    yield "wide linear", lambda: kernels.linear(x, wide), [wide]
    yield "wide linear_backward", lambda: kernels.linear_backward(x, x, w, x), [x]
    samples, y = rng.random((ROWS, FEATURES)).astype(np.float32), rng.integers(0, CLASSES, ROWS)
    mlp, gan = MLP([FEATURES, 64, CLASSES]), GAN(8, [32, FEATURES], [32, 1])
    yield "predict", lambda: mlp.predict(samples), [samples, *mlp.parameters]
    if is_numba:
        return
    yield "fit", lambda: mlp.fit(samples, y, 1), [samples, y, *mlp.parameters]
    yield "GAN", lambda: gan.fit(samples, 1), [samples, *gan.generator_parameters, *gan.discriminator_parameters]


def run_flipping(seed: int) -> int:
    """Call everything meanwhile; return how many calls were answered."""
    sys.setswitchinterval(1e-6)
    answered = 0
    for name, call, arrays in flipping_cases(np.random.default_rng(seed)):
        print(name, file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        call()
        stopped = threading.Event()
        thread = threading.Thread(target=flip, args=(arrays, stopped))
        thread.start()
        try:
            end = time.perf_counter() + FLIPPING * (10 if name.startswith("wide") else 1)
            while time.perf_counter() < end:
                with contextlib.suppress(*REFUSALS, ArithmeticError):
                    call()
                    answered += 1
        finally:
            stopped.set()
            thread.join()
    faulthandler.cancel_dump_traceback_later()
    return answered


def test_shapes_and_dtypes_that_another_thread_sets(any_threads_backend: Any) -> None:
    if any_threads_backend.name == "cuda":
        pytest.skip("it compiles for whatever dtype it finds, and computes on copies")
    script = "import test_broken_indices\nprint(test_broken_indices.run_flipping(0))"
    assert int(run_on(any_threads_backend, script, PYTHONFAULTHANDLER="1", GEMMLET_NUM_THREADS="2")) > 100


if __name__ == "__main__":
    print(run(int(sys.argv[2]), float(sys.argv[1])), "calls")
