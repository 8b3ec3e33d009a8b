"""Pictures of runs, of train.py's and of studies.frelu's:

    python -m studies.figures bias RUN              what each FReLU, SReLU or PReLU of a run learnt, over epochs
    python -m studies.figures bias CHECKPOINT       the same of a checkpoint, printed
    python -m studies.figures curves RUN RUN ...    training and validation error of several runs together
    python -m studies.figures embedding             pictures as two units see them, for ReLU and for FReLU

RUN is a run's folder. The embedding trains the FReLU study's net for it by the recipe of the authors' code: pixels
minus 127.5, divided by 128; batches of 128, momentum 0.9, weight decay 5e-4, a learning rate of 0.01, divided by 10
before epochs 40 and 62 of 78, or the same fractions of --epochs. (Theirs takes pictures of 28 pixels, all 60,000 of
them, and lets b decay; here they have 32, 5,000 are for validation, and b does not decay.) It goes on where it was
stopped. A unit that gives the same for all pictures is dead, and is reported; another --seed may do better.
"""

import json
from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np
import torch

import checkpoints
from checkpoints import build_net, load_checkpoint
from checkpoints.run import Busy, locked, read_log
from data import sources
from data.loader import Loader
from data.store import Store
from model import ACTIVATIONS, activation, activation_parameters
from studies import loop
from studies.common import new_figure, save_figure
from studies.networks import build
from train import Watch
from utils import Diverged, Parser, UserError, one_line, pick_device, run_script, shown, whole

EPOCHS = 78  # of the embedding
DROPS = (39, 61)  # epochs of 78 after which the learning rate falls
LEGEND = 20  # layers or classes that are told apart by a legend; more by a scale of colours


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    return {"bias": bias, "curves": curves, "embedding": embedding}[args.figure](args)


# ---------------------------------------------------------------------------------------------- bias


def bias(args) -> int:
    """Print what the activations of a run or a checkpoint have learnt, and draw a run's over epochs."""
    path = Path(args.run)
    if not path.exists():
        raise UserError(f"{path}: no such run or checkpoint")
    if not path.is_dir():
        if args.out:
            raise UserError("--out: what a checkpoint holds is printed, not drawn; for a picture give the run's folder")
        print_values(learnt_in(path), path)
        return 0
    log = [entry for entry in read_run(path) if entry.get("activations")]
    if not log:
        raise UserError(f"{path}: the log has no values of activations: only frelu, srelu and prelu learn one")
    values = {name: [entry["activations"][name] for entry in log] for name in log[0]["activations"]}
    print_values({name: found[-1] for name, found in values.items()}, path)
    out = args.out or path / "bias.png"
    draw_bias(out, path, [entry["epoch"] for entry in log], values)
    print(f"drawn: {shown(out)}")
    return 0


def learnt_in(path: Path) -> dict[str, float]:
    """What the activations of a checkpoint of train.py or of the study have learnt, by layer."""
    checkpoint = loop.read_checkpoint(path)
    if checkpoint is None:
        return learnt_by(build_net(load_checkpoint(path), path))
    try:
        config = checkpoint["config"]
        net = build(config["network"], config["num_classes"], config["activation"])
        net.load_state_dict(checkpoint["model"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: the weights do not fit the net: {one_line(error)}") from None
    return learnt_by(net)


def learnt_by(net: torch.nn.Module) -> dict[str, float]:
    """The value that each FReLU, SReLU and PReLU has learnt."""
    return {name: parameter.item() for name, parameter in activation_parameters(net).items()}


def print_values(values: dict[str, float], path: Path) -> None:
    if not values:
        raise UserError(f"{path}: its activations learn nothing: only frelu, srelu and prelu do")
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}}  {value:+.4f}")


def draw_bias(out: Path, path: Path, epochs: list[int], values: dict[str, list[float]]) -> None:
    """A line a layer, from where it started, but for runs that took over weights."""
    given = arguments(path)
    name = str(given.get("activation", ""))
    began = list(learnt_by(activation(name)).values()) if name in ACTIVATIONS and not given.get("init") else []
    figure = new_figure(8, 4)
    axes = figure.subplots()
    for (layer, found), colour in zip(values.items(), colours("viridis", len(values)), strict=True):
        axes.plot([0] * bool(began) + epochs, began + found, ".-", lw=1.2, color=colour, label=layer)
    if name != "prelu":
        axes.axhline(0, color="0.4", ls=":", lw=1)
    axes.set(xlabel="epoch", title=f"{label_of(path)}: what each {name} learnt",
             ylabel="slope below 0" if name == "prelu" else "b (should settle below 0)")
    if len(values) <= LEGEND:
        legend_at_right(axes)
    else:
        scale_of_colours(figure, axes, "viridis", len(values), "activation, from the first to the last")
    finish(figure, axes, out)


# ---------------------------------------------------------------------------------------------- curves


def curves(args) -> int:
    """Draw training and validation error of runs together."""
    runs = {Path(name): read_run(Path(name)) for name in args.runs}
    figure = new_figure(8, max(4.5, 0.2 * len(runs)))
    axes = figure.subplots()
    for (path, log), colour in zip(runs.items(), colours("turbo", len(runs)), strict=True):
        epochs = [entry["epoch"] for entry in log]
        axes.plot(epochs, [entry["train_top1_error"] for entry in log], ".--", lw=1, ms=3, color=colour)
        axes.plot(epochs, [entry["val_top1_error"] for entry in log], "o-", lw=1.5, ms=3, color=colour,
                  label=label_of(path, runs))
    axes.plot([], [], "o-", color="0.4", lw=1.5, ms=3, label="validation")
    axes.plot([], [], ".--", color="0.4", lw=1, ms=3, label="training (dropout, random crops)")
    axes.set(xlabel="epoch", ylabel="top-1 error (%)", xlim=(0, None), ylim=(0, None))
    legend_at_right(axes)
    out = args.out or next(iter(runs)) / "together.png"
    finish(figure, axes, out)
    print(f"drawn: {shown(out)}")
    return 0


def label_of(path: Path, others=()) -> str:
    """A run's folder's name, with as many of its parents' as tell it apart from others; for matplotlib, to which some
    characters mean more."""
    parts, number = path.resolve().parts, 1
    others = {other.resolve().parts for other in others} - {parts}
    while number < len(parts) and any(other[-number:] == parts[-number:] for other in others):
        number += 1
    name = "/".join(parts[-number:]).encode(errors="replace").decode().replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


# ---------------------------------------------------------------------------------------------- embedding


def embedding(args) -> int:
    """Train a net of two units for each activation, report them, draw what they make of the test pictures."""
    out = args.out
    if out.exists() and not out.is_file():
        raise UserError(f"{out} is no regular file; name another --out")
    store, device = loop.small_store(args.dataset), pick_device(args.device)
    found = {}
    for act in dict.fromkeys(args.activations):
        folder = checkpoints.FOLDER / "embedding" / f"{args.dataset}-{args.epochs}" / f"{act}-{args.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with locked(folder), Watch(device) as watch:
                run = loop.start(
                    folder, store, device, "two-units", act, plain_momentum, seed=args.seed, inputs=inputs_for(device),
                    lrs=loop.learning_rates(0.01, args.epochs, DROPS, EPOCHS),
                )
                loop.fit(run, watch)
        except Busy:
            raise UserError(f"another process is training {shown(folder)}; wait for it") from None
        except Diverged as error:
            raise UserError(f"{act} diverged: {error}. Another --seed may do better") from None
        if watch.received:
            return 128 + watch.received
        found[act] = embed(run.net, store, device)
        print(f"{act}: {report(act, run.net, *found[act])}")
    draw_embedding(out, found, store)
    print(f"drawn: {shown(out)}")
    return 0


def plain_momentum(net: torch.nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(loop.parameter_groups(net), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)


def inputs_for(device: torch.device) -> loop.Inputs:
    return loop.Inputs(127.5, 128, device)


@torch.no_grad()
def embed(net: torch.nn.Module, store: Store, device: torch.device) -> tuple[np.ndarray, np.ndarray, float]:
    """Of the test pictures: the two units (n, 2), the labels (n,), and the top-1 error in percent."""
    net.eval()
    loader, inputs = Loader(store, "test", device), inputs_for(device)
    units, labels, wrong = [], [], 0
    for images, truth in loader.in_order(250):
        units.append(net.embed(inputs(images)))
        labels.append(truth)
        wrong += (net.fc(units[-1]).argmax(1) != truth).sum().item()
    return torch.cat(units).cpu().numpy(), torch.cat(labels).cpu().numpy(), 100 * wrong / len(loader)


def report(act: str, net: torch.nn.Module, units: np.ndarray, labels: np.ndarray, error: float) -> str:
    dead = dead_units(units)
    said = [f"test error {error:.2f}%", f"{len(dead) or 'no'} dead unit{'s' * (len(dead) != 1)}"]
    said += [f"unit {number + 1} gives {units[0, number]:.3f} for all {len(units):,} pictures" for number in dead]
    said += [f"{'slope' if act == 'prelu' else 'b'} {value:.3f}" for value in learnt_by(net).values()]
    return ", ".join(said)


def dead_units(units: np.ndarray) -> list[int]:
    """The units that give the same for all pictures."""
    return [number for number in (0, 1) if np.ptp(units[:, number]) == 0]


def draw_embedding(out: Path, found: dict, store: Store) -> None:
    """A panel for each activation, a colour for each class."""
    figure, count = new_figure(4 * len(found) + 1.5, 4.2), len(store.classes)
    panels = np.atleast_1d(figure.subplots(1, len(found)))
    for axes, (act, (units, labels, error)) in zip(panels, found.items(), strict=True):
        for label, (name, colour) in enumerate(zip(store.classes, colours("turbo", count), strict=True)):
            mine = units[labels == label]
            axes.plot(mine[:, 0], mine[:, 1], ".", ms=2, color=colour, label=name)
        dead = "".join(f"\nunit {number + 1} is dead" for number in dead_units(units))
        axes.set(xlabel=f"first unit after its {act}", ylabel=f"second unit after its {act}",
                 title=f"{act}, test error {error:.1f}%{dead}")
        axes.grid(alpha=0.3)
    if count <= LEGEND:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", markerscale=6, fontsize=8)
    else:
        scale_of_colours(figure, panels[-1], "turbo", count, "class")
    save_figure(figure, out)


# ---------------------------------------------------------------------------------------------- shared


def read_run(path: Path) -> list[dict]:
    """The log of a run's folder."""
    if not path.is_dir():
        raise UserError(f"{path}: no such run; give the folder that holds its log.jsonl")
    log = read_log(path / "log.jsonl")
    if not log:
        raise UserError(f"{path} holds no log.jsonl with a finished epoch")
    learnt = [entry.get("activations", {}) for entry in log]
    alike = all(isinstance(values, dict) and set(values) == set(learnt[0]) for values in learnt)
    drawn = [entry.get(name) for entry in log for name in ("epoch", "train_top1_error", "val_top1_error")]
    drawn += [value for values in learnt for value in values.values()] if alike else []
    if not alike or not all(isinstance(value, int | float) and not abs(value) > 1e300 for value in drawn):
        raise UserError(f"{path / 'log.jsonl'} is no log of a run")
    return log


def arguments(path: Path) -> dict:
    """What a run was started with; nothing where its config.json is gone."""
    try:
        return dict(json.loads((path / "config.json").read_text())["arguments"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def colours(name: str, count: int) -> list:
    """So many colours: the ten usual ones where they do, else even steps of a colormap."""
    if count <= 10 and name != "viridis":
        return [f"C{number}" for number in range(count)]
    return list(colormap(name)(np.linspace(0, 1, count)))


def colormap(name: str):
    """viridis without its lightest end, which is hard to see on white; others whole."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps[name](np.linspace(0, 0.9 if name == "viridis" else 1, 256)))


def scale_of_colours(figure, axes, name: str, count: int, label: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure.colorbar(ScalarMappable(Normalize(1, count), colormap(name)), ax=axes).set_label(label)


def legend_at_right(axes) -> None:
    """The legend, to the right of the panel."""
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def finish(figure, axes, out: Path) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    save_figure(figure, out)


def make_parser() -> Parser:
    parser = Parser(prog="python -m studies.figures", description="Pictures of runs.")
    kinds = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    one = kinds.add_parser("bias", help="what each activation learnt, over epochs or in a checkpoint")
    one.add_argument("run", metavar="RUN|CHECKPOINT", help="a run's folder, or a .pt file")
    one.add_argument("--out", type=png, metavar="FILE.png", help="default: RUN/bias.png")
    one = kinds.add_parser("curves", help="training and validation error of several runs together")
    one.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    one.add_argument("--out", type=png, metavar="FILE.png", help="default: together.png in the first RUN")
    one = kinds.add_parser("embedding", help="the test pictures as two units see them")
    one.add_argument("--dataset", choices=sources.NAMED, default="fashion-mnist", help="default: %(default)s")
    one.add_argument("--activations", nargs="+", choices=tuple(ACTIVATIONS), default=("relu", "frelu"), metavar="NAME",
                     help="a panel each (default: relu frelu)")
    one.add_argument("--epochs", type=whole(1), default=EPOCHS, metavar="N", help="default: %(default)s")
    one.add_argument("--seed", type=whole(0), default=0, metavar="N", help="default: %(default)s")
    one.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    one.add_argument("--out", type=png, default="results/embedding.png", metavar="FILE.png",
                     help="default: %(default)s")
    return parser


def png(text: str) -> Path:
    """An argument type: a PNG file, so that no run's own files are overwritten."""
    if not text.endswith(".png"):
        raise ArgumentTypeError(f"{text} does not end in .png")
    return Path(text)


if __name__ == "__main__":
    run_script(main)
