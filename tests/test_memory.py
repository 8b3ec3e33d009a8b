"""memory.py: what is freed is kept for the next step, and goes back when it is told to."""

import subprocess
import sys

import pytest
from helpers import ROOT

SCRIPT = """
import resource
import sys
import memory
if "kept" in sys.argv:
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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_is_kept_until_it_is_handed_back(monkeypatch):
    """100 MB, taken five times: 24,414 pages of 4 KB each time without keep(), none once a piece that fits is free with
    it; hand_back() lets the pieces go."""
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)  # conftest.py has called keep()
    numbers = {}
    for word in ("kept", "given back"):
        command = [sys.executable, "-c", SCRIPT, word]
        answer = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        numbers[word] = [int(number) for number in answer.stdout.split()]
    assert min(numbers["kept"][1:5]) < 20
    assert numbers["kept"][5] > 90_000  # KB
    assert min(numbers["given back"][:5]) >= 24_414
