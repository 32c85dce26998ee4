"""A classifier with batch normalization by hand, forward and backward, between its dense layers."""

import numpy as np

np.random.seed(0)


def batchnorm_forward(x, gamma, beta, eps=1e-5):
    mu = np.mean(x, axis=0)
    xmu = x - mu
    var = np.mean(xmu**2, axis=0)
    sqrtvar = np.sqrt(var + eps)
    ivar = 1.0 / sqrtvar
    xhat = xmu * ivar
    out = gamma * xhat + beta
    return out, (xhat, gamma, xmu, ivar, sqrtvar, var, eps)


def batchnorm_backward(dout, cache):
    xhat, gamma, xmu, ivar, sqrtvar, var, eps = cache
    N, D = dout.shape
    dbeta = np.sum(dout, axis=0)
    dgamma = np.sum(dout * xhat, axis=0)
    dxhat = dout * gamma
    divar = np.sum(dxhat * xmu, axis=0)
    dxmu1 = dxhat * ivar
    dsqrtvar = -1.0 / (sqrtvar**2) * divar
    dvar = 0.5 * 1.0 / np.sqrt(var + eps) * dsqrtvar
    dsq = 1.0 / N * np.ones((N, D)) * dvar
    dxmu2 = 2 * xmu * dsq
    dx1 = dxmu1 + dxmu2
    dmu = -1 * np.sum(dx1, axis=0)
    dx2 = 1.0 / N * np.ones((N, D)) * dmu
    return dx1 + dx2, dgamma, dbeta


def softmax_loss(scores, y):
    probs = np.exp(scores - np.max(scores, axis=1, keepdims=True))
    probs /= np.sum(probs, axis=1, keepdims=True)
    N = scores.shape[0]
    loss = -np.sum(np.log(probs[np.arange(N), y])) / N
    dscores = probs.copy()
    dscores[np.arange(N), y] -= 1
    dscores /= N
    return loss, dscores


D, H, C = 32, 64, 5
centers = np.random.randn(C, D)
y = np.random.randint(0, C, size=2000)
X = 5 + 3 * (centers[y] + np.random.randn(2000, D))

W1 = 0.1 * np.random.randn(D, H)
b1 = np.zeros(H)
gamma1, beta1 = np.ones(H), np.zeros(H)
W2 = 0.1 * np.random.randn(H, H)
b2 = np.zeros(H)
gamma2, beta2 = np.ones(H), np.zeros(H)
W3 = 0.1 * np.random.randn(H, C)
b3 = np.zeros(C)
learning_rate = 0.05
running_loss = 0

for step in range(1500):
    choice = np.random.choice(len(X), 100, replace=False)
    xb, yb = X[choice], y[choice]

    a1 = np.dot(xb, W1) + b1
    n1, cache1 = batchnorm_forward(a1, gamma1, beta1)
    h1 = np.maximum(n1, 0)
    a2 = np.dot(h1, W2) + b2
    n2, cache2 = batchnorm_forward(a2, gamma2, beta2)
    h2 = np.maximum(n2, 0)
    scores = np.dot(h2, W3) + b3
    loss, dscores = softmax_loss(scores, yb)

    dW3, db3 = np.dot(h2.T, dscores), np.sum(dscores, axis=0)
    dh2 = np.dot(dscores, W3.T)
    dn2 = dh2 * (n2 > 0)
    da2, dgamma2, dbeta2 = batchnorm_backward(dn2, cache2)
    dW2, db2 = np.dot(h1.T, da2), np.sum(da2, axis=0)
    dh1 = np.dot(da2, W2.T)
    dn1 = dh1 * (n1 > 0)
    da1, dgamma1, dbeta1 = batchnorm_backward(dn1, cache1)
    dW1, db1 = np.dot(xb.T, da1), np.sum(da1, axis=0)

    W1 -= learning_rate * dW1
    b1 -= learning_rate * db1
    gamma1 -= learning_rate * dgamma1
    beta1 -= learning_rate * dbeta1
    W2 -= learning_rate * dW2
    b2 -= learning_rate * db2
    gamma2 -= learning_rate * dgamma2
    beta2 -= learning_rate * dbeta2
    W3 -= learning_rate * dW3
    b3 -= learning_rate * db3
    running_loss = 0.95 * running_loss + 0.05 * loss

print("loss", running_loss)
