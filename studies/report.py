"""A page about a run: what it did, what its net sees, where it is wrong.

    python -m studies.report checkpoints/photos-1                    to checkpoints/photos-1/report.html
    python -m studies.report checkpoints/photos-1 --out page.html --pictures figures
    python -m studies.report checkpoints/a --compare checkpoints/b checkpoints/c

RUN is a run's folder, of a run that is still going on, too: its best.pt is looked at. The page is one file with the
pictures inside; it needs no network. Test pictures are those of test.py, at most 10,000 of them; neighbours and patches
are sought among at most 10,000 training pictures; both are drawn by --seed, and the page says so. What a run can't fill
is left out, and the page says why.
"""

import base64
import html
import io
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import options
import test
import train
import utils
from checkpoints import LAYERS, describe_net, load_member, watch_features
from checkpoints.run import KERNELS, ROOT, read_config, read_log
from data.loader import Loader
from data.pictures import printable
from data.store import Store
from kernels import accelerate
from studies import look
from studies.common import new_figure
from utils import Parser, Progress, UserError, duration, pick_device, run_script, shown, whole, write_text

MOST = 10_000  # pictures of a split that are looked at
BATCH = 128
FRAMES = 40  # of the moving picture at most
SHOWN = 6  # pictures in the sections that show some


class LeftOut(Exception):
    """Why a section can't be filled."""


@dataclass
class Looked:
    """Pictures of a split as a net sees them: probabilities (n, classes), features (n, 4096), labels (n,), and which
    of the split's pictures these are."""

    probabilities: Tensor
    features: Tensor
    labels: Tensor
    rows: np.ndarray


@dataclass
class Run:
    """A run's folder and its net, on a device."""

    path: Path
    device: torch.device
    seed: int
    keep: Path | None = None  # a folder that figures are written to, too
    log: list[dict] = field(default_factory=list)

    def __post_init__(self):
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such run; give the folder that holds its log.jsonl")
        self.config, self.log = read_config(self.path), read_log(self.path / "log.jsonl")
        self.arguments = self.config["arguments"]
        if not (self.path / "best.pt").exists():
            raise UserError(f"{self.path} has no best.pt yet: its first epoch is not over")
        self.net, self.views, self.checkpoint = load_member(self.path / "best.pt", self.device)
        self.seen = watch_features(self.net)
        accelerate(self.net)
        self.classes = [printable(name) for name in self.checkpoint["classes"]]
        self.size = self.checkpoint["image_size"]

    @cached_property
    def store(self) -> Store:
        path = ROOT / self.checkpoint["store"]
        try:
            store = Store(path)
        except UserError as error:
            raise LeftOut(f"the store that the run was trained on can't be read: {error}") from None
        if store.classes != self.checkpoint["classes"] or store.size != self.checkpoint["store_size"]:
            raise LeftOut(f"{shown(path)} is another store than the run was trained on")
        return store

    @cached_property
    def split(self) -> str:
        """What is tested: as test.py chooses it."""
        labelled = self.store.counts.get("test") and "test" not in self.store.unlabelled
        return "test" if labelled else "val"

    def rows(self, split: str) -> np.ndarray:
        count = self.store.counts[split]
        if count <= MOST:
            return np.arange(count)
        return np.sort(np.random.default_rng(self.seed).choice(count, MOST, replace=False))

    @cached_property
    def tested(self) -> Looked:
        return self.look_at(self.split)

    @cached_property
    def trained(self) -> Looked:
        return self.look_at("train")

    def look_at(self, split: str) -> Looked:
        rows, found, labels = self.rows(split), [], []
        self.seen.clear()
        loader = Loader(self.store, split, self.device, resident=False)
        plan = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        with Progress(f"looking at {split}", len(rows)) as progress:
            for images, truth in loader.batches(plan):
                found.append(utils.probabilities([(self.net, self.views)], images).cpu())
                labels.append(truth.cpu())
                progress.update(len(truth))
        looked = Looked(torch.cat(found), torch.cat(self.seen), torch.cat(labels), rows)
        self.seen.clear()
        return looked

    def inputs(self, split: str, rows) -> Tensor:
        """The net's inputs of these pictures, their centre crops."""
        images, _ = self.store.split(split).read(np.asarray(rows))
        (inputs,) = self.views(torch.from_numpy(images).to(self.device))
        return inputs

    def pictures(self, split: str, rows) -> np.ndarray:
        """The same as pixels, (n, S, S, 3) uint8."""
        images, _ = self.store.split(split).read(np.asarray(rows))
        edge = (images.shape[1] - self.size) // 2
        crops = images[:, edge : edge + self.size, edge : edge + self.size]
        return np.broadcast_to(crops, (*crops.shape[:3], 3))


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    device = pick_device(args.device)
    utils.no_tf32()
    keep = Path(args.pictures) if args.pictures else None
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
    run = Run(Path(args.run), device, args.seed, keep)
    out = Path(args.out) if args.out else run.path / "report.html"
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise UserError(f"--out {out}: " + ("that is a folder" if out.is_dir() else "there is no such folder"))
    sections = list(SECTIONS)
    if args.compare:
        sections.append(("Next to other runs", lambda run: compared(run, args.compare)))
    parts = []
    with Progress("sections", len(sections), "sections") as progress:
        for title, make in sections:
            try:
                content = make(run)
            except LeftOut as reason:
                content = paragraph(f"Left out: {reason}")
            parts.append(f"<section><h2>{escape(title)}</h2>\n{content}\n</section>")
            progress.update(1, title)
    write_text(out, page(run, "\n".join(parts)))
    print(f"{shown(out)}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


# ---------------------------------------------------------------------------------------------- 1, 2: the run


def what(run: Run) -> str:
    """Settings that differ from the defaults, data, net, machine, result."""
    config, given, looked = run.config, run.arguments, run.tested
    standard = vars(options.make_parser().parse_args([])) | options.DEFAULTS
    aside = {"data", "dataset", "out", "resume", "max_steps", "workers", "device", "download", "image_size",
             "precision"}
    changed = [options.worded(name, value) for name, value in given.items()
               if name in standard and name not in aside and value != standard[name]]
    counts = run.store.counts
    lines = {
        "data": f"{run.store.name}: " + ", ".join(f"{n:,} {split}" for split, n in counts.items()) +
        f" pictures, {len(run.classes)} classes, {run.store.size} x {run.store.size}",
        "net": f"{describe_net(run.net)}, {run.size} x {run.size} pixels, "
        f"{sum(p.numel() for p in run.net.parameters()):,} parameters",
        "settings other than train.py's own": ", ".join(changed) or "none",
        "epochs": f"{len(run.log)}; best.pt is of epoch {run.checkpoint['epoch']}, lowest validation top-1 error "
        f"{run.checkpoint['best']:.2f}%",
        "time": duration(sum(entry.get("seconds", 0) for entry in run.log)),
        "machine": f"{config['device']}, {config.get('processes', 1)} x {config['threads']} threads, "
        f"{given.get('precision')}, torch {config['torch']}, commit {config.get('commit') or 'unknown'}",
    }
    rows = [[escape(name), escape(text)] for name, text in lines.items()]
    best = looked.probabilities.topk(min(5, len(run.classes))).indices == looked.labels[:, None]
    count, result = len(looked.labels), []
    for k, hits in ((1, best[:, 0]), (5, best.any(1))):
        wrong = count - int(hits.sum())
        low, high = test.wilson_interval(wrong, count)
        result.append(f"top-{k} error {100 * wrong / count:.2f}% (95% interval {low:.2f} to {high:.2f}%)")
    part = "" if count == counts[run.split] else f" of {counts[run.split]:,}, drawn by --seed {run.seed}"
    said = f"On {count:,} pictures{part} of the {run.split} split, centre crop: {', '.join(result)}."
    return table(None, rows) + paragraph(said) + f"<pre>{escape(f'python test.py {shown(run.path)}/best.pt')}</pre>"


def curves(run: Run) -> str:
    """Loss, error, learning rate, and what activations have learnt, over epochs."""
    if not run.log:
        raise LeftOut("there is no finished epoch in log.jsonl")
    both = ("training (dropout, crops)", "validation")
    panels = [
        ("loss", {name: [e[f"{key}_loss"] for e in run.log] for name, key in zip(both, ("train", "val"), strict=True)}),
        ("top-1 error (%)",
         {name: [e[f"{key}_top1_error"] for e in run.log] for name, key in zip(both, ("train", "val"), strict=True)}),
        ("learning rate", {"": [e["lr"] for e in run.log]}),
    ]
    if learnt := run.log[-1].get("activations"):
        panels.append(("what each activation learnt",
                       {name: [e.get("activations", {}).get(name) for e in run.log] for name in learnt}))
    epochs = [entry["epoch"] for entry in run.log]
    drops = [b["epoch"] - 0.5 for a, b in zip(run.log, run.log[1:], strict=False) if b["lr"] < a["lr"]]
    images = []
    for label, lines in panels:
        figure = new_figure(3.6, 3.1)
        axes = figure.subplots()
        for (name, values), style in zip(lines.items(), ("o--", *["s-"] * len(lines)), strict=False):
            axes.plot(epochs, values, style if len(lines) == 2 else ".-", ms=3, label=name)
        for drop in drops:
            axes.axvline(drop, color="0.6", ls=":")
        axes.set(xlabel="epoch", ylabel=label)
        axes.set(yscale="log") if label == "learning rate" else axes.set(ylim=(0, None) if len(lines) == 2 else None)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize=7)
        images.append(figure_of(run, f"curves-{len(images) + 1}", figure, f"{label} over epochs"))
    note = "Dotted: the learning rate fell." if drops else "The learning rate did not fall."
    return f'<div class="row">{"".join(images)}</div>' + paragraph(note)


# ---------------------------------------------------------------------------------------------- 3, 4: kernels


def kernels(run: Run) -> str:
    """The paper's figure 3: conv1's kernels, by column, how coloured they are, and how they came to be."""
    now = next(layer for layer in run.net.modules() if isinstance(layer, torch.nn.Conv2d)).weight
    now = now.detach().float().cpu().numpy()
    columns = run.checkpoint["config"].get("columns", 1)
    parts = np.split(now, columns)
    numbers = [f"{look.saturation(part):.2f}" for part in parts]
    images = [picture_of(run, f"kernels-{i}", grid(kernel_pictures(part), 12, scale=3), "Kernels of conv1")
              for i, part in enumerate(parts, 1)]
    said = f"How coloured, 0 (grey) to 1: {', '.join(numbers)}. Random kernels have 0.67."
    if columns == 2:
        said += " First and second column: the paper's net has one half that is colour-blind and one that is not."
    moving = ""
    try:
        kept = np.load(run.path / KERNELS, allow_pickle=False).astype(np.float32)
        chosen = sorted({round(i) for i in np.linspace(0, len(kept) - 1, min(FRAMES, len(kept)))})
        frames = [Image.fromarray(grid(kernel_pictures(kept[i]), 12, scale=2)) for i in chosen]
        data = io.BytesIO()
        frames[0].save(data, "WEBP", save_all=True, append_images=frames[1:], duration=300, loop=0, lossless=True)
        start = np.split(kept[0], columns)
        moving = paragraph(f"From the start (how coloured: {', '.join(f'{look.saturation(s):.2f}' for s in start)}) to "
                           f"epoch {len(kept) - 1}:") + image(data.getvalue(), "webp", "The kernels over epochs")
    except (OSError, ValueError, EOFError):
        moving = paragraph(f"How they came to be is not known: the run has no {KERNELS}.")
    return '<div class="row">' + "".join(images) + "</div>" + paragraph(said) + moving


def kernel_pictures(weights: np.ndarray) -> list[np.ndarray]:
    """Each kernel (3, k, k) as a picture, grey where it is 0, as bright as its own largest number allows."""
    largest = np.abs(weights).max((1, 2, 3), keepdims=True).clip(1e-12)
    return list((127.5 + 127.5 * weights / largest).round().astype(np.uint8).transpose(0, 2, 3, 1))


def patches(run: Run) -> str:
    """For the most active kernels of conv2 to conv5 the nine training patches that excite them most."""
    rows = run.rows("train")
    loader = Loader(run.store, "train", run.device, resident=False)
    names = list(look.CONVOLUTIONS[1:])

    def batches():
        plan = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        with Progress("patches", len(rows)) as progress:
            for images, labels in loader.batches(plan):
                (inputs,) = run.views(images)
                yield inputs, labels
                progress.update(len(labels))

    found = look.strongest(run.net, names, batches())
    parts = [paragraph(f"Of each layer the kernels that stand out most, and the nine of {len(rows):,} training "
                       "pictures that excite each most, cut out at what it sees.")]
    for name in names:
        size = look.receptive_field(run.net, name)
        tiles = []
        for _, places in found[name]:
            crops = run.pictures("train", rows[[place[0] for place in places]])
            cuts = [look.cut(crop, size, *place[1:]) for crop, place in zip(crops, places, strict=True)]
            tiles.append(grid([fitted(c, 48) for c in cuts], 3))
        label = f"{name}: sees {min(size[0], run.size)} of {run.size} pixels"
        numbers = ", ".join(str(kernel) for kernel, _ in found[name])
        parts.append(f"<h3>{escape(label)}</h3>" + picture_of(run, f"patches-{name}", grid(tiles, 6, gap=8), label) +
                     paragraph(f"kernels {numbers}"))
    return "".join(parts)


# ---------------------------------------------------------------------------------------------- 5: the paper's figure 4


def guesses(run: Run) -> str:
    """Figure 4, left: test pictures with their likeliest classes, some right and some wrong."""
    looked, generator = run.tested, np.random.default_rng(run.seed)
    right = (looked.probabilities.argmax(1) == looked.labels).numpy()
    chosen = [generator.permutation(np.flatnonzero(part))[:SHOWN] for part in (right, ~right)]
    cards = []
    for index in np.concatenate(chosen):
        best = looked.probabilities[index].topk(min(5, len(run.classes)))
        truth = int(looked.labels[index])
        (picture,) = run.pictures(run.split, looked.rows[[index]])
        bars = "".join(
            f'<tr class="{"true" if label == truth else ""}"><td>{escape(run.classes[label])}</td>'
            f'<td><meter value="{chance:.4f}"></meter></td><td>{100 * chance:.1f}%</td></tr>'
            for label, chance in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
        cards.append(f'<figure>{picture_of(run, f"guess-{index}", fitted(picture, 128), run.classes[truth])}'
                     f"<figcaption>{escape(run.classes[truth])}</figcaption><table>{bars}</table></figure>")
    return (paragraph(f"{len(chosen[0])} pictures of the {run.split} split that it gets right, then {len(chosen[1])} "
                      "that it gets wrong; drawn at random. Bold: the right class.") +
            f'<div class="row">{"".join(cards)}</div>')


def neighbours(run: Run) -> str:
    """Figure 4, right: the training pictures whose fc7 outputs are nearest, next to the nearest by pixels."""
    tested, trained = run.tested, run.trained
    by_net = look.nearest(tested.features, trained.features)
    by_pixels = look.nearest(*(small_pixels(run, split, looked.rows) for split, looked in (
        (run.split, tested), ("train", trained)
    )))
    shares = [look.share_of_right(found, tested.labels, trained.labels) for found in (by_net, by_pixels)]
    rows = []
    for index in np.random.default_rng(run.seed).permutation(len(tested.labels))[:5]:
        query = run.pictures(run.split, tested.rows[[index]])
        found = [run.pictures("train", trained.rows[n[index].numpy()]) for n in (by_net, by_pixels)]
        gap = np.full((64, 12, 3), 255, np.uint8)
        tiles = [[fitted(p, 64) for p in part] for part in (query, *found)]
        rows.append(np.concatenate([np.concatenate([*part, gap], 1) for part in tiles], 1))
    said = (f"Over {len(tested.labels):,} pictures of the {run.split} split and {len(trained.labels):,} training "
            f"pictures, of the six nearest have the right class: {shares[0][0]:.1f}% ± {shares[0][1]:.1f} by fc7, "
            f"{shares[1][0]:.1f}% ± {shares[1][1]:.1f} by pixels (95% intervals over pictures).")
    return (paragraph("Each row: a picture, the six training pictures that are nearest by what fc7 gives, the six that "
                      "are nearest by their pixels.") +
            picture_of(run, "neighbours", np.concatenate(rows), "Nearest neighbours") + paragraph(said))


def small_pixels(run: Run, split: str, rows: np.ndarray) -> Tensor:
    """Pictures as rows of numbers, at most 64 x 64 pixels."""
    parts = []
    for start in range(0, len(rows), 500):
        crops = torch.from_numpy(run.pictures(split, rows[start : start + 500]).copy()).permute(0, 3, 1, 2).float()
        if run.size > 64:
            crops = torch.nn.functional.interpolate(crops, (64, 64), mode="area")
        parts.append(crops.flatten(1) / 255)
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------- 6: where it looks


def where(run: Run) -> str:
    """Occlusion maps of test pictures that it gets right, and what deleting pixels in that order does."""
    looked = run.tested
    right = np.flatnonzero((looked.probabilities.argmax(1) == looked.labels).numpy())
    if not len(right):
        raise LeftOut("it gets no picture right")
    chosen = np.random.default_rng(run.seed).permutation(right)[:SHOWN]
    square, block, steps = run.size // 4, max(4, run.size // 16), 16
    figure = new_figure(2.1 * len(chosen), 4.4)
    panels = figure.subplots(2, len(chosen), squeeze=False)
    guided, random = [], []
    side = -(-run.size // block)
    with Progress("where it looks", len(chosen), "pictures") as progress:
        for column, index in enumerate(chosen):
            (inputs,), label = run.inputs(run.split, looked.rows[[index]]), int(looked.labels[index])
            fall, before = look.occlusion(run.net, inputs, label, square, max(1, square // 4))
            orders = [np.random.default_rng((run.seed, index, n)).permutation(side**2) for n in range(3)]
            curve = look.deletion(run.net, inputs, label, look.by_block(fall, block), block, steps)
            guided.append(curve)
            random.append(np.mean([look.deletion(run.net, inputs, label, o, block, steps) for o in orders], 0))
            (picture,) = run.pictures(run.split, looked.rows[[index]])
            panels[0, column].imshow(picture)
            panels[0, column].set_title(mathless(run.classes[label])[:18], fontsize=8)
            panels[1, column].imshow(fall, cmap="magma", vmin=0, vmax=max(1e-6, fall.max()))
            panels[1, column].set_title(f"p = {before:.2f}, falls by {fall.max():.2f}", fontsize=8)
            progress.update(1)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    maps = figure_of(run, "occlusion", figure, "Occlusion maps")
    figure = new_figure(5, 3.2)
    axes, share = figure.subplots(), np.arange(steps + 1) / steps * 100
    for curve, style, name in ((guided, "-", "by the map, most important first"), (random, "--", "at random")):
        axes.plot(share, np.mean(curve, 0), style, label=name)
    axes.set(xlabel="covered (% of the picture)", ylabel="probability of the class, mean", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    areas = [float(np.mean(curve)) for curve in (guided, random)]
    return (paragraph(f"A grey square of {square} x {square} pixels is moved over {len(chosen)} pictures that it gets "
                      "right. Bright: where covering costs most of the probability of the right class.") + maps +
            figure_of(run, "deletion", figure, "Deletion curves") +
            paragraph("Does the map mean something? Covered in its order, most important first, the probability is "
                      f"{areas[0]:.2f} on average over the curve, at random {areas[1]:.2f}. The lower, the more."))


# ---------------------------------------------------------------------------------------------- 7, 8: errors, signals


def errors(run: Run) -> str:
    """Errors by class, the confusion matrix, the most confident mistakes, a reliability diagram."""
    looked = run.tested
    sure, first = (v.numpy() for v in looked.probabilities.max(1))
    truth = looked.labels.numpy()
    right = first == truth
    five = looked.probabilities.topk(min(5, len(run.classes))).indices.tolist()
    rows = list(zip(truth.tolist(), five, sure.tolist(), strict=True))
    by_class = sorted(test.per_class(rows, run.classes), key=lambda entry: -entry["top1_error"])
    lines = [[escape(e["class"]), f"{e['images']:,}", f"{e['top1_error']:.1f}%",
              escape(f"{e['taken_for']} ({e['times']}x)") if "times" in e else ""] for e in by_class[:30]]
    more = "" if len(by_class) <= 30 else paragraph(f"The 30 of {len(by_class)} classes with the highest errors.")
    confusion = io.BytesIO()
    test.confusion_figure(rows, run.classes).savefig(confusion, format="png", dpi=80)
    mistakes = np.flatnonzero(~right)
    worst = mistakes[np.argsort(-sure[mistakes], kind="stable")][:2 * SHOWN]
    cards = []
    for index, picture in zip(worst, run.pictures(run.split, looked.rows[worst]) if len(worst) else [], strict=True):
        cards.append(f'<figure>{picture_of(run, f"mistake-{index}", fitted(picture, 96), run.classes[truth[index]])}'
                     f"<figcaption>{escape(run.classes[truth[index]])}, taken for {escape(run.classes[first[index]])} "
                     f"({100 * sure[index]:.0f}%)</figcaption></figure>")
    bins, error = look.calibration(sure, right)
    figure = new_figure(4.4, 3.8)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], ":", color="0.5", label="as sure as right")
    axes.plot([b[2] for b in bins], [b[3] for b in bins], "o-", label="this net")
    axes.set(xlabel="mean probability of the first class", ylabel="share right", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return (table(["class", "pictures", "top-1 error", "most often taken for"], lines) + more +
            keep_png(run, "confusion", confusion.getvalue(), "Confusion matrix") +
            "<h3>The most confident mistakes</h3>" + f'<div class="row">{"".join(cards) or paragraph("None.")}</div>' +
            "<h3>Is it as sure as it is right?</h3>" + figure_of(run, "reliability", figure, "Reliability diagram") +
            paragraph(f"Expected calibration error over 15 bins: {100 * error:.1f} points."))


def signals(run: Run) -> str:
    """Mean and spread of each layer's outputs, at the start and now."""
    rows = run.rows("train")[:BATCH]
    inputs = run.inputs("train", rows)
    now = look.signals(run.net, inputs)
    start, note = {}, ""
    if run.arguments.get("init"):
        note = " The run started from other weights (--init), which are not looked at here."
    else:
        settled = options.make_parser().parse_args([])
        vars(settled).update(run.arguments | {"resume": False, "out": None})
        net = train.starting_net(settled, run.store, train.Watch(run.device))
        start = look.signals(net.to(run.device).eval(), inputs)
    lines = []
    for name in LAYERS:
        cells = [name]
        for found in (start, now):
            cells += [f"{v:.3g}" for v in found[name][:3]] + [f"{found[name][3]:.1f}%"] if found else [""] * 4
        lines.append(cells)
    four = ["mean", "std", "due to the picture", "dead"]
    head = ["layer", *(f"{when}: {what}" for when in ("start", "now") for what in four)]
    return (paragraph(f"Outputs of each layer before its activation, over {len(rows)} training pictures. \"Due to the "
                      "picture\" is a unit's standard deviation over pictures, root mean square over units: how much "
                      "of it reaches fc6 at the start decides whether a net leaves its plateau. Dead: units that are 0 "
                      f"or below for all of these pictures.{note}") + table(head, lines))


def compared(run: Run, others: list[str]) -> str:
    """Settings that differ, results and validation errors of several runs."""
    runs = {}
    for path in map(Path, [run.path, *others]):
        log = read_log(path / "log.jsonl")
        if not log:
            raise UserError(f"--compare {path}: no run with a finished epoch")
        runs[path] = (read_config(path)["arguments"], log)
    every = {name for given, _ in runs.values() for name in given} - {"out", "workers", "device", "download"}
    differ = sorted(name for name in every if len({json.dumps(given.get(name)) for given, _ in runs.values()}) > 1)
    lines = [[escape(shown(path)), *(escape(str(given.get(name, ""))) for name in differ),
              f"{min(e['val_top1_error'] for e in log):.2f}%", str(len(log))] for path, (given, log) in runs.items()]
    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    for path, (_, log) in runs.items():
        axes.plot([e["epoch"] for e in log], [e["val_top1_error"] for e in log], "o-", ms=3, label=mathless(path.name))
    axes.set(xlabel="epoch", ylabel="validation top-1 error (%)", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return (table(["run", *differ, "lowest validation error", "epochs"], lines) +
            figure_of(run, "compared", figure, "Validation errors"))


SECTIONS = [
    ("What was run", what), ("Over epochs", curves), ("conv1's kernels", kernels),
    ("What excites the layers behind", patches), ("Pictures and their likeliest classes", guesses),
    ("Nearest neighbours", neighbours), ("Where it looks", where), ("Where it is wrong", errors),
    ("Signals", signals),
]


# ---------------------------------------------------------------------------------------------- the page

STYLE = """
:root { color-scheme: light dark; --line: #8884 }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
table { border-collapse: collapse; margin: .5rem 0; display: block; overflow-x: auto }
td, th { text-align: left; padding: .15rem .6rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
pre { overflow-x: auto; padding: .5rem; border: 1px solid var(--line) }
.row { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; max-width: 17rem; font-size: .85rem }
figure td { border: 0; padding: 0 .4rem 0 0 }
meter { width: 4rem }
.true { font-weight: bold }
@media print { section { break-inside: avoid } }
"""


def page(run: Run, content: str) -> str:
    title = escape(f"{run.path.resolve().name}: AlexNet, {run.size} x {run.size} pixels")
    return ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
            f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{content}\n</body>\n"
            "</html>\n")


def escape(text: str) -> str:
    return html.escape(printable(text))


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>\n"


def table(head: list[str] | None, rows: list[list[str]]) -> str:
    """Cells are HTML already, heads are not."""
    top = f"<tr>{''.join(f'<th>{escape(h)}</th>' for h in head)}</tr>\n" if head else ""
    below = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return f"<table>{top}{below}</table>\n"


def mathless(text: str) -> str:
    """For matplotlib, to which a dollar sign means more."""
    return text.replace("$", r"\$")


def image(data: bytes, kind: str, words: str) -> str:
    return f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" alt="{escape(words)}"/>\n'


def keep_png(run: Run, name: str, data: bytes, words: str) -> str:
    if run.keep:
        with utils.replacing(run.keep / f"{name}.png") as file:
            file.write(data)
    return image(data, "png", words)


def picture_of(run: Run, name: str, pixels: np.ndarray, words: str) -> str:
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(data, "PNG", optimize=True)
    return keep_png(run, name, data.getvalue(), words)


def figure_of(run: Run, name: str, figure, words: str) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=90)
    return keep_png(run, name, data.getvalue(), words)


def fitted(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture (h, w, 3) in a square of `side` pixels, on grey where it is not square."""
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = Image.Resampling.NEAREST if scale > 1.5 else Image.Resampling.LANCZOS
    square = Image.new("RGB", (side, side), (128, 128, 128))
    square.paste(Image.fromarray(np.ascontiguousarray(picture)).resize(size, how),
                 ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(square)


def grid(tiles: list[np.ndarray], across: int, scale: int = 1, gap: int = 2) -> np.ndarray:
    """Pictures of one size, `across` in a row, on white."""
    height, width = tiles[0].shape[0] * scale, tiles[0].shape[1] * scale
    down, across = -(-len(tiles) // across), min(across, len(tiles))
    out = np.full((down * (height + gap) - gap, across * (width + gap) - gap, 3), 255, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // across * (height + gap), number % across * (width + gap)
        out[top : top + height, left : left + width] = tile.repeat(scale, 0).repeat(scale, 1)
    return out


def make_parser() -> Parser:
    parser = Parser(prog="python -m studies.report", description="A page about a run.")
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", metavar="FILE.html", help="default: RUN/report.html")
    parser.add_argument("--pictures", metavar="FOLDER", help="write the figures there as PNG files, too")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="put these runs next to it")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N",
                        help="of the pictures that are drawn (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    return parser


if __name__ == "__main__":
    utils.huge_pages()
    run_script(main)
