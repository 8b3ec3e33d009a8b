"""Sound files of every kind that a command takes, to be damaged by mutate.py. Each is made once."""

import io
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.faults import Lost, imagenet_files, pictures, run, small_run
from checkpoints import export
from data import pack, sources


def copy_run(run: Path, out: Path) -> Path:
    """A run's folder. Checkpoints are links: commands replace them by others and write into none."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for path in run.iterdir():
        (os.link if path.suffix == ".pt" else shutil.copyfile)(path, out / path.name)
    return out


def made(path: Path, main: Callable, argv: list) -> Path:
    """A file or folder that a command makes, in a fork."""
    if not path.exists():
        ended = run(main, argv, path.parent)
        if ended.status:
            raise Lost(f"before any fault: {ended.err}")
    return path


def safetensors_file(place: Path) -> Path:
    path = place / "best.safetensors"
    return made(path, export.main, [small_run(place) / "best.pt", path])


def torchvision_file(place: Path) -> Path:
    """A state_dict of torchvision's alexnet for four classes."""
    path = place / "alexnet.pth"

    def main(_) -> int:
        import torch
        from torchvision.models import alexnet

        torch.save(alexnet(num_classes=4).state_dict(), path)
        return 0

    return made(path, main, [])


# ---------------------------------------------------------------------------------------------- pictures


def picture(rng: np.random.Generator) -> tuple[str, bytes]:
    """(name, content) of one in any of the formats and modes that people have."""
    array = pictures(1, (90, 120, 3), int(rng.integers(1000)))[0]
    form, ending, mode, options = PICTURE_KINDS[rng.integers(len(PICTURE_KINDS))]
    image = Image.fromarray(array[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(array)
    buffer = io.BytesIO()
    (image if mode == "I;16" else image.convert(mode)).save(buffer, form, **options)
    return f"a{ending}", buffer.getvalue()


PICTURE_KINDS = (
    ("JPEG", ".jpg", "RGB", {"quality": 95}), ("JPEG", ".jpg", "RGB", {"progressive": True}),
    ("JPEG", ".JPEG", "L", {}), ("JPEG", ".JPEG", "CMYK", {}), ("PNG", ".png", "RGB", {}), ("PNG", ".png", "P", {}),
    ("PNG", ".png", "RGBA", {}), ("PNG", ".png", "I;16", {}), ("PNG", ".jpg", "RGB", {}), ("GIF", ".gif", "P", {}),
    ("TIFF", ".tif", "RGB", {}), ("TIFF", ".tif", "I;16", {}), ("WEBP", ".webp", "RGB", {}), ("BMP", ".bmp", "RGB", {}),
)


def photographs(place: Path) -> Path:
    """A store of JPEG pictures with names; its classes are those of the small store. Made once."""
    tree, store = place / "tree", place / "photographs"
    if not store.exists():
        for number in range(48):
            path = tree / ("train" if number % 2 else "val") / f"class {number // 2 % 4}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pictures(1, (90, 120, 3), number)[0]).save(path)
    return made(store, pack.main, [tree, "--out", store, "--size", 72, "--codec", "jpeg", "--workers", 1])


# ---------------------------------------------------------------------------------------------- sets of pictures

LAYOUTS = {  # what is damaged in each
    "official": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"),
    "kaggle": ("LOC_val_solution.csv", "LOC_synset_mapping.txt"), "lists": ("train.txt", "val.txt"), "hdf5": ("",),
}


def picture_set(folder: Path, layout: str, classes: int = 20) -> Path:
    """A small set in one of the LAYOUTS; hdf5 is a single file. Returns its place."""
    if layout != "hdf5":
        return imagenet_files.LAYOUTS[layout](folder, classes, **({"absolute": False} if layout == "lists" else {}))
    import h5py

    file = folder.with_suffix(".h5")
    with h5py.File(file, "w") as h5:
        h5.attrs["classes"] = ["a", "b"]
        for split, count in (("train", 40), ("val", 10)):
            data = pictures(count, (40, 40, 3), count)
            h5.create_dataset(f"{split}/images", data=data, compression="gzip", chunks=(4, 40, 40, 3))
            h5[f"{split}/labels"] = np.arange(count) % 2
    return file


def packed(place: str, out: Path, workers: int = 2) -> dict:
    """Pack a source, in a process that does nothing else. The counts listed and packed, the pictures skipped and
    repaired, and how many records show another class than their label's (imagenet_files' pictures show theirs). Raises
    UserError."""
    pack.MAX_SKIPPED = 1  # imagenet_files has a broken picture
    source = sources.find(place)
    store = pack.pack(source, out, size=64, codec="raw", workers=workers)
    wrong = 0
    for split in set(store.counts) - {"test"}:
        images, labels = store.split(split).read(np.arange(store.counts[split]))
        seen = [imagenet_files.label_of(image) for image in images]
        wrong += sum(one != other for one, other in zip(seen, labels.tolist(), strict=True))
    return {
        "listed": sum(len(part.labels) for part in source.splits.values()), "records": sum(store.counts.values()),
        "skipped": store.manifest["skipped"], "repaired": store.manifest["repaired"],
        "mislabelled": wrong if store.wnids else 0,
    }


# ---------------------------------------------------------------------------------------------- Caffe's files


def caffe_file(path: Path) -> None:
    """A .caffemodel by its published field numbers. Its blobs are too small for AlexNet: it is read, then refused."""
    order = ("conv1", "norm1", "pool1", "conv2", "norm2", "pool2", "conv3", "conv4", "conv5", "pool5", "fc6", "fc7",
             "fc8")
    lrn = field(1, 5) + field(2, struct.pack("<f", 1e-4)) + field(3, struct.pack("<f", 0.75))
    content = field(1, b"AlexNet")
    for name in order:
        layer = field(4, name.encode())
        if name[0] in "cf":
            layer += field(6, blob(np.ones((4, 3, 2, 2)))) + field(6, blob(np.ones(4)))
        content += field(2, layer + (field(18, lrn) if name[0] == "n" else b""))
    path.write_bytes(content)


def mean_file(path: Path) -> None:
    """A mean image as Caffe's users have it, .npy or .binaryproto."""
    mean = np.full((3, 256, 256), 110, np.float32)
    if path.suffix == ".npy":
        np.save(path, mean)
    else:
        path.write_bytes(blob(mean))


def blob(array: np.ndarray) -> bytes:
    """BlobProto: shape 7 with dim 1, packed; data 5, packed."""
    return field(7, field(1, b"".join(map(varint, array.shape)))) + field(5, array.astype("<f4").tobytes())


def field(index: int, content: bytes | int) -> bytes:
    """A field of protobuf's; four bytes are a float, all others a string of bytes."""
    if isinstance(content, int):
        return varint(index << 3) + varint(content)
    if len(content) == 4 and index in (2, 3):
        return varint(index << 3 | 5) + content
    return varint(index << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
