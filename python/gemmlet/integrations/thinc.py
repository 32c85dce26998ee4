"""Thinc on gemmlet's kernels: ``thinc.api.use_ops("gemmlet")``, or ``set_current_ops(get_ops("gemmlet"))``.

Thinc finds `GemmletOps` by its entry point. It loads all entry points whenever it makes any ops, without a guard, so
importing this module raises nothing, whatever is broken: what is wrong is said when a `GemmletOps` is made.
"""

from __future__ import annotations

from typing import Any

from ..backends import select

try:
    from thinc.backends.numpy_ops import NumpyOps as _Base

    _broken: Exception | None = None
except Exception as error:  # a package that is not there, is another's, or does not fit its NumPy
    _Base, _broken = object, error


def _computed(kernel: str, *arguments: Any) -> Any:
    """The result of a kernel's fast path; None where the call is not its usual one, or the backend has none."""
    fast_path = select.current().fast_paths.get(kernel)
    return None if fast_path is None else fast_path(*arguments)


def _serve_optimizers() -> None:
    """Let Thinc's optimizers ask the current ops, if they are these; by themselves they know NumpyOps alone."""
    from thinc import backends, optimizers

    stock = optimizers.get_array_ops
    if stock.__module__ == __name__:
        return

    def get_array_ops(arr: Any) -> Any:
        ops = backends.context_ops.get()
        return ops if isinstance(ops, GemmletOps) and isinstance(arr, ops.xp.ndarray) else stock(arr)

    optimizers.get_array_ops = get_array_ops


class GemmletOps(_Base):
    """Thinc's `NumpyOps`, with the usual calls of what gemmlet has kernels for computed by them.

    Usual are plain arrays of float32 or float64, one dtype for a call. Everything else, and every method that is not
    here, is NumpyOps's own: errors too. Where gemmlet has no compiled module, nearly all calls are.

    Raises
    ------
    ImportError
        Thinc cannot be imported, or has no `NumpyOps`.
    ValueError, RuntimeError
        ``GEMMLET_BACKEND`` names no backend, or one that cannot be loaded.
    """

    name = "gemmlet"

    def __init__(self, device_type: Any = "cpu", device_id: int = -1, **options: Any) -> None:
        if _broken is not None:
            needed = "GemmletOps needs thinc 8.3 or later: pip install 'gemmlet[thinc]'"
            raise ImportError(f"{needed} ({_broken})") from _broken
        super().__init__(device_type, device_id, **options)
        select.current()
        _serve_optimizers()

    # Matmuls.

    def gemm(self, x, y, out=None, trans1=False, trans2=False):
        """``x @ y``, each transposed if asked for."""
        z = _computed("linear", x.T if trans1 else x, y.T if trans2 else y, None, None, False, out)
        return super().gemm(x, y, out=out, trans1=trans1, trans2=trans2) if z is None else z

    def affine(self, X, W, b):
        """``X @ W.T + b``."""
        Y = _computed("linear", X, W.T, b, None, False, None)
        return super().affine(X, W, b) if Y is None else Y

    # Activations.

    def relu(self, X, inplace=False):
        """``max(X, 0)``."""
        Y = _computed("relu", X, None, X if inplace else None)
        return super().relu(X, inplace) if Y is None else Y

    def backprop_relu(self, dY, Y, inplace=False):
        """Gradient of `relu`; in place it is written to `dY`."""
        dX = _computed("relu_backward", dY, None, Y, None, dY if inplace else None)
        return super().backprop_relu(dY, Y, inplace) if dX is None else dX

    def sigmoid(self, X, *, inplace=False):
        """``1 / (1 + exp(-X))``; NumpyOps clips X to [-20, 20]."""
        Y = _computed("sigmoid", X, None, X if inplace else None)
        return super().sigmoid(X, inplace=inplace) if Y is None else Y

    def backprop_sigmoid(self, dY, Y, *, inplace=False):
        """Gradient of `sigmoid`; in place it is written to `Y`."""
        dX = _computed("sigmoid_backward", dY, None, Y, None, Y if inplace else None)
        return super().backprop_sigmoid(dY, Y, inplace=inplace) if dX is None else dX

    def swish(self, X, inplace=False):
        """``X * sigmoid(X)``."""
        Y = _computed("silu", X, None, X if inplace else None)
        return super().swish(X, inplace) if Y is None else Y

    def backprop_swish(self, dY, X, Y, inplace=False):
        """Gradient of `swish`; in place it is written to `dY`."""
        dX = None
        if Y.shape == X.shape:  # it is not read
            dX = _computed("silu_backward", dY, X, None, None, dY if inplace else None)
        return super().backprop_swish(dY, X, Y, inplace) if dX is None else dX

    def gelu(self, X, inplace=False):
        """``X`` times the normal distribution function of it."""
        Y = _computed("gelu", X, None, X if inplace else None)
        return super().gelu(X, inplace) if Y is None else Y

    def backprop_gelu(self, dY, X, inplace=False):
        """Gradient of `gelu`; in place it is written to `dY`."""
        dX = _computed("gelu_backward", dY, X, None, None, dY if inplace else None)
        return super().backprop_gelu(dY, X, inplace) if dX is None else dX

    def gelu_approx(self, X, inplace=False):
        """`gelu` by its approximation with tanh."""
        Y = _computed("gelu_tanh", X, None, X if inplace else None)
        return super().gelu_approx(X, inplace) if Y is None else Y

    def backprop_gelu_approx(self, dY, X, inplace=False):
        """Gradient of `gelu_approx`; in place it is written to `dY`."""
        dX = _computed("gelu_tanh_backward", dY, X, None, None, dY if inplace else None)
        return super().backprop_gelu_approx(dY, X, inplace) if dX is None else dX

    def softmax(self, x, *, inplace=False, axis=-1, temperature=1.0):
        """``exp(x / temperature)`` over its sum; as NumpyOps's, in a new array."""
        y = None
        if axis in (-1, x.ndim - 1):
            y = _computed("softmax", x if temperature == 1.0 else x / temperature, None, None)
        return super().softmax(x, inplace=inplace, axis=axis, temperature=temperature) if y is None else y

    def backprop_softmax(self, Y, dY, *, axis=-1, temperature=1.0):
        """Gradient of `softmax`."""
        dX = None
        if axis in (-1, Y.ndim - 1):
            dX = _computed("softmax_backward", dY if temperature == 1.0 else dY / temperature, None, Y, None, None)
        return super().backprop_softmax(Y, dY, axis=axis, temperature=temperature) if dX is None else dX

    # What optimizers do.

    def adam(self, weights, gradient, mom1, mom2, beta1, beta2, eps, learn_rate, mod_rate=1.0):
        """Adam, the bias of the moments corrected in `learn_rate`; the gradient is 0 afterwards.

        As in NumpyOps `mod_rate` is not read.
        """
        b1, b2, lr = float(beta1), float(beta2), float(learn_rate)
        # In the order of the registry's rule: step_size, beta1, beta2, gain1, gain2, eps, correction, l2, shrink.
        hyperparameters = lr, b1, b2, 1.0 - b1, 1.0 - b2, float(eps), 1.0, 0.0, 1.0
        clears = isinstance(gradient, self.xp.ndarray) and gradient.flags.writeable
        if not clears or _computed("adam_update", weights, gradient, (mom1, mom2), hyperparameters) is None:
            return super().adam(weights, gradient, mom1, mom2, beta1, beta2, eps, learn_rate, mod_rate)
        gradient.fill(0)
        return weights, gradient, mom1, mom2

    def update_averages(self, ema, weights, t, max_decay=0.9999):
        """Moving average of weights, with a decay of ``(1 + t) / (10 + t)`` in the first steps."""
        gain = 1.0 - float(min((1.0 + t) / (10.0 + t), max_decay))
        # ema + gain * (weights - ema): gradient descent on half the squared distance, the signs in rate and decay.
        if _computed("sgd_update", ema, weights, (), (-gain, -1.0)) is None:
            super().update_averages(ema, weights, t, max_decay)
