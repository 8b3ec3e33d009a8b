"""benchmarks/: each runs, small, and what it says of its contenders and limits is right."""

import json
import re
import sys
import tarfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import loader, lrn, pack, step
from benchmarks.timing import interleaved, milliseconds, pictures
from data.store import open_record
from model import AlexNet
from utils import UserError

CPU = torch.device("cpu")


def test_turns_are_taken_and_the_first_is_not_counted():
    calls = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 3, CPU)
    assert calls == list("abababab")
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}
    assert milliseconds([0.001, 0.003, 0.002]) == {"median_ms": 2.0, "quartiles_ms": [1.0, 3.0], "n": 3}


def test_step_in_processes_of_their_own(capsys):
    options = ["--size", "64", "--batch", "2", "--classes", "4", "--repeats", "3", "--device", "cpu"]
    step.main([*options, "--only", "huge", "kernels off", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert list(result["contenders"]) == ["usual module, huge pages", "this, --kernels off"]
    for entry in result["contenders"].values():
        assert entry["n"] == 3
        assert entry["median_ms"] > 0
        assert 200 < entry["memory_mb"] < 1000  # 22 million weights, gradients and momenta are 260
        assert all(entry["parts_ms"][part] > 0 for part in ("convolutions", "dense layers", "LRN", "max-pools"))
    text = step.report(result | {"contenders": {"usual module": result["contenders"]["this, --kernels off"],
                                                "this": {"skipped": "ImportError: no such thing"}}})
    assert "skipped: ImportError: no such thing" in text
    assert "where the time of 'usual module' goes" in text


class Pipe:
    """What a contender's process talks to: the words that it hears, and its answers."""

    def __init__(self, *words):
        self.words, self.answers = list(words), []

    def recv(self):
        return self.words.pop(0)

    def send(self, answer):
        self.answers.append(answer)


def test_a_contender_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)  # as if it were not installed
    args, pipe = Namespace(size=64, batch=2, classes=4, precision="fp32"), Pipe("warm up", "step")
    step.contend(pipe, "torchvision's alexnet (another net)", args, CPU)
    assert len(pipe.answers) == 1
    assert pipe.answers[0].startswith("ModuleNotFoundError")


@pytest.mark.parametrize("kind", ["usual", "torchvision", "plain", "fast"])
def test_every_kind_of_step_trains(kind, monkeypatch):
    """All its weights move, and the usual module has the weights of the paper's table."""
    make, nets = step.make_net, []
    monkeypatch.setattr(step, "make_net", lambda *a: nets.append(make(*a)) or nets[0])
    train = step.make_step(step.Contender(kind), Namespace(size=64, batch=4, classes=4, precision="fp32"), CPU)
    before = [p.detach().clone() for p in nets[0].parameters()]
    train()
    assert nets[0].training
    assert not any(torch.equal(old, new) for old, new in zip(before, nets[0].parameters(), strict=True))
    if kind == "usual":
        assert [p.shape for p in before] == [p.shape for p in AlexNet(4, image_size=64).parameters()]


def test_who_takes_part(monkeypatch):
    """What is for GPUs only stays away from a CPU; a word that no name holds is an error."""
    asked = []
    monkeypatch.setattr(step, "race", lambda names, *_: asked.extend(names) or {})
    monkeypatch.setattr(step, "product_rate", lambda *_: 1.0)
    step.main(["--size", "64", "--batch", "2", "--device", "cpu", "--json"])
    assert asked == [name for name, contender in step.CONTENDERS.items() if contender.only != "cuda"]
    with pytest.raises(UserError, match="no contender has that in its name"):
        step.main(["--only", "caffe", "--device", "cpu"])


def test_the_operations_of_a_step_are_counted_as_by_hand():
    """Outputs times weights of each layer, forward, and twice that backward, but for the pictures' own gradient."""
    sides = {"conv1": 55, "conv2": 27, "conv3": 13, "conv4": 13, "conv5": 13, "fc6": 1, "fc7": 1, "fc8": 1}
    net = AlexNet()
    products = {name: getattr(net, name).weight.numel() * side**2 for name, side in sides.items()}
    assert step.step_flops(224, 3, 1000) == 3 * 2 * (3 * sum(products.values()) - products["conv1"])


def test_lrn(capsys):
    lrn.main(["--batch", "2", "--repeats", "3", "--device", "cpu", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["shape"] == [2, 96, 55, 55]
    for layout in ("contiguous", "channels_last"):
        found = result["layouts"][layout]
        assert all(found[name]["median_ms"] > 0 for name in ("F.local_response_norm", "model.LocalResponseNorm"))
        assert "kernels.py, C" in found
    assert result["bytes"] == 5 * 4 * 2 * 96 * 55 * 55
    lrn.main(["--batch", "2", "--repeats", "3", "--device", "cpu", "--dtype", "float16"])
    assert "kernels.py, C                                -  skipped: not for this machine" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision")
def test_loader(capsys, monkeypatch):
    """All but training; a peer that is not installed is named."""
    times = {"median_ms": 2.0, "quartiles_ms": [1.0, 3.0], "n": 3}
    monkeypatch.setattr(loader, "training", lambda *_: {"store": times, "fixed": times})
    monkeypatch.setattr(loader, "RESIDENT", 256)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    loader.main(["--count", "100", "--batch", "16", "--repeats", "3"])
    text = capsys.readouterr().out
    assert len(re.findall(r"skipped: .*webdataset.*; benchmarks/requirements.txt brings it", text)) == 4
    assert text.count("this, JPEG records") == text.count("ImageFolder + v2, decode_jpeg") == 2
    assert "2.0 ms a step, 2.0 ms on one fixed batch: +0.0%" in text


def test_more_in_a_batch_than_there_are(capsys):
    with pytest.raises(UserError, match="less than a batch"):
        loader.main(["--count", "100", "--batch", "200"])
    assert pictures(6001, 64).shape == (6001, 3, 64, 64)  # the sample has 6,000


def test_the_loaders_peers_get_the_same_bytes(tmp_path):
    stores = loader.make_files(tmp_path, loader.squares(None, 12))
    records, files = stores["jpeg"].split("train"), sorted((tmp_path / "tree").rglob("*.jpg"), key=lambda p: p.stem)
    coded = []
    records._each(np.arange(12), lambda row, value: coded.append(bytes(open_record(value, check=True)[0])))
    assert [file.read_bytes() for file in files] == coded
    with tarfile.open(tmp_path / "shard.tar") as shard:
        names = [f"{number:06d}.{ending}" for number in range(12) for ending in ("jpg", "cls")]
        assert shard.getnames() == names
        assert [shard.extractfile(name).read() for name in names[::2]] == coded
    assert loader.kilobytes(tmp_path) == pytest.approx(np.mean([len(one) for one in coded]) / 1000)
    again = loader.squares(str(tmp_path / "tree"), 15)  # of a folder, over and over
    assert again.shape == (15, 256, 256, 3)
    assert np.array_equal(again[:3], again[12:])
    assert np.array_equal(stores["raw"].split("train").read(np.arange(12))[0], np.load(tmp_path / "pixels.npy"))


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_the_loaders_peers_make_the_same_kind_of_crops(kind, store):
    picture = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    for tensors, given in ((True, torch.from_numpy(picture).permute(2, 0, 1)), (False, Image.fromarray(picture))):
        crop = loader.transform(store, kind, tensors)(given)
        assert (tuple(crop.shape), crop.dtype) == ((3, 224, 224), getattr(torch, kind))


def test_training_from_a_store_and_on_one_batch(store):
    measured = loader.training(store, 64, 16, 4)
    assert {kind: entry["n"] for kind, entry in measured.items()} == {"store": 4, "fixed": 4}


def test_packing(capsys, tmp_path):
    pack.main(["--count", "12", "--repeats", "2", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["pictures"] == 12
    assert 60 < result["kilobytes"] < 160  # ILSVRC's average is 110
    assert {name for name, entry in result["rates"].items() if entry["kilobytes"]} == {
        "data.pack, JPEG records", "data.pack, raw records"
    }
    assert all(entry["median"] > 0 for entry in result["rates"].values())
    pack.photograph(tmp_path, 3, 50)
    pack.main(["--pictures", str(tmp_path), "--repeats", "2"])
    assert "1 pictures of" in capsys.readouterr().out
