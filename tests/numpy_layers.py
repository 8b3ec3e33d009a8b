"""Layers written out in numpy float64, from the sources' definitions: what the tests compare whole nets with. Pictures
are (C, H, W), one at a time."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def convolution(x, weight, bias, stride=1, pad=0):
    """Kernels (out, C, k, k); zeros beyond the edges; pad is a number or ((top, bottom), (left, right))."""
    around = ((pad, pad), (pad, pad)) if isinstance(pad, int) else pad
    windows = sliding_window_view(np.pad(x, ((0, 0), *around)), weight.shape[2:], axis=(1, 2))
    windows = windows[:, ::stride, ::stride]  # (C, rows, columns, k, k)
    return np.tensordot(weight, windows, ([1, 2, 3], [0, 3, 4])) + bias[:, None, None]


def max_pool(x, size=3, stride=2):
    """Windows that lie in the picture as a whole."""
    return sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride].max((3, 4))


def lrn(x, k=2.0, alpha=1e-4 / 5, around=2):
    """Over five channels, or `around` to each side; alpha is what multiplies the sum of the squares."""
    squares, out = x**2, np.empty_like(x)
    for channel in range(len(x)):
        total = squares[max(0, channel - around) : channel + around + 1].sum(0)
        out[channel] = x[channel] / (k + alpha * total) ** 0.75
    return out


def map_norm(x):
    """Over the 5 x 5 pixels around, clipped at the edges of the map: k 1, scale 0.001 / 25."""
    out = np.empty_like(x)
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            around = x[:, max(0, row - 2) : row + 3, max(0, column - 2) : column + 3]
            out[:, row, column] = x[:, row, column] / (1 + 0.001 / 25 * (around**2).sum((1, 2))) ** 0.75
    return out


def relu(x):
    return np.maximum(x, 0)


def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()
