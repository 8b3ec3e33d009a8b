"""Two processes that torchrun starts, train a step and end: exit status 0, and not one "terminate called"."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

import train
from benchmarks.faults import Lost, small_store

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LONGEST = 300  # seconds


def case(place: Path, rng: np.random.Generator) -> list[str]:
    out = place / "started"
    shutil.rmtree(out, ignore_errors=True)
    steps = int(rng.integers(1, 4))
    argv = ["train.py", "--data", small_store(place), "--out", out, "--batch-size", 16, "--workers", 0, "--device",
            "cpu", "--max-steps", steps]
    done = subprocess.run(
        [*TORCHRUN, *map(str, argv)], cwd=Path(train.__file__).parent, capture_output=True, text=True, timeout=LONGEST,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode or "terminate called" in done.stderr or f"done: {steps} steps" not in done.stdout:
        raise Lost(f"exit status {done.returncode}; {done.stderr[-1500:]}")
    return ["ended well"]
