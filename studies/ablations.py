"""What each of the paper's ideas is worth, on any of the named data sets:

    python -m studies.ablations lrn overlap dropout colour columns order crops models
    python -m studies.ablations crops models --dataset cifar10 --seeds 5
    python -m studies.ablations tanh --dataset fashion-mnist        ReLU against tanh (the paper's figure 1), drawn

Each claim compares nets trained by train.py that differ in one option, seed by seed, with the centre crop unless the
claim is about crops or several models. A cell is one training run; its folder lies under checkpoints/ablations/. A
finished cell is a line in --out and is not run again; one that was stopped goes on where it was. The table of all
claims that the file covers is printed last. On small pictures the paper's effects can be smaller than the spread over
seeds: the table says so.
"""

import math
import statistics
import time
from pathlib import Path

import torch

import checkpoints
import options
import test
import train
import utils
from checkpoints.run import append_line, environment, read_log
from data import sources
from data.loader import Loader
from data.pack import named_store
from kernels import accelerate
from recipe import make_optimizer
from studies.common import batches, new_figure, results_file, save_figure, spread, verdict
from train import starting_net
from utils import Parser, UserError, pick_device, run_script, whole

# What train.py is given in each cell, apart from data set, seed and epochs.
CELLS = {
    "base": [],
    "no-lrn": ["--no-lrn"],
    "no-overlap": ["--no-overlap"],
    "no-dropout": ["--no-dropout"],
    "no-colour": ["--colour", "off"],
    "two-columns": ["--columns", "2"],
    "2012": ["--columns", "2", "--order", "2012"],
}
# Claim: the cell without the idea, the cell with it, and what the paper says it takes off the top-1 / top-5 error on
# ImageNet, in points.
CLAIMS = {
    "lrn": ("no-lrn", "base", "1.4 / 1.2 (section 3.3)"),
    "overlap": ("no-overlap", "base", "0.4 / 0.3 (section 3.4)"),
    "dropout": ("no-dropout", "base", "no figure: 'substantial overfitting' without (section 4.2)"),
    "colour": ("no-colour", "base", "over 1 / - (section 4.1)"),
    "columns": ("base", "two-columns", "1.7 / 1.2 against one column of half the kernels (section 3.2), not built"),
    "order": ("two-columns", "2012", "no figure: the paper's text against its authors' code"),
    "crops": ("base", "base", "1.5 / 1.3 (table 1 and its footnote: 39.0 / 18.3 and 37.5 / 17.0)"),
    "models": ("base", "base", "2.6 / 1.8 for five (table 2: 40.7 / 18.2 and 38.1 / 16.4)"),
}
# For figure 1 each activation has the learning rate that is fastest for it; the likeliest come first, since the others
# are given up once they are slower.
LRS = (0.001, 0.003, 0.0003, 0.01, 0.03)
TARGET = 25  # percent training error
EVERY = 10  # steps that a training error of figure 1 is the mean of
LONGEST = 1500  # steps


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    args.out = results_file(args.out)
    store = named_store(args.dataset)
    utils.no_tf32()
    if "tanh" in args.claims:
        race(args, store)
    check_test_set(args)
    cells = dict.fromkeys(cell for claim in args.claims if claim != "tanh" for cell in CLAIMS[claim][:2])
    for seed in range(args.seeds):
        for cell in cells:
            if not lines(args, cell=cell, seed=seed) and (status := run_cell(args, cell, seed)):
                return status  # a signal stopped the training; the next start goes on there
    if "models" in args.claims:
        run_ensemble(args)
    print(report(args))
    return 0


def check_test_set(args) -> None:
    wanted = args.test_dataset or args.dataset
    for e in lines(args):
        tested = e.get("center", {}).get("data", wanted)
        if tested != wanted:
            raise UserError(f"{args.out} holds runs tested on {tested}, not on {wanted}; name another --out")


def lines(args, **wanted) -> list[dict]:
    """The lines of --out with these values for this data set and, but for figure 1's, this number of epochs."""
    wanted |= {"dataset": args.dataset} | ({} if wanted.get("cell") == "race" else {"epochs": args.epochs})
    return [e for e in read_log(args.out) if all(e.get(name) == value for name, value in wanted.items())]


# ---------------------------------------------------------------------------------------------- cells


def folder(args, cell: str, seed: int) -> Path:
    return checkpoints.FOLDER / "ablations" / f"{args.dataset}-{args.epochs or 'default'}" / f"{cell}-{seed}"


def run_cell(args, cell: str, seed: int) -> int:
    """Train, test and note one cell. Returns train.py's exit status, 0 where it finished or diverged."""
    out = folder(args, cell, seed)
    epochs = ["--epochs", str(args.epochs)] if args.epochs else []
    anew = ["--dataset", args.dataset, "--seed", str(seed), "--out", str(out), *epochs, *CELLS[cell]]
    machine = environment(pick_device("auto"))
    try:
        status = train.main(["--resume", "--out", str(out)] if (out / "last.pt").exists() else anew)
    except utils.Diverged as error:
        entry = {"dataset": args.dataset, "epochs": args.epochs, "cell": cell, "seed": seed, "diverged": str(error)}
        append_line(args.out, entry | machine)
        return 0
    if status:
        return status
    log = read_log(out / "log.jsonl")
    entry = {
        "dataset": args.dataset, "epochs": args.epochs, "cell": cell, "seed": seed, "options": CELLS[cell],
        "trained_epochs": len(log), "train_top1_error": log[-1]["train_top1_error"],
        "val_top1_error": min(e["val_top1_error"] for e in log), "center": errors(args, [out], ten_crop=False),
        "seconds": sum(e["seconds"] for e in log),
    }
    if cell == "base":
        entry["ten-crop"] = errors(args, [out], ten_crop=True)
    append_line(args.out, entry | machine)
    (out / "last.pt").unlink()  # best.pt stays, for the ensemble
    return 0


def errors(args, runs: list[Path], ten_crop: bool) -> dict:
    """Top-1 and top-5 error of runs' nets on the test pictures, an ensemble where there are several."""
    store, paths = named_store(args.test_dataset or args.dataset), [run / "best.pt" for run in runs]
    found = test.errors(paths, store, ten_crop=ten_crop, device=pick_device("auto"))
    return {name: found[name] for name in ("top1_error", "top5_error", "images", "data", "split")}


def run_ensemble(args) -> None:
    """All seeds' base nets as one model, ten crops."""
    runs = [folder(args, "base", seed) for seed in range(args.seeds)]
    if args.seeds > 1 and not lines(args, cell="ensemble", models=args.seeds):
        if not all((run / "best.pt").exists() for run in runs):
            print(f"the ensemble is left out: its nets are no longer in {runs[0].parent}")
            return
        entry = {"dataset": args.dataset, "epochs": args.epochs, "cell": "ensemble", "models": args.seeds}
        entry["ten-crop"] = errors(args, runs, ten_crop=True)
        append_line(args.out, entry | environment(pick_device("auto")))


# ---------------------------------------------------------------------------------------------- the table


def report(args) -> str:
    """A Markdown table: a row for each claim, those asked for and those that the file has anyway."""
    head = ["idea", "paper: points off top-1 / top-5 error", "here: without", "with", "points off, by seed", "in all"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for claim, (before, after, paper) in CLAIMS.items():
        without, with_idea = measured(args, claim, before, after)
        if not with_idea:
            rows.append(f"| {claim} | {paper} | not measured yet | | | |")
            continue
        gains = [a - b for a, b in zip(without, with_idea, strict=True)]
        ensemble = claim == "models"  # one figure, whatever the number of seeds
        shown = f"{with_idea[0]:.2f}% (one ensemble of {len(without)})" if ensemble else spread(with_idea)
        said = f"{statistics.mean(gains):+.2f} from one ensemble" if ensemble else verdict(gains)
        rows.append(f"| {claim} | {paper} | {spread(without)} | {shown} | "
                    f"{', '.join(f'{g:+.2f}' for g in gains)} | {said} |")
    diverged = [f"{e['cell']} with seed {e['seed']}" for e in lines(args) if "diverged" in e]
    return "\n".join([*rows, *(["", f"diverged: {', '.join(diverged)}"] if diverged else []), *race_report(args)])


def measured(args, claim: str, before: str, after: str) -> tuple[list[float], list[float]]:
    """Top-1 errors without and with an idea, of the seeds that have both; runs that diverged have none."""
    by_seed = [{e["seed"]: e for e in lines(args, cell=cell) if "center" in e} for cell in (before, after)]
    seeds = sorted(set(by_seed[0]) & set(by_seed[1]))
    protocols = {"crops": ("center", "ten-crop"), "models": ("ten-crop", "ten-crop")}.get(claim, ("center", "center"))
    without, with_idea = (
        [found[seed][protocol]["top1_error"] for seed in seeds]
        for found, protocol in zip(by_seed, protocols, strict=True)
    )
    if claim == "models":  # one ensemble against each of its nets
        ensembles = lines(args, cell="ensemble")
        with_idea = [ensembles[-1]["ten-crop"]["top1_error"]] * len(without) if ensembles else []
        without = without if ensembles else []
    return without, with_idea


# ---------------------------------------------------------------------------------------------- figure 1


def race(args, store) -> None:
    """ReLU and tanh to TARGET training error, with random crops but no other regularisation (paper, section 3.1): the
    first seed at each of LRS, where one is given up once another was faster; the other seeds at the fastest."""
    device = pick_device("auto")
    loader, machine = Loader(store, "train", device), environment(device)
    for seed in range(args.seeds):
        for activation in ("relu", "tanh"):
            for lr in LRS if seed == 0 else [fastest(args, activation)[0]["lr"]]:
                cell = {"cell": "race", "activation": activation, "lr": lr, "seed": seed}
                if lines(args, **cell):
                    continue
                before = [e["reached"] for e in lines(args, cell="race", activation=activation, seed=0) if e["reached"]]
                limit = min([LONGEST, *before]) if seed == 0 else LONGEST
                began = time.monotonic()
                found = errors_by_step(store, loader, device, cell, limit)
                entry = {"dataset": args.dataset, "epochs": args.epochs, **cell, "errors": found, "limit": limit,
                         "reached": EVERY * len(found) if found and found[-1] < TARGET else None}
                append_line(args.out, entry | {"seconds": time.monotonic() - began} | machine)
    draw(args, args.out.with_suffix(".png"))


def errors_by_step(store, loader: Loader, device, cell: dict, limit: int) -> list[float]:
    """Training error in percent of every EVERY steps, until it is below TARGET, or the loss is not finite, or `limit`
    steps. Batches of 128 on any data set."""
    run = options.make_parser().parse_args([
        "--seed", str(cell["seed"]), "--max-steps", str(limit), "--activation", cell["activation"],
        "--lr", str(cell["lr"]), "--no-dropout", "--no-mirror", "--colour", "off", "--weight-decay", "0",
        "--batch-size", "128",
    ])
    options.settle(run, store, device, world=1)
    net = starting_net(run, store, train.Watch(device)).to(device, memory_format=torch.channels_last)
    accelerate(net)
    optimizer = make_optimizer(net, recipe=run.recipe, lr=run.lr, momentum=run.momentum, weight_decay=0.0)
    found, wrong = [], 0
    for step, (pictures, labels) in enumerate(batches(run, store, loader, device), 1):
        loss, logits = train.train_step(net, optimizer, pictures, labels, run.precision)
        wrong += (logits.argmax(1) != labels).sum().item()
        if step % EVERY == 0:
            found.append(100 * wrong / (EVERY * run.batch_size))
            wrong = 0
            if found[-1] < TARGET or not loss.isfinite():
                break
    return found


def fastest(args, activation: str) -> list[dict]:
    """The runs, one a seed, at the learning rate with which the first seed reached the target soonest."""
    first = lines(args, cell="race", activation=activation, seed=0)
    if not first:
        return []
    lr = min(first, key=lambda e: e["reached"] or 10 * LONGEST)["lr"]
    return lines(args, cell="race", activation=activation, lr=lr)


def race_report(args) -> list[str]:
    best = {name: fastest(args, name) for name in ("relu", "tanh")}
    if not all(best.values()):
        return ["", "tanh: not measured yet (the paper: ReLU reaches 25% training error six times sooner)"]
    texts, means = [], []
    for name, runs in best.items():
        steps = ", ".join(str(e["reached"] or f"over {e['limit']}") for e in runs)
        tried = sorted(e["lr"] for e in lines(args, cell="race", activation=name, seed=0))
        tried = ", ".join(f"{lr:g}" for lr in tried)
        others = f"the fastest of {tried}" if ", " in tried else "the only one tried"
        texts.append(f"{name} at learning rate {runs[0]['lr']:g}, {others}: {steps} steps")
        means.append(statistics.mean(e["reached"] or math.nan for e in runs))
    text = f"{TARGET}% training error, no regularisation but random crops: {'; '.join(texts)}"
    if math.isnan(sum(means)):  # one of them never got there: no ratio
        return ["", text]
    paper = "paper, figure 1: six times, another net, CIFAR-10"
    return ["", f"{text}: ReLU is {means[1] / means[0]:.1f} times as fast ({paper})"]


def draw(args, path: Path) -> None:
    """Training error over steps, as in the paper's figure 1: ReLU solid, tanh dashed, each at its fastest learning
    rate."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for name, style in (("relu", "-"), ("tanh", "--")):
        for i, e in enumerate(fastest(args, name)):
            steps = [EVERY * (k + 1) for k in range(len(e["errors"]))]
            axes.plot(steps, e["errors"], style, color="black", lw=1, label=None if i else f"{name}, {e['lr']:g}")
    axes.axhline(TARGET, color="0.6", ls=":", lw=1)
    axes.set(xlabel="step (batches of 128)", ylabel="training error (%)", ylim=(0, 100), xlim=(0, None),
             title=f"ReLU against tanh, AlexNet at 64 px on {args.dataset}")
    axes.grid(alpha=0.3)
    axes.legend(title="learning rate")
    save_figure(figure, path)


def make_parser() -> Parser:
    parser = Parser(prog="python -m studies.ablations", description="What each of the paper's ideas is worth.")
    parser.add_argument("claims", nargs="+", choices=[*CLAIMS, "tanh"], metavar="CLAIM",
                        help=f"one or more of {', '.join(CLAIMS)}, tanh")
    parser.add_argument("--dataset", choices=sources.NAMED, default="fashion-mnist", help="default: %(default)s")
    parser.add_argument("--test-dataset", choices=sources.NAMED, metavar="NAME",
                        help="test on another set of the same classes: sample's nets on fashion-mnist")
    parser.add_argument("--epochs", type=whole(1), metavar="N", help="at most (default: train.py's)")
    parser.add_argument("--seeds", type=whole(1), default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", default="results/ablations.jsonl", help="default: %(default)s")
    return parser


if __name__ == "__main__":
    run_script(main)
