"""A store's manifest: what its manifest.json holds (README.md here), how it is read and checked."""

import hashlib
import json
import re
import shlex
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

from utils import UserError

FORMAT = 3
MANIFEST = "manifest.json"
MEAN = "mean.npy"
CODECS = ("raw", "jpeg")
# How a picture becomes a square: in stores, and as Caffe's users did it before packing.
SHORTER_SIDE, WARPED = "shorter side, antialiased bilinear, centre", "warped, antialiased bilinear"
PARTS = {
    "name", "classes", "wnids", "image_size", "channels", "codec", "resize", "shards", "unlabelled", "skipped",
    "repaired", "channel_mean", "pca", "files",
}
FILE_NAME = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)?")  # of a store, from its folder


def is_store(path: Path) -> bool:
    """Whether a folder is a store, damaged perhaps; one of pictures may have a manifest.json of somebody else's."""
    parts = (path / MEAN).exists() or next(path.glob("*/data.mdb"), None) is not None
    return parts and (path / MANIFEST).exists()


def read_manifest(store: Path) -> tuple[dict, str]:
    """(manifest, fingerprint) of a store's folder; the fingerprint is the file's SHA-256. Raises UserError where there
    is none, or where it is of another format, damaged or changed."""
    if not is_store(store):
        raise UserError(f"{store} is not a store; pack it first: python -m data.pack {shlex.quote(str(store))} "
                        "--out STORE")
    path = store / MANIFEST
    text = path.read_bytes()
    try:
        manifest = json.loads(text)
        version = int(manifest["format"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise UserError(f"{path} is damaged; pack the store again") from None
    if version != FORMAT:
        newer = "update the code, or " if version > FORMAT else ""
        raise UserError(
            f"{store} has store format {version}, this code reads format {FORMAT}; {newer}remove the store and pack it "
            "again"
        )
    if missing := PARTS - set(manifest):
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; pack the store again")
    if wrong := _wrong_part(manifest) or ("checksum" if not fits_checksum(manifest) else None):
        raise UserError(f"{path} is damaged or was changed: invalid {wrong}; pack the store again")
    return manifest, hashlib.sha256(text).hexdigest()


def _wrong_part(manifest: dict) -> str | None:
    """The first part of a manifest that is not valid; names of files stay within the store."""
    shards, files, classes, wnids = (manifest[name] for name in ("shards", "files", "classes", "wnids"))

    def whole(value, low: int, high: int) -> bool:
        return type(value) is int and low <= value <= high

    def words(value) -> bool:
        return isinstance(value, list) and all(isinstance(word, str) for word in value)

    def numbers(value, *shape: int) -> bool:
        with suppress(ValueError, TypeError, OverflowError):
            array = np.asarray(value, np.float64)
            return array.shape == shape and bool(np.isfinite(array).all())
        return False

    def shard(entry) -> bool:
        fits = isinstance(entry, dict) and all(whole(entry.get(name), 0, 10**8) for name in ("first", "count"))
        return fits and f"{entry.get('folder')}/data.mdb" in files

    colours = manifest["channels"] if manifest["channels"] in (1, 3) and whole(manifest["channels"], 1, 3) else 0
    pca = manifest["pca"]
    checks = {
        "name": isinstance(manifest["name"], str) and manifest["name"].isprintable() and "/" not in manifest["name"],
        "classes": words(classes) and len(classes) > 0,
        "wnids": wnids is None or (words(wnids) and len(wnids) == len(classes)),
        "image_size": whole(manifest["image_size"], 1, 4096),
        "channels": colours > 0,
        "codec": manifest["codec"] in CODECS,
        "resize": manifest["resize"] in (SHORTER_SIDE, WARPED),
        "files": isinstance(files, dict) and MEAN in files and all(
            FILE_NAME.fullmatch(name) and isinstance(entry, dict) and whole(entry.get("bytes"), 0, 2**60)
            and isinstance(entry.get("sha256"), str) for name, entry in files.items()
        ),
        "shards": isinstance(shards, dict) and isinstance(files, dict) and all(
            isinstance(entries, list) and all(map(shard, entries)) for entries in shards.values()
        ),
        "unlabelled": words(manifest["unlabelled"]),
        "skipped or repaired": isinstance(manifest["skipped"], list) and isinstance(manifest["repaired"], dict),
        "channel_mean": numbers(manifest["channel_mean"], colours),
        "pca": isinstance(pca, dict) and numbers(pca.get("eigenvalues"), 3) and numbers(pca.get("eigenvectors"), 3, 3),
    }
    return next((name for name, right in checks.items() if not right), None)


def checksum(content: dict) -> int:
    """Of what a JSON file holds, its CRC-32, but for the entry "checksum" itself."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def fits_checksum(content: dict) -> bool:
    """Whether a JSON file is what was written. One without a checksum is taken as it is."""
    return content.get("checksum", checksum(content)) == checksum(content)


def file_entry(path: Path) -> dict:
    """Size and SHA-256 of a file, as the manifest keeps them."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
