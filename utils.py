"""What train.py and test.py share: seeds, error counts, evaluation, checkpoints, the run's log and its curves."""

import json
import math
import os
import pickle
import platform
import shutil
import subprocess
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import UserError
from data.augment import Augment
from data.loader import Loader
from data.pictures import SHORTER_SIDE, WARPED, to_square
from data.store import sync_folder
from data.trees import UNLABELLED
from model import AlexNet

ROOT = Path(__file__).resolve().parent
CHECKPOINTS = ROOT / "checkpoints"
CHECKPOINT_KEYS = ("model", "config", "classes", "mean", "store_size", "resize", "image_size", "epoch", "step", "best")

# ---------------------------------------------------------------------------------------------- devices and seeds


def pick_device(name: str) -> torch.device:
    """The device for "auto", "cuda" or "cpu"; under torchrun each local process has its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def settle_arithmetic() -> None:
    """float32 is float32 on a GPU, too: torch's convolutions would take TF32 there."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def huge_pages() -> None:
    """Have torch ask Linux for pages of 2 MB, before it allocates anything: fresh memory then costs a tenth less of a
    step at 224 pixels. For scripts, because it holds for the whole process; Linux may be set up to refuse."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def seed_all(*numbers: int) -> None:
    """Seed torch's generators from several whole numbers, such as (seed, step, rank)."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


# ---------------------------------------------------------------------------------------------- errors


def error_counts(scores: Tensor, labels: Tensor) -> Tensor:
    """How many of (n, classes) scores miss the label with their best and with their five best classes (all of them
    where there are fewer than five): (2,) int64 on the device."""
    best = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    return torch.stack([(~best[:, 0]).sum(), (~best.any(1)).sum()])


def wilson_interval(wrong: int, total: int) -> tuple[float, float]:
    """95% interval of an error rate in percent, by Wilson's score."""
    z, rate = 1.959964, wrong / total
    shrink = 1 + z * z / total
    middle = (rate + z * z / (2 * total)) / shrink
    half = z * math.sqrt(rate * (1 - rate) / total + (z / total / 2) ** 2) / shrink
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


@torch.no_grad()
def evaluate(members, loader: Loader, *, ten_crop=False, batch_size=128, shard=(0, 1), each_batch=None) -> Tensor:
    """Sums over a split: (3,) float64 on the device, of the cross-entropy, the top-1 misses and the top-5 misses.

    members: (net, Augment) pairs in eval mode; several are an ensemble. The softmax outputs are averaged over crops
    and over members (paper, sections 4.1 and 6). shard: (rank, processes): this process takes every processes-th
    picture from rank on, so that together they count each picture once. each_batch(indices, probabilities, labels)
    is called for every batch.
    """
    mine = np.arange(shard[0], len(loader), shard[1])
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    sums = torch.zeros(3, dtype=torch.float64, device=loader.device)
    for indices, (images, labels) in zip(batches, loader.batches(batches), strict=True):
        total, outputs = 0, 0
        for net, augment in members:
            for inputs in augment.ten_crop(images) if ten_crop else (augment.center(images),):
                total = total + net(inputs).double().softmax(1)
                outputs += 1
        probabilities = total / outputs
        sums[0] += F.nll_loss(probabilities.clamp_min(1e-300).log(), labels, ignore_index=UNLABELLED, reduction="sum")
        sums[1:] += error_counts(probabilities, labels)
        if each_batch:
            each_batch(indices, probabilities, labels)
    return sums


# ---------------------------------------------------------------------------------------------- checkpoints


class Diverged(UserError):
    """The loss, or a weight, is no longer finite."""


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write beside `path`, bring it to the disk, rename: there is always a whole file at `path`. Raises UserError,
    and leaves the old file, where the disk is full or, as Diverged, where a weight is not finite."""
    for name, tensor in checkpoint["model"].items():
        if not torch.isfinite(tensor).all():
            raise Diverged(f"{name} is no longer finite at step {checkpoint['step']}; {path} was not written")
    with replacing(path) as file:
        torch.save(checkpoint, file)


@contextmanager
def replacing(path: Path):
    """A binary file to write that takes the place of `path`, or of what a link there leads to, once it is whole and on
    the disk. Where that fails, or where there is a device or a folder, what was there stays and UserError says why."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file and is left as it is; name a file")
    beside = path.with_name(f".{path.name}.writing")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        beside.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or "torch could not write all of it"
        free = shutil.disk_usage(path.parent).free // 1_000_000 if path.parent.exists() else 0
        raise UserError(f"{path} could not be written: {reason}; {free} MB are free there") from None
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def load_checkpoint(path: str | Path, device="cpu") -> dict:
    """A checkpoint of train.py or checkpoints/convert.py as a dict. Only plain values and tensors are read, never
    code. Raises UserError for a file that is missing, damaged or something else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of pickles that it then refuses
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is no checkpoint of this project, or holds code, which is not run") from None
    except Exception as error:  # torch's reader raises nearly anything on files of other kinds
        raise UserError(f"{path} is no checkpoint of this project, or is damaged ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or not set(CHECKPOINT_KEYS) <= set(checkpoint):
        raise UserError(f"{path} is no checkpoint of this project: it lacks {', '.join(_missing(checkpoint))}")
    odd = _odd(checkpoint)
    if odd:
        raise UserError(f"{path} is no checkpoint of this project, or was changed: its {odd} cannot be right")
    return checkpoint


def _odd(checkpoint: dict) -> str | None:
    """The first entry of a checkpoint that does not fit the others."""
    c = checkpoint
    sides = all(isinstance(c[name], int) and c[name] > 0 for name in ("store_size", "image_size"))
    count = len(c["classes"]) if isinstance(c["classes"], list) else 0
    mean = c["mean"]
    checks = {
        "model": isinstance(c["model"], dict) and all(isinstance(t, Tensor) for t in c["model"].values()),
        "config": isinstance(c["config"], dict),
        "classes": count > 0 and all(isinstance(name, str) for name in c["classes"]),
        "image_size or store_size": sides and c["image_size"] <= c["store_size"],
        "resize": c["resize"] in (SHORTER_SIDE, WARPED),
        "store": isinstance(c.get("store", ""), str),
        "mean": isinstance(mean, Tensor) and mean.is_floating_point() and mean.ndim == 3 and mean.shape[2] in (1, 3)
        and mean.shape[0] == mean.shape[1] and mean.shape[0] in (1, c["store_size"]) and bool(mean.isfinite().all()),
    }
    odd = next((name for name, right in checks.items() if not right), None)
    if odd:
        return odd
    fits = (c["config"].get("num_classes"), c["config"].get("image_size")) == (count, c["image_size"])
    return None if fits else "config"


def _missing(checkpoint) -> list[str]:
    return [key for key in CHECKPOINT_KEYS if not isinstance(checkpoint, dict) or key not in checkpoint]


def build_net(checkpoint: dict, path: str | Path) -> torch.nn.Module:
    """The net of a checkpoint with its weights: AlexNet, or torchvision_net's where it was converted from there."""
    if "network" in checkpoint["config"]:
        raise UserError(f"{path} is no AlexNet but a {checkpoint['config']['network']} of studies/networks.py")
    try:
        config = checkpoint["config"]
        net = torchvision_net(config) if "net" in config else AlexNet(**config)
        net.load_state_dict(checkpoint["model"])
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: the weights do not fit the net: {one_line(error)}") from None
    if not all(parameter.isfinite().all() for parameter in net.parameters()):
        raise UserError(f"{path} holds weights that are not finite; it is damaged")
    return net


def one_line(error: Exception) -> str:
    """An error's text in one line, cut to 200 characters: torch's go over many."""
    return " ".join(str(error).split())[:200]


def torchvision_net(config: dict) -> torch.nn.Module:
    """torchvision's alexnet, another net than the paper's, for the config of checkpoints/convert.py. Takes this
    project's input if 1 / (255 deviation) is folded into its first weights. Raises ValueError for other configs."""
    if config.get("net") != "torchvision" or set(config) != {"net", "num_classes", "image_size"}:
        raise ValueError(f"unknown net {config}")
    from torchvision.models import alexnet

    net = alexnet(num_classes=config["num_classes"])
    net.config = dict(config)
    return net


def load_model(path: str | Path, device="cpu"):
    """(model, prepare) of a checkpoint. model: the net in eval mode, with a list `classes`. prepare: a function from
    one PIL picture, or a list of them, to the model's input, (n, 3, S, S) float: resized, cropped, mean subtracted
    as in training; prepare(pictures, ten_crop=True) gives ten such inputs. Raises UserError for a bad file."""
    checkpoint = load_checkpoint(path, device)
    model = build_net(checkpoint, path).to(device).eval()
    model.classes = checkpoint["classes"]
    mean, size = checkpoint["mean"], checkpoint["store_size"]
    augment = Augment(checkpoint["image_size"], mean, device=device)

    def prepare(pictures, ten_crop: bool = False):
        pictures = pictures if isinstance(pictures, list | tuple) else [pictures]
        stored = np.stack([to_square(p, size, mean.shape[2], checkpoint["resize"]) for p in pictures])
        images = torch.from_numpy(stored).to(device)
        return list(augment.ten_crop(images)) if ten_crop else augment.center(images)

    return model, prepare


def portable(path: Path) -> str:
    """A path to keep in files: relative to the repository where it lies within it."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def newest(name: str) -> Path | None:
    """The youngest checkpoints/*/NAME, or None."""
    found = sorted(CHECKPOINTS.glob(f"*/{name}"), key=lambda p: p.stat().st_mtime)
    return found[-1] if found else None


# ---------------------------------------------------------------------------------------------- the run's records


def environment(device: torch.device) -> dict:
    """Versions, hardware and commit, for config.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "device": name,
        "threads": torch.get_num_threads(), "commit": commit or None,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def append_line(path: Path, entry: dict) -> None:
    """Add one JSON line to a log and bring it to the disk."""
    try:
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a crash, or a full disk, left half a line
                    file.write(b"\n")
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror}") from None


def read_log(path: Path) -> list[dict]:
    """The lines of a log; one that a crash cut off is left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]


def results_file(name: str) -> Path:
    """A file of results to append lines to; its folder is made. Raises UserError where it could not be written, or
    holds something else than lines of JSON."""
    path = Path(name)
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


def write_text(path: Path, text: str) -> None:
    """Replace a text file, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # names of files need not be text


def plot_curves(log: list[dict], path: Path) -> None:
    """Loss and top-1 error over epochs, training and validation, with the drops of the rate marked, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    epochs = [entry["epoch"] for entry in log]
    drops = [b["epoch"] - 0.5 for a, b in zip(log, log[1:], strict=False) if b["lr"] < a["lr"]]
    panels = (("loss", "train_loss", "val_loss"), ("top-1 error (%)", "train_top1_error", "val_top1_error"))
    for axes, (label, train, val) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.plot(epochs, [entry[train] for entry in log], "o-", ms=3, label="training (with dropout)")
        axes.plot(epochs, [entry[val] for entry in log], "s-", ms=3, label="validation")
        for number, drop in enumerate(drops):
            axes.axvline(drop, color="0.6", ls=":", label=None if number else "learning rate / 10")
        axes.set(xlabel="epoch", ylabel=label, ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
