"""Reading from mapped files: where one was cut short meanwhile, or its disk fails, or damage leads LMDB astray, Linux
sends a signal instead of an error. While a store is read, such a signal ends the process with one line."""

import ctypes
import os
import signal

SIGNALS = (signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT)

_libc = ctypes.CDLL(None)
_libc.signal.restype, _libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
_before: dict[int, int] = {}  # the handlers that were there, by signal
_installed_in = 0  # this process's number
_reading = ""  # the store that is being read


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _ended(number: int) -> None:
    if not _reading:  # not ours: the instruction runs again, and its signal goes where it went before
        _libc.signal(number, _before[number])
        return
    # By way of C: Python's own handlers run between instructions, and this one never ends.
    os.write(2, f"error: {_reading} failed while it was read: its files were cut short or are damaged, or their disk "
                f"fails; python -m data.pack --verify checks them\n".encode(errors="backslashreplace"))
    os._exit(2)


def reading(path) -> None:
    """From now on a failing read is one of this store's; of none after reading("")."""
    global _installed_in, _reading
    if _installed_in != os.getpid():  # torch's workers set handlers of their own at their start
        for number in SIGNALS:
            _before[number] = _libc.signal(number, ctypes.cast(_ended, ctypes.c_void_p))
        _installed_in = os.getpid()
    _reading = ascii(str(path))[1:-1]
