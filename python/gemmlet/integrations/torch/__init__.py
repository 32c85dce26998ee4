"""Under PyTorch, on the CPU: fused training steps, optimizers, a backend for `torch.compile`, operators.

`fused_step` trains a plain `torch.nn.Sequential` in place, a step in one call. `SGD`, `Adam` and `AdamW` are PyTorch's,
with an update of all parameters in one call. ``torch.compile(model, backend="gemmlet")`` runs chains of linear layers,
activations and losses by the kernels. ``gemmlet.integrations.torch.operators`` registers the kernels as
``torch.ops.gemmlet``. `calls` counts what gemmlet computed, and what it handed back to PyTorch.

What gemmlet does not know, PyTorch computes: another device or dtype, sparse gradients, autocast, hooks.
"""

from __future__ import annotations

from .dynamo import backend
from .extension import calls
from .optimizers import SGD, Adam, AdamW
from .step import FusedStep, fused_step

__all__ = ["SGD", "Adam", "AdamW", "FusedStep", "backend", "calls", "fused_step"]
