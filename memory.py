"""What becomes of the memory that torch takes and frees in each step on a CPU. Imports nothing of the project. What
both functions tell glibc has no effect with other C libraries."""

import ctypes
import os


def keep() -> None:
    """Have torch ask Linux for pages of 2 MB, and glibc keep what is freed for the next step: what goes back to Linux
    is zeroed before it is had again. For scripts, before their first tensor: it holds for the whole process."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # Linux may be set up to refuse
    _glibc("mallopt", -4, 0)  # M_MMAP_MAX: nothing is mapped, and unmapped, by itself
    _glibc("mallopt", -1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def hand_back() -> None:
    """Give back to Linux what is kept and not in use, after each checkpoint: otherwise pieces that no later tensor fits
    into add up, because glibc 2.36 does not always find a freed piece again for a tensor of its size."""
    _glibc("malloc_trim", 0)


def _glibc(name: str, *numbers: int) -> None:
    if os.name == "posix":
        getattr(ctypes.CDLL(None), name, lambda *_: None)(*numbers)
