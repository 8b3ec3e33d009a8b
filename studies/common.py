"""What the studies share: files of results, means with their spread, train.py's first batches, figures."""

import fcntl
import math
import os
import statistics
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import utils
from data.augment import epoch_tables
from data.loader import Loader
from data.pictures import printable
from train import training_inputs
from utils import UserError

# Student's t, two-sided, by n.
T95 = {3: 4.3027, 4: 3.1824, 5: 2.7764, 6: 2.5706, 7: 2.4469, 8: 2.3646, 9: 2.3060, 10: 2.2622, 11: 2.2281}
LEGEND = 20  # lines or classes that a legend tells apart; more are told apart by a scale of colours


def results_file(name: str) -> Path:
    """A file of results to append lines to; its folder is made. Raises UserError where it could not be written, or
    holds something else than lines of JSON."""
    path = Path(name)
    if path.suffix == ".png":
        raise UserError(f"{path}: --out names a file of lines of results; .png is for a figure beside it")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file; name another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written; name another --out")
    if path.exists():
        with open(path, "rb") as file:
            if file.read(1) not in (b"", b"{"):
                raise UserError(f"{path} holds no lines of results; name another --out")
    return path


@contextmanager
def alone(folder: Path):
    """Hold a folder; wait while another process holds it, for instance one that packs a store there."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def spread(values: list[float]) -> str:
    """Mean and standard deviation of percentages over seeds, with their number."""
    std = f" ± {statistics.stdev(values):.2f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.2f}%{std} (n = {len(values)})"


def interval(values: list[float]) -> tuple[float, float]:
    """The mean and half the width of its 95% interval (Student's t), of three values or more."""
    half = T95[min(len(values), 11)] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), half


def verdict(gains: list[float]) -> str:
    """What the seeds allow to be said: the mean with its 95% interval (Student's t, paired by seed), and whether that
    leaves out zero."""
    if len(gains) < 3:
        return "too few seeds"
    mean, half = interval(gains)
    said = "within the spread" if abs(mean) <= half else "helps" if mean > 0 else "harms"
    return f"{mean:+.2f} ± {half:.2f}: {said}"


def batches(args, store, loader: Loader, device):
    """The inputs (n, 3, S, S) and labels (n,) of train.py's first --max-steps steps with these arguments
    (options.make_parser's, settled), torch's generator at each step's own seed."""
    inputs = training_inputs(args, store, device)
    step, steps_per_epoch, batch = 0, len(loader) // args.batch_size, args.batch_size
    margin = store.size - args.image_size
    while step < args.max_steps:
        epoch, left = step // steps_per_epoch, args.max_steps - step
        tables = epoch_tables(args.seed, epoch, len(loader), margin, args.crop_runs, args.mirror)
        plan = [tables.order[s * batch :][:batch] for s in range(min(steps_per_epoch, left))]
        for samples, (crops, labels) in zip(plan, loader.batches(plan, tables, args.image_size), strict=True):
            step += 1
            utils.seed_all(args.seed, step, 0)
            yield inputs.train(crops, tables.colour[samples]), labels


def pixel_std(store) -> float:
    """The standard deviation of the training pixels about their channel's mean, over all channels: the PCA's
    eigenvalues sum up to the channels' variances."""
    return math.sqrt(sum(store.manifest["pca"]["eigenvalues"]) / 3)


def new_figure(width: float, height: float):
    """An empty figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure, path: Path) -> None:
    """Write a PNG; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with utils.replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)


def colours(count: int) -> list:
    """So many colours: matplotlib's ten where they do, else even steps of a colour map."""
    if count <= 10:
        return [f"C{number}" for number in range(count)]
    from matplotlib import colormaps

    return list(colormaps["turbo"](np.linspace(0, 1, count)))


def add_key(figure, axes, count: int, scale: str, **options) -> None:
    """Say at the right which of colours(count) is which: a legend of the axes' labels; a scale, which needs a name of
    its own, where they are many. options: the legend's."""
    if count <= LEGEND:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8, **options)
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure.colorbar(ScalarMappable(Normalize(1, count), "turbo"), ax=figure.axes).set_label(scale)


def plain(name: str) -> str:
    """A name for matplotlib, drawn as it is: a dollar sign and an underscore at the start mean more to it."""
    name = printable(name).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name
