"""A small GAN that learns a normal distribution in one dimension."""

import numpy as np

np.random.seed(2)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def real_samples(n):
    return np.random.normal(4, 0.5, (n, 1))


class Generator:
    def __init__(self, hidden):
        self.W1 = np.random.randn(1, hidden) * 0.5
        self.b1 = np.zeros((1, hidden))
        self.W2 = np.random.randn(hidden, 1) * 0.5
        self.b2 = np.zeros((1, 1))

    def forward(self, z):
        self.z = z
        self.h = np.tanh(np.dot(z, self.W1) + self.b1)
        return np.dot(self.h, self.W2) + self.b2

    def backward(self, dx, lr):
        dW2 = np.dot(self.h.T, dx)
        db2 = np.sum(dx, axis=0, keepdims=True)
        dh = np.dot(dx, self.W2.T) * (1 - np.power(self.h, 2))
        dW1 = np.dot(self.z.T, dh)
        db1 = np.sum(dh, axis=0, keepdims=True)
        self.W1 -= lr * dW1
        self.b1 -= lr * db1
        self.W2 -= lr * dW2
        self.b2 -= lr * db2


class Discriminator:
    def __init__(self, hidden):
        self.W1 = np.random.randn(1, hidden) * 0.5
        self.b1 = np.zeros((1, hidden))
        self.W2 = np.random.randn(hidden, 1) * 0.5
        self.b2 = np.zeros((1, 1))

    def forward(self, x):
        self.x = x
        self.h = np.tanh(np.dot(x, self.W1) + self.b1)
        self.p = sigmoid(np.dot(self.h, self.W2) + self.b2)
        return self.p

    def backward(self, dlogit, lr=None):
        dW2 = np.dot(self.h.T, dlogit)
        db2 = np.sum(dlogit, axis=0, keepdims=True)
        dh = np.dot(dlogit, self.W2.T) * (1 - np.power(self.h, 2))
        dW1 = np.dot(self.x.T, dh)
        db1 = np.sum(dh, axis=0, keepdims=True)
        dx = np.dot(dh, self.W1.T)
        if lr is not None:
            self.W1 -= lr * dW1
            self.b1 -= lr * db1
            self.W2 -= lr * dW2
            self.b2 -= lr * db2
        return dx


batch, steps, lr = 32, 6000, 0.05
G = Generator(8)
D = Discriminator(16)
for step in range(steps):
    real = real_samples(batch)
    fake = G.forward(np.random.randn(batch, 1))

    p_real = D.forward(real)
    D.backward((p_real - 1) / batch, lr)
    p_fake = D.forward(fake)
    D.backward(p_fake / batch, lr)
    d_loss = -np.mean(np.log(p_real + 1e-8) + np.log(1 - p_fake + 1e-8))

    fake = G.forward(np.random.randn(batch, 1))
    p = D.forward(fake)
    g_loss = -np.mean(np.log(p + 1e-8))
    G.backward(D.backward((p - 1) / batch), lr)

samples = G.forward(np.random.randn(1000, 1))
print("mean", samples.mean(), "standard deviation", samples.std())
