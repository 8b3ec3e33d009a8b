"""What the command lines share: one-line complaints, exit statuses, argument types."""

import argparse
import math
import sys
from argparse import ArgumentTypeError
from pathlib import Path

from data import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors: one line, no usage text."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the options)")


def run_script(main) -> None:
    """Run main(argv) as a script: what the user got wrong becomes one line on stderr and exit status 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        status = 2
    except OSError as error:  # disk full, no permission, ...
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; mend that and run the command again", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = 130
    sys.exit(status)


def shown(path: Path) -> str:
    """A path to print, and to paste: relative to the working directory where it lies within it."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def whole(minimum: int, maximum: int = 2**63 - 1):
    """An argument type: a whole number from `minimum` to `maximum`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= maximum:
            limit = "on" if maximum == 2**63 - 1 else f"to {maximum}"
            raise ArgumentTypeError(f"{text} is not a whole number from {minimum} {limit}")
        return value

    return convert


def number(above: float, below: float | None = None, including: bool = False):
    """An argument type: a number above `above` (or equal, if `including`) and below `below`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        low = value > above or (including and value == above)
        if not (math.isfinite(value) and low and (below is None or value < below)):
            limits = f"{'at least' if including else 'above'} {above}" + (f" and below {below}" if below else "")
            raise ArgumentTypeError(f"{text} is not a number {limits}")
        return value

    return convert
