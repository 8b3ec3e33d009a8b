"""data/pictures.py: the resize rule and every odd picture, against Pillow."""

import contextlib
import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from conftest import pictures as smooth
from helpers import ROOT
from PIL import Image, ImageOps
from torchvision.transforms import v2

from data.manifest import WARPED
from data.pictures import MAX_PIXELS, File, Files, open_picture, pixels, square, to_square
from utils import UserError


def by_pil(picture: Image.Image, size: int, mode: str = "RGB") -> np.ndarray:
    """The rule in Pillow's terms: the centre square, bilinear with its antialiasing."""
    picture = picture.convert(mode)
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    small = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(small).reshape(size, size, -1)


def assert_alike(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Within 2 of 255 everywhere (torch rounds between its two passes otherwise), and 0.1 on average."""
    difference = np.abs(ours.astype(int) - theirs)
    assert ours.shape == theirs.shape
    assert difference.max() <= 2
    assert difference.mean() < 0.1


# ---------------------------------------------------------------------------------------------- the square


@pytest.mark.parametrize("width_height", [(100, 60), (61, 200), (72, 72), (500, 375), (28, 28), (1, 1), (1, 400)])
@pytest.mark.parametrize("size", [64, 256])
def test_the_square_is_pils(width_height, size):
    noise = np.random.default_rng(0).integers(0, 256, (*width_height[::-1], 3), dtype=np.uint8)
    for pixel_array in (smooth(1, noise.shape)[0], noise):
        assert_alike(to_square(pixel_array, size), by_pil(Image.fromarray(pixel_array), size))
        grey = Image.fromarray(pixel_array).convert("L")
        assert np.array_equal(to_square(grey, size, channels=1), by_pil(grey, size, "L"))


@pytest.mark.parametrize("width_height", [(100, 60), (61, 200), (500, 375)])
def test_resize_is_shorter_side_and_centre(width_height):
    """Close to torchvision's Resize (antialiased) and CenterCrop, whose size is rounded to whole pixels first."""
    picture = Image.fromarray(smooth(1, (*width_height[::-1], 3))[0])
    ours = to_square(picture, 72).astype(int)
    theirs = v2.CenterCrop(72)(v2.Resize(72, antialias=True)(picture))
    assert np.abs(ours - np.asarray(theirs)).mean() < 1.5


def test_a_warped_picture_keeps_its_edges():
    """What Caffe's users did: the whole picture squeezed into the square."""
    picture = Image.fromarray(smooth(1, (60, 100, 3))[0])
    warped = np.asarray(picture.resize((72, 72), Image.Resampling.BILINEAR))
    assert_alike(to_square(picture, 72, resize=WARPED), warped)
    assert np.abs(to_square(picture, 72).astype(int) - warped).max() > 10


def test_arrays_that_cannot_be_written_are_not_changed():
    array = smooth(1, (80, 90, 3))[0]
    array.flags.writeable = False
    assert_alike(square(array, 64), by_pil(Image.fromarray(array), 64))


# ---------------------------------------------------------------------------------------------- odd files

PHOTO = Image.fromarray(smooth(1, (90, 120, 3))[0])
DEEP = (np.arange(90 * 120).reshape(90, 120) * 6).astype(np.uint16)  # 0..64794


def coded(picture: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def tiff(rows: bytes, bits: int, white_is_zero=False, signed=False, big=False) -> bytes:
    """A grey TIFF of 120 x 90, uncompressed."""
    order, count = ">" if big else "<", 9
    tags = {256: 120, 257: 90, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 8 + 2 + 12 * count + 4, 277: 1,
            279: len(rows), 339: 2 if signed else 1}
    entries = b"".join(struct.pack(f"{order}HHII" if tag in (273, 279) else f"{order}HHIHxx", tag,
                                   4 if tag in (273, 279) else 3, 1, value) for tag, value in tags.items())
    head = (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}I", 8)
    return head + struct.pack(f"{order}H", count) + entries + bytes(4) + rows


def twelve_bits(deep: np.ndarray) -> bytes:
    """Two pixels in three bytes."""
    first, second = (deep.reshape(-1, 2)[:, n] >> 4 for n in (0, 1))
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


def with_orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def turned(orientation: int) -> bytes:
    return coded(PHOTO, "JPEG", quality=95, exif=with_orientation(orientation))


def without_adobe(data: bytes) -> bytes:
    """A JPEG file without its Adobe marker (APP14)."""
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4]) :]


def cmyk(inverted: bool) -> bytes:
    """A CMYK JPEG as Adobe writes it, or as the standard means it."""
    picture = PHOTO.convert("CMYK")
    if inverted:
        return coded(picture, "JPEG", quality=95)
    return without_adobe(coded(Image.fromarray(255 - np.asarray(picture), "CMYK"), "JPEG", quality=95))


def transparent() -> Image.Image:
    picture = PHOTO.convert("RGBA")
    picture.putalpha(100)
    return picture


# name, bytes, what Pillow should make of them (None: what it reads itself), what the manifest counts
ODD = {
    "plain": ("a.JPEG", coded(PHOTO, "JPEG", quality=95), None, []),
    "progressive": ("a.JPEG", coded(PHOTO, "JPEG", quality=95, progressive=True), None, []),
    "4:4:4": ("a.JPEG", coded(PHOTO, "JPEG", quality=95, subsampling=0), None, []),
    "4:2:2": ("a.JPEG", coded(PHOTO, "JPEG", quality=95, subsampling=1), None, []),
    "4:1:1": ("a.JPEG", cv2.imencode(".jpg", np.asarray(PHOTO), [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x411111])[1]
              .tobytes(), None, []),
    "restart markers": ("a.JPEG", cv2.imencode(".jpg", np.asarray(PHOTO), [cv2.IMWRITE_JPEG_RST_INTERVAL, 3])[1]
                        .tobytes(), None, []),
    "grey": ("a.JPEG", coded(PHOTO.convert("L"), "JPEG"), None, ["grey"]),
    "grey with alpha": ("a.png", coded(PHOTO.convert("LA"), "PNG"), PHOTO.convert("L"),
                        ["grey", "transparency dropped"]),
    "black and white": ("a.png", coded(PHOTO.convert("1"), "PNG"), PHOTO.convert("1"), ["grey"]),
    "CMYK, Adobe": ("a.JPEG", cmyk(True), None, ["CMYK"]),
    "CMYK, plain": ("a.JPEG", cmyk(False), Image.open(io.BytesIO(cmyk(True))), ["CMYK"]),
    "YCCK": ("a.JPEG", simplejpeg.encode_jpeg(np.array(PHOTO.convert("CMYK")), 95, "CMYK", "444"), None, ["CMYK"]),
    "palette": ("a.png", coded(PHOTO.quantize(64), "PNG"), PHOTO.quantize(64), ["palette"]),
    "palette with alpha": ("a.png", coded(PHOTO.quantize(64), "PNG", transparency=3), PHOTO.quantize(64),
                           ["palette", "transparency dropped"]),
    "GIF": ("a.gif", coded(PHOTO.quantize(64), "GIF"), PHOTO.quantize(64), ["palette"]),
    "animation": ("a.gif", coded(PHOTO.quantize(64), "GIF", save_all=True, append_images=[Image.new("P", (120, 90))]),
                  PHOTO.quantize(64), ["palette", "first of several frames"]),
    "pages": ("a.tif", coded(PHOTO, "TIFF", save_all=True, append_images=[Image.new("RGB", (9, 9))]), PHOTO,
              ["first of several frames"]),
    "turned TIFF": ("a.tif", coded(PHOTO, "TIFF", exif=with_orientation(6)),
                    PHOTO.transpose(Image.Transpose.ROTATE_270), ["turned (EXIF)"]),
    "alpha": ("a.png", coded(transparent(), "PNG"), PHOTO, ["transparency dropped"]),
    "16 bits": ("a.png", coded(Image.fromarray(DEEP), "PNG"), Image.fromarray((DEEP >> 8).astype(np.uint8)),
                ["grey", "16 bits"]),
    "16 bits, TIFF": ("a.tif", coded(Image.fromarray(DEEP), "TIFF"), Image.fromarray((DEEP >> 8).astype(np.uint8)),
                      ["grey", "16 bits"]),
    "32 bits, TIFF": ("a.tif", coded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
                      Image.fromarray((DEEP >> 8).astype(np.uint8)), ["grey", "16 bits"]),
    "16 bits, white is 0": ("a.tif", tiff(DEEP.tobytes(), 16, white_is_zero=True),
                            Image.fromarray(255 - (DEEP >> 8).astype(np.uint8)), ["grey", "16 bits"]),
    "12 bits, TIFF": ("a.tif", tiff(twelve_bits(DEEP), 12), Image.fromarray((DEEP >> 8).astype(np.uint8)),
                      ["grey", "16 bits"]),
    "16 bits, colour": ("a.png", cv2.imencode(".png", np.asarray(PHOTO)[..., ::-1].astype(np.uint16) * 257)[1]
                        .tobytes(), PHOTO, ["16 bits"]),
    "PNG named .JPEG": ("a.JPEG", coded(PHOTO, "PNG"), PHOTO, ["PNG named as another format"]),
    "WebP named .JPEG": ("a.JPEG", coded(PHOTO, "WEBP", quality=90), None, ["WEBP named as another format"]),
    "JPEG named .png": ("a.png", coded(PHOTO, "JPEG"), None, ["JPEG named as another format"]),
    "no ending": ("a", coded(PHOTO, "JPEG"), None, []),
    "BMP": ("a.bmp", coded(PHOTO, "BMP"), PHOTO, []),
    "PPM": ("a.ppm", coded(PHOTO, "PPM"), PHOTO, []),
    "two pictures, MPO": ("a.JPEG", coded(PHOTO, "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]), None,
                          []),
    "one pixel wide": ("a.JPEG", coded(PHOTO.resize((1, 90)), "JPEG"), None, []),
    "20,000 pixels wide": ("a.JPEG", coded(PHOTO.resize((20_000, 80)), "JPEG"), None, []),
    "rubbish after the end": ("a.JPEG", coded(PHOTO, "JPEG") + b"more" * 1000, None, []),
}
ODD |= {f"EXIF {n}": ("a.JPEG", turned(n), ImageOps.exif_transpose(Image.open(io.BytesIO(turned(n)))),
                      ["turned (EXIF)"] if n > 1 else []) for n in range(1, 9)}


@pytest.mark.parametrize("kind", ODD)
def test_odd_pictures_become_what_pillow_sees(kind, tmp_path):
    """Three channels of the right picture, and the words that the manifest counts. Kinds that Pillow shows upright and
    in 8 bits by itself are compared with Image.open alone; the others with the picture that they were made from."""
    name, data, expected, words = ODD[kind]
    (tmp_path / name).write_bytes(data)
    array, odd = pixels(tmp_path / name)
    assert odd == words
    assert np.array_equal(pixels(Image.open(io.BytesIO(data)))[0], array)  # as prepare() is given it
    expected = expected or Image.open(io.BytesIO(data))
    assert array.shape == (*expected.size[::-1], 3)
    rounding = 1 if kind == "CMYK, plain" else 0  # of two encodings, one of them inverted
    assert np.abs(array.astype(int) - np.asarray(expected.convert("RGB"))).max() <= rounding
    assert_alike(to_square(tmp_path / name, 64), by_pil(expected, 64))
    if not odd:  # one channel: only for nets that were trained on grey pictures
        assert pixels(tmp_path / name, channels=1)[0].shape[2] == 1


def test_the_photo_is_recognised_in_every_colour_file():
    """The references above are Pillow's: this pins them, and thereby CMYK's polarity, to the photograph itself."""
    colour = [kind for kind, (_, _, _, words) in ODD.items() if not {"grey", "turned (EXIF)"} & set(words)]
    for kind in colour:
        data = ODD[kind][1]
        if "pixel" in kind or kind in ("4:1:1", "restart markers", "YCCK"):  # other shapes, or made as BGR or CMYK
            continue
        array = pixels(Image.open(io.BytesIO(data)))[0]
        assert np.abs(array.astype(int) - np.asarray(PHOTO)).mean() < 10, kind  # 64 colours: 8.4


def test_plain_cmyk_of_both_polarities_is_one_picture():
    one, two = (pixels(Image.open(io.BytesIO(cmyk(inverted))))[0] for inverted in (True, False))
    assert np.abs(one.astype(int) - two).max() <= 1
    assert np.abs(one.astype(int) - np.asarray(PHOTO)).mean() < 2


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.JPEG", b"", "no format that is known"),
        ("a.JPEG", b"<html>not found</html>", "no format that is known"),
        ("a.JPEG", coded(PHOTO, "JPEG")[:-700], "truncated"),
        ("a.png", coded(PHOTO, "PNG")[:-700], "cannot be read as a picture"),
        ("a.tif", coded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "floating-point"),
        ("a.tif", tiff(DEEP.tobytes(), 16, signed=True), "signed numbers on no known scale"),
        ("a.tif", tiff(DEEP.astype(np.uint8).tobytes(), 8, signed=True), "signed numbers on no known scale"),
        ("a.tif", tiff((DEEP.astype(np.uint32) << 16).tobytes(), 32), "32-bit numbers on no known scale"),
        ("a.tif", tiff((-DEEP.astype(np.int32)).tobytes(), 32, signed=True), "32-bit numbers on no known scale"),
        ("a.tif", tiff(DEEP.byteswap().tobytes(), 16, signed=True, big=True), "signed numbers on no known scale"),
        ("a.png", coded(Image.new("1", (30_000, 30_000)), "PNG"), "is refused|exceeds limit"),
        ("a.png", coded(Image.new("1", (10_000, 9_000)), "PNG"), "is refused: 10000 x 9000 pixels"),
    ],
)
def test_what_cannot_be_decoded_is_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    for read in (to_square, lambda path, _: open_picture(path)):
        with pytest.raises(UserError, match=message) as caught:
            read(tmp_path / name, 64)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_is_no_regular_file_is_named(tmp_path):
    """A pipe would be waited for until somebody writes to it."""
    os.mkfifo(tmp_path / "pipe.jpg")
    os.symlink(tmp_path / "nowhere", tmp_path / "link.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "huge.jpg").touch()
    os.truncate(tmp_path / "huge.jpg", 2**40)
    for name, message in (("pipe", "no regular file"), ("link", "No such file"), ("folder", "no regular file"),
                          ("huge", "more than any picture")):
        with pytest.raises(UserError, match=message):
            to_square(tmp_path / f"{name}.jpg", 64)


def test_a_png_with_a_wrong_byte_is_not_taken_for_sound(tmp_path):
    """Pillow shows the rows before the damage and black ones after it to whoever asks a second time."""
    whole = coded(Image.effect_noise((80, 80), 50), "PNG")
    for where in np.random.default_rng(0).integers(100, len(whole) - 30, 20):
        damaged = bytearray(whole)
        damaged[where] ^= 0xFF
        (tmp_path / "a.png").write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read as a picture"):
            pixels(tmp_path / "a.png")
        with pytest.raises((OSError, SyntaxError)):  # as prepare() of a notebook is given it
            pixels(Image.open(tmp_path / "a.png"))


def test_a_faulty_tag_beside_the_orientation_does_not_spoil_a_picture(tmp_path):
    """A resolution unit of 5/2, which Pillow reads and cannot write, in the EXIF block of a picture to be turned."""
    orientation = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    unit = struct.pack("<HHII", 0x0128, 5, 1, 8 + 2 + 2 * 12 + 4)  # a rational, which stands behind the tags
    tags = struct.pack("<H", 2) + orientation + unit + struct.pack("<III", 0, 5, 2)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + tags
    (tmp_path / "a.jpg").write_bytes(coded(PHOTO, "JPEG", quality=95, exif=exif))
    (tmp_path / "b.jpg").write_bytes(turned(6))
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    assert pixels(tmp_path / "a.jpg")[1] == ["turned (EXIF)"]
    assert np.array_equal(pixels(tmp_path / "a.jpg")[0], pixels(tmp_path / "b.jpg")[0])


def test_faulty_jpeg_data_is_noticed_even_where_pillow_is_content(tmp_path):
    """A flipped bit in the scan: libjpeg goes on after a warning that Pillow does not pass on."""
    data, seen = bytearray(coded(PHOTO, "JPEG", quality=95)), set()
    for where in range(len(data) - 400, len(data) - 100, 7):
        damaged = data.copy()
        damaged[where] ^= 0xFF
        (tmp_path / "a.JPEG").write_bytes(damaged)
        with contextlib.suppress(UserError):
            array, odd = pixels(tmp_path / "a.JPEG")
            seen |= set(odd)
            assert np.array_equal(array, np.asarray(Image.open(tmp_path / "a.JPEG")))
    assert seen == {"faulty JPEG data"}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_leaves_no_traceback(tmp_path):
    """Bits flipped in a JPEG's EXIF block: a picture or a UserError, nothing else."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8769] = 6, "words", {0x9000: b"0231", 0x829A: (1, 3)}
    Image.effect_noise((80, 80), 50).save(tmp_path / "a.jpg", exif=exif)
    whole, rng = (tmp_path / "a.jpg").read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for where in rng.integers(4, 200, 3):
            damaged[where] ^= 1 << rng.integers(8)
        (tmp_path / "b.jpg").write_bytes(damaged)
        with contextlib.suppress(UserError):
            assert to_square(tmp_path / "b.jpg", 64).shape == (64, 64, 3)


def test_the_largest_picture_that_is_taken_stays_within_the_memory(tmp_path):
    """89 million pixels in CMYK, the dearest kind: decoded, inverted, converted and resized within 2 GB."""
    side = int(MAX_PIXELS**0.5)
    Image.new("CMYK", (side, side), (10, 200, 30, 0)).save(tmp_path / "big.jpg", quality=20)
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from data.pictures import to_square
to_square(Path({str(tmp_path / "big.jpg")!r}), 256)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 2e9


def test_files_are_called_by_their_own_names_only_where_these_are_unique(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    tar = Files(str(tmp_path / "a"), ["x/1.jpg", "y/2.jpg"], True, np.array([2, 5]), np.array([3, 4]))
    assert [file.read() for file in tar] == [b"234", b"5678"]
    assert [file.name for file in tar[1:]] == ["2.jpg"]
    tree = Files(str(tmp_path), ["x/1.jpg", "y/1.jpg"], False)
    assert tree[1] == File("y/1.jpg", str(tmp_path / "y/1.jpg"))
    assert len(tree[:1]) == 1
    odd = Files(str(tmp_path), ["line\nbreak \udcff.jpg"], True)[0]
    assert odd.name == "line\\nbreak \\udcff.jpg"  # names go into lines of UTF-8
    assert Path(odd.path).name == "line\nbreak \udcff.jpg"
