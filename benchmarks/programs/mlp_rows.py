"""A network with one hidden layer on digits, in mini-batches of rows: ReLU, softmax and cross-entropy."""

import numpy as np

rng = np.random.default_rng(0)


def make_digits(count):
    """Draw images of ten blurred patterns, 28 x 28 pixels from 0 to 1."""
    patterns = rng.random((10, 7, 7)) > 0.6
    patterns = patterns.repeat(4, axis=1).repeat(4, axis=2).reshape(10, 784)
    labels = rng.integers(0, 10, count)
    images = patterns[labels] * rng.uniform(0.5, 1.0, (count, 1)) + 0.2 * rng.standard_normal((count, 784))
    return np.clip(images, 0, 1), labels


def relu(z):
    return np.maximum(0, z)


def softmax(z):
    e = np.exp(z - np.max(z, axis=1, keepdims=True))
    return e / np.sum(e, axis=1, keepdims=True)


def forward(x, w1, b1, w2, b2):
    z1 = x @ w1 + b1
    a1 = relu(z1)
    z2 = a1 @ w2 + b2
    return z1, a1, softmax(z2)


x_train, y_train = make_digits(4000)
one_hot = np.eye(10)[y_train]
hidden, batch_size, learning_rate = 100, 32, 0.1

w1 = rng.standard_normal((784, hidden)) * np.sqrt(2 / 784)
b1 = np.zeros(hidden)
w2 = rng.standard_normal((hidden, 10)) * np.sqrt(2 / hidden)
b2 = np.zeros(10)

for epoch in range(12):
    order = rng.permutation(len(x_train))
    for start in range(0, len(x_train), batch_size):
        batch = order[start : start + batch_size]
        x, y = x_train[batch], one_hot[batch]
        z1, a1, p = forward(x, w1, b1, w2, b2)

        dz2 = (p - y) / len(x)
        dw2 = a1.T @ dz2
        db2 = dz2.sum(axis=0)
        da1 = dz2 @ w2.T
        dz1 = da1 * (z1 > 0)
        dw1 = x.T @ dz1
        db1 = dz1.sum(axis=0)

        w1 -= learning_rate * dw1
        b1 -= learning_rate * db1
        w2 -= learning_rate * dw2
        b2 -= learning_rate * db2

p = forward(x_train, w1, b1, w2, b2)[2]
loss = -np.mean(np.log(p[np.arange(len(p)), y_train] + 1e-12))
accuracy = np.mean(np.argmax(p, axis=1) == y_train)
print("loss", loss, "accuracy", accuracy)
