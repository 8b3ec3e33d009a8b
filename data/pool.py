"""The processes that pack and verify."""

import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process

from data.loader import lacks_memory
from utils import UserError, one_line


@contextmanager
def start_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes, all of them started. Raises UserError where one of them was killed, or memory ran out."""
    try:
        # Forked workers start at once and do not import the calling script again.
        with ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=_start_worker) as pool:
            pool.submit(os.getpid).result()  # the fork is now, while no LMDB environment is open that it would inherit
            yield pool
    except BrokenProcessPool:
        raise UserError("a packing process was killed (out of memory?); try fewer --workers") from None
    except Exception as error:
        if not lacks_memory(error):
            raise
        raise UserError(f"memory ran out ({one_line(error) or 'MemoryError'}); try fewer --workers, or stop what else "
                        "runs here") from None


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import cv2
    import torch

    # One thread each: there is a worker for every core, and threads of a parent do not survive a fork.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Pillow's, of damaged EXIF blocks
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def in_order(pool, function, jobs):
    """Results in the order of the jobs, with a bounded number of jobs on their way."""
    waiting = deque()
    limit = 2 * pool._max_workers
    try:
        for job in jobs:
            waiting.append(pool.submit(function, job))
            if len(waiting) >= limit:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
