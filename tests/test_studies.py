"""studies/: each runs, small."""

import math
import re

import numpy as np
import pytest
import torch

import checkpoints
import options
import train
from checkpoints.run import read_log
from studies import ablations, common, plateau
from utils import Diverged, UserError


def test_plateau_trains_as_train_py_does(store, tmp_path, monkeypatch, capsys):
    """The mean of an epoch's losses is the one in the log of a run with the same seed; finished seeds are kept."""
    monkeypatch.setattr(plateau, "named_store", lambda name: store)
    monkeypatch.setattr(plateau, "WINDOW", 2)
    monkeypatch.setattr("options.DEFAULTS", {"epochs": 90, "batch_size": 32, "patience": 5})
    seen = []
    real = plateau.first_losses
    monkeypatch.setattr(plateau, "first_losses", lambda *a: seen.append(real(*a)) or seen[-1])
    arguments = ["--steps", "3", "--out", str(tmp_path / "x.jsonl"), "--dataset", "sample"]
    monkeypatch.setattr(plateau, "EVERY", 1)
    plateau.main(["--seeds", "1", *arguments])
    plateau.main(["--seeds", "2", *arguments])
    assert len(seen) == 2
    train.main(["--data", str(store.path), "--out", str(tmp_path / "run"), "--epochs", "1", "--batch-size", "32"])
    (entry,) = read_log(tmp_path / "run" / "log.jsonl")
    assert entry["train_loss"] == pytest.approx(np.mean(seen[0][0]), rel=1e-5)
    lines = read_log(tmp_path / "x.jsonl")
    assert [line["seed"] for line in lines] == [0, 1]
    assert lines[0]["losses"] == pytest.approx(seen[0][0], abs=1e-4)
    assert re.search(r"\| 0-255 \| paper \| 2012 \| 2x \| no \| [\d.]+ \| -, - \|", capsys.readouterr().out)
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_plateau_refuses_a_log_of_another_kind(store, tmp_path, monkeypatch):
    monkeypatch.setattr(plateau, "named_store", lambda name: store)
    (tmp_path / "x.jsonl").write_text('{"dataset": "sample", "steps": 200, "seed": 0}\n')
    with pytest.raises(UserError, match="holds lines of another kind"):
        plateau.main(["--dataset", "sample", "--out", str(tmp_path / "x.jsonl")])


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


def test_ablations_stop_resume_and_reckon(store, tmp_path, monkeypatch, capsys):
    """A cell that was stopped goes on; finished ones are not run again; gains are without minus with, seed by seed."""
    monkeypatch.setattr("train.open_store", lambda *a: (store, ""))
    monkeypatch.setattr(ablations, "named_store", lambda name: store)
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path)
    monkeypatch.setattr("options.SAMPLE_DEFAULTS", {"epochs": 1, "batch_size": 32, "patience": 5})
    monkeypatch.setattr(store, "name", "sample")
    out = tmp_path / "results" / "x.jsonl"
    real, stopped = train.main, []

    def stop_once(argv):
        if not stopped:
            stopped.append(real([*argv, "--max-steps", "2"]))
            return 143
        assert stopped != [0] or "--resume" in argv
        stopped.append(0)
        return real(argv if "--resume" not in argv else [*argv, "--max-steps", "3"])

    monkeypatch.setattr(train, "main", stop_once)
    arguments = ["crops", "models", "lrn", "--seeds", "2", "--dataset", "sample", "--out", str(out)]
    assert ablations.main(arguments) == 143
    assert not out.exists()
    assert ablations.main(arguments) == 0
    runs = len(stopped)
    assert ablations.main(arguments) == 0
    assert len(stopped) == runs == 5
    lines = read_log(out)
    assert [(e["cell"], e.get("seed")) for e in lines] == [
        ("base", 0), ("no-lrn", 0), ("base", 1), ("no-lrn", 1), ("ensemble", None)
    ]
    without, with_idea = [lines[1]["center"]["top1_error"], lines[3]["center"]["top1_error"]], [
        lines[0]["center"]["top1_error"], lines[2]["center"]["top1_error"]]
    gains = ", ".join(f"{a - b:+.2f}" for a, b in zip(without, with_idea, strict=True))
    printed = capsys.readouterr().out
    row = ["lrn", ablations.CLAIMS["lrn"][2], common.spread(without), common.spread(with_idea), gains]
    assert f"| {' | '.join(row)} | too few seeds |" in printed
    assert "| dropout | no figure: 'substantial overfitting' without (section 4.2) | not measured yet |" in printed
    assert not list(tmp_path.rglob("last.pt"))
    with pytest.raises(UserError, match="holds runs tested on sample, not on fashion-mnist"):
        ablations.main([*arguments, "--test-dataset", "fashion-mnist"])


def test_ablations_note_a_run_that_diverged(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "named_store", lambda name: store)
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path)

    def diverge(argv):
        raise Diverged("the loss is no longer finite at step 7")

    monkeypatch.setattr(train, "main", diverge)
    assert ablations.main(["lrn", "--seeds", "1", "--dataset", "sample", "--out", str(tmp_path / "x.jsonl")]) == 0
    assert ablations.main(["lrn", "--seeds", "1", "--dataset", "sample", "--out", str(tmp_path / "x.jsonl")]) == 0
    assert [e["cell"] for e in read_log(tmp_path / "x.jsonl")] == ["no-lrn", "base"]
    assert "diverged: no-lrn with seed 0, base with seed 0" in capsys.readouterr().out


def test_ablations_verdict_is_a_paired_interval():
    # Student's t with 2 degrees of freedom is 4.30; times 0.153 / 3 ** 0.5.
    assert common.verdict([1.0, 1.2, 0.9]) == "+1.03 ± 0.38: helps"
    assert common.verdict([-1.0, -1.2, -0.9]).endswith("harms")
    assert "within" in common.verdict([1.0, -0.2, 0.4])
    assert "within" in common.verdict([0.5, 1.5, 2.5])
    assert common.verdict([5.0, 5.0]) == "too few seeds"


def test_ablations_race_of_relu_and_tanh(store, tmp_path, monkeypatch, capsys):
    """Training error by steps at each learning rate, the fastest one chosen, drawn."""
    monkeypatch.setattr(ablations, "named_store", lambda name: store)
    for name, value in (("LONGEST", 4), ("EVERY", 2), ("LRS", (0.01, 0.001)), ("TARGET", 0)):
        monkeypatch.setattr(ablations, name, value)
    real = options.make_parser
    monkeypatch.setattr(options, "make_parser", lambda: Small(real()))
    nets, decays = [], []
    build, make = ablations.starting_net, ablations.make_optimizer
    monkeypatch.setattr(ablations, "starting_net", lambda *a: nets.append((a[0], build(*a))) or nets[-1][1])
    monkeypatch.setattr(ablations, "make_optimizer", lambda *a, **k: decays.append(k["weight_decay"]) or make(*a, **k))
    out = tmp_path / "x.jsonl"
    ablations.main(["tanh", "--seeds", "1", "--dataset", "sample", "--out", str(out)])
    lines = read_log(out)
    assert [(e["activation"], e["lr"]) for e in lines] == [
        ("relu", 0.01), ("relu", 0.001), ("tanh", 0.01), ("tanh", 0.001)
    ]
    assert all(len(e["errors"]) == 2 and e["reached"] is None for e in lines)
    assert [net.config["activation"] for _, net in nets] == ["relu"] * 2 + ["tanh"] * 2
    assert all((net.config["dropout"], a.mirror, a.colour) == (0, False, "off") for a, net in nets)
    assert decays == [0.0] * 4
    printed = capsys.readouterr().out
    assert "random crops: relu at learning rate 0.01, the fastest of 0.001, 0.01: over 4 steps; tanh at" in printed
    assert "times as fast" not in printed
    monkeypatch.setattr(ablations, "TARGET", 101)  # reached at the first look; other rates get no more steps
    ablations.main(["tanh", "--seeds", "2", "--dataset", "sample", "--out", str(tmp_path / "y.jsonl")])
    lines = read_log(tmp_path / "y.jsonl")
    assert [(e["seed"], e["reached"], e["limit"]) for e in lines[:2]] == [(0, 2, 4), (0, 2, 2)]
    assert [(e["activation"], e["lr"]) for e in lines[4:]] == [("relu", 0.01), ("tanh", 0.01)]  # seed 1: the fastest
    printed = capsys.readouterr().out
    assert "the fastest of 0.001, 0.01: 2, 2 steps; tanh at learning rate 0.01" in printed
    assert "2, 2 steps: ReLU is 1.0 times as fast" in printed
    assert out.with_suffix(".png").stat().st_size > 5_000


class Small:
    """train.py's parser with batches that fit the small store."""

    def __init__(self, parser):
        self.parser = parser

    def parse_args(self, argv):
        return self.parser.parse_args([*argv, "--batch-size", "16"])
