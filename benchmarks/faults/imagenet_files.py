"""ILSVRC-2012 in small, in every layout that people have: the same pictures each time.

Two training pictures and one validation picture of each of the 1000 classes, 20 test pictures; a few are odd, and one
is broken. The colour of a picture says which class it is of.
"""

import gzip
import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from data.trees import ilsvrc_wnids

WNIDS = ilsvrc_wnids()


def val_labels(count: int = 1000) -> list[int]:
    """Labels of ILSVRC2012_val_00000001, 2, ..."""
    return np.random.default_rng(1).permutation(count).tolist()


def kit_numbers(count: int = 1000) -> list[int]:
    """The development kit's number of each class."""
    return (np.random.default_rng(2).permutation(count) + 1).tolist()


def picture(label: int, form: str = "JPEG", mode: str = "RGB") -> bytes:
    """A picture of one colour: red, green and blue are the label's three digits."""
    buffer = io.BytesIO()
    colour = tuple(25 * int(digit) for digit in f"{label:03d}")
    Image.new("RGB", (20, 16), colour).convert(mode).save(buffer, form)
    return buffer.getvalue()


def label_of(pixels: np.ndarray) -> int:
    """The class that a picture's middle shows."""
    red, green, blue = (pixels[pixels.shape[0] // 2, pixels.shape[1] // 2] / 25).round().tolist()
    return int(100 * red + 10 * green + blue)


def files(count: int = 1000) -> dict[str, dict[str, tuple[int, bytes]]]:
    """{split: {name: (label, bytes)}} of the first `count` classes."""
    train = {}
    for label, wnid in enumerate(WNIDS[:count]):
        for number in (18, 1003):  # sorted as words: 1003 comes first
            train[f"{wnid}_{number}.JPEG"] = label, picture(label)
    train[f"{WNIDS[0]}_18.JPEG"] = 0, picture(0, mode="CMYK")
    train[f"{WNIDS[7]}_18.JPEG"] = 7, picture(7, form="PNG")
    train[f"{WNIDS[count // 2]}_1003.JPEG"] = count // 2, b"broken"
    val = {
        f"ILSVRC2012_val_{number:08d}.JPEG": (label, picture(label))
        for number, label in enumerate(val_labels(count), 1)
    }
    test = {f"ILSVRC2012_test_{number:08d}.JPEG": (-1, picture(number)) for number in range(1, 21)}
    return {"train": train, "val": val, "test": test}


def tree(root: Path, count: int = 1000) -> Path:
    for split, content in files(count).items():
        for name, (label, data) in content.items():
            write(root / split / ("" if label < 0 else WNIDS[label]) / name, data)
    return root


def kaggle(root: Path, count: int = 1000) -> Path:
    made = files(count)
    for split, content in made.items():
        for name, (label, data) in content.items():
            write(root / "ILSVRC/Data/CLS-LOC" / split / (WNIDS[label] if split == "train" else "") / name, data)
    lines = ["ImageId,PredictionString"]
    for name, (label, _) in reversed(made["val"].items()):
        lines.append(f"{Path(name).stem},{WNIDS[label]} 85 1 499 272 {WNIDS[label]} 3 4 5 6 ")
    (root / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    mapping = "".join(f"{wnid} words, of class {label}\n" for label, wnid in enumerate(WNIDS[:count]))
    (root / "LOC_synset_mapping.txt").write_text(mapping)
    return root


def official(root: Path, count: int = 1000) -> Path:
    """Members in an order of their own, as in the real tars; the classes' tars in another one."""
    root.mkdir(parents=True)
    content = files(count)
    by_class: dict[int, dict] = {}
    for name, (label, data) in content["train"].items():
        by_class.setdefault(label, {})[name] = data
    classes = {f"{WNIDS[label]}.tar": tar_bytes(by_class[label]) for label in sorted(by_class, reverse=True)}
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(classes))
    shuffled = sorted(content["val"].items(), key=lambda item: item[0][::-1])
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes({name: data for name, (_, data) in shuffled}))
    test = {f"test/{name}": data for name, (_, data) in content["test"].items()}
    (root / "ILSVRC2012_img_test_v10102019.tar").write_bytes(tar_bytes(test))
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(kit(count), mtime=0))
    return root


def kit(count: int = 1000) -> bytes:
    truth = "".join(f"{kit_numbers(count)[label]}\n" for label in val_labels(count))
    return tar_bytes({
        "ILSVRC2012_devkit_t12/readme.txt": b"",
        "ILSVRC2012_devkit_t12/data/meta.mat": meta(count),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    })


def meta(count: int = 1000) -> bytes:
    """synsets as in the kit: the classes in the order of their numbers, then inner nodes of the tree."""
    from scipy.io import savemat

    columns = ("ILSVRC2012_ID", "WNID", "words", "num_children")
    numbered = sorted(zip(kit_numbers(count), WNIDS[:count], strict=True))
    rows = [(number, wnid, f"words, of {wnid}", 0) for number, wnid in numbered]
    rows += [(count + 1, "n00001740", "entity", 2), (count + 2, "n00001930", "physical entity", 1)]
    synsets = np.empty((len(rows), 1), [(column, object) for column in columns])
    for row, values in enumerate(rows):
        synsets[row, 0] = values
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    return buffer.getvalue()


def lists(root: Path, count: int = 1000, absolute: bool = True) -> Path:
    """Caffe's train.txt, val.txt and test.txt beside the pictures, half of the paths absolute; test.txt has label 0
    everywhere, as Caffe's has."""
    tree(root, count)
    lines = {"train": [], "val": [], "test": []}
    for split, content in files(count).items():
        for number, (name, (label, data)) in enumerate(content.items()):
            if split == "val":  # Caffe's validation pictures lie flat
                os.remove(root / split / WNIDS[label] / name)
                write(root / split / name, data)
            path = f"{WNIDS[label]}/{name}" if split == "train" else name
            lines[split].append(f"{root / split / path if absolute and number % 2 else path} {max(0, label)}")
        (root / f"{split}.txt").write_text("\n".join(lines[split]) + "\n")
    for wnid in WNIDS[:count]:
        shutil.rmtree(root / "val" / wnid)
    return root


LAYOUTS = {"tree": tree, "kaggle": kaggle, "official": official, "lists": lists}


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def tar_bytes(content: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
