"""Trainings that are killed at random moments, stopped by signals, or whose last.pt is damaged, and resumed until they
are done: they end in the weights, momentum buffers, schedule and log of a run that nothing happened to, bit for bit."""

import hashlib
import json
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import torch

import data.loader
import train
from benchmarks.faults import Command, Ended, Lost, check_manners, small_store
from checkpoints.run import LAST, PREVIOUS, read_log
from kernels import multiplies_bf16

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ROUNDS = 12  # kills of a run at most; then it goes on to its end
LONGEST = 120  # seconds of a start
TIMES = ("images_per_second", "stall", "seconds")


def case(place: Path, rng: np.random.Generator) -> list[str]:
    how = combination(rng)
    wanted, seconds = reference(place, how)
    out = place / "chain"
    shutil.rmtree(out, ignore_errors=True)
    more = ["--checkpoint-minutes", str(rng.choice(["10", "1e-3", "1e-5"]))]
    done, starts, met = False, 0, []
    while not done:
        starts += 1
        fault = random_fault(rng, seconds) if starts <= ROUNDS else None
        done, ended = go_on(place, out, how, more, fault)
        if ended:
            met.append(signal.Signals(fault[0]).name)
        if not done and (out / LAST).exists() and rng.random() < 0.25:
            met.append(f"last.pt {damage(out / LAST, rng)}")
    found = fingerprints(out)
    different = [part for part in wanted if found[part] != wanted[part]]
    if different:
        raise Lost(f"{how}: after {starts} starts its {', '.join(different)} is not that of an unbroken run")
    kind = "streaming" if how["streaming"] else "resident"
    return [f"{kind} {how['precision']}{' in two processes' * (how['processes'] > 1)}", *met]


def combination(rng: np.random.Generator) -> dict:
    """One of the ways to train."""
    precisions = ["fp32", "bf16"] if multiplies_bf16(torch.device("cpu")) else ["fp32"]
    streaming = bool(rng.integers(2))
    return {
        "streaming": streaming, "workers": int(rng.integers(2)) if streaming else 0,
        "processes": 1 + int(rng.random() < 0.3), "precision": str(rng.choice(precisions)),
    }


def random_fault(rng: np.random.Generator, seconds: float) -> tuple[int, float, list[int]]:
    """(signal, seconds until it comes, to which of two processes)."""
    number = int(rng.choice(STOPS)) if rng.random() < 0.3 else signal.SIGKILL
    return number, rng.uniform(0, 0.6 * seconds), [[0], [1], [0, 1], [0, 1]][rng.integers(4)]


def reference(place: Path, how: dict) -> tuple[dict, float]:
    """The fingerprints of an unbroken run and its seconds; each way is trained once."""
    kept = place / ("-".join(f"{value}" for name, value in how.items() if name != "workers") + ".json")
    if not kept.exists():
        out, began = place / "unbroken", time.monotonic()
        if not go_on(place, out, how, [], None)[0]:
            raise Lost(f"{how}: a training that nothing happened to did not come to its end")
        kept.write_text(json.dumps([fingerprints(out), time.monotonic() - began]))
        shutil.rmtree(out)
    return tuple(json.loads(kept.read_text()))


def go_on(place: Path, out: Path, how: dict, more: list, fault: tuple | None) -> tuple[bool, bool]:
    """Start or resume the training, and let a fault happen to it. Returns whether it came to its end, and whether the
    fault's signal ended it."""
    resumes = any((out / name).exists() for name in (LAST, PREVIOUS))
    if not resumes:
        shutil.rmtree(out, ignore_errors=True)  # killed at the very start: there is a config.json at most
    started = start(place, out, how, ["--resume"] if resumes else more)
    number, seconds, ranks = fault or (0, 0, [])
    if fault:
        wait(started, seconds)
    met = [command for command in (started[rank % len(started)] for rank in ranks) if command.signal(number)]
    ended = [command.end() for command in together(started)]
    first = ended[0]
    if first.status == 2 and "damaged" in first.err and resumes and not (out / PREVIOUS).exists():
        shutil.rmtree(out)  # the only checkpoint was damaged, and it said so
    else:
        check(ended, number)
    hit = any(command.ended.status in (-number, 128 + number) for command in met)
    return all(one.status == 0 for one in ended), hit


def check(ended: list[Ended], number: int) -> None:
    """Each process ended as it may: in good order after a signal, if it came that far."""
    for one in ended:
        if len(ended) == 1:
            check_manners(one, (0, 128 + number, -number))
        elif "terminate called" in one.err:
            raise Lost(one.err[-1500:])


def start(place: Path, out: Path, how: dict, more: list) -> list[Command]:
    """One process, or two that join as torchrun's do."""

    def main(argv) -> int:
        data.loader.RESIDENT_BYTES = 0 if how["streaming"] else data.loader.RESIDENT_BYTES
        return train.main(argv)

    argv = ["--out", out, "--data", small_store(place), "--epochs", 2, "--drops", 1, "--batch-size", 16, "--workers",
            how["workers"], "--precision", how["precision"], "--device", "cpu", *more]
    if how["processes"] == 1:
        return [Command(main, argv, place, seconds=LONGEST)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    started = []
    for rank in range(2):
        folder = place / f"rank {rank}"
        folder.mkdir(exist_ok=True)
        started.append(Command(main, argv, folder, variables | {"RANK": str(rank)}, LONGEST))
    return started


def wait(started: list[Command], seconds: float) -> None:
    """So long, or until one ends."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not any(command.has_ended() for command in started):
        time.sleep(0.01)


def together(started: list[Command]) -> list[Command]:
    """Wait until all have ended. As torchrun does: where one fails, the others are ended, after a while."""
    patience = time.monotonic() + LONGEST
    while not all(command.has_ended() for command in started):
        if any(command.has_ended() and command.end().status for command in started):
            patience = min(patience, time.monotonic() + 10)
        if time.monotonic() > patience:
            for command in started:
                command.signal(signal.SIGKILL)
        time.sleep(0.01)
    return started


def damage(path: Path, rng: np.random.Generator) -> str:
    """Flip a bit of a file, or cut it. Returns what was done, in a word."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        where = int(rng.integers(size))
        if rng.random() < 0.3:
            file.truncate(where)
            return "cut"
        file.seek(where)
        byte = file.read(1)[0]
        file.seek(where)
        file.write(bytes([byte ^ 1 << int(rng.integers(8))]))
    return "changed"


def fingerprints(out: Path) -> dict[str, str]:
    """SHA-256 of what two runs that are the same have in common."""
    last = torch.load(out / LAST, weights_only=True)
    momenta = {name: entry["momentum_buffer"] for name, entry in last["optimizer"]["state"].items()}
    log = [{name: value for name, value in e.items() if name not in TIMES} for e in read_log(out / "log.jsonl")]
    rest = {name: last[name] for name in ("step", "epoch", "best", "schedule", "state")}
    return {
        "weights": tensors_digest(last["model"]), "momenta": tensors_digest(momenta),
        "schedule and state": json.dumps(rest, sort_keys=True), "log": json.dumps(log),
        "conv1.npy": hashlib.sha256((out / "conv1.npy").read_bytes()).hexdigest(),
    }


def tensors_digest(tensors: dict) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
