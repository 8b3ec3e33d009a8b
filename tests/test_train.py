"""train.py: the loop, stopping and resuming to the bit, several processes, and what it refuses."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_source

import train
import utils
from data import UserError, pack, sources
from data.augment import Augment, epoch_tables
from data.store import Store
from model import AlexNet
from run import claim_folder, locked

ROOT = Path(train.__file__).parent


def run(store, out, *more, batch=16):
    arguments = ["--data", str(store.path), "--out", str(out), "--batch-size", str(batch), "--workers", "0"]
    return train.main([*arguments, *map(str, more)])


def resume(out, *more):
    return train.main(["--resume", "--out", str(out), *map(str, more)])


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_state(one: Path, two: Path):
    """Weights, momentum buffers, schedule and step of two last.pt, bit for bit."""
    a, b = load(one / "last.pt"), load(two / "last.pt")
    assert (a["step"], a["epoch"], a["best"], a["schedule"]) == (b["step"], b["epoch"], b["best"], b["schedule"])
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    buffers = zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True)
    assert all(torch.equal(x["momentum_buffer"], y["momentum_buffer"]) for x, y in buffers)


def numbers(out):
    """The log without its timings."""
    timings = ("images_per_second", "seconds")
    return [{k: v for k, v in e.items() if k not in timings} for e in utils.read_log(out / "log.jsonl")]


@pytest.fixture(scope="module")
def ten_steps(store, tmp_path_factory):
    """10 steps in one go: an epoch of 6 and 4 more."""
    out = tmp_path_factory.mktemp("ten") / "run"
    run(store, out, "--max-steps", 10)
    return out


@pytest.mark.parametrize("stop", [5, 6, 8])
def test_stop_and_resume_equals_an_unbroken_run(store, ten_steps, tmp_path, stop):
    """In mid-epoch, at an epoch's end, and after it."""
    out = tmp_path / "run"
    run(store, out, "--max-steps", stop)
    assert load(out / "last.pt")["step"] == stop
    resume(out, "--max-steps", 10)
    assert_same_state(out, ten_steps)
    assert numbers(out) == numbers(ten_steps)


def test_the_loop_is_the_one_written_out_here(store, ten_steps):
    """Six steps of the recipe in plain torch: same data order, crops, masks, update; the logged loss and weights."""
    utils.seed_all(0)
    net = AlexNet(4, image_size=64)
    utils.seed_all(0)
    net.init_weights()
    net.to(memory_format=torch.channels_last)
    inputs = Augment(64, store.mean, colour="2012", pca=store.manifest["pca"])
    images, labels = (torch.from_numpy(x) for x in store.split("train").read(np.arange(96)))
    velocity = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    tables, losses, wrong = epoch_tables(0, 0, 96, 8), [], 0
    for step in range(6):
        samples = tables.order[16 * step : 16 * step + 16]
        utils.seed_all(0, step + 1, 0)
        logits = net(inputs.train(images[samples], tables, samples))
        loss = F.cross_entropy(logits, labels[samples])
        net.zero_grad()
        loss.backward()
        losses.append(loss.item())
        wrong += (logits.argmax(1) != labels[samples]).sum().item()
        with torch.no_grad():
            for name, p in net.named_parameters():
                rate, decay = (0.01, 0.0005) if name.endswith("weight") else (0.02, 0.0)
                velocity[name] = 0.9 * velocity[name] - decay * rate * p - rate * p.grad
                p += velocity[name]
    entry = utils.read_log(ten_steps / "log.jsonl")[0]
    assert entry["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert entry["train_top1_error"] == pytest.approx(100 * wrong / 96)
    best = load(ten_steps / "best.pt")["model"]
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), best[name], rtol=1e-4, atol=1e-6)


def test_what_a_run_leaves_behind(store, run_folder):
    files = ["best.pt", "config.json", "curves.png", "last.pt", "log.jsonl"]
    assert sorted(p.name for p in run_folder.iterdir()) == files
    (entry,) = utils.read_log(run_folder / "log.jsonl")
    assert set(entry) == {
        "epoch", "step", "lr", "train_loss", "train_top1_error", "val_loss", "val_top1_error", "val_top5_error",
        "images_per_second", "seconds",
    }
    assert (entry["epoch"], entry["step"], entry["lr"]) == (1, 6, 0.01)
    best, last = load(run_folder / "best.pt"), load(run_folder / "last.pt")
    assert set(last) - set(best) == {"optimizer", "schedule"}
    assert set(utils.CHECKPOINT_KEYS) <= set(best)
    assert best["config"] == AlexNet(4, image_size=64).config
    assert best["classes"] == store.classes
    assert (best["store_size"], best["image_size"], best["epoch"], best["step"]) == (72, 64, 1, 6)
    assert best["best"] == entry["val_top1_error"]
    assert np.array_equal(best["mean"].numpy(), store.mean)
    config = json.loads((run_folder / "config.json").read_text())
    assert config["fingerprint"] == store.fingerprint
    assert config["arguments"]["batch_size"] == 16
    assert config["torch"] == torch.__version__
    assert (run_folder / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_max_steps_touches_neither_schedule_nor_best(store, tmp_path):
    """A stop in mid-epoch validates, logs a line and writes best.pt, because there is none; a later one that is
    better leaves best.pt alone."""
    out = tmp_path / "run"
    run(store, out, "--max-steps", 3)
    last = load(out / "last.pt")
    assert (last["epoch"], last["best"]) == (0, math.inf)
    assert (last["schedule"]["best"], last["schedule"]["waited"]) == (math.inf, 0)
    assert load(out / "best.pt")["step"] == 3
    assert [e["step"] for e in utils.read_log(out / "log.jsonl")] == [3]
    resume(out, "--max-steps", 7)
    assert [e["step"] for e in utils.read_log(out / "log.jsonl")] == [6, 7]
    assert load(out / "best.pt")["step"] == 6
    assert load(out / "last.pt")["step"] == 7


def test_a_finished_run_says_so_and_exits_with_0(run_folder, capsys):
    before = {p.name: p.read_bytes() for p in run_folder.iterdir()}
    assert resume(run_folder) == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in run_folder.iterdir()} == before


def test_resume_takes_more_epochs_and_refuses_other_changes(store, run_folder, tmp_path):
    out = shutil.copytree(run_folder, tmp_path / "run")
    for option, value in (("--lr", "0.1"), ("--batch-size", "8"), ("--seed", "1"), ("--recipe", "paper")):
        with pytest.raises(UserError, match=f"started with {option[2:].replace('-', '_')}"):
            resume(out, option, value)
    with pytest.raises(UserError, match="started with mirror True, not False"):
        resume(out, "--no-mirror")
    # The run's own values may be given again; a new --epochs is kept for the next --resume.
    resume(out, "--lr", "0.01", "--precision", "auto", "--epochs", "2", "--max-steps", "8")
    assert [e["step"] for e in utils.read_log(out / "log.jsonl")] == [6, 8]
    resume(out)
    assert [e["epoch"] for e in utils.read_log(out / "log.jsonl")] == [1, 2]


def test_learning_rate_drops_reach_the_optimiser(store, tmp_path, monkeypatch):
    """Validation that never improves: patience 1 gives four rates, then the run ends by itself."""
    monkeypatch.setattr(utils, "evaluate", lambda *_, **__: torch.tensor([1.0, 10.0, 0.0], dtype=torch.float64))
    run(store, tmp_path / "run", "--patience", 1, batch=96)
    rates = [e["lr"] for e in utils.read_log(tmp_path / "run" / "log.jsonl")]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.0001, 0.00001])
    groups = load(tmp_path / "run" / "last.pt")["optimizer"]["param_groups"]
    assert [g["lr"] for g in groups] == pytest.approx([0.00001, 0.00002])


# ---------------------------------------------------------------------------------------------- processes, signals


def command(store, out, *more):
    arguments = ["train.py", "--data", store.path, "--out", out, "--workers", "0", *more]
    return [sys.executable, *map(str, arguments)]


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


@pytest.fixture(scope="module")
def two_epochs(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)  # as the runs below: equal to the bit only with the same number of threads
    run(store, out, "--epochs", 2)
    torch.set_num_threads(2)
    return out


def streaming(store, out, *more):
    """train.py with two workers that read, on a split that would be resident otherwise."""
    arguments = command(store, out, "--batch-size", "16", "--epochs", "50", "--workers", "2", *more)[2:]
    code = "import sys, data.loader, train; from data.cli import run_script; data.loader.RESIDENT_BYTES = 0; "
    code += f"sys.argv[1:] = {arguments!r}; run_script(train.main)"
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(), start_new_session=True,
    )


def test_a_damaged_record_ends_a_streaming_run(jpeg_store, tmp_path):
    """One line, status 2, and no worker that keeps the process from ending."""
    copy = shutil.copytree(jpeg_store.path, tmp_path / "copy")
    file = copy / "train-00000" / "data.mdb"
    content = bytearray(file.read_bytes())
    content[bytes(content).index(b"ALX1") + 200] ^= 0xFF
    file.write_bytes(content)
    process = streaming(Store(copy), tmp_path / "run")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    (line,) = err.splitlines()
    assert "the record's checksum does not match" in line


def test_sigterm_to_the_whole_group_while_streaming(store, tmp_path):
    """What timeout and job schedulers do: every process of the group gets the signal."""
    process = streaming(store, tmp_path / "run")
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (143, "")
    assert load(tmp_path / "run" / "last.pt")["step"] > 6


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_write_a_checkpoint(store, two_epochs, tmp_path, number, status):
    """Stopped by a signal somewhere, resumed: the weights of a run that was left alone."""
    process = subprocess.Popen(
        command(store, tmp_path / "run", "--batch-size", "16", "--epochs", "2"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert "--resume goes on from there" in out
    assert 6 < load(tmp_path / "run" / "last.pt")["step"] < 12
    torch.set_num_threads(1)
    resume(tmp_path / "run")
    torch.set_num_threads(2)
    assert_same_state(tmp_path / "run", two_epochs)
    assert numbers(tmp_path / "run") == numbers(two_epochs)


def test_a_killed_run_resumes_from_its_last_checkpoint(store, tmp_path):
    """SIGKILL once the second epoch is under way: at worst that epoch is lost."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(store, out, "--batch-size", "16", "--epochs", "50"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(),
    )
    for line in process.stdout:
        if line.startswith("epoch  2"):
            break
    process.kill()
    process.wait()
    process.stdout.close()
    step = load(out / "last.pt")["step"]
    assert step >= 6
    resume(out, "--max-steps", step + 2)
    assert load(out / "last.pt")["step"] == step + 2
    assert [e["step"] for e in utils.read_log(out / "log.jsonl")] == [*range(6, step + 1, 6), step + 2]


def test_two_processes_give_the_losses_of_one(store, tmp_path):
    """10 epochs of one step each, so that each line of the log is a step's loss; 21 validation images over two
    processes are counted once each."""
    options = ["--batch-size", "96", "--no-dropout", "--max-steps", "10", "--lr", "0.001"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*torchrun, *command(store, tmp_path / "two", *options)[1:]],
        cwd=ROOT, check=True, capture_output=True, env=environment(), timeout=120,
    )
    run(store, tmp_path / "one", "--no-dropout", "--max-steps", 10, "--lr", 0.001, batch=96)
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert len(one) == len(two) == 10
    for a, b in zip(one, two, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=1e-4)
        assert b["val_loss"] == pytest.approx(a["val_loss"], abs=1e-4)
        wrong = b["val_top1_error"] * 21 / 100
        assert wrong == pytest.approx(round(wrong), abs=1e-6)
        assert b["val_top1_error"] == pytest.approx(a["val_top1_error"], abs=100 / 21 + 1e-6)


# ---------------------------------------------------------------------------------------------- falling back, refusing


def test_with_no_data_it_falls_back_to_the_sample_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pack, "STORES", tmp_path / "stores")
    monkeypatch.setattr(sources, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setattr(sources, "_unreachable", lambda url: "no route to the server")
    monkeypatch.setattr(utils, "CHECKPOINTS", tmp_path / "checkpoints")
    assert train.main(["--max-steps", "1"]) == 0
    out, err = capsys.readouterr()
    warnings = [line for line in err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 2  # at the start and at the end
    assert all("bundled sample" in w and "no route to the server" in w for w in warnings)
    assert "the sample has defaults of its own" in out
    assert (tmp_path / "checkpoints" / "sample-1" / "last.pt").exists()
    with pytest.raises(UserError, match="cifar10 is not in"):
        train.main(["--dataset", "cifar10"])
    assert [p.name for p in (tmp_path / "stores").iterdir()] == ["sample"]
    # A run of the sample stays one, even where CIFAR-10 could be had by now.
    monkeypatch.setattr(train, "named_store", lambda name, _: Store(tmp_path / "stores" / name))
    assert train.main(["--resume", "--max-steps", "2"]) == 0  # the newest run
    assert load(tmp_path / "checkpoints" / "sample-1" / "last.pt")["step"] == 2


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


def test_an_out_that_holds_a_run_needs_resume(store, run_folder):
    with pytest.raises(UserError, match="holds a run; --resume"):
        run(store, run_folder)


@pytest.mark.parametrize("kept", ["config.json", "log.jsonl", "best.pt", "last.pt"])
def test_any_file_of_a_run_makes_a_folder_one(store, tmp_path, kept):
    (tmp_path / kept).write_bytes(b"")
    with pytest.raises(UserError, match="holds a run"):
        run(store, tmp_path)


def test_runs_that_start_together_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "CHECKPOINTS", tmp_path / "checkpoints")
    assert [claim_folder("x").name for _ in range(3)] == ["x-1", "x-2", "x-3"]


def test_a_run_that_is_going_on_is_left_alone(run_folder, tmp_path):
    out = shutil.copytree(run_folder, tmp_path / "run")
    with locked(out), pytest.raises(UserError, match="another process is training"):
        resume(out, "--epochs", 3)
    resume(out, "--epochs", 3, "--max-steps", 7)


def test_a_full_disk_at_the_start_leaves_nothing(store, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left"):
        run(store, tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [63, 64])
def test_a_store_of_the_smallest_sizes_trains(tmp_path, size):
    small = pack.pack(small_source(counts=(8, 4, 4)), tmp_path / "store", size=size)
    run(small, tmp_path / "run", "--max-steps", 1, batch=8)
    assert load(tmp_path / "run" / "best.pt")["image_size"] == 63


def test_a_changed_store_is_refused(run_folder, tmp_path):
    out = shutil.copytree(run_folder, tmp_path / "run")
    other = pack.pack(small_source(counts=(80, 20, 20)), tmp_path / "other")
    config = json.loads((out / "config.json").read_text())
    config["arguments"]["data"] = str(other.path)
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has changed since"):
        resume(out)


def test_a_diverging_run_stops_with_step_and_rate(store, tmp_path):
    """lr 1000: the loss leaves the numbers; the checkpoint from before stays."""
    with pytest.raises(UserError, match=r"no longer finite at step \d+, learning rate 1000"):
        run(store, tmp_path / "run", "--lr", 1000, "--max-steps", 40)
    assert load(tmp_path / "run" / "last.pt")["step"] == 0


def test_a_plateau_is_warned_of_once(store, capsys):
    """A mean loss within 1% of ln(classes) after 500 steps, and only then."""
    stuck = types.SimpleNamespace(batch_size=16)
    a_run = train.Run(stuck, store, torch.device("cpu"), 0, 1, None, None, train.State(), None)
    for step, loss, warnings in ((480, 1.0, 0), (500, 0.98, 0), (520, 1.0, 1), (540, 1.005, 0)):
        a_run.state.step = step
        note = train.look(a_run, 20, torch.tensor([loss * math.log(4) * 320, 80.0]))
        assert capsys.readouterr().err.count("still that of guessing") == warnings
        assert note == f"loss {loss * math.log(4):.3f}, error 25.0%"


def test_init_takes_weights_and_starts_fc8_afresh(store, run_folder, tmp_path, capsys):
    run(store, tmp_path / "same", "--init", run_folder / "best.pt", "--max-steps", 1, "--lr", 1e-12)
    start, before = load(tmp_path / "same" / "last.pt")["model"], load(run_folder / "best.pt")["model"]
    assert all(torch.allclose(start[name], before[name], atol=1e-6) for name in before)
    three = pack.pack(small_source(classes=3), tmp_path / "three")
    run(three, tmp_path / "other", "--init", run_folder / "best.pt", "--max-steps", 1, "--lr", 1e-12)
    start = load(tmp_path / "other" / "last.pt")["model"]
    assert start["fc8.weight"].shape == (3, 4096)
    assert torch.allclose(start["fc7.weight"], before["fc7.weight"], atol=1e-6)
    assert "fc8 starts fresh" in capsys.readouterr().out
    with pytest.raises(UserError, match="its columns is 1, this run's 2"):
        run(store, tmp_path / "two", "--init", run_folder / "best.pt", "--columns", 2)


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


def test_last_pt_is_written_in_mid_epoch_too(store, tmp_path, monkeypatch):
    """At each look once SAVE_SECONDS have passed."""
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    monkeypatch.setattr(train, "LOOK_EVERY", 2)
    saved = []
    real = utils.save_checkpoint

    def save(path, content):
        saved.append(content["step"])
        real(path, content)

    monkeypatch.setattr(utils, "save_checkpoint", save)
    run(store, tmp_path / "run", "--epochs", 1)
    assert {0, 2, 4, 6} <= set(saved)
    assert time.time() - (tmp_path / "run" / "last.pt").stat().st_mtime < 60
