"""data/cli.py: argument types and exit statuses."""

import argparse
import sys

import pytest

from data import UserError, cli


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", "1e3", str(2**70)])
def test_whole_numbers(text):
    assert cli.whole(1)("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number from 1 on"):
        cli.whole(1)(text)


@pytest.mark.parametrize("text", ["0", "-1", "1", "nan", "inf", "x", ""])
def test_numbers(text):
    assert cli.number(0, 1)("0.5") == 0.5
    assert cli.number(0, 1, including=True)("0") == 0
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number above 0 and below 1"):
        cli.number(0, 1)(text)


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UserError("no such thing"), 2, "error: no such thing\n"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device; mend"),
        (PermissionError(13, "Permission denied", "/a/file"), 2, "error: /a/file: Permission denied; mend"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_what_a_script_exits_with(error, status, text, capsys, monkeypatch):
    def main(argv):
        assert argv == ["--x"]
        raise error

    monkeypatch.setattr(sys, "argv", ["script", "--x"])
    with pytest.raises(SystemExit) as caught:
        cli.run_script(main)
    assert caught.value.code == status
    err = capsys.readouterr().err
    assert err.startswith(text)
    assert err.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch):
    def main(_):
        raise ValueError("a bug, not a user's mistake")

    with pytest.raises(ValueError, match="a bug"):
        cli.run_script(main)


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.Parser(prog="x", description="Words.").parse_args(["--help"])
    assert caught.value.code == 0
    assert "Words." in capsys.readouterr().out
