"""From stored pictures to the net's input: the choice of crops and mirrors; mean and colour noise, on the device.

What happens to sample i in epoch e stands in tables made from (seed, e) and the run's options, so it does not depend on
the number of workers or processes, nor on where a run was stopped and resumed.
"""

from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from data.store import Crops

COLOURS = ("2012", "paper", "off")
AT_ONCE = 128  # views that a net looks at together in testing
CPU_PIXELS = 16 * 224**2  # and of how many pixels on a CPU: 80 views of 224 at once take a quarter longer than 16
NOISE = 0.1  # standard deviation of the colour noise's factors (paper, section 4.1)


@dataclass
class EpochTables:
    """One epoch's choices. order: (N,) draws in the order of training. The others are indexed by draw: offsets (N, 2)
    top and left of the crop, mirror (N,) bool, colour (N, 3) from the standard normal distribution; samples (N,) which
    picture a draw is, or None where each draw is the picture of the same number."""

    order: np.ndarray
    offsets: np.ndarray
    mirror: np.ndarray
    colour: np.ndarray
    samples: np.ndarray | None = None

    def pictures(self, draws: np.ndarray) -> np.ndarray:
        return draws if self.samples is None else self.samples[draws]


def epoch_tables(
    seed: int, epoch: int, count: int, margin: int, crop_runs: int = 1, mirrored: bool = True, labels=None
) -> EpochTables:
    """Tables for `count` samples; crop offsets are uniform over 0..margin, both ends included. crop_runs: so many
    samples in a row, in the order of training, have the same offsets and mirroring (2012 code: 32). mirrored: half of
    them are, or none. labels: those of all samples, to draw each class equally often."""

    def stream(number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, number]))

    order = stream(0).permutation(count)
    offsets = stream(1).integers(0, margin, size=(count, 2), endpoint=True)
    mirror = stream(2).random(count) < (0.5 if mirrored else 0)
    if crop_runs > 1:
        runs = np.arange(count) // crop_runs
        offsets[order], mirror[order] = offsets[runs], mirror[runs]
    return EpochTables(
        order=order,
        offsets=offsets,
        mirror=mirror,
        colour=stream(3).standard_normal((count, 3), dtype=np.float32),
        samples=None if labels is None else balanced(stream(4), np.asarray(labels)),
    )


def balanced(generator: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """As many samples as there are labels, each class as often as any other, or once more; within a class each sample
    as often as any other, or once more."""
    classes = generator.permutation(np.unique(labels))
    share, more = divmod(len(labels), len(classes))
    drawn = []
    for i, label in enumerate(classes):
        members, wanted = np.flatnonzero(labels == label), share + (i < more)
        rounds = [generator.permutation(members) for _ in range(-(-wanted // len(members)))]
        drawn += [part[: max(0, wanted - len(members) * n)] for n, part in enumerate(rounds)]
    return np.concatenate(drawn)


class Augment:
    """Turns uint8 crops or whole pictures into float32 inputs (n, 3, S, S), channels_last, 0..255 minus the mean.

    image_size: S. mean: (H, W, C) or (1, 1, C) float; of a mean image the centre S x S is subtracted from every crop,
    wherever the crop is (2012 code). C is 1 for grey sets, which are repeated to three channels here.
    colour: "2012", "paper" or "off"; pca as in a store's manifest.
    """

    def __init__(self, image_size: int, mean, *, colour: str = "off", pca=None, device="cpu"):
        mean = torch.as_tensor(mean, dtype=torch.float32)
        if mean.shape[0] > 1:
            top = (mean.shape[0] - image_size) // 2
            left = (mean.shape[1] - image_size) // 2
            mean = mean[top : top + image_size, left : left + image_size]
        self.size, self.device, self.colour = image_size, torch.device(device), colour
        # In full even where it is three numbers: whole rows are subtracted several times as fast.
        self.mean = mean.expand(image_size, image_size, 3).contiguous().to(self.device)
        if colour != "off":
            values = torch.tensor(pca["eigenvalues"])
            # 2012 code: standard deviations of the components. Paper: eigenvalues, read as those of pixels in 0..1.
            scale = values.sqrt() if colour == "2012" else values / 255
            self.components = (scale[:, None] * torch.tensor(pca["eigenvectors"])).to(self.device)

    def train(self, crops: Tensor, factors: np.ndarray, out: Tensor | None = None) -> Tensor:
        """Training inputs of crops (n, S, S, C); factors are their rows of the epoch's colour table, (n, 3). out:
        inputs of as many crops that are no longer needed, to be overwritten: new memory would take longer than all
        the rest."""
        inputs = self._float(crops, out if out is None else out.permute(0, 2, 3, 1))
        if self.colour != "off":
            shifts = upload(factors, self.device) * NOISE @ self.components  # one a picture
            inputs.view(len(inputs), self.size, -1).add_(shifts.repeat(1, self.size)[:, None, :])
            if self.colour == "2012":
                inputs /= 1 + NOISE  # keeps the pictures' scale (2012 code)
        return inputs.permute(0, 3, 1, 2)

    def center(self, images: Tensor) -> Tensor:
        """Inputs from the centre crops."""
        return self._view(images, (images.shape[1] - self.size) // 2, (images.shape[2] - self.size) // 2, False)

    def ten_crop(self, images: Tensor):
        """The paper's ten inputs a picture (section 4.1), one batch at a time: four corners and centre, then the
        same mirrored."""
        bottom, right = images.shape[1] - self.size, images.shape[2] - self.size
        for mirrored in (False, True):
            for top, left in ((0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)):
                yield self._view(images, top, left, mirrored)

    def views(self, images: Tensor, ten_crop: bool = False):
        """What a net looks at in testing: the ten inputs a picture, or the centre crops alone; of few pictures several
        views at a time, one after the other, since a net is slow with small batches."""
        views = iter(self.ten_crop(images) if ten_crop else [self.center(images)])
        at_once = AT_ONCE if self.device.type != "cpu" else min(AT_ONCE, CPU_PIXELS // self.size**2)
        while group := list(islice(views, max(1, at_once // len(images)))):
            yield torch.cat(group) if len(group) > 1 else group[0]

    def _view(self, images: Tensor, top: int, left: int, mirrored: bool) -> Tensor:
        crop = images[:, top : top + self.size, left : left + self.size]
        return self._float(crop.flip(2) if mirrored else crop).permute(0, 3, 1, 2)

    def _float(self, crops: Tensor, out: Tensor | None = None) -> Tensor:
        if crops.shape[3] == 1:
            return torch.sub(crops, self.mean, out=out)  # one channel becomes three
        inputs = crops.float() if out is None else out.copy_(crops)
        return inputs.sub_(self.mean)  # half the time of one subtraction of two types


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device, without waiting for what the device is doing."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def random_crops(images: Tensor, samples: np.ndarray, crops: Crops) -> Tensor:
    """Crops (n, S, S, C) of the pictures images[samples], of (N, H, W, C). No loop over pictures: `windows`
    has the square that starts at each byte, overlapping and without a copy, and the crops are a choice of them."""
    _, height, width, channels = images.shape
    row, side = width * channels, crops.size * channels
    flat = images.contiguous().view(-1)
    windows = flat.as_strided((max(0, len(flat) - (crops.size - 1) * row - side + 1), crops.size, side), (1, row, 1))
    starts = samples * height * row + crops.offsets @ np.array([row, channels])

    def cut(which: np.ndarray) -> Tensor:
        chosen = windows.index_select(0, upload(starts[which], images.device))
        return chosen.view(-1, crops.size, crops.size, channels)

    straight, mirrored = np.flatnonzero(~crops.mirror), np.flatnonzero(crops.mirror)
    places = upload(np.argsort(np.concatenate([straight, mirrored])), images.device)
    return torch.cat([cut(straight), cut(mirrored).flip(2)]).index_select(0, places)
