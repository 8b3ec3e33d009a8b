"""Packing under attack: killed at random moments, and fed with mutated pictures and archives. Seeds are fixed."""

import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import pictures, small_source
from helpers import ROOT, content
from PIL import Image
from test_pictures import ODD

from benchmarks.faults import imagenet_files as small
from data import pack, sources

KILLS = 20
PICTURES, ARCHIVES = 240, 60  # mutated ones


# ---------------------------------------------------------------------------------------------- kills


def test_after_twenty_kills_the_store_is_that_of_an_unbroken_run(tmp_path):
    """SIGKILL at random moments, from the start to the last step: there is a whole store or none, and a restart ends in
    the same bytes. Only the packer itself is killed; its workers must end by themselves, or the pipe stays open."""
    source = small_source("x", counts=(300, 60, 40), shape=(300, 400, 3))

    def run(out: Path, pipe: int) -> None:
        os.dup2(pipe, 1)
        pack.pack(source, out, size=256, codec="jpeg", workers=2, shards=5)

    def packer(out: Path) -> tuple[multiprocessing.Process, int]:
        reading, writing = os.pipe()
        process = multiprocessing.get_context("fork").Process(target=run, args=(out, writing))
        process.start()
        os.close(writing)
        return process, reading

    began = time.monotonic()
    process, pipe = packer(tmp_path / "unbroken")
    process.join()
    os.close(pipe)
    seconds = time.monotonic() - began
    expected = content(tmp_path / "unbroken")
    rng, kills, whole, kept = np.random.default_rng(0), 0, 0, 0
    while kills < KILLS:
        process, pipe = packer(tmp_path / "out")
        process.join(rng.uniform(0, 0.7 * seconds))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            kept += len(list(tmp_path.glob(".out.packing/*-*.json")))
        while os.read(pipe, 1000):  # until the last process that can write to it has ended
            pass
        os.close(pipe)
        assert process.exitcode in (0, -signal.SIGKILL)
        if (tmp_path / "out").exists():
            assert content(tmp_path / "out") == expected
            shutil.rmtree(tmp_path / "out")
            shutil.rmtree(tmp_path / ".out.packing", ignore_errors=True)
            whole += 1
    pack.pack(source, tmp_path / "out", size=256, codec="jpeg", workers=2, shards=5)
    assert content(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".*"))
    assert whole  # some rounds came to their end ...
    assert kept  # ... and some kills met finished shards


# ---------------------------------------------------------------------------------------------- mutations


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


def packed_alone(*places: Path) -> tuple[list, int, str]:
    """Each packed by pack_alone.py in a process of its own, so that a crash, a hang or its memory shows: what became of
    each, the most bytes that it and two workers took, and what it said on stderr."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests/pack_alone.py", *places], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    return result["places"], result["memory"], done.stderr


def test_mutated_pictures_are_packed_or_named(tmp_path):
    """240 of every odd kind that test_pictures.py has: none crashes, hangs or takes memory; each is packed or named."""
    kinds = [ODD[kind][:2] for kind in ODD if "20,000" not in kind]
    for seed in range(PICTURES):
        rng = np.random.default_rng(seed)
        name, data = kinds[seed % len(kinds)]
        other = kinds[rng.integers(len(kinds))][1]
        path = tmp_path / "tree/train" / "ab"[seed % 2] / f"{seed:03d}{Path(name).suffix or '.jpg'}"
        small.write(path, mutated(data, other, rng))
    for label in "ab":
        small.write(tmp_path / f"tree/val/{label}/0.jpg", ODD["plain"][1])
    (done,), memory, stderr = packed_alone(tmp_path / "tree")
    skipped = [entry["picture"] for entry in done["skipped"]]
    assert done["records"] == PICTURES - len(skipped) + 2
    assert len(set(skipped)) == len(skipped)
    assert all(f"skipped in {tmp_path}/tree/train: {entry['reason']}\n" in stderr for entry in done["skipped"])
    assert 60 < len(skipped) < 220  # neither all nor none
    assert done["repaired"]["train"]["faulty JPEG data"]["count"]
    assert memory < 2e9


def archive(number: int, folder: Path) -> Path:
    """A set of 20 classes with one of its files mutated: tars inside and out, the kit, tables, lists, HDF5."""
    rng = np.random.default_rng(1000 + number)
    layout = ("official", "kaggle", "lists", "hdf5")[number % 4]
    if layout == "hdf5":
        file = folder.with_suffix(".h5")
        with h5py.File(file, "w") as h5:
            h5.attrs["classes"] = ["a", "b"]
            for split, count in (("train", 40), ("val", 10)):
                h5.create_dataset(f"{split}/images", data=pictures(count, (40, 40, 3)), compression="gzip",
                                  chunks=(4, 40, 40, 3))
                h5[f"{split}/labels"] = np.arange(count) % 2
        file.write_bytes(mutated(file.read_bytes(), b"HDF" * 100, rng))
        return file
    small.LAYOUTS[layout](folder, 20, **({"absolute": False} if layout == "lists" else {}))
    names = {
        "official": ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"],
        "kaggle": ["LOC_val_solution.csv", "LOC_synset_mapping.txt"], "lists": ["train.txt", "val.txt"],
    }[layout]
    file = folder / names[number // 4 % len(names)]
    file.write_bytes(mutated(file.read_bytes(), folder.name.encode() * 200, rng))
    return folder


def test_mutated_archives_are_packed_or_refused(tmp_path):
    """60 of each kind in turn. Nothing is lost without a word: what a set lists is packed or named, and a damaged list
    never gives more than the damaged lines other labels."""
    done, memory, _ = packed_alone(*(archive(number, tmp_path / f"{number:02d}") for number in range(ARCHIVES)))
    refused = [result for result in done if isinstance(result, str)]
    packed = [result for result in done if not isinstance(result, str)]
    assert len(done) == ARCHIVES
    assert all("\n" not in line and line for line in refused)
    for result in packed:
        assert result["listed"] == result["records"] + len(result["skipped"])
        assert result["mislabelled"] <= 3
    assert min(len(refused), len(packed)) > 5
    assert memory < 2e9


def test_a_disk_that_fails_is_not_the_pictures_fault(tree, tmp_path, monkeypatch):
    """A stale NFS handle, an I/O error: the packing stops and can be resumed, instead of leaving good pictures out."""
    look = os.stat

    def failing(path, *more, **options):
        if str(path).endswith("dog/3.png"):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return look(path, *more, **options)

    source = sources.find(str(tree))
    monkeypatch.setattr("data.pictures.os.stat", failing)
    with pytest.raises(OSError, match="Stale file handle"):
        pack.pack(source, tmp_path / "out", size=64)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert pack.pack(source, tmp_path / "out", size=64).counts == {"train": 12, "val": 6}


def test_a_png_that_claims_to_be_huge(tmp_path):
    """Decompression bombs, small files of many pixels, are refused before anything is unpacked."""
    buffer = io.BytesIO()
    Image.new("1", (40_000, 40_000)).save(buffer, "PNG")
    for split, label in ((s, c) for s in ("train", "val") for c in "ab"):
        for number in range(150 if split == "train" else 1):
            small.write(tmp_path / f"tree/{split}/{label}/{number}.jpg", ODD["plain"][1])
    small.write(tmp_path / "tree/train/a/7.jpg", buffer.getvalue())
    store = pack.pack(sources.find(str(tmp_path / "tree")), tmp_path / "store", size=64)
    assert store.counts["train"] == 299
    assert "exceeds limit" in store.manifest["skipped"][0]["reason"]
