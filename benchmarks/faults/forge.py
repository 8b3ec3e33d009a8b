"""Files with one absurd part whose checksums all fit: records, manifests, config.json and checkpoints. Nothing can tell
what a sound one would have given, so what is checked is how a command ends: its status, one line, time and memory; and
that a record which cannot be its store's is refused."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import test
import train
from benchmarks.faults import Lost, inputs, small_run, small_store
from benchmarks.faults.mutate import one_of, outcome
from checkpoints import export, weights_checksum
from data import pack
from data.manifest import MANIFEST, checksum, file_entry
from data.store import HEADER, HEADER_CRC, MAGIC, ShardWriter

# What stands where something else should: other kinds, absurd sizes, ways out of a folder, control characters, markup.
ABSURD = (
    None, True, -1, 0, 7, 1.0, 3.0, 2**31, 10**30, 1e308, -0.5, float("nan"), float("inf"), "", "a" * 5000, "/etc",
    "../../../tmp/x", "a\0b", "\x1b[31mred\x1b]0;x\a\r\n", "\u202eright to left", "<script>alert(1)</script>", [], [[]],
    {}, {"a": 1},
)
BOMB = b"\xff\xc0\x00\x11\x08\xff\xdc\xff\xdc"  # a frame header of 65,500 x 65,500 pixels


def case(place: Path, rng: np.random.Generator) -> list[str]:
    return [one_of(TARGETS, place, rng)]


def twisted(value, rng: np.random.Generator):
    """A JSON value, or a checkpoint's dict, with one absurd entry somewhere, or one entry less."""
    inner = isinstance(value, dict | list) and len(value) > 0
    if isinstance(value, torch.Tensor):
        return other_tensor(value, rng)
    if not inner or rng.random() < 0.2:
        return ABSURD[rng.integers(len(ABSURD))]
    copy = value.copy()
    key = list(copy)[rng.integers(len(copy))] if isinstance(copy, dict) else int(rng.integers(len(copy)))
    if rng.random() < 0.1:
        del copy[key]
    else:
        copy[key] = twisted(copy[key], rng)
    return copy


def twisted_within(content: dict, often: tuple, rng: np.random.Generator):
    """twisted(), mostly in one of the entries `often`."""
    if not often or rng.random() < 0.3:
        return twisted(content, rng)
    name = str(rng.choice(often))
    return content | {name: twisted(content[name], rng)}


def other_tensor(tensor: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Of another shape, kind or content."""
    some = tensor.flatten()[:100]
    return [
        some, torch.empty(0), tensor.to(torch.complex64), tensor.to(torch.int8), tensor.to_sparse(), tensor[None],
        torch.full_like(tensor, float("nan")), tensor.to("meta"), torch.tensor(1.0).expand(10**6, 10**6),
    ][rng.integers(9)]


def json_file(path: Path, rng: np.random.Generator, often: tuple = ()) -> None:
    """Twist a JSON file, and let its checksum fit."""
    content = twisted_within(json.loads(path.read_bytes()), often, rng)
    if isinstance(content, dict):
        content["checksum"] = checksum(content)
    path.write_text(json.dumps(content))


def record(value: bytes, rng: np.random.Generator, header_only: bool) -> tuple[bytes, bool]:
    """(a record with one absurd part and fitting checksums, whether it cannot be one of the store's)."""
    _, label, *shape, codec, _, _, _ = HEADER.unpack_from(value)
    payload, wrong = value[HEADER.size + HEADER_CRC.size :], True
    kind = rng.integers(4 if header_only else 6)
    if kind == 0:
        label = int(rng.integers(4, 2**31)) * int(rng.choice([-1, 1]))
    elif kind == 1:
        shape[rng.integers(2)] = int(rng.choice([0, 1, 71, 73, 65535]))
    elif kind == 2:
        shape[2] = int(rng.choice([0, 1, 2, 4, 255]))
    elif kind == 3:
        codec = int(rng.choice([code for code in (0, 1, 2, 255) if code != codec]))
    elif kind == 4 and codec:
        start = payload.find(b"\xff\xc0")
        payload = payload[:start] + BOMB + payload[start + len(BOMB) :]
    elif kind == 4:
        payload = payload[: rng.integers(len(payload))]
    else:
        where = rng.integers(len(payload))
        payload, wrong = payload[:where] + rng.bytes(50) + payload[where + 50 :], False
        payload = payload[: len(value) - HEADER.size - HEADER_CRC.size]
    header = HEADER.pack(MAGIC, label, *shape, codec, 0, zlib.crc32(payload), len(payload))
    return header + HEADER_CRC.pack(zlib.crc32(header)) + payload, wrong


def forged_record(place: Path, room: Path, rng: np.random.Generator) -> str:
    """A store whose manifest and checksums fit a forged record: tested, verified, trained from."""
    import lmdb

    store = room / "store"
    shutil.copytree(inputs.photographs(place) if rng.random() < 0.5 else small_store(place), store)
    manifest = json.loads((store / MANIFEST).read_bytes())
    command = str(rng.choice(["test", "verify", "train"]))
    split = "train" if command == "train" else next(name for name in ("test", "val") if name in manifest["shards"])
    (shard,) = manifest["shards"][split]
    folder = store / shard["folder"]
    with lmdb.open(str(folder), readonly=True, lock=False) as environment, environment.begin() as transaction:
        values = [bytes(value) for _, value in transaction.cursor()]
    where = rng.integers(len(values))
    values[where], wrong = record(values[where], rng, header_only=command == "verify")  # which decodes no JPEG
    shutil.rmtree(folder)
    writer = ShardWriter(folder)
    for number, value in enumerate(values):
        writer.put(shard["first"] + number, value)
    writer.close()
    manifest["files"][f"{shard['folder']}/data.mdb"] = file_entry(folder / "data.mdb")
    (store / MANIFEST).write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))
    found = used(command, place, store, room)
    if found == "accepted" and wrong:
        raise Lost(f"record {where} cannot be one of this store's, and {command} is content")
    return found


def used(command: str, place: Path, store: Path, room: Path) -> str:
    if command == "test":
        return outcome(test.main, [small_run(place) / "best.pt", "--data", store, "--device", "cpu"], room)[0]
    if command == "verify":
        return outcome(pack.main, ["--verify", store, "--workers", 1], room)[0]
    more = ["--epochs", 1, "--batch-size", 16, "--device", "cpu", "--out", room / "run"]
    return outcome(train.main, ["--data", store, *more], room)[0]


def forged_manifest(place: Path, room: Path, rng: np.random.Generator) -> str:
    store = room / "store"
    shutil.copytree(inputs.photographs(place) if rng.random() < 0.5 else small_store(place), store)
    json_file(store / MANIFEST, rng)
    return used(str(rng.choice(["test", "verify", "train"])), place, store, room)


def forged_config(place: Path, room: Path, rng: np.random.Generator) -> str:
    out = inputs.copy_run(small_run(place), room / "run")
    json_file(out / "config.json", rng, ("arguments",))
    return outcome(train.main, ["--resume", "--out", out], room)[0]


def forged_checkpoint(name: str) -> Callable:
    """best.pt: tested, names pictures, exported, started from; last.pt: resumed."""

    def target(place: Path, room: Path, rng: np.random.Generator) -> str:
        out = inputs.copy_run(small_run(place), room / "run")
        path, store = out / name, inputs.photographs(place)
        commands = {
            "last.pt": [(train.main, ["--resume", "--out", out])],
            "best.pt": [
                (test.main, [path, "--data", store]), (test.main, [path, "--images", store.parent / "tree"]),
                (export.main, [path, room / "net.safetensors"]),
                (train.main, ["--data", store, "--init", path, "--max-steps", 1, "--out", room / "new"]),
            ],
        }[name]
        command, argv = commands[rng.integers(len(commands))]

        def main(argv) -> int:  # in the fork, where torch may compute
            often = ("optimizer", "schedule", "state") if name == "last.pt" else ("config",)
            checkpoint = twisted_within(torch.load(path, weights_only=True), often, rng)
            path.unlink()  # it is a link
            torch.save(checkpoint, path)
            return command(argv)

        return outcome(main, argv, room)[0]

    return target


def forged_safetensors(place: Path, room: Path, rng: np.random.Generator) -> str:
    """Its header says JSON, with a checksum of that and of the tensors."""
    from safetensors import safe_open
    from safetensors.torch import save

    path, sound = room / "best.safetensors", inputs.safetensors_file(place)

    def main(argv) -> int:
        with safe_open(sound, framework="pt") as file:
            about = json.loads(file.metadata()["alexnet"])
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        if rng.random() < 0.3:
            name = list(tensors)[rng.integers(len(tensors))]
            tensors[name] = tensors[name].flatten()[: rng.integers(100)].to(rng.choice(DTYPES))
        else:
            about = twisted(about, rng)
        if isinstance(about, dict):
            about["crc32"] = weights_checksum({k: v for k, v in about.items() if k != "crc32"}, tensors)
        path.write_bytes(save(tensors, {"alexnet": json.dumps(about)}))
        return test.main(argv)

    return outcome(main, [path, "--data", small_store(place)], room)[0]


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float8_e5m2)
TARGETS = {  # as mutate.TARGETS
    "forged record": (3, forged_record), "forged manifest": (4, forged_manifest),
    "forged config.json": (3, forged_config), "forged .safetensors": (3, forged_safetensors),
    "forged best.pt": (4, forged_checkpoint("best.pt")), "forged last.pt": (4, forged_checkpoint("last.pt")),
}
