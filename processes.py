"""Several processes of one training, started by torchrun: how they join, agree, end together and are started again.
Without torchrun all of this does nothing."""

import os
import sys
import time
import traceback
import uuid
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import utils
from utils import UserError, one_line

FOLDER = "the run's folder"  # a key in torchrun's own key-value store, which outlives the processes
PATIENCE = timedelta(minutes=10)  # for the others to start
LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket")


def join(device: torch.device) -> tuple[int, int]:
    """(rank, number of processes); joins torchrun's group where there is one. Raises UserError where there are more
    processes than GPUs."""
    rank, world = int(os.environ.get("RANK", 0)), number_of_processes()
    if world == 1:
        return 0, 1
    if device.type == "cuda" and device.index >= (gpus := torch.cuda.device_count()):
        raise UserError(f"process {device.index + 1} of this machine finds {gpus} GPUs; start at most one a GPU")
    how = {}
    if _has_board():
        # torch would meet at keys that are still there from before a restart, and connect to processes that are gone.
        board = _board()
        how = {"store": dist.PrefixStore(_meet(board, rank, world), board), "rank": rank, "world_size": world}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, **how)
    else:
        dist.init_process_group("gloo", **how)
    return rank, world


def number_of_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def on_this_machine() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def _meet(board, rank: int, world: int) -> str:
    """A fresh prefix of keys for this start. Process 0 makes it and sends it to each process that says hello, until all
    have it; an answer to a process of an earlier start, which has ended, does no harm."""
    if rank:
        me = uuid.uuid4().hex
        board.set(f"hello {rank}", me)
        word = board.get(f"welcome {me}").decode()  # waits
        board.set(f"{word} {rank}", "")
        return word
    word, others, began = uuid.uuid4().hex, range(1, world), time.monotonic()
    while not all(board.check([f"{word} {other}"]) for other in others):
        for other in others:
            if board.check([f"hello {other}"]):
                board.set(f"welcome {board.get(f'hello {other}').decode()}", word)
        if time.monotonic() - began > PATIENCE.total_seconds():
            raise UserError(f"not all of {world} processes have started within {PATIENCE}")
        time.sleep(0.05)
    return word


def agree(mine: dict) -> None:
    """Raise UserError, the same in all processes, where one has other values than the first."""
    if not dist.is_initialized():
        return
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        for name in everyone[0] | theirs:
            if theirs.get(name) != everyone[0].get(name):
                raise UserError(f"process {rank} has another {name.replace('_', '-')} than process 0: "
                                f"{theirs.get(name)}, not {everyone[0].get(name)}; start all with the same command, "
                                "the same store and one --out that all of them see")


def wait() -> None:
    """Until every process has come this far."""
    if dist.is_initialized():
        dist.barrier()


def united(found: set[str]) -> list[str]:
    """What any process has found, sorted."""
    everyone = [found]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
    return sorted(set().union(*everyone))


# ---------------------------------------------------------------------------------------------- how they end


@contextmanager
def ending_together():
    """An error ends one of several processes at once: with gloo the others find its connections closed, and end, too;
    with NCCL torchrun ends them, or NCCL's own watch over what never arrives. Not by way of Python, where both wait for
    each other or abort."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if number_of_processes() == 1:
            raise
        if isinstance(error, UserError | OSError | KeyboardInterrupt):
            status = utils.report(error)
        elif isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST):
            utils.report(UserError("another process of this run has ended (its own message says why; there is none if "
                                   f"it was killed), or the connection to it failed ({one_line(error)})"))
            status = 1
        else:
            traceback.print_exc()
            status = 1
        _end(status)


def leave(status: int) -> int:
    """Of one process: the status, to return. Of several: end this one when all have come this far."""
    if dist.is_initialized():
        dist.barrier()
        _end(status)
    return status


def _end(status: int) -> None:
    """At once. On Python's way out gloo's threads now and then abort ("terminate called without an active exception"),
    and torchrun then kills the others."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


# ---------------------------------------------------------------------------------------------- torchrun --max-restarts


def interrupted_run() -> Path | None:
    """Where torchrun has started its processes anew, after one of them failed: the folder of the run that they were
    at, if it had one already."""
    board = _board() if _has_board() else None
    return Path(board.get(FOLDER).decode()) if board and board.check([FOLDER]) else None


def remember_run(folder: Path) -> None:
    """For interrupted_run."""
    if _has_board() and int(os.environ["RANK"]) == 0:
        _board().set(FOLDER, str(folder.absolute()))


def _has_board() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _board() -> dist.TCPStore:
    """torchrun's key-value store."""
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(*place, is_master=False, timeout=PATIENCE)
