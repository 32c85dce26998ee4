"""Stochastic gradient descent with momentum on three spirals; tanh, and layers as classes."""

import numpy as np

np.random.seed(42)


class Dense:
    def __init__(self, n_in, n_out):
        self.W = np.random.randn(n_in, n_out) * np.sqrt(1.0 / n_in)
        self.b = np.zeros((1, n_out))
        self.vW = np.zeros_like(self.W)
        self.vb = np.zeros_like(self.b)

    def forward(self, x):
        self.x = x
        return x.dot(self.W) + self.b

    def backward(self, grad):
        self.dW = self.x.T.dot(grad)
        self.db = np.sum(grad, axis=0, keepdims=True)
        return grad.dot(self.W.T)

    def update(self, learning_rate, momentum):
        self.vW = momentum * self.vW - learning_rate * self.dW
        self.vb = momentum * self.vb - learning_rate * self.db
        self.W += self.vW
        self.b += self.vb


class Tanh:
    def forward(self, x):
        self.out = np.tanh(x)
        return self.out

    def backward(self, grad):
        return grad * (1 - self.out**2)

    def update(self, learning_rate, momentum):
        pass


class SoftmaxCrossEntropy:
    def forward(self, scores, labels):
        self.labels = labels
        shifted = scores - scores.max(axis=1, keepdims=True)
        exps = np.exp(shifted)
        self.probs = exps / exps.sum(axis=1, keepdims=True)
        picked = self.probs[range(len(labels)), labels]
        return -np.log(picked).sum() / len(labels)

    def backward(self):
        grad = self.probs.copy()
        grad[range(len(self.labels)), self.labels] -= 1
        return grad / len(self.labels)


def spirals(points, classes):
    X = np.zeros((points * classes, 2))
    y = np.zeros(points * classes, dtype=int)
    for c in range(classes):
        rows = range(points * c, points * (c + 1))
        r = np.linspace(0.0, 1, points)
        t = np.linspace(c * 4, (c + 1) * 4, points) + np.random.randn(points) * 0.2
        X[rows] = np.c_[r * np.sin(t), r * np.cos(t)]
        y[rows] = c
    return X, y


X, y = spirals(200, 3)
layers = [Dense(2, 64), Tanh(), Dense(64, 32), Tanh(), Dense(32, 3)]
criterion = SoftmaxCrossEntropy()
for epoch in range(250):
    order = np.random.permutation(len(X))
    for start in range(0, len(X), 20):
        batch = order[start : start + 20]
        out = X[batch]
        for layer in layers:
            out = layer.forward(out)
        criterion.forward(out, y[batch])
        grad = criterion.backward()
        for layer in reversed(layers):
            grad = layer.backward(grad)
        for layer in layers:
            layer.update(0.02, 0.9)

out = X
for layer in layers:
    out = layer.forward(out)
print("loss", criterion.forward(out, y), "accuracy", np.mean(out.argmax(axis=1) == y))
