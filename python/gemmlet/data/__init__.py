"""Data to train on: MNIST from a folder, from the network, or as a small sample that lies in the package."""

from .mnist import Mnist, load_mnist

__all__ = ["Mnist", "load_mnist"]
