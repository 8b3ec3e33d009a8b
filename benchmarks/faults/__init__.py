"""What the kinds of faults share: commands in forked processes, and what is said when something is lost.

A fork of this process has torch and train.py imported already, which saves some seconds a start. That holds only as
long as this process runs no thread of torch's: what computes runs in a fork, too.
"""

import importlib
import os
import select
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

import kernels
import model
import train
from data import pack
from data.sources import Source, Split
from utils import run_script

HANGS = 60  # seconds that a short command may take; a busy machine counts
MEMORY = 2e9  # bytes that a command may take above what this process has
COUNTS = (96, 21, 30)  # pictures of train, val and test


class Lost(Exception):
    """Something was lost, wrong without a word, or ended otherwise than it may."""


@dataclass
class Ended:
    """What became of a command: its exit status, or minus the signal that ended it; what it said; bytes it took above
    this process."""

    status: int
    out: str
    err: str
    memory: int


class Command:
    """main(argv) as a script in a forked process with one thread. What it says goes to files in `folder`. environment:
    more variables. seconds: after these Linux ends it with SIGALRM, whatever it hangs in."""

    running: ClassVar[set[int]] = set()  # the processes of all commands that have not ended

    def __init__(self, main, argv, folder: Path, environment: dict | None = None, seconds: int = HANGS):
        self.said, self.ended = [folder / name for name in (".stdout", ".stderr")], None
        self.alive, held = os.pipe()  # at its end when the last process that holds it has ended
        self.pid = os.fork()
        if not self.pid:
            _become(main, [str(argument) for argument in argv], self.said, environment or {}, seconds)
        self.running.add(self.pid)
        os.close(held)

    def signal(self, number: int) -> bool:
        """Send a signal, unless it has ended. Returns whether it was sent."""
        there = not self.has_ended()
        if there:
            os.kill(self.pid, number)
        return there

    def has_ended(self) -> bool:
        return self.ended is not None or self._wait(os.WNOHANG)

    def end(self) -> Ended:
        """Wait for its end. Raises Lost where processes that it started outlive it."""
        if self.ended is None:
            self._wait(0)
        if self.alive is not None:
            outlived = not select.select([self.alive], [], [], HANGS)[0]
            os.close(self.alive)
            self.alive = None
            if outlived:
                raise Lost("it has ended, and a process that it started goes on")
        return self.ended

    def _wait(self, how: int) -> bool:
        pid, status, used = os.wait4(self.pid, how)
        if pid:
            self.running.discard(pid)
            here = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            said = [path.read_text(errors="replace") for path in self.said]
            self.ended = Ended(os.waitstatus_to_exitcode(status), *said, 1024 * used.ru_maxrss - here)
        return bool(pid)


def _become(main, argv: list[str], said: list[Path], environment: dict, seconds: int) -> None:
    """In the fork: run the script, and end without Python's way out, which is this process's."""
    status = 1
    try:
        os.setpgrp()  # for itself and what it starts
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.alarm(seconds)
        for descriptor, path in enumerate(said, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.stdout, sys.stderr = (open(descriptor, "w", closefd=False) for descriptor in (1, 2))
        os.environ.update(environment)
        torch.set_num_threads(1)
        sys.argv = ["script", *argv]
        run_script(main)
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def prepare() -> None:
    """Do what each command would do anew: imports that take seconds, and the compiler's work."""
    for name in ("torch._dynamo", "matplotlib.backends.backend_agg", "matplotlib.figure", "cv2", "lmdb", "simplejpeg"):
        importlib.import_module(name)
    kernels.compiled(model.LRN_SIZE)


def run(main, argv, folder: Path, **more) -> Ended:
    return Command(main, argv, folder, **more).end()


def check_manners(ended: Ended, statuses=(0, 2)) -> None:
    """Raise Lost where a command crashed, hung, took too much memory, or did not say in one line what is wrong."""
    errors = [line for line in ended.err.splitlines() if line.startswith("error")]
    faults = {
        f"it hung, or took more than {HANGS} seconds": ended.status == -signal.SIGALRM,
        "a traceback": "Traceback" in ended.err or "terminate called" in ended.err,
        f"exit status {ended.status}": ended.status not in statuses,
        "control characters": any(not c.isprintable() and c not in "\n\r" for c in ended.out + ended.err),
        f"{len(errors)} lines of errors": len(errors) != (ended.status == 2),
        f"{ended.memory / 1e9:.1f} GB of memory": ended.memory > MEMORY,
    }
    found = next((fault for fault, there in faults.items() if there), None)
    if found:
        raise Lost(f"{found}; stderr: {ended.err[-1500:]}")


# ---------------------------------------------------------------------------------------------- a small data set


def pictures(count: int, shape: tuple, seed: int) -> np.ndarray:
    """Smooth random pictures, (count, *shape) uint8: blurred noise."""
    rough = np.random.default_rng(seed).integers(0, 256, (count, 5, 5, *shape[2:]))
    rows, columns = (np.linspace(0, 3.999, side) for side in shape[:2])
    top, left = rows.astype(int), columns.astype(int)
    down, right = (rows - top)[:, None, None], (columns - left)[:, None]
    upper, lower = rough[:, top], rough[:, top + 1]
    upper, lower = (part[:, :, left] * (1 - right) + part[:, :, left + 1] * right for part in (upper, lower))
    return (upper * (1 - down) + lower * down).astype(np.uint8)


def source(side: int = 32, counts: tuple = COUNTS) -> Source:
    """Four classes of random pictures, in memory."""
    splits = {
        split: Split(pictures(count, (side, side, 3), number), np.arange(count) % 4)
        for number, (split, count) in enumerate(zip(("train", "val", "test"), counts, strict=True))
    }
    return Source("small", [f"class {c}" for c in range(4)], splits, size=72, codec="raw", channels=3)


def small_store(place: Path) -> Path:
    """The store that most kinds use: 96 training, 21 validation and 30 test pictures of 72 x 72. Made once."""
    store = place / "store"
    if not store.exists():
        _must(run(lambda _: pack.pack(source(), store) and 0, [], place))
    return store


def small_run(place: Path) -> Path:
    """A run on it, stopped one step before the end of its second and last epoch. Made once."""
    out = place / "run"
    if not (out / "curves.png").exists():
        argv = ["--data", small_store(place), "--out", out, "--epochs", 2, "--max-steps", 11, "--batch-size", 16]
        _must(run(train.main, [*argv, "--workers", 0, "--device", "cpu"], place))
    return out


def _must(ended: Ended) -> None:
    if ended.status:
        raise Lost(f"before any fault: {ended.err}")
