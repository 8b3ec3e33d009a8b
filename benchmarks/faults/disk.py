"""A disk that is full, or fails, at any one of the writes of a command: it ends in one line, what was there is still
there, and the same command goes on when there is room again.

disk.c stands in for the disk. It has to be there before the C library, so these cases run in a process of their own,
started with LD_PRELOAD, which forks for each command."""

import ctypes
import errno
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from multiprocessing import get_context, set_start_method
from pathlib import Path

import numpy as np
import torch

import test
import train
from benchmarks.faults import Ended, Lost, check_manners, inputs, prepare, run, small_run, small_store, source
from benchmarks.faults.packing import content
from benchmarks.faults.training import fingerprints
from checkpoints import convert, export
from checkpoints.run import LAST, PREVIOUS
from data import pack

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
OLD = b"what was here before"


@dataclass
class Fault:
    """The number of the call that fails, from 1; the errno; whether those after it fail, too. call 0: none."""

    call: int = 0
    number: int = errno.ENOSPC
    stays: bool = False


def trouble() -> str:
    """Why there are no such cases here, or ""."""
    return "" if shutil.which("gcc") else "it needs gcc, Linux and its C library"


def case(place: Path, rng: np.random.Generator) -> list[str]:
    return [server().submit(served, place, rng).result()]


@cache
def server() -> ProcessPoolExecutor:
    """The process in which disk.c is loaded."""
    folder = tempfile.mkdtemp(prefix="faults-")
    library = Path(folder) / "disk.so"
    here = Path(__file__).with_name("disk.c")
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, here, "-ldl"], check=True)
    found = ProcessPoolExecutor(1, get_context("spawn"))
    before = dict(os.environ)
    os.environ |= {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    try:
        found.submit(ready).result()
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder)
    return found


def ready() -> None:
    """In the server: what it starts needs no such disk, and its forks are like those of a script."""
    os.environ.pop("LD_PRELOAD")
    set_start_method("fork", force=True)
    prepare()


def served(place: Path, rng: np.random.Generator) -> str:
    name = str(rng.choice(list(COMMANDS)))
    command = COMMANDS[name](place)
    calls, wanted = unbroken(name, place)
    room = fresh(command, place / "room")
    before = command.state(room)
    fault = Fault(int(rng.integers(1, calls + 1)), int(rng.choice(ERRORS)), bool(rng.integers(2)))
    about = f"{name}, call {fault.call} of {calls}, {errno.errorcode[fault.number]}{', and all after it' * fault.stays}"
    try:
        ended, _ = attempt(command, room, place, fault)
        check_manners(ended)
        check_state(command.state(room), before, wanted)
        again, _ = attempt(command, room, place, Fault())
        if again.status:
            raise Lost(f"the same command, with room again: {again.err}")
        if command.state(room) != wanted:
            raise Lost("the same command, with room again, ends in something else")
        if left := [path.name for path in room.rglob(".*")]:
            raise Lost(f"left behind: {', '.join(left)}")
    except Lost as error:
        raise Lost(f"{about}: {error}") from None
    return f"{name} {'stopped' if ended.status else 'done all the same'}"


def check_state(found: dict, before: dict, wanted: dict) -> None:
    """Each file is as it was, or as it is to be. Files of a run have to be resumed, which comes next."""
    for name, digest in found.items():
        if digest not in (before.get(name), wanted.get(name)):
            raise Lost(f"{name} is neither what it was nor what it is to be")
    if gone := set(before) - set(found):
        raise Lost(f"{', '.join(gone)} was there and is gone")


def attempt(command: "Disk", room: Path, place: Path, fault: Fault) -> tuple[Ended, int]:
    """Run it with a fault; also the number of calls that it made."""
    counted = place / "calls"

    def main(argv) -> int:
        library = ctypes.CDLL(None)
        library.fault_arm(os.fsencode(room), *map(ctypes.c_long, (fault.call, fault.number, fault.stays)))
        try:
            return command.main(argv)
        finally:
            counted.write_text(str(library.fault_calls()))

    return run(main, command.argv(room), place), int(counted.read_text())


def fresh(command: "Disk", room: Path) -> Path:
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    command.before(room)
    return room


@cache
def unbroken(name: str, place: Path) -> tuple[int, dict]:
    """The calls of a command that nothing happens to, and what it leaves."""
    command = COMMANDS[name](place)
    room = fresh(command, place / "room")
    ended, calls = attempt(command, room, place, Fault())
    if ended.status:
        raise Lost(f"before any fault: {ended.err}")
    return calls, command.state(room)


# ---------------------------------------------------------------------------------------------- the commands


def files(room: Path) -> dict[str, str]:
    """SHA-256 of the files of a room, but for hidden ones."""
    found = content(room)
    return {n: hashlib.sha256(d).hexdigest() for n, d in found.items() if not any(p[0] == "." for p in Path(n).parts)}


def run_state(room: Path) -> dict[str, str]:
    """Of a run that is done; of others nothing, because their files have times in them."""
    last, epochs = room / "run" / LAST, 2 if (room / "two epochs").exists() else 1
    if not last.exists() or torch.load(last, weights_only=True)["epoch"] < epochs:
        return {}
    return fingerprints(room / "run")


@dataclass(frozen=True)
class Disk:
    """A command: main(argv(room)), what is in the room before, and what it leaves there."""

    main: Callable
    argv: Callable
    before: Callable = lambda room: None
    state: Callable = files


def packing(_: Path) -> Disk:
    def main(argv) -> int:
        pack.pack(source(), Path(argv[0]), workers=1, shards=2)
        return 0

    return Disk(main, lambda room: [room / "store"])


def training(place: Path) -> Disk:
    new = ["--data", small_store(place), "--epochs", 1, "--batch-size", 16, "--workers", 0, "--device", "cpu"]

    def argv(room: Path) -> list:
        resumes = any((room / "run" / name).exists() for name in (LAST, PREVIOUS))
        return ["--out", room / "run", *(["--resume"] if resumes else new)]

    return Disk(train.main, argv, state=run_state)


def resuming(place: Path) -> Disk:
    def before(room: Path) -> None:
        inputs.copy_run(small_run(place), room / "run")
        (room / "two epochs").touch()

    return Disk(train.main, lambda room: ["--resume", "--out", room / "run"], before, run_state)


def testing(place: Path) -> Disk:
    names = {"--predictions": "p.csv", "--features": "f.npz", "--confusion": "c.png"}

    def argv(room: Path) -> list:
        outputs = [part for option, name in names.items() for part in (option, room / name)]
        return [small_run(place) / "best.pt", "--data", small_store(place), "--device", "cpu", *outputs]

    return Disk(test.main, argv, lambda room: (room / "p.csv").write_bytes(OLD))


def exporting(place: Path) -> Disk:
    return Disk(export.main, lambda room: [small_run(place) / "best.pt", room / "net.safetensors"],
                lambda room: (room / "net.safetensors").write_bytes(OLD))


def converting(place: Path) -> Disk:
    return Disk(convert.main, lambda room: [inputs.torchvision_file(place), room / "net.pt"],
                lambda room: (room / "net.pt").write_bytes(OLD))


COMMANDS = {
    "packing": packing, "training": training, "resuming": resuming, "testing": testing, "exporting": exporting,
    "converting": converting,
}
if not find_spec("safetensors"):  # which requirements.txt does not bring
    del COMMANDS["exporting"]
