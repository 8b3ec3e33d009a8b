"""Pack a source into a store, or verify a store:

    python -m data.pack SOURCE [--out data/stores/NAME] [--size N] [--codec jpeg|raw] [--workers N] [--shards N]
                               [--download yes|no]
    python -m data.pack --verify STORE
"""

import fcntl
import io
import json
import os
import shutil
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_all_start_methods, get_context, parent_process
from pathlib import Path

import numpy as np

from data import UserError, sources
from data.cli import Parser, run_script, shown, whole
from data.progress import Progress
from data.store import CODECS, FORMAT, MANIFEST, MEAN, ShardWriter, Store, encode_record, file_entry, sync_folder

STORES = Path(__file__).parent / "stores"
JPEG_QUALITY = 90
CHUNK = 64  # pictures that a worker encodes at a time
MAX_SKIPPED = 0.01  # of a split's pictures; more stops the packing


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    if bool(args.source) == bool(args.verify):
        raise UserError("give a SOURCE to pack or --verify STORE (--help lists the options)")
    if args.verify:
        store = Store(args.verify)
        verify(store)
        print(f"sound   {_summary(store)}")
        return 0
    source = sources.find(args.source, args.download == "yes")
    out = Path(args.out) if args.out else STORES / source.name
    pack(source, out, size=args.size, codec=args.codec, workers=args.workers, shards=args.shards)
    return 0


def make_parser() -> Parser:
    parser = Parser(prog="python -m data.pack", description="Pack pictures into a store, or verify one.")
    parser.add_argument("source", nargs="?", help=f"{', '.join(sources.NAMED)}, an ImageFolder tree or an .h5 file")
    parser.add_argument("--out", help="folder of the store (default: data/stores/NAME)")
    parser.add_argument("--size", type=whole(63), metavar="N",
                        help="side of the stored pictures in pixels (default: 256, small sets 72)")
    parser.add_argument("--codec", choices=CODECS, help="default: raw for small sets, jpeg (quality 90) otherwise")
    parser.add_argument("--workers", type=whole(1), default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--shards", type=whole(1), default=1, help="LMDB files a split (default: %(default)s)")
    parser.add_argument("--download", choices=("yes", "no"), default="yes", help="may a named set be downloaded?")
    parser.add_argument("--verify", metavar="STORE", help="check every file and record of a store")
    return parser


def pack(source, out: Path, *, size=None, codec=None, workers: int = 1, shards: int = 1) -> Store:
    """Pack a sources.Source into a new store at `out`, built in a folder beside it, verified, then renamed: a packer
    that is killed leaves no half store. Raises UserError where `out` exists or more than 1% cannot be read."""
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists; remove it or choose another --out")
    size, codec = size or source.size, codec or source.codec
    out.parent.mkdir(parents=True, exist_ok=True)
    building = out.parent / f".{out.name}.packing"
    building.mkdir(exist_ok=True)
    with open(building / "lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, forked workers do not inherit it
        except OSError:
            raise UserError(f"another process is packing {out}; wait for it") from None
        _clear(building)  # what a killed packer left
        try:
            print(f"packing {source.name} into {shown(out)} ({size} x {size} pixels, {codec})", flush=True)
            _write(source, building, size, codec, workers, shards)
            verify(Store(building))
            (building / "lock").unlink()
            building.rename(out)
            sync_folder(out.parent)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    store = Store(out)
    print(f"packed  {_summary(store)}", flush=True)
    return store


def _summary(store: Store) -> str:
    counts = ", ".join(f"{count:,} {split}" for split, count in store.counts.items())
    size = sum(entry["bytes"] for entry in store.manifest["files"].values())
    return f"{shown(store.path)}: {counts} pictures, {len(store.classes)} classes, {size / 1e6:,.0f} MB"


def named_store(name: str, download: bool | None = True) -> Store:
    """The store of a named set, packed first where there is none. download: may the set be fetched; None: do not
    even pack it. Raises UserError, and sources.Unavailable where the set cannot be had."""
    path = STORES / name
    if path.exists():
        return Store(path)
    if download is None:
        raise UserError(f"there is no store {shown(path)}; make it first: python -m data.pack {name}")
    return pack(sources.find(name, download), path, workers=os.cpu_count() or 1)


def _clear(building: Path) -> None:
    for entry in building.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()


def _write(source, building: Path, size: int, codec: str, workers: int, shards: int) -> None:
    shape = (size, size, source.channels)
    moments = Moments(shape)
    manifest = {
        "format": FORMAT, "name": source.name, "classes": source.classes, "image_size": size,
        "channels": source.channels, "codec": codec, "resize": sources.SHORTER_SIDE,
        "shards": {}, "skipped": [],
    }
    with _pool(workers) as pool:
        for split, part in source.splits.items():
            manifest["shards"][split] = []
            with Progress(f"packing {split}", len(part.labels)) as progress:
                for number, rows in enumerate(np.array_split(np.arange(len(part.labels)), shards)):
                    folder = f"{split}-{number:05d}"
                    first = sum(s["count"] for s in manifest["shards"][split])
                    count, skipped = _write_shard(
                        pool, part, rows, building / folder, first, shape, codec, progress,
                        moments if split == "train" else None,
                    )
                    manifest["skipped"] += [{"split": split, **entry} for entry in skipped]
                    manifest["shards"][split].append({"folder": folder, "count": count})
                    _stop_if_too_many(manifest["skipped"], split, len(part.labels))
    np.save(building / MEAN, moments.mean().astype(np.float32))
    manifest["channel_mean"], manifest["pca"] = moments.mean().mean((0, 1)).tolist(), moments.pca()
    files = [MEAN] + [f"{s['folder']}/data.mdb" for part in manifest["shards"].values() for s in part]
    manifest["files"] = {name: file_entry(building / name) for name in files}
    with open(building / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _write_shard(pool, part, rows, folder: Path, first: int, shape, codec, progress, moments):
    """Write the pictures `rows` of a split, in order, as records first, first + 1, ...: how many, and what was
    left out."""
    writer, skipped = ShardWriter(folder), []
    try:
        chunks = (rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK))
        sums = moments is not None
        jobs = (([part.pictures[r] for r in chunk], part.labels[chunk], shape, codec, sums) for chunk in chunks)
        for records, bad, part_sums in _in_order(pool, encode_chunk, jobs):
            for record in records:
                writer.put(first + writer.count, record)
            for entry in bad:
                print(f"left out: {entry['reason']}", file=sys.stderr)
            skipped += bad
            if sums:
                moments.add(*part_sums)
            progress.update(len(records) + len(bad))
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    return writer.count, skipped


def _stop_if_too_many(skipped: list, split: str, total: int) -> None:
    here = [entry for entry in skipped if entry["split"] == split]
    if len(here) > MAX_SKIPPED * total:
        raise UserError(
            f"{len(here)} of {total} pictures of {split} cannot be read, more than 1%; "
            f"first: {here[0]['reason']}"
        )


def encode_chunk(job):
    """In a worker: records, pictures left out, and for the training split (count, sum of the pictures, channel
    products): whole numbers, so that their totals do not depend on the number of workers."""
    pictures, labels, (size, _, channels), codec, with_sums = job
    records, bad = [], []
    total = np.zeros((size, size, channels), np.int64)
    products = np.zeros((channels, channels), np.int64)
    for picture, label in zip(pictures, labels, strict=True):
        try:
            pixels = sources.to_square(picture, size, channels)
            records.append(encode_record(_payload(pixels, codec), int(label), pixels.shape, codec))
        except Exception as error:  # Pillow raises nearly anything on pictures that are odd enough
            name = str(picture) if isinstance(picture, Path) else "an array"
            reason = str(error) if isinstance(error, UserError) else f"{name} cannot be packed ({error!r})"
            bad.append({"picture": name, "reason": reason})
            continue
        if with_sums:
            total += pixels
            flat = pixels.reshape(-1, channels).astype(np.float64)
            products += (flat.T @ flat).astype(np.int64)  # below 2 ** 53: exact
    return records, bad, (len(records), total, products)


def _payload(pixels: np.ndarray, codec: str) -> bytes:
    if codec == "raw":
        return pixels.tobytes()
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


class Moments:
    """First and second moments of the training pixels, as exact sums."""

    def __init__(self, shape: tuple[int, int, int]):
        self.count, self.total = 0, np.zeros(shape, np.int64)
        self.products = np.zeros((shape[2], shape[2]), np.int64)

    def add(self, count: int, total: np.ndarray, products: np.ndarray) -> None:
        self.count += count
        self.total += total
        self.products += products

    def mean(self) -> np.ndarray:
        """The mean image, (H, W, C)."""
        return self.total / max(1, self.count)

    def pca(self) -> dict:
        """Eigenvalues (largest first) and unit eigenvectors (one a row) of the 3 x 3 covariance of the RGB values of
        all training pixels (paper, section 4.1); a grey set counts as three equal channels."""
        channels = self.products.shape[0]
        pixels = max(1, self.count) * self.total.shape[0] * self.total.shape[1]
        mean = self.total.sum((0, 1)) / pixels
        covariance = self.products / pixels - np.outer(mean, mean)
        if channels == 1:
            covariance = np.full((3, 3), covariance[0, 0])
        values, vectors = np.linalg.eigh(covariance)
        return {"eigenvalues": values[::-1].clip(0).tolist(), "eigenvectors": vectors.T[::-1].tolist()}


def verify(store: Store) -> None:
    """Check every file's checksum and every record of a store. Raises UserError at the first fault."""
    for name, entry in store.manifest["files"].items():
        if file_entry(store.path / name)["sha256"] != entry["sha256"]:
            raise UserError(f"{store.path / name} is damaged (wrong SHA-256); copy or pack the store again")
    with Progress("verifying", sum(store.counts.values())) as progress:
        for split in store.counts:
            records = store.split(split)
            for start in range(0, len(records), CHUNK):
                part = range(start, min(start + CHUNK, len(records)))
                records.read(np.asarray(part), check=True)
                progress.update(len(part))


def _pool(workers: int):
    # Forked workers start at once and do not import the calling script again; elsewhere the system's own way.
    context = get_context("fork" if "fork" in get_all_start_methods() else None)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def _in_order(pool, function, jobs):
    """Results in the order of the jobs, with a bounded number of jobs on their way."""
    waiting = deque()
    limit = 2 * pool._max_workers
    try:
        for job in jobs:
            waiting.append(pool.submit(function, job))
            if len(waiting) >= limit:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a packing process was killed (out of memory?); try fewer --workers") from None
    finally:
        for future in waiting:
            future.cancel()


if __name__ == "__main__":
    run_script(main)
