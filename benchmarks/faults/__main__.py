"""Does anything get lost? Faults at random, for as long as you like:

    python -m benchmarks.faults --minutes 60 [--seed 0] [--only KIND ...] [--folder DIR]
    python -m benchmarks.faults --only KIND --case NUMBER          one case again

kill-training   trainings killed at random moments and resumed: the weights of an unbroken run, bit for bit
kill-packing    packings killed at random moments: a whole store or none
mutate          damaged files of every kind that a command takes: refused in one line, or no wrong result
forge           files with an absurd part whose checksums fit: refused in one line, or used without a crash or a hang
disk            a disk that is full, or fails, at any one write: one line, and the last good state in place
starts          torchrun's two processes start and end

Everything random in a case follows from the seed, the kind and the case's number; but the moment of a kill is a time,
and a machine is not always equally fast. The exit status is 1 at the first case that loses something, with the command
that repeats it. What is written goes to --folder, by default a temporary one.
"""

import contextlib
import os
import signal
import tempfile
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.faults import Command, Lost, disk, forge, mutate, packing, prepare, starts, training
from utils import Parser, UserError, number, run_script, whole

KINDS = {
    "kill-training": training.case, "kill-packing": packing.case, "mutate": mutate.case, "forge": forge.case,
    "disk": disk.case, "starts": starts.case,
}
CASES, LOST = "cases", "lost"  # what is counted of every kind, besides what its cases return
TURN = 20  # seconds, or one case, before it is the next kind's turn


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    kinds = args.only or list(KINDS)
    if args.case is not None and len(kinds) > 1:
        raise UserError("--case is of one kind; name it with --only")
    missing = {kind: why for kind, why in (("disk", disk.trouble()),) if kind in kinds and why}
    for kind, why in missing.items():
        print(f"{kind}: skipped, {why}")
    prepare()
    with contextlib.ExitStack() as stack:
        place = Path(args.folder or stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        place.mkdir(parents=True, exist_ok=True)
        return campaign([kind for kind in kinds if kind not in missing], place, args)


def campaign(kinds: list[str], place: Path, args) -> int:
    """Take turns until the time is over or each kind has had --cases. Returns the exit status."""
    counts, end = {kind: Counter() for kind in kinds}, time.monotonic() + 60 * args.minutes
    last = 1 if args.case is not None else args.cases
    waiting, again = list(kinds), ""
    try:
        while waiting and not again and (time.monotonic() < end or last):
            kind = waiting.pop(0)
            lost = turn(kind, place, counts[kind], end, last, args)
            print(row(kind, counts[kind]), flush=True)
            if lost is not None:
                seed = f" --seed {args.seed}" if args.seed else ""
                again = f"python -m benchmarks.faults --only {kind} --case {lost}{seed}"
            if not last or counts[kind][CASES] < last:
                waiting.append(kind)
    finally:  # also after Ctrl-C
        for process in Command.running:
            os.killpg(process, signal.SIGKILL)
        print("\n".join(["", *(row(kind, found) for kind, found in counts.items()), again]).rstrip())
    return 1 if again else 0


def turn(kind: str, place: Path, counts: Counter, end: float, last: int | None, args) -> int | None:
    """Cases of one kind for a while. Returns the number of one that lost something."""
    stop = min(time.monotonic() + TURN, end)
    while True:
        case = args.case if args.case is not None else counts[CASES]
        folder = place / kind
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng([args.seed, zlib.crc32(kind.encode()), case])
        try:
            counts.update([CASES, *KINDS[kind](folder, rng)])  # the words that it returns are counted
        except Exception as error:  # also what no oracle thought of
            counts.update([CASES, LOST])
            text = str(error) if isinstance(error, Lost) else traceback.format_exc()
            print(f"lost: {kind}, case {case}: {text}", flush=True)
            return case
        if counts[CASES] == last or time.monotonic() >= stop:
            return None


def row(kind: str, counts: Counter) -> str:
    found = [f"{count} {outcome}" for outcome, count in sorted(counts.items()) if outcome not in (CASES, LOST)]
    return f"{kind:<14}{counts[CASES]:>6} cases   {', '.join([*found, f'{counts[LOST]} lost'])}"


def make_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.faults", description="Faults at random, and whether anything is lost.")
    parser.add_argument("--minutes", type=number(0), default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--cases", type=whole(1), metavar="N",
                        help="so many of each kind instead, however long it takes")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="S", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=KINDS, metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--case", type=whole(0), metavar="NUMBER", help="this case alone, of the one kind of --only")
    parser.add_argument("--folder", metavar="DIR", help="where to work, kept at the end (default: a temporary folder)")
    return parser


if __name__ == "__main__":
    run_script(main)
