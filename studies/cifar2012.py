"""The paper's four-layer nets on CIFAR-10 (section 3.3: 13% test error without, 11% with normalisation), and the nets
between the two:

    python -m studies.cifar2012                                all four, one seed each, 520 epochs
    python -m studies.cifar2012 --nets 13pct 11pct --epochs 130 --seeds 3
    python -m studies.cifar2012 --speed                        images/s of a step, ms of each layer by itself

The nets, their update and the way they are trained are those of cuda-convnet, which the paper's footnote names:
layers-conv-local-13pct.cfg, -11pct.cfg and their layer-params files. The 11pct net has normalisation, 64 filters
instead of 32 in local3 and a larger weight decay in fc10; 13pct-lrn and 11pct-no-lrn tell what normalisation alone is
worth.

Training is in four parts, 350, 150, 10 and 10 of 520 epochs: on four fifths of the 50,000 training pictures, the other
10,000 being looked at every ten epochs; on all; at a tenth and at a hundredth of the weights' learning rate. That is
the 11pct file's own account, used for all four nets. With fewer --epochs the first two parts are shortened alike; the
other two keep the 10 epochs that the file names down to 130 epochs, and are a thirteenth each of fewer. Pictures come
in an order that is the same in every epoch, as in cuda-convnet; which of them are held out, and the order, is drawn
once, the same for all runs. A seed decides the weights at the start, the crops and the mirroring. The test pictures are
looked at when a net is finished.

A finished net is a line in --out and is not trained again; one that was stopped, in any way, goes on where its last
epoch began and ends in the same weights. Nets stay in checkpoints/cifar2012/, and with another --out are tested, not
trained, again. Several processes can share an --out.
"""

import itertools
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoints
import memory
import utils
from checkpoints.run import Busy, append_line, environment, locked, read_log
from data.loader import machine_errors
from kernels import accelerate
from studies.common import results_file, spread, verdict
from studies.fourlayer import (
    BATCH,
    CROP,
    RATE,
    Pictures,
    build,
    error,
    load,
    lower_rate,
    make_optimizer,
    save,
    train_epoch,
)
from studies.loop import small_store
from train import train_step
from utils import Diverged, Parser, UserError, pick_device, run_script, shown, whole
from watch import Watch

# layers-conv-local-*.cfg, layer-params-conv-local-*.cfg
NETS = {
    "13pct": {"lrn": False, "filters": 32, "decay": 0.004},
    "13pct-lrn": {"lrn": True, "filters": 32, "decay": 0.004},
    "11pct-no-lrn": {"lrn": False, "filters": 64, "decay": 0.01},
    "11pct": {"lrn": True, "filters": 64, "decay": 0.01},
}
PAPER = {"13pct": 13, "11pct": 11}  # percent test error
EPOCHS = 520
ON_FOUR_FIFTHS = 0.7  # of the epochs at the first learning rate, 350 of 500
LOWERED = 10  # epochs at each of the lower ones
LOOK_AT_HELD_OUT = 10  # epochs from one look to the next
PROTOCOLS = ("ten", "nine", "centre")
KEY = ("net", "epochs", "precision", "seed")


# ---------------------------------------------------------------------------------------------- training


def plan_of(epochs: int) -> list[tuple[float, int]]:
    """Each epoch's learning rate of the weights, and how many of the five parts it sees. Each part of the training has
    an epoch at least. epochs: 4 or more."""
    lowered = max(1, min(LOWERED, epochs // 13))
    first = epochs - 2 * lowered
    on_four = min(round(ON_FOUR_FIFTHS * first), first - 1)
    return [*[(RATE, 4)] * on_four, *[(RATE, 5)] * (first - on_four),
            *[(RATE / 10, 5)] * lowered, *[(RATE / 100, 5)] * lowered]


@dataclass
class Net:
    """A net under way. epoch: epochs finished; made: on what, and by which commit, it was begun."""

    folder: Path
    net: nn.Sequential
    optimizer: torch.optim.Optimizer
    seed: int
    precision: str
    epoch: int
    made: dict


def fit(run: Net, pictures: Pictures, epochs: int, watch: Watch) -> bool:
    """Train to the end; False where a signal stopped it, in which case last.pt has the last whole epoch."""
    plan = plan_of(epochs)
    for lr, parts in plan[run.epoch :]:
        lower_rate(run.optimizer, lr)
        entry = train_epoch(run.net, run.optimizer, pictures, parts, run.seed, run.epoch, watch, run.precision)
        if entry is None:
            print(f"stopped in epoch {run.epoch + 1}; the same command trains that epoch again and goes on", flush=True)
            return False
        run.epoch += 1
        entry |= {"epoch": run.epoch, "lr": lr, "parts": parts}
        held_out = ""
        if parts < 5 and (run.epoch % LOOK_AT_HELD_OUT == 0 or plan[run.epoch][1] == 5):
            entry["val_top1_error"] = error(run.net, pictures.views("centre"), pictures.held_out())
            held_out = f"  held-out error {entry['val_top1_error']:.2f}%"
        print(f"epoch {run.epoch:>3}/{epochs}  lr {lr:g}  train loss {entry['train_loss']:.4f} error "
              f"{entry['train_top1_error']:.2f}%{held_out}  {entry['images_per_second']:.0f} images/s", flush=True)
        append_line(run.folder / "log.jsonl", entry)
        save(run.folder / "last.pt", run.net, run.optimizer, pictures, run.epoch, made=run.made)
    return True


def start(folder: Path, name: str, pictures: Pictures, seed: int, precision: str) -> Net:
    """A net at its start, or where its folder's last.pt has it."""
    utils.seed_all(seed)
    options, device = NETS[name], pictures.train.device
    net = build(options["lrn"], options["filters"], classes=pictures.classes)
    net = net.to(device, memory_format=torch.channels_last)
    accelerate(net)
    optimizer = make_optimizer(net, options["decay"])
    last, log = load(folder / "last.pt", net, optimizer, pictures), folder / "log.jsonl"
    kept = [entry for entry in read_log(log) if entry.get("epoch") in range(1, last["epoch"] + 1)]
    if [entry["epoch"] for entry in kept] != list(range(1, last["epoch"] + 1)):
        raise UserError(f"{shown(log)} has lost lines; to train this net anew, remove its folder")
    utils.write_text(log, "".join(json.dumps(entry) + "\n" for entry in kept))  # later epochs are trained once more
    return Net(folder, net, optimizer, seed, precision, last["epoch"], last.get("made") or environment(device))


# ---------------------------------------------------------------------------------------------- the study


@machine_errors("stop what else runs on this device")
def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    device = pick_device(args.device)
    utils.no_tf32()
    if args.speed:
        print(speed(args, device))
        return 0
    args.out = results_file(args.out)
    if not all(set(KEY) <= set(entry) for entry in read_log(args.out)):
        raise UserError(f"{args.out} holds lines of another kind; name another --out")
    pictures = Pictures(small_store("cifar10"), CROP, device)
    for seed, name in itertools.product(range(args.seeds), args.nets):
        cell = {"net": name, "epochs": args.epochs, "precision": args.precision, "seed": seed}
        try:
            if status := make_net(args, pictures, cell):
                return status  # a signal stopped it; the next start goes on there
        except Busy:
            print(f"{name}, seed {seed}: left to the process that trains it", flush=True)
    print(table([e for e in read_log(args.out) if (e["epochs"], e["precision"]) == (args.epochs, args.precision)]))
    print(f"\n{args.epochs} epochs (cuda-convnet: {EPOCHS}), {args.precision}")
    return 0


def make_net(args, pictures: Pictures, cell: dict) -> int:
    """Train, test and note one net, unless that is done. Returns 0, or 128 + a signal. Raises Busy where another
    process is at it."""
    folder = checkpoints.FOLDER / "cifar2012" / "-".join(str(cell[k]) for k in KEY)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if any(all(e[k] == cell[k] for k in KEY) for e in read_log(args.out)):
            return 0
        print(f"{cell['net']}, seed {cell['seed']}: {shown(folder)}", flush=True)
        device = pictures.train.device
        run = start(folder, cell["net"], pictures, cell["seed"], cell["precision"])
        with Watch(device) as watch:
            try:
                if not fit(run, pictures, args.epochs, watch):
                    return 128 + watch.received
            except Diverged as reason:
                append_line(args.out, cell | {"diverged": str(reason)} | run.made)
                return 0
        log = read_log(folder / "log.jsonl")
        errors = {p: error(run.net, pictures.views(p), pictures.test.in_order(BATCH)) for p in PROTOCOLS}
        found = {"error": errors, "train_top1_error": log[-1]["train_top1_error"],
                 "seconds": sum(e["seconds"] for e in log)}
        append_line(args.out, cell | found | run.made)
        return 128 + watch.received if watch.received else 0  # one that came with the last epoch


def table(entries: list[dict]) -> str:
    """Markdown: each net's test errors, mean and standard deviation over seeds; what normalisation and the other two
    changes take off, paired by seed."""
    found = {name: {e["seed"]: e for e in entries if e["net"] == name and "error" in e} for name in NETS}
    lines = ["| net | paper | ten views | nine views | centre | training error |", "|---|---|---|---|---|---|"]
    for name, nets in found.items():
        paper = f"{PAPER[name]}%" if name in PAPER else "-"
        if not nets:
            lines.append(f"| {name} | {paper} | not measured yet | | | |")
            continue
        shown_errors = [spread([e["error"][p] for e in nets.values()]) for p in PROTOCOLS]
        trained = spread([e["train_top1_error"] for e in nets.values()])
        lines.append(f"| {name} | {paper} | {' | '.join(shown_errors)} | {trained} |")
    lines += ["", "| what | from | to | points off, ten views, by seed | in all |", "|---|---|---|---|---|"]
    for what, before, after in (
        ("normalisation", "13pct", "13pct-lrn"), ("normalisation", "11pct-no-lrn", "11pct"),
        ("64 filters in local3 and fc10's decay", "13pct", "11pct-no-lrn"),
        ("64 filters in local3 and fc10's decay", "13pct-lrn", "11pct"), ("both", "13pct", "11pct"),
    ):
        seeds = sorted(set(found[before]) & set(found[after]))
        gains = [found[before][s]["error"]["ten"] - found[after][s]["error"]["ten"] for s in seeds]
        by_seed = ", ".join(f"{gain:+.2f}" for gain in gains) or "not measured yet"
        lines.append(f"| {what} | {before} | {after} | {by_seed} | {verdict(gains) if gains else ''} |")
    diverged = [f"{e['net']} with seed {e['seed']}" for e in entries if "diverged" in e]
    return "\n".join([*lines, *(["", f"diverged: {', '.join(diverged)}"] if diverged else [])])


# ---------------------------------------------------------------------------------------------- speed


def speed(args, device: torch.device) -> str:
    """Images/s of a step on a batch that does not change, and what each layer's forward and backward pass takes when it
    is called alone; medians of 15, in turns."""
    lines = [f"batch {BATCH}, {args.precision}, {environment(device)['device']}, {torch.get_num_threads()} threads, "
             "medians of 15:"]
    for name in args.nets:
        options = NETS[name]
        net = build(options["lrn"], options["filters"]).to(device, memory_format=torch.channels_last)
        accelerate(net)
        optimizer = make_optimizer(net, options["decay"], lr=1e-6)
        inputs = 60 * torch.randn(BATCH, 3, CROP, CROP, device=device).contiguous(memory_format=torch.channels_last)
        labels = torch.arange(BATCH, device=device) % 10
        calls = {"step": lambda n=net, o=optimizer, i=inputs, t=labels: train_step(n, o, i, t, args.precision)}
        calls |= layer_calls(net, inputs, args.precision)
        took = medians(calls, device)
        step, layers = took.pop("step"), sum(v for name, v in took.items() if name != "step")
        parts = ", ".join(f"{layer} {1000 * t:.2f}" for layer, t in took.items())
        local = took["local3"] + took["local4"]
        lines.append(f"{name}: {BATCH / step:.0f} images/s, {1000 * step:.1f} ms a step; layers alone, in ms: {parts}; "
                     f"together {1000 * layers:.1f}; local3 and local4 are {100 * local / step:.0f}% of the step")
    return "\n".join(lines)


def layer_calls(net: nn.Sequential, inputs: Tensor, precision: str) -> dict:
    """Forward and backward pass of each layer on what it is given in the net."""
    calls, x = {}, inputs
    autocast = torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16")
    for name, layer in net.named_children():
        given = x.detach().requires_grad_(name != "conv1")
        with autocast:
            x = layer(given)
        gradient = torch.randn_like(x)

        def call(layer=layer, given=given, gradient=gradient):
            with autocast:
                y = layer(given)
            if y.requires_grad:
                y.backward(gradient)
            layer.zero_grad()
            given.grad = None

        calls[name] = call
    return calls


def medians(calls: dict, device: torch.device, repeats: int = 15) -> dict[str, float]:
    """Seconds of each call, taken in turns after three for warm-up."""
    times = {name: [] for name in calls}
    for number, (name, call) in itertools.product(range(repeats + 3), calls.items()):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(t) for name, t in times.items()}


def make_parser() -> Parser:
    parser = Parser(prog="python -m studies.cifar2012", description="The paper's four-layer nets on CIFAR-10.")
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), default=tuple(NETS), metavar="NET",
                        help=f"one or more of {', '.join(NETS)} (default: all)")
    parser.add_argument("--epochs", type=whole(4), default=EPOCHS, metavar="N",
                        help="of the four parts together (default: %(default)s)")
    parser.add_argument("--seeds", type=whole(1), default=1, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    parser.add_argument("--speed", action="store_true", help="train nothing, time a step and its layers")
    parser.add_argument("--out", default="results/cifar2012.jsonl", help="default: %(default)s")
    return parser


if __name__ == "__main__":
    memory.keep()
    run_script(main)
