"""How fast do pictures get from the disk to batches? On one core, in turns in one run:

    python -m benchmarks.loader [--pictures FOLDER] [--count 2000] [--batch 64] [--repeats 5] [--json]

256 x 256 pictures are packed into stores, raw and JPEG: made ones with the spectrum of photographs, or with --pictures
your own, over and over until there are --count. The peers get the very JPEG bytes of the store, as an ImageFolder tree
and as a webdataset shard. All of them shuffle, crop 224 x 224 at random, mirror half of the pictures, and give batches:
uint8, or float32 with the mean subtracted; ours have the channels last, the peers' have them first, as the nets on
either side take them. The limit of a raw store is a memory map of bare pixels, cropped row by row; that of a JPEG store
its decoder alone.

Then, on all cores: batches of 64-pixel crops from a resident store, and how much slower training is from a store than
on one batch that never changes. Everything is read before it is timed, so the disk's own speed plays no part.
"""

import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from contextlib import closing, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import torch

import utils
from benchmarks.pack import like_a_photograph
from benchmarks.timing import interleaved, milliseconds
from checkpoints.run import environment
from data import encode, pack, trees
from data.augment import Augment, epoch_tables
from data.loader import Loader
from data.pictures import open_picture, to_square
from data.store import Store
from data.trees import Source, Split
from kernels import accelerate
from model import AlexNet
from recipe import make_optimizer
from train import train_step
from utils import Parser, UserError, run_script, whole

STORED, CROP, CLASSES = 256, 224, 1000
CPU = torch.device("cpu")
RAW, JPEG = "this, raw records", "this, JPEG records"
FOLDER, WEB = "ImageFolder + v2", "webdataset + v2"
DECODERS = {"PIL": False, "decode_jpeg": True}  # torchvision's decoder gives tensors


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    count = args.count // args.batch * args.batch  # whole batches
    if not count:
        raise UserError(f"--count {args.count} is less than a batch of {args.batch}")
    result = {"pictures": count, "batch": args.batch, **environment(CPU)}
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as folder:
        stores = make_files(Path(folder), squares(args.pictures, count))
        result["kilobytes"] = kilobytes(Path(folder))
        torch.set_num_threads(1)
        os.sched_setaffinity(0, {min(cores)})
        try:
            for kind in ("uint8", "float32"):
                readers = {**ours(stores, args.batch, kind), **peers(Path(folder), stores["jpeg"], args.batch, kind)}
                if kind == "uint8":
                    readers |= limits(Path(folder), args.batch)
                result[kind] = rates(readers, count, args.repeats)
        finally:
            os.sched_setaffinity(0, cores)
            torch.set_num_threads(threads)
        result["resident"] = rates({"this, resident, 64 px": resident(stores["small"])}, RESIDENT, args.repeats)
        result["training"] = {
            "64 px, resident": training(stores["small"], 64, 128, 60),
            f"{CROP} px, JPEG records": training(stores["jpeg"], CROP, args.batch, 24),
        }
    print(json.dumps(result) if args.json else report(result))
    return 0


def rates(readers: dict, count: int, repeats: int) -> dict:
    """Pictures a second of functions that read `count` pictures each; a reader that is a string says why it is none."""
    times = interleaved({n: r for n, r in readers.items() if not isinstance(r, str)}, repeats, CPU)
    return {
        name: {"skipped": reader} if isinstance(reader, str)
        else {"images_per_second": count / statistics.median(times[name]), **milliseconds(times[name])}
        for name, reader in readers.items()
    }


# ---------------------------------------------------------------------------------------------- the files


def squares(folder: str | None, count: int) -> np.ndarray:
    """`count` pictures (n, 256, 256, 3), those of a folder over and over or made for this."""
    if not folder:
        return np.stack([like_a_photograph(number, STORED, STORED) for number in range(count)])
    with redirect_stdout(sys.stderr):  # what it says of other files
        found = [Path(folder) / name for name in trees.pictures_below(folder)]
    if not found:
        raise UserError(f"--pictures {folder} holds no pictures")
    cut = [to_square(open_picture(file), STORED, 3) for file in found[:count]]
    return np.stack([cut[number % len(cut)] for number in range(count)])


def kilobytes(folder: Path) -> float:
    """A JPEG file's size, on average."""
    return float(np.mean([file.stat().st_size for file in (folder / "tree").rglob("*.jpg")])) / 1000


def make_files(folder: Path, pictures: np.ndarray) -> dict[str, Store]:
    """The same pictures as raw and as JPEG records of 256 pixels, as bare pixels, as files of an ImageFolder tree and
    as a webdataset shard, the last two of the bytes that are in the JPEG records; and a raw store of 72 pixels."""
    labels = np.arange(len(pictures)) % CLASSES
    np.save(folder / "pixels.npy", pictures)
    with tarfile.open(folder / "shard.tar", "w") as shard:
        for number, (picture, label) in enumerate(zip(pictures, labels.tolist(), strict=True)):
            coded = bytes(encode.payload(picture, "jpeg"))
            file = folder / "tree" / str(label) / f"{number:06d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(coded)
            for name, content in ((file.name, coded), (f"{file.stem}.cls", str(label).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                shard.addfile(entry, BytesIO(content))
    corners = pictures[:, :72, :72]
    splits = {"raw": (pictures, "raw"), "jpeg": (pictures, "jpeg"), "small": (corners, "raw")}
    stores = {}
    for name, (kept, codec) in splits.items():
        classes = [f"class {number}" for number in range(CLASSES)]
        source = Source(name, classes, {"train": Split(kept, labels)}, kept.shape[1], codec, 3)
        with redirect_stdout(StringIO()):
            stores[name] = pack.pack(source, folder / name)
    return stores


# ---------------------------------------------------------------------------------------------- one core


def ours(stores: dict[str, Store], batch: int, kind: str) -> dict:
    def reader(store: Store):
        loader = Loader(store, "train", resident=False)
        augment = Augment(CROP, store.mean.mean((0, 1), keepdims=True))

        def read() -> None:
            tables, pictures = epoch_tables(0, 0, len(loader), STORED - CROP), None
            plan = [tables.order[i : i + batch] for i in range(0, len(loader), batch)]
            for samples, (crops, _) in zip(plan, loader.batches(plan, tables, CROP), strict=True):
                if kind == "float32":
                    pictures = augment.train(crops, tables.colour[samples], out=pictures)

        return read

    return {RAW: reader(stores["raw"]), JPEG: reader(stores["jpeg"])}


def peers(folder: Path, store: Store, batch: int, kind: str) -> dict:
    """Readers by name, or why they can't run here."""
    found = {}
    for decoder, tensors in DECODERS.items():
        for name, make in ((FOLDER, image_folder), (WEB, web_dataset)):
            try:
                found[f"{name}, {decoder}"] = make(folder, batch, transform(store, kind, tensors), tensors)
            except ImportError as error:
                found[f"{name}, {decoder}"] = f"{error}; benchmarks/requirements.txt brings it"
    return found


def transform(store: Store, kind: str, tensors: bool):
    """torchvision's transforms for the same batches, of tensors (C, H, W) or of PIL pictures."""
    from torchvision.transforms import v2

    steps = [v2.RandomCrop(CROP), v2.RandomHorizontalFlip()] + [v2.PILToTensor()] * (not tensors)
    if kind == "float32":
        steps += [v2.ToDtype(torch.float32), v2.Normalize(store.mean.mean((0, 1)).tolist(), [1.0, 1.0, 1.0])]
    return v2.Compose(steps)


def image_folder(folder: Path, batch: int, transforms, tensors: bool):
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.io import decode_jpeg, read_file

    more = {"loader": lambda path: decode_jpeg(read_file(path))} if tensors else {}
    dataset = ImageFolder(str(folder / "tree"), transforms, **more)
    batches = DataLoader(dataset, batch, shuffle=True)
    return lambda: exhaust(batches)


def web_dataset(folder: Path, batch: int, transforms, tensors: bool):
    import webdataset
    from torchvision.io import decode_jpeg

    def decode(coded: bytes):
        return decode_jpeg(torch.frombuffer(bytearray(coded), dtype=torch.uint8))

    dataset = webdataset.WebDataset(str(folder / "shard.tar"), shardshuffle=False).shuffle(1000)
    if tensors:
        dataset = dataset.to_tuple("jpg", "cls").map_tuple(decode, int)
    else:
        dataset = dataset.decode("pil").to_tuple("jpg", "cls")
    batches = webdataset.WebLoader(dataset.map_tuple(transforms, int), batch_size=batch)
    return lambda: exhaust(batches)


def exhaust(batches) -> None:
    for _ in batches:
        pass


def limits(folder: Path, batch: int) -> dict:
    """What no loader can beat: crops of bare pixels in a memory map, and the JPEG decoder without anything around."""
    import simplejpeg

    files = sorted((folder / "tree").rglob("*.jpg"))

    def memory_map() -> None:
        pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        tables = epoch_tables(0, 0, len(pixels), STORED - CROP)
        for start in range(0, len(pixels), batch):
            samples = tables.order[start : start + batch]
            crops = np.empty((len(samples), CROP, CROP, 3), np.uint8)
            for row, sample in enumerate(samples):
                top, left = tables.offsets[sample]
                crops[row] = pixels[sample, top : top + CROP, left : left + CROP]

    coded = [file.read_bytes() for file in files]
    picture = np.empty((STORED, STORED, 3), np.uint8)

    def decoder() -> None:
        for one in coded:
            simplejpeg.decode_jpeg(one, buffer=picture)

    return {"limit of raw: a memory map, cropped, not mirrored": memory_map, "limit of JPEG: the decoder": decoder}


# ---------------------------------------------------------------------------------------------- all cores

RESIDENT = 128 * 100


def resident(store: Store):
    """A reader of RESIDENT pictures in batches of 128: cropped, mirrored, with colour noise, float32."""
    loader = Loader(store, "train", resident=True)
    augment = Augment(64, store.mean, colour="2012", pca=store.manifest["pca"])
    tables = epoch_tables(0, 0, len(loader), 72 - 64)
    plan = [np.resize(tables.order, RESIDENT)[i : i + 128] for i in range(0, RESIDENT, 128)]

    def read() -> None:
        for samples, (crops, _) in zip(plan, loader.batches(plan, tables, 64), strict=True):
            augment.train(crops, tables.colour[samples])

    return read


def training(store: Store, size: int, batch: int, steps: int) -> dict:
    """Seconds of a step from a store and of one on a fixed batch, by turns, `steps` of each after two that are not
    counted; without workers, as train.py on a CPU."""
    torch.manual_seed(0)
    net = AlexNet(CLASSES, image_size=size).to(memory_format=torch.channels_last)
    accelerate(net)
    optimizer = make_optimizer(net, recipe="2012", lr=1e-5, momentum=0.9, weight_decay=5e-4)
    loader = Loader(store, "train", resident=size == 64)
    augment = Augment(size, store.mean, colour="2012", pca=store.manifest["pca"])
    tables = epoch_tables(0, 0, len(loader), store.size - size)
    plan = np.resize(tables.order, (steps + 3, batch))
    seconds = {"store": [], "fixed": []}
    with closing(loader.batches(list(plan), tables, size)) as batches:
        crops, fixed_labels = next(batches)
        fixed, pictures = augment.train(crops, tables.colour[plan[0]]), None
        for samples in plan[1:]:
            began = time.perf_counter()
            crops, labels = next(batches)
            pictures = augment.train(crops, tables.colour[samples], out=pictures)
            train_step(net, optimizer, pictures, labels, "fp32")
            between = time.perf_counter()
            train_step(net, optimizer, fixed, fixed_labels, "fp32")
            seconds["store"].append(between - began)
            seconds["fixed"].append(time.perf_counter() - between)
    return {kind: milliseconds(times[2:]) for kind, times in seconds.items()}


# ---------------------------------------------------------------------------------------------- what is printed


def report(result: dict) -> str:
    lines = [
        f"{result['pictures']} pictures of {STORED} x {STORED}, {result['kilobytes']:.0f} KB as JPEG, shuffled, "
        f"{CROP} x {CROP} crops in batches of {result['batch']}; {result['device']}, torch {result['torch']}"
    ]
    for kind in ("uint8", "float32"):
        slow = result[kind][f"{FOLDER}, PIL"].get("images_per_second")
        lines.append(f"{kind} batches, one core: images/s, quartiles, times {FOLDER} with PIL")
        lines += [line(name, entry, result["pictures"], slow) for name, entry in result[kind].items()]
    lines.append(f"all cores ({result['threads']} threads):")
    lines += [line(name, entry, RESIDENT, None) for name, entry in result["resident"].items()]
    for name, entry in result["training"].items():
        store, fixed = entry["store"]["median_ms"], entry["fixed"]["median_ms"]
        lines.append(f"  training, {name}: {store:.1f} ms a step, {fixed:.1f} ms on one fixed batch: "
                     f"{store / fixed - 1:+.1%}")
    return "\n".join(lines)


def line(name: str, entry: dict, count: int, slow: float | None) -> str:
    if "skipped" in entry:
        return f"  {name:<52}{'-':>8}  skipped: {entry['skipped']}"
    rate, (low, high) = entry["images_per_second"], (1000 * count / ms for ms in entry["quartiles_ms"][::-1])
    times = f"{rate / slow:7.2f}x" if slow else ""
    return f"  {name:<52}{rate:>8.0f}  ({low:.0f}..{high:.0f}){times}"


def make_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.loader", description="Time reading, cropping and mirroring pictures.")
    parser.add_argument("--pictures", metavar="FOLDER", help="pictures to pack (default: made for this)")
    parser.add_argument("--count", type=whole(100), default=2000, metavar="N", help="pictures (default: %(default)s)")
    parser.add_argument("--batch", type=whole(1), default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--repeats", type=whole(3), default=5, metavar="N", help="timed rounds (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")
    return parser


if __name__ == "__main__":
    utils.huge_pages()
    run_script(main)
