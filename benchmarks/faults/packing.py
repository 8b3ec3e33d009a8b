"""Packings that are killed at random moments and started anew: there is a whole store or none, no process outlives its
packer, and in the end the store has the bytes of one that nothing happened to."""

import shutil
import signal
import time
from pathlib import Path

import numpy as np

from benchmarks.faults import Command, Lost, check_manners, source
from data import pack

KILLS = 10  # of a packing at most; then it goes on to its end


def case(place: Path, rng: np.random.Generator) -> list[str]:
    codec, shards, workers = str(rng.choice(["jpeg", "raw"])), int(rng.integers(1, 6)), int(rng.integers(1, 4))
    whole, seconds = unbroken(place, codec, shards)
    out = place / "packed"
    kills = 0
    while not out.exists():
        command = packer(place, out, codec, shards, workers)
        until = time.monotonic() + (rng.uniform(0, seconds) if kills < KILLS else 1e9)
        while not command.has_ended() and time.monotonic() < until:
            time.sleep(0.005)
        command.signal(signal.SIGKILL)
        check_manners(command.end(), (0, -signal.SIGKILL))
        kills += command.ended.status == -signal.SIGKILL
        if command.ended.status == 0 and not out.exists():
            raise Lost("a packer ended well and left no store")
    if content(out) != content(whole):
        raise Lost(f"{codec}, {shards} shards: after {kills} kills the store has other bytes")
    for folder in (out, place / ".packed.packing"):
        shutil.rmtree(folder, ignore_errors=True)
    return [codec, *["SIGKILL"] * kills]


def packer(place: Path, out: Path, codec: str, shards: int, workers: int) -> Command:
    def main(_) -> int:
        pack.pack(source(160, (240, 40, 30)), out, size=128, codec=codec, workers=workers, shards=shards)
        return 0

    return Command(main, [], place)


def unbroken(place: Path, codec: str, shards: int) -> tuple[Path, float]:
    """A store that nothing happened to, made once, and the seconds of its packing."""
    out = place / f"packed-{codec}-{shards}"
    began = time.monotonic()
    if not out.exists():
        check_manners(packer(place, out, codec, shards, 2).end(), (0,))
        (place / f"{out.name}.seconds").write_text(str(time.monotonic() - began))
    return out, float((place / f"{out.name}.seconds").read_text())


def content(folder: Path) -> dict[str, bytes]:
    """The files below a folder, by their paths."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
