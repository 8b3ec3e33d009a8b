"""A page about a run: what it did, what its net sees, where it is wrong.

    python -m studies.report checkpoints/photos-1                    to checkpoints/photos-1/report.html
    python -m studies.report checkpoints/photos-1 --out page.html --pictures figures
    python -m studies.report checkpoints/a --compare checkpoints/b checkpoints/c

RUN is a run's folder, of a run that is still going on, too: its best.pt is looked at. The page is one file with the
pictures inside; it needs no network. Test pictures are those of test.py, at most 10,000 of them; neighbours and patches
are sought among at most 10,000 training pictures; where there are more, --seed draws them. What a run can't fill
is left out, and the page says why: of a run of studies.frelu there are its settings and its curves.
"""

import json
import math
import shlex
from pathlib import Path

import numpy as np

import memory
import options
import test
import utils
from checkpoints import describe_net
from data.loader import machine_errors
from model import ACTIVATIONS, activation, activation_parameters
from studies import look, page, seen
from studies.common import add_key, colours, new_figure, plain
from studies.folder import LeftOut, Run
from utils import Parser, Progress, UserError, duration, pick_device, run_script, shown, whole, write_text

MANY = 30  # classes in the table of errors at most
MISTAKES = 12
TOLD = {"data", "dataset", "image_size", "precision"}  # elsewhere than among the settings


@machine_errors("stop what else runs on this device")
def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    utils.no_tf32()
    run = Run(Path(args.run), pick_device(args.device), args.seed)
    out = Path(args.out) if args.out else run.path / "report.html"
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise UserError(f"--out {out}: " + ("that is a folder" if out.is_dir() else "there is no such folder"))
    if args.pictures:
        Path(args.pictures).mkdir(parents=True, exist_ok=True)
    sections, content = list(SECTIONS), ""
    if args.compare:
        others = [run, *(Run(Path(name)) for name in args.compare)]
        if empty := [other.path for other in others if not other.log]:
            raise UserError(f"--compare: {empty[0]} has no finished epoch in log.jsonl")
        sections.append(("Next to other runs", lambda _: compared(others)))
    with Progress("sections", len(sections), "sections") as progress:
        for title, make in sections:
            try:
                found = make(run)
            except LeftOut as reason:
                found = page.paragraph(f"Left out: {reason}")
            content += page.section(title, found)
            progress.update(1, title)
    write_text(out, page.document(title_of(run), content))
    print(f"{shown(out)}: {out.stat().st_size / 1e6:.1f} MB")
    for name, data in page.images(content).items() if args.pictures else ():
        with utils.replacing(Path(args.pictures) / name) as file:
            file.write(data)
    return 0


def title_of(run: Run) -> str:
    name = run.path.resolve().name
    try:
        kind = "torchvision's alexnet" if run.checkpoint["config"].get("net") == "torchvision" else "AlexNet"
        return f"{name}: {kind}, {run.size} x {run.size} pixels"
    except LeftOut:
        return f"{name}: {run.arguments['network']}" if "network" in run.arguments else name


# ---------------------------------------------------------------------------------------------- the run


def what(run: Run) -> str:
    """Data, settings, machine, epochs."""
    config, given, lines = run.config, run.arguments, []
    if run.standard:
        changed = [options.worded(name, value) for name, value in run.settings.items()
                   if value not in (None, run.standard.get(name, value)) and name not in TOLD]
        lines.append(["data", str(given.get("dataset") or config.get("store"))])
        lines.append(["settings that are not train.py's defaults", ", ".join(changed) or "none"])
    elif given:
        lines.append(["settings", ", ".join(f"{name} {value}" for name, value in run.settings.items())])
    lines.append(["epochs", str(len(run.log))])
    lines.append(["time", duration(sum(entry.get("seconds", 0) for entry in run.log))])
    if given:
        count = config.get("processes", 1)
        lines.append(["machine", f"{config.get('device')}, {count} process{'es' * (count != 1)} of "
                      f"{config.get('threads')} threads, {given.get('precision', 'fp32')}"])
        lines.append(["versions", f"torch {config.get('torch')}, commit {config.get('commit') or 'unknown'}"])
    unknown = "" if given else page.paragraph("Settings and machine are not known: config.json is missing or damaged.")
    return page.table(None, lines) + unknown


def result(run: Run) -> str:
    """The net and its errors on the test pictures."""
    looked, counts, best = run.tested, run.store.counts, run.checkpoint["best"]
    parts = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    lines = [
        ["net", f"{describe_net(run.net)}, {run.size} x {run.size} pixels, "
         f"{sum(p.numel() for p in run.net.parameters()):,} parameters"],
        ["pictures", f"{run.store.name}: {parts}; {len(run.classes):,} classes, {run.store.size} x {run.store.size} "
         "pixels"],
        ["best.pt", f"of epoch {run.checkpoint['epoch']}, lowest validation top-1 error {best:.2f}%"
         if math.isfinite(best) else "of a run that was stopped in its first epoch"],
    ]
    hits = looked.probabilities.topk(min(5, len(run.classes))).indices == looked.labels[:, None]
    count, said = len(looked.labels), []
    for name, right in (("top-1", hits[:, 0]), ("top-5", hits.any(1))):
        wrong = count - int(right.sum())
        low, high = test.wilson_interval(wrong, count)
        said.append(f"{name} error {100 * wrong / count:.2f}% (95% interval {low:.2f} to {high:.2f}%)")
    drawn = "" if count == counts[run.split] else f" of {counts[run.split]:,}, drawn by --seed {run.seed}"
    return (page.table(None, lines) +
            page.paragraph(f"On {count:,} pictures{drawn} of the {run.split} split, centre crop: {', '.join(said)}.") +
            f"<pre>{page.escape(f'python test.py {shlex.quote(shown(run.path))}/best.pt')}</pre>\n")


# ---------------------------------------------------------------------------------------------- over epochs


def curves(run: Run) -> str:
    """Loss, error, learning rate, and what activations have learnt, over epochs."""
    if not run.log:
        raise LeftOut("there is no finished epoch in log.jsonl")
    pairs = zip(run.log, run.log[1:], strict=False)
    drops = [after["epoch"] - 0.5 for before, after in pairs if after.get("lr", 0) < before.get("lr", 0)]
    drawings = []
    for what, name in (("loss", "loss"), ("top-1 error (%)", "top1_error"), ("learning rate", "lr")):
        figure = new_figure(3.4, 3)
        axes = axes_over_epochs(figure, what)
        if name == "lr":
            axes.plot(*series(run, "lr"), "o-", ms=3, drawstyle="steps-mid")
            axes.set_yscale("log")
        else:
            axes.plot(*series(run, f"train_{name}"), "o--", ms=3, label="training (dropout, crops)")
            axes.plot(*series(run, f"val_{name}"), "s-", ms=3, label="validation")
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
            axes.legend(fontsize=7)
        for drop in drops:
            axes.axvline(drop, color="0.6", ls=":")
        drawings.append(page.drawing(figure, f"curves-{name.replace('_', '-')}", f"{what} over epochs"))
    note = page.paragraph("Dotted: the learning rate fell." if drops else "The learning rate did not fall.")
    return page.row(drawings) + note + learnt(run)


def learnt(run: Run) -> str:
    """What each activation has learnt, from where it started, but for runs that took over weights."""
    values = {name: [entry["activations"][name] for entry in run.log] for name in run.log[-1].get("activations", {})}
    if not values:
        return ""
    kind = str(run.arguments.get("activation", ""))
    known = kind in ACTIVATIONS and not run.arguments.get("init")
    start = [value.item() for value in activation_parameters(activation(kind)).values()] if known else []
    epochs, count = [0] * len(start) + [entry["epoch"] for entry in run.log], len(values)
    figure = new_figure(7.5, 3.6)
    axes = axes_over_epochs(figure, "slope below 0" if kind == "prelu" else "b (should settle below 0)")
    for (name, found), colour in zip(values.items(), colours(count), strict=True):
        axes.plot(epochs, start + found, ".-", lw=1.2, color=colour, label=plain(name))
    if kind != "prelu":
        axes.axhline(0, color="0.4", ls=":", lw=1)
    add_key(figure, axes, count, "activation, from the first to the last")
    last = {name: found[-1] for name, found in values.items()}
    low, high = min(last, key=last.get), max(last, key=last.get)
    said = f"In the last epoch from {last[low]:+.4f} ({low}) to {last[high]:+.4f} ({high})."
    title = "What each activation learnt"
    return page.heading(title) + page.drawing(figure, "activations", title) + page.paragraph(said)


def compared(runs: list[Run]) -> str:
    """Settings that differ, results, and the errors of several runs."""
    runs, lines = {run.path.resolve(): run for run in runs}, []
    given = [run.settings for run in runs.values() if run.settings]
    shared = set.intersection(*map(set, given)) if given else set()
    differ = sorted(name for name in shared if len({json.dumps(settings[name]) for settings in given}) > 1)
    figure = new_figure(7.5, max(3.6, 0.2 * len(runs)))
    axes = axes_over_epochs(figure, "top-1 error (%)")
    for (path, run), colour in zip(runs.items(), colours(len(runs)), strict=True):
        name, lowest = name_among(path, runs), min(entry.get("val_top1_error", np.inf) for entry in run.log)
        settings = [str(run.settings.get(setting, "")) for setting in differ]
        lines.append([name, *settings, f"{lowest:.2f}%", str(len(run.log))])
        axes.plot(*series(run, "train_top1_error"), ".--", lw=1, ms=3, color=colour)
        axes.plot(*series(run, "val_top1_error"), "o-", lw=1.5, ms=3, color=colour, label=plain(name))
    axes.set_ylim(0)
    add_key(figure, axes, len(runs), "run, in the order of the table")
    return (page.table(["run", *differ, "lowest validation error", "epochs done"], lines) +
            page.drawing(figure, "compared", "Errors over epochs") +
            page.paragraph("Solid: validation; dashed: training, with dropout and random crops."))


def axes_over_epochs(figure, what: str):
    axes = figure.subplots()
    axes.set(xlabel="epoch", ylabel=what)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    return axes


def series(run: Run, name: str) -> tuple[list, list]:
    """The epochs and a number of each, NaN where the log has none."""
    return [entry["epoch"] for entry in run.log], [entry.get(name, float("nan")) for entry in run.log]


def name_among(path: Path, others) -> str:
    """A folder's name, with as many of its parents' as tell it apart from others."""
    number, rest = 1, [other for other in others if other != path]
    while number < len(path.parts) and any(other.parts[-number:] == path.parts[-number:] for other in rest):
        number += 1
    return "/".join(path.parts[-number:])


# ---------------------------------------------------------------------------------------------- where it is wrong


def errors(run: Run) -> str:
    """Errors by class, the confusion matrix, the most confident mistakes, a reliability diagram."""
    looked = run.tested
    sure, first = (values.numpy() for values in looked.probabilities.max(1))
    truth = looked.labels.numpy()
    rows = list(zip(truth.tolist(), first[:, None].tolist(), sure.tolist(), strict=True))
    by_class = [entry for entry in test.per_class(rows, run.classes) if entry["images"]]
    by_class.sort(key=lambda entry: -entry["top1_error"])
    lines = [[entry["class"], f"{entry['images']:,}", f"{entry['top1_error']:.1f}%",
              f"{entry['taken_for']} ({entry['times']}x)" if "times" in entry else ""] for entry in by_class[:MANY]]
    told = f"The {MANY} of {len(by_class):,} classes with the highest errors." if len(by_class) > MANY else ""
    if len(by_class) < len(run.classes):
        told += f" Classes without pictures here: {len(run.classes) - len(by_class):,}."
    mistakes = np.flatnonzero(first != truth)
    worst = []
    for index in mistakes[np.argsort(-sure[mistakes], kind="stable")][:MISTAKES]:
        (pixels,) = run.pictures(run.split, looked.rows[[index]])
        name, taken_for = run.classes[truth[index]], run.classes[first[index]]
        drawn = page.picture(page.fitted(pixels, 96), f"mistake-{index}", name)
        worst.append(page.card(drawn, f"{name}, taken for {taken_for} ({100 * sure[index]:.0f}%)"))
    return (page.table(["class", "pictures", "top-1 error", "most often taken for"], lines) +
            (page.paragraph(told.strip()) if told else "") +
            page.wide(page.drawing(test.confusion_figure(rows, run.classes), "confusion", "Confusion matrix")) +
            page.heading("The most confident mistakes") + (page.cards(worst) if worst else page.paragraph("None.")) +
            page.heading("Is it as sure as it is right?") + reliability(sure, first == truth))


def reliability(sure: np.ndarray, right: np.ndarray) -> str:
    bins, error = look.calibration(sure, right)
    figure = new_figure(4.4, 3.8)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], ":", color="0.5", label="as sure as right")
    axes.plot([b[2] for b in bins], [b[3] for b in bins], "o-", label="this net")
    axes.set(xlabel="mean probability of the first class", ylabel="share right", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return page.drawing(figure, "reliability", "Reliability diagram") + page.paragraph(
        f"Expected calibration error over 15 bins: {100 * error:.1f} points.")


SECTIONS = [
    ("What was run", what), ("What came of it", result), ("Over epochs", curves), ("conv1's kernels", seen.kernels),
    ("What excites the layers behind", seen.patches), ("Pictures and their likeliest classes", seen.guesses),
    ("Nearest neighbours", seen.neighbours), ("Where it looks", seen.where), ("Where it is wrong", errors),
    ("Signals", seen.signals),
]


def make_parser() -> Parser:
    parser = Parser(prog="python -m studies.report", description="A page about a run.")
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", metavar="FILE.html", help="default: RUN/report.html")
    parser.add_argument("--pictures", metavar="FOLDER", help="write the page's pictures there as files, too")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="put these runs next to it")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N",
                        help="of the pictures that are drawn (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    return parser


if __name__ == "__main__":
    memory.keep()
    run_script(main)
