"""Train AlexNet with the paper's settings:

    python train.py                                   CIFAR-10 at 64 px, or the bundled sample where it can't be had
    python train.py --dataset fashion-mnist
    python train.py --data photos                     a folder of your own: photos/CLASS/..., packed first
    python train.py --data data/stores/imagenet
    torchrun --nproc-per-node 8 train.py --data data/stores/imagenet
    python train.py --resume

README.md says what you should see; --help lists the options.
"""

import math
import shlex
from contextlib import closing
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import memory
import processes
import utils
from checkpoints import describe_net, freeze, load_checkpoint, new_net, take_weights
from checkpoints.run import (
    State,
    Training,
    append_line,
    environment,
    keep_kernels,
    last_sound,
    load_last,
    plot_curves,
    read_log,
    run_folder,
    save_best,
    save_last,
    store_mean,
)
from data import sources
from data.augment import Augment, epoch_tables
from data.loader import Loader, machine_errors
from data.manifest import is_store
from data.pack import named_store, store_of
from data.store import Store
from kernels import accelerate, multiplies_bf16, trouble_with_dense, trouble_with_lrn
from model import AlexNet, LocalResponseNorm, activation_parameters
from options import FEW, NET, packed_size, parse, settle, small_crops
from recipe import Schedule, make_optimizer, set_rate
from utils import Diverged, Progress, UserError, duration, run_script, shown
from watch import LOOK_EVERY, Watch

MAY_DIFFER = {"data", "device", "download", "init", "out", "packed_from", "resume", "workers"}  # between processes
STUCK_STEPS = 500  # from here on a loss that is still ln(classes) is warned of


def main(argv=None) -> int:
    args = parse(argv, processes.interrupted_run())
    device = utils.pick_device(args.device)
    with processes.ending_together(), machine_errors():
        watch = Watch(device, *processes.join(device))
        store, fallback = open_store(args, watch)
        settle(args, store, device, watch.world)
        watch.warn(small_crops(args, store))
        same = {name: value for name, value in vars(args).items() if name not in MAY_DIFFER}
        processes.agree(same | {"store": f"{store.name}, {store.fingerprint}"})
        run = set_up(args, store, starting_net(args, store, watch), watch)
        if args.resume:
            watch.warn(load_last(run, device))
            processes.agree({"checkpoint": asdict(run.state)})
            if is_over(run):
                why = ": the learning rate has fallen three times" if run.schedule.finished else ""
                watch.say(f"nothing left to do{why}\n{conclusion(run, 0)}")
                return processes.leave(0)

        processes.wait()  # every process has looked at the folder before the first one writes
        with run_folder(run, device, watch.rank, watch.world) as warning, watch:
            processes.remember_run(args.out)
            watch.warn(warning)
            watch.say(describe(run, watch))
            status = fit(run, watch)
        watch.say(conclusion(run, status))
        watch.warn(fallback)
        return processes.leave(status)


# ---------------------------------------------------------------------------------------------- the loop


def fit(run: Training, watch: Watch) -> int:
    """Train until the schedule, --epochs, --max-steps or a signal ends it. Returns the exit status."""
    args, device = run.args, watch.device
    # Rounded up, so that no process is left without a worker.
    how = {"workers": -(-args.workers // watch.world), "skip_bad": args.skip_bad_records}
    train, val = (Loader(run.store, split, device, **how) for split in ("train", "val"))
    if args.skip_bad_records:
        replaced_records(run, watch, train, val)  # splits on the device have been read by now
    inputs = training_inputs(args, run.store, device)
    here = processes.on_this_machine()
    watch.warn(val.shared_memory_trouble(args.batch_size, processes=here)  # whole pictures, not crops
               or train.shared_memory_trouble(args.batch_size // watch.world, args.image_size, here))
    model = run.net if watch.world == 1 else DistributedDataParallel(run.net, gradient_as_bucket_view=True)
    if args.compile:
        model = torch.compile(model)
    while not is_over(run):
        sums, stop = train_epoch(run, model, train, inputs, watch)
        take_totals(run, sums, watch)
        if stop:
            if watch.rank == 0:
                save_last(run)
            return 128 + stop
        entry = validate(run, val, inputs, watch)
        if not at_limit(run) and (stop := watch.told_to_stop()):
            if watch.rank == 0:
                save_last(run)  # all steps of the epoch; --resume validates anew
            return 128 + stop
        if args.skip_bad_records:
            entry |= replaced_records(run, watch, train, val)
        finish_epoch(run, entry, watch)
        memory.hand_back()
    return 0


def at_limit(run: Training) -> bool:
    return run.args.max_steps is not None and run.state.step >= run.args.max_steps


def is_over(run: Training) -> bool:
    return at_limit(run) or run.schedule.finished or run.state.epoch >= run.args.epochs


def train_epoch(run: Training, model, train: Loader, inputs: Augment, watch: Watch):
    """Train to the end of the epoch, or to --max-steps or a signal. Returns this process's sums (loss, top-1 misses)
    on the device, and the signal or 0."""
    args, state, share = run.args, run.state, run.args.batch_size // watch.world
    margin = run.store.size - args.image_size
    labels = train.every_label if args.balance else None
    tables = epoch_tables(args.seed, state.epoch, len(train), margin, args.crop_runs, args.mirror, labels)
    first, last = state.step_in_epoch, run.steps_per_epoch
    if args.max_steps is not None:
        last = min(last, first + args.max_steps - state.step)
    mine = [tables.order[s * args.batch_size + watch.rank * share :][:share] for s in range(first, last)]
    # What a resumed epoch has summed up already is shared out among the processes.
    sums = torch.tensor([state.loss_sum, state.wrong], dtype=torch.float64, device=watch.device) / watch.world
    label, done = f"epoch {state.epoch + 1}/{args.epochs}", first * args.batch_size
    pictures, stop = None, 0

    model.train()
    watch.start_epoch(state.seconds)
    progress = Progress(label, run.steps_per_epoch * args.batch_size, start=done, silent=watch.rank > 0)
    with progress, closing(train.batches(mine, tables, args.image_size)) as batches:
        for samples in mine:
            with watch.waiting():
                crops, labels = next(batches)
            pictures = inputs.train(crops, tables.colour[samples], out=pictures)

            utils.seed_all(args.seed, state.step + 1, watch.rank)  # for this step's dropout masks
            loss, logits = train_step(model, run.optimizer, pictures, labels, args.precision)

            state.step += 1
            state.step_in_epoch += 1
            sums[0] += loss * share
            sums[1] += (logits.argmax(1) != labels).sum()

            note = look(run, sums, watch) if state.step % LOOK_EVERY == 0 else ""
            progress.update(args.batch_size, note)
            stop, save = watch.decide(state.step, 60 * args.checkpoint_minutes)
            if stop:
                break
            if save and state.step_in_epoch < last:  # after the last step there is a validation first
                take_totals(run, sums, watch)
                if watch.rank == 0:
                    save_last(run)
                memory.hand_back()
    watch.end_epoch((state.step_in_epoch - first) * args.batch_size)
    return sums, stop


def train_step(model, optimizer, pictures, labels, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One step on float (n, 3, S, S) pictures: mean loss, and logits (n, classes), both detached."""
    optimizer.zero_grad()  # before the forward pass, which can have the gradients' memory
    with torch.autocast(pictures.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(pictures)
        loss = F.cross_entropy(logits, labels)
    loss.backward()
    optimizer.step()
    return loss.detach(), logits.detach()


def look(run: Training, sums, watch: Watch) -> str:
    """Look at the loss of the epoch so far: stop a run that has diverged, warn once of one that has not learnt
    anything. Returns the progress bar's note."""
    state, images = run.state, run.state.step_in_epoch * run.args.batch_size // watch.world
    loss_sum, wrong = sums.tolist()
    check_finite(run, loss_sum)
    mean, chance = loss_sum / images, math.log(len(run.store.classes))
    if state.step >= STUCK_STEPS and abs(mean / chance - 1) < 0.01:
        watch.warn_once(
            "stuck", f"after {state.step} steps the mean loss is {mean:.3f}, still that of guessing. If it stays "
            f"there, {'--recipe 2012 leaves this plateau sooner; ' * (run.args.recipe == 'paper')}try another --lr, "
            "and check the labels"
        )
    return f"loss {mean:.3f}, error {100 * wrong / images:.1f}%"


def check_finite(run: Training, loss_sum: float) -> None:
    if not math.isfinite(loss_sum):
        raise Diverged(
            f"the loss is no longer finite at step {run.state.step}, learning rate {run.schedule.lr:g}; "
            f"start again with a lower --lr (the last sound state is in {run.args.out / 'last.pt'})"
        )


def take_totals(run: Training, sums, watch: Watch) -> None:
    """Put the sums over all processes, and the time, into the state."""
    run.state.loss_sum, run.state.wrong = watch.total(sums).tolist()
    run.state.seconds = watch.seconds()
    check_finite(run, run.state.loss_sum)


def validate(run: Training, val: Loader, inputs: Augment, watch: Watch) -> dict:
    """The log's line of an epoch, but for its times; of no use where a signal has ended it."""
    args, state = run.args, run.state
    run.net.eval()
    with closing(val.in_order(args.batch_size, watch.rank, watch.world)) as batches:
        until_told = takewhile(lambda _: at_limit(run) or not watch.received, batches)
        sums = utils.evaluate([(run.net, inputs.views)], until_told)
    val_loss, top1, top5 = (watch.total(sums) / len(val)).tolist()
    seen, learnt = state.step_in_epoch * args.batch_size, watch_activations(run.net, watch)
    return {
        "epoch": state.epoch + 1, "step": state.step, "lr": run.schedule.lr, "train_loss": state.loss_sum / seen,
        "train_top1_error": 100 * state.wrong / seen, "val_loss": val_loss, "val_top1_error": 100 * top1,
        "val_top5_error": 100 * top5, **({"activations": learnt} if learnt else {}),
    }


def watch_activations(net: torch.nn.Module, watch: Watch) -> dict[str, float]:
    """What each FReLU, SReLU and PReLU has learnt so far, for the log. Warns once of each b that has turned positive:
    FReLU's authors watch for that."""
    values = {name: parameter.item() for name, parameter in activation_parameters(net).items()}
    for name, value in values.items():
        if value > 0 and net.config.get("activation") in ("frelu", "srelu"):
            watch.warn_once(name, f"b has turned positive in {name} ({value:.3f}). That harms the training, say "
                            "FReLU's authors: b should settle below 0. A lower learning rate may help")
    return values


def replaced_records(run: Training, watch: Watch, *loaders: Loader) -> dict:
    """For the log: the damaged records that were replaced so far, in all processes. Raises UserError where there are
    more than --skip-bad-records; the epoch's steps are kept."""
    found = processes.united({f"{loader.split} {index}" for loader in loaders for index in loader.bad})
    allowed = run.args.skip_bad_records
    if len(found) > allowed:
        if watch.rank == 0:
            save_last(run)
        processes.wait()  # the first one to raise ends all
        raise UserError(f"{len(found)} damaged records in all processes, more than --skip-bad-records {allowed}: "
                        f"{', '.join(found)}; copy or pack the store again, or --resume with a higher number")
    return {"replaced_records": found} if found else {}


def finish_epoch(run: Training, entry: dict, watch: Watch) -> None:
    """Log, and where the epoch is whole: move the schedule. Write the checkpoints."""
    args, state, schedule = run.args, run.state, run.schedule
    better, whole = False, state.step_in_epoch == run.steps_per_epoch
    if whole:
        better = schedule.update(entry["val_top1_error"], entry["epoch"])
        set_rate(run.optimizer, schedule.lr)
        run.state = State(state.step, state.epoch + 1)
    entry |= watch.times()
    if found := entry.get("replaced_records"):
        watch.warn_once(f"{len(found)} replaced", f"damaged records, replaced by others: {', '.join(found)}")
    if watch.rank == 0:
        append_line(args.out / "log.jsonl", entry)
        if whole:
            keep_kernels(run)
        if better or not (math.isfinite(schedule.best) and (args.out / "best.pt").exists()):
            save_best(run)
        save_last(run)
        plot_curves(read_log(args.out / "log.jsonl"), args.out / "curves.png")
    watch.say(summary(run, entry))


# ---------------------------------------------------------------------------------------------- setting up


def open_store(args, watch: Watch) -> tuple[Store, str]:
    """The store to train from, and a warning where it is not what a user might expect."""
    if args.data:
        return stored(args, watch), ""
    if args.val is not None:
        raise UserError("--val is for --data FOLDER; named sets have their own validation pictures")
    # torchrun's processes would all pack at once: there the store has to exist.
    download = None if watch.world > 1 else args.download == "yes"
    if args.dataset:
        return named_store(args.dataset, download), ""
    try:
        store, args.dataset = named_store("cifar10", download), "cifar10"
        return store, ""
    except sources.Unavailable as error:
        args.dataset = "sample"
        warning = (
            f"this is the bundled sample (8,000 Fashion-MNIST images), not CIFAR-10: {error}. "
            "--dataset and --data name other data"
        )
        watch.warn(warning)
    return named_store(args.dataset, download), warning


def stored(args, watch: Watch) -> Store:
    """The store that --data names, or that of the folder of pictures that it names, packed where there is none yet."""
    path = Path(args.data)
    if is_store(path) or not path.exists():
        if args.val is not None:
            raise UserError(f"--val is for a folder of pictures; {path} is a store, with validation pictures of its own"
                            if path.exists() else f"{path}: no such folder")
        return Store(path)
    if watch.world > 1:
        raise UserError(f"{path} is not a store; several processes need one: python -m data.pack "
                        f"{shlex.quote(str(path))} --out STORE")
    store = store_of(path, args.image_size and packed_size(args.image_size), args.val)
    args.packed_from = {"data": args.data, "val": args.val}  # to be read, and to --resume with the same command
    args.data, args.val = str(store.path.resolve()), None  # what --resume goes on with
    return store


def set_up(args, store: Store, net: torch.nn.Module, watch: Watch) -> Training:
    """The net on its device, its fast parts and its optimiser, before the first step."""
    utils.no_tf32()
    torch.backends.cudnn.benchmark = True  # every step has the same shapes: let cuDNN try its algorithms once
    net = net.to(watch.device, memory_format=torch.channels_last)
    if args.freeze:
        freeze(net, args.freeze)
    lrn = any(isinstance(layer, LocalResponseNorm) for layer in net.modules())
    if args.kernels == "on":
        require_kernels(watch.device.type, lrn)
    if args.compile:
        require_compiler(watch.device)
    plain = "LRN of model.py, dense layers of torch" if lrn else "dense layers of torch"
    kernels = accelerate(net) if args.kernels != "off" else plain
    optimizer = make_optimizer(
        net, recipe=args.recipe, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    return Training(args, store, net, optimizer, Schedule(args.lr, args.patience, args.drops), kernels)


def require_kernels(device: str, lrn: bool) -> None:
    trouble = (lrn and trouble_with_lrn(device)) or (device == "cpu" and trouble_with_dense(device))
    if trouble:
        raise UserError(f"--kernels on: {trouble}; --kernels auto does without")


def require_compiler(device: torch.device) -> None:
    try:
        torch.compile(torch.neg)(torch.zeros(8, device=device))
    except RuntimeError as error:  # the base of all that Dynamo and Inductor raise
        reason = utils.one_line(error).partition(" Set TORCH")[0]
        raise UserError(f"--compile: torch.compile does not work here ({reason}); install what it needs, or train "
                        "with --no-compile") from None


def starting_net(args, store: Store, watch: Watch) -> torch.nn.Module:
    """The net by the options, initialised from --seed; or that of --init with its weights."""
    try:
        if not args.init:
            options = {name: getattr(args, name) for name in NET}
            net = AlexNet(len(store.classes), dropout=0.5 if args.dropout else 0, **options)
            utils.seed_all(args.seed)
            net.init_weights(args.recipe)
            return net
        # On --resume the file of --init may be gone; last.pt tells as well which net it was.
        start = last_sound(args.out) if args.resume else Path(args.init)
        checkpoint = load_checkpoint(start)
        utils.seed_all(args.seed)
        config = checkpoint["config"] | {"num_classes": len(store.classes)}
        net = new_net(config if args.dropout else config | {"dropout": 0})
    except (ValueError, TypeError) as error:
        where = f"{shown(start)}: " if args.init else ""
        raise error if isinstance(error, UserError) else UserError(f"{where}{error}") from None
    if not args.resume:
        warning = take_weights(net, checkpoint, shown(Path(args.init)), store.classes, store.wnids)
        watch.warn(warning)
        if not args.dropout and "net" not in config:  # the factor of testing (paper, section 4.2) goes into the weights
            for layer in [net.fc7] if warning else [net.fc7, net.fc8]:
                layer.weight.data.mul_(1 - config["dropout"])
    return net


def training_inputs(args, store: Store, device: torch.device) -> Augment:
    """What makes the net's inputs of stored pictures, by the arguments."""
    return Augment(
        args.image_size, store_mean(args, store), colour=args.colour, pca=store.manifest["pca"], device=device
    )


# ---------------------------------------------------------------------------------------------- what it says


def describe(run: Training, watch: Watch) -> str:
    args, store = run.args, run.store
    machine = environment(watch.device)
    count = sum(p.numel() for p in run.net.parameters())
    frozen = f", all up to {args.freeze} frozen" if args.freeze else ""
    note = ", no TF32" if watch.device.type == "cuda" and args.precision == "fp32" else ""
    kernels = run.kernels
    if args.precision == "bf16" and not multiplies_bf16(watch.device):
        kernels += "; bf16 is emulated: there is no bf16 arithmetic here, and fp32 is faster"
    elif args.precision == "bf16" and watch.device.type == "cpu":
        kernels += "; in bf16 dense layers are torch's"
    epochs = f"at most {args.epochs} epochs, patience {args.patience}"
    if args.drops:
        drops = ", ".join(str(epoch) for epoch in args.drops if epoch < args.epochs)
        epochs = f"{args.epochs} epochs, learning rate divided by 10 after {drops or 'none of them'}"
    lines = {
        "data": f"{store.name}: {store.counts['train']:,} training and {store.counts['val']:,} validation pictures, "
        f"{len(store.classes)} classes, {store.size} x {store.size}{' grey' if store.channels == 1 else ''}",
        "net": f"{describe_net(run.net)}, {args.image_size} x {args.image_size} pixels, {count:,} parameters{frozen}",
        "recipe": f"{args.recipe}: batch {args.batch_size}, learning rate {args.lr:g}, momentum {args.momentum:g}, "
        f"weight decay {args.weight_decay:g}, {epochs}",
        "device": f"{machine['device']}, {watch.world} process{'es' * (watch.world > 1)}, {machine['threads']} "
        f"threads, {args.precision}{note}",
        "kernels": kernels,
        "run": f"{shown(args.out)}{f', from step {run.state.step}' if args.resume else ''}",
    }
    if store.name == "sample":
        lines["recipe"] += " (the sample has defaults of its own for epochs, batch and patience)"
    elif store.name not in sources.NAMED and store.counts["train"] < FEW and not args.init:
        lines["note"] = (f"{store.counts['train']:,} training pictures are few to train from scratch: expect "
                         "overfitting; --init CHECKPOINT starts from trained weights")
    return "\n".join(f"{name:<8}{text}" for name, text in lines.items())


def summary(run: Training, entry: dict) -> str:
    steps, before = run.steps_per_epoch, (entry["epoch"] - 1) * run.steps_per_epoch
    left = duration(entry["seconds"] * (run.args.epochs * steps - entry["step"]) / (entry["step"] - before))
    top5 = f" top-5 {entry['val_top5_error']:.2f}%" if len(run.store.classes) > 5 else ""
    return (
        f"epoch {entry['epoch']:>2}/{run.args.epochs}  lr {entry['lr']:g}  "
        f"train loss {entry['train_loss']:.4f} error {entry['train_top1_error']:.2f}%  "
        f"val loss {entry['val_loss']:.4f} error {entry['val_top1_error']:.2f}%{top5}  "
        f"{entry['images_per_second']:.0f} images/s, stall {entry['stall']:.1f}%  "
        f"{duration(entry['seconds'])}, at most {left} left"
    )


def conclusion(run: Training, status: int) -> str:
    state, best, out = run.state, run.schedule.best, shlex.quote(shown(run.args.out))
    less = " without --max-steps," if run.args.max_steps else ""
    started = f"the same torchrun command{less} with" if processes.number_of_processes() > 1 else python("train.py")
    resume = f"{started} --out {out} --resume"
    log = read_log(run.args.out / "log.jsonl")
    replaced = log[-1].get("replaced_records") if log else None
    told = [f"damaged records, replaced by others: {', '.join(replaced)}"] if replaced else []
    if status:
        return "\n".join([f"stopped at step {state.step}; {resume} goes on from there", *told])
    reached = f"lowest validation top-1 error {best:.2f}%" if math.isfinite(best) else "no whole epoch yet"
    there = [name for name in ("best.pt", "last.pt", "log.jsonl", "curves.png") if (run.args.out / name).exists()]
    lines = [f"done: {state.step} steps, {reached}", f"in {out}: {', '.join(there)}"]
    if not run.schedule.finished and state.epoch < run.args.epochs:
        lines.append(f"go on:   {resume}")
    if "best.pt" in there:
        lines.append(f"test it: {python('test.py')} {out}/best.pt --ten-crop")
    return "\n".join([*lines, *told])


def python(script: str) -> str:
    """The start of a command, as it can be pasted where this one was given."""
    return f"python {shlex.quote(shown(Path(__file__).parent / script))}"


if __name__ == "__main__":
    memory.keep()
    run_script(main)
