"""The loop of the activation study: one of networks.py's nets, trained in float32 on pictures of 32 x 32.

A run is a folder: config.json says what was trained and how, log.jsonl has a line an epoch with train.py's keys, and
last.pt has what the loop needs to go on. Wherever it is stopped, it ends in the numbers of a run that was not.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoints
import memory
import utils
from checkpoints.run import append_line, environment, read_log
from data import pack, sources
from data.augment import epoch_tables
from data.loader import Loader, lacks_memory
from data.store import Store
from kernels import accelerate
from recipe import split_off_activations
from studies.common import alone
from studies.networks import SIDE, build
from train import train_step, watch_activations
from utils import Diverged, Progress, UserError, one_line, shown
from watch import LOOK_EVERY, Watch

BATCH = 128
SAVE_SECONDS = 600  # last.pt is written this often in mid-epoch
STATE = ("epoch", "step", "loss_sum", "wrong")


@dataclass
class Run:
    """A run under way. epoch: epochs finished; step: since the start; loss_sum, wrong: over the images of the epoch
    under way, as of the last look; seconds: its training so far."""

    folder: Path
    store: Store
    net: nn.Module
    optimizer: torch.optim.Optimizer  # each group with a `scale` of the learning rate
    inputs: "Inputs"
    lrs: list[float]  # each epoch's learning rate
    seed: int
    frame: int = 0  # pixels in the mean colour around each picture, out of which the crops are cut
    mirror: bool = False
    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    wrong: float = 0.0
    seconds: float = 0.0

    @property
    def steps_per_epoch(self) -> int:
        """The last partial batch is dropped."""
        return self.store.counts["train"] // BATCH


class Inputs:
    """Inputs (n, 3, S, S) of uint8 pictures (n, S, S, C): minus mean, divided by std, numbers or one for each of C
    colours. A grey picture is repeated to three colours."""

    def __init__(self, mean, std, device: torch.device):
        self.device = device
        self.mean, self.std = (torch.as_tensor(v, dtype=torch.float32).expand(3).to(device) for v in (mean, std))

    def __call__(self, pictures: Tensor) -> Tensor:
        return (pictures - self.mean).div_(self.std).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------- the loop


def fit(run: Run, watch: Watch) -> bool:
    """Train, each epoch at its learning rate, until all are over or a signal is received. Whether all are over; if
    not, last.pt has how far the run came."""
    train, val = (Loader(run.store, split, run.inputs.device, resident=True) for split in ("train", "val"))
    train.images = framed(train.images, run.store.mean.mean((0, 1)), run.frame)
    while run.epoch < len(run.lrs) and not watch.received:
        for group in run.optimizer.param_groups:
            group["lr"] = run.lrs[run.epoch] * group["scale"]
        speed = train_epoch(run, train, watch)
        if watch.received:
            break
        began = time.monotonic()
        entry = validate(run, val, watch) | speed | {"seconds": run.seconds + time.monotonic() - began}
        run.epoch, run.loss_sum, run.wrong, run.seconds = run.epoch + 1, 0.0, 0.0, 0.0
        print(f"epoch {run.epoch:>3}/{len(run.lrs)}  lr {entry['lr']:g}  train error {entry['train_top1_error']:.2f}%  "
              f"val error {entry['val_top1_error']:.2f}%  {entry['images_per_second']:.0f} images/s", flush=True)
        append_line(run.folder / "log.jsonl", entry)
        save(run)
        memory.hand_back()
    if run.epoch == len(run.lrs):
        return True
    save(run)
    print(f"stopped at step {run.step}; the same command goes on from there", flush=True)
    return False


def train_epoch(run: Run, train: Loader, watch: Watch) -> dict:
    """Train to the end of the epoch or to a signal. Returns the speed, for the log."""
    tables = epoch_tables(run.seed, run.epoch, len(train), 2 * run.frame, mirrored=run.mirror)
    first, steps = run.step, run.steps_per_epoch
    plan = [tables.order[s * BATCH :][:BATCH] for s in range(first - run.epoch * steps, steps)]
    batches = train.batches(plan, tables, SIDE)
    sums = torch.tensor([run.loss_sum, run.wrong], dtype=torch.float64, device=train.device)
    started, saved, waited = time.monotonic(), time.monotonic(), 0.0
    before = run.seconds

    run.net.train()
    label, total = f"epoch {run.epoch + 1}/{len(run.lrs)}", steps * BATCH
    with Progress(label, total, start=total - len(plan) * BATCH) as progress:
        for _ in plan:
            began = time.monotonic()
            crops, labels = next(batches)
            pictures = run.inputs(crops)
            waited += time.monotonic() - began

            utils.seed_all(run.seed, run.step + 1, 0)  # for this step's dropout masks
            loss, logits = train_step(run.net, run.optimizer, pictures, labels, "fp32")

            run.step += 1
            sums[0] += loss * BATCH
            sums[1] += (logits.argmax(1) != labels).sum()

            looking = run.step % LOOK_EVERY == 0
            progress.update(BATCH, look(run, sums) if looking else "")
            if looking and time.monotonic() - saved > SAVE_SECONDS:
                run.seconds = before + time.monotonic() - started
                save(run)
                saved = time.monotonic()
            if watch.received:
                break
    look(run, sums)
    seconds = time.monotonic() - started
    run.seconds = before + seconds
    return {"images_per_second": (run.step - first) * BATCH / seconds, "stall": 100 * waited / seconds}


def look(run: Run, sums: Tensor) -> str:
    """Take the epoch's sums from the device. Returns the progress bar's note; raises Diverged."""
    run.loss_sum, run.wrong = sums.tolist()
    if not math.isfinite(run.loss_sum):
        raise Diverged(f"the loss is no longer finite at step {run.step}")
    images = (run.step - run.epoch * run.steps_per_epoch) * BATCH
    return f"loss {run.loss_sum / images:.3f}, error {100 * run.wrong / images:.1f}%"


def validate(run: Run, val: Loader, watch: Watch) -> dict:
    """The log's line of an epoch, but for its times."""
    val_loss, val_top1, val_top5 = errors(run, val)
    seen, learnt = run.steps_per_epoch * BATCH, watch_activations(run.net, watch)
    return {
        "epoch": run.epoch + 1, "step": run.step, "lr": run.lrs[run.epoch], "train_loss": run.loss_sum / seen,
        "train_top1_error": 100 * run.wrong / seen, "val_loss": val_loss, "val_top1_error": val_top1,
        "val_top5_error": val_top5, **({"activations": learnt} if learnt else {}),
    }


def errors(run: Run, loader: Loader) -> tuple[float, float, float]:
    """Over a split: the mean loss, and the top-1 and top-5 error in percent."""
    run.net.eval()
    sums = utils.evaluate([(run.net, lambda pictures: [run.inputs(pictures)])], loader.in_order(BATCH))
    loss, top1, top5 = (sums / len(loader)).tolist()
    return loss, 100 * top1, 100 * top5


# ---------------------------------------------------------------------------------------------- data and update


def small_store(name: str) -> Store:
    """The store of a named set at 32 x 32, data/stores/NAME-32, packed first where there is none: by one process, while
    others wait."""
    path, cores = pack.STORES / f"{name}-{SIDE}", len(os.sched_getaffinity(0))
    with alone(pack.STORES):
        store = Store(path) if path.exists() else pack.pack(sources.find(name), path, size=SIDE, workers=cores)
    if store.size != SIDE:
        raise UserError(f"{shown(path)} has pictures of {store.size} pixels, not of {SIDE}; remove it")
    return store


def framed(images: Tensor, colour, width: int) -> Tensor:
    """Pictures (N, S, S, C) with a frame of `width` pixels in one colour (C,), rounded."""
    count, side = images.shape[:2]
    out = torch.as_tensor(colour).round().to(images).repeat(count, side + 2 * width, side + 2 * width, 1)
    out[:, width : width + side, width : width + side] = images
    return out


def learning_rates(first: float, epochs: int, drops: tuple[int, ...], of: int) -> list[float]:
    """Each epoch's: divided by 10 after `drops` epochs of `of`, or after the same fractions of `epochs`."""
    return [first / 10 ** sum(epoch * of >= drop * epochs for drop in drops) for epoch in range(epochs)]


def parameter_groups(net: nn.Module, scale: float = 1.0) -> list[dict]:
    """All but what activations learn; and that, without decay. `scale` times the epoch's learning rate is a group's."""
    learnt, rest = split_off_activations(net)
    groups = [{"params": list(rest.values()), "scale": 1.0}]
    return groups + [{"params": learnt, "scale": scale, "weight_decay": 0.0}] * bool(learnt)


# ---------------------------------------------------------------------------------------------- the run's folder


def start(folder: Path, store: Store, device, network: str, act: str, optimizer_of: Callable, **how) -> Run:
    """A run, new or as its folder has it. optimizer_of(net) makes the optimiser; how: Run's seed, lrs, inputs, frame
    and mirror."""
    utils.no_tf32()
    torch.backends.cudnn.benchmark = True  # every step has the same shapes
    utils.seed_all(how["seed"])
    net = build(network, len(store.classes), act).to(device, memory_format=torch.channels_last)
    kernels = accelerate(net)
    run, log = Run(folder, store, net, optimizer_of(net), **how), folder / "log.jsonl"
    if log.exists() or (folder / "last.pt").exists():
        load(run)
    else:
        save(run)
    kept = [entry for entry in read_log(log) if entry.get("epoch") in range(1, run.epoch + 1)]
    utils.write_text(log, "".join(json.dumps(entry) + "\n" for entry in kept))  # later epochs are trained once more
    defaults = {name: run.optimizer.defaults[name] for name in ("momentum", "nesterov", "weight_decay")}
    arguments = {
        "dataset": store.name, "network": network, "activation": act, "seed": run.seed, "epochs": len(run.lrs),
        "batch_size": BATCH, "lr": run.lrs[0], **defaults, "bias_rate": run.optimizer.param_groups[-1]["scale"],
        "frame": run.frame, "mirror": run.mirror,
    }
    config = {"arguments": arguments, "kernels": kernels, **environment(device)}
    utils.write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    print(f"{network}, {act}, seed {run.seed}: {kernels}", flush=True)
    return run


def save(run: Run) -> None:
    checkpoints.save_checkpoint(run.folder / "last.pt", {
        "model": run.net.state_dict(), "optimizer": run.optimizer.state_dict(), "config": run.net.config,
        "fingerprint": run.store.fingerprint, "seconds": run.seconds, **{name: getattr(run, name) for name in STATE},
    })


def load(run: Run) -> None:
    """Take up the state of last.pt."""
    last = read_checkpoint(run.folder / "last.pt", run.inputs.device)
    anew = f"to train this run anew, remove {shown(run.folder)}"
    if last is None:
        raise UserError(f"{shown(run.folder / 'last.pt')} is missing, damaged, or no checkpoint of this study; {anew}")
    try:
        if (last["config"], last["fingerprint"]) != (run.net.config, run.store.fingerprint):
            raise ValueError(f"{last['config']}, store {last['fingerprint'][:8]}")
        run.net.load_state_dict(last["model"])
        run.optimizer.load_state_dict(last["optimizer"])
        vars(run).update({name: last[name] for name in STATE}, seconds=last.get("seconds", 0.0))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        where = shown(run.folder / "last.pt")
        raise UserError(f"{where} is of another net or store ({one_line(error)}); {anew}") from None


def read_checkpoint(path: Path, device="cpu") -> dict | None:
    """A last.pt of this loop; None for any other file, or where there is none. Raises OSError where the disk fails."""
    try:
        checkpoints.check_archive(path)
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        return checkpoint if "network" in checkpoint["config"] else None
    except FileNotFoundError:
        return None
    except Exception as error:  # torch's reader raises nearly anything
        if isinstance(error, OSError) or lacks_memory(error):
            raise
        return None
