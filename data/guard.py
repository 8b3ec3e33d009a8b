"""Reading from mapped files, and by libraries written in C: where a file was cut short meanwhile, its disk fails, or
damage leads the library astray, Linux sends a signal instead of an error, or the library never returns. Either ends the
process with one line."""

import ctypes
import os
import signal
from contextlib import contextmanager

SIGNALS = (signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT, signal.SIGVTALRM)
LONGEST = 15  # seconds of computing

_libc = ctypes.CDLL(None)
_libc.signal.restype, _libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
_before: dict[int, int | None] = {}  # the handlers that were there, by signal
_installed_in = 0  # this process's number
_message = b""  # what to say, while something is read


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _ended(number: int) -> None:
    if not _message:  # not ours: the instruction runs again, and the earlier handler gets its signal
        _libc.signal(number, _before[number])
        return
    # By way of C: Python's own handlers run between instructions, and this one never ends.
    os.write(2, _message)
    os._exit(2)


_HANDLER = ctypes.cast(_ended, ctypes.c_void_p).value


@contextmanager
def reading(path, why: str = "failed while it was read: its files were cut short or are damaged, or their disk fails; "
                             "python -m data.pack --verify checks them"):
    """In a with statement around reads of a store's mapped files: a crash ends the process with one line."""
    global _installed_in, _message
    if _installed_in != os.getpid():  # torch's workers set handlers of their own at their start
        for number in SIGNALS:
            before = _libc.signal(number, _HANDLER)
            if before != _HANDLER:  # it is in a fork of a process that has read
                _before[number] = before
        _installed_in = os.getpid()
    _message = f"error: {ascii(str(path))[1:-1]} {why}\n".encode()
    try:
        yield
    finally:
        _message = b""


@contextmanager
def limited(path):
    """In a with statement around what a library in C reads: a crash, or more than LONGEST seconds of computing, ends
    the process with one line."""
    why = f"is damaged: reading it crashed, or did not come to an end in {LONGEST} seconds; copy it again"
    with reading(path, why):
        signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
