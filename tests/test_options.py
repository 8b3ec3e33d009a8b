"""options.py: every option, and what is refused in one line."""

import re
import subprocess
import types

import numpy as np
import pytest
import torch
from conftest import small_source
from helpers import ROOT, command, environment, load, resume, run

import options
import train
from data import pack
from data.augment import Augment
from utils import UserError


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
        (["--lrn-k", "0"], "--lrn-k: 0 is not a number above 0"),
        (["--lrn-alpha", "caffe"], "--lrn-alpha"),
        (["--lrn-across"], "--lrn-across: one column has no other"),
        (["--no-lrn", "--lrn-k", "1"], "--lrn-k 1.0: without LRN there is nothing"),
        (["--no-lrn", "--lrn-alpha", "2012"], "--lrn-alpha 2012: without LRN"),
        (["--no-lrn", "--columns", "2", "--lrn-across"], "--lrn-across: without LRN"),
        (["--crop-runs", "0"], "--crop-runs: 0 is not"),
        (["--order", "2012", "--image-size", "63"], "image_size must be 64 pixels or more, not 63"),
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
    """An empty folder: what belongs into it."""
    no_store = types.SimpleNamespace(path=tmp_path)
    done = subprocess.run(command(no_store, tmp_path / "run"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "CLASS/PICTURES" in line


def test_compile_without_a_compiler_is_one_line_and_leaves_nothing(store, tmp_path):
    arguments = command(store, tmp_path / "run", "--compile", "--max-steps", 1)
    without = environment(PATH=str(tmp_path), CXX="g++")
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, env=without)
    assert done.returncode == 2
    assert re.search(r"^error: --compile: torch.compile does not work here \(.*compiler.*\); install what it needs, or "
                     r"train with --no-compile$", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_compiled_run_goes_on_where_there_is_no_compiler(store, tmp_path, monkeypatch):
    out = tmp_path / "run"
    arguments = [str(a) for a in command(store, out, "--compile", "--max-steps", 1)[2:]]
    monkeypatch.setattr(train, "require_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda net: net)
    assert train.main(arguments) == 0

    def none_here(*_):
        raise RuntimeError("no compiler")

    monkeypatch.undo()
    monkeypatch.setattr(torch, "compile", none_here)
    with pytest.raises(UserError, match="or train with --no-compile"):
        train.main(["--resume", "--out", str(out), "--max-steps", "2"])
    assert train.main(["--resume", "--out", str(out), "--max-steps", "2", "--no-compile"]) == 0


@pytest.mark.parametrize("size", [63, 64])
def test_a_store_of_the_smallest_sizes_trains(tmp_path, size):
    small = pack.pack(small_source(counts=(8, 4, 4)), tmp_path / "store", size=size)
    run(small, tmp_path / "run", "--max-steps", 1, batch=8)
    assert load(tmp_path / "run" / "best.pt")["image_size"] == 63


def test_a_store_that_is_too_small_is_refused(tmp_path):
    small = pack.pack(small_source(counts=(8, 4, 4)), tmp_path / "store", size=40)
    with pytest.raises(UserError, match=r"^the smallest net takes 63: .* has 40 x 40 pictures; pack them again"):
        run(small, tmp_path / "run", batch=8)


def test_crops_much_smaller_than_the_pictures_are_warned_of(tmp_path, capsys):
    large = pack.pack(small_source(counts=(8, 4, 4)), tmp_path / "store", size=128)
    for size, warned in ((96, False), (64, True)):
        run(large, tmp_path / f"run-{size}", "--max-steps", 1, "--image-size", size, batch=8)
        message = "crops of 64 x 64 show 25% of a picture of 128 x 128; a store of --size 72 would show most of it"
        assert (f"warning: {message}\n" in capsys.readouterr().err) == warned
    resume(tmp_path / "run-64", "--max-steps", 2)
    assert "crops of" not in capsys.readouterr().err


def test_every_option_trains(store, tmp_path, monkeypatch):
    """One step with everything switched from its default, all of which arrive."""
    seen, tables = [], []
    monkeypatch.setattr(train, "Augment", lambda *a, **more: seen.append(more) or Augment(*a, **more))
    real = train.epoch_tables
    monkeypatch.setattr(train, "epoch_tables", lambda *a: tables.append(real(*a)) or tables[-1])
    run(
        store, tmp_path / "run", "--max-steps", 1, "--mean", "channel", "--no-mirror", "--colour", "paper",
        "--columns", 2, "--activation", "tanh", "--no-lrn", "--no-overlap", "--no-dropout", "--recipe", "paper",
        "--image-size", 67, "--precision", "bf16", "--seed", 3, "--momentum", 0,
    )
    content = load(tmp_path / "run" / "best.pt")
    assert content["mean"].shape == (1, 1, 3)
    wanted = {"columns": 2, "activation": "tanh", "lrn": False, "overlapping_pool": False, "dropout": 0}
    assert {name: content["config"][name] for name in wanted} == wanted
    assert seen[0]["colour"] == "paper"
    assert not tables[0].mirror.any()
    (group,) = load(tmp_path / "run" / "last.pt")["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0, 5e-4)
    assert content["model"]["conv3.weight"].std().item() == pytest.approx(0.01, rel=0.02)


def test_the_sources_options_reach_the_net_and_the_crops(store, tmp_path, monkeypatch):
    """--order, --lrn-alpha, --lrn-k, --lrn-across and --crop-runs, with LRN on."""
    seen = []
    real = train.epoch_tables
    monkeypatch.setattr(train, "epoch_tables", lambda *a: seen.append(real(*a)) or seen[-1])
    run(
        store, tmp_path / "run", "--max-steps", 1, "--columns", 2, "--order", "2012", "--lrn-alpha", "paper", "--lrn-k",
        1, "--lrn-across", "--crop-runs", 32,
    )
    config = load(tmp_path / "run" / "best.pt")["config"]
    wanted = {"columns": 2, "order": "2012", "lrn_alpha": "paper", "lrn_k": 1.0, "lrn_across": True}
    assert {name: config[name] for name in wanted} == wanted
    assert len(np.unique(seen[0].offsets[seen[0].order[:32]], axis=0)) == 1


def test_the_defaults_are_the_papers():
    """Section 5: batches of 128, momentum 0.9, decay 0.0005, learning rate 0.01, roughly 90 cycles."""
    args = options.make_parser().parse_args([])
    assert (args.momentum, args.weight_decay, args.lrn_k) == (0.9, 0.0005, 2.0)
    assert options.DEFAULTS == {"batch_size": 128, "epochs": 90, "patience": 5, "lr": 0.01}
    assert options.SAMPLE_DEFAULTS == {"batch_size": 32, "epochs": 12, "patience": 2}
    assert options.INIT_DEFAULTS == {"epochs": 30, "lr": 0.001}
    assert (options.FEW, options.FEW_BATCH) == (2560, 32)
    assert (args.columns, args.order, args.activation, args.recipe, args.crop_runs) == (1, "paper", "relu", "2012", 1)
    assert (args.mean, args.colour, args.lrn_alpha) == ("image", "2012", "2012")
    assert all((args.lrn, args.overlapping_pool, args.dropout, args.mirror))
    assert not args.lrn_across
    for stored, size in ((256, 224), (72, 64)):
        args = options.make_parser().parse_args(["--batch-size", "2"])
        a_store = types.SimpleNamespace(name="x", size=stored, path="x", counts={"train": 2, "val": 2})
        options.settle(args, a_store, torch.device("cpu"), 1)
        assert args.image_size == size
