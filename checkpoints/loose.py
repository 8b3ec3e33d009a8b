"""Loose pictures, not in a store: read, named by a checkpoint or by several as an ensemble, one after the other.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import utils
from checkpoints import load_member
from data.loader import lacks_memory
from data.pictures import ENDINGS, File, printable, to_square
from data.pool import in_order
from data.trees import pictures_below
from kernels import accelerate
from utils import Progress, UserError

READERS = 2  # threads that decode the pictures ahead
SHOWN = 100  # so many pictures are worth a progress bar


def listed(places: list[str]) -> list[str]:
    """The pictures named, and all that lie in the folders named, at any depth, in the order of their names."""
    found = []
    for place in places:
        if not os.path.isdir(place):
            found.append(place)
            continue
        with contextlib.redirect_stdout(sys.stderr):  # what is no picture, told
            inside = sorted(pictures_below(place))
        if not inside:
            raise UserError(f"{place} holds no pictures ({', '.join(sorted(ENDINGS))})")
        found += [str(Path(place) / member) for member in inside]
    return found


class Namer:
    """One checkpoint, or several as an ensemble, ready to name pictures. Raises UserError for checkpoints that are
    none, or of different classes."""

    def __init__(self, paths: list[Path], device: torch.device, ten_crop: bool = False, precision: str = "fp32"):
        self.members = [load_member(path, device, ten_crop) for path in paths]
        self.device, self.precision = device, precision
        self.classes = self.members[0][2]["classes"]
        if any(checkpoint["classes"] != self.classes for _, _, checkpoint in self.members):
            raise UserError("these checkpoints have different classes and are no ensemble")
        for net, _, _ in self.members:
            accelerate(net)
        # How each member wants a picture squared: its side, channels, resize rule.
        self.ways = [(c["store_size"], c["mean"].shape[2], c["resize"]) for _, _, c in self.members]

    def read(self, name: str) -> tuple[str, list[np.ndarray] | UserError]:
        """A picture squared in each member's way, or why it can't be read."""
        try:
            squares = {way: to_square(File(name, name), *way) for way in set(self.ways)}
        except UserError as error:
            return name, error
        except Exception as error:  # Pillow and libjpeg raise nearly anything on damaged files
            if isinstance(error, OSError) or lacks_memory(error):  # the machine's fault, not the picture's
                raise
            return name, UserError(f"{name} cannot be read as a picture ({type(error).__name__})")
        return name, [squares[way] for way in self.ways]

    def outputs(self, pictures: list[list[np.ndarray]]) -> Tensor:
        """(n, classes) float64: the softmax outputs for n pictures of read(), averaged over views and members."""
        found = []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            for (net, views, _), squares in zip(self.members, zip(*pictures, strict=True), strict=True):
                images = torch.from_numpy(np.stack(squares)).to(self.device)
                found.append(utils.probabilities([(net, views)], images))
        return torch.stack(found).mean(0)

    def name(self, places: list[str], batch_size: int) -> Iterator[tuple[list[str], Tensor]]:
        """Names and outputs of the pictures, a batch at a time. One that can't be read is said to be skipped; raises
        UserError where that is all of them."""
        warnings.filterwarnings("ignore", module="PIL")  # of palettes, large pictures and damaged EXIF blocks
        names, skipped, first = listed(places), 0, None
        batch: list[tuple[str, list[np.ndarray]]] = []
        bar = Progress("naming", len(names), "pictures", silent=len(names) < SHOWN)
        with bar, ThreadPoolExecutor(READERS) as pool:
            for name, squares in in_order(pool, self.read, names):
                bar.update(1)
                if isinstance(squares, UserError):
                    skipped, first = skipped + 1, first or squares
                    if skipped < len(names):
                        print(f"skipped: {printable(str(squares))}", file=sys.stderr, flush=True)
                    continue
                batch.append((name, squares))
                if len(batch) == batch_size:
                    yield [name for name, _ in batch], self.outputs([squares for _, squares in batch])
                    batch = []
        if batch:
            yield [name for name, _ in batch], self.outputs([squares for _, squares in batch])
        if skipped == len(names):
            raise first if skipped == 1 else UserError(f"none of {skipped} pictures can be read; {first}")
        if skipped:
            print(f"{skipped} of {len(names)} pictures could not be read", file=sys.stderr, flush=True)
