"""Batches from a store: (uint8 pictures (n, H, W, C) on the device, int64 labels on the device)."""

import os
import signal
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data import UserError
from data.store import Records, Store

RESIDENT_BYTES = 1_000_000_000  # a split of at most this size is kept on the device, whole


class Loader:
    """One split of a store. A small split is *resident*: read once, its pixels one tensor on the device. A larger
    one *streams*: worker processes read whole batches (0 workers: this process does).

    resident: None decides by the split's size.
    """

    def __init__(self, store: Store, split: str, device="cpu", workers: int = 0, resident: bool | None = None):
        self.records, self.device, self.workers = store.split(split), torch.device(device), workers
        if resident is None:
            resident = len(self.records) * int(np.prod(self.records.shape)) <= RESIDENT_BYTES
        self.resident = resident
        if resident:
            images, labels = self.records.read(np.arange(len(self.records)), check=True)
            self.images = torch.from_numpy(images).to(self.device)
            self.labels = torch.from_numpy(labels).to(self.device)

    def __len__(self) -> int:
        return len(self.records)

    def batches(self, indices: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """One batch for each array of sample indices, in that order. Raises UserError at a damaged record."""
        if self.resident:
            for batch in indices:
                where = torch.from_numpy(batch).to(self.device)
                yield self.images.index_select(0, where), self.labels.index_select(0, where)
            return
        cuda = self.device.type == "cuda"
        streamed = DataLoader(
            _Batches(self.records),
            batch_sampler=indices,
            num_workers=self.workers,
            collate_fn=_as_is,
            pin_memory=cuda,
            worker_init_fn=_start_worker,
            prefetch_factor=4 if self.workers else None,
        )
        iterator = iter(streamed)
        try:
            for images, labels in iterator:
                yield images.to(self.device, non_blocking=cuda), labels.to(self.device, non_blocking=cuda)
        except UserError as error:  # a worker's arrives with its traceback around it; the last line is the message
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("data.UserError: ")) from None
        finally:
            if self.workers:  # now and in good order: at the exit of the process torch complains of what is left
                iterator._shutdown_workers()


class _Batches(Dataset):
    """A batch at a time, not a picture at a time: torch's fetcher calls __getitems__ with a batch's indices."""

    def __init__(self, records: Records):
        self.records = records

    def __getitems__(self, indices) -> tuple[Tensor, Tensor]:
        images, labels = self.records.read(indices)
        return torch.from_numpy(images), torch.from_numpy(labels)


def _as_is(batch):
    return batch


def _start_worker(_: int) -> None:
    # Ctrl-C, and the SIGTERM of timeout or of a job scheduler, go to the whole process group. Workers leave it: the
    # training loop decides when they end, and they must not end before its last batch.
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
