"""A run of train.py: its state, its folder, its checkpoints."""

import fcntl
import itertools
import json
import math
import os
import sys
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import utils
from data import UserError
from data.augment import Augment
from data.store import Store
from model import activation_parameters
from recipe import Schedule


@dataclass
class State:
    """Where a run stands. step: optimiser steps since its start; epoch: epochs finished; loss_sum and wrong: sums
    over the images of the epoch under way; best: lowest validation top-1 error in percent."""

    step: int = 0
    epoch: int = 0
    loss_sum: float = 0.0
    wrong: float = 0.0
    best: float = math.inf


@dataclass
class Run:
    """What the loop works on, put together by main()."""

    args: Namespace
    store: Store
    device: torch.device
    rank: int
    world: int
    net: nn.Module  # with a `config`
    optimizer: torch.optim.Optimizer
    state: State
    schedule: Schedule
    kernels: str = ""  # what kernels.accelerate chose
    warned: bool = False  # that it does not learn
    positive: set[str] = field(default_factory=set)  # the activations whose b has been warned of

    @property
    def steps(self) -> int:
        """Steps an epoch: the last partial batch is dropped."""
        return self.store.counts["train"] // self.args.batch_size

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        if self.rank == 0:
            print(f"warning: {text}", file=sys.stderr, flush=True)


@contextmanager
def run_folder(run: Run):
    """Make --out, or reopen it, and keep other processes out of it while the run goes on."""
    if run.world > 1:
        dist.barrier()  # every process has looked at the folder before the first one writes
    if run.rank:
        run.args.out = run.args.out or utils.CHECKPOINTS / f"{run.store.name}-?"  # for messages only
        yield
        return
    made = run.args.out is None or not run.args.out.exists()
    if run.args.out is None:
        run.args.out = claim_folder(run.store.name)
    out = run.args.out
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        try:
            write_start(run)
        except UserError:  # a full disk: a new run leaves nothing behind
            if not run.args.resume:
                (out / "config.json").unlink(missing_ok=True)
            if made:
                out.rmdir()
            raise
        yield


def claim_folder(name: str) -> Path:
    """Make the next free checkpoints/NAME-n; runs that start together get a folder each."""
    utils.CHECKPOINTS.mkdir(exist_ok=True)
    for number in itertools.count(1):
        folder = utils.CHECKPOINTS / f"{name}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


class Busy(UserError):
    """Another process has the folder."""


@contextmanager
def locked(folder: Path):
    """Hold the folder. The lock ends with the process and the workers that it forked, however they end (after a
    SIGKILL torch's workers notice within seconds)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another process is training in {folder}; wait for it, or choose another --out") from None
        yield
    finally:
        os.close(descriptor)


def write_start(run: Run) -> None:
    """What a run folder holds before the first step. A fresh run has a last.pt from the first moment, so that
    --resume always works."""
    out, arguments = run.args.out, {k: v for k, v in vars(run.args).items() if k not in ("out", "resume", "max_steps")}
    if run.args.resume:
        # Lines after the checkpoint, and the line of a --max-steps stop in mid-epoch, are written anew.
        whole = range(run.steps, run.state.epoch * run.steps + 1, run.steps)
        kept = [e for e in utils.read_log(out / "log.jsonl") if e.get("step") in whole]
        utils.write_text(out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in kept))
        config = json.loads((out / "config.json").read_text()) | {"arguments": arguments}
        if config.get("kernels", run.kernels) != run.kernels:
            run.warn(f"this run had: {config['kernels']}; now: {run.kernels}. The sums are rounded otherwise")
    else:
        config = {
            "arguments": arguments, "store": utils.portable(run.store.path), "fingerprint": run.store.fingerprint,
            "processes": run.world, "kernels": run.kernels, **utils.environment(run.device),
        }
    utils.write_text(out / "config.json", json.dumps(config, indent=1) + "\n")
    if not run.args.resume:
        save_last(run)


def checkpoint(run: Run, full: bool = False) -> dict:
    """What a checkpoint holds; full: also what --resume needs."""
    content = {
        "model": run.net.state_dict(), "config": run.net.config, "classes": run.store.classes,
        "mean": store_mean(run.args, run.store), "store_size": run.store.size,
        "resize": run.store.manifest["resize"], "image_size": run.args.image_size, "epoch": run.state.epoch,
        "step": run.state.step, "best": run.state.best, "dataset": run.store.name,
        "store": utils.portable(run.store.path),
    }
    if full:
        content["optimizer"] = run.optimizer.state_dict()
        content["schedule"] = {**asdict(run.schedule), "loss_sum": run.state.loss_sum, "wrong": run.state.wrong}
    return content


def total_sums(run: Run, sums) -> None:
    """Put the sums over all processes into the state."""
    sums = sums.clone()
    if run.world > 1:
        dist.all_reduce(sums)
    run.state.loss_sum, run.state.wrong = sums.tolist()
    check_finite(run, run.state.loss_sum)


def save_last(run: Run, sums=None) -> None:
    if sums is not None:
        total_sums(run, sums)
    if run.rank == 0:
        utils.save_checkpoint(run.args.out / "last.pt", checkpoint(run, full=True))


def load_last(run: Run) -> None:
    """Take up the state of --out's last.pt."""
    path = run.args.out / "last.pt"
    last = utils.load_checkpoint(path, run.device)
    if "optimizer" not in last or "schedule" not in last:
        raise UserError(f"{path} holds weights only and cannot be resumed; --init {path} starts a new run from them")
    if any(run.net.config.get(name) != value for name, value in last["config"].items()):
        raise UserError(f"{path} does not fit {run.args.out / 'config.json'}: it is of another net, {last['config']}")
    try:
        run.net.load_state_dict(last["model"])
        run.optimizer.load_state_dict(last["optimizer"])
        schedule = dict(last["schedule"])
        sums = {name: schedule.pop(name) for name in ("loss_sum", "wrong")}
        run.schedule = Schedule(**schedule)
        run.state = State(step=int(last["step"]), epoch=int(last["epoch"]), best=last["best"], **sums)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not fit {run.args.out / 'config.json'}: {utils.one_line(error)}") from None


def check_finite(run: Run, loss_sum: float) -> None:
    if not math.isfinite(loss_sum):
        raise utils.Diverged(
            f"the loss is no longer finite at step {run.state.step}, learning rate {run.schedule.lr:g}; "
            f"start again with a lower --lr (the last sound state is in {run.args.out / 'last.pt'})"
        )


def watch_activations(run: Run) -> dict[str, float]:
    """What each FReLU, SReLU and PReLU has learnt so far, for the log. Warns once of each b that has turned positive:
    FReLU's authors watch for that."""
    values = {name: parameter.item() for name, parameter in activation_parameters(run.net).items()}
    if run.net.config.get("activation") in ("frelu", "srelu"):
        turned = [name for name, value in values.items() if value > 0 and name not in run.positive]
        run.positive.update(turned)
        if turned:
            shown = ", ".join(f"{name} ({values[name]:.3f})" for name in turned)
            run.warn(f"b has turned positive in {shown}. That harms the training, say FReLU's authors: b should settle "
                     "below 0. A lower learning rate may help")
    return values


def store_mean(args, store: Store) -> torch.Tensor:
    """What is subtracted: the mean image (H, W, C), or with --mean channel its means (1, 1, C)."""
    mean = torch.from_numpy(store.mean)
    return mean.mean((0, 1), keepdim=True) if args.mean == "channel" else mean


def training_inputs(args, store: Store, device: torch.device) -> Augment:
    """What makes the net's inputs of stored pictures, by the arguments."""
    return Augment(
        args.image_size, store_mean(args, store), colour=args.colour, pca=store.manifest["pca"], device=device
    )
