"""Test checkpoints of train.py:

    python test.py                                    the newest run's best.pt on what it was trained on
    python test.py CHECKPOINT --ten-crop              the paper's ten crops
    python test.py A.pt B.pt C.pt --ten-crop          an ensemble: softmax outputs averaged
    python test.py CHECKPOINT --images cat.jpg        the five most likely classes of pictures

README.md says what you should see; --help lists the options.
"""

import contextlib
import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch

import utils
from data import UserError, sources
from data.augment import Augment
from data.cli import Parser, run_script, shown, whole
from data.loader import Loader, default_workers
from data.pack import named_store
from data.pictures import open_picture
from data.store import Store
from kernels import accelerate


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    if args.predictions and not Path(args.predictions).resolve().parent.is_dir():
        raise UserError(f"--predictions {args.predictions}: there is no such folder")
    if args.predictions and Path(args.predictions).suffix == ".pt":
        raise UserError(f"--predictions {args.predictions}: that is what a checkpoint is called; name a .csv file")
    device = utils.pick_device(args.device)
    utils.settle_arithmetic()
    paths = checkpoint_paths(args)
    if args.images:
        if args.predictions or args.per_class or args.split:
            raise UserError("--predictions, --per-class and --split go with a data set, not with --images")
        name_pictures(args, paths, device)
        return 0
    checkpoints = [utils.load_checkpoint(path, device) for path in paths]
    store = open_store(args, checkpoints[0])
    labelled_test = store.counts.get("test") and "test" not in store.unlabelled
    split = args.split or ("test" if labelled_test else "val")
    unlabelled = split in store.unlabelled
    if unlabelled and (not args.predictions or args.per_class):
        raise UserError(f"nobody knows the classes of {shown(store.path)}'s {split} split; --predictions FILE.csv "
                        "writes what its pictures are taken for")
    members = [member(checkpoint, path, device) for checkpoint, path in zip(checkpoints, paths, strict=True)]
    check_fit(paths, checkpoints, store)

    loader = Loader(store, split, device, workers=default_workers(device))
    records = Records(store.classes, store.names(split))
    wanted = records.add if args.per_class or args.predictions else None
    sums = utils.evaluate(
        members, loader, ten_crop=args.ten_crop, batch_size=args.batch_size, each_batch=wanted
    ).tolist()
    result = {} if unlabelled else errors(sums, len(loader))
    result |= {
        "images": len(loader), "protocol": "ten-crop" if args.ten_crop else "center", "models": len(members),
        "split": split, "data": store.name, "checkpoints": [str(path) for path in paths],
    }
    if args.per_class:
        result["per_class"] = records.per_class()
    print(json.dumps(result) if args.json else report(result))
    if args.predictions:
        records.write(Path(args.predictions))
    return 0


def errors(sums: list[float], count: int) -> dict:
    """utils.evaluate's sums over `count` pictures as errors in percent with their 95% intervals, and the mean loss."""
    return {
        "top1_error": 100 * sums[1] / count, "top5_error": 100 * sums[2] / count,
        "top1_interval": utils.wilson_interval(sums[1], count), "top5_interval": utils.wilson_interval(sums[2], count),
        "loss": sums[0] / count,
    }


class Records:
    """What each picture was taken for. names: what the pictures are called, where the store knows."""

    def __init__(self, classes: list[str], names: list[str] | None):
        self.classes, self.names, self.rows = classes, names, []

    def add(self, indices, probabilities, labels) -> None:
        """One batch: indices in the split, (n, classes) probabilities, labels."""
        best = probabilities.topk(min(5, len(self.classes)))
        for index, label, found, chance in zip(
            indices.tolist(), labels.tolist(), best.indices.tolist(), best.values[:, 0].tolist(), strict=True
        ):
            self.rows.append((index, label, found, chance))

    def per_class(self) -> list[dict]:
        """For each class: name, images, top-1 error in percent, the class it is most often taken for and how often."""
        lines = []
        for label, name in enumerate(self.classes):
            firsts = np.array([found[0] for _, true, found, _ in self.rows if true == label], dtype=int)
            wrong = firsts[firsts != label]
            entry = {"class": name, "images": len(firsts), "top1_error": 100 * len(wrong) / max(1, len(firsts))}
            if len(wrong):
                counts = np.bincount(wrong)
                entry |= {"taken_for": self.classes[counts.argmax()], "times": int(counts.max())}
            lines.append(entry)
        return lines

    def write(self, path: Path) -> None:
        """A CSV file, a line for each picture: its index, its name if the store has names, its class (nothing where
        nobody knows it), the five most likely classes and the probability of the first."""
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        count = min(5, len(self.classes))
        name = ["picture"] if self.names else []
        writer.writerow(["index", *name, "class", *(f"predicted_{n + 1}" for n in range(count)), "probability"])
        for index, label, found, chance in self.rows:
            name = [self.names[index]] if self.names else []
            true = self.classes[label] if label >= 0 else ""
            writer.writerow([index, *name, true, *(self.classes[f] for f in found), f"{chance:.6f}"])
        utils.write_text(path, text.getvalue())


def report(result: dict) -> str:
    models = "1 model" if result["models"] == 1 else f"{result['models']} models, softmax outputs averaged"
    crops = "ten crops, softmax outputs averaged" if result["protocol"] == "ten-crop" else "centre crop"
    lines = [f"{result['data']}, {result['split']} split, {result['images']:,} images; {crops}; {models}"]
    for k in (1, 5) if "loss" in result else ():
        low, high = result[f"top{k}_interval"]
        lines.append(f"top-{k} error {result[f'top{k}_error']:6.2f}%   (95% interval {low:.2f} to {high:.2f}%)")
    for entry in result.get("per_class", ()):
        line = f"  {entry['top1_error']:6.2f}% of {entry['images']:>5}  {entry['class']}"
        if "times" in entry:
            line += f" (most often taken for {entry['taken_for']}, {entry['times']}x)"
        lines.append(line)
    return "\n".join(lines)


def name_pictures(args, paths: list[Path], device) -> None:
    """Print the five most likely classes of each of --images, by the averaged softmax outputs."""
    loaded = [utils.load_model(path, device) for path in paths]
    classes = loaded[0][0].classes
    if any(model.classes != classes for model, _ in loaded):
        raise UserError("these checkpoints have different classes and are no ensemble")
    for name in args.images:
        picture = open_picture(Path(name))
        with torch.no_grad():
            outputs = [
                model(inputs).double().softmax(1)[0]
                for model, prepare in loaded
                for inputs in (prepare(picture, ten_crop=True) if args.ten_crop else [prepare(picture)])
            ]
        best = torch.stack(outputs).mean(0).topk(min(5, len(classes)))
        found = [(classes[label], chance) for chance, label in zip(*(b.tolist() for b in best), strict=True)]
        if args.json:
            print(json.dumps({"picture": name, "classes": found}))
        else:
            print("\n".join([name, *(f"  {100 * chance:6.2f}%  {label}" for label, chance in found)]))


def checkpoint_paths(args) -> list[Path]:
    if args.checkpoints:
        return [Path(path) for path in args.checkpoints]
    path = utils.newest("best.pt")
    if path is None:
        raise UserError(f"no {utils.CHECKPOINTS / '*' / 'best.pt'} yet; python train.py makes one")
    if not args.json:
        print(f"testing {shown(path)}")
    return [path]


def open_store(args, checkpoint: dict) -> Store:
    """--data, --dataset, or the store that the checkpoint was trained on."""
    if args.data:
        return Store(args.data)
    if args.dataset:
        with contextlib.redirect_stdout(sys.stderr):  # a set that has no store is packed, and says so
            return named_store(args.dataset)
    path = utils.ROOT / checkpoint.get("store", "")
    if not checkpoint.get("store") or not path.is_dir():
        raise UserError("the store that the checkpoint was trained on is not here; name one with --data or --dataset")
    return Store(path)


def check_fit(paths: list[Path], checkpoints: list[dict], store: Store) -> None:
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        count = len(checkpoint["classes"])
        if count != len(store.classes):
            raise UserError(
                f"{path} has {count} classes, {shown(store.path)} has {len(store.classes)}; "
                "--data or --dataset names the store that it was trained on"
            )
        if checkpoint["classes"] != store.classes:
            print(f"warning: the class names of {path} and {shown(store.path)} differ", file=sys.stderr)
        if checkpoint["resize"] != store.manifest["resize"]:
            print(
                f"warning: {path} was trained on pictures made square otherwise ({checkpoint['resize']}) than those of "
                f"{shown(store.path)} ({store.manifest['resize']})", file=sys.stderr,
            )
        if checkpoint["store_size"] != store.size:
            raise UserError(
                f"{path} was trained on pictures of {checkpoint['store_size']} pixels, {shown(store.path)} has "
                f"{store.size}; pack the set again with --size {checkpoint['store_size']}"
            )


def member(checkpoint: dict, path: Path, device):
    """(net, Augment) of a checkpoint."""
    net = utils.build_net(checkpoint, path).to(device, memory_format=torch.channels_last).eval()
    accelerate(net)
    return net, Augment(checkpoint["image_size"], checkpoint["mean"], device=device)


def make_parser() -> Parser:
    parser = Parser(prog="test.py", description="Top-1 and top-5 error of checkpoints, or the classes of pictures.")
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT",
                        help="one, or several for an ensemble (default: the newest checkpoints/*/best.pt)")
    parser.add_argument("--ten-crop", action="store_true",
                        help="average over four corners and centre, mirrored too (paper, section 4.1)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--dataset", choices=sources.NAMED, help="a named set, packed first where it has no store")
    which.add_argument("--data", metavar="STORE", help="a store (default: what the checkpoint was trained on)")
    which.add_argument("--images", nargs="+", metavar="PICTURE", help="name these pictures' classes instead")
    parser.add_argument("--split", choices=("test", "val"), help="default: test if there is one with labels, else val")
    parser.add_argument("--batch-size", type=whole(1), default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    parser.add_argument("--json", action="store_true",
                        help="print one line of JSON and nothing else (with --images one a picture)")
    parser.add_argument("--per-class", action="store_true", help="print each class's error, too")
    parser.add_argument("--predictions", metavar="FILE.csv", help="write what each picture was taken for")
    return parser


if __name__ == "__main__":
    utils.huge_pages()
    run_script(main)
