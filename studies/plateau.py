"""Does AlexNet leave its plateau every time? The first steps of training, seed by seed:

    python -m studies.plateau [--dataset fashion-mnist] [--seeds 10] [--steps 200] [--out results/plateau.jsonl]

Each seed trains with train.py's defaults. A loss of ln(classes), 2.303 for ten classes, means that nothing has been
learnt. Each finished seed is a line in --out; seeds that stand there already are not run again, so the study can be
stopped at any time (another --out starts over). The table is printed last.
"""

import time
from pathlib import Path

import torch

import options
import train
import utils
from data import sources
from data.augment import Augment, epoch_tables
from data.cli import Parser, run_script, whole
from data.loader import Loader
from data.pack import named_store
from data.progress import Progress
from recipe import make_optimizer
from run import store_mean

WINDOW = 25  # steps that a reported loss is the mean of


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    device, out = utils.pick_device(args.device), Path(args.out)
    store = named_store(args.dataset)
    loader = Loader(store, "train", device)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {(e["dataset"], e["steps"], e["seed"]) for e in utils.read_log(out)}
    for seed in range(args.seeds):
        if (args.dataset, args.steps, seed) not in done:
            entry = {"dataset": args.dataset, "steps": args.steps, "seed": seed}
            began = time.monotonic()
            run = options.make_parser().parse_args(["--seed", str(seed), "--max-steps", str(args.steps)])
            options.settle(run, store, device, world=1)
            losses = first_losses(run, store, loader, device)
            entry |= {"losses": windows(losses), "seconds": time.monotonic() - began, **utils.environment(device)}
            utils.append_line(out, entry)
    wanted = [e for e in utils.read_log(out) if (e["dataset"], e["steps"]) == (args.dataset, args.steps)]
    print(table(wanted[: args.seeds]))
    return 0


def first_losses(args, store, loader: Loader, device) -> list[float]:
    """The loss of each of the first steps of train.py with these arguments (options.make_parser's, settled)."""
    net = train.build_net(args, store).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(
        net, recipe=args.recipe, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    inputs = Augment(
        args.image_size, store_mean(args, store), mirror=args.mirror, colour=args.colour, pca=store.manifest["pca"],
        device=device,
    )
    losses, an_epoch, batch = [], len(loader) // args.batch_size, args.batch_size
    with Progress(f"seed {args.seed}", args.max_steps, "steps") as progress:
        while len(losses) < args.max_steps:
            tables = epoch_tables(args.seed, len(losses) // an_epoch, len(loader), store.size - args.image_size)
            plan = [tables.order[s * batch :][:batch] for s in range(min(an_epoch, args.max_steps - len(losses)))]
            for samples, (images, labels) in zip(plan, loader.batches(plan), strict=True):
                utils.seed_all(args.seed, len(losses) + 1, 0)
                pictures = inputs.train(images, tables, samples)
                loss, _ = train.train_step(net, optimizer, pictures, labels, args.precision)
                losses.append(loss.item())
                progress.update(1, f"loss {losses[-1]:.3f}")
    return losses


def windows(losses: list[float]) -> dict[str, float]:
    """Mean loss of the WINDOW steps up to every 50th step."""
    ends = list(range(50, len(losses) + 1, 50)) or [len(losses)]
    return {str(end): sum(losses[end - WINDOW : end]) / WINDOW for end in ends}


def table(entries: list[dict]) -> str:
    """A Markdown table: a row for each seed, a column for each reported step."""
    steps = list(entries[0]["losses"])
    lines = [f"| seed | {' | '.join(f'step {s}' for s in steps)} |", "|---" * (len(steps) + 1) + "|"]
    for entry in entries:
        losses = " | ".join(f"{entry['losses'][s]:.3f}" for s in steps)
        lines.append(f"| {entry['seed']} | {losses} |")
    last = [entry["losses"][steps[-1]] for entry in entries]
    lines.append(f"\nunder 1.0 at step {steps[-1]}: {sum(loss < 1 for loss in last)} of {len(last)}; "
                 f"highest {max(last):.3f}, lowest {min(last):.3f}")
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser(prog="python -m studies.plateau", description="The first steps of training, seed by seed.")
    parser.add_argument("--dataset", choices=sources.NAMED, default="fashion-mnist", help="default: %(default)s")
    parser.add_argument("--seeds", type=whole(1), default=10, help="how many (default: %(default)s)")
    parser.add_argument("--steps", type=whole(WINDOW), default=200, help="of each (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    parser.add_argument("--out", default="results/plateau.jsonl", help="default: %(default)s")
    return parser


if __name__ == "__main__":
    run_script(main)
