"""Which activation should a plain net, a net with batch norm, a residual net use? Nets x activations x seeds:

    python -m studies.frelu                                      SmallNet, with and without batch norm: 30 runs
    python -m studies.frelu --dataset cifar10 --networks nin resnet20 resnet20-no-act-after-add --seeds 5
    python -m studies.frelu --dataset fashion-mnist --epochs 6   the schedule shortened, 164 epochs to 6

The recipe is that of the FReLU study (Qiu, Xu and Cai 2017): pictures of 32 x 32, minus the mean and divided by the
standard deviation of each colour, crops out of a frame of 4 pixels, mirrored or not; batches of 128, Nesterov momentum
0.9, weight decay 1e-4 (none on what an activation learns), a learning rate of 0.01, or 0.1 with batch norm, divided by
10 before epochs 81 and 122 of 164, or the same fractions of --epochs. FReLU's and SReLU's b learn at a tenth of it; the
authors' train.lua does that for FReLU, in one of its versions until the learning rate falls. The test error is that of
the net after the last epoch; nothing is chosen by it. The validation images that a named set sets aside are looked at
only.

A run's folder lies under checkpoints/frelu/ and has a log that studies.report draws. A finished run is a line in --out
and is not run again; one that was stopped goes on where it was, in any way that it was stopped. Several processes can
share an --out: each takes runs that no other has. The table is printed last, of runs with this --dataset and --epochs.
"""

import statistics

import torch

import checkpoints
import memory
from checkpoints.run import Busy, append_line, environment, locked, read_log
from data import sources
from data.loader import Loader, machine_errors
from data.store import Store
from model import ACTIVATIONS
from studies import loop
from studies.common import interval, results_file, spread
from studies.networks import NETWORKS
from utils import Diverged, Parser, UserError, number, pick_device, run_script, whole
from watch import Watch

EPOCHS = 164
DROPS = (80, 121)  # epochs of 164 after which the learning rate falls
FRAME = 4  # pixels around a picture that its crops are cut out of
BIAS_RATE = 0.1  # learning rate of b, times the weights' (authors' train.lua)
COMPARED = ("relu", "prelu", "elu", "srelu", "frelu")
KEY = ("dataset", "epochs", "network", "activation", "bias_rate", "seed")


@machine_errors("stop what else runs on this device")
def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    args.out = results_file(args.out)
    if not all(map(is_result, read_log(args.out))):
        raise UserError(f"{args.out} holds lines of another kind; name another --out")
    args.networks, args.activations = list(dict.fromkeys(args.networks)), list(dict.fromkeys(args.activations))
    store, busy = loop.small_store(args.dataset), 0
    for seed in range(args.seeds):
        for network in args.networks:
            for act in args.activations:
                status = run_cell(args, store, cell_of(args, network, act, seed))
                if status > 0:
                    return status  # a signal stopped it; the next start goes on there
                busy += status < 0
    print(table(args, read_log(args.out)))
    if busy:
        print(f"\nruns left to other processes: {busy}")
    return 0


def is_result(entry: dict) -> bool:
    """Whether a line is one of this study's."""
    right = set(KEY) <= set(entry) and isinstance(entry["seed"], int)
    return right and ("diverged" in entry or isinstance(entry.get("test_top1_error"), int | float))


# ---------------------------------------------------------------------------------------------- one run


def cell_of(args, network: str, act: str, seed: int) -> dict:
    """What tells a run from all others; only FReLU and SReLU have a bias_rate."""
    bias_rate = args.bias_rate if act in ("frelu", "srelu") else None
    return dict(zip(KEY, (args.dataset, args.epochs, network, act, bias_rate, seed), strict=True))


def run_cell(args, store: Store, cell: dict) -> int:
    """Train, test and note one cell, unless it has been. Returns 0, 128 + a signal, or -1 where another process is at
    it."""
    name = "-".join(str(cell[k]) for k in ("network", "activation", "seed"))
    if cell["bias_rate"] not in (None, BIAS_RATE):
        name += f"-bias-rate-{cell['bias_rate']}"
    folder, device = checkpoints.FOLDER / "frelu" / f"{args.dataset}-{args.epochs}" / name, pick_device(args.device)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            if any(all(entry[k] == cell[k] for k in KEY) for entry in read_log(args.out)):
                return 0
            run = loop.start(
                folder, store, device, cell["network"], cell["activation"], lambda net: make_optimizer(net, cell),
                seed=cell["seed"], lrs=loop.learning_rates(first_lr(cell["network"]), args.epochs, DROPS, EPOCHS),
                inputs=loop.Inputs(*moments(store), device), frame=FRAME, mirror=True,
            )
            if [e["epoch"] for e in read_log(folder / "log.jsonl")] != list(range(1, run.epoch + 1)):
                raise UserError(f"{folder / 'log.jsonl'} has lost lines; to train this run anew, remove its folder")
            with Watch(device) as watch:
                try:
                    found = result(run) if loop.fit(run, watch) else {}
                except Diverged:
                    found = {"diverged": run.step}
            if found:
                append_line(args.out, cell | found | environment(device))
            return 128 + watch.received if watch.received else 0
    except Busy:
        return -1


def first_lr(network: str) -> float:
    """With batch norm ten times as high."""
    return 0.01 if network == "smallnet" else 0.1


def make_optimizer(net: torch.nn.Module, cell: dict) -> torch.optim.SGD:
    groups, lr = loop.parameter_groups(net, cell["bias_rate"] or 1.0), first_lr(cell["network"])
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True)


def moments(store: Store) -> tuple:
    """The mean and the standard deviation of each colour of the training pixels."""
    pca = store.manifest["pca"]  # of the colours' covariance, whose diagonal is wanted
    vectors, values = torch.tensor(pca["eigenvectors"]), torch.tensor(pca["eigenvalues"])
    return store.mean.mean((0, 1)), (values[:, None] * vectors**2).sum(0).sqrt()


def result(run: loop.Run) -> dict:
    """What the file of results keeps of a finished run: errors in percent, and the values that the activations learnt
    in the end."""
    test, log = Loader(run.store, "test", run.inputs.mean.device), read_log(run.folder / "log.jsonl")
    _, top1, top5 = loop.errors(run, test)
    last = {name: log[-1].get(name, {}) for name in ("train_loss", "train_top1_error", "val_top1_error", "activations")}
    return {
        "test_top1_error": top1, "test_top5_error": top5, "test_images": len(test), **last,
        "seconds": sum(entry["seconds"] for entry in log),
    }


# ---------------------------------------------------------------------------------------------- the table


def table(args, entries: list[dict]) -> str:
    """A Markdown table of test errors: a row for each net, mean and standard deviation over seeds, the lowest mean of
    those with the most seeds in bold, and what the seeds allow to be said of it."""
    lines = [f"| {' | '.join(['net', *args.activations, 'worse than the lowest, in points'])} |"]
    lines.append("|---" * (len(args.activations) + 2) + "|")
    for network in args.networks:
        found = {act: runs_of(entries, cell_of(args, network, act, seed=0)) for act in args.activations}
        errors = {
            act: {seed: e["test_top1_error"] for seed, e in runs.items() if "diverged" not in e}
            for act, runs in found.items()
        }
        most = max(map(len, errors.values()))
        full = [act for act, values in errors.items() if values and len(values) == most == len(found[act])]
        best = min(full, key=lambda act: statistics.mean(errors[act].values()), default=None)
        cells = [cell_text(errors[act], len(found[act]) - len(errors[act]), act == best) for act in args.activations]
        lines.append(f"| {' | '.join([network, *cells, verdicts(errors, best)])} |")
    note = ("±: in the cells the standard deviation over seeds, in the last column half of a 95% interval (Student's "
            "t, paired by seed), not widened for the lowest having been picked out")
    return "\n".join([*lines, "", note])


def runs_of(entries: list[dict], cell: dict) -> dict[int, dict]:
    """A cell's runs, by seed."""
    return {e["seed"]: e for e in entries if all(e[k] == cell[k] for k in KEY if k != "seed")}


def cell_text(errors: dict[int, float], diverged: int, best: bool) -> str:
    if not errors:
        return f"diverged ({diverged} of {diverged})" if diverged else "not measured yet"
    text = spread(list(errors.values()))
    return (f"**{text}**" if best else text) + (f", {diverged} diverged" if diverged else "")


def verdicts(errors: dict[str, dict[int, float]], best: str | None) -> str:
    """How many points worse than the best each other activation is, and whether the spread over seeds covers that."""
    said = []
    for act, found in errors.items():
        seeds = sorted(set(found) & set(errors.get(best, {})))
        if best is None or act == best or not found:
            continue
        if len(seeds) < 3:
            said.append(f"{act} too few seeds")
            continue
        worse = [found[seed] - errors[best][seed] for seed in seeds]
        mean, half = interval(worse)
        said.append(f"{act} {mean:+.2f} ± {half:.2f}" + (", within the spread" if abs(mean) <= half else ""))
    return "; ".join(said) or "-"


def make_parser() -> Parser:
    parser = Parser(prog="python -m studies.frelu", description="Nets x activations x seeds, by the FReLU study's "
                    "recipe.")
    parser.add_argument("--dataset", choices=sources.NAMED, default="fashion-mnist", help="default: %(default)s")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS[:2], metavar="NET",
                        help=f"one or more of {', '.join(NETWORKS)} (default: {' '.join(NETWORKS[:2])})")
    parser.add_argument("--activations", nargs="+", choices=tuple(ACTIVATIONS), default=COMPARED, metavar="NAME",
                        help=f"one or more of {', '.join(ACTIVATIONS)} (default: {' '.join(COMPARED)})")
    parser.add_argument("--seeds", type=whole(1), default=3, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--epochs", type=whole(1), default=EPOCHS, metavar="N",
                        help="of a run; the learning rate falls at the same fractions of it (default: %(default)s)")
    parser.add_argument("--bias-rate", type=number(0), default=BIAS_RATE, metavar="X",
                        help="learning rate of FReLU's and SReLU's b, times the weights' (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    parser.add_argument("--out", default="results/frelu.jsonl", help="default: %(default)s")
    return parser


if __name__ == "__main__":
    memory.keep()
    run_script(main)
