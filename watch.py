"""What accompanies a training loop: what is said, signals, clocks, and what all processes agree on."""

import os
import signal
import sys
import time
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from data.pictures import printable

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
STOPPING = b"stopping; a second signal ends the process at once, without a checkpoint\n"
ONE_STOP = 1.0  # seconds within which several signals are one: a shutdown sends SIGTERM and SIGHUP, a closed terminal
# SIGHUP twice
LOOK_EVERY = 20  # steps between looks at the loss; each look waits for the device


class Watch:
    """In a with statement SIGTERM, Ctrl-C, SIGUSR1 (preemption) and SIGHUP (its terminal is gone; not under nohup) are
    noted, so that the loop stops in good order; a second signal, after ONE_STOP, ends the process at once. rank, world:
    of the process, as processes.join() gives them; the first one alone says anything."""

    def __init__(self, device: torch.device, rank: int = 0, world: int = 1):
        self.device, self.rank, self.world, self.received, self.warned = device, rank, world, 0, set()

    def __enter__(self):
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        heard = [number for number in SIGNALS if not (nohup and number == signal.SIGHUP)]
        self.before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame) -> None:
        if self.received not in (0, signal.SIGPIPE):
            if time.monotonic() - self.noted > ONE_STOP:
                os._exit(128 + number)
            return
        self.received, self.noted = number, time.monotonic()
        if self.rank == 0:
            with suppress(OSError):
                os.write(2, STOPPING)  # not by print(), which the signal may have interrupted

    def say(self, text: str) -> None:
        if self.rank == 0:
            self._print(text, sys.stdout)

    def warn(self, text: str) -> None:
        if self.rank == 0 and text:
            self._print(f"warning: {printable(text)}", sys.stderr)

    def _print(self, text: str, stream) -> None:
        """Where nobody reads any more (Ctrl-C ends a `| tee`, too), the run stops as after a signal. Where nothing can
        be written, to a terminal that is gone or a full disk, it goes on: log.jsonl has all that counts."""
        try:
            print(text, file=stream, flush=True)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                self.received = self.received or signal.SIGPIPE
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what it still holds, and what follows

    def warn_once(self, about: str, text: str) -> None:
        if about not in self.warned:
            self.warned.add(about)
            self.warn(text)

    def start_epoch(self, earlier: float) -> None:
        """earlier: the seconds of this epoch until the run was stopped in it."""
        self.started = self.saved = time.monotonic()
        self.earlier, self.waited = earlier, 0.0

    def seconds(self) -> float:
        """Of the epoch so far, those before it was resumed included."""
        return self.earlier + time.monotonic() - self.started

    @contextmanager
    def waiting(self):
        """Around the reading of a batch."""
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    def end_epoch(self, images: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what has been started is not done yet
        seconds = time.monotonic() - self.started
        self.speed = {"images_per_second": images / seconds, "stall": 100 * self.waited / seconds}

    def times(self) -> dict:
        """images_per_second and stall, the percentage of the time that went into waiting for pictures, of the training
        since the epoch was begun or resumed; the seconds of the whole epoch."""
        return self.speed | {"seconds": self.seconds()}

    def total(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over all processes."""
        sums = sums.clone()
        if self.world > 1:
            dist.all_reduce(sums)
        return sums

    def told_to_stop(self) -> int:
        """A signal that any process has received, or 0, the same in all of them."""
        if self.world == 1:
            return self.received
        received = torch.tensor(self.received, device=self.device)
        dist.all_reduce(received, dist.ReduceOp.MAX)
        return int(received)

    def decide(self, step: int, save_every: float) -> tuple[int, bool]:
        """(a signal or 0, whether to save), the same in all processes. On GPUs they save and ask each other at the
        looks only, because both wait for the device. save_every: seconds."""
        looking = step % LOOK_EVERY == 0 or self.device.type == "cpu"
        stop, save = self.received, looking and time.monotonic() - self.saved > save_every
        if self.world > 1:
            if not looking:
                return 0, False
            flags = torch.tensor([stop, save], device=self.device)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            stop, save = flags.tolist()
        if save:
            self.saved = time.monotonic()
        return stop, bool(save)
