"""processes.py: several processes agree with one, end together, and are started again."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_same_state, command, environment, load, numbers, resume, run
from test_train import BF16

import processes
from utils import UserError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def finished(arguments, **more):
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=600, **more)


@pytest.mark.parametrize(("precision", "close"), [("fp32", 1e-4), pytest.param("bf16", 2e-2, marks=BF16)])
def test_two_processes_give_the_losses_of_one(precision, close, store, tmp_path):
    """5 epochs of one step each, so that each line of the log is a step's loss; 21 validation images over two
    processes are counted once each."""
    options = ["--batch-size", "96", "--no-dropout", "--max-steps", "5", "--lr", "0.001", "--precision", precision]
    done = finished([*TORCHRUN, *command(store, tmp_path / "two", *options)[1:]])
    assert done.returncode == 0, done.stderr
    run(store, tmp_path / "one", *options[2:], batch=96)
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert len(one) == len(two) == 5
    for a, b in zip(one, two, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=close)
        assert b["val_loss"] == pytest.approx(a["val_loss"], abs=close)
        wrong = b["val_top1_error"] * 21 / 100
        assert wrong == pytest.approx(round(wrong), abs=1e-6)
        assert b["val_top1_error"] == pytest.approx(a["val_top1_error"], abs=100 / 21 + 1e-6)


@pytest.fixture(scope="module")
def two_processes(store, tmp_path_factory):
    """A run of 12 steps in two processes that nothing happened to."""
    out = tmp_path_factory.mktemp("two") / "run"
    done = finished([*TORCHRUN, *command(store, out, "--batch-size", "16", "--epochs", "2")[1:]])
    assert done.returncode == 0, done.stderr
    return out


def kill_one(arguments, at: str) -> tuple[int, str, str, float]:
    """Start torchrun, kill its second process once a line begins with `at`. Exit status, stdout, stderr, and the
    seconds from the kill to the end."""
    started = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=environment())
    said = read_until(started, at)
    kill_second(started)
    began = time.monotonic()
    out, err = started.communicate(timeout=600)
    return started.returncode, said + out, err, time.monotonic() - began


def read_until(started, at: str) -> str:
    said = ""
    for line in started.stdout:
        said += line
        if line.startswith(at):
            break
    return said


def kill_second(torchrun) -> None:
    """SIGKILL the process of rank 1 that this torchrun started."""
    second = next(
        int(folder.name) for folder in Path("/proc").glob("[0-9]*")
        if str(torchrun.pid) == parent_of(folder) and b"RANK=1" in (folder / "environ").read_bytes().split(b"\0")
    )
    os.kill(second, signal.SIGKILL)


def parent_of(folder: Path) -> str:
    try:
        return (folder / "stat").read_text().rpartition(")")[2].split()[1]
    except OSError:  # it has ended
        return ""


def test_a_killed_process_ends_all_and_torchrun_goes_on(store, two_processes, tmp_path):
    """Without --max-restarts all end within a minute, in one line; with it the run goes on by itself, in its own folder
    without --out and --resume, and ends in the weights of a run that nothing happened to."""
    options = ["--batch-size", "16", "--epochs", "2"]
    status, _, err, seconds = kill_one([*TORCHRUN, *command(store, tmp_path / "run", *options)[1:]], "epoch  1")
    assert status == 1
    assert seconds < 60
    assert "error in process 0: another process of this run has ended" in err
    assert "in train_step" not in err  # no traceback of ours
    arguments = ["--data", str(store.path), "--workers", "0", *options]
    code = "import sys, pathlib, checkpoints, train; from utils import run_script\n"
    code += f"checkpoints.FOLDER = pathlib.Path({str(tmp_path)!r})\n"
    code += f"sys.argv[1:] = {arguments!r}; run_script(train.main)"
    restarting = [*TORCHRUN, "--max-restarts", "1", "--no-python", sys.executable, "-c", code]
    status, out, err, _ = kill_one(restarting, "epoch  1")
    assert status == 0, err
    assert f"{tmp_path / 'small-1'}, from step " in out
    assert len(list(tmp_path.glob("small-*"))) == 1
    assert_same_state(tmp_path / "small-1", two_processes)
    assert numbers(tmp_path / "small-1") == numbers(two_processes)


@pytest.fixture
def two_machines():
    """Two network namespaces with a wire between them: [(command that runs something there, its network card)]."""
    names = [f"alexnet-{os.getpid()}-{n}" for n in "ab"]
    cards = [f"a{os.getpid()}{n}" for n in "ab"]
    lines = [f"netns add {name}" for name in names]
    lines.append(f"link add {cards[0]} netns {names[0]} type veth peer name {cards[1]} netns {names[1]}")
    for name, card, address in zip(names, cards, ("10.83.7.1/24", "10.83.7.2/24"), strict=True):
        lines += [f"-n {name} addr add {address} dev {card}", f"-n {name} link set {card} up",
                  f"-n {name} link set lo up"]
    try:
        for line in lines:
            try:
                done = subprocess.run(["ip", *line.split()], capture_output=True, text=True)
                refused = done.stderr if done.returncode else ""
            except OSError as error:
                refused = str(error)
            if refused:
                pytest.skip(f"network namespaces need rights that are not there (ip {line}: {refused.strip()})")
        yield [(["ip", "netns", "exec", name], card) for name, card in zip(names, cards, strict=True)]
    finally:
        for name in names:
            with suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_machines_give_the_weights_of_two_processes_on_one(store, two_processes, two_machines, tmp_path):
    """Also where the second machine's process is killed: both start again and go on."""
    script = command(store, tmp_path / "run", "--batch-size", "16", "--epochs", "2")[1:]
    started = []
    for rank, (inside, card) in enumerate(two_machines):
        torchrun = [*TORCHRUN[:3], "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1"]
        torchrun += ["--master-addr", "10.83.7.1", "--master-port", "29511", "--max-restarts", "1"]
        started.append(subprocess.Popen([*inside, *torchrun, *script], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                                        stderr=subprocess.PIPE, env=environment(GLOO_SOCKET_IFNAME=card)))
    first = read_until(started[0], "epoch  1")
    kill_second(started[1])
    said = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "2 processes" in first
    assert ", from step " in said[0][0]
    assert_same_state(tmp_path / "run", two_processes)


def test_a_preempted_torchrun_hands_sigusr1_on(store, tmp_path):
    """Named for it as checkpoints/README.md says: both processes stop in good order, and the run can go on."""
    arguments = [*TORCHRUN, "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    arguments += command(store, tmp_path / "run", "--batch-size", "16", "--epochs", "50")[1:]
    started = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               env=environment())
    read_until(started, "epoch  1")
    started.send_signal(signal.SIGUSR1)
    out, _ = started.communicate(timeout=600)
    assert started.returncode == 1  # torchrun's own
    stopped = load(tmp_path / "run" / "last.pt")["step"]
    assert stopped > 6
    assert f"stopped at step {stopped}; " in out


def test_a_run_goes_on_in_another_number_of_processes(store, two_processes, tmp_path):
    """As the guide has it; three do not divide the batch of 16."""
    shutil.copytree(two_processes, tmp_path / "run")
    assert resume(tmp_path / "run", "--epochs", 3) == 0
    assert [entry["step"] for entry in numbers(tmp_path / "run")] == [6, 12, 18]
    three = [*TORCHRUN[:-1], "3", "train.py", "--resume", "--out", str(tmp_path / "run"), "--epochs", "4"]
    assert "--batch-size 16 does not divide by 3 processes" in finished(three).stderr


def test_an_error_in_one_process_ends_both_with_its_message(store, tmp_path):
    """The second process finds a damaged record in mid-epoch."""
    code = "import os, sys, train, data.loader; from utils import UserError, run_script; real = train.train_step\n"
    code += "def step(*a):\n    if os.environ['RANK'] == '1': raise UserError('picture 5: the checksum')\n"
    code += f"    return real(*a)\ntrain.train_step = step; sys.argv[1:] = {command(store, tmp_path / 'run')[2:]!r}\n"
    code += "sys.argv += ['--batch-size', '16']; run_script(train.main)"
    done = finished([*TORCHRUN, "--no-python", sys.executable, "-c", code])
    assert done.returncode == 1  # torchrun's own
    assert "error in process 1: picture 5: the checksum\n" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert "terminate called" not in done.stderr


def test_processes_with_other_arguments_or_another_store_are_refused(store, jpeg_store, tmp_path):
    words = {"lr": "0.01, not 0.02", "store": "jpeg, .*, not small, "}
    for name, shell in (
        ("lr", f"--data {store.path} --lr $(if [ $RANK = 1 ]; then echo 0.01; else echo 0.02; fi)"),
        ("store", f"--data $(if [ $RANK = 1 ]; then echo {jpeg_store.path}; else echo {store.path}; fi)"),
    ):
        line = f"exec {sys.executable} train.py --out {tmp_path / 'run'} --batch-size 16 {shell}"
        done = finished([*TORCHRUN, "--no-python", "bash", "-c", line])
        pattern = f"error in process 0: process 1 has another {name} than process 0: {words[name]}"
        assert re.search(pattern, done.stderr), done.stderr
        assert not (tmp_path / "run").exists()


def test_one_process_needs_none_of_this(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert processes.join("cpu") == (0, 1)
    assert processes.interrupted_run() is None
    assert processes.united({"b", "a"}) == ["a", "b"]
    assert processes.leave(3) == 3
    with pytest.raises(UserError), processes.ending_together():
        raise UserError("as it is")


def test_more_processes_than_gpus_are_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"process 3 of this machine finds 2 GPUs; start at most one a GPU"):
        processes.join(torch.device("cuda", 2))
