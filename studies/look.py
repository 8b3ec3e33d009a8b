"""What a net sees: the computations behind studies.report, and a layer's signals for studies.plateau, whose nets train;
all others are in eval mode. Nets are of any kind that a checkpoint holds; inputs are (n, 3, S, S) float32 as the net
takes them, with the mean subtracted."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints import LAYERS, layer_called
from model import MapNorm

CONVOLUTIONS = ("conv1", "conv2", "conv3", "conv4", "conv5")


# ---------------------------------------------------------------------------------------------- layers


def receptive_field(net: nn.Module, name: str) -> tuple[int, int, int]:
    """(size, stride, start) of a convolution's outputs, by AlexNet's name: the one at (i, j) sees the input's rows from
    start + i * stride on, `size` of them, and columns likewise; some may lie beyond the edge."""
    size, stride, start = 1, 1, 0
    wanted = layer_called(net, name)
    for layer in net.modules():  # in the order of forward, as far as places go
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            kernel, step, padding = (v if isinstance(v, int) else v[0] for v in (
                layer.kernel_size, layer.stride, layer.padding
            ))
            size, start, stride = size + (kernel - 1) * stride, start - padding * stride, stride * step
        elif isinstance(layer, MapNorm):
            size, start = size + 4 * stride, start - 2 * stride
        if layer is wanted:
            break
    return size, stride, start


@torch.no_grad()
def outputs(net: nn.Module, names: Iterable[str], inputs: Tensor, of=lambda output: output.float().clone()) -> dict:
    """of() of what the layers of these names give for inputs, before their activations, which may work in place: a
    copy, if not told otherwise."""
    found, hooks = {}, []
    for name in names:
        def keep(_layer, _inputs, output, name=name):
            found[name] = of(output)

        hooks.append(layer_called(net, name).register_forward_hook(keep))
    net(inputs)
    for hook in hooks:
        hook.remove()
    return found


def signals(net: nn.Module, inputs: Tensor) -> dict[str, tuple[float, float, float, float]]:
    """Of each layer's outputs, before the activation: mean, standard deviation, how much of that is due to the picture
    (a unit's standard deviation over pictures, root mean square over units), and the share of units in percent that are
    0 or below for all pictures: dead, behind a ReLU."""
    found = {}
    for name, output in outputs(net, LAYERS, inputs).items():
        by_unit = output.flatten(1)
        over_pictures = by_unit.var(0, correction=0).mean().sqrt()
        units = output if output.ndim == 2 else output.amax((2, 3))  # a kernel is dead where all its places are
        dead = (units <= 0).all(0).float().mean()
        found[name] = tuple(float(v) for v in (output.mean(), output.std(), over_pictures, 100 * dead))
    return found


def saturation(kernels: np.ndarray) -> float:
    """How coloured kernels (n, 3, k, k) are, 0 to 1: the share of their squares that is left when each pixel's mean
    over the three colours is taken off. 0: grey; random ones have 2/3."""
    grey = kernels.mean(1, keepdims=True)
    return float(((kernels - grey) ** 2).sum() / max(1e-30, (kernels**2).sum()))


# ---------------------------------------------------------------------------------------------- patches


@torch.no_grad()
def strongest(net: nn.Module, names: Iterable[str], batches: Iterable[Tensor], each: int = 9, units: int = 6) -> dict:
    """For the `units` kernels of each layer whose `each` strongest answers stand out furthest from the kernel's usual
    maximum: {layer: [(kernel, [(picture, row, column), ...]), ...]}, one answer a picture. batches: of inputs."""

    def peaks(output):
        peak, place = output.flatten(2).max(2)
        return peak.float().cpu(), torch.stack([place // output.shape[3], place % output.shape[3]], 2).cpu()

    seen = [outputs(net, names, inputs, peaks) for inputs in batches]
    found = {}
    for name in names:
        peak, place = (torch.cat(part) for part in zip(*(batch[name] for batch in seen), strict=True))
        best = peak.topk(min(each, len(peak)), 0)
        contrast = (best.values.mean(0) - peak.mean(0)) / peak.std(0, correction=0).clamp_min(1e-12)
        contrast[best.values.mean(0) <= 0] = -1  # never passes a ReLU
        chosen = contrast.topk(min(units, len(contrast))).indices.tolist()
        found[name] = [
            (kernel, [(picture, *place[picture, kernel].tolist()) for picture in best.indices[:, kernel].tolist()])
            for kernel in chosen
        ]
    return found


def cut(picture: np.ndarray, field: tuple[int, int, int], row: int, column: int) -> np.ndarray:
    """What an output at (row, column) sees of a picture (S, S, C): the part that lies in the picture."""
    size, stride, start = field
    top, left = start + row * stride, start + column * stride
    return picture[max(0, top) : max(1, top + size), max(0, left) : max(1, left + size)]


# ---------------------------------------------------------------------------------------------- neighbours


def nearest(queries: Tensor, among: Tensor, count: int = 6, at_once: int = 500) -> Tensor:
    """(n, count) indices of the rows of `among` that are nearest to each row of `queries`, the nearest first."""
    squares = among.pow(2).sum(1)
    found = []
    for part in queries.split(at_once):
        distances = squares - 2 * part @ among.T  # but for the query's own square, the same for all
        found.append(distances.topk(min(count, len(among)), largest=False).indices)
    return torch.cat(found)


def share_of_right(neighbours: Tensor, labels: Tensor, among_labels: Tensor) -> tuple[float, float]:
    """How many of the neighbours have their query's label, in percent, and half the 95% interval of that mean over
    queries, NaN where there is one query."""
    shares = 100 * (among_labels[neighbours] == labels[:, None]).double().mean(1)
    half = float(1.96 * shares.std() / len(shares) ** 0.5) if len(shares) > 1 else math.nan
    return float(shares.mean()), half


# ---------------------------------------------------------------------------------------------- where it looks


@torch.no_grad()
def chances(net: nn.Module, inputs: Tensor, label: int, at_once: int = 64) -> Tensor:
    """(n,) the probability of a class for each input."""
    return torch.cat([net(part).double().softmax(1)[:, label] for part in inputs.split(at_once)])


def occlusion(net: nn.Module, picture: Tensor, label: int, square: int, step: int) -> tuple[np.ndarray, float]:
    """How much the probability of a class falls where a grey square (the mean) covers the input (3, S, S): the mean
    over all squares that cover a pixel, (S, S); and the probability with nothing covered."""
    size = picture.shape[1]
    corners = list(range(0, size - square + 1, step))
    if corners[-1] != size - square:
        corners.append(size - square)
    places = [(top, left) for top in corners for left in corners]
    covered = picture.repeat(len(places), 1, 1, 1)
    for image, (top, left) in zip(covered, places, strict=True):
        image[:, top : top + square, left : left + square] = 0
    before = chances(net, picture[None], label)[0].item()
    falls = before - chances(net, covered, label).cpu().numpy()
    total, times = np.zeros((size, size)), np.zeros((size, size))
    for fall, (top, left) in zip(falls, places, strict=True):
        total[top : top + square, left : left + square] += fall
        times[top : top + square, left : left + square] += 1
    return total / times, before


def deletion(net: nn.Module, picture: Tensor, label: int, order: np.ndarray, block: int, steps: int) -> list[float]:
    """The probability of a class while blocks of an input (3, S, S) are covered one after the other, at 0, 1 / steps,
    ... 1 of them. order: the blocks' numbers, counted in rows of S / block, rounded up."""
    side = -(-picture.shape[1] // block)
    images, image, done = [picture], picture.clone(), 0
    for step in range(1, steps + 1):
        until = round(step * len(order) / steps)
        for number in order[done:until]:
            row, column = int(number) // side * block, int(number) % side * block
            image[:, row : row + block, column : column + block] = 0
        done = until
        images.append(image.clone())
    return chances(net, torch.stack(images), label).tolist()


def by_block(importance: np.ndarray, block: int) -> np.ndarray:
    """The order in which to cover blocks: those with the highest mean importance first."""
    size = len(importance)
    corners = range(0, size, block)
    means = [importance[r : r + block, c : c + block].mean() for r in corners for c in corners]
    return np.argsort(-np.array(means), kind="stable")


# ---------------------------------------------------------------------------------------------- calibration


def calibration(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> tuple[list[tuple], float]:
    """[(lower edge, pictures, mean confidence, share right)] of the bins that have pictures, and the expected
    calibration error: the mean difference of the last two, weighted by pictures (Guo et al. 2017)."""
    number = np.minimum((confidence * bins).astype(int), bins - 1)
    rows = []
    for i in range(bins):
        mine = number == i
        if mine.any():
            rows.append((i / bins, int(mine.sum()), float(confidence[mine].mean()), float(right[mine].mean())))
    error = sum(count * abs(sure - share) for _, count, sure, share in rows) / max(1, len(confidence))
    return rows, float(error)
