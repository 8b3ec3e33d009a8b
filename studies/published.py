"""The published tables of errors on real pictures: trains, tests and notes what they are made of, and prints them.

    python -m studies.published                       everything that is not done yet, seed by seed
    python -m studies.published cifar10 no-lrn        these rows only
    python -m studies.published --tables              train nothing, print the tables of all rows

A finished net is a line in results/nets.jsonl, its log a file in results/nets/, and it is not trained again on that
kind of device and in that precision; one that was stopped goes on where it was. Each model of GPU is a kind, and all
processors together are one: their sums differ in rounding alone. Several of these commands can run at once; a net is
trained by one of them. The nets lie in checkpoints/published/. CIFAR-10 and Fashion-MNIST are downloaded where they are
not on disk; rows whose pictures are missing, or whose store was packed otherwise, are left out. Imagenette, Imagewoof
and Tiny ImageNet have to lie in data/downloads/ as train/CLASS/ and test/CLASS/, the latter being what their authors
call val/. A row of the tables shows the nets of one kind of device and one precision: those of which there are the
most; of several, those that were tested as one, too, or the earliest. The choice of the epoch follows the validation
pictures, and with all defaults the learning rate does, too; the test pictures are read when a net is finished, and not
before.
"""

import itertools
import json
import re
import shutil
import statistics
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

import checkpoints
import memory
import options
import test
import train
import utils
from checkpoints.run import LAST, PREVIOUS, Busy, append_line, environment, locked, read_config, read_log
from data import pack
from data.loader import machine_errors
from data.pack import named_store
from data.store import Store
from studies import variants
from studies.common import alone, verdict
from utils import Parser, UserError, pick_device, run_script, shown, write_text

ROOT = checkpoints.FOLDER.parent
RESULTS, LOGS = ROOT / "results" / "nets.jsonl", ROOT / "results" / "nets"
CIFAR10, THIRTY = ["--dataset", "cifar10"], ["--epochs", "30", "--drops", "20", "27"]
STORES, DOWNLOADS = ROOT / "data" / "stores", ROOT / "data" / "downloads"


class Row(NamedTuple):
    what: str  # in words
    options: list[str]  # of train.py, apart from seed and folder
    seeds: int
    pack: tuple[str, ...] = ()  # data.pack's arguments, where the store is none of a named set
    together: bool = False  # all seeds as one model, too
    variant: str = ""  # one of studies.variants' nets


class Machine(NamedTuple):
    """What nets are comparable on."""

    kind: str  # a GPU's name, or CPU
    precision: str


def packed(name: str, source: str, *more: str) -> tuple[list[str], tuple[str, ...]]:
    """train.py's options for a store, and data.pack's arguments that make it."""
    store = str(STORES / name)
    return ["--data", store], (source, *more, "--out", store)


DEFAULTS = "5% of train/ for validation, otherwise all defaults"
LARGE, PACK_LARGE = packed("cifar10-256", "cifar10", "--size", "256")
IMAGENETTE, PACK_IMAGENETTE = packed("imagenette", str(DOWNLOADS / "imagenette"), "--val", "0.05")
IMAGEWOOF, PACK_IMAGEWOOF = packed("imagewoof", str(DOWNLOADS / "imagewoof"), "--val", "0.05")
TINY, PACK_TINY = packed(
    "tiny-imagenet", str(DOWNLOADS / "tiny-imagenet"), "--val", "0.05", "--size", "72", "--codec", "raw"
)
ROWS = {
    "cifar10-default": Row("CIFAR-10, 64 px, all defaults", CIFAR10, 1),
    "cifar10": Row("CIFAR-10, 64 px, 30 epochs, learning rate divided by 10 after 20 and 27", [*CIFAR10, *THIRTY], 5,
                   together=True),
    "no-lrn": Row("these without LRN", [*CIFAR10, *THIRTY, "--no-lrn"], 5),
    "no-overlap": Row("these with 2 x 2 pooling", [*CIFAR10, *THIRTY, "--no-overlap"], 5),
    "no-dropout": Row("these without dropout", [*CIFAR10, *THIRTY, "--no-dropout"], 5),
    "no-masks": Row("these without dropout, the outputs of fc6 and fc7 halved instead", [*CIFAR10, *THIRTY], 3,
                    variant="no-masks"),
    "no-colour": Row("these without colour noise", [*CIFAR10, *THIRTY, "--colour", "off"], 5),
    "two-columns": Row("these with two columns", [*CIFAR10, *THIRTY, "--columns", "2"], 3),
    "half": Row("these with half of the kernels in conv1 to conv4", [*CIFAR10, *THIRTY], 3, variant="half"),
    "2012": Row("these with two columns in the order of the 2012 code",
                [*CIFAR10, *THIRTY, "--columns", "2", "--order", "2012"], 3),
    "eigenvalues": Row("these with colour noise by eigenvalues", [*CIFAR10, *THIRTY, "--colour", "paper"], 3),
    "fashion-mnist": Row("Fashion-MNIST, 64 px, 30 epochs, learning rate divided by 10 after 20 and 27",
                         ["--dataset", "fashion-mnist", *THIRTY], 5, together=True),
    "imagenette": Row(f"Imagenette, 224 px, {DEFAULTS}", IMAGENETTE, 3, PACK_IMAGENETTE),
    "imagenette-two-columns": Row("Imagenette, 224 px, the same with two columns", [*IMAGENETTE, "--columns", "2"], 1,
                                  PACK_IMAGENETTE),
    "tiny-imagenet": Row(f"Tiny ImageNet, 64 px, {DEFAULTS}", TINY, 3, PACK_TINY),
    "imagewoof": Row(f"Imagewoof, 224 px, {DEFAULTS}", IMAGEWOOF, 1, PACK_IMAGEWOOF),
    "cifar10-256": Row("CIFAR-10 enlarged to 256, crops of 224, 30 epochs", [*LARGE, *THIRTY], 1, PACK_LARGE),
}
CENTER, TEN_CROP = "center_error", "ten-crop_error"
CPU = "CPU"


class Idea(NamedTuple):
    before: str  # the row without it
    after: str  # the row with it
    paper: str  # what it takes off the top-1 error on ImageNet
    tested_with: str = CENTER  # how the row with it is tested


IDEAS = {
    "LRN": Idea("no-lrn", "cifar10", "1.4 points (section 3.3)"),
    "overlapping pooling": Idea("no-overlap", "cifar10", "0.4 points (section 3.4)"),
    "dropout": Idea("no-dropout", "cifar10", "no figure: 'substantial overfitting' without (section 4.2)"),
    "dropout's masks, apart from its halving": Idea("no-masks", "cifar10", "no figure"),
    "colour noise": Idea("no-colour", "cifar10", "over 1 point (section 4.1)"),
    "ten crops": Idea("cifar10", "cifar10", "1.5 points (table 1 and its footnote, ILSVRC-2010)", TEN_CROP),
    "two columns, against half of the kernels in one": Idea("half", "two-columns", "1.7 points (section 3.2)"),
    "two columns, against all kernels in one": Idea("cifar10", "two-columns", "no figure"),
    "the 2012 order": Idea("two-columns", "2012", "no figure: the paper's text against its authors' code"),
    "colour noise by standard deviations": Idea("eigenvalues", "cifar10",
                                                "no figure: the paper's text against the code"),
}


@machine_errors("stop what else runs on this device")
def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    unknown = [name for name in args.rows if name not in ROWS]
    if unknown:
        raise UserError(f"there is no row {unknown[0]}; the rows are {', '.join(ROWS)}")
    if args.rows and args.tables:
        raise UserError("--tables prints all rows and takes no names")
    rows = {name: ROWS[name] for name in args.rows or ROWS}
    if not args.tables:
        utils.no_tf32()
        device = pick_device(args.device)
        precision = options.settled_precision(args.precision, device)
        for seed in range(max(row.seeds for row in rows.values())):
            for name, row in rows.items():
                if seed >= row.seeds:
                    continue
                try:
                    if status := make_net(name, row, seed, device, precision):
                        return status  # a signal stopped the training; the next start goes on there
                except Busy:
                    print(f"{name}, seed {seed}: left to the process that trains it", flush=True)
        for name, row in rows.items():
            if row.together:
                test_together(name, row, device, precision)
    print(tables())
    return 0


# ---------------------------------------------------------------------------------------------- nets


def finished(name: str) -> dict[Machine, dict[int, dict]]:
    """The finished nets of a row, by machine and seed."""
    found = defaultdict(dict)
    for e in read_log(RESULTS):
        if e.get("row") == name and "seed" in e:
            found[Machine(e["kind"], e["precision"])][e["seed"]] = e
    return found


def machine_of(device: torch.device, precision: str) -> Machine:
    return Machine(torch.cuda.get_device_name(device) if device.type == "cuda" else CPU, precision)


def folder(name: str, seed: int, machine: Machine) -> Path:
    """Where a net of this kind of device lies; its log has the same name."""
    words = re.sub(r"[^a-z0-9]+", "-", f"{machine.kind} {machine.precision}".lower())
    return checkpoints.FOLDER / "published" / f"{name}-{seed}-{words}"


def make_net(name: str, row: Row, seed: int, device: torch.device, precision: str) -> int:
    """Train, test and note one net, unless it is done. Returns train.py's exit status, 0 where it finished or diverged.
    Raises Busy where another process is at it."""
    machine = machine_of(device, precision)
    place = folder(name, seed, machine)
    place.mkdir(parents=True, exist_ok=True)
    with locked(place):
        if seed in finished(name)[machine]:
            return 0
        try:
            with alone(checkpoints.FOLDER / "published"):  # the first one packs the store
                store = open_store(row)
        except UserError as error:
            print(f"{name} is left out: {error}")
            return 0
        out = place / "run"
        status, diverged = train_net(row, seed, device, precision, out)
        if status:
            return status
        log = read_log(out / "log.jsonl")
        if not log and not diverged:
            raise UserError(f"{out / 'log.jsonl'} has lost its lines; to train this net anew, remove {place}")
        LOGS.mkdir(parents=True, exist_ok=True)
        copy = LOGS / f"{place.name}.jsonl"
        write_text(copy, "".join(json.dumps(e) + "\n" for e in log))
        entry = about(name, row, seed, out) | {"kind": machine.kind, "pictures": store.counts, "log": copy.name}
        if diverged:
            append_line(RESULTS, entry | {"diverged": diverged})
            return 0
        tested = {key: test_error(row, [out], device, ten_crop=key == TEN_CROP) for key in (CENTER, TEN_CROP)}
        append_line(RESULTS, entry | {
            "epochs": len(log), "train_top1_error": log[-1]["train_top1_error"],
            "val_top1_error": min(e["val_top1_error"] for e in log), **tested,
            "seconds": sum(e["seconds"] for e in log),
        })
        for name in (LAST, PREVIOUS):  # best.pt stays, for nets together
            (out / name).unlink(missing_ok=True)
    return 0


def train_net(row: Row, seed: int, device: torch.device, precision: str, out: Path) -> tuple[int, str | None]:
    """train.py's exit status, and what it said if the net diverged. A net that is finished, but has no line in RESULTS
    any more, is not trained again; where that is wanted, remove its folder."""
    started = any((out / name).exists() for name in (LAST, PREVIOUS))
    if not started and (out / "best.pt").exists():  # it loses the other two when its line is written
        return 0, None
    if not started:  # killed at its very start
        shutil.rmtree(out, ignore_errors=True)
    anew = ["--seed", str(seed), "--precision", precision, "--device", device.type, "--out", str(out)]
    try:
        argv = ["--resume", "--out", str(out)] if started else [*row.options, *anew]
        return variants.main(row.variant, argv) if row.variant else train.main(argv), None
    except utils.Diverged as error:
        return 0, str(error)


def about(name: str, row: Row, seed: int, out: Path) -> dict:
    """What a line says of how its net was made; the commit is that of the run's start."""
    config = read_config(out)
    made = {key: config[key] for key in ("commit", "device", "threads", "torch", "python", "processes")}
    precision = config["arguments"]["precision"]
    command = " ".join(["python train.py", *row.options, "--seed", str(seed), "--precision", precision])
    if row.variant:  # no option of train.py's
        command = f"python -m studies.published {name} --precision {precision}"
    if row.pack:
        command = f"{' '.join(['python -m data.pack', *row.pack])} && {command}"
    return {"row": name, "seed": seed, "command": command.replace(f"{ROOT}/", ""), "precision": precision, **made}


def open_store(row: Row) -> Store:
    """The row's store, packed first where there is none. Raises UserError where its test pictures are missing, or where
    one that was there already was packed otherwise."""
    where = row.options[1]
    if row.options[0] == "--dataset":
        store = named_store(where)
        check_packing(store, size=72)
        return store
    if not Path(where).exists():
        pack.main(list(row.pack))
    store = Store(where)
    if not store.counts.get("test") or "test" in store.unlabelled:
        raise UserError(f"{where} has no test pictures with labels; remove it, put the pictures into train/CLASS/ and "
                        "test/CLASS/, and start again")
    if row.pack:
        asked = pack.make_parser().parse_args(row.pack)
        check_packing(store, asked.size or 256, asked.codec, asked.val)
    return store


def check_packing(store: Store, size: int, codec: str | None = None, val: float | None = None) -> None:
    """Raise UserError where a store that was there already has pictures of another size, other records, or another
    share for validation; any will do where none is given."""
    share = store.counts["val"] / (store.counts["val"] + store.counts["train"])
    for what, found, wanted in (
        ("pixels a side", store.size, size), ("records", store.codec, codec or store.codec),
        ("of its training pictures for validation", f"{share:.0%}", f"{val or share:.0%}"),
    ):
        if found != wanted:
            raise UserError(f"{shown(store.path)} has {found} {what}, and this row takes {wanted}; rename or remove it")


def test_error(row: Row, runs: list[Path], device: torch.device, ten_crop: bool) -> float:
    """Top-1 error in percent on the test pictures, of several nets as one model where there are several."""
    paths, how = [run / "best.pt" for run in runs], {"ten_crop": ten_crop, "device": device}
    store = open_store(row)
    found = variants.errors(paths[0], store, **how) if row.variant else test.errors(paths, store, **how)
    return found["top1_error"]


def test_together(name: str, row: Row, device: torch.device, precision: str) -> None:
    """All nets of a row as one model, ten crops; nothing while one is missing."""
    machine = machine_of(device, precision)
    places = [folder(name, seed, machine) for seed in range(row.seeds)]
    with suppress(Busy), locked(places[0]):
        if together(name, machine) is not None or len(sound(finished(name)[machine])) < row.seeds:
            return
        runs = [place / "run" for place in places]
        if not all((run / "best.pt").exists() for run in runs):
            print(f"{name}: its nets are no longer in {places[0].parent}; they can't be tested as one")
            return
        entry = {"row": name, "together": row.seeds, "kind": machine.kind, "precision": precision}
        append_line(RESULTS, entry | {TEN_CROP: test_error(row, runs, device, ten_crop=True)} | environment(device))


def together(name: str, machine: Machine) -> float | None:
    """The error of a row's nets as one model."""
    found = [e for e in read_log(RESULTS) if e.get("row") == name and "together" in e]
    errors = [e[TEN_CROP] for e in found if Machine(e["kind"], e["precision"]) == machine]
    return errors[-1] if errors else None


# ---------------------------------------------------------------------------------------------- tables


def tables() -> str:
    """Two Markdown tables: the rows' errors on their test pictures; what each idea is worth."""
    return "\n".join([*error_table(), "", *idea_table()])


def sound(nets: dict[int, dict]) -> list[dict]:
    """By seed, the nets that did not diverge."""
    return [nets[seed] for seed in sorted(nets) if "diverged" not in nets[seed]]


def best_covered(name: str) -> tuple[Machine | None, list[dict]]:
    """The machine with the most sound nets of a row, and these nets; of several, one whose nets were tested as one,
    too, or the first."""
    found = [(machine, sound(nets)) for machine, nets in finished(name).items()]
    return max(found, key=lambda entry: (len(entry[1]), together(name, entry[0]) is not None), default=(None, []))


def diverged_said(name: str, machine: Machine | None, where: str = "") -> str:
    """How many nets of a row diverged, for a cell; empty where none did."""
    nets = finished(name)[machine]
    count = len(nets) - len(sound(nets))
    return f", {count} diverged{where}" if count else ""


def error_table() -> list[str]:
    lines = ["| what | centre crop | ten crops | all as one, ten crops | training error | nets | made on |",
             "|---|---|---|---|---|---|---|"]
    for name, row in ROWS.items():
        machine, nets = best_covered(name)
        if not nets:
            lines.append(f"| {row.what} | not measured yet | | | | 0 of {row.seeds}{diverged_said(name, machine)} | |")
            continue
        one = together(name, machine)
        lines.append(
            f"| {row.what} | {spread_of(nets, CENTER)} | {spread_of(nets, TEN_CROP)} | "
            f"{'' if one is None else f'{one:.2f}'} | {spread_of(nets, 'train_top1_error')} | "
            f"{len(nets)} of {row.seeds}{diverged_said(name, machine)} | {made_on(nets)} |"
        )
    gone = [f"{name} with seed {seed} on {e['device']}" for name in ROWS
            for nets in finished(name).values() for seed, e in nets.items() if "diverged" in e]
    return [*lines, *(["", f"diverged: {', '.join(gone)}"] if gone else [])]


def idea_table() -> list[str]:
    lines = ["| idea | paper, on ImageNet | without | with | points off, by seed | in all | made on |",
             "|---|---|---|---|---|---|---|"]
    for name, idea in IDEAS.items():
        paired = [(machine, pairs_on(machine, idea)) for machine in finished(idea.before)]
        machine, pairs = max(paired, key=lambda entry: len(entry[1]), default=(None, []))
        said = diverged_said(idea.before, machine, " without")
        if idea.after != idea.before:
            said += diverged_said(idea.after, machine, " with")
        if not pairs:
            lines.append(f"| {name} | {idea.paper} | not measured yet{said} | | | | |")
            continue
        errors = [(without[CENTER], with_it[idea.tested_with]) for without, with_it in pairs]
        gains = [without - with_it for without, with_it in errors]
        means = " | ".join(mean_and_spread(column) for column in zip(*errors, strict=True))
        by_seed = ", ".join(f"{gain:+.2f}" for gain in gains) + said
        lines.append(f"| {name} | {idea.paper} | {means} | {by_seed} | {verdict(gains)} | "
                     f"{made_on(itertools.chain(*pairs))} |")
    return lines


def pairs_on(machine: Machine, idea: Idea) -> list[tuple[dict, dict]]:
    """Nets without and with an idea, with the same seed, that were made on one kind of machine."""
    without, with_it = ({e["seed"]: e for e in sound(finished(row)[machine])} for row in (idea.before, idea.after))
    return [(without[s], with_it[s]) for s in without if s in with_it]


def made_on(nets) -> str:
    """The devices of nets of one precision, for a cell."""
    nets = list(nets)
    return f"{' and '.join(sorted({e['device'] for e in nets}))}, {nets[0]['precision']}"


def spread_of(nets: list[dict], key: str) -> str:
    return mean_and_spread([e[key] for e in nets])


def mean_and_spread(errors: list[float]) -> str:
    """The mean of percentages, and their standard deviation where there are several."""
    return f"{statistics.mean(errors):.2f}" + (f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else "")


def make_parser() -> Parser:
    parser = Parser(prog="python -m studies.published", description="The published tables of errors on real pictures.")
    parser.add_argument("rows", nargs="*", metavar="ROW",
                        help=f"what to train, of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                        help="as in train.py; the tables say it (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    parser.add_argument("--tables", action="store_true", help="train nothing, print the tables")
    return parser


if __name__ == "__main__":
    memory.keep()
    run_script(main)
