"""studies/plateau.py and common.py."""

import json
import math
import re
import threading

import numpy as np
import pytest
import torch

import options
import train
from checkpoints.run import read_log
from studies import common, plateau
from utils import UserError


def test_plateau_trains_as_train_py_does(store, tmp_path, monkeypatch, capsys):
    """The mean of an epoch's losses is the one in the log of a run with the same seed; finished seeds are kept."""
    monkeypatch.setattr(plateau, "named_store", lambda name: store)
    monkeypatch.setattr(plateau, "WINDOW", 2)
    monkeypatch.setattr("options.DEFAULTS", options.DEFAULTS | {"batch_size": 32})
    seen = []
    real = plateau.first_losses
    monkeypatch.setattr(plateau, "first_losses", lambda *a: seen.append(real(*a)) or seen[-1])
    arguments = ["--steps", "3", "--out", str(tmp_path / "x.jsonl")]
    monkeypatch.setattr(plateau, "EVERY", 1)
    plateau.main(["--seeds", "1", "--dataset", "sample", *arguments])
    plateau.main(["--seeds", "2", "--data", str(store.path), *arguments])  # the same store
    assert len(seen) == 2
    train.main(["--data", str(store.path), "--out", str(tmp_path / "run"), "--epochs", "1", "--batch-size", "32"])
    (entry,) = read_log(tmp_path / "run" / "log.jsonl")
    assert entry["train_loss"] == pytest.approx(np.mean(seen[0][0]), rel=1e-5)
    lines = read_log(tmp_path / "x.jsonl")
    assert [line["seed"] for line in lines] == [0, 1]
    with open(tmp_path / "x.jsonl", "a") as file:
        file.write(json.dumps(lines[0]) + "\n")  # as a second process writes it that makes the same run
    assert [run["seed"] for run in plateau.read_runs(tmp_path / "x.jsonl", store.fingerprint)] == [0, 1]
    assert plateau.read_runs(tmp_path / "x.jsonl", "another store of the same name") == []
    earlier = [{name: value for name, value in line.items() if name != "fingerprint"} for line in lines]
    (tmp_path / "earlier.jsonl").write_text("".join(json.dumps(line) + "\n" for line in earlier))
    assert len(plateau.read_runs(tmp_path / "earlier.jsonl", store.fingerprint)) == 2  # they did not say which store
    assert lines[0]["losses"] == pytest.approx(seen[0][0], abs=1e-4)
    assert re.search(r"\| 0-255 \| paper \| 2012 \| 2x \| no \| [\d.]+ \| -, - \|", capsys.readouterr().out)
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_plateau_refuses_a_log_of_another_kind(store, tmp_path, monkeypatch):
    monkeypatch.setattr(plateau, "named_store", lambda name: store)
    (tmp_path / "x.jsonl").write_text('{"dataset": "sample", "steps": 200, "seed": 0}\n')
    with pytest.raises(UserError, match="holds lines of another kind"):
        plateau.main(["--dataset", "sample", "--out", str(tmp_path / "x.jsonl")])


def test_plateau_refuses_to_end_runs_before_they_can_have_left(store, tmp_path, monkeypatch):
    monkeypatch.setattr(plateau, "named_store", lambda name: store)
    with pytest.raises(UserError, match=r"--stop-below 2: .* left below 1\.248; give less"):
        plateau.main(["--dataset", "sample", "--stop-below", "2", "--out", str(tmp_path / "x.jsonl")])


def test_plateau_cells_are_what_they_say(store):
    """Dropout, initialisation, the biases' learning rate and decay of a cell end up in its net and its optimiser;
    pixel_std is the standard deviation of the pixels."""
    args = options.make_parser().parse_args(["--data", str(store.path), "--batch-size", "16"])
    options.settle(args, store, torch.device("cpu"), world=1)
    default = {name: values[0] for name, values in plateau.CHOICES.items()}
    stds = {"2012": (0.01, 0.01), "paper": (0.01, 0.01), "pytorch": ((3 * 363) ** -0.5, 0.01),
            "kaiming": ((2 / 363) ** 0.5, (2 / 4096) ** 0.5), "louder": (0.01 * plateau.pixel_std(store), 0.01)}
    for init, (conv1, fc7) in stds.items():
        net = plateau.build(args, store, default | {"init": init, "dropout": "inverted"})
        assert net.conv1.weight.std().item() == pytest.approx(conv1, rel=0.05)
        if init != "pytorch":
            assert net.fc7.weight.std().item() == pytest.approx(fc7, rel=0.01)
        assert net.conv3.weight.std().item() == pytest.approx(0.03, rel=0.01) or init != "2012"
        assert isinstance(net.drop6, torch.nn.Dropout)
        assert isinstance(net.drop7, torch.nn.Dropout)
    for dropout, share in (("none", 1.0), ("halved", 0.5)):
        net = plateau.build(args, store, default | {"dropout": dropout}).train()
        for layer in (net.drop6, net.drop7):
            assert layer(torch.tensor([3.0, -1.0])).tolist() == [3 * share, -share]
    weights, biases = plateau.optimizer_of(net, args, default | {"bias_rate": 1, "bias_decay": "yes"}).param_groups
    assert (weights["lr"], weights["weight_decay"]) == (biases["lr"], biases["weight_decay"]) == (0.01, 5e-4)
    biases = plateau.optimizer_of(net, args, default).param_groups[1]
    assert (biases["lr"], biases["weight_decay"]) == (0.02, 0.0)
    pixels, _ = store.split("train").read(np.arange(store.counts["train"]))
    pixels = pixels.astype(float)
    about_mean = pixels - pixels.mean((0, 1, 2))
    assert plateau.pixel_std(store) == pytest.approx(about_mean.std(), rel=1e-6)


def test_plateau_summary_says_when_the_loss_left():
    """The first step whose last 25 losses have a mean below 0.9 ln 10; a loss that is not finite is no loss."""
    falling = [2.5] * 40 + [1.0] * 60
    left = plateau.summary(falling, 10)["left"]
    assert np.mean(falling[left - 25 : left]) < 0.9 * math.log(10) <= np.mean(falling[left - 26 : left - 1])
    assert plateau.summary([2.3] * 100, 10)["left"] is None
    diverged = plateau.summary([2.3] * 9 + [math.inf], 10)
    assert (diverged["finite"], diverged["left"], diverged["losses"]) == (False, None, [2.3, None])


def test_results_are_not_written_where_the_figure_goes(tmp_path):
    """Which is drawn over --out with the ending .png."""
    with pytest.raises(UserError, match=r"x.png: --out names a file of lines of results"):
        common.results_file(str(tmp_path / "x.png"))


def test_one_process_holds_a_folder(tmp_path):
    entered = []

    def wait():
        with common.alone(tmp_path / "new"):
            entered.append(True)

    other = threading.Thread(target=wait)
    with common.alone(tmp_path / "new"):
        other.start()
        other.join(0.2)
        assert not entered
    other.join(10)
    assert entered


def test_verdict_is_a_paired_interval():
    # Student's t with 2 degrees of freedom is 4.30; times 0.153 / 3 ** 0.5.
    assert common.verdict([1.0, 1.2, 0.9]) == "+1.03 ± 0.38: helps"
    assert common.verdict([-1.0, -1.2, -0.9]).endswith("harms")
    assert "within" in common.verdict([1.0, -0.2, 0.4])
    assert "within" in common.verdict([0.5, 1.5, 2.5])
    assert common.verdict([5.0, 5.0]) == "too few seeds"
