"""data/progress.py: what a terminal and a log file get to see."""

import io
import re
import sys

import pytest

from data import progress


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59, "59s"), (200, "3m 20s"), (3720, "1h 02m")])
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def test_a_log_gets_a_plain_line_with_the_latest_note(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_INTERVAL", 0)
    with progress.Progress("epoch 1/2", 300, start=100) as bar:
        bar.update(50, "loss 2.000, error 80.0%")
        bar.update(50)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for line, done in zip(lines, (150, 200), strict=True):
        assert re.fullmatch(rf"epoch 1/2: {done}/300 images, \d+/s, \d+s left, loss 2.000, error 80.0%", line)


def test_it_is_silent_where_it_should_be(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_INTERVAL", 0)
    with progress.Progress("epoch 1/2", 100, silent=True) as bar:
        bar.update(50)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_with_rate_time_left_and_note(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.Progress("epoch 1/2", 300) as bar:
        bar.update(150, "loss 2.000, error 80.0%")
        bar.bar.refresh()
    assert re.search(r"epoch 1/2: +50%.*150/300 \[.*<.* images/s, loss 2.000, error 80.0%\]", terminal.getvalue())
