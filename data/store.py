"""The store: one folder of packed pictures that training and testing read. README.md here describes the format.

Reading does not import torch, and lmdb, cv2 and simplejpeg are imported where they are used.
"""

import os
import shlex
import shutil
import struct
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.guard import reading
from data.manifest import CODECS, MEAN, file_entry, read_manifest
from utils import UserError

HEADER = struct.Struct("<4siHHBBHII")  # magic, label, height, width, channels, codec, 0, payload's CRC-32, its length
HEADER_CRC = struct.Struct("<I")  # CRC-32 of the header; the payload follows
MAGIC = b"ALX1"
COMMIT_BYTES = 32 << 20  # a transaction's size: what is lost and written again when the map has to grow
FIRST_MAP = 64 << 20
CLOCKS = 2  # seconds by which a file's time may change by itself, as between a file server and its client
TRIES = 100  # records that are tried in the place of a damaged one


def record_key(index: int) -> bytes:
    return b"%08d" % index


def encode_record(payload: bytes, label: int, shape: tuple[int, int, int], codec: str) -> bytes:
    """Header and bytes of one picture of shape (height, width, channels)."""
    header = HEADER.pack(MAGIC, label, *shape, CODECS.index(codec), 0, zlib.crc32(payload), len(payload))
    return header + HEADER_CRC.pack(zlib.crc32(header)) + payload


def decode_record(value, check: bool, out: np.ndarray | None = None) -> tuple[np.ndarray, int]:
    """Picture (H, W, C) uint8 and label of one record. The header and a JPEG are always checked against their CRCs,
    raw pixels where `check` is true. A raw picture is a view of the record; a JPEG is decoded into `out`, an array of
    its shape, where there is one. Raises ValueError for a damaged record."""
    payload, shape, label, codec = open_record(value, check)
    if codec == "jpeg":
        if out is not None and shape != out.shape:
            raise ValueError(f"the picture's shape is {shape} instead of {out.shape}")
        return _decode_jpeg(payload, np.empty(shape, np.uint8) if out is None else out), label
    return np.frombuffer(payload, np.uint8).reshape(shape), label


def open_record(value, check: bool) -> tuple[memoryview, tuple[int, int, int], int, str]:
    """(bytes, shape, label, codec) of one record, the bytes not decoded yet; checked as decode_record says."""
    if len(value) < HEADER.size + HEADER_CRC.size:
        raise ValueError("the record is too short")
    magic, label, height, width, channels, codec, _, crc, length = HEADER.unpack_from(value)
    (header_crc,) = HEADER_CRC.unpack_from(value, HEADER.size)
    # Always checked, since a damaged label would pass as another class; it takes well under a microsecond.
    if magic != MAGIC or zlib.crc32(value[: HEADER.size]) != header_crc or codec >= len(CODECS):
        raise ValueError("the record's header is damaged")
    payload = memoryview(value)[HEADER.size + HEADER_CRC.size :]
    wanted = height * width * channels if CODECS[codec] == "raw" else length
    if not len(payload) == length == wanted:
        raise ValueError(f"the record has {len(payload)} bytes of a picture, which is not their right number")
    if (check or CODECS[codec] == "jpeg") and zlib.crc32(payload) != crc:
        raise ValueError("the record's checksum does not match")
    return payload, (height, width, channels), label, CODECS[codec]


def _decode_jpeg(payload, out: np.ndarray) -> np.ndarray:
    import simplejpeg

    try:
        found = simplejpeg.decode_jpeg(payload, "GRAY" if out.shape[2] == 1 else "RGB", strict=True, buffer=out).shape
    except ValueError as error:
        raise ValueError(f"the record is no JPEG picture of its size ({error})") from None
    if found != out.shape:
        raise ValueError(f"the record is no JPEG picture of its size, but of {found}")
    return out


class Crops(NamedTuple):
    """What is cut out of each picture of a batch: a square of `size` pixels at offsets (n, 2), top and left, flipped
    from left to right where mirror (n,) is true."""

    offsets: np.ndarray
    mirror: np.ndarray
    size: int


class Store:
    """An existing store, opened for reading.

    path: its folder. Files' sizes are compared with the manifest before anything is mapped. Raises UserError where
    something is missing, damaged or of another format.

    classes: names, by label. wnids: those of the classes, or None. unlabelled: splits without labels.
    size: the pictures' side in pixels. channels: 1 or 3. mean: (size, size, channels)
    float32. counts: pictures per split. fingerprint: SHA-256 of the manifest.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such folder; python -m data.pack makes a store")
        self.manifest, self.fingerprint = read_manifest(self.path)
        self.name: str = self.manifest["name"]
        self.classes: list[str] = self.manifest["classes"]
        self.wnids: list[str] | None = self.manifest["wnids"]
        self.unlabelled: list[str] = self.manifest["unlabelled"]
        self.size: int = self.manifest["image_size"]
        self.channels: int = self.manifest["channels"]
        self.codec: str = self.manifest["codec"]
        self.counts = {split: sum(s["count"] for s in shards) for split, shards in self.manifest["shards"].items()}
        self.changed = self._check_sizes()  # when each file was changed last, in seconds
        self.mean = self._read_mean()

    def _check_sizes(self) -> dict[str, float]:
        changed = {}
        for name, entry in self.manifest["files"].items():
            file = self.path / name
            found = file.stat() if file.exists() else None
            if found is None or found.st_size != entry["bytes"]:
                said = "is missing" if found is None else f"has {found.st_size} bytes instead of {entry['bytes']}"
                raise UserError(f"{file} {said}: the store is damaged; copy or pack it again")
            changed[name] = found.st_mtime
        return changed

    def _read_mean(self) -> np.ndarray:
        self._check_sum(MEAN)
        try:  # mapped first: the file's own word for its size is not taken
            mean = np.load(self.path / MEAN, mmap_mode="r", allow_pickle=False)
            if mean.shape != (self.size, self.size, self.channels) or mean.dtype != np.float32:
                raise ValueError
            return np.array(mean)
        except (ValueError, EOFError, TypeError, SyntaxError):
            raise UserError(f"{self.path / MEAN} is damaged; copy or pack the store again") from None

    def _check_sum(self, name: str) -> None:
        """Of a small file, each time that it is read."""
        if file_entry(self.path / name)["sha256"] != self.manifest["files"][name]["sha256"]:
            raise UserError(f"{self.path / name} is damaged (wrong SHA-256); copy or pack the store again")

    def split(self, name: str) -> "Records":
        """The records of one split. Raises UserError for a split that the store does not have."""
        if name not in self.counts:
            raise UserError(f"{self.path} has no split {name!r}, only {', '.join(self.counts)}")
        return Records(self, name)

    def names(self, split: str) -> list[str] | None:
        """What the pictures of a split are called, in their order, where the store knows."""
        if names_file(split) not in self.manifest["files"]:
            return None
        file = self.path / names_file(split)
        self._check_sum(file.name)
        try:
            names = file.read_text(encoding="utf-8").split("\n")[:-1]
        except UnicodeDecodeError:
            raise UserError(f"{file} is damaged (not UTF-8 text); copy or pack the store again") from None
        if len(names) != self.counts[split]:
            found = f"{len(names)} names for {self.counts[split]} pictures"
            raise UserError(f"{file} is damaged ({found}); copy or pack the store again")
        return names


def names_file(split: str) -> str:
    return f"{split}-names.txt"


class Records:
    """Random access to one split. Environments are opened at the first read of a process, so an object can travel
    to worker processes; indices are 0..len-1."""

    def __init__(self, store: Store, split: str):
        shards = store.manifest["shards"][split]
        self.path = store.path
        self.shape, self.codec = (store.size, store.size, store.channels), store.codec
        self.labels = range(-1, 0) if split in store.unlabelled else range(len(store.classes))
        self.folders = [shard["folder"] for shard in shards]
        self.starts = np.cumsum([0] + [shard["count"] for shard in shards])
        self.keys = [shard["first"] for shard in shards]  # of their first records
        files = [f"{folder}/data.mdb" for folder in self.folders]
        self.expected = [(store.manifest["files"][name]["bytes"], store.changed[name]) for name in files]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(
        self, indices, check: bool | np.ndarray = False, crops: Crops | None = None, bad: dict[int, str] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pictures (n, H, W, C) uint8, or their crops (n, S, S, C), and labels (n,) int64. check: compare the CRC of
        raw pixels, too; one for all, or (n,) bools. bad: where there is one, a damaged record is noted there, by its
        index, and the next sound one of its shard takes its place; otherwise it raises UserError."""
        side = crops.size if crops else self.shape[0]
        images = np.empty((len(indices), side, side, self.shape[2]), np.uint8)
        labels = np.empty(len(indices), np.int64)
        checks = np.broadcast_to(check, len(indices))
        whole = np.empty(self.shape, np.uint8)  # for a JPEG that is cut

        def keep(row: int, value) -> None:
            out = whole if crops else images[row]
            picture, label = decode_record(value, checks[row], out)
            self._check_fit(picture.shape, label)
            labels[row] = label
            if crops:
                _cut(picture, crops.offsets[row], crops.mirror[row], images[row])
            elif picture is not out:
                images[row] = picture

        self._each(indices, keep, bad)
        return images, labels

    def every_label(self, bad: dict[int, str] | None = None) -> np.ndarray:
        """The labels of all records, (N,) int64, without decoding anything. bad: as in read."""
        labels = np.empty(len(self), np.int64)

        def look(row: int, value) -> None:
            _, shape, labels[row], _ = open_record(value, check=False)
            self._check_fit(shape, labels[row])

        self._each(np.arange(len(self)), look, bad)
        return labels

    def check(self, indices) -> None:
        """Compare the records' CRCs, shapes, labels and codecs without decoding anything. Raises UserError."""

        def look(_, value) -> None:
            _, shape, label, codec = open_record(value, check=True)
            self._check_fit(shape, label)
            if codec != self.codec:
                raise ValueError(f"the record's codec is {codec} instead of {self.codec}")

        self._each(indices, look)

    def _each(self, indices, use, bad: dict[int, str] | None = None) -> None:
        """Call use(row, record of indices[row]), shard after shard; what goes wrong becomes a UserError, or with `bad`
        is noted, and another record used."""
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        for shard in np.unique(shards):
            folder, start = self.path / self.folders[shard], int(self.starts[shard])
            count, before = int(self.starts[shard + 1]) - start, self.keys[shard]
            with _environment(folder, *self.expected[shard]).begin(buffers=True) as transaction, reading(self.path):
                for row in np.flatnonzero(shards == shard):
                    place = int(indices[row]) - start
                    error = _try(transaction, before + place, row, use)
                    if error and bad is not None:
                        bad[start + place] = str(error)
                        others = (before + (place + n) % count for n in range(1, TRIES))
                        error = next((None for key in others if not _try(transaction, key, row, use)), error)
                    if error:
                        raise UserError(
                            f"{self.path}: picture {start + place} ({self.folders[shard]}, key {before + place}): "
                            f"{error}; copy or pack the store again (python -m data.pack --verify "
                            f"{shlex.quote(str(self.path))} checks all of it)"
                        ) from None

    def _check_fit(self, shape: tuple[int, int, int], label: int) -> None:
        if shape != self.shape:
            raise ValueError(f"the picture's shape is {shape} instead of {self.shape}")
        if label not in self.labels:
            raise ValueError(f"label {label} is not one of {len(self.labels)} classes")


def _try(transaction, key: int, row: int, use) -> Exception | None:
    """Call use(row, record with that key). Returns what was wrong with it."""
    import lmdb

    try:
        value = transaction.get(record_key(key))
        if value is None:
            raise ValueError("the record is missing")
        use(row, value)
    except (ValueError, lmdb.Error) as error:
        return error
    return None


def _cut(picture: np.ndarray, offset, mirrored: bool, out: np.ndarray) -> None:
    """Write the crop at `offset` into out, (S, S, C)."""
    import cv2

    (top, left), side = offset, len(out)
    part = picture[top : top + side, left : left + side]
    if mirrored:
        cv2.flip(part, 1, out)  # a thirtieth of the time that numpy takes
    else:
        out[...] = part


_environments: dict = {}  # (device, inode) -> (process, environment): lmdb allows one per file and process


def _environment(folder: Path, size: int, changed: float):
    """A shard opened for reading, once a process; of that size and time, or UserError."""
    import lmdb

    try:
        file = (folder / "data.mdb").stat()
    except OSError as error:
        raise UserError(f"{folder / 'data.mdb'}: {error.strerror}; the store was there when it was opened") from None
    if file.st_size != size or abs(file.st_mtime - changed) > CLOCKS:
        raise UserError(f"{folder / 'data.mdb'} was changed while it was in use; put the store as it was, then go on")
    key = (file.st_dev, file.st_ino)
    process, environment = _environments.get(key, (None, None))
    if process == os.getpid():
        return environment
    if environment is not None:
        environment.close()  # inherited in a fork: not to be used here, and in the way of opening it anew
    try:
        environment = lmdb.open(
            str(folder), readonly=True, lock=False, readahead=False, meminit=False, max_spare_txns=4
        )
    except (lmdb.Error, UnicodeError) as error:  # of a path that is no UTF-8
        raise UserError(f"{folder} cannot be opened ({error}); copy or pack the store again") from None
    _environments[key] = os.getpid(), environment
    return environment


class ShardWriter:
    """Writes one shard: records in the order of their indices, into a new LMDB environment in `folder`."""

    def __init__(self, folder: Path):
        import lmdb

        folder.mkdir(parents=True)
        # Readers built on LMDB 0.9 are everywhere; lmdb 3 would also write the newer file format.
        old_format = {"lib_version": 0} if int(lmdb.__version__.split(".")[0]) >= 3 else {}
        self.folder, self.count, self.pending, self.pending_bytes = folder, 0, [], 0
        with _disk_errors(folder):
            self.environment = lmdb.open(str(folder), map_size=FIRST_MAP, lock=False, sync=False, **old_format)

    def put(self, index: int, record: bytes) -> None:
        self.pending.append((record_key(index), record))
        self.pending_bytes += len(record)
        self.count += 1
        if self.pending_bytes >= COMMIT_BYTES:
            self._commit()

    def _commit(self) -> None:
        import lmdb

        try:
            with _disk_errors(self.folder), self.environment.begin(write=True) as transaction:
                for key, record in self.pending:
                    if not transaction.put(key, record, append=True):
                        raise RuntimeError(f"{self.folder}: record {int(key)} does not come after the one before it")
        except lmdb.MapFullError:  # the whole transaction is undone: grow the map and write it again
            self.environment.set_mapsize(2 * self.environment.info()["map_size"])
            return self._commit()
        self.pending, self.pending_bytes = [], 0

    def close(self) -> None:
        """Write what is left and bring it to the disk."""
        self._commit()
        with _disk_errors(self.folder):
            self.environment.sync(True)
        self.abandon()

    def abandon(self) -> None:
        self.environment.close()


@contextmanager
def _disk_errors(folder: Path):
    """Turn what lmdb says of a full or failing disk into one line."""
    import lmdb

    try:
        yield
    except lmdb.MapFullError:
        raise
    except lmdb.Error as error:
        free = shutil.disk_usage(folder).free // 1_000_000
        raise UserError(f"{folder} could not be written: {error}; {free} MB are free there") from None
