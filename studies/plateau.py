"""Which choices decide whether AlexNet leaves its plateau, and how soon? The first steps of training, cell by cell:

    python -m studies.plateau                          ten seeds of train.py's defaults
    python -m studies.plateau --pixels 0-255 divided --dropout paper inverted --init 2012 paper pytorch kaiming \\
        --seeds 3 --steps 250 --stop-below 1           two, two and four choices crossed: 16 cells, three seeds each
    python -m studies.plateau --data data/stores/imagenette --steps 100 --seeds 1

A loss of ln(classes), 2.303 for ten classes, means that nothing has been learnt. A cell is one value of each of the
five choices; the first value of each is train.py's. Each finished run is a line in --out, and runs that stand there are
not run again, so the study can be stopped at any time (another --out starts over). A table of the file's runs on this
data set, of this size, precision, length and --stop-below is printed last, and their curves are drawn in the same
folder, under the file's name with .png.
"""

import itertools
import math
import time
from pathlib import Path

import torch
from torch import nn

import memory
import options
import utils
from checkpoints.run import append_line, environment, read_log
from data import sources
from data.loader import Loader, machine_errors
from data.pack import named_store
from data.store import Store
from kernels import accelerate
from recipe import make_optimizer
from studies import look
from studies.common import batches, new_figure, pixel_std, plain, results_file, save_figure
from studies.variants import Halved
from train import starting_net, train_step
from utils import Parser, Progress, UserError, number, pick_device, run_script, whole
from watch import Watch

# Every choice's values, train.py's first.
CHOICES = {
    "pixels": ("0-255", "divided"),  # with the mean subtracted; divided by their standard deviation
    # model.Dropout; torch.nn.Dropout in its places; nothing there; no masks, but half of every output
    "dropout": ("paper", "inverted", "none", "halved"),
    "init": ("2012", "paper", "pytorch", "kaiming", "louder"),  # louder: paper, conv1 times the pixels' std
    "bias_rate": (2, 1),  # learning rate, times the weights'
    "bias_decay": ("no", "yes"),
}
KEY = ("dataset", "image_size", "precision", "steps", "stop_below", "seed", *CHOICES)
EARLIER = {"image_size": 64, "precision": "fp32"}  # what lines did not say once
EVERY = 5  # the log keeps the mean loss of every 5 steps
WINDOW = 25  # steps that a reported loss is the mean of
LEFT = 0.9  # the plateau is left when that mean falls below this part of ln(classes)


@machine_errors("stop what else runs on this device")
def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    device, out = pick_device(args.device), results_file(args.out)
    store = Store(args.data) if args.data else named_store(args.dataset)
    args.dataset = store.name
    guessing = math.log(len(store.classes))
    if args.stop_below >= LEFT * guessing:
        raise UserError(f"--stop-below {args.stop_below:g}: the plateau counts as left below {LEFT * guessing:.3f}; "
                        "give less than that, or runs would end before they have left")
    utils.no_tf32()
    loader, machine = Loader(store, "train", device), environment(device)
    run = settled(args, store, device, seed=0)
    about = {"dataset": args.dataset, "image_size": run.image_size, "precision": run.precision, "steps": args.steps,
             "stop_below": args.stop_below}
    cells = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*(vars(args)[c] for c in CHOICES))]
    for seed, cell in itertools.product(range(args.seeds), cells):
        entry = about | {"seed": seed, **cell}
        if all(run_of(entry) != run_of(other) for other in read_runs(out, store.fingerprint)):
            began = time.monotonic()
            run = settled(args, store, device, seed)
            losses, outputs = first_losses(run, store, loader, device, cell, args.stop_below)
            entry |= summary(losses, len(store.classes)) | {"outputs": outputs, "seconds": time.monotonic() - began}
            append_line(out, entry | {"fingerprint": store.fingerprint} | machine)
            memory.hand_back()
    entries = [e for e in read_runs(out, store.fingerprint) if all(e[k] == v for k, v in about.items())]
    print(table(entries))
    draw(entries, out.with_suffix(".png"))
    return 0


def settled(args, store, device, seed: int):
    """train.py's arguments of a run."""
    run = options.make_parser().parse_args([
        "--seed", str(seed), "--max-steps", str(args.steps), "--precision", args.precision
    ])
    options.settle(run, store, device, world=1)
    return run


def run_of(entry: dict) -> tuple:
    """What tells a run from others."""
    return tuple(entry[k] for k in KEY)


def read_runs(out: Path, fingerprint: str) -> list[dict]:
    """A file's runs on the store with this fingerprint, which lines did not say once; each one once: two processes may
    have made the same."""
    found = [EARLIER | {"fingerprint": fingerprint} | entry for entry in read_log(out)]
    if any(set(KEY) - set(entry) for entry in found):
        raise UserError(f"{out} holds lines of another kind; name another --out")
    first = {}
    for entry in found:
        if entry["fingerprint"] == fingerprint:
            first.setdefault(run_of(entry), entry)
    return list(first.values())


# ---------------------------------------------------------------------------------------------- one run


def first_losses(args, store, loader: Loader, device, cell: dict, stop_below: float = 0):
    """The loss of each of the first steps of train.py with these arguments (options.make_parser's, settled) and the
    cell's choices, and look.signals of the first batch, with dropout: in fc7 and fc8 its masks have a part in what is
    due to the picture. Ends early where the mean of the last WINDOW steps falls below stop_below, or a loss is not
    finite."""
    net = build(args, store, cell).to(device, memory_format=torch.channels_last)
    accelerate(net)
    optimizer = optimizer_of(net, args, cell)
    scale = pixel_std(store) if cell["pixels"] == "divided" else 1.0
    losses, outputs = [], {}
    with Progress(f"seed {args.seed} {' '.join(map(str, cell.values()))}", args.max_steps, "steps") as progress:
        for pictures, labels in batches(args, store, loader, device):
            if not losses:
                outputs = look.signals(net.train(), pictures / scale)
                utils.seed_all(args.seed, 1, 0)  # the first step's own masks
            loss, _ = train_step(net, optimizer, pictures / scale, labels, args.precision)
            losses.append(loss.item())
            progress.update(1, f"loss {losses[-1]:.3f}")
            low = len(losses) >= WINDOW and sum(losses[-WINDOW:]) < stop_below * WINDOW
            if low or not math.isfinite(losses[-1]):
                break
    return losses, outputs


def build(args, store, cell: dict) -> nn.Module:
    """train.py's net with the cell's dropout and initialisation."""
    net = starting_net(args, store, Watch(torch.device("cpu")))
    if cell["dropout"] != "paper":
        layer = {"inverted": nn.Dropout, "none": nn.Identity, "halved": Halved}[cell["dropout"]]
        net.drop6, net.drop7 = layer(), layer()
    utils.seed_all(args.seed)  # as for train.py's own initialisation
    if cell["init"] in ("2012", "paper", "louder"):
        net.init_weights("2012" if cell["init"] == "2012" else "paper")
        if cell["init"] == "louder":  # makes up for divided pixels: the same outputs of conv1 as without the division
            net.conv1.weight.data.mul_(pixel_std(store))
        return net
    for layer in net.children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.reset_parameters()  # PyTorch's default: uniform, std 1 / sqrt(3 fan_in), biases too
            if cell["init"] == "kaiming":  # He et al. 2015: std sqrt(2 / fan_in), biases 0
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
    return net


def optimizer_of(net: nn.Module, args, cell: dict):
    """train.py's optimiser with the cell's rules for biases."""
    optimizer = make_optimizer(
        net, recipe="2012", lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    biases = optimizer.param_groups[1]  # recipe 2012's second group
    biases["lr"] = args.lr * cell["bias_rate"]
    biases["weight_decay"] = args.weight_decay if cell["bias_decay"] == "yes" else 0.0
    return optimizer


def summary(losses: list[float], classes: int) -> dict:
    """What the log keeps of a run. left: the step at which the mean loss of the last WINDOW steps is below LEFT of
    guessing's for the first time, or None; finite: whether all losses were."""
    means = [sum(losses[i - WINDOW : i]) / WINDOW for i in range(WINDOW, len(losses) + 1)]
    left = next((i for i, mean in enumerate(means, WINDOW) if mean < LEFT * math.log(classes)), None)
    finite = all(map(math.isfinite, losses))
    shown = [sum(losses[i : i + EVERY]) / EVERY for i in range(0, len(losses) - EVERY + 1, EVERY)]
    return {
        "left": left, "finite": finite, "ran": len(losses), "classes": classes,
        "losses": [round(loss, 4) if math.isfinite(loss) else None for loss in shown],
    }


# ---------------------------------------------------------------------------------------------- what it shows


def table(entries: list[dict]) -> str:
    """A Markdown table: a row for each cell; how much of fc6's output is due to the picture at the start (mean over
    seeds), when each seed left the plateau, and the mean loss of the WINDOW steps up to step 50, 100, ..., over the
    seeds that still ran."""
    steps = list(range(50, max(e["steps"] for e in entries) + 1, 50))
    head = ["pixels", "dropout", "initialisation", "bias rate", "bias decay", "signal in fc6", "left at step"]
    lines = [f"| {' | '.join(head + [f'loss at {s}' for s in steps])} |", "|---" * (len(head) + len(steps)) + "|"]
    for cell, runs in by_cell(entries).items():
        left = ", ".join(str(e["left"] or ("-" if e["finite"] else "diverged")) for e in runs)
        signal = f"{sum(e['outputs']['fc6'][2] for e in runs) / len(runs):.2g}"
        losses = [mean_loss(runs, step) for step in steps]
        pixels, dropout, init, rate, decay = cell
        lines.append(f"| {' | '.join([pixels, dropout, init, f'{rate}x', decay, signal, left, *losses])} |")
    return "\n".join(lines)


def by_cell(entries: list[dict]) -> dict[tuple, list[dict]]:
    """Runs by cell, in the order of CHOICES."""
    cells = {}
    for values in itertools.product(*CHOICES.values()):
        runs = [e for e in entries if tuple(e[c] for c in CHOICES) == values]
        if runs:
            cells[values] = sorted(runs, key=lambda e: e["seed"])
    return cells


def mean_loss(runs: list[dict], step: int) -> str:
    """Over the seeds that ran that far; others had stopped below stop_below (a dash where all had)."""
    reached = [e["losses"][(step - WINDOW) // EVERY : step // EVERY] for e in runs if e["ran"] >= step and e["finite"]]
    means = [sum(losses) / len(losses) for losses in reached]
    return f"{sum(means) / len(means):.3f}" if means else "-"


# How a figure names and marks them.
DROPOUTS = {"paper": ("the paper's dropout", "o"), "inverted": ("inverted dropout", "^"), "none": ("no dropout", "s"),
            "halved": ("outputs halved, no dropout", "D")}


def draw(entries: list[dict], path: Path) -> None:
    """The loss over steps, a panel for each choice of pixels and dropout; and when the plateau is left, over how much
    of fc6's output at the start is due to the picture. A colour for each initialisation, a line or mark a run."""
    rows, columns = ([v for v in CHOICES[c] if any(e[c] == v for e in entries)] for c in ("pixels", "dropout"))
    figure, guessing = new_figure(4 + 5 * len(columns), 3 + 2 * len(rows)), math.log(entries[0]["classes"])
    figure.suptitle(f"{plain(entries[0]['dataset'])}, {entries[0]['image_size']} pixels", fontsize=11)
    mosaic = [[f"{row} {column}" for column in columns] + ["signal"] for row in rows]
    panels = figure.subplot_mosaic(mosaic, width_ratios=[1] * len(columns) + [1.3])
    names = {"0-255": "pixels 0..255 minus mean", "divided": "the same / std"}
    for pixels, dropout in itertools.product(rows, columns):
        axes = panels[f"{pixels} {dropout}"]
        runs = [e for e in entries if (e["pixels"], e["dropout"]) == (pixels, dropout)]
        draw_losses(axes, runs)
        axes.axhline(guessing, color="0.4", ls=":", lw=1)
        axes.set_title(f"{names[pixels]}, {DROPOUTS[dropout][0]}", fontsize=10)
        axes.set(ylim=(0, 1.75 * guessing), xlim=(0, entries[0]["steps"]))
        axes.set(xlabel="step", ylabel="training loss (dotted: guessing)")
    draw_signal(panels["signal"], entries)
    for axes in panels.values():
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def draw_losses(axes, runs: list[dict]) -> None:
    for colour, init in enumerate(CHOICES["init"]):
        for i, e in enumerate(run for run in runs if run["init"] == init):
            steps = [EVERY * (k + 1) for k in range(len(e["losses"]))]
            losses = [math.nan if loss is None else loss for loss in e["losses"]]
            axes.plot(steps, losses, color=f"C{colour}", lw=1, alpha=0.8, label=None if i else init)
    if axes.lines:
        axes.legend(title="initialisation", fontsize=8, title_fontsize=8, loc="upper right", ncols=2)


def draw_signal(axes, entries: list[dict]) -> None:
    """Runs that stayed on the plateau stand at the top edge, runs that diverged as crosses at the bottom."""
    limit, diverged = entries[0]["steps"], 10
    stayed = 1.2 * limit
    for e in entries:
        signal = e["outputs"]["fc6"][2]
        mark = {"marker": DROPOUTS[e["dropout"]][1], "color": f"C{CHOICES['init'].index(e['init'])}"}
        if not e["finite"]:
            axes.plot(signal, diverged, **mark | {"marker": "x"})
        else:
            axes.plot(signal, e["left"] or stayed, **mark, fillstyle="full" if e["left"] else "none")
    axes.axhline(limit, color="0.4", ls=":", lw=1)
    axes.set(xscale="log", yscale="log", ylim=(0.8 * diverged, 1.25 * stayed))
    axes.set(ylabel="step at which the plateau is left",
             xlabel="signal in fc6 at the start: a unit's std over pictures",
             title="hollow: not left, cross: diverged")
    for name, mark in (DROPOUTS[v] for v in CHOICES["dropout"] if any(e["dropout"] == v for e in entries)):
        axes.plot([], [], mark, color="0.4", label=name)
    for init, name in enumerate(CHOICES["init"]):
        if any(e["init"] == name for e in entries):
            axes.plot([], [], color=f"C{init}", label=f"initialisation {name}")
    axes.legend(fontsize=8, loc="lower left")


def make_parser() -> Parser:
    parser = Parser(prog="python -m studies.plateau", description="The first steps of training, cell by cell.")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--dataset", choices=sources.NAMED, default="fashion-mnist", help="default: %(default)s")
    where.add_argument("--data", metavar="STORE", help="a store of other pictures, made by data.pack")
    for name, values in CHOICES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", nargs="+", choices=values, default=[values[0]],
                            type=type(values[0]), help=f"one or more (default: {values[0]})")
    parser.add_argument("--seeds", type=whole(1), default=10, help="how many (default: %(default)s)")
    parser.add_argument("--steps", type=whole(WINDOW), default=200, help="of each run (default: %(default)s)")
    parser.add_argument("--stop-below", type=number(0, including=True), default=0.0, metavar="LOSS",
                        help=f"end a run when its loss, the mean of {WINDOW} steps, is lower (default: never)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="as in train.py")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    parser.add_argument("--out", default="results/plateau.jsonl", help="default: %(default)s")
    return parser


if __name__ == "__main__":
    memory.keep()
    run_script(main)
