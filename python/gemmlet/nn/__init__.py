"""A multilayer perceptron and a generative adversarial network.

They are written on the public functions of `gemmlet.kernels` alone, and train on every backend. The same seed gives the
same bits on one backend, whatever the number of threads.
"""

from .gan import GAN
from .mlp import MLP
from .optimizers import OPTIMIZERS, SGD, Adam, AdamW, LinearDecay, Optimizer, make_optimizer
from .training import GANHistory, GANProgress, History, Progress, StopTraining

__all__ = [
    "GAN",
    "MLP",
    "OPTIMIZERS",
    "SGD",
    "Adam",
    "AdamW",
    "GANHistory",
    "GANProgress",
    "History",
    "LinearDecay",
    "Optimizer",
    "Progress",
    "StopTraining",
    "make_optimizer",
]
