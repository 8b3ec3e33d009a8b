"""Test checkpoints of train.py:

    python test.py                                    the newest run's best.pt on what it was trained on
    python test.py CHECKPOINT --ten-crop              the paper's ten crops
    python test.py A.pt B.pt C.pt --ten-crop          an ensemble: softmax outputs averaged
    python test.py CHECKPOINT --images cat.jpg        the five likeliest classes of pictures, or of a folder of them

--help lists the options.
"""

import contextlib
import csv
import io
import json
import math
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

import checkpoints
import memory
import utils
from checkpoints import load_member, watch_features
from checkpoints.loose import Namer
from checkpoints.run import ROOT
from data import sources
from data.loader import Loader, default_workers, machine_errors
from data.pack import named_store
from data.pictures import ENDINGS, printable
from data.store import Store
from kernels import accelerate
from utils import Parser, UserError, replacing, run_script, shown, whole, write_text


@machine_errors()
def main(argv=None) -> int:
    args = make_parser().parse_intermixed_args(argv)
    check_arguments(args)
    device = utils.pick_device(args.device)
    utils.no_tf32()
    paths = checkpoint_paths(args)
    if args.images:
        name_pictures(args, paths, device)
        return 0
    members = [load_member(path, device, args.ten_crop) for path in paths]
    store = open_store(args, paths, members)
    split = choose_split(args, store)
    check_fit(paths, members, store)
    names = store.names(split)
    seen = watch_features(members[0][0]) if args.features else []
    result, rows = measure(members, store, split, args.batch_size, args.precision)
    result |= {"protocol": "ten-crop" if args.ten_crop else "center", "checkpoints": [str(path) for path in paths]}
    if args.per_class:
        result["per_class"] = per_class(rows, store.classes)
    print(json.dumps(result) if args.json else report(result, len(store.classes)))
    if args.predictions:
        write_predictions(Path(args.predictions), rows, store.classes, names)
    if args.confusion:
        with replacing(Path(args.confusion)) as file, warnings.catch_warnings(action="ignore"):  # of letters it lacks
            confusion_figure(rows, store.classes).savefig(file, format="png", dpi=100)
    if args.features:
        write_features(Path(args.features), seen, names, [row[0] for row in rows], store.classes)
    return 0


def errors(paths: list, store: Store, *, split: str = "test", ten_crop: bool = False, device="cpu") -> dict:
    """What main() prints as JSON, but for the checkpoints, of one checkpoint or an ensemble; for studies."""
    members = [load_member(path, device, ten_crop) for path in paths]
    check_fit(paths, members, store)
    return measure(members, store, split)[0] | {"protocol": "ten-crop" if ten_crop else "center"}


# ---------------------------------------------------------------------------------------------- arguments


def check_arguments(args) -> None:
    inputs = {os.path.realpath(path) for path in (*args.checkpoints, *(args.images or ()))}
    for path in args.images or ():
        if Path(path).suffix.lower() in (".pt", ".safetensors") and not Path(path).is_dir():
            raise UserError(f"--images {path}: that is a checkpoint; name it before --images")
    outputs = {}
    for option in ("predictions", "features", "confusion"):
        if not (path := getattr(args, option)):
            continue
        real = Path(os.path.realpath(path))
        if not real.parent.is_dir():
            raise UserError(f"--{option} {path}: there is no such folder")
        if real.is_dir():
            raise UserError(f"--{option} {path}: that is a folder; name a file in it")
        if real.exists() and not real.is_file():
            raise UserError(f"--{option} {path}: that is no regular file; name a file")
        if not os.access(real.parent, os.W_OK):
            raise UserError(f"--{option} {path}: {real.parent} can't be written to; name another folder")
        endings = {".pt", ".safetensors", *(() if option == "confusion" else ENDINGS)}
        if real.suffix.lower() in endings or str(real) in inputs:
            raise UserError(f"--{option} {path}: that is a checkpoint or a picture, or named like one; name another")
        if real in outputs:
            raise UserError(f"--{option} {path}: --{outputs[real]} goes there already; name another file")
        if option == "confusion" and Path(path).suffix.lower() != ".png":
            raise UserError(f"--confusion {path}: what is written is a PNG; name a .png")
        outputs[real] = option
    if args.images and (args.per_class or args.split or args.confusion):
        raise UserError("--per-class, --confusion and --split go with a data set, not with --images")
    if args.features and (args.ten_crop or len(args.checkpoints) > 1):
        raise UserError("--features are of one net and centre crops; leave --ten-crop and other checkpoints out")


def checkpoint_paths(args) -> list[Path]:
    if args.checkpoints:
        return [Path(path) for path in args.checkpoints]
    path = checkpoints.newest("best.pt")
    if path is None:
        raise UserError(f"no {checkpoints.FOLDER / '*' / 'best.pt'} yet; python train.py makes one")
    if not args.json:
        print(f"testing {shown(path)}")
    return [path]


def open_store(args, paths: list, members: list) -> Store:
    """--data, --dataset, or the store that the first checkpoint was trained on."""
    if args.data:
        return Store(args.data)
    if args.dataset:
        with contextlib.redirect_stdout(sys.stderr):  # a set that has no store is packed, and says so
            return named_store(args.dataset)
    first = members[0][2]
    path = ROOT / first["store"]
    if not first["store"] or not path.is_dir():
        raise UserError("the store that the checkpoint was trained on is not here; name one with --data or --dataset")
    store = Store(path)
    for file, (_, _, checkpoint) in zip(paths, members, strict=True):
        if checkpoint.get("fingerprint", store.fingerprint) != store.fingerprint:
            why = "was packed anew after" if checkpoint["store"] == first["store"] else "is not the store on which"
            print(f"warning: {shown(path)} {why} {file} had been trained; its validation pictures may "
                  "have been training pictures", file=sys.stderr)
    return store


def choose_split(args, store: Store) -> str:
    """--split; else test if it has labels, else val."""
    labelled_test = store.counts.get("test") and "test" not in store.unlabelled
    split = args.split or ("test" if labelled_test else "val")
    if split in store.unlabelled and (args.per_class or args.confusion or not (args.predictions or args.features)):
        raise UserError(f"the pictures of {shown(store.path)}'s {split} split have no labels; --predictions FILE.csv "
                        "writes what they are taken for")
    return split


def check_fit(paths: list, members: list, store: Store) -> None:
    for path, (_, _, checkpoint) in zip(paths, members, strict=True):
        count = len(checkpoint["classes"])
        if count != len(store.classes):
            raise UserError(
                f"{path} has {count} classes, {shown(store.path)} has {len(store.classes)}; "
                "--data or --dataset names the store that it was trained on"
            )
        if checkpoint["classes"] != store.classes:
            if sorted(checkpoint["classes"]) == sorted(store.classes):
                raise UserError(f"{path} has the classes of {shown(store.path)} in another order, and its predictions "
                                "would be wrong there; --data or --dataset names the store that it was trained on")
            print(f"warning: the class names of {path} and {shown(store.path)} differ", file=sys.stderr)
        if checkpoint["resize"] != store.manifest["resize"]:
            print(
                f"warning: {path} was trained on pictures made square otherwise ({checkpoint['resize']}) than those of "
                f"{shown(store.path)} ({store.manifest['resize']})", file=sys.stderr,
            )
        channels = checkpoint["mean"].shape[2]
        if channels != store.channels:
            kinds = {1: "grey", 3: "colour"}
            print(f"warning: {path} was trained on {kinds[channels]} pictures, those of {shown(store.path)} are "
                  f"{kinds[store.channels]}", file=sys.stderr)
        if checkpoint["store_size"] != store.size:
            raise UserError(
                f"{path} was trained on pictures of {checkpoint['store_size']} pixels, {shown(store.path)} has "
                f"{store.size}; pack the set again with --size {checkpoint['store_size']}"
            )


# ---------------------------------------------------------------------------------------------- measuring


def measure(
    members: list, store: Store, split: str, batch_size: int = 128, precision: str = "fp32"
) -> tuple[dict, list]:
    """The errors in percent with their 95% intervals and the mean loss, unless the split is unlabelled; and for each
    picture (label, the five likeliest classes, the probability of the first)."""
    device = next(members[0][0].parameters()).device
    for net, _, _ in members:
        accelerate(net)
    loader = Loader(store, split, device, workers=default_workers(device))
    if trouble := loader.shared_memory_trouble(batch_size):
        print(f"warning: {trouble}", file=sys.stderr)
    sums, found = torch.zeros(3, dtype=torch.float64, device=device), []
    for images, labels in loader.in_order(batch_size):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            outputs = utils.probabilities([member[:2] for member in members], images)
        sums += utils.score(outputs, labels)
        best = outputs.topk(min(5, len(store.classes)))
        found.append((labels, best.indices, best.values[:, 0]))
    result, count = {}, len(loader)
    if split not in store.unlabelled:
        loss, top1, top5 = sums.tolist()
        result = {
            "top1_error": 100 * top1 / count, "top5_error": 100 * top5 / count,
            "top1_interval": wilson_interval(top1, count), "top5_interval": wilson_interval(top5, count),
            "loss": loss / count,
        }
    rows = list(zip(*(torch.cat(part).tolist() for part in zip(*found, strict=True)), strict=True))
    result |= {"images": count, "models": len(members), "precision": precision, "split": split, "data": store.name}
    return result, rows


def wilson_interval(wrong: float, total: int) -> tuple[float, float]:
    """95% interval of an error in percent, by Wilson's score."""
    z, rate = 1.959964, wrong / total
    shrink = 1 + z * z / total
    middle = (rate + z * z / (2 * total)) / shrink
    half = z * math.sqrt(rate * (1 - rate) / total + (z / total / 2) ** 2) / shrink
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def per_class(rows: list, classes: list[str]) -> list[dict]:
    """For each class: name, images, top-1 error in percent (None without images), the class it is most often taken for
    and how often."""
    labels, firsts = (np.array([pick(row) for row in rows]) for pick in (lambda r: r[0], lambda r: r[1][0]))
    lines = []
    for label, name in enumerate(classes):
        mine = firsts[labels == label]
        wrong = mine[mine != label]
        error = 100 * len(wrong) / len(mine) if len(mine) else None
        entry = {"class": name, "images": len(mine), "top1_error": error}
        if len(wrong):
            counts = np.bincount(wrong)
            entry |= {"taken_for": classes[counts.argmax()], "times": int(counts.max())}
        lines.append(entry)
    return lines


def write_predictions(path: Path, rows: list, classes: list[str], names: list[str] | None) -> None:
    """A CSV file, a line for each picture: its index, its name if the store has names, its class (nothing in an
    unlabelled split), the five most likely classes and the probability of the first."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    count = min(5, len(classes))
    writer.writerow(
        ["index", *["picture"] * bool(names), "class", *(f"predicted_{n + 1}" for n in range(count)), "probability"]
    )
    for index, (label, found, chance) in enumerate(rows):
        name = [names[index]] if names else []
        true = classes[label] if label >= 0 else ""
        writer.writerow([index, *name, true, *(classes[f] for f in found), f"{chance:.6f}"])
    write_text(path, text.getvalue())


# ---------------------------------------------------------------------------------------------- what it says


def report(result: dict, classes: int) -> str:
    models = "1 model" if result["models"] == 1 else f"{result['models']} models, softmax outputs averaged"
    crops = "ten crops, softmax outputs averaged" if result["protocol"] == "ten-crop" else "centre crop"
    bf16 = "; bf16" if result["precision"] == "bf16" else ""
    lines = [f"{result['data']}, {result['split']} split, {result['images']:,} images; {crops}; {models}{bf16}"]
    for k in (k for k in (1, 5) if k < classes and "loss" in result):
        low, high = result[f"top{k}_interval"]
        lines.append(f"top-{k} error {result[f'top{k}_error']:6.2f}%   (95% interval {low:.2f} to {high:.2f}%)")
    for entry in result.get("per_class", ()):
        error = f"{entry['top1_error']:6.2f}%" if entry["images"] else "      -"
        line = f"  {error} of {entry['images']:>5}  {entry['class']}"
        if "times" in entry:
            line += f" (most often taken for {entry['taken_for']}, {entry['times']}x)"
        lines.append(printable(line))
    return "\n".join(lines)


def name_pictures(args, paths: list[Path], device) -> None:
    """Print the five likeliest classes of each of --images, or write them, by the averaged softmax outputs."""
    namer = Namer(paths, device, args.ten_crop, args.precision)
    seen, names, rows = watch_features(namer.members[0][0]) if args.features else [], [], []
    for batch, outputs in namer.name(args.images, args.batch_size):
        best = outputs.topk(min(5, len(namer.classes)))
        for name, labels, chances in zip(batch, best.indices.tolist(), best.values.tolist(), strict=True):
            found = [(namer.classes[label], chance) for label, chance in zip(labels, chances, strict=True)]
            names.append(name)
            rows.append((-1, labels, chances[0]))
            if args.json:
                print(json.dumps({"picture": name, "classes": found}), flush=True)
            elif not (args.predictions or args.features):
                likeliest = [f"  {100 * chance:6.2f}%  {printable(label)}" for label, chance in found]
                print("\n".join([printable(name), *likeliest]))
    if args.predictions:
        write_predictions(Path(args.predictions), rows, namer.classes, names)
    if args.features:
        write_features(Path(args.features), seen, names, [-1] * len(names), namer.classes)
    if not args.json:
        written = " and ".join(shown(Path(path)) for path in (args.predictions, args.features) if path)
        print(f"{len(rows):,} picture{'s' * (len(rows) != 1)} named{f', in {written}' if written else ''}")


def write_features(path: Path, seen: list, names, labels, classes: list[str]) -> None:
    """An .npz file: features (n, 4096) float32, what the last layer sees; labels, -1 where there is none; names, if
    there are any; classes."""
    content = {"features": torch.cat(seen).numpy(), "labels": np.array(labels), "classes": np.array(classes)}
    with replacing(path) as file:
        np.savez(file, **content, **({"names": np.array(names)} if names else {}))


def confusion_figure(rows: list, classes: list[str]):
    """A row for each true class, a column for each that its pictures were taken for, in percent of the row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = np.zeros((len(classes), len(classes)))
    np.add.at(counts, ([row[0] for row in rows], [row[1][0] for row in rows]), 1)
    shares = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    few = len(classes) <= 30  # more names and numbers could not be read
    figure = Figure(figsize=(0.45 * len(classes) + 3,) * 2 if few else (9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axes.set(xlabel="taken for", ylabel="class", title="percent of a class's pictures")
    if few:
        ticks = [printable(name)[:30].replace("$", r"\$") for name in classes]
        axes.set_xticks(range(len(classes)), ticks, rotation=90)
        axes.set_yticks(range(len(classes)), ticks)
        for (true, taken), share in np.ndenumerate(shares):
            if share >= 0.5:
                axes.text(taken, true, f"{share:.0f}", ha="center", va="center", fontsize=8,
                          color="white" if share > 50 else "black")
    else:
        figure.colorbar(image)
    return figure


def make_parser() -> Parser:
    parser = Parser(prog="test.py", description="Top-1 and top-5 error of checkpoints, or the classes of pictures.")
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT",
                        help="one, or several for an ensemble (default: the newest checkpoints/*/best.pt)")
    parser.add_argument("--ten-crop", action="store_true",
                        help="average over four corners and centre, mirrored too (paper, section 4.1)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--dataset", choices=sources.NAMED, help="a named set, packed first where it has no store")
    which.add_argument("--data", metavar="STORE", help="a store (default: what the checkpoint was trained on)")
    which.add_argument("--images", nargs="+", metavar="PICTURE",
                       help="name the classes of these pictures, or of all in these folders, instead")
    parser.add_argument("--split", choices=("test", "val"), help="default: test if there is one with labels, else val")
    parser.add_argument("--batch-size", type=whole(1), default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                        help="bf16: autocast, for speed (default: %(default)s)")
    parser.add_argument("--json", action="store_true",
                        help="print one line of JSON and nothing else (with --images one a picture)")
    parser.add_argument("--per-class", action="store_true", help="print each class's error, too")
    parser.add_argument("--predictions", metavar="FILE.csv", help="write the predicted classes of each picture")
    parser.add_argument("--confusion", metavar="FILE.png", help="draw the confusion matrix: true by predicted class")
    parser.add_argument("--features", metavar="FILE.npz",
                        help="write the last hidden layer's outputs for each picture, (n, 4096), with labels and names")
    return parser


if __name__ == "__main__":
    memory.keep()
    run_script(main)
