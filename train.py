"""Train AlexNet with the paper's settings:

    python train.py                                   CIFAR-10 at 64 px, or the bundled sample where it can't be had
    python train.py --dataset fashion-mnist
    python train.py --data data/stores/imagenet
    torchrun --nproc-per-node 8 train.py --data data/stores/imagenet
    python train.py --resume

README.md says what you should see; --help lists the options.
"""

import math
import os
import signal
import sys
import time
from contextlib import closing

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import utils
from data import sources
from data.augment import Augment, epoch_tables
from data.cli import run_script, shown
from data.loader import Loader
from data.pack import named_store
from data.progress import Progress, duration
from data.store import Store
from kernels import accelerate
from options import parse, settle
from recipe import Schedule, make_optimizer, set_rate
from run import (
    Run,
    State,
    check_finite,
    checkpoint,
    load_last,
    run_folder,
    save_last,
    total_sums,
    training_inputs,
    watch_activations,
)
from start import starting_net

LOOK_EVERY = 20  # steps between looks at the loss; each look waits for the device
SAVE_SECONDS = 600  # last.pt is written this often in mid-epoch
STUCK_STEPS = 500  # from here on a loss that is still ln(classes) is warned of


def main(argv=None) -> int:
    args = parse(argv)
    device = utils.pick_device(args.device)
    rank, world = start_processes(device)
    store, warning = open_store(args, world)
    settle(args, store, device, world)
    utils.settle_arithmetic()
    torch.backends.cudnn.benchmark = True  # every step has the same shapes: let cuDNN try its algorithms once

    net = starting_net(args, store).to(device, memory_format=torch.channels_last)
    kernels = "LRN of model.py, dense layers of torch"
    if args.kernels != "off":
        kernels = accelerate(net, gpu_kernels=args.kernels == "on")
    optimizer = make_optimizer(
        net, recipe=args.recipe, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    run = Run(args, store, device, rank, world, net, optimizer, State(), Schedule(args.lr, args.patience),
              kernels)
    if args.resume:
        load_last(run)
        if is_over(run):
            run.say(f"nothing left to do\n{conclusion(run, 0)}")
            return 0

    with run_folder(run), Signals() as signals:
        run.say(describe(run))
        status = fit(run, signals)
    run.say(conclusion(run, status))
    if warning:
        run.warn(warning)
    if world > 1:
        leave_together(status)
    return status


# ---------------------------------------------------------------------------------------------- the loop


def fit(run: Run, signals: "Signals") -> int:
    """Train until the schedule, --epochs, --max-steps or a signal ends it. Returns the exit status."""
    args, store, device = run.args, run.store, run.device
    train, val = (Loader(store, split, device, args.workers // run.world) for split in ("train", "val"))
    inputs = training_inputs(args, store, device)
    model = run.net if run.world == 1 else DistributedDataParallel(run.net)
    if args.compile:
        model = torch.compile(model)
    while not is_over(run):
        began = time.monotonic()
        sums, speed, stop = train_epoch(run, model, train, inputs, signals)
        if stop:
            save_last(run, sums)
            return 128 + stop
        finish_epoch(run, measure(run, val, inputs, sums) | speed | {"seconds": time.monotonic() - began})
    return 0


def is_over(run: Run) -> bool:
    args, state = run.args, run.state
    at_limit = args.max_steps is not None and state.step >= args.max_steps
    return at_limit or run.schedule.finished or state.epoch >= args.epochs


def train_epoch(run: Run, model, train: Loader, inputs: Augment, signals: "Signals"):
    """Train to the end of the epoch, or to --max-steps or a signal. Returns this process's sums (loss, top-1 misses)
    on the device, the speed for the log, and the signal or 0."""
    args, state, share = run.args, run.state, run.args.batch_size // run.world
    margin = train.size - args.image_size
    tables = epoch_tables(args.seed, state.epoch, len(train), margin, args.crop_runs, args.mirror)
    first = state.step - state.epoch * run.steps
    last = run.steps if args.max_steps is None else min(run.steps, args.max_steps - state.epoch * run.steps)
    mine = [tables.order[s * args.batch_size + run.rank * share :][:share] for s in range(first, last)]
    # What a resumed epoch has summed up already is shared out among the processes.
    sums = torch.tensor([state.loss_sum, state.wrong], dtype=torch.float64, device=run.device) / run.world
    started, waited, stop, pictures = time.monotonic(), 0.0, 0, None
    saved = started

    model.train()
    label = f"epoch {state.epoch + 1}/{args.epochs}"
    done = first * args.batch_size
    bar = Progress(label, run.steps * args.batch_size, start=done, silent=run.rank > 0)
    with bar as progress, closing(train.batches(mine, tables, args.image_size)) as batches:
        for position, samples in enumerate(mine, first):
            began = time.monotonic()
            crops, labels = next(batches)
            pictures = inputs.train(crops, tables.colour[samples], out=pictures)
            waited += time.monotonic() - began
            utils.seed_all(args.seed, state.step + 1, run.rank)  # for this step's dropout masks
            loss, logits = train_step(model, run.optimizer, pictures, labels, args.precision)
            state.step += 1
            sums[0] += loss * share
            sums[1] += (logits.argmax(1) != labels).sum()

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
    seconds, images = time.monotonic() - started, (state.step - state.epoch * run.steps - first) * args.batch_size
    return sums, {"images_per_second": images / seconds, "stall": 100 * waited / seconds}, stop


def train_step(model, optimizer, pictures, labels, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One step on float (n, 3, S, S) pictures: mean loss, and logits (n, classes), both detached."""
    optimizer.zero_grad()  # before the forward pass, which can have the gradients' memory
    with torch.autocast(pictures.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(pictures)
        loss = F.cross_entropy(logits, labels)
    loss.backward()
    optimizer.step()
    return loss.detach(), logits.detach()


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


def agree(run: Run, stop: int, due: bool) -> tuple[int, bool]:
    """Whether to stop or save, the same in all processes. On GPUs they ask each other at the looks only, because
    asking waits for the device."""
    if run.world == 1:
        return stop, due
    if run.device.type == "cuda" and run.state.step % LOOK_EVERY:
        return 0, False
    flags = torch.tensor([stop, due], device=run.device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    stop, due = flags.tolist()
    return stop, bool(due)


def measure(run: Run, val: Loader, inputs: Augment, sums) -> dict:
    """Validate, and put together what the log says of an epoch, but for the times."""
    args, state = run.args, run.state
    total_sums(run, sums)
    run.net.eval()
    measured = utils.evaluate([(run.net, inputs)], val, batch_size=args.batch_size, shard=(run.rank, run.world))
    if run.world > 1:
        dist.all_reduce(measured)
    val_loss, top1, top5 = (measured / len(val)).tolist()
    seen = (state.step - state.epoch * run.steps) * args.batch_size
    learnt = watch_activations(run)
    return {
        "epoch": state.epoch + 1, "step": state.step, "lr": run.schedule.lr, "train_loss": state.loss_sum / seen,
        "train_top1_error": 100 * state.wrong / seen, "val_loss": val_loss, "val_top1_error": 100 * top1,
        "val_top5_error": 100 * top5, **({"activations": learnt} if learnt else {}),
    }


def finish_epoch(run: Run, entry: dict) -> None:
    """Log, and where the epoch is whole: move the schedule, write the checkpoints."""
    args, state, schedule, error = run.args, run.state, run.schedule, entry["val_top1_error"]
    whole = state.step == (state.epoch + 1) * run.steps
    better = whole and error < state.best
    if whole:
        schedule.update(error)
        set_rate(run.optimizer, schedule.lr)
        state.epoch, state.loss_sum, state.wrong = state.epoch + 1, 0.0, 0.0
    if better:
        state.best = error
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
        f"{entry['images_per_second']:.0f} images/s, stall {entry['stall']:.1f}%  "
        f"{duration(entry['seconds'])}, at most {left} left"
    )


# ---------------------------------------------------------------------------------------------- setting up


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


def start_processes(device: torch.device) -> tuple[int, int]:
    """(rank, number of processes); joins torchrun's group where there is one."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def leave_together(status: int) -> None:
    """End this process when all of them have come this far. Not by way of Python: there gloo's threads now and then
    abort ("terminate called without an active exception"), and torchrun then kills the others."""
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def open_store(args, world: int) -> tuple[Store, str]:
    """The store to train from, and a warning where it is not what a user might expect."""
    if args.data:
        return Store(args.data), ""
    # torchrun's processes would all pack at once: there the store has to exist.
    download = None if world > 1 else args.download == "yes"
    warning = ""
    if not args.dataset:
        try:
            store = named_store("cifar10", download)
            args.dataset = "cifar10"
            return store, ""
        except sources.Unavailable as error:
            args.dataset = "sample"
            warning = (
                f"this is the bundled sample (8,000 Fashion-MNIST images), not CIFAR-10: {error}. "
                "--dataset and --data name other data"
            )
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    return named_store(args.dataset, download), warning


def describe(run: Run) -> str:
    args, store = run.args, run.store
    machine = utils.environment(run.device)
    columns = "one column" if args.columns == 1 else "two columns"
    if args.order == "2012":
        columns += ", in the order of the 2012 code"
    kind = "torchvision's alexnet (another net than the paper's)" if "net" in run.net.config else f"AlexNet, {columns}"
    count = sum(p.numel() for p in run.net.parameters())
    lines = {
        "data": f"{store.name}: {store.counts['train']:,} training and {store.counts['val']:,} validation pictures, "
        f"{len(store.classes)} classes, {store.size} x {store.size}{' grey' if store.channels == 1 else ''}",
        "net": f"{kind}, {args.image_size} x {args.image_size} pixels, {count:,} parameters",
        "recipe": f"{args.recipe}: batch {args.batch_size}, rate {args.lr:g}, momentum {args.momentum:g}, "
        f"decay {args.weight_decay:g}, at most {args.epochs} epochs, patience {args.patience}",
        "device": f"{machine['device']}, {run.world} process{'es' * (run.world > 1)}, {machine['threads']} threads, "
        f"{args.precision}{', no TF32' if run.device.type == 'cuda' and args.precision == 'fp32' else ''}",
        "kernels": run.kernels,
        "run": f"{shown(args.out)}{f', from step {run.state.step}' if args.resume else ''}",
    }
    if store.name == "sample":
        lines["recipe"] += " (the sample has defaults of its own for epochs, batch and patience)"
    return "\n".join(f"{name:<8}{text}" for name, text in lines.items())


def test_command(args) -> str:
    return f"python test.py {shown(args.out / 'best.pt')} --ten-crop"


def conclusion(run: Run, status: int) -> str:
    args, state, out = run.args, run.state, shown(run.args.out)
    resume = f"python train.py --out {out} --resume"
    if status:
        return f"stopped at step {state.step}; {resume} goes on from there"
    best = f"lowest validation top-1 error {state.best:.2f}%" if math.isfinite(state.best) else "no whole epoch yet"
    lines = [f"done: {state.step} steps, {best}", f"in {out}: best.pt, last.pt, log.jsonl, curves.png"]
    if not run.schedule.finished and state.epoch < args.epochs:
        lines.append(f"go on:   {resume}")
    return "\n".join([*lines, f"test it: {test_command(args)}"])


if __name__ == "__main__":
    utils.huge_pages()
    run_script(main)
