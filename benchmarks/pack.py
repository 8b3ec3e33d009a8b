"""How fast does data.pack make stores? Against a plain PIL loop and Caffe's way, in turns in one run:

    python -m benchmarks.pack [--pictures FOLDER] [--count 1000] [--quality 88] [--repeats 5] [--json]

Pictures are 500 x 375 JPEG files with the spectrum of photographs (1/f), about as large as those of ILSVRC-2012 at the
default quality; --pictures takes your own JPEG files. Everything is a rate per second of one core's time, user and
system, of all processes together: `data.pack` includes its writer, its checksums and its verification. "decode", "+
resize" and "+ encode" are the parts alone, on bytes in memory: the limit for any packer with this decoder.
"""

import json
import resource
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import utils
from benchmarks.timing import machine
from data import encode, pack, trees
from data.pictures import square
from utils import Parser, UserError, run_script, whole

SIZE = 256
PIL_LOOP = "plain PIL loop"


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    found = machine(utils.pick_device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second thread would wait, and its waiting would count
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        root = Path(args.pictures) if args.pictures else place
        if args.pictures:
            members = jpegs_below(args.pictures, args.count)
        else:
            members = [photograph(place, number, args.quality) for number in range(args.count)]
        files = [root / member for member in members]
        result = {
            "pictures": len(files), "kilobytes": sum(f.stat().st_size for f in files) / len(files) / 1000,
            **found,
        }
        result["rates"] = rates(contenders(root, members), place / "out", args.repeats, len(files))
    torch.set_num_threads(threads)
    print(json.dumps(result) if args.json else report(result))
    return 0


def photograph(folder: Path, number: int, quality: int) -> str:
    """Write picture `number`, 500 x 375, as a JPEG file; its name."""
    name = f"{number:05d}.JPEG"
    Image.fromarray(like_a_photograph(number, 375, 500)).save(folder / name, quality=quality)
    return name


def jpegs_below(folder: str, count: int) -> list[str]:
    """The first JPEG files of a folder, at any depth, by content, but for those that not all contenders read. Raises
    UserError where there are none."""
    import simplejpeg

    with redirect_stdout(sys.stderr):  # what it says of other files
        names = trees.pictures_below(folder)
    found = []
    for name in names:
        with open(Path(folder) / name, "rb") as file:
            start = file.read(2)
            if start != b"\xff\xd8":
                continue
            try:
                simplejpeg.decode_jpeg(start + file.read())
                found.append(name)
            except ValueError as error:  # damaged, or of four colours
                print(f"skipped: {name} ({error})", file=sys.stderr)
        if len(found) == count:
            break
    if not found:
        raise UserError(f"--pictures {folder} holds no JPEG files")
    return found


def like_a_photograph(number: int, height: int, width: int) -> np.ndarray:
    """Picture `number`, (height, width, 3) uint8: noise whose amplitudes fall as 1/f, as in photographs, mostly alike
    in the three channels."""
    rng = np.random.default_rng(number)
    shape = (height, width)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1
    layers = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) / frequency, shape) for _ in range(4)]
    channels = np.stack([layers[3] + 0.3 * layer for layer in layers[:3]], axis=2)
    return (127 + 50 * channels / channels.std()).clip(0, 255).astype(np.uint8)


def contenders(root: Path, members: list[str]) -> dict:
    """What is timed, by name: each a function of a folder to write to, which may return how many bytes it wrote."""
    import simplejpeg

    files = [root / member for member in members]
    blobs = [file.read_bytes() for file in files]

    def decode(_):
        for blob in blobs:
            simplejpeg.decode_jpeg(blob)

    def resize(_):
        for blob in blobs:
            square(simplejpeg.decode_jpeg(blob), SIZE)

    def reencode(_):
        for blob in blobs:
            encode.payload(square(simplejpeg.decode_jpeg(blob), SIZE), "jpeg")

    def packed(codec):
        part = trees.file_split(root, members, [number % 2 for number in range(len(members))])
        source = trees.Source("benchmark", ["a", "b"], {"train": part}, SIZE, codec, 3)

        def run(out):
            with redirect_stdout(StringIO()):
                store = pack.pack(source, out)
            return store.manifest["files"]["train-00000/data.mdb"]["bytes"]

        return run

    return {
        PIL_LOOP: lambda out: pil_loop(files, out),
        "Caffe's way (OpenCV, LMDB)": lambda out: caffe(files, out),
        "data.pack, JPEG records": packed("jpeg"),
        "data.pack, raw records": packed("raw"),
        "decode": decode,
        "decode + resize": resize,
        "decode + resize + encode": reencode,
    }


def pil_loop(files: list[Path], out: Path) -> None:
    """Shorter side to SIZE, the centre, JPEG quality 90: as a script of ten lines would do it."""
    out.mkdir()
    for number, file in enumerate(files):
        picture = Image.open(file).convert("RGB")
        scale = SIZE / min(picture.size)
        picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BILINEAR)
        left, top = ((side - SIZE) // 2 for side in picture.size)
        picture.crop((left, top, left + SIZE, top + SIZE)).save(out / f"{number}.jpg", quality=90)


def caffe(files: list[Path], out: Path) -> None:
    """As convert_imageset -encoded: decode, warp to the size without antialiasing, encode, put into an LMDB."""
    import cv2
    import lmdb

    cv2.setNumThreads(1)
    with lmdb.open(str(out), map_size=1 << 36) as environment:
        for start in range(0, len(files), 1000):
            with environment.begin(write=True) as transaction:
                for number, file in enumerate(files[start : start + 1000], start):
                    picture = cv2.resize(cv2.imread(str(file)), (SIZE, SIZE))
                    coded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
                    transaction.put(b"%08d" % number, coded.tobytes())


def rates(contenders: dict, out: Path, repeats: int, count: int) -> dict:
    """Pictures per second of core time, `repeats` times each in turns after a round of warm-up: medians, quartiles,
    and kilobytes a record."""
    taken, written = {name: [] for name in contenders}, {}
    for number in range(repeats + 1):
        for name, run in contenders.items():
            before = core_seconds()
            written[name] = run(out)
            if number:
                taken[name].append(count / (core_seconds() - before))
            shutil.rmtree(out, ignore_errors=True)
    return {
        name: {"median": statistics.median(values), "quartiles": statistics.quantiles(values, n=4)[::2],
               "kilobytes": written[name] / count / 1000 if written[name] else None}
        for name, values in taken.items()
    }


def core_seconds() -> float:
    """User and system time of this process and of those of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def report(result: dict) -> str:
    lines = [f"{result['pictures']} pictures of {result['kilobytes']:.0f} KB, {result['device']}, "
             f"torch {result['torch']}, load {result['load']:.2f} at the start; pictures per second of core time, "
             f"{time.strftime('%Y-%m-%d')}"]
    slow = result["rates"][PIL_LOOP]["median"]
    for name, entry in result["rates"].items():
        low, high = entry["quartiles"]
        median = entry["median"]
        size = f"  {entry['kilobytes']:.0f} KB a record" if entry["kilobytes"] else ""
        lines.append(f"{name:<28} {median:7.0f}  (quartiles {low:.0f} to {high:.0f})  {median / slow:5.2f}x{size}")
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.pack", description="Time packing, per core.")
    parser.add_argument("--pictures", metavar="FOLDER", help="JPEG files to pack (default: made for this)")
    parser.add_argument("--count", type=whole(10), default=1000, metavar="N", help="pictures (default: %(default)s)")
    parser.add_argument("--quality", type=whole(1, 100), default=88, metavar="N",
                        help="JPEG quality of the pictures that are made (default: %(default)s)")
    parser.add_argument("--repeats", type=whole(2), default=5, metavar="N", help="timed rounds (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")
    return parser


if __name__ == "__main__":
    run_script(main)
