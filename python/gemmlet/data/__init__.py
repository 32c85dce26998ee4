"""Data to train on: MNIST from a folder, from the network, or as a small sample in the package; augmentation."""

from .augmentation import augment
from .mnist import Mnist, load_mnist

__all__ = ["Mnist", "augment", "load_mnist"]
