"""data/sources.py: named sets on archives of their real format, trees and HDF5 files of users."""

import gzip
import hashlib
import io
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import pictures
from helpers import ROOT
from torchvision import datasets

from data import pack, sources
from data.pictures import to_square
from utils import UserError


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No data set on disk, no server that answers."""
    monkeypatch.setattr(sources, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    monkeypatch.setattr(sources, "_unreachable", lambda url: "no route")


def test_a_tree_is_stored_at_256_as_jpeg(tree):
    source = sources.find(str(tree))
    assert (source.size, source.codec) == (256, "jpeg")


# ---------------------------------------------------------------------------------------------- named sets


def cifar_archive(kind, folder, monkeypatch):
    """An archive of CIFAR's real layout with 20 training images a batch and 10 test images; torchvision's MD5 sums
    are those of these files."""
    rng = np.random.default_rng(0)
    hundred = kind is datasets.CIFAR100
    label_key, names = (b"fine_labels", 100) if hundred else (b"labels", 10)

    def batch(count):
        images = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {b"data": images, label_key: [int(n) for n in rng.integers(0, names, count)]}

    members = {name: batch(20) for name, _ in kind.train_list} | {name: batch(10) for name, _ in kind.test_list}
    meta_key = b"fine_label_names" if hundred else b"label_names"
    meta = {meta_key.decode(): [f"class {n}" for n in range(names)]}
    md5, folder_name = {}, kind.base_folder
    folder.mkdir()
    with tarfile.open(folder / kind.filename, "w:gz") as tar:
        for name, content in [*members.items(), (kind.meta["filename"], meta)]:
            blob = pickle.dumps({k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()})
            md5[name] = hashlib.md5(blob).hexdigest()
            info = tarfile.TarInfo(f"{folder_name}/{name}")
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5((folder / kind.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(kind, "train_list", [[name, md5[name]] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, md5[name]] for name, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5[kind.meta["filename"]]})
    return members


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_archives(name, tmp_path, monkeypatch, no_network):
    """An archive that lies in data/downloads is checked, unpacked and packed; a tenth is held out for validation."""
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    members = cifar_archive(kind, tmp_path / "downloads", monkeypatch)
    source = sources.find(name)
    total = 20 * len(kind.train_list)
    counts = {split: len(part.labels) for split, part in source.splits.items()}
    assert counts == {"train": total * 9 // 10, "val": total // 10, "test": 10}
    assert source.classes[:2] == ["class 0", "class 1"]
    assert source.channels == 3
    planes = members[kind.test_list[0][0]][b"data"].reshape(-1, 3, 32, 32)
    assert np.array_equal(source.splits["test"].pictures, planes.transpose(0, 2, 3, 1))
    store = pack.pack(source, tmp_path / "store")
    assert (store.size, store.codec, len(store.classes)) == (72, "raw", 10 if name == "cifar10" else 100)
    pixels, _ = store.split("test").read(np.arange(10))
    assert np.array_equal(pixels[3], to_square(source.splits["test"].pictures[3], 72))


def cifar_binary(name: str, members: dict, folder: Path) -> None:
    """The same records in the official binary form, as a folder: labels (CIFAR-100: coarse, fine), then the pixels."""
    place, _, train, test, names, labels = sources.CIFAR_BINARY[name]
    (folder / place).mkdir()
    for file in [*train, *test]:
        batch = members[file.removesuffix(".bin")]
        fine = np.array(batch[b"fine_labels" if name == "cifar100" else b"labels"], np.uint8)[:, None]
        coarse = np.full_like(fine, 7)[:, : labels - 1]
        np.hstack([coarse, fine, batch[b"data"]]).tofile(folder / place / file)
    count = 100 if name == "cifar100" else 10
    (folder / place / names).write_text("\n".join(f"class-{n}" for n in range(count)) + "\n\n")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_binary_form_has_the_same_records(name, packed, tmp_path, monkeypatch, no_network):
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    downloads = tmp_path / "downloads"
    members = cifar_archive(kind, downloads, monkeypatch)
    python_form = sources.find(name)
    monkeypatch.setattr(sources, "CIFAR_PICTURES", (20 * len(kind.train_list), 10))
    shutil.rmtree(downloads / kind.base_folder)
    (downloads / kind.filename).unlink()
    cifar_binary(name, members, downloads)
    if packed:
        folder, archive, *_ = sources.CIFAR_BINARY[name]
        with tarfile.open(downloads / archive, "w:gz") as tar:
            tar.add(downloads / folder, folder)
        shutil.rmtree(downloads / folder)
    source = sources.find(name, download=False)
    for split, part in python_form.splits.items():
        assert np.array_equal(source.splits[split].pictures, part.pictures)
        assert np.array_equal(source.splits[split].labels, part.labels)
    assert source.classes[3] == "class-3"
    assert source.size == 72


@pytest.mark.parametrize("harm", ["short", "empty", "labels", "missing", "torn archive", "no archive at all"])
def test_a_damaged_binary_form_is_one_line(harm, tmp_path, monkeypatch, no_network):
    downloads = tmp_path / "downloads"
    members = cifar_archive(datasets.CIFAR10, downloads, monkeypatch)
    (downloads / datasets.CIFAR10.filename).unlink()
    cifar_binary("cifar10", members, downloads)
    monkeypatch.setattr(sources, "CIFAR_PICTURES", (100, 10))
    folder, archive, *_ = sources.CIFAR_BINARY["cifar10"]
    file = downloads / folder / "data_batch_2.bin"
    content = file.read_bytes()
    if harm == "short":
        file.write_bytes(content[:-1])
    elif harm == "empty":
        file.write_bytes(b"")
    elif harm == "labels":
        file.write_bytes(b"\x0a" + content[1:])
    elif harm == "missing":
        file.unlink()
    else:
        with tarfile.open(downloads / archive, "w:gz") as tar:
            tar.add(downloads / folder, folder)
        shutil.rmtree(downloads / folder)
        whole = (downloads / archive).read_bytes()
        (downloads / archive).write_bytes(whole[: len(whole) // 2] if harm == "torn archive" else b"<html>")
    with pytest.raises(UserError, match=r"cifar-10-(batches-bin|binary.tar.gz) (is damaged|cannot be read)") as caught:
        sources.find("cifar10")
    assert "\n" not in str(caught.value)


def test_a_torn_cifar_archive_is_not_taken_and_nothing_is_fetched(tmp_path, monkeypatch, no_network):
    """What a killed download leaves: the fallback, the probe and --download no still work."""
    cifar_archive(datasets.CIFAR10, tmp_path / "downloads", monkeypatch)
    file = tmp_path / "downloads" / datasets.CIFAR10.filename
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(sources.Unavailable, match="--download no forbids"):
        sources.find("cifar10", download=False)
    with pytest.raises(sources.Unavailable, match="no route"):
        sources.find("cifar10")


def test_a_failed_download_is_one_line(monkeypatch, no_network):
    monkeypatch.setattr(sources, "_unreachable", lambda url: "")

    def fails(*_, **__):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(datasets.FashionMNIST, "download", fails)
    with pytest.raises(sources.Unavailable, match=r"failed \(first line\); run the command again"):
        sources.find("fashion-mnist")


def idx(array) -> bytes:
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_fashion_mnist_files(tmp_path, no_network):
    """The four original files where Debian's package puts them."""
    folder = tmp_path / "debian"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images, labels = {}, {}
    for part, count in (("train", 50), ("t10k", 10)):
        images[part] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels[part] = rng.integers(0, 10, count, dtype=np.uint8)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[part])))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels[part])))
    source = sources.find("fashion-mnist")
    assert {s: len(p.labels) for s, p in source.splits.items()} == {"train": 45, "val": 5, "test": 10}
    assert source.channels == 1
    assert np.array_equal(source.splits["test"].pictures, images["t10k"])
    assert np.array_equal(source.splits["test"].labels, labels["t10k"])
    together = {p.tobytes() for s in ("train", "val") for p in source.splits[s].pictures}
    assert together == {p.tobytes() for p in images["train"]}
    blob = (folder / "train-images-idx3-ubyte.gz").read_bytes()
    for damaged in (blob[:-100], blob[:200] + b"\0\0" + blob[202:], b""):
        (folder / "train-images-idx3-ubyte.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz is damaged"):
            sources.find("fashion-mnist")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_a_set_that_cannot_be_had_says_why(name, no_network):
    with pytest.raises(sources.Unavailable, match=rf"{name} is not in .*cannot be reached \(no route\)"):
        sources.find(name)
    with pytest.raises(sources.Unavailable, match="--download no forbids"):
        sources.find(name, download=False)


def test_the_probe_gives_up_in_time(monkeypatch):
    """A server that accepts and never answers, on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(sources, "PROBE_SECONDS", 0.3)
        began = time.monotonic()
        assert sources._unreachable(f"http://127.0.0.1:{server.getsockname()[1]}/x")
        assert time.monotonic() - began < 2


def test_the_bundled_sample():
    """6,000 training, 1,000 validation, 1,000 test images, the ten classes equally often; at most 4 MB."""
    source = sources.find("sample")
    assert {s: np.bincount(p.labels).tolist() for s, p in source.splits.items()} == {
        "train": [600] * 10, "val": [100] * 10, "test": [100] * 10,
    }
    assert sources.SAMPLE.stat().st_size <= 4_000_000
    everything = np.concatenate([p.pictures for p in source.splits.values()]).reshape(8000, -1)
    assert len(np.unique(everything, axis=0)) > 7990  # Fashion-MNIST itself repeats a few pictures
    assert (sources.SAMPLE.parent / "LICENSE").exists()


# ---------------------------------------------------------------------------------------------- files of users


def test_a_tree_says_what_is_wrong_with_it(tree, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no folder train/; expected"):
        sources.find(str(tmp_path / "empty"))
    (tree / "val/bird").mkdir()
    with pytest.raises(UserError, match="differ: bird"):
        sources.find(str(tree))
    (tree / "train/bird").mkdir()
    with pytest.raises(UserError, match="bird holds no pictures"):
        sources.find(str(tree))
    (tree / "train/bird").rename(tree / "train/caf\u00e9")
    (tree / "val/bird").rename(tree / "val/cafe\u0301")
    shutil.copy(tree / "train/cat/0.png", tree / "train/caf\u00e9")
    with pytest.raises(UserError, match=r"differ: .*; some look the same, but their accents are written in"):
        sources.find(str(tree))
    (tree / "val").rename(tree / "old")
    (tree / "val").mkdir()
    with pytest.raises(UserError, match=r"val has no class folders, .*train has 3: fill it, or take it away"):
        sources.find(str(tree))
    with pytest.raises(UserError, match="phtos: no such data set, folder or file"):
        sources.find("phtos", val=0.2)


def test_a_store_is_no_source(store):
    with pytest.raises(UserError, match=r"is a store already, which train.py --data takes"):
        sources.find(str(store.path))


def test_a_folder_called_like_a_named_set_is_not_that_set(tree):
    assert sources.find(str(tree.rename(tree.parent / "sample"))).name == "my-sample"


def test_a_long_name_leaves_room_for_what_comes_after_it(tree):
    """Files' names have 255 bytes at most; data.pack and train.py add to this one."""
    long = tree.rename(tree.parent / ("x" + "é" * 69))
    assert sources.find(str(long)).name == "x" + "é" * 39


def test_one_class_is_refused(tree):
    for split in ("train", "val"):
        shutil.rmtree(tree / split / "dog")
    with pytest.raises(UserError, match=r"one class only \(cat\)"):
        sources.find(str(tree))


def hdf5(path, **parts):
    with h5py.File(path, "w") as file:
        file.attrs["classes"] = ["a", "b"]
        for split, (images, labels) in parts.items():
            file[f"{split}/images"], file[f"{split}/labels"] = images, labels
    return str(path)


@pytest.mark.parametrize("at_once", [0, 10**6])
def test_hdf5_files(tmp_path, monkeypatch, at_once):
    """Small ones are read whole, large ones a picture at a time, by the workers."""
    monkeypatch.setattr(sources, "SMALL_HDF5", at_once)
    images, labels = pictures(8, (40, 40, 3)), np.arange(8) % 2
    source = sources.find(hdf5(tmp_path / "x.h5", train=(images, labels), test=(images[:4], labels[:4])))
    assert list(source.splits) == ["train", "val"]  # the only other split drives the learning rate
    assert np.array_equal(np.stack(source.splits["train"].pictures), images)
    assert (source.name, source.size, source.codec, source.channels) == ("x", 72, "raw", 3)
    assert (type(source.splits["val"].pictures) is np.ndarray) == bool(at_once)
    assert sources.find(hdf5(tmp_path / "Y.H5", train=(images, labels), test=(images[:4], labels[:4]))).name == "Y"
    store = pack.pack(source, tmp_path / "store", workers=2)
    assert np.array_equal(store.split("train").read(np.arange(8))[0], [to_square(image, 72) for image in images])
    for parts, message in (
        ({"train": (images, labels)}, "needs train/ and val/"),
        ({"train": (images, labels[:5]), "val": (images, labels)}, "8 images and 5 labels"),
        ({"train": (images, labels + 1), "val": (images, labels)}, "beyond the 2 classes"),
        ({"train": (images.astype(float), labels), "val": (images, labels)}, r"uint8 .* not float64 \(8, 40, 40, 3\)"),
        ({"train": (images, np.eye(2)[labels]), "val": (images, labels)}, r"numbers \(N,\), not float64 \(8, 2\)"),
        ({"train": (images, [b"a"] * 8), "val": (images, labels)}, "must be whole numbers"),
    ):
        with pytest.raises(UserError, match=message):
            sources.find(hdf5(tmp_path / "bad.h5", **parts))
    with h5py.File(tmp_path / "flat.h5", "w") as file:
        file["train"], file.attrs["classes"] = images, 3
    with pytest.raises(UserError, match="cannot be read as a data set"):
        sources.find(str(tmp_path / "flat.h5"))
    (tmp_path / "no.h5").write_bytes(b"not HDF5")
    with pytest.raises(UserError, match="cannot be read"):
        sources.find(str(tmp_path / "no.h5"))


def hostile_hdf5(path, images=None, labels=None):
    """An HDF5 file of 20 training and validation pictures; images and labels, if given, make the training split's."""
    with h5py.File(path, "w") as file:
        file.attrs["classes"] = ["a", "b"]
        for split in ("train", "val"):
            file.create_group(split)
            (images if images and split == "train" else plain_images)(file, f"{split}/images")
            (labels if labels and split == "train" else plain_labels)(file, f"{split}/labels")
    return str(path)


def plain_images(file, name):
    file[name] = pictures(20, (40, 40, 3))


def plain_labels(file, name):
    file[name] = np.arange(20) % 2


def test_hdf5_files_that_claim_too_much_or_lead_outside_are_refused(tmp_path):
    """Before memory is taken for a chunk, a picture or a list of labels, and before another file is read."""
    hostile_hdf5(tmp_path / "other.h5")
    chunk = {"dtype": "u1", "chunks": (1, 30_000, 30_000, 3), "compression": "gzip"}
    layout = h5py.VirtualLayout((20, 40, 40, 3), "u1")
    layout[:] = h5py.VirtualSource("other.h5", "train/images", (20, 40, 40, 3))
    external = [(str(tmp_path / "pixels"), 0, 20 * 40 * 40 * 3)]
    cases = {
        "which take too much memory": {"images": lambda f, n: f.create_dataset(n, (20, 30_000, 30_000, 3), **chunk)},
        "an impossible shape": {"images": lambda f, n: f.create_dataset(n, (20, 10**5, 10**5, 3), "u1")},
        "20 images and 1000000000000 labels": {"labels": lambda f, n: f.create_dataset(n, (10**12,), "i8")},
        "train/images lies in another file": {"images": lambda f, n: f.create_virtual_dataset(n, layout)},
        "images lies in another file": {
            "images": lambda f, n: f.create_dataset(n, (20, 40, 40, 3), "u1", external=external)},
        "labels lies in another file": {
            "labels": lambda f, n: f.__setitem__(n, h5py.ExternalLink("other.h5", "train/labels"))},
    }
    for number, (message, parts) in enumerate(cases.items()):
        with pytest.raises(UserError, match=message):
            sources.find(hostile_hdf5(tmp_path / f"{number}.h5", **parts))
    assert sources.find(hostile_hdf5(tmp_path / "sound.h5")).classes == ["a", "b"]


def test_a_large_chunk_of_hdf5_is_unpacked_once(tmp_path, monkeypatch):
    """HDF5 keeps no chunk that is larger than its cache."""
    monkeypatch.setattr(sources, "SMALL_HDF5", 0)
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("train/images", data=pictures(8, (40, 40, 3)), chunks=(8, 40, 40, 3), compression="gzip")
    for least, cache in ((10**4, 8 * 40 * 40 * 3), (10**5, 10**5)):
        monkeypatch.setattr(sources, "CHUNK_CACHE", least)
        sources._dataset.cache_clear()
        assert sources._dataset(path, "train/images", 0).id.get_access_plist().get_chunk_cache()[1] == cache
    sources._dataset.cache_clear()


def test_chunks_of_hdf5_that_go_through_many_pictures_are_unpacked_once_a_block(tmp_path, monkeypatch):
    """h5py's own do. A picture that can't be read takes no other one with it."""
    monkeypatch.setattr(sources, "SMALL_HDF5", 0)
    monkeypatch.setattr(sources, "CHUNK_CACHE", 6 * 40 * 40 * 3)
    images = pictures(20, (40, 40, 3))
    path = hostile_hdf5(tmp_path / "x.h5", images=lambda f, n: f.create_dataset(n, data=images, chunks=(20, 4, 4, 1)))
    part = sources.find(path).splits["train"].pictures[3:17]
    read, real = [], h5py.Dataset.__getitem__
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda self, index: read.append(index) or real(self, index))
    assert all(np.array_equal(part[i], images[3 + i]) for i in range(14))
    assert read == [slice(3, 9), slice(9, 15), slice(15, 17)]

    def torn(self, index):
        if isinstance(index, slice) or index == 5:
            raise OSError("no")
        return real(self, index)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", torn)
    sources._rows.cache_clear()
    assert np.array_equal(part[1], images[4])
    with pytest.raises(UserError, match=r"train/images 5 cannot be read \(no\)"):
        part[2]
    sources._dataset.cache_clear()


def test_hdf5_that_leads_its_library_in_circles_ends_with_one_line(tmp_path):
    """Names in a heap whose first object takes no room: libhdf5 looks for the second one for ever."""
    path = Path(hostile_hdf5(tmp_path / "a.h5"))
    content = bytearray(path.read_bytes())
    heap = content.index(b"GCOL") + 16
    content[heap : heap + 16] = bytes(16)
    path.write_bytes(content)
    look = f"from data import guard, sources; guard.LONGEST = 1; sources.find({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, timeout=300)
    why = "reading it crashed, or did not come to an end in 1 seconds; copy it again"
    assert (done.returncode, done.stderr) == (2, f"error: {path} is damaged: {why}\n")


def test_hdf5_whose_links_are_damaged_is_one_line(tmp_path):
    path = Path(hostile_hdf5(tmp_path / "a.h5"))
    path.write_bytes(path.read_bytes().replace(b"SNOD", b"SNOB"))
    with pytest.raises(UserError, match=r"cannot be read as a data set \(\w"):
        sources.find(str(path))


def test_packed_files_that_unpack_to_more_than_they_may_are_damaged(no_network):
    """300 MB of zeros in 300 KB."""
    raw = sources.DOWNLOADS / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for name, _ in datasets.FashionMNIST.resources:
        (raw / name).write_bytes(gzip.compress(bytes(300_000_000), 1))
    with pytest.raises(UserError, match=r"is damaged .more than 268,435,456 bytes"):
        sources.find("fashion-mnist")
