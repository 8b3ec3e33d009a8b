"""data/loader.py: the same batches however they are read."""

import multiprocessing
import os
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import damage

from data.augment import epoch_tables
from data.loader import RESIDENT_BYTES, Loader, default_workers, machine_errors
from data.store import Store
from utils import UserError

PLAN = [order[:24] for order in np.random.default_rng(0).permuted(np.tile(np.arange(96), (5, 1)), axis=1)]


def read(loader):
    return [(images.numpy().copy(), labels.numpy().copy()) for images, labels in loader.batches(PLAN)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("kind", ["store", "jpeg_store"])
def test_workers_and_residence_make_no_difference(kind, request):
    """0, 1, 2 and 4 workers, resident or streamed: the same bytes in the same order."""
    packed = request.getfixturevalue(kind)
    images, labels = packed.split("train").read(np.arange(96))
    readers = [Loader(packed, "train", resident=True)]
    readers += [Loader(packed, "train", workers=n, resident=False) for n in (0, 1, 2, 4)]
    for reader in readers:
        batches = read(reader)
        assert len(batches) == len(PLAN)
        for rows, (got, got_labels) in zip(PLAN, batches, strict=True):
            assert np.array_equal(got, images[rows])
            assert np.array_equal(got_labels, labels[rows])


@pytest.mark.parametrize("kind", ["store", "grey_store", "jpeg_store"])
def test_crops_are_those_of_the_whole_pictures(kind, request):
    """Resident or streamed, raw, grey or JPEG, 0 or 2 workers: each crop is the part of the picture that the tables
    name, mirrored where they say so."""
    packed = request.getfixturevalue(kind)
    images, labels = packed.split("train").read(np.arange(96))
    tables = epoch_tables(2, 1, 96, 8)
    assert 0 < tables.mirror.sum() < 96
    readers = [Loader(packed, "train", resident=True)]
    readers += [Loader(packed, "train", workers=n, resident=False) for n in (0, 2)]
    for reader in readers:
        for rows, (got, got_labels) in zip(PLAN, reader.batches(PLAN, tables, 64), strict=True):
            assert np.array_equal(got_labels.numpy(), labels[rows])
            for row, crop in zip(rows, got.numpy(), strict=True):
                top, left = tables.offsets[row]
                part = images[row, top : top + 64, left : left + 64]
                assert np.array_equal(crop, part[:, ::-1] if tables.mirror[row] else part)


def test_any_point_of_resuming_gives_the_same_batches(store):
    """The plan of an epoch is a table: what follows step s does not depend on what was read before."""
    tables = epoch_tables(0, 3, 96, 8)
    plan = [tables.order[i : i + 16] for i in range(0, 96, 16)]
    loader = Loader(store, "train", workers=2, resident=False)
    whole = [images for images, _ in loader.batches(plan)]
    for first in range(len(plan)):
        again = epoch_tables(0, 3, 96, 8)
        assert np.array_equal(again.order, tables.order)
        rest = [images for images, _ in loader.batches(plan[first:])]
        assert all(torch.equal(a, b) for a, b in zip(whole[first:], rest, strict=True))


def test_in_order_each_picture_is_seen_once(store):
    """By one process or three, in batches of 8."""
    images, labels = store.split("val").read(np.arange(21))
    loader = Loader(store, "val")
    found = [torch.cat(part).numpy() for part in zip(*loader.in_order(8), strict=True)]
    assert np.array_equal(found[0], images)
    assert np.array_equal(found[1], labels)
    for rank in range(3):
        mine = [len(batch) for _, batch in loader.in_order(4, rank, 3)]
        assert mine == [4, 3]
        assert np.array_equal(torch.cat([batch for batch, _ in loader.in_order(4, rank, 3)]).numpy(), images[rank::3])


def test_workers_are_for_gpus():
    """On a CPU they would take the cores from the net."""
    assert default_workers(torch.device("cpu")) == 0
    assert default_workers(torch.device("cuda")) == len(os.sched_getaffinity(0))


def test_a_small_split_is_resident_and_a_large_one_is_not(store, monkeypatch):
    assert Loader(store, "train").resident
    monkeypatch.setattr("data.loader.RESIDENT_BYTES", 96 * 72 * 72 * 3 - 1)
    assert not Loader(store, "train").resident
    assert RESIDENT_BYTES == 1_000_000_000


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_met_while_streaming_is_one_line(jpeg_store, tmp_path, workers):
    copy = shutil.copytree(jpeg_store.path, tmp_path / "copy")
    file = copy / "train-00000" / "data.mdb"
    content = bytearray(file.read_bytes())
    where = bytes(content).index(b"ALX1") + 200
    content[where] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"picture \d+ \(train-00000, key \d+\): the record's checksum") as caught:
        list(Loader(Store(copy), "train", workers=workers, resident=False).batches(np.split(np.arange(96), 4)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_damaged_records_are_replaced_and_counted(store, tmp_path, workers):
    """Resident or streaming, the same batches; one more than are allowed stops the reading."""
    copy = shutil.copytree(store.path, tmp_path / "copy")
    images, labels = store.split("train").read(np.arange(96))
    damage(copy, "train", 30, 70)
    plan = np.split(np.arange(96), 4)
    how = {"workers": workers or 0, "resident": workers is None}
    loader = Loader(Store(copy), "train", skip_bad=2, **how)
    by = np.arange(96)
    by[[30, 70]] = 31, 71
    for _ in range(2):  # also when their checksums have been compared before
        found = [torch.cat(part).numpy() for part in zip(*loader.batches(plan), strict=True)]
        assert np.array_equal(found[0], images[by])
        assert np.array_equal(found[1], labels[by])
    assert np.array_equal(loader.every_label, labels if workers is not None else labels[by])
    assert sorted(loader.bad) == [30, 70]
    with pytest.raises(UserError, match="more than 1 damaged records in train, picture 30 the first"):
        list(Loader(Store(copy), "train", skip_bad=1, **how).batches(plan))
    with pytest.raises(UserError, match=r"picture 30 \(train-00000, key 30\): the record's checksum"):
        list(Loader(Store(copy), "train", **how).batches(plan))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_checksum_is_compared_when_a_record_is_read_first(store, tmp_path, workers):
    """As with a resident split: what happens to the file later is not looked for again."""
    copy = shutil.copytree(store.path, tmp_path / "copy")
    packed = Store(copy)
    loader, plan = Loader(packed, "train", workers=workers, resident=False), np.split(np.arange(48), 4)
    assert len(list(loader.batches(plan))) == 4
    times = (copy / "train-00000/data.mdb").stat()
    damage(copy, "train", 3, 50)
    os.utime(copy / "train-00000/data.mdb", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(list(loader.batches(plan))) == 4
    with pytest.raises(UserError, match="picture 50 "):
        list(loader.batches([np.arange(96)]))


def test_workers_are_forked_whatever_pythons_default_is(store, monkeypatch):
    """A function made here reaches none that starts otherwise."""
    def refuse(*_, **__):
        raise UserError("in a fork")

    loader = Loader(store, "train", workers=1, resident=False)
    monkeypatch.setattr(loader.records, "read", refuse)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        with pytest.raises(UserError, match=r"^in a fork$"):
            list(loader.batches(PLAN))
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_a_worker_that_is_killed_is_one_line(store, monkeypatch):
    def killed(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    loader = Loader(store, "train", workers=1, resident=False)
    monkeypatch.setattr(loader.records, "read", killed)
    with pytest.raises(UserError, match=r"has ended \(DataLoader worker.*take fewer --workers"):
        list(loader.batches([np.arange(8)]))


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
], ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_is_one_line(error):
    with pytest.raises(UserError, match=r"memory ran out \(.*\); take a smaller --batch-size"), machine_errors():
        raise error
    with pytest.raises(UserError, match=r"memory ran out \(.*\); wait$"), machine_errors("wait"):
        raise error
    with pytest.raises(RuntimeError, match="a bug"), machine_errors():
        raise RuntimeError("a bug")


def test_too_little_shared_memory_is_told(store, monkeypatch):
    """Two batches ahead for each worker of each process, and two in use; no word where there are no workers, or nothing
    to stream."""
    streamed = Loader(store, "train", workers=3, resident=False)
    tables = epoch_tables(0, 0, len(streamed), 72 - 64)
    whole, crops = (next(Loader(store, "train", resident=False).batches([np.arange(24)], *how))[0].numel()
                    for how in ((), (tables, 64)))
    for batch, how in ((whole, {}), (crops, {"size": 64}), (4 * whole, {"processes": 4})):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=8 * batch + 1: SimpleNamespace(free=free))
        assert streamed.shared_memory_trouble(24, **how) == ""
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=8 * batch: SimpleNamespace(free=free))
        told = (rf"to read train with {3 * how.get('processes', 1)} --workers takes .* MB of /dev/shm, of which .* MB "
                "are free: .* --shm-size; .* --batch-size")
        assert re.fullmatch(told, streamed.shared_memory_trouble(24, **how))
    assert Loader(store, "train", workers=3).shared_memory_trouble(10**9) == ""
    assert Loader(store, "train", resident=False).shared_memory_trouble(10**9) == ""


def test_a_batch_that_cannot_be_handed_over_is_one_line(store, monkeypatch, capfd):
    """As where /dev/shm is full, which shows when a thread of the worker copies the batch there."""
    class Full:
        def __reduce__(self):
            raise RuntimeError("unable to allocate shared memory: No space left on device")

    def hang(*_):
        raise TimeoutError

    monkeypatch.setattr("data.loader._Batches.__getitems__", lambda *_: Full())
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(600)
    try:
        with pytest.raises(UserError, match=r"has ended \(DataLoader worker.*exited"):
            list(Loader(store, "train", workers=1, resident=False).batches(PLAN))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert re.fullmatch("error: a process that reads pictures cannot hand over a batch: .*: No space left on device\n",
                        capfd.readouterr().err)
