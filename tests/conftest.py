"""Small data sets and stores that several test files use."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import memory
import train
from data import pack
from data.sources import Source, Split

MEMORY = Path("/dev/shm")

torch.set_num_threads(1)  # each of pytest-xdist's processes has a core, and so have the scripts that tests start
memory.keep()
# Tests write many checkpoints of 90 to 750 MB: in memory, if there is room, which takes two thirds of the time.
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 10e9:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))  # TMPDIR is too late here: pytest has looked
if os.name == "posix":  # under nohup, scripts that tests start would not hear SIGHUP either
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="module")
def memory_handed_back():
    yield
    memory.hand_back()


def pictures(count: int, shape: tuple, seed: int = 0) -> np.ndarray:
    """Smooth random uint8 pictures (count, *shape): blurred noise, so that neighbouring pixels are alike."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 4, 4, *shape[2:]), dtype=np.uint8)
    resize = [np.asarray(Image.fromarray(p).resize(shape[1::-1], Image.Resampling.BILINEAR)) for p in small]
    return np.stack(resize)


def small_source(name="small", classes=4, counts=(96, 21, 30), shape=(32, 32, 3)) -> Source:
    splits = {}
    for number, (split, count) in enumerate(zip(("train", "val", "test"), counts, strict=True)):
        splits[split] = Split(pictures(count, shape, number), np.arange(count) % classes)
    names = [f"class {c}" for c in range(classes)]
    return Source(name, names, splits, size=72, codec="raw", channels=3 if len(shape) == 3 else 1)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A raw colour store: 4 classes, 96 training, 21 validation, 30 test pictures of 72 x 72."""
    return pack.pack(small_source(), tmp_path_factory.mktemp("stores") / "small")


@pytest.fixture(scope="session")
def small_pictures(tmp_path_factory):
    """A store of 32 x 32 for the activation study: 4 classes, 80 training, 21 validation, 30 test pictures."""
    return pack.pack(small_source(counts=(80, 21, 30)), tmp_path_factory.mktemp("stores") / "small-32", size=32)


@pytest.fixture(scope="session")
def grey_store(tmp_path_factory):
    return pack.pack(small_source("grey", shape=(28, 28)), tmp_path_factory.mktemp("stores") / "grey", shards=3)


@pytest.fixture(scope="session")
def jpeg_store(tmp_path_factory):
    return pack.pack(small_source("jpeg"), tmp_path_factory.mktemp("stores") / "jpeg", codec="jpeg", shards=2)


@pytest.fixture
def tree(tmp_path):
    """An ImageFolder tree: train/ and val/ with the classes cat and dog, 6 and 3 PNG pictures each."""
    root = tmp_path / "tree"
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number, pixels in enumerate(pictures(count, (80, 100, 3), label)):
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def run_folder(store, tmp_path_factory):
    """A finished run of one epoch on `store`."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train.main(["--data", str(store.path), "--out", str(out), "--epochs", "1", "--batch-size", "16", "--workers", "0"])
    return out


@pytest.fixture(scope="session")
def ten_steps(store, tmp_path_factory):
    """A run of 10 steps in one go: an epoch of 6 and 4 more."""
    out = tmp_path_factory.mktemp("ten") / "run"
    arguments = ["--data", str(store.path), "--out", str(out), "--batch-size", "16", "--workers", "0"]
    train.main([*arguments, "--max-steps", "10"])
    return out
