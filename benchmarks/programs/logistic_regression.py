"""Logistic regression for two classes by gradient descent, and one against the rest for several."""

import numpy as np


class LogisticRegression:
    def __init__(self, lr=0.1, n_iters=500):
        self.lr = lr
        self.n_iters = n_iters
        self.weights = None
        self.bias = None

    def _sigmoid(self, x):
        return 1 / (1 + np.exp(-x))

    def fit(self, X, y):
        n_samples, n_features = X.shape
        self.weights = np.zeros(n_features)
        self.bias = 0
        self.losses = []
        for _ in range(self.n_iters):
            linear = np.dot(X, self.weights) + self.bias
            predicted = self._sigmoid(linear)
            dw = (1 / n_samples) * np.dot(X.T, (predicted - y))
            db = (1 / n_samples) * np.sum(predicted - y)
            self.weights -= self.lr * dw
            self.bias -= self.lr * db
            predicted = np.clip(predicted, 1e-15, 1 - 1e-15)
            self.losses.append(-np.mean(y * np.log(predicted) + (1 - y) * np.log(1 - predicted)))

    def predict_proba(self, X):
        return self._sigmoid(np.dot(X, self.weights) + self.bias)

    def predict(self, X):
        return np.where(self.predict_proba(X) > 0.5, 1, 0)


np.random.seed(6)
centers = 1.5 * np.random.randn(5, 30)
labels = np.random.randint(0, 5, 1000)
X = centers[labels] + 2 * np.random.randn(1000, 30)
X = (X - X.mean(axis=0)) / X.std(axis=0)
X_train, X_test, y_train, y_test = X[:800], X[800:], labels[:800], labels[800:]

two = LogisticRegression()
two.fit(X_train, (y_train == 0).astype(int))
binary = np.sum(two.predict(X_test) == (y_test == 0)) / len(y_test)

scores, losses = [], []
for c in range(5):
    model = LogisticRegression(lr=0.2, n_iters=4000)
    model.fit(X_train, np.where(y_train == c, 1, 0))
    scores.append(model.predict_proba(X_test))
    losses.append(model.losses[-1])
accuracy = np.mean(np.argmax(np.array(scores), axis=0) == y_test)
print("loss", np.mean(losses), "accuracy of two classes", binary, "of all", accuracy)
