"""The paper's figure 1: how many epochs of CIFAR-10 does a four-layer net need to reach 25% training error, with ReLU
and with tanh? The paper: ReLU is six times as fast.

    python -m studies.figure1
    python -m studies.figure1 --activations relu --seeds 1 --epochs 20
    python -m studies.figure1 --init pytorch --pixels divided --lrs 0.01 0.02 0.005 0.04 0.0025 0.08 --seeds 1

The paper does not say which four-layer net; this is studies.fourlayer's without normalisation, its 13% net, on whole 32
x 32 pictures: no crops, no mirroring, no weight decay, one learning rate throughout ("no regularization of any kind",
"learning rates for each network were chosen independently to make training as fast as possible"). Each activation gets
six learning rates (--lrs), a factor of two apart, and more where the fastest is at an end; the first seed tries them
all, the others take the fastest. A learning rate is given up after --epochs, or once another one has been faster. The
training error is the mean over the batches of a fifth of an epoch, 10,000 pictures, as cuda-convnet kept and drew it,
and counts for that fifth's middle; the moment at which it passes 25% for the first time is interpolated. Means over
whole epochs, each counting for its end, are half an epoch late, which takes more off the ratio the sooner ReLU is
there; the ratio by them is printed as well. So a run that has passed 25% goes on until an epoch's mean has, too.

What the ratio hangs on is asked with --init and --pixels, another initialisation and smaller inputs: each pair of them
is a race of its own, with learning rates of its own.

A finished run is a line in --out and is not run again; one that was stopped, in any way, goes on where its last epoch
began. Two processes, one for each activation, can share --out. The curves are drawn next to it, in
NAME-EPOCHS-PRECISION.png, with --init and --pixels in the name, too, where they are not the first.
"""

import itertools
import statistics
from pathlib import Path

import torch

import checkpoints
import memory
import utils
from checkpoints.run import Busy, append_line, environment, locked, read_log
from data.loader import machine_errors
from kernels import accelerate
from studies.common import interval, new_figure, pixel_std, results_file, save_figure
from studies.fourlayer import STORED, Pictures, build, load, make_optimizer, save, train_epoch
from studies.loop import small_store
from utils import Diverged, Parser, UserError, number, pick_device, run_script, shown, whole
from watch import Watch

ACTIVATIONS = ("relu", "tanh")
LRS = (0.001, 0.002, 0.0005, 0.004, 0.00025, 0.008)
FACTOR = 2
TARGET = 25.0  # percent training error
GUESSING = 90.0  # percent error before the first epoch
PARTS = 5  # of an epoch, each with an error of its own
KEY = ("activation", "lr", "seed", "epochs", "precision", "init", "pixels")
EARLIER = {"init": "file", "pixels": "0-255"}  # what lines did not say once


@machine_errors("stop what else runs on this device")
def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    args.out, device = results_file(args.out), pick_device(args.device)
    if not all({*KEY, "part_errors"} <= set(EARLIER | entry) for entry in read_log(args.out)):
        raise UserError(f"{args.out} holds lines of another kind; name another --out")
    utils.no_tf32()
    store = small_store("cifar10")
    pictures = Pictures(store, STORED, device, 1 / pixel_std(store) if args.pixels == "divided" else 1.0)
    with Watch(device) as watch:
        for act, lr, seed in cells(args):
            run(args, pictures, act, lr, seed, watch)
            if watch.received:
                return 128 + watch.received
    print(report(args))
    draw(args, args.out.with_name(f"{args.out.stem}-{args.epochs}-{args.precision}{variant(args)}.png"))
    return 0


def lines(args, **wanted) -> list[dict]:
    """The lines of --out with these values, of this initialisation, pixels, precision and limit."""
    wanted |= {k: getattr(args, k) for k in KEY[3:]}
    return [e for e in read_log(args.out) if all((EARLIER | e)[k] == v for k, v in wanted.items())]


def variant(args) -> str:
    """What folders and drawings have in their names where it is not the files' initialisation and pixels."""
    return "".join(f"-{getattr(args, k)}" for k, usual in EARLIER.items() if getattr(args, k) != usual)


# ---------------------------------------------------------------------------------------------- runs


def cells(args):
    """What to train, one after the other: activation, learning rate, seed."""
    for act in args.activations:
        yield from ((act, lr, 0) for lr in to_try(args, act))
        if best := fastest(args, act):
            yield from ((act, best, seed) for seed in range(1, args.seeds))


def to_try(args, act: str):
    """Learning rates for the first seed, until the fastest of them has neighbours on both sides."""
    yield from args.lrs
    while best := fastest(args, act):
        tried = {e["lr"] for e in lines(args, activation=act, seed=0)}
        ahead = [lr for lr in (best / FACTOR, best * FACTOR) if lr not in tried]
        if not ahead:
            return
        yield ahead[0]


def fastest(args, act: str) -> float | None:
    """The learning rate with which the first seed reached the target soonest."""
    reached = {e["lr"]: e["reached"] for e in lines(args, activation=act, seed=0) if e["reached"]}
    return min(reached, key=reached.get) if reached else None


def run(args, pictures: Pictures, act: str, lr: float, seed: int, watch: Watch) -> None:
    """Train to the target, to the limit, or to where another learning rate had been faster; note that, unless it has
    been noted already or a signal came. Raises UserError where another process is at it."""
    cell = {"activation": act, "lr": lr, "seed": seed}
    name = f"{act}-{lr:g}-{seed}-{args.epochs}-{args.precision}{variant(args)}"
    folder = checkpoints.FOLDER / "figure1" / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            if lines(args, **cell):
                return
            before = [e["reached"] for e in lines(args, activation=act, seed=0) if e["reached"]] if seed == 0 else []
            found = errors_of(args, folder, pictures, cell, min([args.epochs, *before]), watch)
            if found:
                reached = crossing(curve(found["part_errors"]))
                about = {k: getattr(args, k) for k in KEY[3:]} | {"reached": reached}
                append_line(args.out, cell | about | found | environment(pictures.train.device))
                (folder / "last.pt").unlink(missing_ok=True)
    except Busy:
        raise UserError(f"another process is training {shown(folder)}; wait for it") from None


def errors_of(args, folder: Path, pictures: Pictures, cell: dict, limit: float, watch: Watch) -> dict | None:
    """Training errors in percent of the fifths of a net's epochs up to the target or `limit`, their seconds, and
    "diverged" where it did; None where a signal came."""
    net, optimizer = start(pictures, args.init, **cell)
    last = load(folder / "last.pt", net, optimizer, pictures)
    errors, seconds, epoch = last.get("part_errors", []), last.get("seconds", 0.0), last["epoch"]
    if len(errors) != PARTS * epoch:
        raise UserError(f"{shown(folder)} is of an earlier version of this study; remove it")
    print(f"{cell['activation']}, learning rate {cell['lr']:g}, seed {cell['seed']}, from epoch {epoch + 1}",
          flush=True)
    while epoch < args.epochs and not (epoch and statistics.mean(errors[-PARTS:]) < TARGET):
        if epoch >= limit and not crossing(curve(errors)):
            break
        try:
            found = train_epoch(net, optimizer, pictures, PARTS, cell["seed"], epoch, watch, args.precision)
            if found is None:
                return None
            epoch += 1
            errors += found["part_errors"]
            seconds += found["seconds"]
            save(folder / "last.pt", net, optimizer, pictures, epoch, part_errors=errors, seconds=seconds)
        except Diverged as reason:
            return {"part_errors": errors, "seconds": seconds, "diverged": str(reason)}
        print(f"epoch {epoch:>2}: {found['train_top1_error']:.2f}%  {found['images_per_second']:.0f} images/s",
              flush=True)
    return {"part_errors": errors, "seconds": seconds}


def start(pictures: Pictures, init: str, activation: str, lr: float, seed: int):
    """A new net and its optimiser, without weight decay."""
    utils.seed_all(seed)
    net = build(lrn=False, filters=32, act=activation, side=STORED, classes=pictures.classes, init=init)
    net = net.to(pictures.train.device, memory_format=torch.channels_last)
    accelerate(net)
    return net, make_optimizer(net, decay=0.0, lr=lr)


def curve(errors: list[float]) -> list[tuple[float, float]]:
    """(epochs, error) of the fifths, each at its middle, after guessing at 0."""
    return [(0.0, GUESSING), *(((i + 0.5) / PARTS, e) for i, e in enumerate(errors))]


def by_epoch(errors: list[float]) -> list[tuple[float, float]]:
    """(epochs, error) of whole epochs, each at its end, after guessing at 0."""
    epochs = range(0, len(errors), PARTS)
    return [(0.0, GUESSING), *((i / PARTS + 1, statistics.mean(errors[i : i + PARTS])) for i in epochs)]


def crossing(points: list[tuple[float, float]]) -> float | None:
    """The epoch, with a fraction, at which the error passes TARGET for the first time, or None."""
    for (start, before), (end, after) in itertools.pairwise(points):
        if after < TARGET:
            return start + (end - start) * (before - TARGET) / (before - after)
    return None


# ---------------------------------------------------------------------------------------------- what it shows


def report(args) -> str:
    """Markdown: each activation's epochs to the target by learning rate, by seed at its fastest; the ratio over seeds
    with which both got there."""
    rates, runs = sorted({e["lr"] for e in lines(args)}), {}
    said = [f"| epochs to {TARGET:g}% at a learning rate of | {' | '.join(f'{lr:g}' for lr in rates)} |",
            f"|---|{'---|' * len(rates)}"]
    for act in ACTIVATIONS:
        best, cells = fastest(args, act), []
        runs[act] = lines(args, activation=act, lr=best) if best else []
        for lr in rates:
            found = sorted(lines(args, activation=act, lr=lr), key=lambda e: e["seed"])
            cells.append(("**{}**" if lr == best else "{}").format(", ".join(map(outcome, found))))
        said.append(f"| {act} | {' | '.join(cells) if any(cells) else 'not measured yet'} |")
    said.append("")
    for how, points in (("", curve), ("by whole epochs, each counting for its end: ", by_epoch)):
        relu, tanh = ({e["seed"]: crossing(points(e["part_errors"])) for e in runs[act]} for act in ACTIVATIONS)
        ratios = [tanh[seed] / relu[seed] for seed in sorted(set(relu) & set(tanh)) if tanh[seed] and relu[seed]]
        said.append(how + ratio_said(ratios))
    return "\n".join(said)


def ratio_said(ratios: list[float]) -> str:
    if not ratios:
        return "no ratio: it takes a seed with which both got there"
    width = f" ± {interval(ratios)[1]:.2f} (95% interval)" if len(ratios) > 2 else ""
    seeds = f"{len(ratios)} seed{'s' * (len(ratios) > 1)}"
    return (f"ReLU is {statistics.mean(ratios):.2f}{width} times as fast over {seeds} with which both got there "
            "(paper: six times)")


def outcome(entry: dict) -> str:
    if entry["reached"]:
        return f"{entry['reached']:.2f}"
    if "diverged" in entry:
        return "diverged"
    return f"not by {len(entry['part_errors']) // PARTS}"


def draw(args, path: Path) -> None:
    """As the paper draws it: ReLU solid, tanh dashed, each at its fastest learning rate, and the line at 25%."""
    figure = new_figure(6, 4.5)
    axes = figure.subplots()
    for act, style in zip(ACTIVATIONS, ("-", "--"), strict=True):
        best = fastest(args, act)
        for i, e in enumerate(lines(args, activation=act, lr=best) if best else []):
            label = None if i else f"{act}, {best:g}"
            axes.plot(*zip(*curve(e["part_errors"]), strict=True), style, color="black", lw=1.2, label=label)
    axes.axhline(TARGET, color="0.5", ls=":", lw=1)
    axes.set(xlabel="epochs", ylabel="training error (%)", ylim=(0, 90), xlim=(0, None))
    other = f"\ninitialisation: {args.init}, pixels: {args.pixels}" if variant(args) else ""
    axes.set_title(f"Four-layer net on CIFAR-10, each at its fastest learning rate{other}", fontsize=10)
    axes.grid(alpha=0.3)
    if len(axes.lines) > 1:
        axes.legend(title="learning rate", frameon=False)
    save_figure(figure, path)


def make_parser() -> Parser:
    parser = Parser(prog="python -m studies.figure1", description="ReLU against tanh, the paper's figure 1.")
    parser.add_argument("--activations", nargs="+", choices=ACTIVATIONS, default=ACTIVATIONS, metavar="NAME",
                        help=f"{' or '.join(ACTIVATIONS)} (default: both)")
    parser.add_argument("--lrs", type=number(0), nargs="+", default=LRS, metavar="RATE",
                        help="learning rates to try at least, the likeliest first: the others are given up once they "
                        "are slower (default: six around cuda-convnet's 0.001)")
    parser.add_argument("--init", choices=("file", "pytorch"), default="file",
                        help="cuda-convnet's file, or torch.nn's own (default: %(default)s)")
    parser.add_argument("--pixels", choices=("0-255", "divided"), default="0-255",
                        help="the mean subtracted; divided by their standard deviation as well (default: %(default)s)")
    parser.add_argument("--seeds", type=whole(1), default=3, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--epochs", type=whole(1), default=60, metavar="N", help="at most (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    parser.add_argument("--out", default="results/figure1.jsonl", help="default: %(default)s")
    return parser


if __name__ == "__main__":
    memory.keep()
    run_script(main)
