"""An autoencoder of images, 784-64-16-64-784, with sigmoid units and RMSprop."""

import numpy as np

rng = np.random.default_rng(12)


def make_images(count):
    """Draw images of 28 x 28 pixels, each with three bright spots."""
    yy, xx = np.mgrid[0:28, 0:28]
    images = np.zeros((count, 28, 28))
    for i in range(count):
        for _ in range(3):
            cy, cx = rng.uniform(4, 24, 2)
            images[i] += np.exp(-((yy - cy) ** 2 + (xx - cx) ** 2) / 10)
    return np.minimum(images, 1).reshape(count, 784)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def d_sigmoid(a):
    return a * (1 - a)


sizes = [784, 64, 16, 64, 784]
weights = [rng.normal(0, 1 / np.sqrt(n), (n, m)) for n, m in zip(sizes[:-1], sizes[1:])]
biases = [np.zeros((1, m)) for m in sizes[1:]]
cache_w = [np.zeros(w.shape) for w in weights]
cache_b = [np.zeros(b.shape) for b in biases]
lr, decay, epsilon = 0.002, 0.9, 1e-8

images = make_images(1000)
for epoch in range(20):
    order = rng.permutation(len(images))
    total = 0
    for start in range(0, len(images), 50):
        x = images[order[start : start + 50]]
        activations = [x]
        for w, b in zip(weights, biases):
            activations.append(sigmoid(activations[-1] @ w + b))

        error = activations[-1] - x
        total += np.sum(error**2)
        delta = error * d_sigmoid(activations[-1]) / len(x)
        for i in reversed(range(len(weights))):
            dw = activations[i].T @ delta
            db = np.sum(delta, axis=0, keepdims=True)
            if i > 0:
                delta = (delta @ weights[i].T) * d_sigmoid(activations[i])
            cache_w[i] = decay * cache_w[i] + (1 - decay) * dw**2
            cache_b[i] = decay * cache_b[i] + (1 - decay) * db**2
            weights[i] -= lr * dw / (np.sqrt(cache_w[i]) + epsilon)
            biases[i] -= lr * db / (np.sqrt(cache_b[i]) + epsilon)

print("squared error of an image", total / len(images))
