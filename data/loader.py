"""Batches from a store: (uint8 pictures (n, H, W, C) on the device, int64 labels on the device)."""

import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.augment import EpochTables, random_crops, upload
from data.store import Crops, Store
from utils import UserError, one_line

AHEAD, IN_USE = 2, 2  # batches that each worker has ready; that the loop may hold besides
SHARED = Path("/dev/shm")  # by way of it workers hand over their batches
RESIDENT_BYTES = 1_000_000_000  # a split of at most this size is kept on the device, whole


def default_workers(device: torch.device) -> int:
    """Processes that read for a device: for a GPU one a core that this process may use; none on a CPU, where they would
    take the cores from the net."""
    return len(os.sched_getaffinity(0)) if device.type == "cuda" else 0


class Loader:
    """One split of a store. A small split is *resident*: read once, its pixels one tensor on the device. A larger
    one *streams*: worker processes read whole batches (0 workers: this process does). Each record's checksum is
    compared when it is read for the first time.

    resident: None decides by the split's size. skip_bad: so many damaged records may be replaced by sound ones; `bad`
    has their indices and what was wrong with them. One more raises UserError.
    """

    def __init__(
        self, store: Store, split: str, device="cpu", workers: int = 0, resident: bool | None = None, skip_bad: int = 0
    ):
        self.records, self.device, self.workers = store.split(split), torch.device(device), workers
        self.split, self.skip_bad, self.bad = split, skip_bad, {}
        self.unread = np.ones(len(self.records), bool)  # whose checksums have not been compared yet
        if resident is None:
            resident = len(self.records) * int(np.prod(self.records.shape)) <= RESIDENT_BYTES
        self.resident = resident
        if self.resident:
            bad = {} if skip_bad else None
            images, labels = self.records.read(np.arange(len(self.records)), check=True, bad=bad)
            self._note(bad)
            self.images = torch.from_numpy(images).to(self.device)
            self.labels = torch.from_numpy(labels).to(self.device)

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def every_label(self) -> np.ndarray:
        """(N,) int64."""
        if self.resident:
            return self.labels.cpu().numpy()
        bad = {} if self.skip_bad else None
        labels = self.records.every_label(bad)
        self._note(bad)
        return labels

    def _note(self, bad: dict[int, str] | None) -> None:
        """Damaged records that were replaced. Raises UserError where there are too many."""
        self.bad |= bad or {}
        if len(self.bad) > self.skip_bad:
            index, reason = next(iter(self.bad.items()))
            raise UserError(f"{self.records.path}: more than {self.skip_bad} damaged records in {self.split}, picture "
                            f"{index} the first ({reason}); copy or pack the store again, or raise --skip-bad-records")

    def shared_memory_trouble(self, pictures: int, size: int = 0, processes: int = 1) -> str:
        """What to tell a user where batches of so many pictures, crops of `size` pixels or whole ones, may not fit into
        /dev/shm, by which the workers of each process on this machine hand them over; "" otherwise."""
        if self.resident or not self.workers or not SHARED.is_dir():
            return ""
        height, width, channels = self.records.shape
        batch = pictures * (size or height) * (size or width) * channels
        needed, free = processes * (AHEAD * self.workers + IN_USE) * batch, shutil.disk_usage(SHARED).free
        return "" if needed < free else (
            f"to read {self.split} with {processes * self.workers} --workers takes {needed / 1e6:,.0f} MB of {SHARED}, "
            f"of which {free / 1e6:,.0f} MB are free: in a container take a larger --shm-size; or else fewer "
            "--workers, or a smaller --batch-size"
        )

    def in_order(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of whole pictures from the first to the last; of `world` processes each takes every world-th picture
        from its rank on, so that together they see each one once."""
        mine = np.arange(rank, len(self), world)
        return self.batches([mine[i : i + batch_size] for i in range(0, len(mine), batch_size)])

    def batches(
        self, indices: Iterable[np.ndarray], tables: EpochTables | None = None, size: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One batch for each array of sample indices, in that order: whole pictures; or with the tables of an epoch for
        each array of draws the crops of `size` pixels, mirrored. Raises UserError at a damaged record that may not be
        replaced."""
        if self.resident:
            for batch in indices:
                crops = _crops(tables, batch, size)
                samples = tables.pictures(batch) if tables else batch
                where = upload(samples, self.device)
                images = random_crops(self.images, samples, crops) if crops else self.images.index_select(0, where)
                yield images, self.labels.index_select(0, where)
            return
        cuda = self.device.type == "cuda"
        streamed = DataLoader(
            _Batches(self, tables, size),
            batch_sampler=indices,
            num_workers=self.workers,
            collate_fn=_as_is,
            pin_memory=cuda,
            worker_init_fn=_start_worker,
            # From Python 3.14 on each would import torch anew, for every epoch, and not hold the run's lock.
            multiprocessing_context="fork" if self.workers else None,
            prefetch_factor=AHEAD if self.workers else None,
        )
        iterator = iter(streamed)
        try:
            with machine_errors():
                for images, labels, samples, bad in iterator:
                    self._note(bad)
                    self.unread[samples] = False  # workers are forked anew for the next epoch, and know it then
                    self.unread[list(self.bad)] = True
                    yield images.to(self.device, non_blocking=cuda), labels.to(self.device, non_blocking=cuda)
        except UserError as error:  # a worker's arrives with its traceback around it; the last line is the message
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("utils.UserError: ")) from None
        finally:
            if self.workers:  # now and in good order: at the exit of the process torch complains of what is left
                iterator._shutdown_workers()
                for worker in iterator._workers:
                    worker.kill()  # one that has not ended within torch's 5 seconds: it ignores SIGTERM


@contextmanager
def machine_errors(advice: str = "take a smaller --batch-size, or stop what else runs on this device"):
    """A worker that was killed is a UserError, and so is memory that ran out, on a GPU or not. torch raises the first
    wherever the main thread is just then."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "DataLoader worker" in str(error):
            raise UserError(f"a process that reads pictures has ended ({one_line(error)}); if nothing above says why, "
                            "memory may have run out: take fewer --workers") from None
        if isinstance(error, RuntimeError) and not lacks_memory(error):
            raise
        raise UserError(f"memory ran out ({one_line(error) or 'MemoryError'}); {advice}") from None


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, a GPU's, or torch's on a CPU, which has no type."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class _Batches(Dataset):
    """A batch at a time, not a picture at a time: torch's fetcher calls __getitems__ with a batch's indices."""

    def __init__(self, loader: Loader, tables: EpochTables | None, size: int):
        self.loader, self.tables, self.size = loader, tables, size

    def __getitems__(self, indices) -> tuple[Tensor, Tensor, np.ndarray, dict[int, str]]:
        loader, crops = self.loader, _crops(self.tables, indices, self.size)
        samples, bad = np.asarray(self.tables.pictures(indices) if self.tables else indices), {}
        images, labels = loader.records.read(
            samples, check=loader.unread[samples], crops=crops, bad=bad if loader.skip_bad else None
        )
        return torch.from_numpy(images), torch.from_numpy(labels), samples, bad


def _crops(tables: EpochTables | None, draws: np.ndarray, size: int) -> Crops | None:
    return Crops(tables.offsets[draws], tables.mirror[draws], size) if tables else None


def _as_is(batch):
    return batch


def _end(error: Exception, _batch) -> None:
    """End a worker that cannot hand over a batch, /dev/shm being full: multiprocessing would print a traceback and go
    on, and the loop wait for that batch for ever."""
    os.write(2, f"error: a process that reads pictures cannot hand over a batch: {one_line(error)}\n".encode())
    os._exit(1)


def _start_worker(_: int) -> None:
    import cv2

    cv2.setNumThreads(0)  # one thread a worker; OpenCV would start one for every core
    # Ctrl-C, and the SIGTERM of timeout or of a job scheduler, go to the whole process group, those of systemd and of a
    # shutdown to all processes. Workers leave the one and ignore the others: the training loop decides when they end,
    # and they must not end before its last batch. Where it ends without a word, torch's watchdog ends them.
    os.setpgrp()
    Queue._on_queue_feeder_error = staticmethod(_end)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
