"""run.py: what a run leaves behind, stopping and resuming to the bit, and folders that are taken."""

import copy
import errno
import json
import math
import os
import re
import shutil
import subprocess
import time
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import small_source
from helpers import ROOT, assert_same_state, command, environment, load, numbers, resume, run

import checkpoints
import options
import train
import utils
from checkpoints import run as runs
from checkpoints.run import State, claim_folder, locked
from data import pack
from model import AlexNet
from recipe import Schedule, make_optimizer
from utils import UserError
from watch import Watch


@pytest.mark.parametrize("stop", [5, 6, 8])
def test_stop_and_resume_equals_an_unbroken_run(store, ten_steps, tmp_path, stop):
    """In mid-epoch, at an epoch's end, and after it."""
    out = tmp_path / "run"
    run(store, out, "--max-steps", stop)
    assert load(out / "last.pt")["step"] == stop
    resume(out, "--max-steps", 10)
    assert_same_state(out, ten_steps)
    assert numbers(out) == numbers(ten_steps)


def test_an_epochs_seconds_include_those_before_a_stop(store, tmp_path):
    """Of a run stopped in mid-epoch, whose checkpoint is made to say that the epoch had taken 1,000 seconds by then;
    one of before they were kept counts from its resuming on."""
    run(store, tmp_path, "--max-steps", 4)
    last = load(tmp_path / "last.pt")
    assert 0 < last["state"]["seconds"] < 100
    for before in (1000.0, None):
        state = last["state"] | {"seconds": before}
        if before is None:
            del state["seconds"]
        torch.save(last | {"state": state}, tmp_path / "last.pt")
        resume(tmp_path, "--max-steps", 9)
        first, second = (entry["seconds"] for entry in runs.read_log(tmp_path / "log.jsonl"))
        assert (before or 0) < first < (before or 0) + 100
        assert 0 < second < 100
        assert 0 < load(tmp_path / "last.pt")["state"]["seconds"] < 100


def test_what_a_run_leaves_behind(store, run_folder):
    files = ["best.pt", "config.json", "conv1.npy", "curves.png", "last.pt", "log.jsonl", "previous.pt"]
    assert sorted(p.name for p in run_folder.iterdir()) == files
    (entry,) = runs.read_log(run_folder / "log.jsonl")
    assert set(entry) == {
        "epoch", "step", "lr", "train_loss", "train_top1_error", "val_loss", "val_top1_error", "val_top5_error",
        "images_per_second", "stall", "seconds",
    }
    assert (entry["epoch"], entry["step"], entry["lr"]) == (1, 6, 0.01)
    assert 0 < entry["stall"] < 100
    best, last = load(run_folder / "best.pt"), load(run_folder / "last.pt")
    assert set(last) - set(best) == {"optimizer", "schedule", "state"}
    assert set(checkpoints.KEYS) <= set(best)
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
    """A stop in mid-epoch validates, logs a line and writes best.pt while no epoch is whole; a later one that is better
    leaves best.pt alone."""
    out = tmp_path / "run"
    run(store, out, "--max-steps", 3)
    last = load(out / "last.pt")
    assert (last["epoch"], last["best"]) == (0, math.inf)
    assert (last["schedule"]["best"], last["schedule"]["waited"]) == (math.inf, 0)
    assert load(out / "best.pt")["step"] == 3
    assert [e["step"] for e in runs.read_log(out / "log.jsonl")] == [3]
    resume(out, "--max-steps", 5)
    assert load(out / "best.pt")["step"] == 5
    resume(out, "--max-steps", 7)
    assert [e["step"] for e in runs.read_log(out / "log.jsonl")] == [6, 7]
    assert load(out / "best.pt")["step"] == 6
    assert load(out / "last.pt")["step"] == 7


def test_a_finished_run_says_so_and_exits_with_0(run_folder, capsys):
    before = {p.name: p.read_bytes() for p in run_folder.iterdir()}
    assert resume(run_folder) == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in run_folder.iterdir()} == before


def test_a_run_that_its_schedule_ended_says_so(run_folder, tmp_path, capsys):
    """More epochs change nothing then."""
    out = shutil.copytree(run_folder, tmp_path / "run")
    content = load(out / "last.pt")
    content["schedule"]["finished"] = True
    torch.save(content, out / "last.pt")
    assert resume(out, "--epochs", 9) == 0
    assert "nothing left to do: the learning rate has fallen three times\n" in capsys.readouterr().out


def test_ctrl_c_before_the_first_step_leaves_nothing(store, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "save_last", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(store, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_left_to_do_names_what_is_there(store, tmp_path, capsys):
    """A signal in the last step of --max-steps leaves no best.pt."""
    run(store, tmp_path / "run", "--max-steps", 1)
    for name in ("best.pt", "log.jsonl", "curves.png"):
        (tmp_path / "run" / name).unlink()
    capsys.readouterr()
    assert resume(tmp_path / "run", "--max-steps", 1) == 0
    out = capsys.readouterr().out
    assert "no whole epoch yet" in out
    assert re.search(r"^in .*/run: last\.pt$", out, re.MULTILINE)
    assert "best.pt" not in out


def test_kernels_and_resume(run_folder, tmp_path, capsys):
    """Other kernels than at the start are warned of."""
    out = shutil.copytree(run_folder, tmp_path / "run")
    config = json.loads((out / "config.json").read_text())
    assert config["kernels"].startswith("LRN compiled from kernels.c")
    config["kernels"], config["processes"], config["arguments"]["kernels"] = "LRN by hand", 8, "on"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r'config.json was changed since train.py wrote it, .* remove its "checksum"'):
        resume(out, "--epochs", 2)
    del config["checksum"]
    (out / "config.json").write_text(json.dumps(config))
    assert options.parse(["--resume", "--out", str(out)]).kernels == "on"
    assert options.parse(["--resume", "--out", str(out), "--kernels", "auto"]).kernels == "auto"  # the way out
    resume(out, "--epochs", 2, "--max-steps", 7)
    said = capsys.readouterr().err
    assert "warning: this run was started with LRN by hand and goes on with LRN compiled from kernels.c" in said
    assert "this run was started with 8 processes and goes on with 1: dropout's masks will differ" in said


def test_a_config_with_what_no_command_line_gives_is_refused(run_folder, tmp_path):
    """A config.json without a checksum, edited by hand."""
    (tmp_path / "run").mkdir()
    os.link(run_folder / "last.pt", tmp_path / "run/last.pt")
    config = json.loads((run_folder / "config.json").read_text())
    del config["checksum"]
    for name, value in [
        ("drops", 7), ("drops", []), ("epochs", "90"), ("lr", -1), ("momentum", None), ("mirror", "yes"),
        ("columns", 3), ("lrn", None), ("activation", ["relu"]), ("packed_from", [1]),
    ]:
        changed = config | {"arguments": config["arguments"] | {name: value}}
        (tmp_path / "run/config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=f"config.json was changed, or is damaged: invalid {name}"):
            resume(tmp_path / "run")
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(UserError, match=r"config.json is missing or damaged"):
        resume(tmp_path / "run")
    (tmp_path / "run/config.json").mkdir()  # like a file that only others may read: what it is, not "damaged"
    with pytest.raises(IsADirectoryError):
        resume(tmp_path / "run")
    (tmp_path / "run/config.json").rmdir()
    for name, value in [("arguments", []), ("fingerprint", None), ("kernels", 5)]:
        (tmp_path / "run/config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(UserError, match=r"config.json is missing or damaged"):
            resume(tmp_path / "run")


def test_resume_takes_more_epochs_and_refuses_other_changes(store, run_folder, tmp_path):
    out = shutil.copytree(run_folder, tmp_path / "run")
    for option, value in (("--lr", "0.1"), ("--batch-size", "8"), ("--seed", "1"), ("--recipe", "paper")):
        with pytest.raises(UserError, match=f"^{option} {value}: .* was started with {option} "):
            resume(out, option, value)
    with pytest.raises(UserError, match=r"^--no-mirror: .* was started without --no-mirror; leave the option out"):
        resume(out, "--no-mirror")
    # The run's own values may be given again; a new --epochs is kept for the next --resume.
    resume(out, "--lr", "0.01", "--precision", "auto", "--epochs", "2", "--max-steps", "8")
    assert [e["step"] for e in runs.read_log(out / "log.jsonl")] == [6, 8]
    resume(out)
    assert [e["epoch"] for e in runs.read_log(out / "log.jsonl")] == [1, 2]


def test_an_out_that_holds_a_run_needs_resume(store, run_folder):
    with pytest.raises(UserError, match="holds a run; --resume"):
        run(store, run_folder)


@pytest.mark.parametrize("kept", ["config.json", "log.jsonl", "best.pt", "last.pt"])
def test_any_file_of_a_run_makes_a_folder_one(store, tmp_path, kept):
    """A config.json alone cannot be resumed: there the way out is another."""
    (tmp_path / kept).write_bytes(b"")
    with pytest.raises(UserError, match="nothing but a config.json" if kept == "config.json" else "holds a run"):
        run(store, tmp_path)
    if kept != "last.pt":
        with pytest.raises(UserError, match=r"nothing to resume: no .*; choose another --out without --resume"):
            resume(tmp_path)


def test_a_death_between_log_and_checkpoint_leaves_one_line_an_epoch(store, tmp_path, monkeypatch, two_epochs_log):
    """Stopped by a signal in an epoch's last step, resumed, and killed before its checkpoint: its line is in the log
    already, and is written anew."""
    out, options = tmp_path / "run", ("--epochs", "2")
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "decide", lambda _, step, save_every: (15 if step == 6 else 0, False))
        assert run(store, out, *options) == 143
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_last", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            resume(out)
    assert resume(out) == 0
    assert numbers(out) == two_epochs_log


@pytest.fixture
def two_epochs_log(store, tmp_path):
    run(store, tmp_path / "unbroken", "--epochs", "2")
    return numbers(tmp_path / "unbroken")


def test_a_checkpoint_of_another_net_is_refused(store, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    last = load(run_folder / "last.pt")
    changes = {"config": last["config"] | {"activation": "tanh"}}, {"schedule": {}}
    for change in changes:
        torch.save(last | change, tmp_path / "run" / "last.pt")
        with pytest.raises(UserError, match="does not fit"):
            resume(tmp_path / "run", "--epochs", "2")


@pytest.mark.parametrize(
    ("new", "name", "value"),
    [
        (State(), "step_in_epoch", "1"), (State(), "loss_sum", []), (State(), "loss_sum", math.nan),
        (State(), "step", -6), (State(), "seconds", math.inf), (Schedule(0.01, 5), "lr", math.nan),
        (Schedule(0.01, 5), "drops", "1"), (Schedule(0.01, 5), "finished", None),
    ],
)
def test_what_was_saved_of_a_state_has_to_be_of_its_kind(new, name, value):
    with pytest.raises(ValueError, match=re.escape(f"its {name} is {value!r}")):
        runs.restored(new, asdict(new) | {name: value})
    assert runs.restored(new, asdict(new)) == new


@pytest.mark.parametrize("state", [{"step": 5}, {"step_in_epoch": 6}, {"epoch": 0}])
def test_a_last_pt_whose_counters_disagree_is_one_line(run_folder, tmp_path, state):
    """It is of the end of the first epoch, step 6 of 6."""
    (tmp_path / "run").mkdir()
    shutil.copy(run_folder / "config.json", tmp_path / "run")
    last = load(run_folder / "last.pt")
    torch.save(last | {"state": last["state"] | state}, tmp_path / "run/last.pt")
    with pytest.raises(UserError, match=r"does not fit .*step \d is not in State.* of 6 steps an epoch") as caught:
        resume(tmp_path / "run", "--epochs", "2")
    assert "\n" not in str(caught.value)


def test_momentum_that_does_not_fit_the_net_is_refused():
    net = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(net, recipe="2012", lr=0.01, momentum=0.9, weight_decay=0.0)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    run = SimpleNamespace(optimizer=optimizer, state=State(step=1), schedule=Schedule(0.01, 5))
    saved = copy.deepcopy(optimizer.state_dict())
    runs.take_momentum(run, saved)
    for buffer in (None, torch.zeros(3), torch.zeros(2, 3).to_sparse(), torch.zeros(1).expand(2, 3)[:1]):
        wrong = copy.deepcopy(saved)
        wrong["state"][0]["momentum_buffer"] = buffer
        with pytest.raises(ValueError, match="its momentum buffers do not fit the net"):
            runs.take_momentum(run, wrong)
    saved["param_groups"].pop()
    with pytest.raises(ValueError, match="other groups of parameters"):
        runs.take_momentum(run, saved)


def test_settings_of_a_checkpoint_are_not_taken(run_folder, tmp_path):
    """Those of config.json count, for the optimizer and the schedule; the optimizer's lr is the schedule's."""
    last = load(run_folder / "last.pt")
    last["optimizer"]["param_groups"][0] |= {"lr": 5.0, "momentum": 0.1, "weight_decay": "a", "scale": 7}
    last["schedule"] |= {"patience": "a", "fixed": [1]}
    for name in ("sound", "changed"):
        shutil.copytree(run_folder, tmp_path / name)
        if name == "changed":
            torch.save(last, tmp_path / name / "last.pt")
        resume(tmp_path / name, "--epochs", "2", "--max-steps", "7")
    assert_same_state(tmp_path / "changed", tmp_path / "sound")


def test_runs_that_start_together_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path / "checkpoints")
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


def test_too_little_memory_at_the_start_is_one_line_and_leaves_nothing(store, tmp_path, monkeypatch):
    def short(*_, **__):
        raise MemoryError

    for place in ("train.starting_net", "checkpoints.run.save_checkpoint"):
        with monkeypatch.context() as patch:
            patch.setattr(place, short)
            with pytest.raises(UserError, match=r"^memory ran out"):
                run(store, tmp_path / "run")
        assert not list(tmp_path.iterdir())


def test_a_changed_store_is_refused(run_folder, tmp_path):
    out = shutil.copytree(run_folder, tmp_path / "run")
    other = pack.pack(small_source(counts=(80, 20, 20)), tmp_path / "other")
    with pytest.raises(UserError, match="has changed since"):
        resume(out, "--data", other.path)


def test_a_store_that_was_moved_is_named_with_resume(store, run_folder, tmp_path):
    """--data may then be another path, and is kept."""
    out, moved = shutil.copytree(run_folder, tmp_path / "run"), shutil.copytree(store.path, tmp_path / "moved")
    resume(out, "--data", moved, "--epochs", 2, "--max-steps", 7)
    resume(out, "--max-steps", 8)
    config = json.loads((out / "config.json").read_text())
    assert config["arguments"]["data"] == config["store"] == str(moved)


def test_last_pt_is_written_in_mid_epoch_too(store, tmp_path, monkeypatch):
    """As often as --checkpoint-minutes says; the one before stays as previous.pt."""
    saved = []
    real = runs.save_checkpoint

    def save(path, content, *more):
        saved.append(content["step"])
        real(path, content, *more)

    monkeypatch.setattr(runs, "save_checkpoint", save)
    run(store, tmp_path / "run", "--epochs", 1, "--checkpoint-minutes", 0.0001)
    assert saved == [0, 1, 2, 3, 4, 5, 6, 6]  # of the epoch best.pt and last.pt
    assert load(tmp_path / "run" / "last.pt")["state"]["epoch"] == 1
    assert load(tmp_path / "run" / "previous.pt")["state"]["epoch"] == 0
    assert time.time() - (tmp_path / "run" / "last.pt").stat().st_mtime < 60


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "text"])
def test_a_damaged_last_pt_is_told_and_the_one_before_taken(store, ten_steps, tmp_path, capsys, damage):
    """Any flipped bit of the weights is found; the run ends in the weights of one that nothing happened to, and
    previous.pt stays until there is a sound last.pt again."""
    out = tmp_path / "run"
    run(store, out, "--max-steps", 6)
    run_on = ["--max-steps", 8]
    resume(out, *run_on)
    assert (load(out / "previous.pt")["step"], load(out / "last.pt")["step"]) == (6, 8)
    content = bytearray((out / "last.pt").read_bytes())
    if damage == "bit":
        content[len(content) // 3] ^= 4
    elif damage == "cut":
        del content[-5000:]
    (out / "last.pt").write_bytes(b"no checkpoint" if damage == "text" else content)
    if damage == "gone":
        (out / "last.pt").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_last", lambda _: 1 / 0)  # killed before the first checkpoint
        with pytest.raises(ZeroDivisionError):
            resume(out, "--max-steps", 7)
    assert load(out / "previous.pt")["step"] == 6
    capsys.readouterr()
    resume(out, "--max-steps", 10)
    assert "last.pt is damaged or missing: this run goes on from previous.pt, step 6" in capsys.readouterr().err
    assert_same_state(out, ten_steps)
    assert load(out / "previous.pt")["step"] in (6, 8)
    (out / "last.pt").write_bytes(content[:1000])
    (out / "previous.pt").unlink()
    with pytest.raises(UserError, match=r"last.pt is no checkpoint of this project, or is damaged"):
        resume(out, "--max-steps", 12)


def test_a_best_pt_that_is_gone_is_told(run_folder, tmp_path, capsys):
    """last.pt and config.json were copied alone, say."""
    out = shutil.copytree(run_folder, tmp_path / "run")
    (out / "best.pt").unlink()
    resume(out, "--epochs", 2)
    assert "best.pt is missing, the net of " in capsys.readouterr().err
    assert load(out / "best.pt")["epoch"] == 2


def test_a_run_with_init_goes_on_from_previous_pt_too(store, run_folder, tmp_path, capsys):
    """Whose net is that of the checkpoint; --init's own file may be gone by then."""
    shutil.copy(run_folder / "best.pt", tmp_path / "best.pt")
    run(store, tmp_path / "run", "--init", tmp_path / "best.pt", "--max-steps", 7, "--epochs", 2)
    (tmp_path / "run" / "last.pt").write_bytes(b"")
    (tmp_path / "best.pt").unlink()
    resume(tmp_path / "run", "--max-steps", 8)
    assert "goes on from previous.pt" in capsys.readouterr().err
    assert load(tmp_path / "run" / "last.pt")["step"] == 8


def test_the_newest_run_is_resumed_whichever_checkpoint_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path)
    for name, seconds in (("a-1/last.pt", 1), ("b-1/previous.pt", 2)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (seconds, seconds))
    assert checkpoints.newest("last.pt", "previous.pt") == tmp_path / "b-1/previous.pt"
    assert checkpoints.newest("best.pt") is None


def test_a_checkpoint_that_is_a_link_and_one_without_hard_links(tmp_path, monkeypatch):
    """What was behind the link becomes the one before."""
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "x"
    (tmp_path / "last.pt").symlink_to(target)
    for step in (1, 2):
        checkpoints.save_checkpoint(tmp_path / "last.pt", {"model": {}, "step": step}, tmp_path / "previous.pt")
    assert (load(tmp_path / "previous.pt")["step"], load(target)["step"]) == (1, 2)
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    (tmp_path / "last.pt").unlink()
    for step in (3, 4):
        checkpoints.save_checkpoint(tmp_path / "last.pt", {"model": {}, "step": step}, tmp_path / "previous.pt")
    assert (load(tmp_path / "previous.pt")["step"], load(tmp_path / "last.pt")["step"]) == (3, 4)


def test_a_disk_that_gives_back_something_else_is_noticed(tmp_path, monkeypatch):
    """The old checkpoint stays."""
    checkpoints.save_checkpoint(tmp_path / "last.pt", {"model": {"w": torch.ones(1000)}, "step": 1})
    sync = os.fsync

    def rotten(descriptor):
        sync(descriptor)
        os.pwrite(os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY), b"rot", 1500)

    monkeypatch.setattr(os, "fsync", rotten)
    with pytest.raises(UserError, match="could not be written: what was written does not read back, the checksum of"):
        checkpoints.save_checkpoint(tmp_path / "last.pt", {"model": {"w": torch.zeros(1000)}, "step": 2})
    assert load(tmp_path / "last.pt")["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


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
    assert [e["step"] for e in runs.read_log(out / "log.jsonl")] == [*range(6, step + 1, 6), step + 2]


def test_a_log_with_a_torn_last_line_is_read(tmp_path):
    runs.append_line(tmp_path / "log", {"a": 1})
    runs.append_line(tmp_path / "log", {"a": 2})
    with open(tmp_path / "log", "a") as file:
        file.write('{"a": ')
    assert runs.read_log(tmp_path / "log") == [{"a": 1}, {"a": 2}]
    assert runs.read_log(tmp_path / "none") == []
    runs.append_line(tmp_path / "log", {"a": 4})  # on a line of its own
    runs.append_line(tmp_path / "log", {"a": 5})
    assert runs.read_log(tmp_path / "log") == [{"a": 1}, {"a": 2}, {"a": 4}, {"a": 5}]


@pytest.mark.parametrize("damage", [b"val_loss", b'"step"', b'"epoch": 1'])
def test_a_damaged_line_of_the_log_is_told_on_resume(store, tmp_path, capsys, damage):
    """Of an epoch that is done: it is left out, where it stopped the run with a traceback."""
    out = tmp_path / "run"
    run(store, out, "--epochs", 2, "--max-steps", 11)
    content = (out / "log.jsonl").read_bytes()
    (out / "log.jsonl").write_bytes(content.replace(damage, b"#" + damage[1:], 1))
    capsys.readouterr()
    assert resume(out, "--max-steps", 12) == 0
    assert "log.jsonl is damaged: it has no whole line of epoch 1\n" in capsys.readouterr().err
    assert [entry["epoch"] for entry in runs.read_log(out / "log.jsonl")] == [2]


def test_environment_names_versions_and_hardware():
    found = runs.environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert found["device"]
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", found["commit"])


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git")
def test_the_commit_is_that_of_the_code(tmp_path, monkeypatch):
    """New lines of results leave it as it is; any other change to a file that git knows is told."""
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):  # of a hook that runs the tests
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
    (tmp_path / "results").mkdir()
    for name in ("code.py", "results/nets.jsonl"):
        (tmp_path / name).write_text("one")
    for words in ("init -q", "add .", "commit -q -m first"):
        subprocess.run([*git, *words.split()], check=True)

    def commit() -> str:
        return runs.environment(torch.device("cpu"))["commit"]

    assert re.fullmatch("[0-9a-f]{7,40}", commit())
    (tmp_path / "results" / "nets.jsonl").write_text("two")
    assert re.fullmatch("[0-9a-f]{7,40}", commit())
    (tmp_path / "code.py").write_text("two")
    assert commit().endswith("-dirty")


def test_conv1_is_kept_at_the_start_and_after_each_epoch(store, tmp_path):
    """Also of a run that was stopped in mid-epoch and resumed, whatever became of the file; not of half an epoch."""
    run(store, tmp_path / "whole", "--epochs", "3")
    kept = np.load(tmp_path / "whole" / "conv1.npy")
    assert (kept.shape, kept.dtype) == ((4, 96, 3, 11, 11), np.float16)
    start = AlexNet(4, image_size=64)
    utils.seed_all(0)
    start.init_weights("2012")
    np.testing.assert_array_equal(kept[0], start.conv1.weight.detach().half().numpy())
    last = load(tmp_path / "whole" / "last.pt")["model"]["conv1.weight"]
    np.testing.assert_array_equal(kept[3], last.half().numpy())
    run(store, tmp_path / "parts", "--epochs", "3", "--max-steps", "8")  # an epoch has six
    assert len(np.load(tmp_path / "parts" / "conv1.npy")) == 2
    resume(tmp_path / "parts", "--max-steps", "100")
    np.testing.assert_array_equal(np.load(tmp_path / "parts" / "conv1.npy"), kept)
    run(store, tmp_path / "lost", "--epochs", "3", "--max-steps", "8")
    content = (tmp_path / "lost" / "conv1.npy").read_bytes()
    bracket, shape = content.replace(b", 11, 11)", b", (((11, 11"), content.replace(b"96, 3", b"3, 96")
    for damaged in (b"\x93NUMPY", bracket, shape):
        lost = shutil.copytree(tmp_path / "lost", tmp_path / "again", dirs_exist_ok=True)
        (lost / "conv1.npy").write_bytes(damaged)
        resume(lost, "--max-steps", "12")
        assert len(np.load(lost / "conv1.npy")) == 1  # from there on
