"""memory.py: what is freed is kept for the next step, and goes back when it is told to."""

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

SCRIPT = """
import resource
import sys
import memory
if sys.argv[1] == "kept":
    memory.keep()
import torch
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25_000_000)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

kept = resident()
memory.hand_back()
print(kept - resident())
"""


PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.skipif(PAGES.exists() and "[always]" in PAGES.read_text(), reason="all memory comes in pages of 2 MB")
def test_memory_is_kept_until_it_is_handed_back(monkeypatch):
    """100 MB, taken five times: all pages anew each time without keep(), none once a piece that fits is free with it;
    hand_back() lets the pieces go."""
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)  # conftest.py has called keep()
    numbers = {}
    for word in ("kept", "not kept"):
        command = [sys.executable, "-c", SCRIPT, word]
        answer = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        numbers[word] = [int(number) for number in answer.stdout.split()]
    assert min(numbers["kept"][1:5]) < 20
    assert numbers["kept"][5] > 90_000  # KB
    assert min(numbers["not kept"][:5]) >= 100_000_000 // resource.getpagesize()
