"""train.py: the loop, signals, several processes, and what it falls back to."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_source
from helpers import ROOT, assert_same_state, command, damage, environment, load, numbers, resume, run, streaming

import checkpoints
import train
import utils
from checkpoints import run as runs
from data import pack, sources
from data.augment import Augment, epoch_tables
from data.store import Store
from kernels import FastDropout, multiplies_bf16
from model import AlexNet
from utils import UserError
from watch import STOPPING, Watch

BF16 = pytest.mark.skipif(not multiplies_bf16(torch.device("cpu")), reason="this processor emulates bf16: too slow")


def test_the_loop_is_the_one_written_out_here(store, ten_steps):
    """Six steps of the recipe in plain torch: same data order, crops, masks, update; the logged loss and weights."""
    utils.seed_all(0)
    net = AlexNet(4, image_size=64)
    utils.seed_all(0)
    net.init_weights()
    net.to(memory_format=torch.channels_last)
    net.drop6.__class__ = net.drop7.__class__ = FastDropout  # random bits, as train.py draws its masks on a CPU
    inputs = Augment(64, store.mean, colour="2012", pca=store.manifest["pca"])
    images, labels = (torch.from_numpy(x) for x in store.split("train").read(np.arange(96)))
    cut = by_hand(images.numpy(), tables := epoch_tables(0, 0, 96, 8))
    velocity = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    losses, wrong = [], 0
    for step in range(6):
        samples = tables.order[16 * step : 16 * step + 16]
        utils.seed_all(0, step + 1, 0)
        logits = net(inputs.train(torch.from_numpy(cut[samples]), tables.colour[samples]))
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
    entry = runs.read_log(ten_steps / "log.jsonl")[0]
    assert entry["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert entry["train_top1_error"] == pytest.approx(100 * wrong / 96)
    best = load(ten_steps / "best.pt")["model"]
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), best[name], rtol=1e-4, atol=1e-6)


def by_hand(images, tables):
    """Each picture's crop of 64 pixels, mirrored or not."""
    cut = [p[top : top + 64, left : left + 64] for p, (top, left) in zip(images, tables.offsets, strict=True)]
    return np.stack([p[:, ::-1] if flip else p for p, flip in zip(cut, tables.mirror, strict=True)])


def test_learning_rate_drops_reach_the_optimiser(store, tmp_path, monkeypatch):
    """Validation that never improves: patience 1 gives four rates, then the run ends by itself. set_rate, which keeps
    the update the paper's over a drop, is what sets them."""
    seen = []
    real = train.set_rate
    monkeypatch.setattr(train, "set_rate", lambda optimizer, lr: seen.append(lr) or real(optimizer, lr))
    monkeypatch.setattr(utils, "evaluate", lambda *_, **__: torch.tensor([1.0, 10.0, 0.0], dtype=torch.float64))
    run(store, tmp_path / "run", "--patience", 1, batch=96)
    rates = [e["lr"] for e in runs.read_log(tmp_path / "run" / "log.jsonl")]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.0001, 0.00001])
    assert seen == pytest.approx([0.01, 0.001, 0.0001, 0.00001, 0.00001])
    groups = load(tmp_path / "run" / "last.pt")["optimizer"]["param_groups"]
    assert [g["lr"] for g in groups] == pytest.approx([0.00001, 0.00002])


def test_fixed_drops(store, tmp_path, capsys):
    """--drops instead of --patience; a run that stops and goes on has the same rates."""
    for out, stops in ((tmp_path / "whole", []), (tmp_path / "parts", ["--max-steps", 2])):
        run(store, out, "--epochs", 5, "--drops", 1, 3, *stops, batch=96)
    assert "5 epochs, learning rate divided by 10 after 1, 3" in capsys.readouterr().out
    resume(tmp_path / "parts", "--max-steps", 100)
    assert [e["lr"] for e in runs.read_log(tmp_path / "whole" / "log.jsonl")] == [0.01, 0.001, 0.001, 0.0001, 0.0001]
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(UserError, match=r"--drops 4: .* was started with --drops 1 3"):
        resume(tmp_path / "parts", "--drops", 4)
    with pytest.raises(UserError, match=r"--patience 5: .* was started without --patience"):
        resume(tmp_path / "parts", "--patience", 5)
    with pytest.raises(UserError, match=r"after 20 drops a learning rate of .* is as good as 0"):
        run(store, tmp_path / "no", "--epochs", 90, "--drops", *range(1, 21))
    with pytest.raises(UserError, match="--drops 5: the run ends after 5 epochs"):
        run(store, tmp_path / "no", "--epochs", 5, "--drops", 2, 5)
    with pytest.raises(UserError, match="--drops 2 2: an epoch is named twice"):
        run(store, tmp_path / "no", "--epochs", 5, "--drops", 2, 2)


@pytest.fixture(scope="module")
def two_epochs(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    run(store, out, "--epochs", 2)
    return out


def test_an_epochs_last_smaller_batch_is_dropped(store, tmp_path):
    """96 pictures are four batches of 20; the validation has all of its 21."""
    run(store, tmp_path / "run", "--epochs", 1, batch=20)
    (entry,) = runs.read_log(tmp_path / "run" / "log.jsonl")
    assert entry["step"] == 4
    assert entry["val_top1_error"] * 21 / 100 == pytest.approx(round(entry["val_top1_error"] * 21 / 100))


def test_a_damaged_record_ends_a_streaming_run(jpeg_store, tmp_path):
    """One line, status 2, and no worker that keeps the process from ending."""
    copy = shutil.copytree(jpeg_store.path, tmp_path / "copy")
    file = copy / "train-00000" / "data.mdb"
    content = bytearray(file.read_bytes())
    content[bytes(content).index(b"ALX1") + 200] ^= 0xFF
    file.write_bytes(content)
    process = streaming(Store(copy), tmp_path / "run")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 2
    (line,) = err.splitlines()
    assert "the record's checksum does not match" in line


def test_damaged_records_are_replaced_and_reported(store, tmp_path, capsys, monkeypatch):
    """In the log, at the end, and on resuming with more of them allowed; resident and streaming train on the same."""
    copy = Store(shutil.copytree(store.path, tmp_path / "copy"))
    damage(copy.path, "train", 8, 9)
    damage(copy.path, "val", 3)
    with pytest.raises(UserError, match="picture 8 "):
        run(copy, tmp_path / "run", "--epochs", 2)
    with pytest.raises(UserError, match="more than 1 damaged records in train"):
        run(copy, tmp_path / "no", "--skip-bad-records", 1, "--epochs", 2)
    assert run(copy, tmp_path / "a", "--skip-bad-records", 3, "--epochs", 2) == 0
    out, err = capsys.readouterr()
    assert "damaged records, replaced by others: train 8, train 9, val 3" in out
    assert err.count("warning: damaged records, replaced by others: train 8, train 9, val 3") == 1
    assert numbers(tmp_path / "a")[1]["replaced_records"] == ["train 8", "train 9", "val 3"]
    monkeypatch.setattr("data.loader.RESIDENT_BYTES", 0)
    assert run(copy, tmp_path / "b", "--skip-bad-records", 3, "--max-steps", 6, "--epochs", 2) == 0
    assert resume(tmp_path / "b", "--max-steps", 100) == 0
    assert_same_state(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="3 damaged records in all processes, more than --skip-bad-records 2"):
        run(copy, tmp_path / "c", "--skip-bad-records", 2, "--epochs", 2)
    assert load(tmp_path / "c" / "last.pt")["step"] == 6  # what was trained until then is kept
    assert resume(tmp_path / "c", "--skip-bad-records", 3) == 0
    assert_same_state(tmp_path / "a", tmp_path / "c")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"3 damaged .*or --resume with a higher number$"):
        run(copy, tmp_path / "d", "--skip-bad-records", 2, "--epochs", 1)
    assert load(tmp_path / "d" / "last.pt")["step"] == 0  # resident: all were read before the first step


def test_too_little_shared_memory_is_told_before_the_first_step(store, tmp_path, monkeypatch, capsys):
    """Of the whole pictures of validation; of the crops of training where only these are streamed."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=0))
    for least, split, batch in ((0, "val", 16 * 72 * 72 * 3), (30 * 72 * 72 * 3, "train", 16 * 64 * 64 * 3)):
        monkeypatch.setattr("data.loader.RESIDENT_BYTES", least)
        assert run(store, tmp_path / split, "--max-steps", "1", "--workers", "1") == 0
        told = f"warning: to read {split} with 1 --workers takes {4 * batch / 1e6:,.0f} MB of /dev/shm, of which 0 MB"
        assert told in capsys.readouterr().err


def children(process: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def ignores(process: int, number: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        return bool(int(lines["SigIgn"], 16) >> (number - 1) & 1)
    return False


def test_sigterm_to_the_whole_group_while_streaming(store, tmp_path):
    """What timeout and job schedulers do: every process of the group gets the signal. And what systemd and a shutdown
    do: so do the processes that read, which are no longer in it, and SIGHUP follows at once."""
    process = streaming(store, tmp_path / "run")
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    while len(reading := [pid for pid in children(process.pid) if ignores(pid, signal.SIGTERM)]) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGHUP):
        for pid in (*reading, process.pid):
            with suppress(ProcessLookupError):  # an epoch's end is one of its readers, too
                os.kill(pid, number)
    _, err = process.communicate(timeout=600)
    assert process.returncode in (143, 129)  # of two that wait Python takes SIGHUP, the lower number, first
    assert err == STOPPING.decode()
    assert load(tmp_path / "run" / "last.pt")["step"] > 6


@pytest.mark.parametrize(("number", "status"), [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGHUP, 129),
])
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
    out, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (status, STOPPING.decode())
    assert "--resume goes on from there" in out
    assert 6 < load(tmp_path / "run" / "last.pt")["step"] < 12
    resume(tmp_path / "run")
    assert_same_state(tmp_path / "run", two_epochs)
    assert numbers(tmp_path / "run") == numbers(two_epochs)


def test_signals_that_come_together_are_one_and_a_later_one_ends_the_process():
    hear = ("import os, signal, time, torch, watch\n"
            "with watch.Watch(torch.device('cpu')) as seen:\n"
            "    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGHUP): os.kill(os.getpid(), number)\n"
            "    print(seen.received, flush=True)\n"
            "    time.sleep(watch.ONE_STOP + 0.1)\n"
            "    os.kill(os.getpid(), signal.SIGHUP)\n"
            "    print('not this')")
    done = subprocess.run([sys.executable, "-c", hear], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (129, "15\n", STOPPING.decode())


@pytest.mark.parametrize("which", ["first", "last"])
def test_a_signal_ends_a_validation(store, two_epochs, tmp_path, monkeypatch, which):
    """Of ImageNet it takes longer than the 30 seconds that torchrun gives; the epoch's steps must not be lost. The
    validation of the last epoch is no exception."""
    count, batches = {"first": 0, "last": 1}[which], utils.evaluate

    def interrupted(members, loaded):
        nonlocal count
        count -= 1
        if count == -1:
            os.kill(os.getpid(), signal.SIGTERM)
            assert next(iter(loaded), None) is None
        return batches(members, loaded)

    monkeypatch.setattr(utils, "evaluate", interrupted)
    assert run(store, tmp_path / "run", "--epochs", 2) == 143
    assert load(tmp_path / "run" / "last.pt")["step"] == {"first": 6, "last": 12}[which]
    assert len(runs.read_log(tmp_path / "run" / "log.jsonl")) == {"first": 0, "last": 1}[which]
    assert resume(tmp_path / "run") == 0
    assert_same_state(tmp_path / "run", two_epochs)
    assert numbers(tmp_path / "run") == numbers(two_epochs)


def test_the_time_left_counts_what_lies_between_the_epochs_and_few_classes_have_no_top_5():
    """An epoch of 60 seconds, of which half are validation; the fifth of five classes is never missed."""
    entry = {"epoch": 2, "step": 200, "lr": 0.01, "train_loss": 1, "train_top1_error": 1, "val_loss": 1, "stall": 0,
             "val_top1_error": 1, "val_top5_error": 0, "images_per_second": 100 * 128 / 30, "seconds": 60}
    for classes in (5, 6):
        about = types.SimpleNamespace(args=types.SimpleNamespace(epochs=10, batch_size=128), steps_per_epoch=100,
                                      store=types.SimpleNamespace(classes=["x"] * classes))
        assert train.summary(about, entry).endswith("1m 00s, at most 8m 00s left")
        assert ("top-5" in train.summary(about, entry)) == (classes == 6)
    assert train.summary(about, entry | {"step": 150}).endswith("at most 17m 00s left")  # stopped by --max-steps


def test_a_run_with_nohup_does_not_hear_that_its_terminal_is_gone(store, tmp_path):
    hear = [sys.executable, "-c", "import signal, sys, torch; from watch import Watch\n"
            "with Watch(torch.device('cpu')) as watch: signal.raise_signal(signal.SIGHUP); print(watch.received)"]
    for words, expected in ((hear, "1\n"), (["nohup", *hear], "0\n")):
        assert subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout == expected


def test_a_run_goes_on_where_its_words_cannot_be_written(store, tmp_path):
    """A terminal that is gone, or a full disk: not what hours of training should end with."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(command(store, tmp_path / "run", "--batch-size", "16", "--epochs", "1"), cwd=ROOT,
                              stdout=full, stderr=subprocess.PIPE, text=True, env=environment())
    assert (done.returncode, done.stderr) == (0, "")
    assert len(runs.read_log(tmp_path / "run" / "log.jsonl")) == 1


def test_a_run_whose_output_nobody_reads_stops_in_good_order(store, tmp_path):
    """Ctrl-C ends `| tee`, too, often before the epoch's line is printed."""
    process = streaming(store, tmp_path / "run")
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    process.stdout.close()
    assert process.wait(600) == 128 + signal.SIGPIPE
    assert process.stderr.read() == ""
    state = load(tmp_path / "run" / "last.pt")
    entries = runs.read_log(tmp_path / "run" / "log.jsonl")
    assert len(entries) >= 2  # the line that could not be printed
    assert state["step"] >= entries[-1]["step"]
    assert resume(tmp_path / "run", "--max-steps", state["step"] + 1) == 0


def test_what_another_run_left_meanwhile_is_not_written_over(store, tmp_path, monkeypatch):
    """As long as this one packs its pictures, its --out is not locked."""
    opened = train.open_store

    def slow(args, watch):
        monkeypatch.setattr(train, "open_store", opened)
        assert run(store, tmp_path / "run", "--max-steps", 1) == 0
        return opened(args, watch)

    monkeypatch.setattr(train, "open_store", slow)
    with pytest.raises(UserError, match="holds a run; --resume goes on with it"):
        run(store, tmp_path / "run", "--max-steps", 2)
    assert load(tmp_path / "run" / "last.pt")["step"] == 1
    assert len(runs.read_log(tmp_path / "run" / "log.jsonl")) == 1


@pytest.mark.parametrize(("able", "words"), [
    (True, "; in bf16 dense layers are torch's\n"), (False, "; bf16 is emulated: there is no bf16 arithmetic here"),
])
def test_the_line_kernels_says_what_bf16_comes_to(able, words, store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "multiplies_bf16", lambda device: able)
    for precision in ("fp32", "bf16"):
        run(store, tmp_path / precision, "--precision", precision, "--device", "cpu", "--max-steps", 1, batch=2)
        assert (words in capsys.readouterr().out) == (precision == "bf16")


@BF16
def test_bf16_learns_as_fp32_and_resumes_to_the_bit(store, tmp_path, monkeypatch):
    """20 steps' losses within 2% of fp32's; a run that stops in mid-epoch ends in the same weights."""
    losses, step = [], train.train_step

    def recorded(*arguments):
        loss, logits = step(*arguments)
        losses.append(loss.item())
        return loss, logits

    monkeypatch.setattr(train, "train_step", recorded)
    options = ["--lr", 0.001, "--max-steps", 20]
    for out, precision, first in (("fp32", "fp32", []), ("bf16", "bf16", []), ("parts", "bf16", ["--max-steps", 7])):
        run(store, tmp_path / out, *options, *first, "--precision", precision, batch=16)
    resume(tmp_path / "parts", "--max-steps", 20)
    assert_same_state(tmp_path / "bf16", tmp_path / "parts")
    exact, rounded, again = losses[:20], losses[20:40], losses[40:]
    assert again == rounded
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact


def test_with_no_data_it_falls_back_to_the_sample_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pack, "STORES", tmp_path / "stores")
    monkeypatch.setattr(sources, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setattr(sources, "_unreachable", lambda url: "no route to the server")
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path / "checkpoints")
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


def test_a_diverging_run_stops_with_step_and_rate(store, tmp_path):
    """lr 1000: the loss leaves the numbers; the checkpoint from before stays."""
    with pytest.raises(UserError, match=r"no longer finite at step \d+, learning rate 1000"):
        run(store, tmp_path / "run", "--lr", 1000, "--max-steps", 40)
    assert load(tmp_path / "run" / "last.pt")["step"] == 0


def test_a_warning_does_nothing_to_a_terminal(capsys):
    """What a config.json or a checkpoint says is printed, too."""
    Watch(torch.device("cpu")).warn("this run had: \x1b[31mred\u202e")
    assert capsys.readouterr().err == "warning: this run had: \\x1b[31mred\\u202e\n"


def test_a_plateau_is_warned_of_once(store, capsys):
    """A mean loss within 1% of ln(classes) after 500 steps, and only then."""
    stuck = types.SimpleNamespace(batch_size=16, recipe="2012")
    a_run, watch = runs.Training(stuck, store, None, None, None, ""), Watch(torch.device("cpu"))
    a_run.state.step_in_epoch = 20
    for step, loss, warnings in ((480, 1.0, 0), (500, 0.98, 0), (520, 1.0, 1), (540, 1.005, 0)):
        a_run.state.step = step
        note = train.look(a_run, torch.tensor([loss * math.log(4) * 320, 80.0]), watch)
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
    assert "has other classes than this run, so fc8 starts afresh" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["names in another order", "wnids in another order", "other names", "names twice"])
def test_init_knows_the_classes(store, run_folder, tmp_path, capsys, kind):
    """Same names or same wnids keep the last layer, another order permutes its rows, anything else starts it afresh,
    with a warning, also where the count is the same."""
    content, names = load(run_folder / "best.pt"), ["class 2", "class 0", "class 3", "class 1"]
    source, order = small_source(counts=(16, 4, 4)), [2, 0, 3, 1]
    if kind == "names in another order":
        source.classes = names
    elif kind == "wnids in another order":
        content["wnids"], source.wnids = ["n0", "n1", "n2", "n3"], ["n2", "n0", "n3", "n1"]
        source.classes = ["w", "x", "y", "z"]
    elif kind == "other names":
        source.classes, order = ["w", "x", "y", "z"], None
    else:
        content["classes"] = source.classes = ["crane", "crane", "x", "y"]
        order = [0, 1, 2, 3]
    torch.save(content, tmp_path / "start.pt")
    other = pack.pack(source, tmp_path / "store")
    run(other, tmp_path / "run", "--init", tmp_path / "start.pt", "--max-steps", 1, "--lr", 1e-12)
    rows, before = load(tmp_path / "run" / "best.pt")["model"]["fc8.weight"], content["model"]["fc8.weight"]
    warned = capsys.readouterr().err
    if order:
        assert torch.allclose(rows, before[order], atol=1e-6)
        assert warned == ""
    else:
        assert not torch.allclose(rows, before, atol=1e-3)
        assert "has other classes than this run, so fc8 starts afresh" in warned


def test_init_brings_the_nets_options_with_it(store, tmp_path, capsys):
    """Two columns with tanh, without overlap, at 67 pixels; what contradicts them is refused, dropout may differ."""
    options = ("--columns", 2, "--activation", "tanh", "--no-overlap", "--image-size", 67)
    run(store, tmp_path / "first", *options, "--max-steps", 1)
    best = tmp_path / "first" / "best.pt"
    run(store, tmp_path / "second", "--init", best, "--columns", 2, "--no-dropout", "--max-steps", 1)
    first, second = load(best)["config"], load(tmp_path / "second" / "best.pt")["config"]
    assert second == first | {"dropout": 0}
    assert "two columns, 67 x 67 pixels" in capsys.readouterr().out
    resume(tmp_path / "second", "--max-steps", 2)
    assert load(tmp_path / "second" / "last.pt")["step"] == 2
    for option, value, named in (
        ("--columns", 1, "^--columns 1: the net of .* was made with --columns 2, and"),
        ("--no-lrn", None, "^--no-lrn: the net of .* was made without --no-lrn, and"),
        ("--image-size", 64, "made with --image-size 67"), ("--activation", "relu", "made with --activation tanh"),
    ):
        with pytest.raises(UserError, match=named):
            run(store, tmp_path / "third", "--init", best, option, *([value] if value else []))
    assert not (tmp_path / "third").exists()
    file = torch.load(best)
    torch.save(file | {"config": {**file["config"], "net": "half"}}, best)
    with pytest.raises(UserError, match=r"first.best.pt: unknown net half$"):
        run(store, tmp_path / "third", "--init", best)
