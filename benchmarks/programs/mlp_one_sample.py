"""A network of sigmoid neurons, trained on one sample after the other; every activation is a column vector."""

import random

import numpy as np


def sigmoid(z):
    return 1.0 / (1.0 + np.exp(-z))


def sigmoid_prime(z):
    return sigmoid(z) * (1 - sigmoid(z))


class Network:
    def __init__(self, sizes):
        self.sizes = sizes
        self.biases = [np.random.randn(n, 1) for n in sizes[1:]]
        self.weights = [np.random.randn(n, m) / np.sqrt(m) for m, n in zip(sizes[:-1], sizes[1:])]

    def feedforward(self, a):
        for w, b in zip(self.weights, self.biases):
            a = sigmoid(np.dot(w, a) + b)
        return a

    def backprop(self, x, y):
        activation = x
        activations = [x]
        zs = []
        for w, b in zip(self.weights, self.biases):
            z = np.dot(w, activation) + b
            zs.append(z)
            activation = sigmoid(z)
            activations.append(activation)

        grad_w = [np.zeros(w.shape) for w in self.weights]
        grad_b = [np.zeros(b.shape) for b in self.biases]
        delta = (activations[-1] - y) * sigmoid_prime(zs[-1])
        grad_w[-1] = np.dot(delta, activations[-2].transpose())
        grad_b[-1] = delta
        for layer in range(2, len(self.sizes)):
            delta = np.dot(self.weights[-layer + 1].transpose(), delta) * sigmoid_prime(zs[-layer])
            grad_w[-layer] = np.dot(delta, activations[-layer - 1].transpose())
            grad_b[-layer] = delta
        return grad_w, grad_b

    def train(self, samples, epochs, learning_rate):
        for _ in range(epochs):
            random.shuffle(samples)
            for x, y in samples:
                grad_w, grad_b = self.backprop(x, y)
                self.weights = [w - learning_rate * g for w, g in zip(self.weights, grad_w)]
                self.biases = [b - learning_rate * g for b, g in zip(self.biases, grad_b)]

    def accuracy(self, samples):
        right = sum(int(np.argmax(self.feedforward(x)) == np.argmax(y)) for x, y in samples)
        return right / len(samples)

    def loss(self, samples):
        return sum(0.5 * np.linalg.norm(self.feedforward(x) - y) ** 2 for x, y in samples) / len(samples)


def make_samples(count, classes=10, features=64):
    centers = np.random.rand(classes, features)
    samples = []
    for i in range(count):
        label = i % classes
        x = centers[label] + 0.3 * np.random.randn(features)
        y = np.zeros((classes, 1))
        y[label] = 1.0
        samples.append((x.reshape(features, 1), y))
    return samples


random.seed(1)
np.random.seed(1)
samples = make_samples(1500)
training, test = samples[:1200], samples[1200:]
network = Network([64, 30, 10])
network.train(training, 20, 0.5)
print("loss", network.loss(test), "accuracy", network.accuracy(test))
