"""Inverted dropout and L2 regularization in a classifier with more parameters than its data can carry."""

import numpy as np


class Model:
    def __init__(self, n_features, n_hidden, n_classes, keep_prob, l2, seed):
        self.rng = np.random.default_rng(seed)
        self.keep_prob = keep_prob
        self.l2 = l2
        self.W1 = self.rng.normal(0, np.sqrt(2 / n_features), (n_features, n_hidden))
        self.b1 = np.zeros(n_hidden)
        self.W2 = self.rng.normal(0, np.sqrt(2 / n_hidden), (n_hidden, n_hidden))
        self.b2 = np.zeros(n_hidden)
        self.W3 = self.rng.normal(0, np.sqrt(2 / n_hidden), (n_hidden, n_classes))
        self.b3 = np.zeros(n_classes)

    def dropout(self, a):
        mask = self.rng.random(a.shape) < self.keep_prob
        return a * mask / self.keep_prob, mask

    def forward(self, X, training=True):
        self.X = X
        self.h1 = np.maximum(0, X @ self.W1 + self.b1)
        if training:
            self.h1, self.mask1 = self.dropout(self.h1)
        self.h2 = np.maximum(0, self.h1 @ self.W2 + self.b2)
        if training:
            self.h2, self.mask2 = self.dropout(self.h2)
        logits = self.h2 @ self.W3 + self.b3
        logits -= np.max(logits, axis=1)[:, np.newaxis]
        exp = np.exp(logits)
        return exp / np.sum(exp, axis=1)[:, np.newaxis]

    def train_step(self, X, Y, lr):
        n = len(X)
        P = self.forward(X)
        d3 = (P - Y) / n
        dW3 = self.h2.T @ d3 + self.l2 * self.W3
        d2 = d3 @ self.W3.T
        d2 = d2 * self.mask2 / self.keep_prob
        d2[self.h2 <= 0] = 0
        dW2 = self.h1.T @ d2 + self.l2 * self.W2
        d1 = d2 @ self.W2.T
        d1 = d1 * self.mask1 / self.keep_prob
        d1[self.h1 <= 0] = 0
        dW1 = self.X.T @ d1 + self.l2 * self.W1
        self.W3 -= lr * dW3
        self.b3 -= lr * d3.sum(axis=0)
        self.W2 -= lr * dW2
        self.b2 -= lr * d2.sum(axis=0)
        self.W1 -= lr * dW1
        self.b1 -= lr * d1.sum(axis=0)


def cross_entropy(P, Y):
    return -np.mean(np.sum(Y * np.log(P + 1e-9), axis=1))


rng = np.random.default_rng(5)
prototypes = rng.random((10, 100))
labels = rng.integers(0, 10, 1500)
X = prototypes[labels] + rng.normal(0, 0.5, (1500, 100))
Y = np.zeros((1500, 10))
Y[np.arange(1500), labels] = 1
X_train, Y_train, X_test, Y_test = X[:1000], Y[:1000], X[1000:], Y[1000:]

model = Model(100, 128, 10, keep_prob=0.8, l2=1e-3, seed=0)
for epoch in range(70):
    order = rng.permutation(len(X_train))
    for start in range(0, len(X_train), 50):
        batch = order[start : start + 50]
        model.train_step(X_train[batch], Y_train[batch], 0.05)

P = model.forward(X_test, training=False)
accuracy = (P.argmax(axis=1) == Y_test.argmax(axis=1)).mean()
print("loss", cross_entropy(P, Y_test), "accuracy", accuracy)
