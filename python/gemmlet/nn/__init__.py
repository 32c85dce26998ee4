"""A multilayer perceptron and a generative adversarial network.

They train on every backend: a step is a plan (`gemmlet.training`), which a backend executes. The same seed gives the
same bits on one backend, whatever `gemmlet.set_num_threads` says. (The matmul of the backends numba and numpy is
NumPy's BLAS, which may add in another order where the number of its own threads is another.)
"""

from . import recipes
from .augment import Augment
from .fit import CheckpointError, DivergedError, GANHistory, GANProgress, History, Progress, StopTraining
from .gan import GAN, interpolate
from .mlp import MLP
from .optimizers import OPTIMIZERS, SGD, Adam, AdamW, ClipNorm, Optimizer, make_optimizer
from .schedules import EarlyStopping, ReduceOnPlateau, StepDecay, WarmUp, cosine_decay, linear_decay

__all__ = [
    "GAN",
    "MLP",
    "OPTIMIZERS",
    "SGD",
    "Adam",
    "AdamW",
    "Augment",
    "CheckpointError",
    "ClipNorm",
    "DivergedError",
    "EarlyStopping",
    "GANHistory",
    "GANProgress",
    "History",
    "Optimizer",
    "Progress",
    "ReduceOnPlateau",
    "StepDecay",
    "StopTraining",
    "WarmUp",
    "cosine_decay",
    "interpolate",
    "linear_decay",
    "make_optimizer",
    "recipes",
]
