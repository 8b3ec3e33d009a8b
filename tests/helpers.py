"""What the tests of training share: train.py called, started and looked at."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import train
from checkpoints.run import read_log
from data.store import Store

ROOT = Path(train.__file__).parent


def run(store, out, *more, batch=16):
    arguments = ["--data", str(store.path), "--out", str(out), "--batch-size", str(batch), "--workers", "0"]
    return train.main([*arguments, *map(str, more)])


def resume(out, *more):
    return train.main(["--resume", "--out", str(out), *map(str, more)])


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_state(one: Path, two: Path):
    """Of two last.pt, bit for bit: weights, momentum buffers, schedule, and state without its seconds."""
    a, b = load(one / "last.pt"), load(two / "last.pt")
    for part in ("step", "epoch", "best", "schedule"):
        assert a[part] == b[part]
    assert a["state"] | {"seconds": 0.0} == b["state"] | {"seconds": 0.0}
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    buffers = zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True)
    assert all(torch.equal(x["momentum_buffer"], y["momentum_buffer"]) for x, y in buffers)


def assert_same_study_run(one: Path, two: Path):
    """Of two runs of the activation study: last.pt, bit for bit, and the logs without their timings."""
    a, b = load(one / "last.pt"), load(two / "last.pt")
    state = ("epoch", "step", "loss_sum", "wrong")
    assert [a[name] for name in state] == [b[name] for name in state]
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    buffers = zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True)
    assert all(torch.equal(x["momentum_buffer"], y["momentum_buffer"]) for x, y in buffers)
    assert numbers(one) == numbers(two)


def numbers(out):
    """The log without its timings."""
    timings = ("images_per_second", "stall", "seconds")
    return [{k: v for k, v in e.items() if k not in timings} for e in read_log(out / "log.jsonl")]


def command(store, out, *more):
    arguments = ["train.py", "--data", store.path, "--out", out, "--workers", "0", *more]
    return [sys.executable, *map(str, arguments)]


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def streaming(store, out, *more):
    """train.py with two workers that read, on a split that would be resident otherwise."""
    arguments = command(store, out, "--batch-size", "16", "--epochs", "50", "--workers", "2", *more)[2:]
    code = "import sys, data.loader, train; from utils import run_script; data.loader.RESIDENT_BYTES = 0; "
    code += f"sys.argv[1:] = {arguments!r}; run_script(train.main)"
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(), start_new_session=True,
    )


def damage(folder, split, *indices):
    """Flip a bit in the pixels of these records."""
    file = folder / f"{split}-00000" / "data.mdb"
    content = bytearray(file.read_bytes())
    for picture in Store(folder).split(split).read(np.array(indices))[0]:
        content[bytes(content).index(picture.tobytes()) + 1000] ^= 1
    file.write_bytes(content)
