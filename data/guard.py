"""Reading from mapped files, and from formats that a library in C reads: where a file was cut short meanwhile, its disk
fails, or damage leads the library astray, Linux sends a signal instead of an error, or nothing ends. While such a file
is read, that ends the process with one line."""

import ctypes
import os
import signal
from contextlib import contextmanager

SIGNALS = (signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT, signal.SIGALRM)
LONGEST = 30  # seconds

_libc = ctypes.CDLL(None)
_libc.signal.restype, _libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
_before: dict[int, int] = {}  # the handlers that were there, by signal
_installed_in = 0  # this process's number
_last_words = b""  # the line, while something is read


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _ended(number: int) -> None:
    if not _last_words:  # not ours: it comes again, and goes where it went before
        _libc.signal(number, _before[number])
        _libc.kill(os.getpid(), number)
        return
    # By way of C: Python's own handlers run between instructions, and this one never ends.
    os.write(2, _last_words)
    os._exit(2)


def reading(store) -> None:
    """From now on a failing read is one of this store's; of none after reading("")."""
    _expect(store, "failed while it was read: its files were cut short or are damaged, or their disk fails; python -m "
                   "data.pack --verify checks them")


@contextmanager
def limited(path):
    """Around a library's reading of a small file, or of what a large one says of itself: LONGEST seconds at most."""
    _expect(path, f"is damaged: reading it failed, or did not come to an end in {LONGEST} seconds")
    before = signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(before)
        _expect("", "")


def _expect(path, why: str) -> None:
    global _installed_in, _last_words
    if _installed_in != os.getpid():  # torch's workers set handlers of their own at their start
        for number in SIGNALS:
            _before[number] = _libc.signal(number, ctypes.cast(_ended, ctypes.c_void_p))
        _installed_in = os.getpid()
    _last_words = f"error: {ascii(str(path))[1:-1]} {why}\n".encode() if path else b""
