"""Make the bundled sample, a stratified part of Fashion-MNIST: 600 training, 100 validation and 100 test images of
each of the ten classes, in their original order, from the same splits of the whole set.

    python -m data.sample.make [FILE]
"""

from pathlib import Path

import numpy as np

from data import sources
from utils import Parser, run_script

PER_CLASS = {"train": 600, "val": 100, "test": 100}
SEED = 2012


def main(argv=None) -> int:
    import h5py

    parser = Parser(prog="python -m data.sample.make", description="Make the bundled sample of Fashion-MNIST.")
    parser.add_argument("file", nargs="?", type=Path, default=sources.SAMPLE, help="default: where it is read from")
    out = parser.parse_args(argv).file
    source = sources.find("fashion-mnist")
    with h5py.File(out, "w") as file:
        file.attrs["classes"] = source.classes
        file.attrs["origin"] = "Fashion-MNIST, Zalando SE, MIT licence"
        for split, count in PER_CLASS.items():
            part = source.splits[split]
            rows = stratified(part.labels, count)
            images = part.pictures[rows]
            options = {"compression": "gzip", "compression_opts": 9}
            file.create_dataset(f"{split}/images", data=images, chunks=(min(1000, len(rows)), 28, 28), **options)
            file.create_dataset(f"{split}/labels", data=part.labels[rows].astype(np.uint8), **options)
    print(f"{out}: {out.stat().st_size:,} bytes")
    return 0


def stratified(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of `count` samples of each class, drawn with SEED, in ascending order."""
    shuffled = np.random.Generator(np.random.Philox(SEED)).permutation(len(labels))
    chosen = [shuffled[labels[shuffled] == label][:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


if __name__ == "__main__":
    run_script(main)
