"""A bar on a terminal; a plain line a minute where stderr is a file or a pipe."""

import sys
import time

from tqdm import tqdm

PLAIN_INTERVAL = 60  # seconds


def duration(seconds: float) -> str:
    """1h 02m, 3m 20s or 45s."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m {seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


class Progress:
    """Counts `total` things called `unit`, from `start`; use it in a with statement."""

    def __init__(self, label: str, total: int, unit: str = "images", start: int = 0, silent: bool = False):
        self.label, self.total, self.unit, self.start, self.done = label, total, unit, start, start
        self.silent, self.note = silent, ""
        self.bar = tqdm(
            desc=label, total=total, initial=start, unit=f" {unit}", disable=silent or None, leave=False,
            dynamic_ncols=True,
        )
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
            print(text + (f", {self.note}" if self.note else ""), file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
