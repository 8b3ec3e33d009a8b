"""studies/figure1.py: the crossing, the rates that are tried, runs that stop and go on, and the guides."""

import json
import re
import signal

import numpy as np
import pytest
import torch
from helpers import ROOT

import checkpoints
from checkpoints.run import locked, read_log
from model import LocalResponseNorm
from studies import figure1, fourlayer
from studies.common import pixel_std
from studies.fourlayer import Pictures, build
from utils import Diverged, UserError


@pytest.fixture
def study(small_pictures, tmp_path, monkeypatch):
    """The study on the small store, with batches of 16."""
    monkeypatch.setattr(figure1, "small_store", lambda name: small_pictures)
    monkeypatch.setattr(fourlayer, "BATCH", 16)
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path)
    return tmp_path


def test_crossing_is_interpolated():
    assert figure1.crossing([(0, 90), (0.5, 50), (1.5, 30), (2.5, 20)]) == pytest.approx(2)
    assert figure1.crossing([(0, 90), (1, 20)]) == pytest.approx(65 / 70)
    assert figure1.crossing([(0, 90), (1, 50), (2, 25)]) is None
    assert figure1.crossing([(0, 90)]) is None


@pytest.mark.parametrize("epochs", [2.0, 5.0])
def test_the_ratio_is_that_of_the_curves(epochs):
    """Errors that fall exponentially, six times as slowly with tanh, each the mean over its batches: the ratio is six,
    and less by the means over whole epochs."""

    def errors(rate):
        times = np.arange(395 * 40) / 395
        return (90 * np.exp(-times * rate)).reshape(-1, 79).mean(1).tolist()

    rate = np.log(90 / 25) / epochs
    ratios = [figure1.crossing(points(errors(rate / 6))) / figure1.crossing(points(errors(rate)))
              for points in (figure1.curve, figure1.by_epoch)]
    assert ratios[0] == pytest.approx(6, abs=0.02)
    assert 4.5 < ratios[1] < 5.6


def test_figure_1_tries_rates_until_the_fastest_is_inside(study, monkeypatch, capsys):
    """Rates slower than the fastest are given up when that would have been done; other seeds take the fastest."""
    speeds = {0.001: 40, 0.002: 20, 0.0005: 80, 0.004: 10, 0.00025: 160, 0.008: 4, 0.016: 8, 0.032: 0}

    def pretend(net, optimizer, pictures, parts, seed, epoch, watch, precision):
        lr = optimizer.param_groups[0]["lr"]
        if not speeds[lr]:
            raise Diverged("the loss is no longer finite in epoch 1")
        epochs = speeds[lr] * (6 if any(isinstance(layer, torch.nn.Tanh) for layer in net) else 1)
        errors = [90 - 65.5 * (epoch + (i + 0.5) / 5) / epochs for i in range(5)]
        return {"train_top1_error": errors[2], "part_errors": errors, "images_per_second": 1.0, "seconds": 1.0}

    monkeypatch.setattr(figure1, "train_epoch", pretend)
    out = study / "x.jsonl"
    assert figure1.main(["--seeds", "2", "--out", str(out)]) == 0
    found = [(e["activation"], e["lr"], e["seed"], len(e["part_errors"]) // 5) for e in read_log(out)]
    assert found[:9] == [
        ("relu", 0.001, 0, 41), ("relu", 0.002, 0, 21), ("relu", 0.0005, 0, 20), ("relu", 0.004, 0, 11),
        ("relu", 0.00025, 0, 10), ("relu", 0.008, 0, 5), ("relu", 0.016, 0, 4), ("relu", 0.008, 1, 5),
        ("tanh", 0.001, 0, 60),
    ]
    printed = capsys.readouterr().out
    assert "| 0.00025 | 0.0005 | 0.001 | 0.002 | 0.004 | 0.008 | 0.016 |\n|---|---|---|" in printed
    assert "\n| relu | not by 10 | not by 20 | 39.69 | 19.85 | 9.92 | **3.97, 3.97** | not by 4 |\n" in printed
    assert "\nReLU is 6.00 times as fast over 2 seeds with which both got there (paper: six times)" in printed
    assert "\nby whole epochs, each counting for its end: ReLU is 5.44 times as fast over 2 seeds" in printed
    drawing = out.with_name("x-60-fp32.png")
    drawn = drawing.read_bytes()
    assert len(drawn) > 5_000
    assert figure1.main(["--seeds", "2", "--out", str(out)]) == 0
    assert len(read_log(out)) == len(found)
    assert figure1.main(["--activations", "relu", "--seeds", "1", "--epochs", "20", "--out", str(out)]) == 0
    assert drawing.read_bytes() == drawn  # another race has another drawing
    assert out.with_name("x-20-fp32.png").exists()


def test_figure_1_stops_at_a_signal_and_goes_on_where_its_last_epoch_began(study, monkeypatch, capsys):
    """Errors of a run that was stopped are those of one that was not; nothing is cropped, mirrored or decayed."""
    monkeypatch.setattr(figure1, "TARGET", 80.0)  # reached by one of them at least, so that others are tried, too
    arguments = ["--activations", "relu", "--seeds", "1", "--epochs", "3", "--lrs", "0.001", "0.002", "--out",
                 str(study / "x.jsonl")]
    assert figure1.main(arguments) == 0
    lines = read_log(study / "x.jsonl")
    assert any(line["reached"] for line in lines)
    printed = capsys.readouterr().out
    assert "| epochs to 80% at a learning rate of | 0.0" in printed
    assert "| tanh | not measured yet |" in printed
    real, calls = figure1.train_epoch, []

    def stop(*args):
        calls.append(args)
        if len(calls) % 2 == 0:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(figure1, "train_epoch", stop)
    arguments[-1] = str(study / "y.jsonl")
    for _ in range(20):
        status = figure1.main(arguments)
        if status == 0:
            break
        assert status == 130
    others = read_log(study / "y.jsonl")
    assert [e["part_errors"] for e in others] == [e["part_errors"] for e in lines]
    net, optimizer, pictures = calls[0][:3]
    assert not any(isinstance(layer, LocalResponseNorm) for layer in net)
    assert not any(group["weight_decay"] for group in optimizer.param_groups)
    assert pictures.side == 32
    assert not list((study / "figure1").rglob("last.pt"))


def test_figure_1_with_another_initialisation_and_divided_pixels_is_a_race_of_its_own(study, small_pictures, capsys):
    """Lines and drawings apart, also from lines that say neither; layers start as torch's own; inputs have a standard
    deviation of 1."""
    arguments = ["--activations", "tanh", "--seeds", "1", "--epochs", "1", "--lrs", "0.001", "--out",
                 str(study / "x.jsonl")]
    assert figure1.main(arguments) == 0
    first = read_log(study / "x.jsonl")
    earlier = [{k: v for k, v in line.items() if k not in ("init", "pixels")} for line in first]
    (study / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in earlier))
    assert figure1.main(arguments) == 0
    assert read_log(study / "x.jsonl") == earlier
    assert figure1.main([*arguments, "--init", "pytorch", "--pixels", "divided"]) == 0
    others = read_log(study / "x.jsonl")[len(earlier):]
    assert [(e["init"], e["pixels"]) for e in others] == [("pytorch", "divided")]
    assert (study / "x-1-fp32-pytorch-divided.png").exists()
    assert "not by 1" in capsys.readouterr().out
    net = build(lrn=False, filters=32, init="pytorch")
    for layer, inputs in ((net.conv1, 75), (net.conv2, 1600), (net.local3, 576), (net.local4, 288), (net.fc10, 1152)):
        assert layer.weight.abs().max().item() == pytest.approx(inputs**-0.5, rel=0.01)
        assert layer.weight.std().item() == pytest.approx((3 * inputs) ** -0.5, rel=0.03)
        assert layer.bias.abs().max() > 0
    pictures = Pictures(small_pictures, 32, torch.device("cpu"), 1 / pixel_std(small_pictures))
    inputs = torch.cat([crops for crops, _ in pictures.batches(pictures.plan(5), 0, 0)])
    assert inputs.std().item() == pytest.approx(1, abs=0.1)


def test_the_guides_have_figure_1s_tables_and_ratios():
    """results/README.md has the tables as they are; it and REPRODUCTION.md have the ratios."""
    out, shown = ROOT / "results" / "figure1.jsonl", (ROOT / "results" / "README.md").read_text()
    for more in ([], ["--init", "pytorch"], ["--init", "pytorch", "--pixels", "divided"]):
        args = figure1.make_parser().parse_args(["--precision", "bf16", *more])
        args.out = out
        table, ratios = figure1.report(args).split("\n\n")
        assert table in shown
        ratio = re.match(r"ReLU is ([\d.]+(?: ± [\d.]+)?) ", ratios)[1]
        assert re.search(rf"\*\*{re.escape(ratio)}\s+times\s+as\s+fast\*\*", shown)
        assert re.search(rf"{re.escape(ratio)} (times|from torch.nn)", (ROOT / "REPRODUCTION.md").read_text())


def test_seeds_that_never_got_there_are_shown(study):
    lines = [
        {"activation": act, "lr": 0.001, "seed": seed, "epochs": 9, "precision": "fp32", "reached": reached,
         "part_errors": [90 - 65 * (i + 0.5) / 5 / (reached or 20) for i in range(46)]}
        for act, found in (("relu", (2.0, 2.0, 2.5)), ("tanh", (8.0, None, 9.0))) for seed, reached in enumerate(found)
    ]
    (study / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = figure1.make_parser().parse_args(["--epochs", "9", "--out", str(study / "x.jsonl")])
    args.out = study / "x.jsonl"
    printed = figure1.report(args)
    assert "| tanh | **8.00, not by 9, 9.00** |" in printed
    assert "ReLU is 3.80 times as fast over 2 seeds with which both got there" in printed


def test_lines_of_another_kind_are_refused(study):
    (study / "x.jsonl").write_text('{"net": "13pct"}\n')
    with pytest.raises(UserError, match="holds lines of another kind"):
        figure1.main(["--out", str(study / "x.jsonl")])


def test_one_process_a_cell(study):
    folder = study / "figure1" / "relu-0.001-0-3-fp32"
    folder.mkdir(parents=True)
    with locked(folder), pytest.raises(UserError, match=r"another process is training .*-0-3-fp32; wait for it$"):
        figure1.main(["--epochs", "3", "--out", str(study / "x.jsonl")])
