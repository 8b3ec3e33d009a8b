"""ImageNet (ILSVRC-2012) as people have it: Kaggle's layout, and the official tar files, read without unpacking them.

The development kit numbers the classes in an order of its own; meta.mat has the wnid of each number. Kaggle's
LOC_val_solution.csv gives wnids. Labels are places in the sorted list of wnids in either case (trees.py).
"""

import csv
import errno
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from data.pictures import ENDINGS, say
from data.trees import (
    UNLABELLED,
    Source,
    Split,
    file_source,
    file_split,
    labelled_folders,
    pictures_below,
    subfolders,
)
from utils import Progress, UserError

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
TEST_TAR, KIT = "ILSVRC2012_img_test*.tar", "ILSVRC2012_devkit_t12*"
KAGGLE, SOLUTION, MAPPING = "ILSVRC/Data/CLS-LOC", "LOC_val_solution.csv", "LOC_synset_mapping.txt"
KIT_BYTES = 2**22  # of any file that is read of the kit, which has 2.5 MB, packed
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def is_kaggle(root: Path) -> bool:
    return (root / SOLUTION).is_file() or (root / KAGGLE).is_dir()


def is_official(root: Path) -> bool:
    """Whether ROOT has one of the tar files, and all that is needed of them or no tree of the same pictures."""
    tars = [(root / name).is_file() for name in (TRAIN_TAR, VAL_TAR)]
    tree = all((root / name).is_dir() and subfolders(root / name) for name in ("train", "val"))
    return any(tars) and (not tree or (all(tars) and any(root.glob(KIT))))


# ---------------------------------------------------------------------------------------------- Kaggle


def kaggle(root: Path) -> Source:
    """ROOT/ILSVRC/Data/CLS-LOC/{train/WNID/, val/, test/} with ROOT/LOC_val_solution.csv and LOC_synset_mapping.txt."""
    for needed in (SOLUTION, MAPPING, f"{KAGGLE}/train", f"{KAGGLE}/val"):
        if not (root / needed).exists():
            raise UserError(f"{root} has no {needed}; Kaggle's imagenet-object-localization-challenge brings it")
    lines = (root / MAPPING).read_text(encoding="utf-8-sig", errors="replace").splitlines()
    words = dict(line.strip().partition(" ")[::2] for line in lines if line.strip())
    data = root / KAGGLE
    wnids = subfolders(data / "train")
    if sorted(words) != wnids:
        others = sorted(set(words) ^ set(wnids))
        raise UserError(f"{data / 'train'} and {root / MAPPING} have different classes: {', '.join(others[:5])}")
    splits = {
        "train": labelled_folders(data / "train", wnids),
        "val": _kaggle_val(root, data / "val", {wnid: label for label, wnid in enumerate(wnids)}),
    }
    test = pictures_below(data / "test") if (data / "test").is_dir() else []
    if test:
        splits["test"] = file_split(data / "test", test, [UNLABELLED] * len(test))
    return file_source(root.resolve().name, wnids, splits, words)


def _kaggle_val(root: Path, folder: Path, numbers: dict[str, int]) -> Split:
    """The validation pictures that the solution lists, found at any depth; one that is not there will be named when it
    is packed."""
    wnid_of = _solution(root / SOLUTION)
    members = pictures_below(folder)
    found = {Path(member).stem: member for member in members}
    if len(found) < len(members):
        raise UserError(f"{folder} has several pictures of one name; remove those that are not Kaggle's")
    strangers = sorted(set(found) - set(wnid_of))
    if strangers:
        raise UserError(f"{root / SOLUTION} has no class for {len(strangers)} pictures of {folder}: {strangers[0]}")
    members, labels = [], []
    for picture, wnid in wnid_of.items():
        if wnid not in numbers:
            raise UserError(f"{root / SOLUTION} gives {picture} the class {wnid}, which is no folder of train/")
        members.append(found.get(picture, f"{picture}.JPEG"))
        labels.append(numbers[wnid])
    return file_split(folder, members, labels)


def _solution(path: Path) -> dict[str, str]:
    """The wnid of each picture: a line is `ImageId,PredictionString`, the latter a wnid and four numbers a box."""
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        try:
            rows = list(csv.DictReader(file))
            answer = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
        except (csv.Error, KeyError, IndexError, AttributeError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error!r}); download it again") from None
    if not answer or len(answer) < len(rows):
        raise UserError(f"{path} is damaged ({len(rows)} lines for {len(answer)} pictures); download it again")
    return answer


# ---------------------------------------------------------------------------------------------- official files


def official(root: Path) -> Source:
    """ROOT with ILSVRC2012_img_train.tar (a tar of one tar a class), ILSVRC2012_img_val.tar and the development kit
    ILSVRC2012_devkit_t12.tar.gz; the test pictures' tar may be there, too."""
    for needed in (TRAIN_TAR, VAL_TAR):
        if not (root / needed).is_file():
            raise UserError(f"{root} has no {needed}; image-net.org has it, for those who are registered")
    wnid_of, truth = development_kit(root)
    members, offsets, sizes, keys = [], [], [], []
    for wnid, name, offset, size in _train_pictures(root / TRAIN_TAR):
        keys.append(wnid)
        members.append(name)
        offsets.append(offset)
        sizes.append(size)
    _refuse_repeats(root / TRAIN_TAR, members)
    wnids = sorted(set(keys))
    if wnids != sorted(wnid_of.values()):
        others = sorted(set(wnids) ^ set(wnid_of.values()))
        raise UserError(f"{root / TRAIN_TAR} and the development kit have different classes: {', '.join(others[:5])}")
    numbers = {wnid: label for label, wnid in enumerate(wnids)}
    splits = {
        "train": file_split(root / TRAIN_TAR, members, [numbers[key] for key in keys], offsets, sizes),
        "val": _official_val(root / VAL_TAR, [numbers[wnid_of[number]] for number in truth]),
    }
    for tar in sorted(root.glob(TEST_TAR))[-1:]:
        pictures = list(_pictures(tar))
        names, offsets, sizes = zip(*pictures, strict=True)
        _refuse_repeats(tar, names)
        splits["test"] = file_split(tar, list(names), [UNLABELLED] * len(names), offsets, sizes)
    return file_source(root.resolve().name, wnids, splits)


def development_kit(root: Path) -> tuple[dict[int, str], list[int]]:
    """({class number of the kit: wnid}, the numbers of the validation pictures in the order of their names) from the
    kit's tar, or from the folder that it was unpacked to."""
    found = sorted(root.glob(KIT))
    if not found:
        raise UserError(f"{root} has no ILSVRC2012_devkit_t12.tar.gz, which has the labels of the validation pictures")
    meta, truth = (_kit_file(found[0], name) for name in ("meta.mat", GROUND_TRUTH))
    wnids = _meta(meta, found[0])
    try:
        numbers = [int(line) for line in truth.split()]
        for number in numbers:
            wnids[number]
    except (ValueError, KeyError) as error:
        raise UserError(f"{found[0]}: {GROUND_TRUTH} is damaged ({error}); download it again") from None
    return wnids, numbers


def _kit_file(kit: Path, name: str) -> bytes:
    try:
        if kit.is_dir():
            with open(next(kit.rglob(name)), "rb") as file:
                content = file.read(KIT_BYTES + 1)
        else:
            with tarfile.open(kit) as tar:
                member = next(m for m in tar if m.isfile() and m.name.endswith(f"data/{name}"))
                content = tar.extractfile(member).read(KIT_BYTES + 1)
        if len(content) > KIT_BYTES:
            raise ValueError
        return content
    except StopIteration:
        raise UserError(f"{kit} has no data/{name}; it is not the kit of tasks 1 and 2") from None
    except Exception as error:  # tarfile, gzip and zlib each have errors of their own
        raise UserError(f"{kit} is damaged ({type(error).__name__}); download it again") from None


def _meta(content: bytes, kit: Path) -> dict[int, str]:
    """{ILSVRC2012_ID: WNID} of meta.mat's synsets that have no children: the classes."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(content), squeeze_me=True)["synsets"]
        columns = (synsets[name].tolist() for name in ("ILSVRC2012_ID", "WNID", "num_children"))
        wnids = {int(number): str(wnid) for number, wnid, children in zip(*columns, strict=True) if not children}
    except Exception as error:  # scipy's reader raises nearly anything on damaged files
        raise UserError(f"{kit}: meta.mat is damaged ({type(error).__name__}); download it again") from None
    if len(wnids) < 2 or len(set(wnids.values())) < len(wnids) or not all(re.fullmatch(r"n\d{8}", w) for w in
                                                                         wnids.values()):
        raise UserError(f"{kit}: meta.mat has no list of wnids; download it again")
    return wnids


def _train_pictures(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """(wnid, name, offset, size) of every picture in the tar of tars."""
    with open(path, "rb") as file, Progress("indexing train", path.stat().st_size >> 20, "MB") as progress:
        for name, offset, size in _members(path, file, 0, path.stat().st_size):
            wnid = Path(name).stem
            if Path(name).suffix != ".tar":
                say(f"{path}: {name} is no class's tar and is skipped")
                continue
            for picture, inside, length in _members(f"{path}: {name}", file, offset, size):
                if Path(picture).suffix.lower() in ENDINGS:
                    yield wnid, picture.removeprefix("./"), inside, length
                else:
                    say(f"{path}: {name}: {picture} is not named like a picture and is skipped")
            progress.update((offset + size >> 20) - progress.done)


def _pictures(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every picture in a tar."""
    count = 0
    with open(path, "rb") as file:
        for name, offset, size in _members(path, file, 0, path.stat().st_size):
            if Path(name).suffix.lower() in ENDINGS:
                count += 1
                yield name.removeprefix("./"), offset, size
            else:
                say(f"{path}: {name} is not named like a picture and is skipped")
    if not count:
        raise UserError(f"{path} holds no pictures")


def _official_val(path: Path, labels_in_order: list[int]) -> Split:
    """Picture ILSVRC2012_val_00000001 has the first label."""
    members, labels, offsets, sizes = [], [], [], []
    numbers = set()
    for name, offset, size in _pictures(path):
        number = re.fullmatch(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG", name)
        if not number or not 1 <= int(number[1]) <= len(labels_in_order):
            raise UserError(f"{path}: the development kit has no label for {name}")
        numbers.add(int(number[1]))
        members.append(name)
        labels.append(labels_in_order[int(number[1]) - 1])
        offsets.append(offset)
        sizes.append(size)
    if len(numbers) < len(labels_in_order):
        raise UserError(f"{path} has {len(numbers)} pictures, the development kit {len(labels_in_order)} labels")
    _refuse_repeats(path, [Path(member).name for member in members])
    return file_split(path, members, labels, offsets, sizes)


def _refuse_repeats(tar: Path, names) -> None:
    """A tar can hold a file twice, the later one to take the place of the earlier; ImageNet's do not."""
    if len(set(names)) < len(names):
        raise UserError(f"{tar} holds pictures of the same name, so it is not the original; download it again")


class _Part(io.RawIOBase):
    """Bytes `start` to `start + size` of a file, as a file: a tar within a tar."""

    def __init__(self, file, start: int, size: int):
        self.file, self.start, self.size, self.at = file, start, size, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self.at)
        self.file.seek(self.start + self.at)
        data = self.file.read(left if count < 0 else min(count, left))
        self.at += len(data)
        return data


def _members(what, file, start: int, size: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset in the file, size) of each regular file in an uncompressed tar. Raises UserError where the tar is
    damaged or cut off, which Python's tarfile would take for its end."""
    damaged = UserError(f"{what} is damaged or cut off; download it again")
    last = -1
    try:
        with tarfile.open(fileobj=_Part(file, start, size), mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # a million of them would fill the memory
                if member.offset <= last or member.size < 0 or member.offset_data + member.size > size:
                    raise damaged
                last = member.offset
                if member.islnk() or member.issym() or member.issparse():
                    say(f"{what}: {member.name} is a link or sparse and is skipped")
                elif member.isreg():
                    yield member.name, start + member.offset_data, member.size
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):
                raise damaged
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        if isinstance(error, UserError) or getattr(error, "errno", None) in (errno.EIO, errno.ESTALE):
            raise  # the disk's fault, not the tar's
        raise damaged from None
