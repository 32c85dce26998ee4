"""A GAN on images of 28 x 28 pixels: leaky ReLU, tanh at the generator's end, Adam for both networks."""

import numpy as np

rng = np.random.default_rng(3)


def make_digits(count):
    """Draw images of ten blurred patterns, 28 x 28 pixels from -1 to 1."""
    patterns = rng.random((10, 7, 7)) > 0.6
    patterns = patterns.repeat(4, axis=1).repeat(4, axis=2).reshape(10, 784)
    images = patterns[rng.integers(0, 10, count)] + 0.1 * rng.standard_normal((count, 784))
    return np.clip(images, 0, 1) * 2 - 1


def lrelu(x, alpha=0.2):
    return np.maximum(x, alpha * x)


def dlrelu(x, alpha=0.2):
    dx = np.ones_like(x)
    dx[x < 0] = alpha
    return dx


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-np.clip(x, -50, 50)))


class AdamOptimizer:
    def __init__(self, params, lr=0.0002, beta1=0.5, beta2=0.999):
        self.params, self.lr, self.beta1, self.beta2 = params, lr, beta1, beta2
        self.ms = [np.zeros(p.shape) for p in params]
        self.vs = [np.zeros(p.shape) for p in params]
        self.t = 0

    def update(self, grads):
        self.t += 1
        for p, g, m, v in zip(self.params, grads, self.ms, self.vs):
            m[...] = self.beta1 * m + (1 - self.beta1) * g
            v[...] = self.beta2 * v + (1 - self.beta2) * np.square(g)
            m_hat = m / (1 - self.beta1**self.t)
            v_hat = v / (1 - self.beta2**self.t)
            p -= self.lr * m_hat / (np.sqrt(v_hat) + 1e-8)


class Generator:
    def __init__(self, n_z, n_h, n_out):
        self.w0 = rng.normal(0, 0.05, (n_z, n_h))
        self.b0 = np.zeros(n_h)
        self.w1 = rng.normal(0, 0.05, (n_h, n_out))
        self.b1 = np.zeros(n_out)
        self.optimizer = AdamOptimizer([self.w0, self.b0, self.w1, self.b1])

    def forward(self, z):
        self.z = z
        self.h0 = np.dot(z, self.w0) + self.b0
        self.h0a = lrelu(self.h0)
        self.out = np.tanh(np.dot(self.h0a, self.w1) + self.b1)
        return self.out

    def backward(self, dout):
        d1 = dout * (1 - self.out**2)
        dw1 = np.dot(self.h0a.T, d1)
        db1 = np.sum(d1, axis=0)
        d0 = np.dot(d1, self.w1.T) * dlrelu(self.h0)
        dw0 = np.dot(self.z.T, d0)
        db0 = np.sum(d0, axis=0)
        self.optimizer.update([dw0, db0, dw1, db1])


class Discriminator:
    def __init__(self, n_in, n_h):
        self.w0 = rng.normal(0, 0.05, (n_in, n_h))
        self.b0 = np.zeros(n_h)
        self.w1 = rng.normal(0, 0.05, (n_h, 1))
        self.b1 = np.zeros(1)
        self.optimizer = AdamOptimizer([self.w0, self.b0, self.w1, self.b1])

    def forward(self, x):
        self.x = x
        self.h0 = np.dot(x, self.w0) + self.b0
        self.h0a = lrelu(self.h0)
        return sigmoid(np.dot(self.h0a, self.w1) + self.b1)

    def backward(self, dlogit):
        dw1 = np.dot(self.h0a.T, dlogit)
        db1 = np.sum(dlogit, axis=0)
        d0 = np.dot(dlogit, self.w1.T) * dlrelu(self.h0)
        dw0 = np.dot(self.x.T, d0)
        db0 = np.sum(d0, axis=0)
        return [dw0, db0, dw1, db1], np.dot(d0, self.w0.T)


images = make_digits(2048)
batch_size, n_z = 64, 100
generator = Generator(n_z, 128, 784)
discriminator = Discriminator(784, 128)
d_losses, g_losses = [], []
for epoch in range(3):
    rng.shuffle(images)
    for i in range(len(images) // batch_size):
        real = images[i * batch_size : (i + 1) * batch_size]
        fake = generator.forward(rng.uniform(-1, 1, (batch_size, n_z)))

        p_real = discriminator.forward(real)
        grads_real, _ = discriminator.backward((p_real - 0.9) / batch_size)
        p_fake = discriminator.forward(fake)
        grads_fake, _ = discriminator.backward(p_fake / batch_size)
        discriminator.optimizer.update([a + b for a, b in zip(grads_real, grads_fake)])

        p = discriminator.forward(fake)
        _, dx = discriminator.backward((p - 1) / batch_size)
        generator.backward(dx)

        d_losses.append(-np.mean(np.log(p_real + 1e-8)) - np.mean(np.log(1 - p_fake + 1e-8)))
        g_losses.append(-np.mean(np.log(p + 1e-8)))

print("losses", np.mean(d_losses[-10:]), np.mean(g_losses[-10:]))
