"""A run's folder as studies.report reads it: the log, the config, and pictures as the net of best.pt sees them."""

import json
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import options
import utils
from checkpoints import load_member, watch_features
from checkpoints.run import ROOT, read_log
from data.loader import Loader, lacks_memory
from data.pictures import printable
from data.store import Store
from kernels import accelerate
from studies import look
from utils import Progress, UserError, shown

MOST = 10_000  # pictures of a split that are looked at
BATCH = 128
NUMBERS = ("epoch", "lr", "train_loss", "val_loss", "train_top1_error", "val_top1_error", "seconds")  # of the log
NO_SETTINGS = {"out", "resume", "max_steps", "workers", "device", "download"}  # they change no sums


class LeftOut(Exception):
    """Why a section can't be filled."""


@dataclass
class Looked:
    """Pictures of a split as a net sees them: features (n, 4096), labels (n,), which of the split's pictures these are
    (n,); of test pictures probabilities (n, classes), too, of training pictures what look.strongest finds."""

    features: Tensor
    labels: Tensor
    rows: np.ndarray
    probabilities: Tensor | None = None
    strongest: dict | None = None


class Run:
    """A run's folder: its log, and how the run was started, {} where config.json does not say so. The net is loaded
    when it is first asked for; what needs the net or the store raises LeftOut where it is not there. Raises UserError
    for a folder with nothing to show."""

    def __init__(self, path: Path, device="cpu", seed: int = 0):
        if not path.is_dir():
            raise UserError(f"{path}: no such run; give the folder that holds its log.jsonl")
        self.path, self.device, self.seed = path, torch.device(device), seed
        self.log, self.config = read_epochs(path), read_config(path)
        self.arguments = self.config.get("arguments", {})
        if not self.log and not (path / "best.pt").exists():
            why = "its first epoch is not over" if self.config else "it is no run's folder"
            raise UserError(f"{path} has neither a best.pt nor an epoch in log.jsonl: {why}")

    @cached_property
    def standard(self) -> dict:
        """train.py's defaults; {} where the run is not one of train.py's, or not known to be."""
        if not self.arguments or "network" in self.arguments:
            return {}
        found = vars(options.make_parser().parse_args([])) | options.DEFAULTS
        with suppress(LeftOut):  # fewer pictures and trained weights have others
            found |= options.defaults(Namespace(init=self.arguments.get("init")), self.store)
        return found

    @property
    def settings(self) -> dict:
        """What decides the run's sums, by train.py's names, and which net it is, where another study has its own; an
        option that is younger than the run has its default. {} where nothing is known."""
        known = self.standard | self.arguments
        known |= {"network": known.get("network", "AlexNet")} if known else {}
        return {name: value for name, value in known.items() if name not in NO_SETTINGS}

    def started(self) -> Namespace:
        """train.py's arguments as they were at the start."""
        return Namespace(**self.standard | self.arguments | {"resume": False, "out": None})

    # ------------------------------------------------------------------------------------------ the net

    @cached_property
    def member(self) -> tuple:
        if "network" in self.arguments:
            raise LeftOut(f"the net, {self.arguments['network']}, is not one of train.py's")
        if not (self.path / "best.pt").exists():
            raise LeftOut("there is no best.pt, which train.py writes when an epoch is over")
        try:
            net, views, checkpoint = load_member(self.path / "best.pt", self.device)
        except UserError as error:
            if lacks_memory(error.__context__):  # which is nothing about the run
                raise
            raise LeftOut(str(error)) from None
        self.seen = watch_features(net)
        accelerate(net)
        return net, views, checkpoint

    @property
    def net(self) -> nn.Module:
        return self.member[0]

    @property
    def checkpoint(self) -> dict:
        return self.member[2]

    @cached_property
    def classes(self) -> list[str]:
        return [printable(name) for name in self.checkpoint["classes"]]

    @property
    def size(self) -> int:
        """The side of the net's pictures in pixels."""
        return self.checkpoint["image_size"]

    # ------------------------------------------------------------------------------------------ the pictures

    @cached_property
    def store(self) -> Store:
        path = ROOT / self.checkpoint["store"]
        try:
            store = Store(path)
        except UserError as error:
            raise LeftOut(f"the store that the run was trained on can't be read: {error}") from None
        fingerprint = self.checkpoint.get("fingerprint", store.fingerprint)
        trained_on = self.checkpoint["classes"], self.checkpoint["store_size"], fingerprint
        if (store.classes, store.size, store.fingerprint) != trained_on:
            raise LeftOut(f"{shown(path)} is another store than the run was trained on")
        return store

    @cached_property
    def split(self) -> str:
        """What is tested: as test.py chooses it."""
        labelled = self.store.counts.get("test") and "test" not in self.store.unlabelled
        return "test" if labelled else "val"

    def rows(self, split: str) -> np.ndarray:
        """The pictures that are looked at."""
        count = self.store.counts[split]
        if count <= MOST:
            return np.arange(count)
        return np.sort(np.random.default_rng(self.seed).choice(count, MOST, replace=False))

    def batches(self, split: str):
        """These pictures (n, S, S, C) and their labels (n,), in order, with a bar."""
        rows = self.rows(split)
        plan = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        with Progress(f"looking at {split}", len(rows)) as progress:
            for images, labels in Loader(self.store, split, self.device, resident=False).batches(plan):
                yield images, labels
                progress.update(len(labels))

    @cached_property
    def tested(self) -> Looked:
        (net, views, _), found, labels = self.member, [], []
        self.seen.clear()
        for images, truth in self.batches(self.split):
            found.append(utils.probabilities([(net, views)], images).cpu())
            labels.append(truth.cpu())
        return Looked(torch.cat(self.seen), torch.cat(labels), self.rows(self.split), probabilities=torch.cat(found))

    @cached_property
    def trained(self) -> Looked:
        (net, views, _), labels = self.member, []
        self.seen.clear()

        def inputs():
            for images, truth in self.batches("train"):
                labels.append(truth.cpu())
                yield from views(images)

        strongest = look.strongest(net, look.CONVOLUTIONS[1:], inputs())
        return Looked(torch.cat(self.seen), torch.cat(labels), self.rows("train"), strongest=strongest)

    def inputs(self, split: str, rows) -> Tensor:
        """The net's inputs of these pictures, their centre crops."""
        images, _ = self.store.split(split).read(np.asarray(rows))
        (inputs,) = self.member[1](torch.from_numpy(images).to(self.device))
        return inputs

    def pictures(self, split: str, rows) -> np.ndarray:
        """The same as pixels, (n, S, S, 3) uint8."""
        images, _ = self.store.split(split).read(np.asarray(rows))
        edge = (images.shape[1] - self.size) // 2
        crops = images[:, edge : edge + self.size, edge : edge + self.size]
        return np.broadcast_to(crops, (*crops.shape[:3], 3))


# ---------------------------------------------------------------------------------------------- what is in a folder


def read_epochs(path: Path) -> list[dict]:
    """The lines of a run's log. Raises UserError for one that can't be drawn: without epochs, with other things than
    numbers for NUMBERS and "activations", or where these are not always the same."""
    log = read_log(path / "log.jsonl")
    learnt = [entry.get("activations", {}) for entry in log]
    alike = all(isinstance(values, dict) and set(values) == set(learnt[0]) for values in learnt)
    values = [entry[name] for entry in log for name in NUMBERS if name in entry]
    values += [value for found in learnt for value in found.values()] if alike else []
    sound = all(isinstance(value, int | float) and not abs(value) > 1e300 for value in values)
    if not (alike and sound and all("epoch" in entry for entry in log)):
        raise UserError(f"{path / 'log.jsonl'} is no log of a run")
    return log


def read_config(path: Path) -> dict:
    """How a run was started, with "arguments"; {} where its config.json is missing or damaged."""
    try:
        config = json.loads((path / "config.json").read_text())
        return dict(config) | {"arguments": dict(config["arguments"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
