"""From stored pictures to the net's input, on the device: crops, mirrors, mean, colour noise.

What happens to sample i in epoch e stands in tables made from (seed, e) alone, so it does not depend on the number
of workers or processes, nor on where a run was stopped and resumed.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

COLOURS = ("2012", "paper", "off")
NOISE = 0.1  # standard deviation of the colour noise's factors (paper, section 4.1)


@dataclass
class EpochTables:
    """One epoch's choices. order: (N,) sample indices in the order of training. The others are indexed by sample:
    offsets (N, 2) top and left of the crop, mirror (N,) bool, colour (N, 3) normal with mean 0 and deviation 1."""

    order: np.ndarray
    offsets: np.ndarray
    mirror: np.ndarray
    colour: np.ndarray


def epoch_tables(seed: int, epoch: int, count: int, margin: int, crop_runs: int = 1) -> EpochTables:
    """Tables for `count` samples; crop offsets are uniform over 0..margin, both ends included. crop_runs: so many
    samples in a row, in the order of training, have the same offsets and mirroring (2012 code: 32)."""

    def stream(number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, number]))

    order = stream(0).permutation(count)
    offsets = stream(1).integers(0, margin, size=(count, 2), endpoint=True)
    mirror = stream(2).random(count) < 0.5
    if crop_runs > 1:
        runs = np.arange(count) // crop_runs
        offsets[order], mirror[order] = offsets[runs], mirror[runs]
    return EpochTables(
        order=order,
        offsets=offsets,
        mirror=mirror,
        colour=stream(3).standard_normal((count, 3), dtype=np.float32),
    )


class Augment:
    """Turns uint8 pictures (n, H, W, C) into float32 inputs (n, 3, S, S), channels_last, 0..255 minus the mean.

    image_size: S. mean: (H, W, C) or (1, 1, C) float; of a mean image the centre S x S is subtracted from every crop,
    wherever the crop lies (2012 code). C is 1 for grey sets, which are repeated to three channels here.
    mirror: training flips half of the pictures. colour: "2012", "paper" or "off"; pca as in a store's manifest.
    """

    def __init__(self, image_size: int, mean, *, mirror: bool = True, colour: str = "off", pca=None, device="cpu"):
        mean = torch.as_tensor(mean, dtype=torch.float32)
        if mean.shape[0] > 1:
            top = (mean.shape[0] - image_size) // 2
            left = (mean.shape[1] - image_size) // 2
            mean = mean[top : top + image_size, left : left + image_size]
        self.size, self.device, self.mirror, self.colour = image_size, torch.device(device), mirror, colour
        self.mean = mean.expand(-1, -1, 3).contiguous().to(self.device)
        self.steps = torch.arange(image_size, device=self.device)
        if colour != "off":
            values = torch.tensor(pca["eigenvalues"])
            # 2012 code: standard deviations of the components. Paper: eigenvalues, read as those of pixels in 0..1.
            scale = values.sqrt() if colour == "2012" else values / 255
            self.components = (scale[:, None] * torch.tensor(pca["eigenvectors"])).to(self.device)

    def train(self, images: Tensor, tables: EpochTables, samples: np.ndarray) -> Tensor:
        """Training inputs of pictures that are the samples `samples` of the tables' epoch."""
        offsets = torch.from_numpy(tables.offsets[samples]).to(self.device)
        mirror = torch.from_numpy(tables.mirror[samples]).to(self.device) if self.mirror else None
        inputs = self._crop(images, offsets, mirror)
        if self.colour != "off":
            factors = torch.from_numpy(tables.colour[samples]).to(self.device) * NOISE
            inputs += (factors @ self.components)[:, None, None, :]  # one colour shift a picture
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

    def _view(self, images: Tensor, top: int, left: int, mirrored: bool) -> Tensor:
        crop = images[:, top : top + self.size, left : left + self.size]
        return self._float(crop.flip(2) if mirrored else crop).permute(0, 3, 1, 2)

    def _crop(self, images: Tensor, offsets: Tensor, mirror: Tensor | None) -> Tensor:
        """Each picture's own crop, as float (n, S, S, 3): a gather of rows and columns, the columns of a mirrored
        picture counted from the right."""
        columns = self.steps.expand(len(images), -1)
        if mirror is not None:
            columns = torch.where(mirror[:, None], self.size - 1 - columns, columns)
        rows = (offsets[:, :1] + self.steps)[:, :, None]
        columns = (offsets[:, 1:] + columns)[:, None, :]
        picture = torch.arange(len(images), device=self.device)[:, None, None]
        return self._float(images[picture, rows, columns])

    def _float(self, crops: Tensor) -> Tensor:
        return crops - self.mean  # uint8 - float32: float32; one channel becomes three
