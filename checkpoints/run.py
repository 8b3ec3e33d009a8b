"""A run of train.py: what it is made of, and its folder: config.json, log.jsonl, last.pt, previous.pt, best.pt,
conv1.npy, curves.png."""

import fcntl
import itertools
import json
import math
import os
import platform
import subprocess
import time
from argparse import Namespace
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

import checkpoints
import processes
from checkpoints import check_archive, is_plain, layer_called, load_checkpoint, save_checkpoint
from data.manifest import checksum, fits_checksum
from data.store import Store
from recipe import Schedule
from utils import UserError, one_line, replacing, write_text

ROOT = checkpoints.FOLDER.parent
WORKERS_END = 60  # seconds that the readers of a killed process may take to notice
KERNELS, LAST, PREVIOUS = "conv1.npy", "last.pt", "previous.pt"
RUN_FILES = ("config.json", "log.jsonl", LAST, PREVIOUS, "best.pt")
LOGGED = ("epoch", "step", "lr", "train_loss", "train_top1_error", "val_loss", "val_top1_error")  # what is drawn


@dataclass
class State:
    """Where a run stands. step: optimiser steps since its start; epoch: epochs finished; step_in_epoch, loss_sum,
    wrong and seconds: steps, sums over the images and time of the epoch under way."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0
    wrong: float = 0.0
    seconds: float = 0.0


@dataclass
class Training:
    """A run under way: what train.py puts together, works on and keeps in checkpoints."""

    args: Namespace
    store: Store
    net: nn.Module  # with a `config`
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    kernels: str  # what kernels.accelerate chose
    state: State = field(default_factory=State)
    last_is_sound: bool = True  # else previous.pt has to stay

    @property
    def steps_per_epoch(self) -> int:
        """The last partial batch is dropped."""
        return self.store.counts["train"] // self.args.batch_size


# ---------------------------------------------------------------------------------------------- the folder


def claim_folder(name: str) -> Path:
    """Make the next free checkpoints/NAME-n; runs that start together get a folder each."""
    for number in itertools.count(1):
        folder = checkpoints.FOLDER / f"{name}-{number}"
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def refuse_taken(out: Path) -> None:
    """Raise UserError where a folder holds what a run leaves."""
    held = [name for name in RUN_FILES if (out / name).exists()]
    if held == ["config.json"]:
        raise UserError(f"{out} holds nothing but a config.json, perhaps of a run that was killed at its very start; "
                        "remove that, or choose another --out")
    if held and not {LAST, PREVIOUS} & set(held):
        raise UserError(f"{out} holds a run without its {LAST}, which cannot go on; choose another --out")
    if held:
        raise UserError(f"{out} holds a run; --resume goes on with it, another --out starts a new one")


class Busy(UserError):
    """Another process has the folder."""


@contextmanager
def locked(folder: Path, seconds: float = 0):
    """Hold the folder, for which that long is waited. The lock ends with the process and the workers that it forked,
    however they end (after a SIGKILL torch's workers notice within seconds)."""
    descriptor, began = os.open(folder, os.O_RDONLY), time.monotonic()
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - began >= seconds:
                    raise Busy(f"another process is training in {folder}; wait for it, or choose another --out"
                               ) from None
                time.sleep(0.5)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def run_folder(run: Training, device: torch.device, rank: int, world: int):
    """Make --out or reopen it, write what is there before the first step, and keep other programs out while the run
    goes on. Gives a warning or "". Only the first of `world` processes writes."""
    out = run.args.out
    if rank:
        run.args.out = out or checkpoints.FOLDER / f"{run.store.name}-?"  # for messages
        yield ""
        return
    made = out is None or not out.exists()
    if out is None:
        out = run.args.out = claim_folder(run.store.name)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, WORKERS_END if processes.interrupted_run() else 0):
        if not run.args.resume:
            refuse_taken(out)  # another run may have begun, and ended, while this one packed its pictures
        try:
            if run.args.resume:
                warning = reopen(run, world)
            else:
                warning = ""
                write_config(run, {
                    "store": portable(run.store.path), "fingerprint": run.store.fingerprint, "processes": world,
                    "kernels": run.kernels, **environment(device),
                })
                keep_kernels(run)
                save_last(run)  # so that --resume works from the first moment on
        except BaseException:  # a full disk, no memory, Ctrl-C: a new run leaves nothing behind
            if not run.args.resume:
                for name in ("config.json", KERNELS):
                    (out / name).unlink(missing_ok=True)
            if made:
                out.rmdir()
            raise
        yield warning


def reopen(run: Training, world: int) -> str:
    """Cut the log back to the checkpoint: lines after it, and the line of a --max-steps stop in mid-epoch, are written
    anew. Returns a warning where lines before it are damaged, or where other kernels, or another number of processes,
    compute now than at the start."""
    out, warnings = run.args.out, []
    kept = {
        entry["epoch"]: entry for entry in read_log(out / "log.jsonl")
        if is_of_an_epoch(entry, run.steps_per_epoch) and entry["epoch"] <= run.state.epoch
    }
    write_text(out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in kept.values()))
    config = read_config(out)
    write_config(run, config | {"store": portable(run.store.path)})  # it may have been moved
    missing = [str(epoch) for epoch in range(1, run.state.epoch + 1) if epoch not in kept]
    if missing:
        warnings.append(f"{out / 'log.jsonl'} is damaged: it has no whole line of epoch {', '.join(missing)}")
    if config["kernels"] != run.kernels:
        warnings.append(f"this run was started with {config['kernels']} and goes on with {run.kernels}: results may "
                        "differ by rounding")
    if (before := config.get("processes", world)) != world:
        warnings.append(f"this run was started with {before} process{'es' * (before != 1)} and goes on with {world}: "
                        "dropout's masks will differ")
    return "; ".join(warnings)


def is_of_an_epoch(entry: dict, steps_per_epoch: int) -> bool:
    """Whether a line of the log is whole, and of a whole epoch."""
    numbers = all(type(entry.get(name)) in (int, float) for name in LOGGED)
    return numbers and type(entry["epoch"]) is int and 0 < entry["step"] == entry["epoch"] * steps_per_epoch


def read_config(out: Path) -> dict:
    try:
        config = json.loads((out / "config.json").read_text())
        if [type(config[name]) for name in ("arguments", "fingerprint", "kernels")] != [dict, str, str]:
            raise TypeError
        changed = not fits_checksum(config)
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{out / 'config.json'} is missing or damaged; the run cannot be resumed") from None
    if changed:
        raise UserError(f"{out / 'config.json'} was changed since train.py wrote it, or is damaged: put it right, or "
                        "remove its \"checksum\" to take it as it is")
    return config


def write_config(run: Training, config: dict) -> None:
    arguments = {k: v for k, v in vars(run.args).items() if k not in ("out", "resume", "max_steps")}
    config = config | {"arguments": json.loads(json.dumps(arguments))}
    write_text(run.args.out / "config.json", json.dumps(config | {"checksum": checksum(config)}, indent=1) + "\n")


def portable(path: Path) -> str:
    """A path to keep in files: relative to the repository where it is within it."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def environment(device: torch.device) -> dict:
    """Versions, hardware and commit, to keep with a result."""
    git, said = ["git", "-C", str(ROOT)], {"capture_output": True, "text": True, "timeout": 10}
    # Lines of finished trainings, in results/, change no code.
    changed = [*git, "diff", "--quiet", "HEAD", "--", ".", ":(exclude)results"]
    commit, name = "", platform.processor() or platform.machine()
    with suppress(OSError, subprocess.TimeoutExpired):
        head = subprocess.run([*git, "describe", "--always", "--exclude=*"], **said).stdout.strip()
        commit = head + ("-dirty" if head and subprocess.run(changed, **said).returncode else "")
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        "threads": torch.get_num_threads(), "commit": commit or None,
    }


# ---------------------------------------------------------------------------------------------- checkpoints


def store_mean(args: Namespace, store: Store) -> torch.Tensor:
    """What is subtracted: the mean image (H, W, C), or with --mean channel its means (1, 1, C)."""
    mean = torch.from_numpy(store.mean)
    return mean.mean((0, 1), keepdim=True) if args.mean == "channel" else mean


def checkpoint(run: Training) -> dict:
    """What best.pt holds."""
    return {
        "model": run.net.state_dict(), "config": run.net.config, "classes": run.store.classes,
        "wnids": run.store.wnids, "mean": store_mean(run.args, run.store), "store_size": run.store.size,
        "resize": run.store.manifest["resize"], "image_size": run.net.config["image_size"], "epoch": run.state.epoch,
        "step": run.state.step, "best": run.schedule.best, "dataset": run.store.name,
        "store": portable(run.store.path), "fingerprint": run.store.fingerprint,
    }


def keep_kernels(run: Training) -> None:
    """Add conv1's weights as they are now to conv1.npy, (epochs + 1, kernels, 3, k, k) float16: those at the start, and
    after each epoch. What is there of later epochs, of a run that was resumed, goes."""
    now = layer_called(run.net, "conv1").weight.detach().cpu().to(torch.float16).numpy()[None]
    before = np.empty((0, *now.shape[1:]), np.float16)
    if run.state.epoch:
        with suppress(Exception):  # missing or damaged, for which numpy has many: from here on
            found = np.load(run.args.out / KERNELS, mmap_mode="r", allow_pickle=False)[: run.state.epoch]
            before = found if (found.shape[1:], found.dtype) == (now.shape[1:], now.dtype) else before
    with replacing(run.args.out / KERNELS) as file:
        np.save(file, np.concatenate([before, now]))


def save_best(run: Training) -> None:
    save_checkpoint(run.args.out / "best.pt", checkpoint(run))


def save_last(run: Training) -> None:
    """last.pt has also what --resume needs; the one before becomes previous.pt."""
    more = {
        "optimizer": run.optimizer.state_dict(), "schedule": asdict(run.schedule), "state": asdict(run.state),
    }
    previous = run.args.out / PREVIOUS if run.last_is_sound else None
    save_checkpoint(run.args.out / LAST, checkpoint(run) | more, previous)
    run.last_is_sound = True


def last_sound(out: Path) -> Path:
    """A run's last.pt; where that is missing or damaged previous.pt, if there is one."""
    try:
        check_archive(out / LAST)
    except (OSError, ValueError):
        if (out / PREVIOUS).exists():
            return out / PREVIOUS
    return out / LAST


def load_last(run: Training, device: torch.device) -> str:
    """Take up the state of --out's last.pt, or previous.pt. Returns a warning or ""."""
    path = last_sound(run.args.out)
    last = load_checkpoint(path, device)
    if not {"optimizer", "schedule", "state"} <= set(last):
        raise UserError(f"{path} holds weights only and cannot be resumed; --init {path} starts a new run from them")
    if run.net.config != last["config"]:
        raise UserError(f"{path} does not fit {run.args.out / 'config.json'}: it is of another net, {last['config']}")
    try:
        run.net.load_state_dict(last["model"])
        run.schedule, run.state = restored(run.schedule, last["schedule"]), restored(run.state, last["state"])
        epoch, rest = divmod(run.state.step, run.steps_per_epoch)
        if (run.state.epoch, run.state.step_in_epoch) not in ((epoch, rest), (epoch - 1, run.steps_per_epoch + rest)):
            raise ValueError(f"step {run.state.step} is not in {run.state} of {run.steps_per_epoch} steps an epoch")
        take_momentum(run, last["optimizer"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not fit {run.args.out / 'config.json'}: {one_line(error)}") from None
    run.last_is_sound = path.name == LAST
    warnings = [] if run.last_is_sound else [
        f"{run.args.out / LAST} is damaged or missing: this run goes on from {PREVIOUS}, step {run.state.step}"
    ]
    if math.isfinite(run.schedule.best) and not (run.args.out / "best.pt").exists():
        warnings.append(f"{run.args.out / 'best.pt'} is missing, the net of {run.schedule.best:.2f}%: the next "
                        "epoch's net replaces it, better or not")
    return "; ".join(warnings)


def restored(new: State | Schedule, saved: dict) -> State | Schedule:
    """A State or Schedule with what was saved of one; settings stay the new one's. Raises ValueError for a value of
    another type, a negative one, one that is not a number, or an infinite one where the new one's is not."""
    found = type(new)(**saved)
    for name, own in vars(new).items():
        if name in ("patience", "fixed"):
            setattr(found, name, own)
            continue
        value, kinds = getattr(found, name), (float, int) if isinstance(own, float) else type(own)
        if not (isinstance(value, kinds) and value >= 0 and (value < math.inf or value == own)):
            raise ValueError(f"its {name} is {value!r}")
    return found


def take_momentum(run: Training, saved: dict) -> None:
    """The momentum of a checkpoint, at the schedule's learning rate; all settings stay this run's. Raises ValueError
    where it does not fit."""
    groups = run.optimizer.state_dict()["param_groups"]
    if [group["params"] for group in groups] != [group["params"] for group in saved["param_groups"]]:
        raise ValueError("its optimizer has other groups of parameters")
    run.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    for group in run.optimizer.param_groups:
        group["lr"] = run.schedule.lr * group["scale"]
        for parameter in group["params"]:
            buffer = run.optimizer.state.get(parameter, {}).get("momentum_buffer")
            has, wanted = is_plain(buffer) and buffer.shape == parameter.shape, run.state.step and group["momentum"]
            if not (has if wanted else buffer is None):
                raise ValueError("its momentum buffers do not fit the net")


# ---------------------------------------------------------------------------------------------- log and curves


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
    entries = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]


def plot_curves(log: list[dict], path: Path) -> None:
    """Loss and top-1 error over epochs, training and validation, as a PNG; drops of the learning rate are marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6))
    figure.subplots_adjust(0.08, 0.14, 0.98, 0.96)  # not "constrained", which is slower, in every epoch
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
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
