"""Regression of a function of two variables, trained by Adam written out by hand; parameters in a dictionary."""

import numpy as np


def init_params(sizes, rng):
    params = {}
    for i, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:])):
        limit = np.sqrt(6 / (n_in + n_out))
        params[f"W{i}"] = rng.uniform(-limit, limit, size=(n_in, n_out))
        params[f"b{i}"] = np.zeros(n_out)
    return params


def leaky_relu(z):
    return np.where(z > 0, z, 0.01 * z)


def leaky_relu_grad(z):
    return np.where(z > 0, 1.0, 0.01)


def loss_and_grads(params, x, y):
    n_layers = len(params) // 2
    a, inputs, zs = x, [], []
    for i in range(n_layers):
        inputs.append(a)
        z = a @ params[f"W{i}"] + params[f"b{i}"]
        zs.append(z)
        a = leaky_relu(z) if i < n_layers - 1 else z

    error = a - y
    loss = np.mean(error**2)
    grads = {}
    delta = 2 * error / error.size
    for i in reversed(range(n_layers)):
        grads[f"W{i}"] = inputs[i].T @ delta
        grads[f"b{i}"] = np.sum(delta, axis=0)
        if i > 0:
            delta = (delta @ params[f"W{i}"].T) * leaky_relu_grad(zs[i - 1])
    return loss, grads


class Adam:
    def __init__(self, params, lr=0.001, beta1=0.9, beta2=0.999, eps=1e-8):
        self.lr, self.beta1, self.beta2, self.eps = lr, beta1, beta2, eps
        self.m = {k: np.zeros_like(v) for k, v in params.items()}
        self.v = {k: np.zeros_like(v) for k, v in params.items()}
        self.t = 0

    def step(self, params, grads):
        self.t += 1
        for key in params:
            self.m[key] = self.beta1 * self.m[key] + (1 - self.beta1) * grads[key]
            self.v[key] = self.beta2 * self.v[key] + (1 - self.beta2) * grads[key] ** 2
            m_hat = self.m[key] / (1 - self.beta1**self.t)
            v_hat = self.v[key] / (1 - self.beta2**self.t)
            params[key] -= self.lr * m_hat / (np.sqrt(v_hat) + self.eps)


rng = np.random.default_rng(7)
x = rng.uniform(-2, 2, size=(2000, 2))
y = np.sin(2 * x[:, :1]) * np.cos(x[:, 1:]) + 0.05 * rng.normal(size=(2000, 1))

params = init_params([2, 64, 64, 1], rng)
optimizer = Adam(params, lr=0.003)
for epoch in range(110):
    order = rng.permutation(len(x))
    losses = []
    for batch in np.array_split(order, 31):
        loss, grads = loss_and_grads(params, x[batch], y[batch])
        optimizer.step(params, grads)
        losses.append(loss)

print("loss", np.mean(losses))
