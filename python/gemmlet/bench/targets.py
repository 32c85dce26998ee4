"""What gemmlet is to reach, line by line, and what a run says about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .implementations import OURS
from .results import Row
from .timing import duration
from .training import MNIST_BATCH


@dataclass(frozen=True)
class Target:
    """One thing to reach."""

    work: str  # in words
    chosen: Callable[[Row], bool]  # which rows it is about
    peers: tuple[str, ...]  # whom to be ahead of: the fastest of them counts, row by row
    at_least: float  # the ratio to reach
    mean: bool = False  # whether the geometric mean over the rows has to reach it; else every row has to
    implementation: str = OURS  # whose time it is

    @property
    def required(self) -> str:
        """What is required, in words."""
        who = self.peers[0] if len(self.peers) == 1 else f"the better of {' and '.join(self.peers)}"
        return f"{self.at_least:g} × {who}, {'geometric mean' if self.mean else 'every row'}"


@dataclass(frozen=True)
class Limit:
    """A time to stay within."""

    work: str
    chosen: Callable[[Row], bool]
    seconds: float

    @property
    def required(self) -> str:
        """What is required, in words."""
        return f"at most {duration(self.seconds)}, median"


@dataclass(frozen=True)
class Share:
    """A share of the roofline to reach in every row."""

    work: str
    chosen: Callable[[Row], bool]
    at_least: float

    @property
    def required(self) -> str:
        """What is required, in words."""
        return f"{self.at_least:.0%} of roofline, every row"


@dataclass(frozen=True)
class Rate:
    """Operations a second and thread to reach in every row."""

    work: str
    chosen: Callable[[Row], bool]
    at_least: float

    @property
    def required(self) -> str:
        """What is required, in words."""
        return f"{self.at_least / 1e9:g} GFLOP/s a thread, every row"


@dataclass(frozen=True)
class Verdict:
    """What a run says about a target."""

    work: str
    required: str
    measured: str  # in words; "not measured" where rows or peers are missing
    met: bool | None  # None where it was not measured


def _of(group: str | None = None, **labels: object) -> Callable[[Row], bool]:
    """Rows of this group, or of any, with these labels; of a tuple any value will do."""

    def chosen(row: Row) -> bool:
        return group in (None, row.group) and all(
            row.labels.get(name) in (value if isinstance(value, tuple) else (value,)) for name, value in labels.items()
        )

    return chosen


def _torch(work: str, layers: str, batch: int) -> Callable[[Row], bool]:
    return _of("torch", work=work, layers=layers, batch=batch)


def _each(work: str, chosen: Callable[[Row], bool], *ratios: tuple[str, float]) -> Iterator[Target]:
    """Targets of the same work, each a peer and the ratio to reach."""
    return (Target(work, chosen, (peer,), ratio) for peer, ratio in ratios)


_BEST = ("numpy", "pytorch")
_COMPILERS = ("pytorch", "pytorch compiled")
_EPOCH = "MNIST epoch 784-128-10, batch 64, images as they are in MNIST"
_MNIST = _of("epoch", data="MNIST", dtype="float32")
_DENSE_EPOCH = "the same on dense random input"
_DENSE = _of("epoch", data="dense random")
_LAYERS = "matmul over the shapes of the layers, batches 1 to 1024, float32 and float64"
_LINEAR = "linear with tanh, gelu, sigmoid: batch 64 to 1024, widths 128 to 1024"
_GAN_STEP = "GAN step 100-256-784 and 784-256-1, batch 64, Adam"
_COMMAND_STEP = "GAN step of `gemmlet train gan`, 100-256-512-784 and 784-512-256-1, batch 128, Adam"
_WIDE = "steps of 784-width-width-10, widths 64 to 2048, batch 16 to 1024"
_MNIST_WIDTHS = "the same, widths 512 to 1024, batch 128, Adam, dense random input and MNIST"
_KERNELS = ("tanh", "sigmoid", "gelu")
_ACTIVATIONS = f"{', '.join(_KERNELS)} at 16,384 and 1 million elements"
_ELEMENTWISE = "backend numba, every elementwise kernel"
_PROGRAMS = "programs in NumPy, accelerated"
_WIDER = ("256-128", "512-512")
_SKLEARN: tuple[tuple[str, dict[str, object], float], ...] = (
    ("fit, 784-100-10, float32", {"kind": "fit", "dtype": "float32", "hidden": "100"}, 3.0),
    ("fit, 784-256-128-10 and 784-512-512-10, float32", {"kind": "fit", "dtype": "float32", "hidden": _WIDER}, 1.5),
    ("fit, float64", {"kind": "fit", "dtype": "float64"}, 1.3),
    ("predict_proba", {"kind": "predict"}, 1.2),
)
_AUGMENT = "augmentation of MNIST's digits, one by one"
_AUGMENTED = "epoch with augmentation, batch 64,"
_CROSS_ENTROPY = "softmax cross-entropy with gradient, 64×10 to 4096×1000"

TARGETS: tuple[Target | Limit | Share | Rate, ...] = (
    *_each(_EPOCH, _MNIST, ("numpy", 3.5), ("jax", 2.5), ("pytorch", 6.0), ("scikit-learn", 6.0)),
    *_each(_DENSE_EPOCH, _DENSE, ("numpy", 1.9), ("jax", 1.4)),
    Share(_DENSE_EPOCH, _DENSE, 0.6),
    Target("one image at a time, float64", _of("epoch", batch=1), ("numpy",), 8.0),
    *_each(_GAN_STEP, _of("gan", batch=64), ("numpy", 2.5), ("jax", 1.25), ("pytorch", 2.2)),
    *_each(_COMMAND_STEP, _of("gan", batch=128), ("numpy", 1.4), ("pytorch", 1.6)),
    *_each(_WIDE, _of("wide"), ("gemmlet kernels", 1.15), ("numpy", 1.15), ("pytorch", 1.3)),
    Rate(_MNIST_WIDTHS, _of("wide", batch=MNIST_BATCH), 70e9),
    Target(_LAYERS, _of("matmul", set="layers"), _BEST, 1.1, mean=True),
    Target(_LAYERS, _of("matmul", set="layers"), _BEST, 0.9),
    Target("matmul 512³ to 4096³", _of("matmul", set="squares"), _BEST, 1.0),
    *_each(_LINEAR, _of("linear"), ("numpy", 1.3), ("pytorch compiled", 1.1)),
    *(
        Target(f"{_ACTIVATIONS}, {dtype}", _of("activations", kernel=_KERNELS, dtype=dtype), _BEST, ratio)
        for dtype, ratio in (("float32", 1.5), ("float64", 1.3))
    ),
    *_each(_CROSS_ENTROPY, _of("losses", kernel="softmax_cross_entropy"), ("numpy", 3.0), ("pytorch", 1.5)),
    Target("Adam update of a million parameters", _of("optimizers", update="adam"), ("pytorch fused",), 1.0),
    *(
        Target(f"step of Thinc, 784-128-10, batch {batch}, on GemmletOps", _of("thinc", batch=batch), ("thinc",), ratio)
        for batch, ratio in ((1, 1.6), (64, 2.0))
    ),
    *(
        Target(f"scikit-learn's MLPClassifier on gemmlet: {work}", _of("sklearn", **rows), ("scikit-learn",), ratio)
        for work, rows, ratio in _SKLEARN
    ),
    Target(_PROGRAMS, _of("programs"), ("numpy",), 2.0, mean=True),
    Target(_PROGRAMS, _of("programs"), ("numpy",), 0.95),
    *(
        Target(f"under PyTorch: fused step {layers}, batch {batch}", _torch("step", layers, batch), ("pytorch",), ratio)
        for layers, batch, ratio in (("784-128-10", 1, 7.0), ("784-128-10", 64, 4.0), ("784-1024-1024-10", 1024, 1.3))
    ),
    *(
        Target(f"under PyTorch: gradient {layers}, batch {batch}", _torch("gradient", layers, batch), _COMPILERS, ratio)
        for layers, batch, ratio in (("784-128-10", 1, 1.5), ("784-128-10", 64, 1.25), ("784-1024-1024-10", 1024, 0.95))
    ),
    Target("under PyTorch: inference", _of("torch", work="inference"), _COMPILERS, 0.95),
    Target("under PyTorch: updates by an optimizer", _of("torch", work="update"), ("pytorch",), 3.0),
    *(
        Target(f"{_AUGMENT}{', elastic' * elastic}", _of("augment", elastic=elastic), (peer,), ratio)
        for elastic, peer, ratio in ((False, "scipy", 25.0), (False, "pytorch", 8.0), (True, "scipy", 100.0))
    ),
    Limit(f"{_AUGMENT}, on one thread", _of("augment", elastic=False), 1.2e-6),
    Limit(f"{_AUGMENT}, elastic, on one thread", _of("augment", elastic=True), 2e-6),
    Target(f"{_AUGMENTED} 784-128-10, affine", _of("augment", hidden=128), ("gemmlet plain",), 0.77),
    Target(f"{_AUGMENTED} 784-256-10, affine and elastic", _of("augment", hidden=256), ("gemmlet plain",), 0.8),
    Limit("import gemmlet over import numpy", _of("import", after_numpy=True), 0.030),
    Target("backend numba, MNIST epoch", _MNIST, ("numpy",), 1.0, implementation="gemmlet-numba"),
    Target(_ELEMENTWISE, _of(elementwise=True), ("numpy",), 1.0, implementation="gemmlet-numba"),
)


def geometric_mean(ratios: Iterable[float]) -> float:
    """Return the geometric mean."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs))


def verdict(target: Target | Limit | Share | Rate, rows: Iterable[Row]) -> Verdict:
    """Return what the rows say about a target."""
    chosen = [row for row in rows if target.chosen(row)]

    def say(measured: str, met: bool | None) -> Verdict:
        return Verdict(target.work, target.required, measured, met)

    if isinstance(target, Limit):
        times = [row.percentile(OURS, 50) for row in chosen if row.measured(OURS)]
        return say(duration(max(times)), max(times) <= target.seconds) if times else say("not measured", None)
    if isinstance(target, Share):
        shares = [share for row in chosen if (share := row.roofline_share()) is not None]
        return say(f"{min(shares):.0%}", min(shares) >= target.at_least) if shares else say("not measured", None)
    if isinstance(target, Rate):
        rates = [rate for row in chosen if (rate := row.rate()) is not None]
        return say(f"{min(rates) / 1e9:.0f}", min(rates) >= target.at_least) if rates else say("not measured", None)
    ratios: dict[str, float] = {}
    for row in chosen:
        if target.implementation in row.timed and row.timed[target.implementation].failed is not None:
            return say(f"fails: {row.name}", met=False)
        found = [row.ratio(peer, target.implementation) for peer in target.peers]
        known = [ratio for ratio in found if ratio is not None]
        # Against the better of two, one of them says nothing.
        if len(known) == len(found):
            ratios[row.name] = min(known)
    if not ratios:
        return say("not measured", None)
    mean, worst = geometric_mean(ratios.values()), min(ratios, key=lambda name: ratios[name])
    words = f"{mean:.2f}"
    if len(ratios) > 1:
        words += f" (geometric mean of {len(ratios)} rows); worst {ratios[worst]:.2f}, {worst}"
    if len(ratios) < len(chosen):
        words += f"; {len(chosen) - len(ratios)} rows lack an implementation"
    return say(words, (mean if target.mean else ratios[worst]) >= target.at_least)
