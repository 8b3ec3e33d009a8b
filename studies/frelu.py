"""Which activation should a plain net, a net with batch norm, a residual net use? Nets x activations x seeds:

    python -m studies.frelu                                      SmallNet, with and without batch norm: 30 runs
    python -m studies.frelu --dataset cifar10 --networks nin resnet20 resnet20-no-act-after-add --seeds 5
    python -m studies.frelu --dataset fashion-mnist --epochs 6   the schedule shortened, 164 epochs to 6

The recipe is that of the FReLU study (Qiu, Xu and Cai 2017): pictures of 32 x 32, minus the mean and divided by the
deviation of each colour, crops out of a frame of 4 pixels, mirrored or not; batches of 128, Nesterov momentum 0.9,
weight decay 1e-4 (none on what an activation learns), a rate of 0.01, or 0.1 with batch norm, divided by 10 before
epochs 81 and 122 of 164, or the same fractions of --epochs. FReLU's and SReLU's b learn at a tenth of that rate; the
authors' train.lua does that for FReLU, in one of its versions until the rate falls. The test error is that of the net
after the last epoch; nothing is chosen by it. The validation images that a named set sets aside are looked at only.

A run's folder lies under checkpoints/frelu/ and has a log that studies.figures draws. A finished run is a line in --out
and is not run again; one that was stopped goes on where it was, in any way that it was stopped. Several processes can
share an --out: each takes runs that no other has. The table is printed last, of runs with this --dataset and --epochs.
"""

import statistics
import time
from pathlib import Path

import torch

import options
import train
import utils
from data import UserError, sources
from data.augment import Augment
from data.cli import Parser, number, run_script, shown, whole
from data.loader import Loader
from data.pack import named_store
from data.store import Store
from kernels import accelerate
from model import ACTIVATIONS
from recipe import Schedule, split_off_activations
from run import Busy, Run, State, load_last, locked, save_last, write_start
from start import NET_OPTIONS
from studies.ablations import interval, spread
from studies.networks import NETWORKS, SIDE, build

EPOCHS = 164
DROPS = (80, 121)  # epochs of 164 after which the rate falls
FRAME = 4  # pixels around a picture that its crops are cut out of
BIAS_RATE = 0.1  # of b, times the weights' rate (authors' train.lua)
COMPARED = ("relu", "prelu", "elu", "srelu", "frelu")
KEY = ("dataset", "epochs", "network", "activation", "bias_rate", "seed")


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    args.out = utils.results_file(args.out)
    if not all(map(is_result, utils.read_log(args.out))):
        raise UserError(f"{args.out} holds lines of another kind; name another --out")
    args.networks, args.activations = list(dict.fromkeys(args.networks)), list(dict.fromkeys(args.activations))
    store = named_store(args.dataset, size=SIDE)
    utils.settle_arithmetic()
    busy = 0
    for seed in range(args.seeds):
        for network in args.networks:
            for act in args.activations:
                status = run_cell(args, store, cell_of(args, network, act, seed))
                if status > 0:
                    return status  # a signal stopped it; the next start goes on there
                busy += status < 0
    print(table(args, utils.read_log(args.out)))
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
    folder = utils.CHECKPOINTS / "frelu" / f"{args.dataset}-{args.epochs}" / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            if done(args.out, cell):
                return 0
            device = utils.pick_device(args.device)
            run = start(store, folder, cell["network"], device, lambda net: make_optimizer(net, cell), [
                "--seed", str(cell["seed"]), "--epochs", str(args.epochs), "--activation", cell["activation"],
                "--lr", str(first_rate(cell["network"])), "--weight-decay", "1e-4",
            ], bias_rate=cell["bias_rate"], nesterov=True, frame=FRAME)
            training, inputs = Loader(store, "train", device, padding=FRAME), Inputs(*moments(store), device)
            with train.Signals() as signals:
                try:
                    finished = fit(run, training, inputs, falling_rates(run.args.lr, args.epochs), signals)
                    found = result(run, inputs) if finished else None
                except utils.Diverged:
                    found = {"diverged": run.state.step}
            if found:
                utils.append_line(args.out, cell | found | utils.environment(device))
            return 128 + signals.received if signals.received else 0
    except Busy:
        return -1


def done(out: Path, cell: dict) -> bool:
    return any(all(entry[k] == cell[k] for k in KEY) for entry in utils.read_log(out))


def start(
    store: Store, folder: Path, network: str, device: torch.device, optimizer_of, given: list[str], **noted
) -> Run:
    """A run of one of networks.py's nets, new or as its folder has it, for fit(). given: options of train.py that say
    how. noted: what else config.json says of it. optimizer_of(net) makes the optimiser, each group with a `scale`."""
    resume = (folder / "last.pt").exists()
    if not resume and not (folder / "log.jsonl").exists():  # a process that was killed at its start left this alone
        (folder / "config.json").unlink(missing_ok=True)
    try:
        args = options.make_parser().parse_args([
            *given, "--batch-size", "128", "--mean", "channel", "--colour", "off", "--precision", "fp32",
        ])
        args.network, args.image_size, args.out, args.resume = network, SIDE, folder, resume
        options.settle(args, store, device, world=1)
        for name in {*NET_OPTIONS, "recipe", "patience", "init", "kernels"} - {"activation"}:
            delattr(args, name)  # AlexNet's, or train.py's
        vars(args).update(noted)
        utils.seed_all(args.seed)
        net = build(network, len(store.classes), args.activation)
        net.to(device, memory_format=torch.channels_last)
        kernels = accelerate(net)
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        run = Run(args, store, device, 0, 1, net, optimizer_of(net), State(), Schedule(args.lr, patience=args.epochs),
                  kernels, warned=True)  # what it would say of a plateau is for train.py
        if resume:
            load_last(run)
    except UserError as error:
        raise UserError(f"{error}; to train this run anew, remove {shown(folder)}") from None
    write_start(run)
    print(f"{network}, {args.activation}, seed {args.seed}: {kernels}", flush=True)
    return run


def first_rate(network: str) -> float:
    """With batch norm ten times as high."""
    return 0.01 if network == "smallnet" else 0.1


def falling_rates(first: float, epochs: int, drops: tuple[int, ...] = DROPS, of: int = EPOCHS) -> list[float]:
    """Each epoch's learning rate: it falls after `drops` epochs of `of`, or after the same fractions of `epochs`."""
    return [first / 10 ** sum(epoch * of >= drop * epochs for drop in drops) for epoch in range(epochs)]


def make_optimizer(net: torch.nn.Module, cell: dict) -> torch.optim.SGD:
    groups, lr = parameter_groups(net, cell["bias_rate"] or 1.0), first_rate(cell["network"])
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True)


def parameter_groups(net: torch.nn.Module, scale: float = 1.0) -> list[dict]:
    """All but what activations learn; and that, without decay. `scale` times the schedule's rate is a group's rate."""
    learnt, rest = split_off_activations(net)
    groups = [{"params": list(rest.values()), "scale": 1.0}]
    return groups + [{"params": learnt, "scale": scale, "weight_decay": 0.0}] * bool(learnt)


def fit(run: Run, training: Loader, inputs: Augment, rates: list[float], signals: train.Signals) -> bool:
    """Train, each epoch at its rate. Returns whether all of them are done; if not, a signal has stopped it, and
    last.pt has how far it came."""
    args, state = run.args, run.state
    val = Loader(run.store, "val", run.device)
    while state.epoch < len(rates):
        if signals.received:
            return False
        run.schedule.lr = rates[state.epoch]
        for group in run.optimizer.param_groups:
            group["lr"] = run.schedule.lr * group["scale"]
        began = time.monotonic()
        sums, speed, stop = train.train_epoch(run, run.net, training, inputs, signals)
        if stop:
            save_last(run, sums)
            print(f"stopped at step {state.step}; the same command goes on from there", flush=True)
            return False
        entry = train.measure(run, val, inputs, sums) | speed | {"seconds": time.monotonic() - began}
        state.epoch, state.loss_sum, state.wrong = state.epoch + 1, 0.0, 0.0
        state.best = min(state.best, entry["val_top1_error"])
        train_error, val_error = entry["train_top1_error"], entry["val_top1_error"]
        print(f"epoch {state.epoch:>3}/{args.epochs}  lr {entry['lr']:g}  train error {train_error:.2f}%  "
              f"val error {val_error:.2f}%  {entry['images_per_second']:.0f} images/s", flush=True)
        utils.append_line(args.out / "log.jsonl", entry)
        save_last(run)
    return True


def result(run: Run, inputs: Augment) -> dict:
    """What the file of results keeps of a finished run: errors in percent, and the values that the activations learnt
    in the end."""
    run.net.eval()
    test = Loader(run.store, "test", run.device)
    _, top1, top5 = (utils.evaluate([(run.net, inputs)], test) / len(test)).tolist()
    log = utils.read_log(run.args.out / "log.jsonl")
    if [entry.get("epoch") for entry in log] != list(range(1, run.args.epochs + 1)):
        raise UserError(f"{run.args.out / 'log.jsonl'} has lost lines; to train this run anew, remove its folder")
    last = {name: log[-1].get(name, {}) for name in ("train_loss", "train_top1_error", "val_top1_error", "activations")}
    return {
        "test_top1_error": 100 * top1, "test_top5_error": 100 * top5, "test_images": len(test), **last,
        "seconds": sum(entry["seconds"] for entry in log),
    }


class Inputs(Augment):
    """Augment's inputs: pictures minus the mean of each colour, (1, 1, C), and divided by `scale`, (C,)."""

    def __init__(self, mean, scale, device: torch.device):
        super().__init__(SIDE, mean, device=device)
        self.scale = torch.as_tensor(scale, dtype=torch.float32).to(self.device)

    def _float(self, crops, out=None):
        return super()._float(crops, out).div_(self.scale)


def moments(store: Store) -> tuple:
    """The mean, (1, 1, C), and the standard deviation, (3,), of each colour of the training pixels."""
    pca = store.manifest["pca"]  # of the colours' covariance, whose diagonal is wanted
    vectors, values = torch.tensor(pca["eigenvectors"]), torch.tensor(pca["eigenvalues"])
    return store.mean.mean((0, 1), keepdims=True), (values[:, None] * vectors**2).sum(0).sqrt()


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
                        help="of a run; the rate falls at the same fractions of it (default: %(default)s)")
    parser.add_argument("--bias-rate", type=number(0), default=BIAS_RATE, metavar="X",
                        help="rate of FReLU's and SReLU's b, times the weights' (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    parser.add_argument("--out", default="results/frelu.jsonl", help="default: %(default)s")
    return parser


if __name__ == "__main__":
    run_script(main)
