"""Gradients of a small network by back-propagation, compared with finite differences of every parameter."""

import numpy as np


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def unpack(theta, n_in, n_hidden, n_out):
    split = n_hidden * (n_in + 1)
    W1 = theta[:split].reshape(n_hidden, n_in + 1)
    W2 = theta[split:].reshape(n_out, n_hidden + 1)
    return W1, W2


def cost(theta, X, Y, sizes, lam):
    W1, W2 = unpack(theta, *sizes)
    m = X.shape[0]
    ones = np.ones((m, 1))
    a1 = np.hstack((ones, X))
    a2 = np.hstack((ones, sigmoid(a1.dot(W1.T))))
    h = sigmoid(a2.dot(W2.T))
    J = np.sum(-Y * np.log(h) - (1 - Y) * np.log(1 - h)) / m
    J += lam / (2 * m) * (np.sum(W1[:, 1:] ** 2) + np.sum(W2[:, 1:] ** 2))
    return J


def gradient(theta, X, Y, sizes, lam):
    W1, W2 = unpack(theta, *sizes)
    m = X.shape[0]
    ones = np.ones((m, 1))
    a1 = np.hstack((ones, X))
    s2 = sigmoid(a1.dot(W1.T))
    a2 = np.hstack((ones, s2))
    h = sigmoid(a2.dot(W2.T))
    d3 = h - Y
    d2 = d3.dot(W2[:, 1:]) * s2 * (1 - s2)
    grad1 = d2.T.dot(a1) / m
    grad2 = d3.T.dot(a2) / m
    grad1[:, 1:] += lam / m * W1[:, 1:]
    grad2[:, 1:] += lam / m * W2[:, 1:]
    return np.concatenate((grad1.ravel(), grad2.ravel()))


def numerical_gradient(theta, *args, eps=1e-4):
    grad = np.zeros_like(theta)
    for i in range(len(theta)):
        step = np.zeros_like(theta)
        step[i] = eps
        grad[i] = (cost(theta + step, *args) - cost(theta - step, *args)) / (2 * eps)
    return grad


np.random.seed(9)
sizes = (12, 10, 4)
X = np.random.randn(50, sizes[0])
Y = np.eye(sizes[2])[np.random.randint(0, sizes[2], 50)]
theta = np.random.uniform(-0.5, 0.5, sizes[1] * (sizes[0] + 1) + sizes[2] * (sizes[1] + 1))

worst = 0.0
for trial in range(50):
    analytic = gradient(theta, X, Y, sizes, 1.0)
    numeric = numerical_gradient(theta, X, Y, sizes, 1.0)
    difference = np.linalg.norm(numeric - analytic) / np.linalg.norm(numeric + analytic)
    worst = max(worst, difference)
    theta = theta - 0.5 * analytic

assert worst < 1e-6
print("cost", cost(theta, X, Y, sizes, 1.0))
