"""Sources: where pictures come from before they are packed. Named sets (torchvision fetches and checks their
archives), ImageFolder trees and HDF5 files."""

import gzip
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data import UserError
from data.cli import shown

NAMED = ("cifar10", "cifar100", "fashion-mnist", "sample")
DOWNLOADS = Path(__file__).parent / "downloads"
SAMPLE = Path(__file__).parent / "sample" / "fashion-mnist-sample.h5"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
# How a picture becomes a square: in stores, and as Caffe's users did it before packing.
SHORTER_SIDE, WARPED = "shorter side, antialiased bilinear, centre", "warped, antialiased bilinear"
VALIDATION = 5000  # training images that a named small set gives up for validation
VALIDATION_SEED = 2012
PROBE_SECONDS = 5


class Unavailable(UserError):
    """A named set that is neither on disk nor can be downloaded."""


@dataclass
class Split:
    """Pictures (paths, or uint8 arrays (H, W) or (H, W, 3)) and their labels, (n,) int64."""

    pictures: Sequence
    labels: np.ndarray


@dataclass
class Source:
    """What a store is packed from. size and codec are the store's defaults; channels is 1 for a grey set."""

    name: str
    classes: list[str]
    splits: dict[str, Split]
    size: int
    codec: str
    channels: int


def to_square(
    picture: Path | np.ndarray | Image.Image, size: int, channels: int = 3, resize: str = SHORTER_SIDE
) -> np.ndarray:
    """A picture as (size, size, channels) uint8: the shorter side resized to `size`, antialiased (Pillow's bilinear
    filter), and the centre kept (paper, section 2). The one way into a store and into a net, `channels` 1 or 3.
    resize: WARPED instead squeezes the whole picture into the square, as Caffe's users did; for converted nets only.

    Raises UserError for a file that cannot be read as a picture.
    """
    if isinstance(picture, Path):
        picture = open_picture(picture)
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    picture = _upright(picture)
    if picture.mode.startswith("I"):  # 16 bits a pixel: convert() would clip them to white
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8))
    picture = picture.convert("L" if channels == 1 else "RGB")
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    # Pillow's box: pixels beside the square still count where the filter reaches over its edge.
    box = None if resize == WARPED else (left, top, left + side, top + side)
    square = picture.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(square).reshape(size, size, channels)


def open_picture(path: Path) -> Image.Image:
    """A picture from a file, decoded. Raises UserError."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        raise UserError(f"{path} cannot be read as a picture ({error})") from None


def _upright(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF tag says; a picture whose EXIF block is damaged stays as it is."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # struct.error, AttributeError, SyntaxError, ... by what the damage hits
        return picture


def find(name: str, download: bool = True) -> Source:
    """The source called `name`: a named set or a path. Raises UserError where there is none or it cannot be used,
    and Unavailable where a named set is not on disk and cannot be downloaded."""
    if name in ("cifar10", "cifar100"):
        source = _cifar(name, download)
    elif name == "fashion-mnist":
        source = _fashion_mnist(download)
    elif name == "sample":
        source = _hdf5(SAMPLE, name)
    else:
        source = _from_path(Path(name))
    if len(source.classes) < 2:
        raise UserError(f"{name} has one class only ({source.classes[0]}); at least two are needed")
    return source


def _from_path(path: Path) -> Source:
    if path.is_dir():
        return _image_folder(path)
    if path.suffix in (".h5", ".hdf5") and path.is_file():
        return _hdf5(path, _own_name(path.stem))
    if path.exists():
        raise UserError(f"{path} is neither a folder nor an .h5 file")
    raise UserError(f"{path}: no such data set, folder or file; the named sets are {', '.join(NAMED)}")


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
        # A whole archive that lies there is unpacked; nothing is fetched then.
        train = load(True, fetch=check_integrity(str(DOWNLOADS / kind.filename), kind.tgz_md5))
    except RuntimeError:  # not there, or its checksum is wrong
        _fetch(name, kind.url, download, lambda: load(True, fetch=True), [DOWNLOADS])
        train = load(True)
    test = load(False)
    return _small(
        name,
        list(train.classes),
        Split(train.data, np.asarray(train.targets, np.int64)),
        Split(test.data, np.asarray(test.targets, np.int64)),
    )


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
        with gzip.open(path) as file:
            content = file.read()
        dimensions = content[3]
        shape = np.frombuffer(content, ">u4", count=dimensions, offset=4).astype(int)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); remove the folder, or install the package again") from None


def _fetch(name: str, url: str, allowed: bool, fetch, places: list[Path]) -> None:
    """Download a named set after a probe of its server, or raise Unavailable with the reason."""
    where = " or ".join(shown(place) for place in places)
    way_out = f"put {'its four .gz files' if name == 'fashion-mnist' else url} into {shown(places[0])}"
    if not allowed:
        raise Unavailable(f"{name} is not in {where}, and --download no forbids fetching it; {way_out}")
    reason = _unreachable(url)
    if reason:
        raise Unavailable(f"{name} is not in {where}, and its server cannot be reached ({reason}); {way_out}")
    print(f"downloading {name} to {shown(places[0])}", flush=True)
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


# ---------------------------------------------------------------------------------------------- files of users


def _image_folder(root: Path) -> Source:
    """A tree ROOT/train/CLASS/..., ROOT/val/CLASS/... and perhaps ROOT/test/CLASS/..., files at any depth."""
    for needed in ("train", "val"):
        if not (root / needed).is_dir():
            raise UserError(f"{root} has no folder {needed}/; expected {root}/{{train,val}}/CLASS/PICTURES")
    classes = _subfolders(root / "train")
    if not classes:
        raise UserError(f"{root / 'train'} has no class folders; expected {root}/train/CLASS/PICTURES")
    splits = {}
    for split in ("train", "val", "test"):
        folder = root / split
        if not folder.is_dir():
            continue
        found = _subfolders(folder)
        if found != classes:
            odd = sorted(set(found) ^ set(classes))
            raise UserError(f"the class folders of {folder} and {root / 'train'} differ: {', '.join(odd[:5])}")
        splits[split] = _labelled_files(folder, classes)
    return Source(_own_name(root.resolve().name), classes, splits, size=256, codec="jpeg", channels=3)


def _own_name(name: str) -> str:
    """A user's own data set never has the name of a named one."""
    return f"my-{name}" if name in NAMED else name


def _subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _labelled_files(folder: Path, classes: list[str]) -> Split:
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in EXTENSIONS and p.name[0] != ".")
        if not files:
            raise UserError(f"{folder / name} holds no pictures ({', '.join(sorted(EXTENSIONS))})")
        paths += files
        labels += [label] * len(files)
    return Split(paths, np.asarray(labels, np.int64))


def _hdf5(path: Path, name: str) -> Source:
    """An HDF5 file with SPLIT/images (N, H, W[, 3]) uint8 and SPLIT/labels for train and for val or test, and an
    attribute `classes`, the names by label. Without val, test drives the learning rate."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            names = np.atleast_1d(file.attrs["classes"])
            classes = [name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist()]
            splits = {
                split: Split(file[split]["images"][:], np.asarray(file[split]["labels"]))
                for split in ("train", "val", "test")
                if split in file
            }
    except (OSError, KeyError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as a data set ({reason}); data/README.md has its form") from None
    _check_hdf5(path, classes, splits)
    if "val" not in splits:
        print(f"{path} has no val/: its test/ drives the learning rate instead", flush=True)
        splits["val"] = splits.pop("test")
    for part in splits.values():
        part.labels = part.labels.astype(np.int64)
    images = splits["train"].pictures
    small = max(images.shape[1:3]) < 128
    channels = 1 if images.ndim == 3 else 3
    return Source(name, classes, splits, 72 if small else 256, "raw" if small else "jpeg", channels)


def _check_hdf5(path: Path, classes: list[str], splits: dict[str, Split]) -> None:
    if "train" not in splits or len(splits) < 2:
        raise UserError(f"{path} needs train/ and val/ or test/, and has {', '.join(splits) or 'none of them'}")
    for split, part in splits.items():
        images, labels = part.pictures, part.labels
        grey = images.ndim == 3
        if images.dtype != np.uint8 or not (grey or (images.ndim == 4 and images.shape[3] == 3)):
            raise UserError(f"{path}: {split}/images must be uint8 (N, H, W) or (N, H, W, 3), not {images.shape}")
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise UserError(f"{path}: {split}/labels must be whole numbers (N,), not {labels.shape} {labels.dtype}")
        if len(images) != len(labels) or not len(images):
            raise UserError(f"{path}: {split} has {len(images)} images and {len(labels)} labels")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise UserError(f"{path}: {split}/labels go beyond the {len(classes)} classes of the file")
