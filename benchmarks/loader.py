"""How fast do pictures get from the disk to batches? On one core, in turns in one run:

    python -m benchmarks.loader [--pictures FOLDER] [--count 2000] [--batch 64] [--repeats 5] [--json]

256 x 256 pictures are packed into stores, raw and JPEG: made ones with the spectrum of photographs, or with --pictures
your own, over and over until there are --count. All readers shuffle, crop 224 x 224 at random, mirror half of the
pictures, and give batches: uint8, or float32 with the mean subtracted, once a batch; ours have the channels last, the
peers' have them first, as the nets on either side take them.

Peers of the JPEG store get its very bytes, as an ImageFolder tree and as a webdataset shard, and decode them with each
of three decoders; the ratio that counts is against the fastest peer with simplejpeg, which is ours. The raw store's
peer is a DataLoader over a memory map of the same pixels. The limit of a raw store is that map, cropped row by row;
that of a JPEG store its decoder alone.

Then, on all cores: batches of 64-pixel crops from a resident store, and how much slower training is from a store than
on one batch that never changes. Everything is read before it is timed, so the disk's own speed plays no part.
"""

import itertools
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections import deque
from contextlib import closing, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import torch

import memory
from benchmarks.pack import like_a_photograph
from benchmarks.timing import interleaved, machine, milliseconds
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
THIS, FOLDER, WEB, MAPPED = "this", "ImageFolder + v2", "webdataset + v2", "DataLoader + v2 of a memory map"
DECODERS = ("PIL", "decode_jpeg", "simplejpeg")


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    count = args.count // args.batch * args.batch  # whole batches
    if not count:
        raise UserError(f"--count {args.count} is less than a batch of {args.batch}")
    result = {"pictures": count, "batch": args.batch, **machine(CPU)}
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as folder:
        stores = make_files(Path(folder), squares(args.pictures, count))
        result["kilobytes"] = kilobytes(Path(folder))
        torch.set_num_threads(1)
        os.sched_setaffinity(0, {min(cores)})
        try:
            for kind in ("uint8", "float32"):
                result[kind] = {
                    codec: rates(
                        {THIS: ours(stores[codec], args.batch, kind),
                         **peers(codec, Path(folder), stores["jpeg"], args.batch, kind),
                         **(limits(codec, Path(folder), args.batch) if kind == "uint8" else {})},
                        count, args.repeats,
                    ) for codec in ("raw", "jpeg")
                }
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
    """Pictures a second of functions whose batches are `count` pictures; a reader that is a string says why it is
    none."""
    calls = {n: lambda r=r: deque(r(), maxlen=0) for n, r in readers.items() if not isinstance(r, str)}
    times = interleaved(calls, repeats, CPU)
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
            file = folder / "tree" / f"{label:03d}" / f"{number:06d}.jpg"
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


def ours(store: Store, batch: int, kind: str):
    """A function that gives an epoch's batches of this repository's loader: (pictures, labels)."""
    loader = Loader(store, "train", resident=False)
    augment = Augment(CROP, store.mean.mean((0, 1), keepdims=True))

    def read():
        tables, pictures = epoch_tables(0, 0, len(loader), STORED - CROP), None
        plan = [tables.order[i : i + batch] for i in range(0, len(loader), batch)]
        for samples, (crops, labels) in zip(plan, loader.batches(plan, tables, CROP), strict=True):
            if kind == "float32":
                pictures = augment.train(crops, tables.colour[samples], out=pictures)
            yield crops if kind == "uint8" else pictures, labels

    return read


def peers(codec: str, folder: Path, store: Store, batch: int, kind: str) -> dict:
    """Functions that give an epoch's batches, by name, or why they can't run here."""
    found, mean = {}, torch.from_numpy(store.mean.mean((0, 1))).float()[:, None, None]
    makers = {f"{name}, {decoder}": (make, decoder) for decoder in DECODERS
              for name, make in ((FOLDER, image_folder), (WEB, web_dataset))}
    for name, (make, decoder) in makers.items() if codec == "jpeg" else [(MAPPED, (mapped, None))]:
        try:
            batches = make(folder, batch, decoder)
        except ImportError as error:
            found[name] = f"{error}; benchmarks/requirements.txt brings it"
            continue

        def read(batches=batches):
            for pictures, labels in batches:
                yield pictures if kind == "uint8" else pictures.float().sub_(mean), labels

        found[name] = read
    return found


def transforms(decoder: str | None):
    """torchvision's for the same pictures, of tensors (C, H, W) or of PIL's."""
    from torchvision.transforms import v2

    steps = [v2.RandomCrop(CROP), v2.RandomHorizontalFlip()] + [v2.PILToTensor()] * (decoder == "PIL")
    return v2.Compose(steps)


def decoder_of(name: str):
    """From a JPEG file's bytes to a picture."""
    import simplejpeg
    from PIL import Image
    from torchvision.io import decode_jpeg

    return {
        "PIL": lambda coded: Image.open(BytesIO(coded)).convert("RGB"),
        "decode_jpeg": lambda coded: decode_jpeg(torch.frombuffer(bytearray(coded), dtype=torch.uint8)),
        "simplejpeg": lambda coded: torch.from_numpy(simplejpeg.decode_jpeg(coded)).permute(2, 0, 1),
    }[name]


def image_folder(folder: Path, batch: int, decoder: str):
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    decode = decoder_of(decoder)
    tree, transform = str(folder / "tree"), transforms(decoder)
    dataset = ImageFolder(tree, transform, loader=lambda path: decode(Path(path).read_bytes()))
    return DataLoader(dataset, batch, shuffle=True)


def web_dataset(folder: Path, batch: int, decoder: str):
    import webdataset

    dataset = webdataset.WebDataset(str(folder / "shard.tar"), shardshuffle=False).shuffle(1000)
    decode, transform = decoder_of(decoder), transforms(decoder)
    dataset = dataset.to_tuple("jpg", "cls").map_tuple(lambda coded: transform(decode(coded)), int)
    return webdataset.WebLoader(dataset, batch_size=batch)


def mapped(folder: Path, batch: int, _decoder):
    from torch.utils.data import DataLoader, Dataset

    transform = transforms(None)

    class Pixels(Dataset):
        pixels = np.load(folder / "pixels.npy", mmap_mode="r")

        def __len__(self) -> int:
            return len(self.pixels)

        def __getitem__(self, index: int):
            return transform(torch.from_numpy(np.array(self.pixels[index])).permute(2, 0, 1)), index % CLASSES

    return DataLoader(Pixels(), batch, shuffle=True)


def limits(codec: str, folder: Path, batch: int) -> dict:
    """What no loader can beat: crops of bare pixels in a memory map, or the JPEG decoder without anything around."""
    import simplejpeg

    def memory_map():
        pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        tables = epoch_tables(0, 0, len(pixels), STORED - CROP)
        for start in range(0, len(pixels), batch):
            samples = tables.order[start : start + batch]
            crops = np.empty((len(samples), CROP, CROP, 3), np.uint8)
            for row, sample in enumerate(samples):
                top, left = tables.offsets[sample]
                crops[row] = pixels[sample, top : top + CROP, left : left + CROP]
            yield crops

    coded = [file.read_bytes() for file in sorted((folder / "tree").rglob("*.jpg"))]
    picture = np.empty((STORED, STORED, 3), np.uint8)

    def decoder():
        for one in coded:
            yield simplejpeg.decode_jpeg(one, buffer=picture)

    if codec == "raw":
        return {"limit: a memory map, cropped, not mirrored": memory_map}
    return {"limit: the decoder": decoder}


# ---------------------------------------------------------------------------------------------- all cores

RESIDENT = 128 * 100


def resident(store: Store):
    """A reader of RESIDENT pictures in batches of 128: cropped, mirrored, with colour noise, float32."""
    loader = Loader(store, "train", resident=True)
    augment = Augment(64, store.mean, colour="2012", pca=store.manifest["pca"])
    tables = epoch_tables(0, 0, len(loader), 72 - 64)
    plan = [np.resize(tables.order, RESIDENT)[i : i + 128] for i in range(0, RESIDENT, 128)]

    def read():
        for samples, (crops, _) in zip(plan, loader.batches(plan, tables, 64), strict=True):
            yield augment.train(crops, tables.colour[samples])

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
        f"{CROP} x {CROP} crops in batches of {result['batch']}; {result['device']}, torch {result['torch']}, "
        f"load {result['load']:.2f}"
    ]
    for kind, codec in itertools.product(("uint8", "float32"), ("raw", "jpeg")):
        found = result[kind][codec]
        rivals = {name: entry["images_per_second"] for name, entry in found.items()
                  if (name == MAPPED or "simplejpeg" in name) and "skipped" not in entry}
        fastest = max(rivals, key=rivals.get, default=None)
        lines.append(f"{kind} batches of {codec} records, one core: images/s, quartiles"
                     + f", times '{fastest}'" * bool(fastest))
        lines += [line(name, entry, result["pictures"], rivals.get(fastest)) for name, entry in found.items()]
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
    memory.keep()
    run_script(main)
