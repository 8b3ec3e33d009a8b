"""Damaged files of every kind that a command takes. Each ends in exit status 0 or 2 with at most one line of error, in
a minute and 2 GB of memory; and what is accepted gives what the sound file gives, or says something on stderr. (Formats
of others without checksums cannot be held to the last: pictures, lists, Caffe's files.)"""

import json
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import test
import train
from benchmarks.faults import Lost, check_manners, inputs, run, small_run, small_store
from benchmarks.faults.training import fingerprints
from checkpoints import convert, export
from data import pack
from data.manifest import MANIFEST

BIG = 20_000  # bytes; of larger files half of the damage is near the ends, where formats keep what is where
MISLABELLED = 3  # pictures of a set with a damaged list, which has no checksum


def case(place: Path, rng: np.random.Generator) -> list[str]:
    return [one_of(TARGETS, place, rng)]


def one_of(targets: dict, place: Path, rng: np.random.Generator) -> str:
    """A case of one of the targets, each as often as it says; .safetensors only where there is its package, which
    requirements.txt does not bring."""
    targets = {name: about for name, about in targets.items() if find_spec("safetensors") or "safetensors" not in name}
    chances = np.array([chance for chance, _ in targets.values()], float)
    name = str(rng.choice(list(targets), p=chances / chances.sum()))
    room = place / "room"
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    try:
        return targets[name][1](place, room, rng)
    except Lost as error:
        raise Lost(f"{name}: {error}") from None


def mutated(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Cut off, bits flipped, bytes overwritten or left out, a part of another file put in, or a number in the header
    made absurd."""
    data, size = bytearray(data), len(data)
    kind = rng.integers(6)
    if kind == 0:
        return bytes(data[: rng.integers(size)])
    if kind == 1:
        for where in rng.integers(size, size=rng.integers(1, 20)):
            data[where] ^= 1 << rng.integers(8)
    elif kind == 2:
        where, length = rng.integers(size), rng.integers(1, 400)
        data[where : where + length] = rng.bytes(min(length, size - where))
    elif kind == 3:
        where, start = rng.integers(size), rng.integers(len(other))
        data[where : where + rng.integers(500)] = other[start : start + rng.integers(500)]
    elif kind == 4:
        where = rng.integers(size)
        del data[where : where + rng.integers(1, 300)]
    else:  # big numbers near the front, where formats keep width and height, and in JPEG's frame header
        frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        where = frame + 5 if frame >= 0 else int(rng.integers(min(40, size)))
        data[where : where + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x20\0\x20\0", b"\0\0\0\0"])
    return bytes(data)


def damage(path: Path, rng: np.random.Generator) -> bool:
    """Mutate a file, or now and then put one of another kind in its place. Returns whether it is another now."""
    data, other = path.read_bytes(), inputs.picture(rng)[1] + json.dumps({"a": [1, "b", None]}).encode()
    front, back = 0, len(data)
    if len(data) > BIG and rng.random() < 0.5:
        front, back = [(0, 128), (0, 4096), (len(data) - BIG, len(data))][rng.integers(3)]
    new = other if rng.random() < 0.03 else data[:front] + mutated(data[front:back], other, rng) + data[back:]
    path.unlink()  # it may be a link
    path.write_bytes(new)
    return new != data


def outcome(main: Callable, argv: list, room: Path) -> tuple[str, str]:
    """("refused", "") or ("accepted", what was said: stdout, and stderr if there is any)."""
    ended = run(main, argv, room)
    check_manners(ended)
    return ("refused", "") if ended.status else ("accepted", ended.err)


# ---------------------------------------------------------------------------------------------- checkpoints


def tested(name: str) -> Callable:
    """test.py takes a checkpoint."""

    def target(place: Path, room: Path, rng: np.random.Generator) -> str:
        path = room / name
        sound = inputs.safetensors_file(place) if name.endswith("safetensors") else small_run(place) / "best.pt"
        shutil.copyfile(sound, path)
        damage(path, rng)
        return same_predictions(place, [path, "--data", small_store(place)], room, "")

    return target


def same_predictions(place: Path, argv: list, room: Path, base: str) -> str:
    """Run test.py. What it predicts is what the sound files of `base` give."""
    out = room / "predictions.csv"
    found, said = outcome(test.main, [*argv, "--device", "cpu", "--predictions", out], room)
    if found == "accepted" and not said and out.read_text() != predictions(place, base):
        raise Lost(f"other predictions, and not a word; {argv}")
    return found


@cache
def predictions(place: Path, base: str) -> str:
    """What test.py makes of the small run's best.pt and a sound store."""
    out, store = place / "sound.csv", inputs.photographs(place) if base else small_store(place)
    check_manners(run(test.main, [small_run(place) / "best.pt", "--data", store, "--predictions", out], place), (0,))
    return out.read_text()


def started_from(place: Path, room: Path, rng: np.random.Generator) -> str:
    """train.py --init."""
    path = room / "best.pt"
    shutil.copyfile(small_run(place) / "best.pt", path)
    argv = ["--data", small_store(place), "--init", path]
    return same_step(place, argv, room, "init", lambda: damage(path, rng))


def same_step(place: Path, argv: list, room: Path, name: str, fault: Callable) -> str:
    """Train for a step after fault(). Where that says nothing, it gives the weights of a step without it, which is done
    once for each `name`."""
    more = ["--max-steps", 1, "--batch-size", 16, "--device", "cpu", "--out", room / "run"]
    kept = place / f"{name}.json"
    if not kept.exists():
        check_manners(run(train.main, [*argv, *more], room), (0,))
        kept.write_text(json.dumps(fingerprints(room / "run")))
        shutil.rmtree(room / "run")
    fault()
    found, said = outcome(train.main, [*argv, *more], room)
    if found == "accepted" and not said and fingerprints(room / "run") != json.loads(kept.read_text()):
        raise Lost("other weights than from the sound file, and not a word")
    return found


def exported(place: Path, room: Path, rng: np.random.Generator) -> str:
    path, out = room / "best.pt", room / "net.safetensors"
    shutil.copyfile(small_run(place) / "best.pt", path)
    damage(path, rng)
    found, said = outcome(export.main, [path, out], room)
    if found == "accepted" and not said and out.read_bytes() != inputs.safetensors_file(place).read_bytes():
        raise Lost("other weights than from the sound file, and not a word")
    return found


def resumed(name: str) -> Callable:
    """train.py --resume, with one file of the run damaged. conv1.npy and the log have no checksums: they may differ."""
    itself = {"log.jsonl": "log", "conv1.npy": "conv1.npy"}.get(name)

    def target(place: Path, room: Path, rng: np.random.Generator) -> str:
        out = inputs.copy_run(small_run(place), room / "run")
        if not (kept := place / "resumed.json").exists():
            outcome(train.main, ["--resume", "--out", out], room)
            kept.write_text(json.dumps(fingerprints(out)))
            inputs.copy_run(small_run(place), out)
        damage(out / name, rng)
        unchecked = name == "config.json" and not has_checksum(out / name)
        found, said = outcome(train.main, ["--resume", "--out", out], room)
        if found == "accepted" and not said and not unchecked:
            wanted, parts = json.loads(kept.read_text()), fingerprints(out)
            if different := [part for part in wanted if part != itself and parts[part] != wanted[part]]:
                raise Lost(f"the run ends with other {', '.join(different)}, and not a word")
        return found

    return target


def has_checksum(path: Path) -> bool:
    """Whether a JSON file has one: without it, it is taken as it is."""
    try:
        return "checksum" in json.loads(path.read_bytes())
    except ValueError:
        return True


# ---------------------------------------------------------------------------------------------- stores


def stored(command: str) -> Callable:
    """A store with one damaged file: tested, verified, or trained from for a step."""

    def target(place: Path, room: Path, rng: np.random.Generator) -> str:
        base = str(rng.choice(["", "photographs"]))
        sound = inputs.photographs(place) if base else small_store(place)
        store = room / "store"
        shutil.copytree(sound, store)
        files = sorted(path for path in store.rglob("*") if path.is_file())
        path = files[rng.integers(len(files))]
        if command == "train":
            return same_step(place, ["--data", store], room, f"step {base}", lambda: damage(path, rng))
        changed = damage(path, rng)
        if command == "test":
            return same_predictions(place, [small_run(place) / "best.pt", "--data", store], room, base)
        found, _ = outcome(pack.main, ["--verify", store, "--workers", 1], room)
        if found == "accepted" and changed and not same_json(path, sound / path.name):
            raise Lost(f"{path.name} was changed, and --verify is content")
        return found

    return target


def same_json(path: Path, sound: Path) -> bool:
    """Whether a damaged manifest says the same still, or has no checksum any more: then it is taken as it is."""
    if path.name != MANIFEST:
        return False
    return not has_checksum(path) or json.loads(path.read_bytes()) == json.loads(sound.read_bytes())


# ---------------------------------------------------------------------------------------------- pictures, other files


def named(place: Path, room: Path, rng: np.random.Generator) -> str:
    """test.py --images, with a sound picture and some damaged ones."""
    (room / "pictures").mkdir()
    for number in range(8):
        name, data = inputs.picture(rng)
        new = mutated(data, inputs.picture(rng)[1], rng) if number else data
        (room / "pictures" / f"{number}{name}").write_bytes(new)
    argv = [small_run(place) / "best.pt", "--images", room / "pictures", "--device", "cpu", "--json"]
    return outcome(test.main, argv, room)[0]


def packed(layout: str) -> Callable:
    """data.pack takes a set with a damaged file. What it lists is packed or named."""

    def target(place: Path, room: Path, rng: np.random.Generator) -> str:
        result, sources = room / "result.json", inputs.picture_set(room / "set", layout)
        damage(sources / str(rng.choice(inputs.LAYOUTS[layout])), rng)

        def main(_) -> int:
            result.write_text(json.dumps(inputs.packed(str(sources), room / "store", workers=1)))
            return 0

        found, _ = outcome(main, [], room)
        if found == "accepted":
            counts = json.loads(result.read_text())
            if counts["listed"] != counts["records"] + len(counts["skipped"]):
                raise Lost(f"{counts['listed']} pictures listed, {counts['records']} packed, the rest not named")
            if counts["mislabelled"] > MISLABELLED:
                raise Lost(f"{counts['mislabelled']} pictures have other labels")
        return found

    return target


def converted(name: str) -> Callable:
    """checkpoints.convert."""

    def target(place: Path, room: Path, rng: np.random.Generator) -> str:
        path, out, more = room / name, room / "net.pt", []
        if name.endswith(".pth"):
            shutil.copyfile(inputs.torchvision_file(place), path)
        elif name.endswith(".caffemodel"):
            inputs.caffe_file(path)
        else:
            inputs.mean_file(path)
            more = ["--mean", path]
        damage(path, rng)

        def mean_alone(_) -> int:  # a whole .caffemodel of 240 MB would be read before
            convert.read_mean(str(path))
            return 0

        found, _ = outcome(mean_alone, [], room) if more else outcome(convert.main, [path, out], room)
        return found

    return target


def another_kind(place: Path, room: Path, rng: np.random.Generator) -> str:
    """Any file where test.py wants a checkpoint or a picture, under any name."""
    path = room / f"a{rng.choice(['.pt', '.safetensors', '.onnx', '.jpg', ''])}"
    path.write_bytes(inputs.picture(rng)[1] if rng.random() < 0.5 else rng.bytes(int(rng.integers(5000))))
    if rng.random() < 0.3:
        path.write_bytes((small_run(place) / str(rng.choice(["config.json", "log.jsonl", "conv1.npy"]))).read_bytes())
    best, store = small_run(place) / "best.pt", small_store(place)
    return outcome(test.main, [path, "--data", store] if rng.random() < 0.7 else [best, "--images", path], room)[0]


TARGETS = {  # how often, and what
    "best.pt, test.py": (3, tested("best.pt")), "last.pt, --resume": (2, resumed("last.pt")),
    "best.pt, --init": (1, started_from), "best.pt, export to .safetensors": (2, exported),
    ".safetensors, test.py": (4, tested("best.safetensors")), ".onnx, test.py": (1, tested("best.onnx")),
    "config.json": (4, resumed("config.json")), "log.jsonl": (3, resumed("log.jsonl")),
    "conv1.npy": (3, resumed("conv1.npy")), "store, test.py": (10, stored("test")),
    "store, --verify": (10, stored("verify")), "store, train.py": (2, stored("train")), "pictures": (5, named),
    **{f"{layout}, data.pack": (4, packed(layout)) for layout in inputs.LAYOUTS},
    ".caffemodel": (5, converted("a.caffemodel")), ".pth": (1, converted("a.pth")), "mean.npy": (5, converted("a.npy")),
    ".binaryproto": (5, converted("a.binaryproto")), "another kind": (5, another_kind),
}
