"""The published tables of errors on real pictures: trains, tests and notes what they are made of, and prints them.

    python -m studies.published                       everything that is not done yet, seed by seed
    python -m studies.published cifar10 no-lrn        these rows only
    python -m studies.published --tables              train nothing, print the tables of all rows

A finished net is a line in results/nets.jsonl, its log a file in results/nets/, and it is not trained again; one that
was stopped goes on where it was. Several of these commands can run at once; a net is trained by one of them. The nets
lie in checkpoints/published/. Rows whose pictures are not on disk, in data/downloads/, are left out. The choice of the
epoch follows the validation pictures, and with all defaults the learning rate does, too; the test pictures are read
when a net is finished, and not before.
"""

import fcntl
import json
import os
import shutil
import statistics
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import checkpoints
import test
import train
import utils
from checkpoints.run import Busy, append_line, environment, locked, read_config, read_log
from data import pack
from data.pack import named_store
from data.store import Store
from studies.common import verdict
from utils import Parser, UserError, pick_device, run_script, write_text

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



def packed(name: str, source: str, *more: str) -> tuple[list[str], tuple[str, ...]]:
    """train.py's options for a store, and data.pack's arguments that make it."""
    store = str(STORES / name)
    return ["--data", store], (source, *more, "--out", store)


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
    "no-colour": Row("these without colour noise", [*CIFAR10, *THIRTY, "--colour", "off"], 5),
    "two-columns": Row("these with two columns", [*CIFAR10, *THIRTY, "--columns", "2"], 3),
    "2012": Row("these with two columns in the order of the 2012 code",
                [*CIFAR10, *THIRTY, "--columns", "2", "--order", "2012"], 3),
    "eigenvalues": Row("these with colour noise by eigenvalues", [*CIFAR10, *THIRTY, "--colour", "paper"], 3),
    "fashion-mnist": Row("Fashion-MNIST, 64 px, 30 epochs, learning rate divided by 10 after 20 and 27",
                         ["--dataset", "fashion-mnist", *THIRTY], 5, together=True),
    "imagenette": Row("Imagenette, 224 px, all defaults", IMAGENETTE, 3, PACK_IMAGENETTE),
    "imagenette-two-columns": Row("Imagenette, 224 px, two columns", [*IMAGENETTE, "--columns", "2"], 1,
                                  PACK_IMAGENETTE),
    "tiny-imagenet": Row("Tiny ImageNet, 64 px, all defaults", TINY, 3, PACK_TINY),
    "imagewoof": Row("Imagewoof, 224 px, all defaults", IMAGEWOOF, 1, PACK_IMAGEWOOF),
    "cifar10-256": Row("CIFAR-10 enlarged to 256, crops of 224, 30 epochs", [*LARGE, *THIRTY], 1, PACK_LARGE),
}
# An idea: the row without it, the row with it, and what the paper says it takes off the top-1 error on ImageNet.
IDEAS = {
    "LRN": ("no-lrn", "cifar10", "1.4 points (section 3.3)"),
    "overlapping pooling": ("no-overlap", "cifar10", "0.4 points (section 3.4)"),
    "dropout": ("no-dropout", "cifar10", "no figure: 'substantial overfitting' without (section 4.2)"),
    "colour noise": ("no-colour", "cifar10", "over 1 point (section 4.1)"),
    "two columns": ("cifar10", "two-columns", "another comparison: 1.7 points against half the kernels (section 3.2)"),
    "the 2012 order": ("two-columns", "2012", "no figure: the paper's text against its authors' code"),
    "colour noise by standard deviations": ("eigenvalues", "cifar10", "no figure: the paper's text against the code"),
}


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    unknown = [name for name in args.rows if name not in ROWS]
    if unknown:
        raise UserError(f"there is no row {unknown[0]}; the rows are {', '.join(ROWS)}")
    if args.rows and args.tables:
        raise UserError("--tables prints all rows and takes no names")
    rows = {name: ROWS[name] for name in args.rows or ROWS}
    if not args.tables:
        for seed in range(max(row.seeds for row in rows.values())):
            for name, row in rows.items():
                if seed < row.seeds and (status := make_net(name, row, seed, args.precision)):
                    return status  # a signal stopped the training; the next start goes on there
        for name, row in rows.items():
            if row.together:
                test_together(name, row)
    print(tables())
    return 0


# ---------------------------------------------------------------------------------------------- nets


def done(name: str, **wanted) -> list[dict]:
    """The finished nets of a row, by seed, with these values."""
    found = {e["seed"]: e for e in read_log(RESULTS) if e.get("row") == name and "seed" in e}
    return [found[s] for s in sorted(found) if all(found[s].get(k) == v for k, v in wanted.items())]


def sound(name: str) -> list[dict]:
    """The finished nets of a row that did not diverge."""
    return [e for e in done(name) if "diverged" not in e]


def folder(name: str, seed: int) -> Path:
    return checkpoints.FOLDER / "published" / f"{name}-{seed}"


def make_net(name: str, row: Row, seed: int, precision: str) -> int:
    """Train, test and note one net, unless it is done or another process is at it. Returns train.py's exit status, 0
    where it finished or diverged."""
    place = folder(name, seed)
    place.mkdir(parents=True, exist_ok=True)
    with suppress(Busy), locked(place):
        if done(name, seed=seed):
            return 0
        try:
            with alone():
                open_store(row)
        except UserError as error:
            print(f"{name} is left out: {error}")
            return 0
        out = place / "run"
        started, diverged = (out / "last.pt").exists(), None
        if not started:  # killed at its very start, or its line in RESULTS has been taken away
            shutil.rmtree(out, ignore_errors=True)
        anew = [*row.options, "--seed", str(seed), "--precision", precision, "--out", str(out)]
        try:
            status = train.main(["--resume", "--out", str(out)] if started else anew)
        except utils.Diverged as error:
            status, diverged = 0, str(error)
        if status:
            return status
        log = read_log(out / "log.jsonl")
        LOGS.mkdir(parents=True, exist_ok=True)
        write_text(LOGS / f"{name}-{seed}.jsonl", "".join(json.dumps(e) + "\n" for e in log))
        if diverged:
            append_line(RESULTS, about(name, row, seed, out) | {"diverged": diverged})
            return 0
        tested = {f"{protocol}_error": test_error(row, [out], protocol) for protocol in ("center", "ten-crop")}
        append_line(RESULTS, about(name, row, seed, out) | {
            "epochs": len(log), "train_top1_error": log[-1]["train_top1_error"],
            "val_top1_error": min(e["val_top1_error"] for e in log), **tested,
            "seconds": sum(e["seconds"] for e in log),
        })
        (out / "last.pt").unlink()  # best.pt stays, for nets together
    return 0


def about(name: str, row: Row, seed: int, out: Path) -> dict:
    """What a line says of how its net was made; the commit is that of the run's start."""
    config = read_config(out)
    made = {key: config[key] for key in ("commit", "device", "threads", "torch", "python", "processes")}
    command = " ".join(["python train.py", *row.options, "--seed", str(seed)]).replace(f"{ROOT}/", "")
    return {"row": name, "seed": seed, "command": command, "precision": config["arguments"]["precision"], **made}


@contextmanager
def alone():
    """Wait for the other processes: the first one packs the store."""
    descriptor = os.open(folder("any", 0).parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def open_store(row: Row) -> Store:
    """The row's store, packed first where there is none."""
    where = row.options[1]
    if row.options[0] == "--dataset":
        return named_store(where)
    if not Path(where).exists():
        pack.main(list(row.pack))
    return Store(where)


def test_error(row: Row, runs: list[Path], protocol: str) -> float:
    """Top-1 error in percent on the test pictures, of several nets as one model where there are several."""
    paths, device = [run / "best.pt" for run in runs], pick_device("auto")
    return test.errors(paths, open_store(row), ten_crop=protocol == "ten-crop", device=device)["top1_error"]


def test_together(name: str, row: Row) -> None:
    """All nets of a row as one model, ten crops; nothing while one is missing."""
    runs = [folder(name, seed) / "run" for seed in range(row.seeds)]
    with suppress(Busy), locked(folder(name, 0)):
        if together(name) is not None or len(sound(name)) < row.seeds:
            return
        if not all((run / "best.pt").exists() for run in runs):
            print(f"{name}: its nets are no longer in {runs[0].parent.parent}; they can't be tested as one")
            return
        entry = {"row": name, "together": row.seeds, "ten-crop_error": test_error(row, runs, "ten-crop")}
        append_line(RESULTS, entry | environment(pick_device("auto")))


def together(name: str) -> float | None:
    """The error of a row's nets as one model."""
    found = [e["ten-crop_error"] for e in read_log(RESULTS) if e.get("row") == name and "together" in e]
    return found[-1] if found else None


# ---------------------------------------------------------------------------------------------- tables


def tables() -> str:
    """Two Markdown tables: the rows' errors on their test pictures; what each idea is worth."""
    return "\n".join([*error_table(), "", *idea_table()])


def error_table() -> list[str]:
    lines = ["| what | centre crop | ten crops | all as one, ten crops | training error | nets | made on |",
             "|---|---|---|---|---|---|---|"]
    for name, row in ROWS.items():
        nets = sound(name)
        if not nets:
            lines.append(f"| {row.what} | not measured yet | | | | 0 of {row.seeds} | |")
            continue
        one = together(name)
        shown = [spread_of(nets, key) for key in ("center_error", "ten-crop_error")]
        made = sorted({f"{e['device']}, {e['precision']}" for e in nets})
        lines.append(
            f"| {row.what} | {shown[0]} | {shown[1]} | {'' if one is None else f'{one:.2f}'} | "
            f"{spread_of(nets, 'train_top1_error')} | {len(nets)} of {row.seeds} | {'; '.join(made)} |"
        )
    diverged = [f"{name} with seed {e['seed']}" for name in ROWS for e in done(name) if "diverged" in e]
    return [*lines, *(["", f"diverged: {', '.join(diverged)}"] if diverged else [])]


def idea_table() -> list[str]:
    lines = ["| idea | paper, on ImageNet | without | with | points off, by seed | in all |",
             "|---|---|---|---|---|---|"]
    for idea, (before, after, paper) in IDEAS.items():
        # Pairs differ in the idea alone: not in the machine, nor in the precision.
        without, with_it = (
            {(e["seed"], e["device"], e["precision"]): e for e in sound(name)} for name in (before, after)
        )
        seeds = sorted(set(without) & set(with_it))
        if not seeds:
            lines.append(f"| {idea} | {paper} | not measured yet | | | |")
            continue
        pairs, key = [(without[s], with_it[s]) for s in seeds], "center_error"
        gains = [a[key] - b[key] for a, b in pairs]
        shown = [spread_of(nets, key) for nets in zip(*pairs, strict=True)]
        by_seed = ", ".join(f"{gain:+.2f}" for gain in gains)
        lines.append(f"| {idea} | {paper} | {shown[0]} | {shown[1]} | {by_seed} | {verdict(gains)} |")
    return lines


def spread_of(nets: list[dict], key: str) -> str:
    """The mean of a percentage, and its standard deviation over nets."""
    values = [e[key] for e in nets]
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def make_parser() -> Parser:
    parser = Parser(prog="python -m studies.published", description="The published tables of errors on real pictures.")
    parser.add_argument("rows", nargs="*", metavar="ROW",
                        help=f"what to train, of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                        help="as in train.py; the tables say it (default: %(default)s)")
    parser.add_argument("--tables", action="store_true", help="train nothing, print the tables")
    return parser


if __name__ == "__main__":
    utils.huge_pages()
    run_script(main)
