"""Pictures in folders: ImageFolder trees and Caffe's lists; what classes are called and how splits are ordered.

A class has the number of its place in the sorted list of class folders; for ImageNet, of wnids, as in torchvision, in
Caffe's list of synsets and in every published checkpoint.
"""

import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from data.pictures import ENDINGS, MAX_BYTES, Files, say
from utils import UserError

ILSVRC = Path(__file__).parent / "ilsvrc.txt"
ILSVRC_COUNTS = {"train": 1_281_167, "val": 50_000, "test": 100_000}
UNLABELLED = -1
VAL = 0.1  # of the training pictures, where a tree has none for validation
FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
NAMES_OF_LISTS = ("synset_words.txt", "synsets.txt", "classes.txt")  # next to Caffe's lists, the first that is there


@dataclass
class Split:
    """Pictures (Files, or uint8 arrays (H, W) or (H, W, 3)) and their labels, (n,) int64; all of them are UNLABELLED
    in an unlabelled split."""

    pictures: Sequence
    labels: np.ndarray


@dataclass
class Source:
    """What a store is packed from. size and codec are the store's defaults; channels is 1 for a grey set; wnids are
    those of the classes, where they have any."""

    name: str
    classes: list[str]
    splits: dict[str, Split]
    size: int
    codec: str
    channels: int
    wnids: list[str] | None = None


# ---------------------------------------------------------------------------------------------- classes and order


@cache
def ilsvrc_wnids() -> tuple[str, ...]:
    """The 1000 wnids of ILSVRC-2012, sorted: class 0 is n01440764 (tench), 999 n15075141 (toilet tissue)."""
    return tuple(ILSVRC.read_text().split())


def file_source(name: str, keys: list[str], splits: dict[str, Split], words: dict[str, str] | None = None) -> Source:
    """The source of files whose classes are known by `keys`, names of folders or wnids, in the order of their labels.

    Wnids of ILSVRC get torchvision's short names, as weights from there and from Caffe have them; another key is called
    as `words` says, or by itself.
    """
    from torchvision.models import AlexNet_Weights

    known = dict(zip(ilsvrc_wnids(), AlexNet_Weights.IMAGENET1K_V1.meta["categories"], strict=True))
    names = (words or {}) | known
    wnids = keys if words or set(keys) <= set(known) else None
    if set(keys) == set(known):
        name = "imagenet"
        for split, part in splits.items():
            count, expected = len(part.labels), ILSVRC_COUNTS[split]
            if count != expected:
                say(f"{split} has {count:,} of ILSVRC-2012's {expected:,} pictures")
        if tuple(keys) != ilsvrc_wnids():
            say("the lists number ImageNet's classes in another order than published checkpoints do")
    return Source(name, [names.get(key, key) for key in keys], splits, 256, "jpeg", 3, wnids)


def file_split(place: str | Path, members: list[str], labels, offsets=None, sizes=None) -> Split:
    """Files in the order of their labels, then of their names, wherever they come from. A picture is called by its
    file's own name, or by its path where several have the same."""
    flat = len({member.rpartition("/")[2] for member in members}) == len(members)
    names = [member.rpartition("/")[2] for member in members] if flat else members
    order = sorted(range(len(members)), key=lambda i: (labels[i], names[i]))
    labels = np.asarray(labels, np.int64)
    offsets, sizes = (None if part is None else np.asarray(part, np.int64)[order] for part in (offsets, sizes))
    return Split(Files(str(place), [members[i] for i in order], flat, offsets, sizes), labels[order])


def pictures_below(folder: str | Path) -> list[str]:
    """Paths, relative to `folder`, of all files at any depth that are named like pictures; links are followed. Hidden
    files are passed over; other files are counted and said to be skipped."""
    found, others = [], []
    above = {(status.st_dev, status.st_ino) for status in map(os.stat, Path(folder).resolve().parents)}
    for path, names in _walk(str(folder), above):
        inside = os.path.relpath(path, folder)
        for name in names:
            member = name if inside == "." else f"{inside}/{name}"
            (found if os.path.splitext(name)[1].lower() in ENDINGS else others).append(member)
    if others:
        say(f"{folder}: {len(others)} files are not named like pictures and are skipped (first: {min(others)})")
    return found


def _walk(top: str, seen: set) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) for a folder and all below it, but for hidden ones; a link to a folder above it, or
    where the walk already was, leads nowhere."""
    ahead = [top]  # not by recursion: a tree can be deeper than Python's stack
    while ahead:
        folder = ahead.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            say(f"{folder} is a link to a folder that holds it or was searched already; it is skipped")
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            # os.path.isdir: entry.is_dir() raises where a link leads to itself
            entries = sorted((entry.name, os.path.isdir(entry.path)) for entry in entries if entry.name[0] != ".")
        yield folder, [name for name, is_folder in entries if not is_folder]
        ahead += [os.path.join(folder, name) for name, is_folder in reversed(entries) if is_folder]


def subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


# ---------------------------------------------------------------------------------------------- ImageFolder trees


def image_folder(root: Path, val: float | None = None) -> Source:
    """A tree ROOT/train/CLASS/..., perhaps with ROOT/val/CLASS/... and ROOT/test/CLASS/..., pictures at any depth; or
    ROOT/CLASS/... alone. The names of the three folders may be in capitals. A test/ without class folders is
    unlabelled. Without val/ a part `val` of the training pictures, by default VAL, becomes the validation split."""
    folders = {split: _folder_of(root, split) for split in FOLDERS}
    if not any(folders.values()) and subfolders(root):
        folders["train"] = root
        _refuse_splits_as_classes(root)
    if folders["train"] is None:
        names = " and ".join(f"{folder.name}/" for folder in folders.values() if folder)
        besides = f", but {names} (a class cannot be called so; rename it)" if names else ""
        raise UserError(f"{root} has no folder train/{besides}; expected {_expected(root)}")
    if folders["val"] is not None and val is not None:
        raise UserError(f"--val {val:g}: {root} has validation pictures of its own, in {folders['val'].name}/; leave "
                        "the option out, or take that folder away")
    classes = subfolders(folders["train"])
    if not classes:
        raise UserError(f"{folders['train']} has no class folders; expected {_expected(root)}")
    others = sorted(set(subfolders(root)) - {folder.name for folder in folders.values() if folder})
    if others and folders["train"] != root:
        say(f"{root}: {len(others)} folders are not called train, val or test and are skipped (first: {others[0]})")
    splits = {}
    for split, folder in folders.items():
        if folder is None:
            continue
        found = subfolders(folder)
        if split == "test" and not set(found) & set(classes):
            members = pictures_below(folder)
            if members:
                say(f"{folder} has no class folders as train/ has: its {len(members)} pictures are taken as unlabelled")
                splits[split] = file_split(folder, members, [UNLABELLED] * len(members))
            continue
        if found != classes:
            _refuse_other_classes(folder, found, folders["train"], classes)
        if split == "train" and folders["val"] is None:
            fraction = VAL if val is None else val
            splits["train"], splits["val"] = divided(folder, *class_members(folder, classes), fraction)
        else:
            splits[split] = labelled_folders(folder, classes)
    return file_source(root.resolve().name, classes, splits)


def _refuse_splits_as_classes(root: Path) -> None:
    """Raise UserError where folders are called like seg_train and seg_test: the net would learn which is which."""
    words = {name: set(re.findall("[a-z]+", name.lower())) for name in subfolders(root)}
    found = {split: [name for name in words if words[name] & set(FOLDERS[split])] for split in FOLDERS}
    for split in ("val", "test"):
        if found["train"] and found[split]:
            raise UserError(f"{root}: {found['train'][0]}/ and {found[split][0]}/ are called like splits, not like "
                            f"classes; rename them to train/ and {split}/, with the class folders in them")


def _refuse_other_classes(folder: Path, found: list[str], train: Path, classes: list[str]) -> None:
    if not found:
        raise UserError(f"{folder} has no class folders, {train} has {len(classes)}: fill it, or take it away; for "
                        "Kaggle's ImageNet give the folder that holds LOC_val_solution.csv")
    others = sorted(set(found) ^ set(classes))
    alike = len({unicodedata.normalize("NFC", name) for name in others}) < len(others)
    hint = "; some look the same, but their accents are written in other bytes: rename them" if alike else ""
    raise UserError(f"the class folders of {folder} and {train} differ: {', '.join(others[:5])}{hint}")


def divided(folder: Path, members: list[str], labels: list[int], fraction: float) -> tuple[Split, Split]:
    """Training and validation split of the pictures: those whose hash of CLASS/NAME, a number in 0..1, is below
    `fraction` are for validation, so that each stays where it is when others are added. Identical files are on one
    side, that of the first of them. A class keeps one training picture at least; there is one for validation at least.
    """
    first = first_of_identical(folder, members)
    share = {i: name_share(members[i]) for i in set(first)}  # of the different pictures
    classes: dict[int, list[int]] = {}
    for i, label in zip(first, labels, strict=True):
        classes.setdefault(label, []).append(i)
    kept = {max(mine, key=share.__getitem__) for mine in classes.values()}
    chosen = {i for i in share if share[i] < fraction} - kept
    if not chosen:
        if not set(share) - kept:
            raise UserError(f"{folder} has no class with two different pictures: none can be spared for validation")
        chosen = {min(set(share) - kept, key=share.__getitem__)}
    aside = [i in chosen for i in first]
    say(f"{folder} has no validation pictures: {sum(aside):,} of {len(members):,} are set aside for that")

    def part(wanted: bool) -> Split:
        mine = [i for i in range(len(members)) if aside[i] == wanted]
        return file_split(folder, [members[i] for i in mine], [labels[i] for i in mine])

    return part(False), part(True)


def name_share(member: str) -> float:
    """A number in 0..1 that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(member), digest_size=8).digest()) / 2**64


def first_of_identical(folder: Path, members: list[str]) -> list[int]:
    """For each file the place of the first, by name, with the same bytes; most are their own. Only files of the same
    size and end are read whole, and none that the packer would refuse."""

    def size(path):
        status = os.stat(path)
        return status.st_size if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES else None

    def end(path):
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 4096))
            return file.read(4096)

    def whole(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()

    first, alike = list(range(len(members))), [sorted(range(len(members)), key=members.__getitem__)]
    for key in (size, end, whole):
        alike = [same for group in alike for same in _by(key, folder, members, group)]
    for same in alike:
        for i in same:
            first[i] = same[0]
    return first


def _by(key, folder: Path, members: list[str], group: list[int]) -> list[list[int]]:
    """The members of a group with the same key, where there are several."""
    found = {}
    for i in group:
        with suppress(OSError):  # told, and left out, when it is packed
            found.setdefault(key(os.path.join(folder, members[i])), []).append(i)
    return [same for value, same in found.items() if value is not None and len(same) > 1]


def _expected(root: Path) -> str:
    return f"{root}/train/CLASS/PICTURES, or {root}/CLASS/PICTURES where no class is called train, val or test"


def _folder_of(root: Path, split: str) -> Path | None:
    found = [root / name for name in subfolders(root) if name.lower() in FOLDERS[split]]
    if len(found) > 1:
        raise UserError(f"{root} has {' and '.join(p.name for p in found)}: which one is {split}? rename the other")
    return found[0] if found else None


def labelled_folders(folder: Path, classes: list[str]) -> Split:
    """FOLDER/CLASS/..., pictures at any depth; a class's label is its place in `classes`."""
    return file_split(folder, *class_members(folder, classes))


def class_members(folder: Path, classes: list[str]) -> tuple[list[str], list[int]]:
    """The pictures of FOLDER/CLASS/..., as paths relative to FOLDER, and their labels."""
    loose = [p.name for p in folder.iterdir() if p.is_file() and p.suffix.lower() in ENDINGS and p.name[0] != "."]
    if loose:
        say(f"{folder}: {len(loose)} pictures lie in no class folder and are skipped (first: {min(loose)})")
    members, labels = [], []
    for label, name in enumerate(classes):
        files = pictures_below(folder / name)
        if not files:
            raise UserError(f"{folder / name} holds no pictures ({', '.join(sorted(ENDINGS))})")
        members += [f"{name}/{file}" for file in files]
        labels += [label] * len(files)
    return members, labels


# ---------------------------------------------------------------------------------------------- Caffe's lists


def caffe_lists(root: Path) -> Source:
    """ROOT/train.txt and ROOT/val.txt, and perhaps ROOT/test.txt, of lines `path label`, labels from 0; a path is
    absolute, or relative to ROOT/train/ (val/, test/) or to ROOT. Names of the classes: the first of NAMES_OF_LISTS
    that is there, a line each; else the folders of the training pictures, where each class has one of its own."""
    found = {split: _read_list(root, split) for split in FOLDERS if (root / f"{split}.txt").is_file()}
    splits = {split: file_split(root, *lines) for split, lines in found.items()}
    labels = splits["train"].labels
    count = int(labels.max()) + 1
    missing = np.setdiff1d(np.arange(count), labels)
    if len(missing):
        raise UserError(f"{root / 'train.txt'} has no picture of class {missing[0]}; labels count from 0 without gaps")
    for split, part in splits.items():
        if split == "test" and len(set(part.labels.tolist())) == 1:  # Caffe's test.txt of ImageNet has 0 everywhere
            part.labels[:] = UNLABELLED
            say(f"{root / 'test.txt'} has one label for all pictures: they are taken as unlabelled")
        elif part.labels.max() >= count:
            raise UserError(f"{root / split}.txt has label {part.labels.max()}, train.txt goes up to {count - 1}")
    return file_source(root.resolve().name, _keys_of_lists(root, found["train"], count), splits)


def _read_list(root: Path, split: str) -> tuple[list[str], list[int]]:
    """Paths, relative to `root` where they lie in it, and labels."""
    base = f"{split}/" if (root / split).is_dir() else ""
    members, labels = [], []
    text = (root / f"{split}.txt").read_text(encoding="utf-8-sig", errors="surrogateescape")
    for number, line in enumerate(text.split("\n"), 1):
        path, _, label = line.strip().rpartition(" ")
        if not line.strip():
            continue
        if not path.strip() or not label.isdecimal() or len(label) > 6:
            raise UserError(
                f"{root / split}.txt, line {number}: {line[:60]!r} is not a path and a label from 0 to 999999"
            )
        path = path.strip()
        below = base and not os.path.isabs(path) and os.path.exists(os.path.join(root, base, path))
        members.append(base + path if below else path)
        labels.append(int(label))
    if not members:
        raise UserError(f"{root / split}.txt names no pictures")
    if not any(os.path.exists(os.path.join(root, member)) for member in members[:100]):
        raise UserError(f"{root / split}.txt: {members[0]} is not there, neither in {root / split} nor in {root}")
    return members, labels


def _keys_of_lists(root: Path, train: tuple[list[str], list[int]], count: int) -> list[str]:
    """A key for each class: a wnid, a name or the folder of its pictures."""
    file = next((root / name for name in NAMES_OF_LISTS if (root / name).is_file()), None)
    if file is not None:
        text = file.read_text(encoding="utf-8-sig", errors="replace")
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        wnids = [line.split()[0] for line in lines]
        keys = wnids if set(wnids) <= set(ilsvrc_wnids()) else lines
        if len(keys) != count or len(set(keys)) != count:
            raise UserError(f"{file} names {len(set(keys))} classes, train.txt has {count}")
        return keys
    folders: dict[int, set] = {}
    for path, label in zip(*train, strict=True):
        folders.setdefault(label, set()).add(os.path.basename(os.path.dirname(path)))
    keys = [next(iter(folders[label])) for label in range(count)]
    if any(len(found) > 1 for found in folders.values()) or len(set(keys)) < count or "" in keys:
        keys = [f"class {label}" for label in range(count)]
    return keys
