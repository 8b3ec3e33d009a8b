"""One packing, from its options to its folder of finished shards, which outlives a packer that is killed."""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data.manifest import FORMAT
from data.pictures import Files, pixels, say
from data.trees import Source
from utils import UserError, shown


@dataclass
class Job:
    """One packing: what is made of a source, and where. `building` is next to the store that is to be, and holds its
    folder `store`, a .json for each finished shard and, of training shards, an .npz with the sums of their pixels."""

    source: Source
    out: Path
    size: int
    codec: str
    shards: int

    @property
    def building(self) -> Path:
        return self.out.parent / f".{self.out.name}.packing"

    @property
    def store(self) -> Path:
        return self.building / "store"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.size, self.size, self.source.channels

    @cached_property
    def settings(self) -> dict:
        """What the shards of a store must agree on. Pictures that are files count by their names, so that machines
        with other layouts can share the work; arrays by their content; HDF5 files by their size."""
        settings = {
            "format": FORMAT, "size": self.size, "codec": self.codec, "channels": self.source.channels,
            "shards": self.shards, "classes": hashlib.sha256(json.dumps(self.source.classes).encode()).hexdigest(),
        }
        for split, part in self.source.splits.items():
            digest = hashlib.sha256(part.labels.tobytes())
            if isinstance(part.pictures, Files):
                for index in range(len(part.pictures)):
                    digest.update(part.pictures.name(index).encode() + b"\n")
            elif isinstance(part.pictures, np.ndarray):
                digest.update(np.ascontiguousarray(part.pictures))
            else:
                digest.update(b"%d" % part.pictures.path.stat().st_size)
            settings[f"pictures of {split}"] = digest.hexdigest()
        return settings

    def digest(self) -> str:
        """A SHA-256 of the settings, and of the sizes and times of change of the files that are packed: reading all
        of them would take as long as packing."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for part in self.source.splits.values():
            files = [getattr(part.pictures, "path", None)]  # of HDF5
            if isinstance(part.pictures, Files):
                place, members = part.pictures.place, part.pictures.members
                files = [place] if part.pictures.offsets is not None else (os.path.join(place, m) for m in members)
            for file in filter(None, files):
                with suppress(OSError):  # told when it is packed
                    status = os.stat(file)
                    digest.update(b"%d %d\n" % (status.st_size, status.st_mtime_ns))
        return digest.hexdigest()

    def rows(self, split: str, number: int) -> range:
        """The pictures of a split that go into one of its shards."""
        count, more = divmod(len(self.source.splits[split].labels), self.shards)
        first = number * count + min(number, more)
        return range(first, first + count + (number < more))

    def finished(self, split: str, number: int) -> dict | None:
        """What the .json of a shard says, if it is there and whole, and of this packing."""
        name = shard_name(split, number)
        try:
            entry = json.loads((self.building / f"{name}.json").read_text())
            whole = (self.store / name / "data.mdb").stat().st_size == entry["file"]["bytes"]
            if split == "train":
                whole = whole and (self.building / f"{name}.npz").stat().st_size == entry["sums"]["bytes"]
            return entry if whole and entry["job"] == self.settings else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def forget(self, split: str, number: int) -> None:
        """A finished shard is to be packed again."""
        (self.building / f"{shard_name(split, number)}.json").unlink()


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}"


def refuse_place(job: Job) -> None:
    try:
        str(job.out).encode()
    except UnicodeEncodeError:
        raise UserError(f"{str(job.out)!a}: LMDB opens paths of UTF-8 text only; choose another --out") from None
    if os.path.lexists(job.out):
        if job.building.exists() and not job.store.exists():  # a packer was killed just after its last step
            shutil.rmtree(job.building, ignore_errors=True)
        raise UserError(f"{job.out} exists; remove it or choose another --out")


def agree(job: Job) -> None:
    """Refuse to mix finished shards of another packing with this one's."""
    for file in sorted(job.building.glob("*-*.json")):
        try:
            there = dict(json.loads(file.read_text())["job"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: the shard is not called finished
        different = [name for name in job.settings | there if there.get(name) != job.settings.get(name)]
        if different:
            raise UserError(
                f"{job.building} has finished shards of another packing (not the same: {', '.join(different)}); "
                "remove it, or give the same options and the same pictures"
            )


def forget_repaired(job: Job, numbers: range) -> None:
    """Finished shards are packed again where they skipped a picture that can be read by now."""
    for split, part in job.source.splits.items():
        for number in numbers:
            for skipped in (job.finished(split, number) or {"skipped": ()})["skipped"]:
                with suppress(Exception):  # pictures raise nearly anything
                    pixels(part.pictures[skipped["row"]], job.source.channels)
                    job.forget(split, number)
                    name = shard_name(split, number)
                    say(f"{skipped['picture']} can be read now: {name} is packed again")
                    break


def tidy(job: Job, numbers: range) -> None:
    """After a failure: remove what is not finished, and everything where nothing is."""
    every = [(split, number) for split in job.source.splits for number in range(job.shards)]
    kept = [shard for shard in every if job.finished(*shard)]
    if not kept and len(numbers) == job.shards:
        shutil.rmtree(job.building, ignore_errors=True)
        return
    for split, number in every:
        if number in numbers and (split, number) not in kept:
            shutil.rmtree(job.store / shard_name(split, number), ignore_errors=True)
    say(f"{len(kept)} of {len(every)} shards are kept in {shown(job.building)}; the same command goes on, if the "
        "pictures stay the same")
