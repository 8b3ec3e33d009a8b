"""utils.py: command lines, progress, evaluation, seeds, whole files; it imports nothing of the project."""

import argparse
import errno
import io
import re
import subprocess
import sys
from functools import partial

import numpy as np
import numpy_layers as ref
import pytest
import torch
from helpers import ROOT, environment
from PIL import Image

import checkpoints
import utils
from data.augment import Augment
from data.loader import Loader
from model import AlexNet
from utils import UserError


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", "1e3", str(2**70)])
def test_whole_numbers(text):
    assert utils.whole(1)("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number, 1 or more"):
        utils.whole(1)(text)


@pytest.mark.parametrize("text", ["0", "-1", "1", "nan", "inf", "x", ""])
def test_numbers(text):
    assert utils.number(0, 1)("0.5") == 0.5
    assert utils.number(0, 1, including=True)("0") == 0
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number above 0 and below 1"):
        utils.number(0, 1)(text)


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UserError("no such thing"), 2, "error: no such thing\n"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device; put that right"),
        (PermissionError(13, "Permission denied", "/a/file"), 2, "error: /a/file: Permission denied; put that right"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_what_a_script_exits_with(error, status, text, capsys, monkeypatch):
    def main(argv):
        assert argv == ["--x"]
        raise error

    monkeypatch.setattr(sys, "argv", ["script", "--x"])
    with pytest.raises(SystemExit) as caught:
        utils.run_script(main)
    assert caught.value.code == status
    err = capsys.readouterr().err
    assert err.startswith(text)
    assert err.count("\n") == 1


@pytest.mark.parametrize(("error", "line"), [
    (UserError("no such thing"), b"error in process 1: no such thing\n"), (KeyboardInterrupt(), b"stopped\n"),
])
def test_a_message_is_one_write(error, line, monkeypatch):
    """Unbuffered, as with PYTHONUNBUFFERED=1: what print() writes in pieces, two processes mix."""
    pieces = []

    class Raw(io.RawIOBase):
        def writable(self):
            return True

        def write(self, piece):
            pieces.append(bytes(piece))
            return len(piece)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(Raw(), write_through=True))
    utils.report(error)
    assert [piece for piece in pieces if piece] == [line]
    print("a", "b", file=sys.stderr)
    assert len(pieces) > 2  # what is guarded against


@pytest.mark.parametrize("lines", [1, 100_000])  # of which the pipe holds some until the end
def test_a_reader_that_has_closed_the_pipe(lines):
    """`| head` ends a script without a word, with the status that a shell gives for SIGPIPE."""
    main = f"lambda _: sys.stdin.read() or [print(n) for n in range({lines})] and 0"
    code = f"import sys, utils; utils.run_script({main})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=environment(PYTHONUNBUFFERED=""))
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 141


@pytest.mark.parametrize("stream", [1, 2])
def test_a_closed_output(stream):
    """`>&-` and `2>&-`: what would go there is lost, and nothing else."""
    code = "import sys, utils\ndef main(_):\n    print('out')\n    raise utils.UserError('bad')\nutils.run_script(main)"
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {stream}>&-', sys.executable, code], cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (
        2, "out\n" if stream == 2 else "", "error: bad\n" if stream == 1 else "")


def test_a_bug_keeps_its_traceback():
    def main(_):
        raise ValueError("a bug, not a user's mistake")

    with pytest.raises(ValueError, match="a bug"):
        utils.run_script(main)


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        utils.Parser(prog="x", description="Words.").parse_args(["--help"])
    assert caught.value.code == 0
    assert "Words." in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59, "59s"), (200, "3m 20s"), (3720, "1h 02m")])
def test_durations(seconds, text):
    assert utils.duration(seconds) == text


def test_a_log_gets_a_plain_line_with_the_latest_note(monkeypatch, capsys):
    monkeypatch.setattr(utils, "PLAIN_INTERVAL", 0)
    with utils.Progress("epoch 1/2", 300, start=100) as bar:
        bar.update(50, "loss 2.000, error 80.0%")
        bar.update(50)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for line, done in zip(lines, (150, 200), strict=True):
        assert re.fullmatch(rf"epoch 1/2: {done}/300 images, \d+/s, \d+s left, loss 2.000, error 80.0%", line)


def test_it_is_silent_where_it_should_be(monkeypatch, capsys):
    monkeypatch.setattr(utils, "PLAIN_INTERVAL", 0)
    with utils.Progress("epoch 1/2", 100, silent=True) as bar:
        bar.update(50)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_with_rate_time_left_and_note(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with utils.Progress("epoch 1/2", 300) as bar:
        bar.update(150, "loss 2.000, error 80.0%")
        bar.bar.refresh()
    assert re.search(r"epoch 1/2: +50%.*150/300 \[.*<.* images/s, loss 2.000, error 80.0%\]", terminal.getvalue())


def test_error_counts_by_numpy():
    scores = torch.randn(200, 9)
    labels = torch.randint(9, (200,))
    order = np.argsort(-scores.numpy(), axis=1)
    top1 = (order[:, 0] != labels.numpy()).sum()
    top5 = sum(label not in row[:5] for row, label in zip(order, labels.tolist(), strict=True))
    assert utils.error_counts(scores, labels).tolist() == [top1, top5]
    assert utils.error_counts(scores[:, :3], labels % 3).tolist()[1] == 0  # three classes: always among the best five


@pytest.mark.parametrize("ten_crop", [False, True])
def test_evaluate_averages_softmax_outputs(store, ten_crop):
    """Two nets, one or ten crops, against numpy: softmax of each output, mean, then errors and cross-entropy."""
    torch.manual_seed(0)
    nets = [AlexNet(4, image_size=64, lrn=False).eval() for _ in range(2)]
    inputs = Augment(64, store.mean)
    for net in nets:
        torch.nn.init.normal_(net.fc8.weight, 0, 0.3)  # so that the outputs are far apart
    images, labels = (torch.from_numpy(x) for x in store.split("val").read(np.arange(21)))
    outputs = []
    with torch.no_grad():
        for net in nets:
            for view in inputs.ten_crop(images) if ten_crop else [inputs.center(images)]:
                logits = net(view).double().numpy()
                e = np.exp(logits - logits.max(1, keepdims=True))
                outputs.append(e / e.sum(1, keepdims=True))
    mean = np.mean(outputs, 0)
    members = [(net, partial(inputs.views, ten_crop=ten_crop)) for net in nets]
    sums = utils.evaluate(members, Loader(store, "val").in_order(8))
    assert sums[0].item() == pytest.approx(-np.log(mean[np.arange(21), labels]).sum(), rel=1e-5)
    assert sums[1].item() == (mean.argmax(1) != labels.numpy()).sum()


def test_ten_crops_by_pil_and_numpy(store):
    """The paper's test (section 4.1) without this project's crops: PIL crops and flips, the mean image's centre
    subtracted, numpy's softmax averaged over the ten."""
    net = AlexNet(4, image_size=64, lrn=False).eval()
    torch.nn.init.normal_(net.fc8.weight, 0, 0.3)
    images, _ = store.split("val").read(np.arange(5))
    by_hand = []
    for pixels in images:
        outputs, mean = [], store.mean[4:68, 4:68].astype(np.float64)
        for left, top in ((0, 0), (8, 0), (0, 8), (8, 8), (4, 4)):
            crop = Image.fromarray(pixels).crop((left, top, left + 64, top + 64))
            for view in (crop, crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
                inputs = torch.from_numpy((np.asarray(view) - mean).transpose(2, 0, 1)).float()[None]
                with torch.no_grad():
                    outputs.append(ref.softmax(net(inputs)[0].double().numpy()))
        by_hand.append(np.mean(outputs, 0))
    inputs = Augment(64, store.mean)
    found = utils.probabilities([(net, inputs.ten_crop)], torch.from_numpy(images))
    np.testing.assert_allclose(found.numpy(), by_hand, rtol=1e-4)


def test_the_shares_of_three_processes_add_up(store):
    members, loader = [(AlexNet(4, image_size=64).eval(), Augment(64, store.mean).views)], Loader(store, "val")
    whole = utils.evaluate(members, loader.in_order(128))
    parts = sum(utils.evaluate(members, loader.in_order(4, rank, 3)) for rank in range(3))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert utils.evaluate(members, []).tolist() == [0, 0, 0]  # more processes than pictures


def test_unlabelled_pictures_add_nothing_to_the_loss():
    outputs = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], dtype=torch.float64)
    assert utils.score(outputs, torch.tensor([0, -1]))[0].item() == pytest.approx(np.log(2))


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"the last sound one")
    with pytest.raises(UserError, match="w is no longer finite at step 7"):
        checkpoints.save_checkpoint(tmp_path / "x.pt", {"model": {"w": torch.tensor([1.0, float("nan")])}, "step": 7})
    assert (tmp_path / "x.pt").read_bytes() == b"the last sound one"


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "x.pt").write_bytes(b"the last sound one")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for target in ("torch.save", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(target, full)
            with pytest.raises(UserError, match=r"No space left on device; \d+ MB are free"):
                checkpoints.save_checkpoint(tmp_path / "x.pt", {"model": {}, "step": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]
    assert (tmp_path / "x.pt").read_bytes() == b"the last sound one"


def test_seeds_are_apart():
    draws = set()
    for numbers in ((0,), (0, 1, 0), (0, 2, 0), (1, 1, 0), (0, 1, 1)):
        utils.seed_all(*numbers)
        draws.add(torch.rand(1).item())
    assert len(draws) == 5
    utils.seed_all(0, 2, 0)
    assert torch.rand(1).item() in draws


def test_torch_is_imported_where_it_is_used():
    """So that data.store can be read without it."""
    code = "import sys, data.store; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
