"""options.py: every option, and what is refused in one line."""

import subprocess
import types

import pytest
import torch
from conftest import small_source
from helpers import ROOT, command, load, run

from data import UserError, pack


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "imagenet"], "--dataset"),
        (["--columns", "3"], "--columns"),
        (["--batch-size", "0"], "--batch-size: 0 is not"),
        (["--batch-size", "97"], "--batch-size 97: .* has 96 training pictures"),
        (["--lr", "-0.1"], "--lr: -0.1 is not a number above 0"),
        (["--lr", "nan"], "--lr"),
        (["--momentum", "1"], "--momentum"),
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "1.5"], "--epochs"),
        (["--patience", "0"], "--patience"),
        (["--image-size", "62"], "--image-size"),
        (["--image-size", "73"], "--image-size 73: .* has 72 x 72"),
        (["--activation", "swish"], "--activation"),
        (["--init", "nowhere.pt"], r"nowhere.pt: no such checkpoint"),
        (["--resume"], "nothing to resume"),
        (["--frobnicate"], "--frobnicate"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**64)], "--seed"),
        (["--dataset", "sample"], "not allowed with"),
        (["--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(store, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message) as caught:
        run(store, tmp_path / "run", *arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_script_prints_one_line_and_exits_with_2(tmp_path):
    """A folder of pictures instead of a store: the way out is the pack command."""
    no_store = types.SimpleNamespace(path=tmp_path)
    done = subprocess.run(command(no_store, tmp_path / "run"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "python -m data.pack" in line


@pytest.mark.parametrize("size", [63, 64])
def test_a_store_of_the_smallest_sizes_trains(tmp_path, size):
    small = pack.pack(small_source(counts=(8, 4, 4)), tmp_path / "store", size=size)
    run(small, tmp_path / "run", "--max-steps", 1, batch=8)
    assert load(tmp_path / "run" / "best.pt")["image_size"] == 63


def test_every_option_trains(store, tmp_path):
    """One step with everything switched from its default."""
    run(
        store, tmp_path / "run", "--max-steps", 1, "--mean", "channel", "--no-mirror", "--colour", "paper",
        "--columns", 2, "--activation", "tanh", "--no-lrn", "--no-overlap", "--no-dropout", "--recipe", "paper",
        "--image-size", 67, "--precision", "bf16", "--seed", 3, "--momentum", 0,
    )
    content = load(tmp_path / "run" / "best.pt")
    assert content["mean"].shape == (1, 1, 3)
    assert content["config"]["columns"] == 2
