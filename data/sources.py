"""Sources: where pictures come from before they are packed. Named sets (torchvision fetches and checks their
archives) and HDF5 files; trees.py has folders and lists, imagenet.py ImageNet's own layouts."""

import gzip
import math
import os
import tarfile
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np

from data import imagenet
from data.guard import limited
from data.manifest import is_store
from data.pictures import printable, say
from data.trees import Source, Split, caffe_lists, image_folder
from utils import UserError, one_line, shown

NAMED = ("cifar10", "cifar100", "fashion-mnist", "sample")
DOWNLOADS = Path(__file__).parent / "downloads"
SAMPLE = Path(__file__).parent / "sample" / "fashion-mnist-sample.h5"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
VALIDATION = 5000  # training images that a named small set gives up for validation
VALIDATION_SEED = 2012
PROBE_SECONDS = 5
# The binary form of CIFAR: folder, archive, each split's files, the names; bytes of labels before a picture's pixels,
# of which the last is taken (CIFAR-100 has the coarse one first).
CIFAR_PICTURES = (50_000, 10_000)  # of training and test
CIFAR_BINARY = {
    "cifar10": ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", [f"data_batch_{n}.bin" for n in range(1, 6)],
                ["test_batch.bin"], "batches.meta.txt", 1),
    "cifar100": ("cifar-100-binary", "cifar-100-binary.tar.gz", ["train.bin"], ["test.bin"],
                 "fine_label_names.txt", 2),
}
SMALL_HDF5 = 2**28  # bytes of a dataset that is read at once
MOST_CHUNK = 2**28  # bytes of a chunk, or a picture: they are unpacked whole
CHUNK_CACHE = 2**26  # bytes of unpacked chunks that a process keeps, and of pictures that it reads at once


class Unavailable(UserError):
    """A named set that is neither on disk nor can be downloaded."""


def find(name: str, download: bool = True, val: float | None = None) -> Source:
    """The source called `name`: a named set or a path. val: the part of the training pictures that becomes the
    validation split of a tree without one. Raises UserError where there is none or it cannot be used, and Unavailable
    where a named set is not on disk and cannot be downloaded."""
    if val is not None and (name in NAMED or Path(name).is_file()):
        raise UserError(f"--val {val:g} is for folders of class folders, which {name} is not; leave the option out")
    if name in ("cifar10", "cifar100"):
        source = _cifar(name, download)
    elif name == "fashion-mnist":
        source = _fashion_mnist(download)
    elif name == "sample":
        source = _hdf5(SAMPLE, name)
    else:
        source = _from_path(Path(name), val)
    if len(source.classes) < 2:
        raise UserError(f"{name} has one class only ({source.classes[0]}); at least two are needed")
    return source


def _from_path(path: Path, val: float | None) -> Source:
    if path.is_dir():
        if is_store(path):
            raise UserError(f"{path} is a store already, which train.py --data takes as it is")
        if imagenet.is_kaggle(path):
            source = imagenet.kaggle(path)
        elif imagenet.is_official(path):
            source = imagenet.official(path)
        elif (path / "train.txt").is_file() and (path / "val.txt").is_file():
            source = caffe_lists(path)
        else:
            source, val = image_folder(path, val), None
    elif path.name in (imagenet.TRAIN_TAR, imagenet.VAL_TAR) and path.is_file():
        source = imagenet.official(path.parent)
    elif path.suffix.lower() in (".h5", ".hdf5") and path.is_file():
        source = _hdf5(path, path.stem)
    elif path.exists():
        raise UserError(f"{path} is neither a folder, an .h5 file nor one of ImageNet's official tar files")
    else:
        raise UserError(f"{path}: no such data set, folder or file; the named sets are {', '.join(NAMED)}")
    if val is not None:
        raise UserError(f"--val {val:g} is for folders of class folders, which {path} is not; leave the option out")
    # Names of files have 255 bytes at most, and this one gets endings.
    source.name = os.fsencode(printable(source.name))[:80].decode(errors="ignore")
    if source.name in NAMED:  # a user's own data set never has the name of a named one
        source.name = f"my-{source.name}"
    return source


# ---------------------------------------------------------------------------------------------- named sets


def _small(name: str, classes: list[str], train: Split, test: Split) -> Source:
    """A named small set: 5,000 training images, chosen with a fixed seed, become the validation split."""
    count = len(train.labels)
    order = np.random.Generator(np.random.Philox(VALIDATION_SEED)).permutation(count)
    held = min(VALIDATION, count // 10)
    val, rest = np.sort(order[:held]), np.sort(order[held:])
    splits = {
        "train": Split(train.pictures[rest], train.labels[rest]),
        "val": Split(train.pictures[val], train.labels[val]),
        "test": test,
    }
    return Source(name, classes, splits, size=72, codec="raw", channels=1 if train.pictures.ndim == 3 else 3)


def _cifar(name: str, download: bool) -> Source:
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100

    def load(train: bool, fetch: bool = False):
        return kind(str(DOWNLOADS), train=train, download=fetch)

    try:
        # A whole archive that is there is unpacked; nothing is fetched then.
        train = load(True, fetch=check_integrity(str(DOWNLOADS / kind.filename), kind.tgz_md5))
    except RuntimeError:  # not there, or its checksum is wrong
        binary = _cifar_binary(name)
        if binary:
            return binary
        _fetch(name, kind.url, download, lambda: load(True, fetch=True), [DOWNLOADS])
        train = load(True)
    test = load(False)
    return _small(
        name,
        list(train.classes),
        Split(train.data, np.asarray(train.targets, np.int64)),
        Split(test.data, np.asarray(test.targets, np.int64)),
    )


def _cifar_binary(name: str) -> Source | None:
    """CIFAR in its official binary form, the same records in the same order; None where it is not on disk."""
    folder, archive, train, test, names, labels = CIFAR_BINARY[name]
    place = next((p for p in (DOWNLOADS / folder, DOWNLOADS / archive) if p.exists()), None)
    if place is None:
        return None
    try:
        files = _read_files(place, folder, [*train, *test, names])
    except (OSError, KeyError, EOFError, AttributeError, TypeError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{shown(place)} cannot be read ({one_line(error)}); remove it, or fetch it again") from None
    classes = files[names].decode(errors="replace").split()

    def split(parts: list[str], count: int) -> Split:
        content, size = b"".join(files[part] for part in parts), labels + 3 * 32 * 32
        if len(content) != count * size:
            raise UserError(f"{shown(place)} is damaged: {', '.join(parts)} hold {len(content):,} bytes, not those of "
                            f"{count:,} pictures, {count * size:,}")
        records = np.frombuffer(content, np.uint8).reshape(count, size)
        truth = records[:, labels - 1].astype(np.int64)
        if truth.max() >= len(classes):
            raise UserError(f"{shown(place)} is damaged: {', '.join(parts)} have labels beyond the names in {names}")
        pictures = records[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # stored as red, green, blue planes
        return Split(np.ascontiguousarray(pictures), truth)

    return _small(name, classes, split(train, CIFAR_PICTURES[0]), split(test, CIFAR_PICTURES[1]))


def _read_files(place: Path, folder: str, names: list[str]) -> dict[str, bytes]:
    """Files of a folder, or of that folder in a tar archive, by name."""
    if place.is_dir():
        files = {name: open(place / name, "rb") for name in names}
        return {name: read_at_most(file) for name, file in files.items()}
    with tarfile.open(place) as tar:
        return {name: read_at_most(tar.extractfile(f"{folder}/{name}")) for name in names}


def read_at_most(file, size: int = 2**28) -> bytes:
    """The rest of a file, which is closed. Raises EOFError where that is more than `size` bytes, packed or not."""
    with file:
        content = file.read(size + 1)
    if len(content) > size:
        raise EOFError(f"more than {size:,} bytes")
    return content


def _fashion_mnist(download: bool) -> Source:
    from torchvision import datasets

    kind = datasets.FashionMNIST
    folders = [DOWNLOADS / "FashionMNIST" / "raw", DEBIAN_FASHION_MNIST]
    folder = next((f for f in folders if all((f / name).exists() for name, _ in kind.resources)), None)
    if folder is None:
        url = kind.mirrors[0] + kind.resources[0][0]
        _fetch("fashion-mnist", url, download, lambda: kind(str(DOWNLOADS), download=True), folders)
        folder = folders[0]

    def read(part: str) -> Split:
        images, labels = folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz"
        return Split(_idx(images), _idx(labels).astype(np.int64))

    return _small("fashion-mnist", list(kind.classes), read("train"), read("t10k"))


def _idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of bytes. gzip's own checksum guards it: Debian's files hold the original bytes, but are
    compressed anew, so the MD5 sums of the original archives do not fit them."""
    try:
        content = read_at_most(gzip.open(path))
        dimensions = content[3]
        shape = np.frombuffer(content, ">u4", count=dimensions, offset=4).astype(int)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); remove the folder, or install the package again") from None


def _fetch(name: str, url: str, allowed: bool, fetch, places: list[Path]) -> None:
    """Download a named set after a probe of its server, or raise Unavailable with the reason."""
    where = " or ".join(shown(place) for place in places)
    what = "its four .gz files" if name == "fashion-mnist" else f"{url}, or its binary version,"
    way_out = f"put {what} into {shown(places[0])}"
    if not allowed:
        raise Unavailable(f"{name} is not in {where}, and --download no forbids fetching it; {way_out}")
    reason = _unreachable(url)
    if reason:
        raise Unavailable(f"{name} is not in {where}, and its server cannot be reached ({reason}); {way_out}")
    say(f"downloading {name} to {shown(places[0])}")
    try:
        fetch()
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Unavailable(f"the download of {name} failed ({reason}); run the command again") from None


def _unreachable(url: str) -> str:
    """Why `url` cannot be reached within PROBE_SECONDS, or "". Looking a name up has no time-out of its own: hence
    the thread."""
    answer = [f"no answer within {PROBE_SECONDS} seconds"]

    def probe():
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
            answer[0] = ""
        except urllib.error.HTTPError as error:
            answer[0] = f"HTTP status {error.code}"
        except Exception as error:  # whatever a proxy or a captive portal answers
            answer[0] = str(getattr(error, "reason", error)) or type(error).__name__

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answer[0]


# ---------------------------------------------------------------------------------------------- HDF5 files


class Rows(Sequence):
    """Pictures `start` to `stop` of a dataset of an HDF5 file, (N, H, W[, 3]) uint8, read when they are wanted, by any
    process, with those that follow: h5py's own chunks go through thousands of pictures, a few pixels of each, and all
    that cross a picture would be unpacked anew for every one."""

    def __init__(self, path: Path, name: str, start: int, stop: int):
        self.path, self.name, self.start, self.stop = path, name, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index):
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return Rows(self.path, self.name, self.start + start, self.start + stop)
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            data = _dataset(self.path, self.name, os.getpid())
            together = max(1, CHUNK_CACHE // math.prod(data.shape[1:]))
            first = self.start + index - index % together
            last = min(first + together, self.stop)
            with suppress(OSError):  # this picture may be whole where another one is not
                return _rows(self.path, self.name, first, last, os.getpid())[index % together]
            return data[self.start + index]
        except (OSError, RuntimeError) as error:
            raise UserError(f"{self.name} {self.start + index} cannot be read ({one_line(error)})") from None


@lru_cache(maxsize=1)
def _rows(path: Path, name: str, start: int, stop: int, process: int) -> np.ndarray:
    return _dataset(path, name, process)[start:stop]


@lru_cache(maxsize=1)
def _dataset(path: Path, name: str, process: int):
    """A dataset, opened once a process (HDF5 does not survive a fork) and kept with the chunks that it has unpacked,
    one at least: HDF5 would unpack one that is larger than its cache anew for every picture."""
    import h5py

    with h5py.File(path, "r") as file:
        chunk = math.prod(file[name].chunks or (1,)) * file[name].dtype.itemsize
    return h5py.File(path, "r", rdcc_nbytes=max(CHUNK_CACHE, chunk))[name]


def _hdf5(path: Path, name: str) -> Source:
    """An HDF5 file with SPLIT/images (N, H, W[, 3]) uint8 and SPLIT/labels for train and for val or test, and an
    attribute `classes`, the names by label. Without val, test drives the learning rate."""
    import h5py

    try:
        with limited(path), h5py.File(path, "r") as file:
            names = np.atleast_1d(file.attrs["classes"])
            classes = [name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist()]
            found = {
                split: (file[split]["images"], file[split]["labels"])
                for split in ("train", "val", "test")
                if split in file
            }
            _check_hdf5(path, found)
            found = {split: (images, np.asarray(labels)) for split, (images, labels) in found.items()}
            _check_labels(path, classes, found)
            shape = found["train"][0].shape
            splits = {
                split: Split(_small_or_rows(images, path.resolve(), split), labels.astype(np.int64))
                for split, (images, labels) in found.items()
            }
    except UserError:
        raise
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        why = one_line(error) or type(error).__name__
        raise UserError(f"{path} cannot be read as a data set ({why}); data/README.md has its form") from None
    if "val" not in splits:
        say(f"{path} has no val/: its test/ drives the learning rate instead")
        splits["val"] = splits.pop("test")
    small = max(shape[1:3]) < 128
    channels = 1 if len(shape) == 3 else 3
    return Source(name, classes, splits, 72 if small else 256, "raw" if small else "jpeg", channels)


def _small_or_rows(images, path: Path, split: str) -> np.ndarray | Rows:
    return images[:] if images.nbytes <= SMALL_HDF5 else Rows(path, f"{split}/images", 0, len(images))


def _check_hdf5(path: Path, splits: dict) -> None:
    """Before anything is read: shapes, sizes, and whether all of it is in this file."""
    if "train" not in splits or len(splits) < 2:
        raise UserError(f"{path} needs train/ and val/ or test/, and has {', '.join(splits) or 'none of them'}")
    for split, (images, labels) in splits.items():
        grey = images.ndim == 3
        shaped = (grey or (images.ndim == 4 and images.shape[3] == 3)) and 0 not in images.shape[1:]
        if images.dtype != np.uint8 or not shaped:
            raise UserError(f"{path}: {split}/images must be uint8 (N, H, W) or (N, H, W, 3), not {images.dtype} "
                            f"{images.shape}")
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise UserError(f"{path}: {split}/labels must be whole numbers (N,), not {labels.dtype} {labels.shape}")
        if len(images) != len(labels) or not len(images):
            raise UserError(f"{path}: {split} has {len(images)} images and {len(labels)} labels")
        for name, data in (("images", images), ("labels", labels)):
            if data.is_virtual or data.external or data.file.filename != str(path):
                raise UserError(f"{path}: {split}/{name} lies in another file; copy it into this one")
            if math.prod(data.chunks or (1,)) * data.dtype.itemsize > MOST_CHUNK:
                raise UserError(f"{path}: {split}/{name} has chunks of {data.chunks}, which take too much memory to "
                                f"unpack; at most {MOST_CHUNK:,} bytes")
        if math.prod(images.shape[1:]) > MOST_CHUNK or len(images) > 10**8:
            raise UserError(f"{path}: {split}/images has an impossible shape, {images.shape}")


def _check_labels(path: Path, classes: list[str], splits: dict) -> None:
    for split, (_, labels) in splits.items():
        if labels.min() < 0 or labels.max() >= len(classes):
            raise UserError(f"{path}: {split}/labels go beyond the {len(classes)} classes of the file")
