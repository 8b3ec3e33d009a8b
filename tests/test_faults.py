"""Packing under attack: killed at random moments, and fed with mutated pictures and archives. And the campaign of
benchmarks.faults, a little of it. Seeds are fixed."""

import errno
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import small_source
from PIL import Image
from test_pictures import ODD

import checkpoints
from benchmarks import faults
from benchmarks.faults import __main__ as campaign
from benchmarks.faults import imagenet_files as small
from benchmarks.faults import inputs, mutate, training
from benchmarks.faults.mutate import mutated
from benchmarks.faults.packing import content
from data import pack, sources
from data.pictures import File

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


def packed_alone(folder: Path, *places: Path) -> tuple[list, int, str]:
    """Each packed in a process of its own, so that a crash, a hang or its memory shows: what became of each, the most
    bytes that one took above this process, and what they said on stderr."""
    found, memory, said = [], 0, ""
    for number, place in enumerate(places):

        def main(_, place=place, number=number) -> int:
            print(json.dumps(inputs.packed(str(place), folder / f"store {number}")))
            return 0

        ended = faults.run(main, [], folder, seconds=300)
        faults.check_manners(ended)
        found.append(json.loads(ended.out.splitlines()[-1]) if ended.status == 0 else ended.err)
        memory, said = max(memory, ended.memory), said + ended.err
    return found, memory, said


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
    (done,), memory, stderr = packed_alone(tmp_path, tmp_path / "tree")
    skipped = [entry["picture"] for entry in done["skipped"]]
    assert done["records"] == PICTURES - len(skipped) + 2
    assert len(set(skipped)) == len(skipped)
    for entry in done["skipped"]:
        folder = f"{tmp_path}/tree/train/{'ab'[int(entry['picture'][:3]) % 2]}"
        assert f"skipped in {folder}: {entry['reason']}\n" in stderr
    assert 60 < len(skipped) < 220  # neither all nor none
    assert done["repaired"]["train"]["faulty JPEG data"]["count"]
    assert memory < 2e9


def archive(number: int, folder: Path) -> Path:
    """A set of 20 classes with one of its files mutated: tars inside and out, the kit, tables, lists, HDF5."""
    rng = np.random.default_rng(1000 + number)
    layout = ("official", "kaggle", "lists", "hdf5")[number % 4]
    place, names = inputs.picture_set(folder, layout), inputs.LAYOUTS[layout]
    file = place / names[number // 4 % len(names)]
    file.write_bytes(mutated(file.read_bytes(), folder.name.encode() * 200, rng))
    return place


def test_mutated_archives_are_packed_or_refused(tmp_path):
    """60 of each kind in turn. Nothing is lost without a word: what a set lists is packed or named, and a damaged list
    never gives more than the damaged lines other labels."""
    archives = [archive(number, tmp_path / f"{number:02d}") for number in range(ARCHIVES)]
    done, memory, _ = packed_alone(tmp_path, *archives)
    refused = [result for result in done if isinstance(result, str)]
    packed = [result for result in done if not isinstance(result, str)]
    assert len(done) == ARCHIVES
    assert all("error: " in line for line in refused)
    for result in packed:
        assert result["listed"] == result["records"] + len(result["skipped"])
        assert result["mislabelled"] <= 3
    assert min(len(refused), len(packed)) > 5
    assert memory < 2e9


# ---------------------------------------------------------------------------------------------- the campaign


@pytest.mark.parametrize(("kind", "cases"), [("mutate", 8), ("forge", 6), ("disk", 2), ("kill-training", 1)])
def test_the_campaign_loses_nothing(kind, cases, tmp_path, capsys, monkeypatch):
    """Its first cases. disk is skipped, and says so, where there is no gcc."""
    monkeypatch.setattr(training, "ROUNDS", 4)
    assert_nothing_lost(kind, cases, tmp_path, capsys)


def test_a_hundred_damaged_files(tmp_path, capsys, monkeypatch):
    """Of the kinds that need no net, a tenth of a second each."""
    quick = ("data.pack", "--verify", ".caffemodel", "mean.npy", ".binaryproto", "config.json")
    monkeypatch.setattr(mutate, "TARGETS", {n: t for n, t in mutate.TARGETS.items() if n.endswith(quick)})
    assert_nothing_lost("mutate", 100, tmp_path, capsys)


def assert_nothing_lost(kind, cases, tmp_path, capsys):
    assert campaign.main(["--only", kind, "--cases", str(cases), "--folder", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^{kind} +{cases} cases   .*, 0 lost$", out, re.M) or f"{kind}: skipped" in out


def test_kills_are_counted_and_shown_after_ctrl_c_too(tmp_path, capsys, monkeypatch):
    """A third case is interrupted: two are counted, with the words that they returned, and nothing is lost."""
    cases = iter([["jpeg", "SIGKILL", "SIGKILL"], ["raw", "SIGKILL"]])

    def case(place, rng):
        try:
            return next(cases)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(campaign, "KINDS", {"kill-packing": case})
    with pytest.raises(KeyboardInterrupt):
        campaign.main(["--cases", "9", "--folder", str(tmp_path)])
    assert "kill-packing       2 cases   3 SIGKILL, 1 jpeg, 1 raw, 0 lost" in capsys.readouterr().out


def test_a_case_that_loses_something_can_be_repeated(tmp_path, monkeypatch, capsys):
    """Without its checksums a checkpoint with a flipped bit passes: the campaign ends with 1 and the command that shows
    the same again."""
    monkeypatch.setattr(checkpoints, "check_archive", lambda path: None)
    monkeypatch.setattr(mutate, "TARGETS", {"best.pt, test.py": mutate.TARGETS["best.pt, test.py"]})
    assert campaign.main(["--only", "mutate", "--cases", "100", "--folder", str(tmp_path), "--seed", "3"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(r"python -m benchmarks.faults (--only mutate --case \d+ --seed 3)", last)
    assert campaign.main([*found[1].split(), "--folder", str(tmp_path)]) == 1
    assert "best.pt, test.py: other predictions, and not a word" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(mutate, "TARGETS", {"best.pt, test.py": mutate.TARGETS["best.pt, test.py"]})
    assert campaign.main([*found[1].split(), "--folder", str(tmp_path)]) == 0


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


def test_a_picture_whose_bytes_the_disk_does_not_give_is_named():
    """Of the errors of a file, those of read() have no name."""
    with pytest.raises(OSError, match=r"Input/output error: '/proc/self/mem'"):
        File("a.png", "/proc/self/mem", 0, 10).read()


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
