"""Linear regression of polynomial features by batch, stochastic and mini-batch gradient descent."""

import numpy as np

np.random.seed(0)


def features(x, degree):
    columns = [x**d for d in range(1, degree + 1)]
    return np.column_stack(columns)


def normalize(X):
    return (X - X.mean(axis=0)) / X.std(axis=0)


def mse(X, y, theta):
    return np.mean((X @ theta - y) ** 2)


def batch_gradient_descent(X, y, lr, epochs):
    theta = np.zeros(X.shape[1])
    history = []
    for _ in range(epochs):
        predictions = X.dot(theta)
        errors = predictions - y
        theta = theta - lr * (2 / len(y)) * X.T.dot(errors)
        history.append((errors**2).mean())
    return theta, history


def stochastic_gradient_descent(X, y, lr, epochs):
    theta = np.zeros(X.shape[1])
    for _ in range(epochs):
        for i in np.random.permutation(len(y)):
            xi, yi = X[i], y[i]
            error = xi.dot(theta) - yi
            theta -= lr * 2 * error * xi
    return theta


def minibatch_gradient_descent(X, y, lr, epochs, size):
    theta = np.zeros(X.shape[1])
    for _ in range(epochs):
        order = np.random.permutation(len(y))
        for i in range(0, len(y), size):
            Xb, yb = X[order[i : i + size]], y[order[i : i + size]]
            gradient = 2 / len(yb) * Xb.T @ (Xb @ theta - yb)
            theta -= lr * gradient
    return theta


x = np.random.uniform(-3, 3, 1000)
y = 0.5 * x**3 - x**2 + 2 + np.random.normal(0, 2, 1000)
X = np.hstack([np.ones((1000, 1)), normalize(features(x, 5))])

theta, history = batch_gradient_descent(X, y, 0.05, 15000)
a = mse(X, y, theta)
b = mse(X, y, stochastic_gradient_descent(X, y, 0.001, 150))
c = mse(X, y, minibatch_gradient_descent(X, y, 0.01, 400, 32))
print("mean squared errors", a, b, c)
