"""Pictures as people have them, with all their peculiarities, become uint8 squares.

`to_square`, that is `pixels` and then `square`, is the one way into a store and into a net. JPEG files are decoded by
simplejpeg, to the same pixels as Pillow's and faster (results/SPEED.md has the comparison); other formats, JPEGs that
are CMYK, turned or faulty, and all of a grey store, by Pillow.
"""

import errno
import io
import os
import stat
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageChops, UnidentifiedImageError

from data.manifest import SHORTER_SIDE
from utils import UserError

# What a file's ending promises; Pillow looks at the content and opens these formats only.
ENDINGS = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".ppm": "PPM", ".pgm": "PPM",
    ".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF",
}
FORMATS = sorted(set(ENDINGS.values()))
BITS, PHOTOMETRIC, SAMPLES = 258, 262, 339  # tags of a TIFF: bits of a pixel, what is 0, kind of numbers
MAX_PIXELS = 2**28 // 3  # Pillow's own limit, a quarter of a GiB in RGB; more is taken for a decompression bomb
MAX_BYTES = 2**28  # of a picture's file
TURNS = {  # what brings a picture upright, by its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
NO_LINE = {"Cc", "Cs", "Zl", "Zp"}  # control characters, bytes that are no UTF-8, separators of lines and paragraphs
NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}


def printable(name: str) -> str:
    """A name from a disk, with escapes for what would do something to a terminal, a line or a page."""
    return name if name.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def say(text: str) -> None:
    """Print a line that may hold such names, at once."""
    print(printable(text), flush=True)


@dataclass(frozen=True)
class File:
    """A picture that is still a file, or a member of an uncompressed tar: `size` bytes from `offset` of `path`.
    name: what it is called in a store, whatever archive or folder it is in."""

    name: str
    path: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes of the file. Raises UserError where there is none to be read, and OSError where the disk fails:
        that is not the picture's fault."""
        try:
            status = os.stat(self.path)
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                raise UserError(f"{self.name} cannot be read (it is no regular file)")
            size = status.st_size if self.size is None else self.size
            if size > MAX_BYTES:
                raise UserError(f"{self.name} has {size} bytes, more than any picture ({MAX_BYTES})")
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                return file.read(size)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            if isinstance(error, UserError):
                raise
            if isinstance(error, OSError) and error.errno not in NOT_THERE:
                error.filename = error.filename or self.path  # read() leaves it out
                raise
            raise UserError(f"{self.name} cannot be read ({getattr(error, 'strerror', None) or error})") from None


class Files(Sequence):
    """Many Files, without an object for each: a set of a million pictures fits into memory, and a slice of it travels
    to another process.

    place: a folder; members: paths within it. With offsets and sizes, (n,) int64: a tar, and members of it.
    flat: whether a picture is called by the last part of its path alone.
    """

    def __init__(self, place: str, members: list[str], flat: bool, offsets=None, sizes=None):
        self.place, self.members, self.flat, self.offsets, self.sizes = place, members, flat, offsets, sizes

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        """What a picture is called, with escapes for what no line of UTF-8 holds."""
        name = self.members[index].rpartition("/")[2] if self.flat else self.members[index]
        return "".join(ascii(c)[1:-1] if unicodedata.category(c) in NO_LINE else c for c in name)

    def where(self, index: int) -> str:
        """The folder or the tar that a picture is in; what its name does not say of it."""
        inside = self.members[index].rpartition("/")[0] if self.flat and self.offsets is None else ""
        return os.path.join(self.place, inside) if inside else self.place

    def __getitem__(self, index):
        if isinstance(index, slice):
            offsets, sizes = (None if part is None else part[index] for part in (self.offsets, self.sizes))
            return Files(self.place, self.members[index], self.flat, offsets, sizes)
        if self.offsets is None:
            return File(self.name(index), os.path.join(self.place, self.members[index]))
        return File(self.name(index), self.place, int(self.offsets[index]), int(self.sizes[index]))


def to_square(
    picture: Path | File | np.ndarray | Image.Image, size: int, channels: int = 3, resize: str = SHORTER_SIDE
) -> np.ndarray:
    """A picture as (size, size, channels) uint8: the square in its centre, as wide as its shorter side, resized with
    an antialiased bilinear filter (paper, section 2). channels: 1 or 3. resize: WARPED instead squeezes the whole
    picture into the square, as Caffe's users did; for converted nets only.

    Raises UserError for a file that cannot be read as a picture.
    """
    return square(pixels(picture, channels)[0], size, resize)


def square(array: np.ndarray, size: int, resize: str = SHORTER_SIDE) -> np.ndarray:
    """The square of (H, W, channels) uint8 pixels. Three channels go through torch, whose antialiased resize is
    Pillow's to within 2 of 255 and five times as fast; one channel goes through Pillow."""
    height, width, channels = array.shape
    if resize == SHORTER_SIDE:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        array = array[top : top + side, left : left + side]
    if channels == 1:
        small = Image.fromarray(array[:, :, 0]).resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(small).reshape(size, size, 1)
    if not array.flags.writeable:  # torch warns of such arrays
        array = array.copy()
    planes = torch.from_numpy(array)[None].permute(0, 3, 1, 2)
    return F.interpolate(planes, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def pixels(picture: Path | File | np.ndarray | Image.Image, channels: int = 3) -> tuple[np.ndarray, list[str]]:
    """(H, W, channels) uint8 pixels of a picture, and what had to be repaired to get them: words such as "CMYK" or
    "turned (EXIF)", none for most pictures. Raises UserError for a file that cannot be read as a picture."""
    if isinstance(picture, Path):
        picture = File(str(picture), str(picture))
    if isinstance(picture, File):
        return _decode(picture.read(), picture.name, channels)
    if isinstance(picture, np.ndarray):
        if picture.ndim == 2:
            picture = picture[:, :, None]
        if picture.shape[2] == channels:
            return picture, []
        picture = Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture)
    return _convert(picture, channels), []


def open_picture(path: Path) -> Image.Image:
    """A picture from a file, decoded. Raises UserError."""
    with warnings.catch_warnings(action="ignore"), _opened(File(str(path), str(path)).read(), path) as picture:
        picture.load()
        _refuse_unscaled(picture)
        return picture


class _opened:
    """A picture opened by Pillow, its size checked; whatever goes wrong inside the with statement is a UserError."""

    def __init__(self, data: bytes, name):
        self.data, self.name = data, name

    def __enter__(self) -> Image.Image:
        try:
            self.picture = Image.open(io.BytesIO(self.data), formats=FORMATS)
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
            raise self._complaint(error) from None
        width, height = self.picture.size
        if width * height > MAX_PIXELS:
            raise UserError(f"{self.name} is refused: {width} x {height} pixels, more than {MAX_PIXELS:,}")
        return self.picture

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError | MemoryError):
            raise self._complaint(error) from None

    def _complaint(self, error: Exception) -> UserError:
        reason = "no format that is known" if isinstance(error, UnidentifiedImageError) else str(error)
        return UserError(f"{self.name} cannot be read as a picture ({reason or type(error).__name__})")


def _decode(data: bytes, name: str, channels: int) -> tuple[np.ndarray, list[str]]:
    with _opened(data, name) as picture:
        repaired = _peculiarities(picture, name)
        turned = _orientation(picture) != 1
        if picture.format in ("JPEG", "MPO") and picture.mode in ("RGB", "L") and channels == 3 and not turned:
            import simplejpeg

            try:
                return simplejpeg.decode_jpeg(data, "RGB", strict=True), repaired
            except ValueError:  # libjpeg found something wrong: Pillow says whether it is a picture all the same
                repaired.append("faulty JPEG data")
        return _convert(picture, channels), repaired


def _peculiarities(picture: Image.Image, name: str) -> list[str]:
    """What is unusual about a picture as a file, by the words that the manifest counts it under."""
    mode, form = picture.mode, "JPEG" if picture.format == "MPO" else picture.format
    transparent = mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info
    unusual = {
        f"{form} named as another format": ENDINGS.get(Path(name).suffix.lower(), form) != form,
        "grey": mode in ("1", "L", "LA", "La") or mode.startswith("I"),
        "16 bits": mode.startswith("I") or ";16" in str(picture.tile[:1]),  # grey; in colour
        "CMYK": mode == "CMYK",
        "palette": mode in ("P", "PA"),
        "transparency dropped": transparent,
        "turned (EXIF)": _orientation(picture) != 1,
        "first of several frames": form in ("GIF", "PNG", "TIFF", "WEBP") and getattr(picture, "is_animated", False),
    }
    return [word for word, found in unusual.items() if found]


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, where there is none or where the EXIF block is damaged."""
    if "exif" not in picture.info and "xmp" not in picture.info and picture.format not in ("TIFF", "PNG"):
        return 1
    if picture.format == "PNG":
        picture.load()  # getexif() does it, too, and what goes wrong in it is the picture's fault, not its EXIF block's
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
        return value if value in range(1, 9) else 1
    except Exception:  # struct.error, AttributeError, SyntaxError, ... by what the damage hits
        return 1


def _refuse_unscaled(picture: Image.Image) -> None:
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers on no known scale")
    tags = getattr(picture, "tag_v2", {})
    if tags.get(SAMPLES) == (2,) and tags.get(BITS) in ((8,), (16,)):
        raise ValueError("its pixels are signed numbers on no known scale")
    low, high = picture.getextrema() if picture.mode == "I" else (0, 0)
    if low < 0 or high > 65535:
        raise ValueError("its pixels are 32-bit numbers on no known scale")


def _convert(picture: Image.Image, channels: int) -> np.ndarray:
    """Pixels (H, W, channels) of a picture of any mode, turned upright."""
    picture.load()  # which turns a TIFF, and no other
    tags = getattr(picture, "tag_v2", {})  # a TIFF's, which turned pictures lose
    # Adobe's programs store CMYK inverted, and Pillow takes every JPEG for one of theirs.
    inverted = picture.format == "JPEG" and picture.mode == "CMYK" and "adobe" not in picture.info
    orientation = _orientation(picture)
    if orientation != 1:  # not by ImageOps.exif_transpose, which fails where another tag of the EXIF block is faulty
        picture = picture.transpose(TURNS[orientation])
    if inverted:
        picture = ImageChops.invert(picture)
    _refuse_unscaled(picture)
    if picture.mode.startswith("I"):  # 16 bits: convert() would clip the 32-bit mode they may come in to white
        more = 4 if tags.get(BITS) == (12,) else 8
        upper = (np.asarray(picture).clip(0, 65535) >> more).astype(np.uint8)
        # Where 0 is white, Pillow turns 8 bits over, and 16 not.
        picture = Image.fromarray(255 - upper if tags.get(PHOTOMETRIC) == 0 else upper)
    return np.array(picture.convert("L" if channels == 1 else "RGB")).reshape(*picture.size[::-1], channels)
