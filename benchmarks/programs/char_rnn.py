"""A recurrent network that learns to predict the next character of a text; back-propagation through time, Adagrad."""

import numpy as np

np.random.seed(0)
text = "the quick brown fox jumps over the lazy dog. she sells sea shells by the sea shore. " * 20
chars = sorted(set(text))
char_to_index = {c: i for i, c in enumerate(chars)}
vocab_size, hidden_size, seq_length, learning_rate = len(chars), 64, 25, 0.02

Wxh = np.random.randn(hidden_size, vocab_size) * 0.01
Whh = np.random.randn(hidden_size, hidden_size) * 0.01
Why = np.random.randn(vocab_size, hidden_size) * 0.01
bh = np.zeros((hidden_size, 1))
by = np.zeros((vocab_size, 1))


def loss_and_gradients(inputs, targets, h):
    xs, hs, ps = [], [h], []
    loss = 0
    for t in range(len(inputs)):
        x = np.zeros((vocab_size, 1))
        x[inputs[t]] = 1
        h = np.tanh(np.dot(Wxh, x) + np.dot(Whh, h) + bh)
        y = np.dot(Why, h) + by
        p = np.exp(y) / np.sum(np.exp(y))
        loss += -np.log(p[targets[t], 0])
        xs.append(x)
        hs.append(h)
        ps.append(p)

    dWxh, dWhh, dWhy = np.zeros_like(Wxh), np.zeros_like(Whh), np.zeros_like(Why)
    dbh, dby = np.zeros_like(bh), np.zeros_like(by)
    dh_next = np.zeros_like(h)
    for t in reversed(range(len(inputs))):
        dy = np.copy(ps[t])
        dy[targets[t]] -= 1
        dWhy += np.dot(dy, hs[t + 1].T)
        dby += dy
        dh = np.dot(Why.T, dy) + dh_next
        draw = (1 - hs[t + 1] * hs[t + 1]) * dh
        dbh += draw
        dWxh += np.dot(draw, xs[t].T)
        dWhh += np.dot(draw, hs[t].T)
        dh_next = np.dot(Whh.T, draw)
    grads = [dWxh, dWhh, dWhy, dbh, dby]
    for grad in grads:
        np.clip(grad, -5, 5, out=grad)
    return loss, grads, h


params = [Wxh, Whh, Why, bh, by]
memory = [np.zeros_like(p) for p in params]
smooth_loss = -np.log(1.0 / vocab_size) * seq_length
position = 0
for step in range(1200):
    if position + seq_length + 1 >= len(text) or step == 0:
        h_prev = np.zeros((hidden_size, 1))
        position = 0
    inputs = [char_to_index[c] for c in text[position : position + seq_length]]
    targets = [char_to_index[c] for c in text[position + 1 : position + seq_length + 1]]
    loss, grads, h_prev = loss_and_gradients(inputs, targets, h_prev)
    smooth_loss = smooth_loss * 0.99 + loss * 0.01
    for param, grad, mem in zip(params, grads, memory):
        mem += grad * grad
        param += -learning_rate * grad / np.sqrt(mem + 1e-8)
    position += seq_length

print("loss", smooth_loss)
