"""Pack a source into a store, or verify a store:

    python -m data.pack SOURCE [--out data/stores/NAME] [--size N] [--codec jpeg|raw] [--workers N] [--shards N]
                               [--only-shards A:B] [--val FRACTION] [--download yes|no]
    python -m data.pack --verify STORE

A packing that was killed goes on where it was: the same command keeps the shards that were finished.
"""

import fcntl
import json
import os
import re
import shutil
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np

import utils
from data import sources
from data.encode import CHUNK, Moments, encode_chunk
from data.job import Job, agree, forget_repaired, refuse_place, shard_name, tidy
from data.manifest import CODECS, FORMAT, MANIFEST, MEAN, SHORTER_SIDE, checksum, file_entry
from data.pictures import Files, printable, say
from data.pool import in_order, start_pool
from data.store import ShardWriter, Store, names_file
from data.trees import UNLABELLED, VAL
from utils import Parser, Progress, UserError, run_script, shown, sync_folder, whole, write_text

STORES = Path(__file__).parent / "stores"
MAX_SKIPPED = 0.01  # of a split's pictures; more stops the packing
PICTURES_A_SHARD = 50_000  # of the training split, where --shards does not say
LARGEST = 4096  # side of a store's pictures in pixels
UNEVEN = 3  # times as many pictures of one class as of another: worth a word
HANDFUL = 20  # training pictures of a class: so few are worth a word
NAMED_REPAIRS = 100  # names that the manifest keeps of each kind of repair


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    if bool(args.source) == bool(args.verify):
        raise UserError("give a SOURCE to pack or --verify STORE (--help lists the options)")
    if args.verify:
        packing = ("out", "size", "codec", "shards", "only_shards", "val")
        useless = [name for name in packing if getattr(args, name) is not None]
        if useless:
            raise UserError(f"--{useless[0].replace('_', '-')} is for packing; --verify STORE checks a store as it is")
        store = Store(args.verify)
        with start_pool(args.workers) as pool:
            verify(store, pool)
        say(f"sound   {_summary(store)}")
        return 0
    if args.only_shards and not args.shards:
        raise UserError("--only-shards says which of --shards N to pack; give both")
    source = sources.find(args.source, args.download == "yes", args.val)
    out = Path(args.out) if args.out else STORES / source.name
    pack(source, out, size=args.size, codec=args.codec, workers=args.workers, shards=args.shards, only=args.only_shards)
    return 0


def make_parser() -> Parser:
    parser = Parser(prog="python -m data.pack", description="Pack pictures into a store, or verify one.")
    parser.add_argument("source", nargs="?",
                        help=f"{', '.join(sources.NAMED)}, a folder (ImageFolder tree, ImageNet's official tar files, "
                        "Kaggle's ImageNet, Caffe's lists) or an .h5 file; data/README.md describes them")
    parser.add_argument("--out", help="folder of the store (default: data/stores/NAME)")
    parser.add_argument("--size", type=whole(16, LARGEST), metavar="N",
                        help="side of the stored pictures in pixels (default: 256, small sets 72)")
    parser.add_argument("--codec", choices=CODECS, help="default: raw for small sets, jpeg (quality 90) otherwise")
    parser.add_argument("--workers", type=whole(1), default=len(os.sched_getaffinity(0)),
                        help="processes (default: one a core, %(default)s)")
    parser.add_argument("--shards", type=whole(1, 99_999), metavar="N",
                        help=f"LMDB files a split (default: one for every full {PICTURES_A_SHARD:,} training pictures)")
    parser.add_argument("--only-shards", type=shard_range, metavar="A:B",
                        help="pack the shards from A up to, not including, B, and leave the others to other machines; "
                        "the last one makes the store")
    parser.add_argument("--val", type=utils.number(0, 1), metavar="FRACTION",
                        help=f"of the training pictures of a folder without val/, to validate with (default: {VAL})")
    parser.add_argument("--download", choices=("yes", "no"), default="yes", help="may a named set be downloaded?")
    parser.add_argument("--verify", metavar="STORE", help="check every file and record of a store")
    return parser


def shard_range(text: str) -> tuple[int, int]:
    """An argument type: A:B, whole numbers with A < B."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise ArgumentTypeError(f"{text} is not a range such as 0:4")
    return int(first), int(last)


def pack(
    source, out: Path, *, size=None, codec=None, workers: int = 1, shards: int | None = None,
    only: tuple[int, int] | None = None,
) -> Store | None:
    """Pack a sources.Source into a new store at `out`, built in a folder next to it, verified, then renamed: a packer
    that is killed leaves no half store, and the next one keeps its finished shards. only: the shards A up to B alone;
    None where others are missing still. Raises UserError where `out` exists or more than 1% cannot be read."""
    out = Path(out)
    shards = shards or shards_of(source)
    job = Job(source, out, size or source.size, codec or source.codec, shards)
    first, last = only or (0, shards)
    if last > shards:
        raise UserError(f"--only-shards {first}:{last}: there are {shards} shards")
    refuse_place(job)
    job.store.mkdir(parents=True, exist_ok=True)
    with open(job.building / "lock", "a") as lock:
        try:
            # A byte a shard. Unlike flock's, these locks hold between machines, and forked workers do not inherit them.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, last - first, first)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another process is packing {out}; wait for it") from None
        except OSError as error:  # network disks may have no locks
            raise UserError(f"{job.building}/lock cannot be locked ({error.strerror}), which keeps two processes from "
                            "packing the same; choose an --out on another disk") from None
        refuse_place(job)
        agree(job)
        try:
            say(f"packing {source.name} into {shown(out)} ({job.size} x {job.size} pixels, {job.codec})")
            forget_repaired(job, range(first, last))
            with start_pool(workers) as pool:
                resumed = not _write(job, pool, range(first, last))
                if not _complete(job, pool, lock, resumed):
                    return None
        except BaseException:
            tidy(job, range(first, last))
            raise
    store = Store(out)
    say(f"packed  {_summary(store)}")
    for split, kinds in store.manifest["repaired"].items():
        counts = ", ".join(f"{kind['count']:,} {word}" for word, kind in kinds.items())
        say(f"repaired in {split}: {counts}")
    for line in about_classes(source):
        say(line)
    return store


def about_classes(source) -> list[str]:
    """What to know of classes with few training pictures, before time is spent on them."""
    counts = np.bincount(source.splits["train"].labels, minlength=len(source.classes))
    least, most = int(counts.argmin()), int(counts.argmax())
    lines, few = [], int((counts < HANDFUL).sum())
    if counts[most] > UNEVEN * counts[least] > 0:
        lines.append(f"classes are uneven, from {counts[least]:,} ({source.classes[least]}) to {counts[most]:,} "
                     f"({source.classes[most]}) training pictures; train.py --balance shows each class equally often")
    if few:
        lines.append(f"{few} of {len(counts)} classes have fewer than {HANDFUL} training pictures "
                     f"({source.classes[least]}: {counts[least]}); expect a net to miss them, or add some")
    return lines


# ---------------------------------------------------------------------------------------------- shards


def _write(job: Job, pool, numbers: range) -> bool:
    """Write the shards `numbers` of each split, but for those that are finished; whether that was the whole store."""
    count = 0
    for split in job.source.splits:
        entries = {number: job.finished(split, number) for number in numbers}
        total = sum(len(job.rows(split, number)) for number in numbers)
        done = sum(len(job.rows(split, number)) for number, entry in entries.items() if entry)
        skipped = sum(len(entry["skipped"]) for entry in entries.values() if entry)
        written = None
        with Progress(f"packing {split}", total, start=done) as progress:
            try:
                for number in numbers:
                    if entries[number]:
                        continue
                    count += 1
                    entry = _write_shard(job, pool, split, number, skipped, progress)
                    skipped += len(entry["skipped"])
                    if written:
                        _finish(job, *written)
                    # Its checksum is made while the next shard is written.
                    path = job.store / shard_name(split, number) / "data.mdb"
                    written = split, number, entry, pool.submit(file_entry, path)
            finally:  # also where the next shard failed
                if written:
                    _finish(job, *written)
    return count == job.shards * len(job.source.splits)


def _write_shard(job: Job, pool, split: str, number: int, skipped_before: int, progress) -> dict:
    """Write one shard, in order: {first: the key of its first record, count, skipped, repaired, and of training shards
    sums: size and checksum of the file of sums}."""
    part, rows, name = job.source.splits[split], job.rows(split, number), shard_name(split, number)
    shutil.rmtree(job.store / name, ignore_errors=True)  # what a killed packer left
    writer = ShardWriter(job.store / name)
    skipped, repaired, moments = [], {}, Moments(job.shape) if split == "train" else None
    starts = range(rows.start, rows.stop, CHUNK)
    chunks = (slice(start, min(start + CHUNK, rows.stop)) for start in starts)
    jobs = ((part.pictures[c], part.labels[c], c.start, job.shape, job.codec, moments is not None) for c in chunks)
    try:
        for done in in_order(pool, encode_chunk, jobs):
            for record in done.records:
                writer.put(rows.start + writer.count, record)
            for entry in done.skipped:
                place = f" in {part.pictures.where(entry['row'])}" if isinstance(part.pictures, Files) else ""
                print(printable(f"skipped{place}: {entry['reason']}"), file=sys.stderr, flush=True)
            skipped += done.skipped
            if skipped:
                _stop_if_too_many(job, split, skipped_before + len(skipped), skipped[0])
            for word, names in done.repaired.items():
                repaired.setdefault(word, []).extend(names)
            if moments:
                moments.add(done.moments)
            progress.update(len(done.records) + len(done.skipped))
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    kinds = {word: {"count": len(names), "first": names[:NAMED_REPAIRS]} for word, names in sorted(repaired.items())}
    entry = {"first": rows.start, "count": writer.count, "skipped": skipped, "repaired": kinds}
    if moments:
        file = job.building / f"{name}.npz"
        with open(file, "wb") as handle:
            np.savez(handle, count=moments.count, total=moments.total, products=moments.products)
            handle.flush()
            os.fsync(handle.fileno())
        entry["sums"] = file_entry(file)
    return entry


def _stop_if_too_many(job: Job, split: str, skipped: int, one: dict) -> None:
    total = len(job.source.splits[split].labels)
    if skipped > MAX_SKIPPED * total:
        raise UserError(
            f"{skipped} of {total} pictures of {split} cannot be read, more than {MAX_SKIPPED:.0%}; repair or replace "
            f"them, or remove them; one of them: {one['reason']}"
        )


def _stop_if_a_class_is_gone(job: Job, skipped: list[dict]) -> None:
    labels = job.source.splits["train"].labels
    rows = [one["row"] for one in skipped]
    gone = np.setdiff1d(labels[rows], np.delete(labels, rows))
    if len(gone):
        one = next(one for one in skipped if labels[one["row"]] == gone[0])
        raise UserError(f"no training picture of {job.source.classes[gone[0]]} can be read: {one['reason']}; repair "
                        "or replace its pictures, or remove the class")


def _finish(job: Job, split: str, number: int, entry: dict, file) -> None:
    """Call a shard finished: its .json is written last."""
    entry |= {"job": job.settings, "file": file.result()}
    write_text(job.building / f"{shard_name(split, number)}.json", json.dumps(entry))


# ---------------------------------------------------------------------------------------------- the store


def _complete(job: Job, pool, lock, resumed: bool) -> bool:
    """Make the store of finished shards and move it to its place; false where shards are missing. resumed: some were
    finished by others, and are compared with their checksums, too."""
    # Each process unlocks its shards before it tries to lock all of them: the last one to finish gets them.
    fcntl.lockf(lock, fcntl.LOCK_UN)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        say("finished; other processes are still at work, and the last one makes the store")
        return False
    if job.out.exists():
        return True
    agree(job)
    entries = {split: [job.finished(split, n) for n in range(job.shards)] for split in job.source.splits}
    missing = sorted({n for part in entries.values() for n, entry in enumerate(part) if not entry})
    if missing:
        say(f"finished; shards {', '.join(map(str, missing))} of {job.shards} are missing still")
        return False
    for split, part in entries.items():
        skipped = [one for entry in part for one in entry["skipped"]]
        if skipped:
            _stop_if_too_many(job, split, len(skipped), skipped[0])
        if skipped and split == "train":
            _stop_if_a_class_is_gone(job, skipped)
    try:
        _describe(job, entries)
        (verify if resumed else verify_records)(Store(job.store), pool)
    except UserError:
        if not _forget_damaged(job, entries):
            raise
        raise UserError("finished shards were damaged on the disk; the same command packs them again") from None
    wanted = {shard_name(split, number) for split in entries for number in range(job.shards)}
    for folder in job.store.iterdir():
        if folder.is_dir() and folder.name not in wanted:
            shutil.rmtree(folder)  # begun with another number of shards, and killed
    job.store.rename(job.out)
    sync_folder(job.out.parent)
    shutil.rmtree(job.building, ignore_errors=True)
    return True


def _forget_damaged(job: Job, entries: dict[str, list[dict]]) -> int:
    """How many finished shards are no longer what they were, by their checksums; they are called finished no more."""
    damaged = 0
    for split, part in entries.items():
        for number, entry in enumerate(part):
            name = shard_name(split, number)
            files = {job.store / name / "data.mdb": entry["file"], job.building / f"{name}.npz": entry.get("sums")}
            if any(wanted and file_entry(file) != wanted for file, wanted in files.items()):
                job.forget(split, number)
                damaged += 1
    return damaged


def _describe(job: Job, entries: dict[str, list[dict]]) -> None:
    """Write the store's mean, its lists of names and, last, its manifest."""
    source, moments = job.source, Moments(job.shape)
    for number in range(job.shards):
        try:
            with np.load(job.building / f"{shard_name('train', number)}.npz") as sums:
                part = Moments(job.shape)
                part.count, part.total, part.products = int(sums["count"]), sums["total"], sums["products"]
                moments.add(part)
        except Exception as error:  # zipfile and numpy have many for damaged files
            raise UserError(f"{shard_name('train', number)}.npz is damaged ({type(error).__name__})") from None
    with open(job.store / MEAN, "wb") as file:
        np.save(file, moments.mean().astype(np.float32))
        file.flush()
        os.fsync(file.fileno())
    files = {MEAN: file_entry(job.store / MEAN)}
    for split, part in source.splits.items():
        if split != "train" and isinstance(part.pictures, Files):
            without = {skipped["row"] for entry in entries[split] for skipped in entry["skipped"]}
            names = [part.pictures.name(row) for row in range(len(part.labels)) if row not in without]
            write_text(job.store / names_file(split), "".join(f"{name}\n" for name in names))
            files[names_file(split)] = file_entry(job.store / names_file(split))
        for number, entry in enumerate(entries[split]):
            files[f"{shard_name(split, number)}/data.mdb"] = entry["file"]
    manifest = {
        "format": FORMAT, "name": source.name, "classes": source.classes, "wnids": source.wnids,
        "image_size": job.size, "channels": source.channels, "codec": job.codec, "resize": SHORTER_SIDE,
        "shards": {
            split: [
                {"folder": shard_name(split, number), "count": entry["count"], "first": entry["first"]}
                for number, entry in enumerate(part)
            ]
            for split, part in entries.items()
        },
        "unlabelled": [split for split, part in source.splits.items() if (part.labels == UNLABELLED).all()],
        "skipped": [
            {"split": split, "picture": skipped["picture"], "reason": skipped["reason"]}
            for split, part in entries.items() for entry in part for skipped in entry["skipped"]
        ],
        "repaired": {split: _repairs(part) for split, part in entries.items() if _repairs(part)},
        "channel_mean": moments.mean().mean((0, 1)).tolist(), "pca": moments.pca(), "files": files,
    }
    write_text(job.store / MANIFEST, json.dumps(manifest | {"checksum": checksum(manifest)}, indent=1))


def _repairs(entries: list[dict]) -> dict:
    """{kind: {count, first names}} of a split, from its shards'."""
    total = {}
    for entry in entries:
        for word, kind in entry["repaired"].items():
            sums = total.setdefault(word, {"count": 0, "first": []})
            sums["count"] += kind["count"]
            sums["first"] = (sums["first"] + kind["first"])[:NAMED_REPAIRS]
    return dict(sorted(total.items()))


def _summary(store: Store) -> str:
    counts = ", ".join(f"{count:,} {split}" for split, count in store.counts.items())
    size = sum(entry["bytes"] for entry in store.manifest["files"].values())
    skipped = f", {len(store.manifest['skipped'])} skipped" if store.manifest["skipped"] else ""
    return f"{shown(store.path)}: {counts} pictures{skipped}, {len(store.classes)} classes, {size / 1e6:,.0f} MB"


def named_store(name: str, download: bool | None = True) -> Store:
    """The store of a named set, packed first where there is none. download: may the set be fetched; None: do not
    even pack it. Raises UserError, and sources.Unavailable where the set cannot be had."""
    path = STORES / name
    if path.exists():
        return Store(path)
    if download is None:
        raise UserError(f"there is no store {shown(path)}; make it first: python -m data.pack {name}")
    return pack_or_open(sources.find(name, download), path)


def store_of(path: Path, size: int | None = None, val: float | None = None) -> Store:
    """The store of a folder of pictures or another source on disk, data/stores/NAME-DIGEST, packed first where there is
    none of what the source holds now (Job.digest). size, val: as --size and --val of data.pack. Raises UserError."""
    if size and size > LARGEST:
        raise UserError(f"pictures of {size} x {size} pixels are more than a store holds ({LARGEST})")
    if next(path.glob("*/data.mdb"), None):
        raise UserError(f"{path} is a store without its {MANIFEST}; copy or pack it again")
    source = sources.find(str(path), val=val)
    job = Job(source, STORES / source.name, size or source.size, source.codec, shards_of(source))
    job.out = out = STORES / f"{source.name}-{job.digest()[:8]}"
    if out.exists():
        return Store(out)
    unfinished = re.compile(rf"\.{re.escape(source.name)}-[0-9a-f]{{8}}\.packing")
    for other in sorted(STORES.glob(".*.packing")):
        if other != job.building and unfinished.fullmatch(other.name):
            say(f"{shown(other)} is an unfinished packing of other pictures; remove it unless it is under way")
    return pack_or_open(source, out, size)


def pack_or_open(source, out: Path, size: int | None = None) -> Store:
    """The new store, or the one that another process has packed there in the meantime."""
    try:
        return pack(source, out, size=size, workers=len(os.sched_getaffinity(0)))
    except UserError:
        if not out.exists():
            raise
        return Store(out)


def shards_of(source) -> int:
    """How many, where nothing else is asked for."""
    return max(1, len(source.splits["train"].labels) // PICTURES_A_SHARD)


def verify(store: Store, pool) -> None:
    """Check every file's checksum and every record of a store. Raises UserError at the first fault."""
    for _ in in_order(pool, check_file, ((store.path / name, e) for name, e in store.manifest["files"].items())):
        pass
    verify_records(store, pool)


def verify_records(store: Store, pool) -> None:
    """Read every record back and compare its CRC, shape and label. Raises UserError at the first fault."""
    step = 64 * CHUNK
    parts = (
        (store.split(split), start, min(start + step, count))
        for split, count in store.counts.items() for start in range(0, count, step)
    )
    with Progress("verifying", sum(store.counts.values())) as progress:
        for count in in_order(pool, check_records, parts):
            progress.update(count)


def check_file(job) -> None:
    path, entry = job
    if file_entry(path)["sha256"] != entry["sha256"]:
        raise UserError(f"{path} is damaged (wrong SHA-256); copy or pack the store again")


def check_records(job) -> int:
    records, start, stop = job
    records.check(np.arange(start, stop))
    return stop - start


if __name__ == "__main__":
    run_script(main)
