"""data/pack.py: what a store holds, whatever packed it."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import small_source
from PIL import Image

from data import pack, sources
from data.store import Store
from utils import UserError

ROOT = Path(pack.__file__).parent.parent


def files(store: Store) -> dict:
    return {p.relative_to(store.path): p.read_bytes() for p in store.path.rglob("*") if p.is_file()}


def test_the_store_holds_what_the_source_gives(store):
    """Every picture as PIL's own resize makes it (within 2 of 255), in order, with its label."""
    source = small_source()
    assert store.counts == {"train": 96, "val": 21, "test": 30}
    for split, part in source.splits.items():
        images, labels = store.split(split).read(np.arange(len(part.labels)), check=True)
        assert np.array_equal(labels, part.labels)
        for ours, picture in zip(images, part.pictures, strict=True):
            by_pil = Image.fromarray(picture).resize((72, 72), Image.BILINEAR)
            assert np.abs(ours.astype(int) - np.asarray(by_pil)).max() <= 2


def test_a_named_set_without_a_store_is_packed_or_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "STORES", tmp_path)
    monkeypatch.setattr(sources, "find", lambda *_: small_source("sample"))
    with pytest.raises(UserError, match=r"make it first: python -m data\.pack sample$"):
        pack.named_store("sample", download=None)
    assert pack.named_store("sample").size == pack.named_store("sample").size == 72
    assert [p.name for p in tmp_path.iterdir()] == ["sample"]


@pytest.mark.parametrize("size", [16, 32])
def test_pictures_smaller_than_any_alexnets(tmp_path, monkeypatch, size):
    """Studies have nets for these; 15 is refused."""
    source = small_source("sample")
    monkeypatch.setattr(sources, "find", lambda *_: source)
    assert pack.main(["sample", "--size", str(size), "--out", str(tmp_path / "x"), "--workers", "1"]) == 0
    assert Store(tmp_path / "x").size == size
    images, _ = Store(tmp_path / "x").split("train").read(np.arange(3))
    if size == 32:  # pictures of that size stay what they are
        assert np.array_equal(images, source.splits["train"].pictures[:3])
    with pytest.raises(UserError, match="15 is not a whole number, 16 to 4096"):
        pack.main(["sample", "--size", "15"])


def test_mean_image_and_pca_are_numpys(store):
    """Over the stored training pictures; numpy.cov on every pixel's RGB."""
    images, _ = store.split("train").read(np.arange(96))
    np.testing.assert_allclose(store.mean, images.mean(0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(store.manifest["channel_mean"], images.mean((0, 1, 2)), rtol=1e-9)
    covariance = np.cov(images.reshape(-1, 3).T, bias=True)
    values, vectors = (np.array(store.manifest["pca"][key]) for key in ("eigenvalues", "eigenvectors"))
    assert (np.diff(values) <= 0).all()
    np.testing.assert_allclose(vectors.T @ np.diag(values) @ vectors, covariance, rtol=1e-9, atol=1e-6)


def test_pca_of_a_grey_set_is_that_of_three_equal_channels(grey_store):
    images, _ = grey_store.split("train").read(np.arange(96))
    values = grey_store.manifest["pca"]["eigenvalues"]
    assert values[0] == pytest.approx(3 * images.var(), rel=1e-9)
    assert values[1] == pytest.approx(0, abs=1e-6)
    assert np.abs(grey_store.manifest["pca"]["eigenvectors"][0]) == pytest.approx(np.full(3, 3**-0.5))


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
def test_workers_make_no_difference(tmp_path, codec):
    one = pack.pack(small_source(), tmp_path / "one", codec=codec, workers=1)
    three = pack.pack(small_source(), tmp_path / "three", codec=codec, workers=3)
    assert files(one) == files(three)


def test_shards_make_no_difference_to_the_pictures(tmp_path, store):
    sharded = pack.pack(small_source(), tmp_path / "sharded", shards=5)
    assert [s["folder"] for s in sharded.manifest["shards"]["val"]] == [f"val-{n:05d}" for n in range(5)]
    for split, count in store.counts.items():
        for ours, theirs in zip(*(s.split(split).read(np.arange(count)) for s in (store, sharded)), strict=True):
            assert np.array_equal(ours, theirs)
    assert np.array_equal(store.mean, sharded.mean)


def test_jpeg_records_are_the_pictures_at_quality_90(jpeg_store, store):
    ours, labels = jpeg_store.split("train").read(np.arange(96))
    exact, exact_labels = store.split("train").read(np.arange(96))
    assert np.array_equal(labels, exact_labels)
    difference = np.abs(ours.astype(int) - exact)
    assert 0 < difference.mean() < 3  # smooth pictures: lossy, but channels are not swapped
    by_pillow = io.BytesIO()
    Image.fromarray(exact[0]).save(by_pillow, "JPEG", quality=90)
    assert np.array_equal(ours[0], np.asarray(Image.open(by_pillow)))


def test_a_tree_of_pictures(tree, tmp_path):
    """Upper-case endings and nested folders are taken, hidden files and other things are not."""
    os.rename(tree / "train/cat/0.png", tree / "train/cat/0.PNG")
    (tree / "train/dog/deep/er").mkdir(parents=True)
    os.rename(tree / "train/dog/5.png", tree / "train/dog/deep/er/5.png")
    (tree / "train/cat/._0.png").write_bytes(b"a Mac's leftovers")
    (tree / "train/cat/notes.txt").write_text("not a picture")
    store = pack.pack(sources.find(str(tree)), tmp_path / "out", size=72, workers=2)
    assert store.counts == {"train": 12, "val": 6}
    assert store.classes == ["cat", "dog"]
    assert store.codec == "jpeg"
    assert store.split("train").read(np.arange(12))[1].tolist() == [0] * 6 + [1] * 6


def test_unreadable_pictures_are_named_and_stop_the_packing_over_one_percent(tree, tmp_path, capfd):
    for number in range(200):
        Image.new("RGB", (70, 70), (number, 0, 0)).save(tree / "train/cat" / f"x{number:03d}.png")
    (tree / "train/cat/x000.png").write_bytes(b"nonsense")
    store = pack.pack(sources.find(str(tree)), tmp_path / "fine", size=64)
    assert store.counts["train"] == 211
    assert "x000.png" in capfd.readouterr().err
    assert store.manifest["skipped"] == [{
        "split": "train", "picture": "cat/x000.png",
        "reason": "cat/x000.png cannot be read as a picture (no format that is known)",
    }]
    for number in range(1, 4):
        (tree / f"train/cat/x{number:03d}.png").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"4 of 212 pictures of train cannot be read, more than 1%"):
        pack.pack(sources.find(str(tree)), tmp_path / "bad", size=64)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fine", "tree"]


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
], ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_is_no_pictures_fault(error, tree, tmp_path, monkeypatch):
    """Not even one picture of many is left out for it; the same command goes on."""
    def square(*_):
        raise error

    for number in range(200):
        Image.new("RGB", (70, 70), (number, 0, 0)).save(tree / "train/cat" / f"x{number:03d}.png")
    with monkeypatch.context() as patch:
        patch.setattr("data.encode.square", square)
        with pytest.raises(UserError, match=r"^memory ran out \(.*\); try fewer --workers"):
            pack.pack(sources.find(str(tree)), tmp_path / "store", size=64)
    assert pack.pack(sources.find(str(tree)), tmp_path / "store", size=64).manifest["skipped"] == []


def test_verify_finds_one_flipped_bit(tmp_path):
    store = pack.pack(small_source(), tmp_path / "store")
    assert pack.main(["--verify", str(store.path)]) == 0
    file = store.path / "test-00000" / "data.mdb"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"test-00000.data.mdb is damaged"):
        pack.main(["--verify", str(store.path)])


def test_an_existing_folder_is_left_alone(store):
    before = files(store)
    with pytest.raises(UserError, match="exists"):
        pack.pack(small_source(), store.path)
    assert files(store) == before


def test_two_packers_do_not_disturb_each_other(tmp_path, monkeypatch):
    """While one packs, another process that packs into the same place is refused."""
    command = [sys.executable, "-m", "data.pack", "sample", "--out", str(tmp_path / "out")]
    seen = []

    def write(*_):
        seen.append(subprocess.run(command, cwd=ROOT, capture_output=True, text=True))
        raise RuntimeError("enough")

    monkeypatch.setattr(pack, "_write", write)
    with pytest.raises(RuntimeError, match="enough"):
        pack.pack(small_source(), tmp_path / "out")
    assert seen[0].returncode == 2
    assert "another process is packing" in seen[0].stderr
    assert not list(tmp_path.iterdir())


def test_a_named_store_that_another_process_has_made_in_the_meantime_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "STORES", tmp_path)

    def find(*_):
        pack.pack(small_source("sample"), tmp_path / "sample")
        return small_source("sample")

    monkeypatch.setattr(sources, "find", find)
    assert pack.named_store("sample").path == tmp_path / "sample"


def test_a_disk_without_locks_is_named(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(pack.fcntl, "lockf", lockf)
    with pytest.raises(UserError, match=r"lock cannot be locked \(No locks available\).* choose an --out on another"):
        pack.pack(small_source(), tmp_path / "store")


def test_shards_of_another_number_that_a_kill_left_are_not_in_the_store(tmp_path, monkeypatch):
    """A shard of another packing that was not finished."""
    real = pack._complete

    def complete(job, *more):
        (job.store / "train-00007").mkdir()
        (job.store / "train-00007" / "data.mdb").write_bytes(bytes(1000))
        return real(job, *more)

    monkeypatch.setattr(pack, "_complete", complete)
    store = pack.pack(small_source(), tmp_path / "out")
    assert sorted(p.name for p in store.path.iterdir() if p.is_dir()) == ["test-00000", "train-00000", "val-00000"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """RLIMIT_FSIZE stands in for the full disk: writes past 300 KB fail."""
    code = f"""
import resource, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import utils
from data import pack
from conftest import small_source
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
utils.run_script(lambda argv: pack.pack(small_source(), {str(tmp_path / "out")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "named sets are cifar10"),
        ([], "give a SOURCE"),
        (["sample", "--verify", "x"], "give a SOURCE"),
        (["sample", "--workers", "0"], "--workers"),
        (["sample", "--size", "15"], "--size"),
        (["sample", "--size", "70000"], "to 4096"),
        (["sample", "--codec", "png"], "--codec"),
        (["sample", "--only-shards", "0:1"], "give both"),
        (["sample", "--shards", "4", "--only-shards", "2:2"], "2:2 is not a range such as 0:4"),
        (["sample", "--shards", "4", "--only-shards", "-1:2"], "--only-shards"),
        (["sample", "--shards", "4", "--only-shards", "3:5"], "there are 4 shards"),
        (["sample", "--shards", "100000"], "--shards"),
        (["--verify", "nowhere"], "no such folder"),
        (["--verify", "nowhere", "--val", "0.2"], "--val is for packing"),
        (["--verify", "nowhere", "--only-shards", "0:1"], "--only-shards is for packing"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        pack.main(arguments)


def test_manifest_is_complete(store):
    manifest = json.loads((store.path / "manifest.json").read_text())
    assert set(manifest) == {
        "format", "name", "classes", "wnids", "image_size", "channels", "codec", "resize", "shards", "unlabelled",
        "skipped", "repaired", "channel_mean", "pca", "files", "checksum",
    }
    assert set(manifest["files"]) == {"mean.npy", "train-00000/data.mdb", "val-00000/data.mdb", "test-00000/data.mdb"}
