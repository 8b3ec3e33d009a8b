"""data/job.py and the restarts of data.pack: what is kept, what is refused, and how machines share the work."""

import multiprocessing
import os
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import pictures, small_source
from helpers import ROOT
from PIL import Image

from benchmarks.faults.packing import content
from data import pack, sources
from data.manifest import file_entry
from utils import UserError


def fail_at(number: int, monkeypatch):
    """Packing stops with an error at one shard of the training split."""
    write = pack._write_shard

    def failing(job, pool, split, shard, *more):
        if (split, shard) == ("train", number):
            raise RuntimeError("enough")
        return write(job, pool, split, shard, *more)

    monkeypatch.setattr(pack, "_write_shard", failing)
    return write


def test_finished_shards_are_kept_and_others_refused(tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    unbroken = pack.pack(small_source(), tmp_path / "unbroken", shards=4)
    write = fail_at(3, monkeypatch)
    with pytest.raises(RuntimeError, match="enough"):
        pack.pack(small_source(), out, shards=4)
    assert "3 of 12 shards are kept in" in capfd.readouterr().out
    files = sorted((tmp_path / ".out.packing/store").rglob("data.mdb"))
    assert [file.parent.name for file in files] == ["train-00000", "train-00001", "train-00002"]
    before = [file.stat().st_ino for file in files]
    monkeypatch.setattr(pack, "_write_shard", write)
    for changed, odd in (({"shards": 5}, "shards"), ({"shards": 4, "size": 64}, "size"),
                         ({"shards": 4, "codec": "jpeg"}, "codec")):
        with pytest.raises(UserError, match=rf"finished shards of another packing \(not the same: {odd}\); remove it"):
            pack.pack(small_source(), out, **changed)
    with pytest.raises(UserError, match=r"not the same: pictures of train"):
        pack.pack(small_source(counts=(97, 21, 30)), out, shards=4)
    fewer = small_source()
    del fewer.splits["test"]
    with pytest.raises(UserError, match=r"not the same: pictures of test"):
        pack.pack(fewer, out, shards=4)
    store = pack.pack(small_source(), out, shards=4)
    assert content(out) == content(unbroken.path)
    assert [(store.path / f.parent.name / f.name).stat().st_ino for f in files] == before


def test_a_finished_shard_that_is_torn_is_packed_again(tmp_path, monkeypatch):
    unbroken = pack.pack(small_source(), tmp_path / "unbroken", shards=4)
    write = fail_at(3, monkeypatch)
    with pytest.raises(RuntimeError, match="enough"):
        pack.pack(small_source(), tmp_path / "out", shards=4)
    monkeypatch.setattr(pack, "_write_shard", write)
    os.truncate(tmp_path / ".out.packing/store/train-00001/data.mdb", 5000)
    (tmp_path / ".out.packing/train-00000.json").write_text('{"first": 0, "cou')
    pack.pack(small_source(), tmp_path / "out", shards=4)
    assert content(tmp_path / "out") == content(unbroken.path)


def test_machines_share_the_work(tmp_path, capfd):
    """--only-shards in any order: the last one makes the store, with the bytes that one machine makes."""
    unbroken = pack.pack(small_source(), tmp_path / "unbroken", shards=5)
    assert pack.pack(small_source(), tmp_path / "out", shards=5, only=(3, 5)) is None
    assert "shards 0, 1, 2 of 5 are missing still" in capfd.readouterr().out
    assert pack.pack(small_source(), tmp_path / "out", shards=5, only=(1, 3)) is None
    assert pack.pack(small_source(), tmp_path / "out", shards=5, only=(0, 2)).counts == unbroken.counts
    assert content(tmp_path / "out") == content(unbroken.path)
    with pytest.raises(UserError, match="--only-shards 4:6: there are 5 shards"):
        pack.pack(small_source(), tmp_path / "more", shards=5, only=(4, 6))


def test_machines_at_the_same_time(tmp_path):
    """Four processes, a shard or two each, at once: whoever comes last completes the store; the same shard twice is
    refused."""
    source = small_source("x", counts=(200, 40, 20), shape=(200, 200, 3))
    fork = multiprocessing.get_context("fork")
    ranges = [(0, 2), (2, 3), (3, 5), (5, 6)]
    processes = [fork.Process(target=pack.pack, args=(source, tmp_path / "out"), kwargs={"shards": 6, "only": part})
                 for part in ranges]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    unbroken = pack.pack(source, tmp_path / "unbroken", shards=6)
    assert content(tmp_path / "out") == content(unbroken.path)
    assert not list(tmp_path.glob(".*"))


def test_a_shard_that_another_process_packs_is_refused(tmp_path, monkeypatch):
    seen = []
    command = [sys.executable, "-m", "data.pack", "sample", "--out", str(tmp_path / "out"), "--shards", "4"]

    def write(*_):
        for part in ("1:3", "2:4"):
            done = subprocess.run([*command, "--only-shards", part], cwd=ROOT, capture_output=True, text=True)
            seen.append((done.returncode, done.stderr + done.stdout))
        raise RuntimeError("enough")

    monkeypatch.setattr(pack, "_write", write)
    with pytest.raises(RuntimeError, match="enough"):
        pack.pack(sources.find("sample"), tmp_path / "out", shards=4, only=(0, 2))
    assert seen[0][0] == 2
    assert "another process is packing" in seen[0][1]
    assert seen[1][0] == 0
    assert "finished; other processes are still at work" in seen[1][1]


def test_machines_with_other_options_or_pictures_make_no_store(tmp_path):
    """Nothing was finished when the second began, so neither is refused before its end."""
    agree = pack.agree
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "agree", lambda job: None)
        assert pack.pack(small_source(), tmp_path / "out", shards=2, only=(0, 1)) is None
        patch.setattr(pack, "agree", lambda job: agree(job) if job.finished("train", 1) else None)
        with pytest.raises(UserError, match="not the same: codec"):
            pack.pack(small_source(), tmp_path / "out", shards=2, only=(1, 2), codec="jpeg")
    assert not (tmp_path / "out").exists()


def bad_tree(root, bad):
    """400 training pictures of two classes, of which `bad` are broken."""
    for number in range(400):
        path = root / "train" / "ab"[number // 200] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 70), (number % 256, 0, 0)).save(path)
        if number in bad:
            path.write_bytes(b"broken")
    for label in "ab":
        (root / "val" / label).mkdir(parents=True)
        Image.new("RGB", (70, 70)).save(root / "val" / label / "0.png")
    return root


def test_pictures_that_were_repaired_meanwhile_are_packed(tmp_path, capfd):
    """Five broken ones stop the packing; repaired, they are all in the store, those of finished shards, too."""
    tree = bad_tree(tmp_path / "tree", {1, 2, 3, 4, 350})
    with pytest.raises(UserError, match=r"5 of 400 pictures of train cannot be read, .* repair .*; one of them: "):
        pack.pack(sources.find(str(tree)), tmp_path / "out", size=64, shards=4)
    assert "shards are kept" in capfd.readouterr().out
    for number in (1, 2, 3, 4, 350):
        repaired = tree / "train" / "ab"[number // 200] / f"{number:03d}.png"
        Image.new("RGB", (70, 70), (number % 256, 0, 0)).save(repaired)
    store = pack.pack(sources.find(str(tree)), tmp_path / "out", size=64, shards=4)
    assert "001.png can be read now: train-00000 is packed again" in capfd.readouterr().out
    assert store.counts["train"] == 400
    fresh = pack.pack(sources.find(str(tree)), tmp_path / "fresh", size=64, shards=4)
    assert content(store.path) == content(fresh.path)


def test_one_percent_is_of_the_split_whoever_packs_it(tmp_path):
    tree = bad_tree(tmp_path / "tree", {1, 101, 201, 301, 302})
    source = sources.find(str(tree))
    for part in ((0, 1), (1, 2), (2, 3)):
        assert pack.pack(source, tmp_path / "out", size=64, shards=4, only=part) is None
    with pytest.raises(UserError, match="5 of 400 pictures of train cannot be read"):
        pack.pack(source, tmp_path / "out", size=64, shards=4, only=(3, 4))
    assert not (tmp_path / "out").exists()


def test_an_hdf5_file_that_was_replaced_is_noticed(tmp_path):
    def file(count):
        with h5py.File(tmp_path / "x.h5", "w") as h5:
            h5.attrs["classes"] = ["a", "b"]
            for split in ("train", "val"):
                h5[f"{split}/images"], h5[f"{split}/labels"] = pictures(count, (80, 80, 3), count), np.arange(40) % 2
        return sources.find(str(tmp_path / "x.h5"))

    pack.pack(file(40), tmp_path / "out", shards=2, only=(0, 1))
    changed = file(40)
    changed.splits["train"].pictures[30] = 0
    with pytest.raises(UserError, match="not the same: pictures of train"):
        pack.pack(changed, tmp_path / "out", shards=2)


@pytest.mark.parametrize("damage", ["no sums", "sums", "records", "unused byte"])
def test_finished_shards_that_rot_on_the_disk_are_packed_again(tmp_path, damage):
    """Cut off, they are not called finished; with a flipped bit it comes out at the end, and the next run mends it."""
    unbroken = pack.pack(small_source(), tmp_path / "unbroken", shards=2)
    assert pack.pack(small_source(), tmp_path / "out", shards=2, only=(0, 1)) is None
    building = tmp_path / ".out.packing"
    file = building / ("train-00000.npz" if "sums" in damage else "store/train-00000/data.mdb")
    if damage == "no sums":
        os.truncate(file, 0)
    else:
        data = bytearray(file.read_bytes())
        data[3000 if damage == "unused byte" else len(data) // 2] ^= 1
        file.write_bytes(data)
        with pytest.raises(UserError, match="damaged on the disk; the same command packs them again"):
            pack.pack(small_source(), tmp_path / "out", shards=2)
        assert not (tmp_path / "out").exists()
    pack.pack(small_source(), tmp_path / "out", shards=2)
    assert content(tmp_path / "out") == content(unbroken.path)


def test_leftovers_that_are_no_shards_do_no_harm(tmp_path):
    building = tmp_path / ".out.packing"
    (building / "store/train-00000").mkdir(parents=True)
    for name, text in (("train-00000.json", "[]"), ("val-00000.json", '{"job": 3}'), ("test-00000.json", "{"),
                       ("store/train-00000/data.mdb", "junk")):
        (building / name).write_text(text)
    store = pack.pack(small_source(), tmp_path / "out")
    assert store.counts == {"train": 96, "val": 21, "test": 30}
    assert not building.exists()


def test_a_worker_that_is_killed_is_one_line(tmp_path):
    """While pictures are encoded, and while a checksum is made."""
    for function in ("encode_chunk", "file_entry"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pack, function, kill_myself)
            with pytest.raises(UserError, match="a packing process was killed"):
                pack.pack(small_source(), tmp_path / "out", workers=2)
    assert not list(tmp_path.iterdir())


def kill_myself(argument):
    if multiprocessing.parent_process() is None:  # the packer, making the checksum of the sums
        return file_entry(argument)
    return os.kill(os.getpid(), signal.SIGKILL)


def test_a_link_that_leads_nowhere_is_no_place_for_a_store(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="out exists; remove it"):
        pack.pack(small_source(), tmp_path / "out")
