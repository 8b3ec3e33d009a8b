"""What becomes of the memory that torch takes and frees in each step on a CPU. Imports nothing of the project. Both
functions speak to glibc and hold for a whole process, so they are for scripts; other C libraries lack what they call,
and nothing happens."""

import ctypes
import os


def keep() -> None:
    """Have torch ask Linux for pages of 2 MB, and glibc keep what is freed for the next step: what goes back to Linux
    is zeroed before it is had again. To be called before the first tensor."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # Linux may be set up to refuse
    _glibc("mallopt", -4, 0)  # M_MMAP_MAX: nothing is mapped, and unmapped, by itself
    _glibc("mallopt", -1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def hand_back() -> None:
    """What is kept and not in use goes back to Linux. Once an epoch, or the pieces that no later tensor fits into add
    up: glibc 2.36 does not find a freed piece again for a tensor of the same size where something small lies in
    between."""
    _glibc("malloc_trim", 0)


def _glibc(name: str, *numbers: int) -> None:
    getattr(ctypes.CDLL(None), name, lambda *_: None)(*numbers)
