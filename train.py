"""Train AlexNet with the paper's settings:

    python train.py                                   CIFAR-10 at 64 px, or the bundled sample where it can't be had
    python train.py --dataset fashion-mnist
    python train.py --data data/stores/imagenet
    torchrun --nproc-per-node 8 train.py --data data/stores/imagenet
    python train.py --resume

README.md says what you should see; --help lists the options.
"""

import json
import math
import os
import signal
import sys
import time
from argparse import Namespace
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import utils
from data import UserError, sources
from data.augment import Augment, epoch_tables
from data.cli import run_script
from data.loader import Loader
from data.pack import named_store
from data.progress import Progress, duration
from data.store import Store
from model import AlexNet
from options import parse, settle
from recipe import Schedule, make_optimizer, set_rate

LOOK_EVERY = 20  # steps between looks at the loss; each look waits for the device
SAVE_SECONDS = 600  # last.pt is written this often in mid-epoch
STUCK_STEPS = 500  # from here on a loss that is still ln(classes) is warned of


def main(argv=None) -> int:
    args = parse(argv)
    device = utils.pick_device(args.device)
    rank, world = start_processes(device)
    store, warning = open_store(args, world)
    settle(args, store, device, world)

    net = build_net(args, store).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(
        net, recipe=args.recipe, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    run = Run(args, store, device, rank, world, net, optimizer, State(), Schedule(args.lr, args.patience))
    if args.resume:
        load_last(run)
        if is_over(run):
            run.say(f"nothing left to do\n{conclusion(run, 0)}")
            return 0
    run.say(describe(run))
    prepare_folder(run)

    with Signals() as signals:
        status = fit(run, signals)
    run.say(conclusion(run, status))
    if warning:
        run.warn(warning)
    if world > 1:
        dist.destroy_process_group()
    return status


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
    net: AlexNet
    optimizer: torch.optim.Optimizer
    state: State
    schedule: Schedule
    warned: bool = False

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


# ---------------------------------------------------------------------------------------------- the loop


def fit(run: Run, signals: "Signals") -> int:
    """Train until the schedule, --epochs, --max-steps or a signal ends it. Returns the exit status."""
    args, store, device = run.args, run.store, run.device
    train, val = (Loader(store, split, device, args.workers // run.world) for split in ("train", "val"))
    inputs = Augment(
        args.image_size, store_mean(args, store), mirror=args.mirror, colour=args.colour, pca=store.manifest["pca"],
        device=device,
    )
    model = run.net if run.world == 1 else DistributedDataParallel(run.net)
    if args.compile:
        model = torch.compile(model)
    while not is_over(run):
        began = time.monotonic()
        sums, images, stop = train_epoch(run, model, train, inputs, signals)
        if stop:
            save_last(run, sums)
            return 128 + stop
        seconds = time.monotonic() - began
        finish_epoch(run, val, inputs, sums, images / seconds, began)
    return 0


def is_over(run: Run) -> bool:
    args, state = run.args, run.state
    at_limit = args.max_steps is not None and state.step >= args.max_steps
    return at_limit or run.schedule.finished or state.epoch >= args.epochs


def train_epoch(run: Run, model, train: Loader, inputs: Augment, signals: "Signals"):
    """Train to the end of the epoch, or to --max-steps or a signal. Returns this process's sums (loss, top-1 misses)
    on the device, how many images all processes have seen here, and the signal or 0."""
    args, state, share = run.args, run.state, run.args.batch_size // run.world
    tables = epoch_tables(args.seed, state.epoch, len(train), run.store.size - args.image_size)
    first = state.step - state.epoch * run.steps
    last = run.steps if args.max_steps is None else min(run.steps, args.max_steps - state.epoch * run.steps)
    mine = [tables.order[s * args.batch_size + run.rank * share :][:share] for s in range(first, last)]
    # What a resumed epoch has already summed up counts once, in the first process.
    start = [state.loss_sum, state.wrong] if run.rank == 0 else [0, 0]
    sums = torch.tensor(start, dtype=torch.float64, device=run.device)
    saved, stop = time.monotonic(), 0

    model.train()
    label = f"epoch {state.epoch + 1}/{args.epochs}"
    with Progress(label, run.steps * args.batch_size, start=first * args.batch_size) as progress:
        for position, samples, (images, labels) in zip(range(first, last), mine, train.batches(mine), strict=True):
            utils.seed_all(args.seed, state.step + 1, run.rank)  # for this step's dropout masks
            pictures = inputs.train(images, tables, samples)
            with torch.autocast(run.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                logits = model(pictures)
                loss = F.cross_entropy(logits, labels)
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
            state.step += 1
            sums[0] += loss.detach() * share
            sums[1] += (logits.detach().argmax(1) != labels).sum()

            note, due = "", False
            if state.step % LOOK_EVERY == 0:
                note = look(run, position + 1, sums)
                due = time.monotonic() - saved > SAVE_SECONDS
            progress.update(args.batch_size, note)
            stop, due = agree(run, signals.received, due)
            if stop:
                break
            if due:
                save_last(run, sums)
                saved = time.monotonic()
    return sums, (state.step - state.epoch * run.steps - first) * args.batch_size, stop


def look(run: Run, position: int, sums) -> str:
    """Look at the loss after `position` steps of the epoch: stop a run that has diverged, warn once of one that has
    not learnt anything. Returns the bar's note."""
    images = run.args.batch_size // run.world * position
    loss_sum, wrong = sums.tolist()
    check_finite(run, loss_sum)
    mean, chance = loss_sum / images, math.log(len(run.store.classes))
    if not run.warned and run.state.step >= STUCK_STEPS and abs(mean / chance - 1) < 0.01:
        run.warned = True
        run.warn(
            f"after {run.state.step} steps the mean loss is {mean:.3f}, still that of guessing. If it stays there: "
            "--recipe 2012 leaves this plateau sooner than --recipe paper; try another --lr; are the labels right?"
        )
    return f"loss {mean:.3f}, error {100 * wrong / images:.1f}%"


def check_finite(run: Run, loss_sum: float) -> None:
    if not math.isfinite(loss_sum):
        raise UserError(
            f"the loss is no longer finite at step {run.state.step}, learning rate {run.schedule.lr:g}; "
            f"start again with a lower --lr (the last sound state is in {run.args.out / 'last.pt'})"
        )


def agree(run: Run, stop: int, due: bool) -> tuple[int, bool]:
    """Whether to stop or save, the same in all processes: asked at the looks, where they wait for each other."""
    if run.world == 1:
        return stop, due
    if run.state.step % LOOK_EVERY:
        return 0, False
    flags = torch.tensor([stop, due], device=run.device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    stop, due = flags.tolist()
    return stop, bool(due)


def finish_epoch(run: Run, val: Loader, inputs: Augment, sums, images_per_second: float, began: float) -> None:
    """Validate, log, and where the epoch is whole: move the schedule, write the checkpoints."""
    args, state, schedule = run.args, run.state, run.schedule
    total_sums(run, sums)
    run.net.eval()
    measured = utils.evaluate([(run.net, inputs)], val, batch_size=args.batch_size, shard=(run.rank, run.world))
    if run.world > 1:
        dist.all_reduce(measured)
    val_loss, top1, top5 = (measured / len(val)).tolist()
    seen = (state.step - state.epoch * run.steps) * args.batch_size
    entry = {
        "epoch": state.epoch + 1, "step": state.step, "lr": schedule.lr, "train_loss": state.loss_sum / seen,
        "train_top1_error": 100 * state.wrong / seen, "val_loss": val_loss, "val_top1_error": 100 * top1,
        "val_top5_error": 100 * top5, "images_per_second": images_per_second, "seconds": time.monotonic() - began,
    }
    whole = state.step == (state.epoch + 1) * run.steps
    better = whole and 100 * top1 < state.best
    if whole:
        schedule.update(100 * top1)
        set_rate(run.optimizer, schedule.lr)
        state.epoch, state.loss_sum, state.wrong = state.epoch + 1, 0.0, 0.0
    if better:
        state.best = 100 * top1
    run.say(summary(run, entry))
    if run.rank == 0:
        utils.append_line(args.out / "log.jsonl", entry)
        if better or not (args.out / "best.pt").exists():
            utils.save_checkpoint(args.out / "best.pt", checkpoint(run))
    save_last(run)
    if run.rank == 0:
        utils.plot_curves(utils.read_log(args.out / "log.jsonl"), args.out / "curves.png")


def summary(run: Run, entry: dict) -> str:
    images_left = (run.args.epochs * run.steps - run.state.step) * run.args.batch_size
    left = duration(images_left / entry["images_per_second"]) if entry["images_per_second"] else "?"
    return (
        f"epoch {entry['epoch']:>2}/{run.args.epochs}  lr {entry['lr']:g}  "
        f"train loss {entry['train_loss']:.4f} error {entry['train_top1_error']:.2f}%  "
        f"val loss {entry['val_loss']:.4f} error {entry['val_top1_error']:.2f}% top-5 {entry['val_top5_error']:.2f}%  "
        f"{entry['images_per_second']:.0f} images/s  {duration(entry['seconds'])}, at most {left} left"
    )


# ---------------------------------------------------------------------------------------------- the run folder


def prepare_folder(run: Run) -> None:
    """Start or reopen --out. A fresh run has a last.pt from the first moment, so that --resume always works."""
    out = run.args.out
    if run.world > 1:
        dist.barrier()  # no process looks for a free folder any more
    if run.rank:
        return
    if run.args.resume:
        # Lines after the checkpoint, and the line of a --max-steps stop in mid-epoch, are written anew.
        log = utils.read_log(out / "log.jsonl")
        kept = [e for e in log if e["step"] <= run.state.step and e["step"] % run.steps == 0]
        utils.write_text(out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in kept))
        return
    out.mkdir(parents=True, exist_ok=True)
    arguments = {k: v for k, v in vars(run.args).items() if k not in ("out", "resume", "max_steps")}
    config = {
        "arguments": arguments, "store": utils.portable(run.store.path), "fingerprint": run.store.fingerprint,
        "processes": run.world, **utils.environment(run.device),
    }
    utils.write_text(out / "config.json", json.dumps(config, indent=1) + "\n")
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
    try:
        run.net.load_state_dict(last["model"])
        run.optimizer.load_state_dict(last["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not fit {run.args.out / 'config.json'}: {str(error).splitlines()[0]}") from None
    schedule = last["schedule"]
    sums = {name: schedule.pop(name) for name in ("loss_sum", "wrong")}
    run.schedule = Schedule(**schedule)
    run.state = State(step=last["step"], epoch=last["epoch"], best=last["best"], **sums)


class Signals:
    """SIGTERM and Ctrl-C are noted, and the loop stops in good order; the second one ends the process at once."""

    def __init__(self):
        self.received = 0

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number


# ---------------------------------------------------------------------------------------------- setting up


def start_processes(device: torch.device) -> tuple[int, int]:
    """(rank, number of processes); joins torchrun's group where there is one."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def open_store(args, world: int) -> tuple[Store, str]:
    """The store to train from, and a warning where it is not what a user might expect."""
    if args.data:
        return Store(args.data), ""
    # torchrun's processes would all pack at once: there the store has to exist.
    download = None if world > 1 else args.download == "yes"
    if args.dataset:
        return named_store(args.dataset, download), ""
    try:
        return named_store("cifar10", download), ""
    except sources.Unavailable as error:
        warning = (
            f"this is the bundled sample (8,000 Fashion-MNIST images), not CIFAR-10: {error}. "
            "--dataset and --data name other data"
        )
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    return named_store("sample", download), warning


def build_net(args, store: Store) -> AlexNet:
    """The net, initialised from --seed or from --init."""
    try:
        net = AlexNet(
            len(store.classes), image_size=args.image_size, columns=args.columns, order=args.order,
            activation=args.activation, lrn=args.lrn, overlapping_pool=args.overlap, dropout=0.5 if args.dropout else 0,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    utils.seed_all(args.seed)
    net.init_weights(args.recipe)
    if args.init and not args.resume:
        take_weights(net, args.init)
    return net


def take_weights(net: AlexNet, path: str) -> None:
    """Start from another run's weights; where the class counts differ fc8 stays as initialised."""
    other = utils.load_checkpoint(path)
    for option, value in net.config.items():
        if option not in ("num_classes", "dropout") and other["config"].get(option) != value:
            raise UserError(f"--init {path}: its {option} is {other['config'].get(option)}, this run's {value}")
    weights = dict(other["model"])
    if other["config"]["num_classes"] != net.config["num_classes"]:
        print(f"{path} has {len(other['classes'])} classes, this net {net.config['num_classes']}: fc8 starts fresh")
        weights |= {name: value for name, value in net.state_dict().items() if name.startswith("fc8.")}
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"--init {path}: the weights do not fit: {str(error).splitlines()[0]}") from None


def store_mean(args, store: Store) -> torch.Tensor:
    """What is subtracted: the mean image (H, W, C), or with --mean channel its means (1, 1, C)."""
    mean = torch.from_numpy(store.mean)
    return mean.mean((0, 1), keepdim=True) if args.mean == "channel" else mean


def describe(run: Run) -> str:
    args, store = run.args, run.store
    machine = utils.environment(run.device)
    columns = "one column" if args.columns == 1 else "two columns"
    count = sum(p.numel() for p in run.net.parameters())
    lines = {
        "data": f"{store.name}: {store.counts['train']:,} training and {store.counts['val']:,} validation pictures, "
        f"{len(store.classes)} classes, {store.size} x {store.size}{' grey' if store.channels == 1 else ''}",
        "net": f"AlexNet, {columns}, {args.image_size} x {args.image_size} pixels, {count:,} parameters",
        "recipe": f"{args.recipe}: batch {args.batch_size}, rate {args.lr:g}, momentum {args.momentum:g}, "
        f"decay {args.weight_decay:g}, at most {args.epochs} epochs, patience {args.patience}",
        "device": f"{machine['device']}, {run.world} process{'es' * (run.world > 1)}, {machine['threads']} threads, "
        f"{args.precision}",
        "run": f"{utils.shown(args.out)}{f', from step {run.state.step}' if args.resume else ''}",
    }
    if store.name == "sample":
        lines["recipe"] += " (the sample has its own epochs, batch and patience)"
    return "\n".join(f"{name:<8}{text}" for name, text in lines.items())


def test_command(args) -> str:
    return f"python test.py {utils.shown(args.out / 'best.pt')} --ten-crop"


def conclusion(run: Run, status: int) -> str:
    args, state, out = run.args, run.state, utils.shown(run.args.out)
    resume = f"python train.py --out {out} --resume"
    if status:
        return f"stopped at step {state.step}; {resume} goes on from there"
    best = f"lowest validation top-1 error {state.best:.2f}%" if math.isfinite(state.best) else "no whole epoch yet"
    lines = [f"done: {state.step} steps, {best}", f"in {out}: best.pt, last.pt, log.jsonl, curves.png"]
    if not run.schedule.finished and state.epoch < args.epochs:
        lines.append(f"go on:   {resume}")
    return "\n".join([*lines, f"test it: {test_command(args)}"])


if __name__ == "__main__":
    run_script(main)
