"""Pictures as two units see them, for ReLU and for FReLU:

    python -m studies.embedding
    python -m studies.embedding --dataset sample --epochs 10 --activations relu frelu elu

The FReLU study's net whose last hidden layer has two units is trained with each activation by the recipe of the
authors' code: pixels minus 127.5, divided by 128; batches of 128, momentum 0.9, weight decay 5e-4, a learning rate of
0.01, divided by 10 before epochs 40 and 62 of 78, or the same fractions of --epochs. (Theirs takes pictures of 28
pixels, all 60,000 of them, and lets b decay; here they have 32, 5,000 are for validation, and b does not decay.) What
both units give for the test pictures is drawn to --out. It goes on where it was stopped. A unit that gives the same for
all pictures is dead, and is reported; another --seed may do better.
"""

from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np
import torch

import checkpoints
import memory
from checkpoints.run import Busy, locked
from data import sources
from data.loader import Loader, machine_errors
from data.store import Store
from model import ACTIVATIONS, activation_parameters
from studies import loop
from studies.common import add_key, colours, new_figure, plain, save_figure
from utils import Diverged, Parser, UserError, pick_device, run_script, shown, whole
from watch import Watch

EPOCHS = 78
DROPS = (39, 61)  # epochs of 78 after which the learning rate falls


@machine_errors("stop what else runs on this device")
def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
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
        units, _, error = found[act] = embed(run.net, store, device)
        print(f"{act}: {report(act, run.net, units, error)}")
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


def report(act: str, net: torch.nn.Module, units: np.ndarray, error: float) -> str:
    dead = dead_units(units)
    said = [f"test error {error:.2f}%", f"{len(dead) or 'no'} dead unit{'s' * (len(dead) != 1)}"]
    said += [f"unit {number + 1} gives {units[0, number]:.3f} for all {len(units):,} pictures" for number in dead]
    name = "slope" if act == "prelu" else "b"
    said += [f"{name} {value.item():.3f}" for value in activation_parameters(net).values()]
    return ", ".join(said)


def dead_units(units: np.ndarray) -> list[int]:
    """The units that give the same for all pictures."""
    return [number for number in (0, 1) if np.ptp(units[:, number]) == 0]


def draw_embedding(out: Path, found: dict, store: Store) -> None:
    """A panel for each activation, a colour for each class."""
    figure, count = new_figure(4 * len(found) + 1.5, 4.2), len(store.classes)
    panels = np.atleast_1d(figure.subplots(1, len(found)))
    for axes, (act, (units, labels, error)) in zip(panels, found.items(), strict=True):
        for number, (name, colour) in enumerate(zip(store.classes, colours(count), strict=True)):
            mine = units[labels == number]
            axes.plot(mine[:, 0], mine[:, 1], ".", ms=2, color=colour, label=plain(name))
        dead = "".join(f"\nunit {number + 1} is dead" for number in dead_units(units))
        axes.set(xlabel=f"first unit after its {act}", ylabel=f"second unit after its {act}",
                 title=f"{act}, test error {error:.1f}%{dead}")
        axes.grid(alpha=0.3)
    add_key(figure, panels[-1], count, "class", markerscale=6)
    save_figure(figure, out)


def make_parser() -> Parser:
    parser = Parser(prog="python -m studies.embedding", description="The test pictures as two units see them.")
    parser.add_argument("--dataset", choices=sources.NAMED, default="fashion-mnist", help="default: %(default)s")
    parser.add_argument("--activations", nargs="+", choices=tuple(ACTIVATIONS), default=("relu", "frelu"),
                        metavar="NAME", help="a panel each (default: relu frelu)")
    parser.add_argument("--epochs", type=whole(1), default=EPOCHS, metavar="N",
                        help="of a net; the learning rate falls at the same fractions of it (default: %(default)s)")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    parser.add_argument("--out", type=png, default="results/embedding.png", metavar="FILE.png",
                        help="default: %(default)s")
    return parser


def png(text: str) -> Path:
    """An argument type: a PNG file, so that no run's own files are overwritten."""
    if not text.endswith(".png"):
        raise ArgumentTypeError(f"{text} does not end in .png")
    return Path(text)


if __name__ == "__main__":
    memory.keep()
    run_script(main)
