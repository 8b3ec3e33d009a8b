"""What the scripts share: errors in one line, command-line parts, progress, devices, seeds, evaluation, whole files.
Imports nothing of the project, and torch only inside functions, so that stores can be read without it."""

import argparse
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

PLAIN_INTERVAL = 60  # seconds between lines of progress where there is no terminal


class UserError(ValueError):
    """Something that the user can put right. The message is one line: what is, and what to do."""


class Diverged(UserError):
    """The loss, or a weight, is no longer finite."""


def one_line(error: Exception) -> str:
    """An error's text in one line, cut to 200 characters: torch's go over many."""
    return " ".join(str(error).split())[:200]


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors: one line, no usage text."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the options)")


def run_script(main) -> None:
    """Run main(argv) as a script: a UserError becomes one line on stderr and exit status 2."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # >&-
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        if any(not word or (word.startswith("--") and word.endswith("=")) for word in sys.argv):
            raise UserError("one of the arguments is empty; is a variable not set?")
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except (UserError, OSError, KeyboardInterrupt) as error:
        status = report(error)
    sys.exit(status)


def report(error: BaseException) -> int:
    """Print one line on stderr about a UserError, OSError (none where a reader is gone) or Ctrl-C, in one write, which
    print() is not where PYTHONUNBUFFERED is set: lines of several processes stay whole. Returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.write("stopped\n")
        return 130
    if isinstance(error, BrokenPipeError):  # the reader, `head` perhaps, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    text = " ".join(str(error).split())
    if not isinstance(error, UserError):  # disk full, no permission, ...
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror or error}; put that right and run the command again"
    start = f"error in process {os.environ['RANK']}:" if "RANK" in os.environ else "error:"
    sys.stderr.write(f"{start} {text if text.isprintable() else ascii(text)[1:-1]}\n")
    return 2


def shown(path: Path) -> str:
    """A path to print, and to paste: relative to the working directory where it is within it."""
    path, here = Path(os.path.realpath(path)), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def whole(minimum: int, maximum: int = 2**63 - 1):
    """An argument type: a whole number from `minimum` to `maximum`."""

    def convert(text: str) -> int:
        with suppress(ValueError):
            if minimum <= int(text) <= maximum:
                return int(text)
        limit = "or more" if maximum == 2**63 - 1 else f"to {maximum}"
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, {minimum} {limit}")

    return convert


def number(above: float, below: float = math.inf, including: bool = False):
    """An argument type: a number above `above` (or equal, if `including`) and below `below`."""

    def convert(text: str) -> float:
        with suppress(ValueError):
            value = float(text)
            if above < value < below or (including and value == above):
                return value
        limits = f"{'at least' if including else 'above'} {above}" + f" and below {below}" * (below < math.inf)
        raise argparse.ArgumentTypeError(f"{text} is not a number {limits}")

    return convert


def duration(seconds: float) -> str:
    """1h 02m, 3m 20s or 45s."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m {seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


class Progress:
    """A bar on a terminal; a plain line a minute where stderr is a file or a pipe. Counts `total` things called
    `unit`, from `start`; use it in a with statement."""

    def __init__(self, label: str, total: int, unit: str = "images", start: int = 0, silent: bool = False):
        self.label, self.total, self.unit, self.start, self.done = label, total, unit, start, start
        self.silent, self.note = silent, ""
        options = {"desc": label, "total": total, "initial": start, "unit": f" {unit}", "leave": False}
        self.bar = tqdm(**options, disable=silent or None, dynamic_ncols=True)  # None: where there is no terminal
        self.begun = self.shown = time.monotonic()

    def update(self, count: int, note: str = "") -> None:
        """`count` more are done; `note` goes to the end of the line and stays until there is another."""
        self.done += count
        self.note = note or self.note
        if not self.bar.disable:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(count)
        elif not self.silent and time.monotonic() - self.shown >= PLAIN_INTERVAL:
            self.shown = time.monotonic()
            rate = (self.done - self.start) / (self.shown - self.begun)
            left = duration((self.total - self.done) / rate) if rate else "?"
            text = f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.0f}/s, {left} left"
            with suppress(OSError):  # nobody reads any more, or a full disk; watch.py looks after that
                print(text + (f", {self.note}" if self.note else ""), file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()


def pick_device(name: str):
    """The torch.device for "auto", "cuda" or "cpu"; under torchrun each local process has its own GPU."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    cuda = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")


def no_tf32() -> None:
    """float32 is float32 on a GPU, too: torch's convolutions would take TF32 there."""
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def seed_all(*numbers: int) -> None:
    """Seed the CPU's generator and the current GPU's from several whole numbers, such as (seed, step, rank)."""
    import torch

    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed goes through all devices, which takes longer
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)


def error_counts(scores, labels):
    """(2,) int64 on the device: how many of (n, classes) scores miss the label with their best, their five best."""
    import torch

    hits = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    return torch.stack([(~hits[:, 0]).sum(), (~hits.any(1)).sum()])


def probabilities(members, images):
    """(n, classes) float64: the softmax outputs for n images, averaged over views and members (paper, sections 4.1 and
    6). members: (net, views) pairs, the nets in eval mode; views(images) gives a net's inputs, of one view of all
    images or of several, one after the other; several members are an ensemble."""
    import torch

    with torch.no_grad():
        outputs = [net(inputs).double().softmax(1) for net, views in members for inputs in views(images)]
    return torch.cat(outputs).unflatten(0, (-1, len(images))).mean(0)


def score(probabilities, labels):
    """(3,) float64 on the device, sums over a batch: cross-entropy, top-1 misses, top-5 misses. A label of -1, an
    unlabelled picture, adds nothing to the cross-entropy."""
    import torch
    from torch.nn.functional import nll_loss

    loss = nll_loss(probabilities.clamp_min(1e-300).log(), labels, ignore_index=-1, reduction="sum")
    return torch.cat([loss[None], error_counts(probabilities, labels)])


def evaluate(members, batches):
    """score() summed over batches of (images, labels); members as in probabilities()."""
    import torch

    sums = torch.zeros(3, dtype=torch.float64, device=next(members[0][0].parameters()).device)
    for images, labels in batches:
        sums += score(probabilities(members, images), labels)
    return sums


@contextmanager
def replacing(path: Path, ready=None):
    """A binary file to write that takes the place of `path`, or of what a link there leads to, once it is whole and on
    the disk, and ready(its path), the last thing before that, has raised no OSError. Where that fails, or where
    there is a device or a folder, what was there stays and UserError says why."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file and is left as it is; name a file")
    unfinished = path.with_name(f".{path.name}.writing")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what ready() reads comes from the disk
        if ready:
            ready(unfinished)
        unfinished.replace(path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        reason = getattr(error, "strerror", None) or "torch could not write all of it"
        free = shutil.disk_usage(path.parent).free // 1_000_000 if path.parent.exists() else 0
        raise UserError(f"{path} could not be written: {reason}; {free} MB are free there") from None
    finally:
        unfinished.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Bring a folder's new entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a text file, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # names of files need not be text
