"""benchmarks/: each runs, small, and what it says of its contenders and limits is right."""

import json
import re
import sys
import tarfile
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import infer, loader, lrn, pack, step
from benchmarks.timing import interleaved, milliseconds, pictures
from data.augment import Augment
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
    names = ["usual module, fused SGD, memory kept", "this, --kernels off"]
    step.main([*options, "--only", *names, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert list(result["contenders"]) == names
    for entry in result["contenders"].values():
        assert entry["n"] == 3
        assert entry["median_ms"] > 0
        assert 200 < entry["memory_mb"] < 1000  # 22 million weights, gradients and momenta are 260
    assert result["load"] >= 0


def test_the_ratio_that_counts_is_against_the_fastest_form():
    def entry(ms):
        return {"median_ms": ms, "quartiles_ms": [ms, ms], "memory_mb": 1, "parts_ms": {"LRN": 3.0, "update": 1.0}}

    found = {"usual module": entry(8), "usual module, fused SGD": {"skipped": "ImportError: no such thing"},
             "usual module, fused SGD, memory kept": entry(6), "this": entry(4), "this, in fp32": entry(12),
             "torchvision's alexnet (another net)": entry(1)}
    text = step.report({"contenders": found, "size": 64, "batch": 2, "precision": "bf16", "device": "x", "threads": 1,
                        "torch": "2", "load": 0.5, "flops": 3e9, "product_rate": 1e12})
    lines = {line[:62].strip(): line[62:].split() for line in text.splitlines()}
    assert lines["this"][-4:] == ["2.00", "1.50", "1", "75%"]
    assert lines["this, in fp32"][-4:] == ["0.67", "0.50", "1", "-"]
    assert "skipped: ImportError: no such thing" in text
    assert "the fastest form of the usual module: usual module, fused SGD, memory kept" in text
    assert "where the time of 'this' goes, ms: LRN 3.0 (75%), update 1.0 (25%)" in text


def test_where_linux_does_not_tell_the_memory_the_times_stay(monkeypatch):
    def refuse(path, _):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    assert step.peak(lambda: None, 0, CPU) is None
    entry = {"median_ms": 8, "quartiles_ms": [8, 8], "memory_mb": None, "parts_ms": None}
    text = step.report({"contenders": {"usual module": entry}, "size": 64, "batch": 2, "precision": "fp32",
                        "device": "x", "threads": 1, "torch": "2", "load": 0.5, "flops": 3e9, "product_rate": 1e12})
    assert text.splitlines()[2].split()[-4:] == ["1.00", "1.00", "-", "38%"]


def test_the_parts_of_a_step():
    contender, args = step.Contender("plain"), Namespace(size=64, batch=2, classes=4, precision="fp32")
    spent = step.parts(step.make_step(contender, args, CPU), CPU)
    assert all(spent[part] > 0 for part in ("convolutions", "dense layers", "LRN", "max-pools"))


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
    contender = step.Contender(kind, fused=kind != "torchvision")
    train = step.make_step(contender, Namespace(size=64, batch=4, classes=4, precision="fp32"), CPU)
    before = [p.detach().clone() for p in nets[0].parameters()]
    train()
    assert nets[0].training
    assert not any(torch.equal(old, new) for old, new in zip(before, nets[0].parameters(), strict=True))
    if kind == "usual":
        assert [p.shape for p in before] == [p.shape for p in AlexNet(4, image_size=64).parameters()]


def test_who_takes_part(monkeypatch):
    """The usual module in all its forms, memory kept on a CPU only; fp32 beside bf16; a word that no name holds is an
    error."""
    asked = []
    monkeypatch.setattr(step, "race", lambda names, *_: asked.append(names) or {})
    monkeypatch.setattr(step, "product_rate", lambda *_: 1.0)
    for precision in ("fp32", "bf16"):
        step.main(["--size", "64", "--batch", "2", "--device", "cpu", "--precision", precision, "--json"])
    assert sum(name.startswith("usual module, fused") for name in asked[0]) == 2**3
    assert asked[0] == [name for name in step.CONTENDERS if "in fp32" not in name]
    assert asked[1] == list(step.CONTENDERS)
    with pytest.raises(UserError, match="no contender has that in its name"):
        step.main(["--only", "caffe", "--device", "cpu"])
    monkeypatch.setattr(step.utils, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(step, "machine", lambda device: {})
    step.main(["--size", "64", "--json"])
    assert sum(name.startswith("usual module, fused") for name in asked[2]) == 2**2
    assert not any("memory" in name for name in asked[2])


def test_infer(capsys):
    """This repository and the peer take the same views to the same probabilities, if they have the same weights."""
    infer.main(["--size", "64", "--batches", "2", "3", "--classes", "4", "--repeats", "3", "--device", "cpu",
                "--only", "this", "torchvision", "--json"])
    result = json.loads(capsys.readouterr().out)
    for protocol in ("center", "ten-crop"):
        assert list(result["images_per_second"][protocol]) == ["2", "3"]
        for found in result["images_per_second"][protocol].values():
            assert list(found) == ["this", "this, --kernels off", "torchvision's alexnet (another net)"]
            assert all(entry["images_per_second"] > 0 for entry in found.values())
    found["usual module"], found["this, --kernels off"] = found["this"], {"skipped": "ImportError: no such thing"}
    text = infer.report(result)
    assert "skipped: ImportError: no such thing" in text
    assert re.search(r"  this +[\d.]+ +[\d.]+\.\.[\d.]+  1.00", text)
    net = AlexNet(4, image_size=64).eval()
    floats = pictures(2, 72)
    raw = (floats + 128).clamp(0, 255).byte()
    augment = Augment(64, torch.full((72, 72, 3), 128.0))
    for ten_crop in (False, True):
        mine = infer.ours(net, augment, raw.permute(0, 2, 3, 1), ten_crop, "fp32")()
        same = infer.theirs(net, raw.float() - 128, ten_crop, Namespace(size=64, precision="fp32"))()
        torch.testing.assert_close(mine.float(), same, rtol=1e-4, atol=1e-6)
        if find_spec("onnxruntime") and find_spec("onnxscript"):
            args = Namespace(size=64, precision="fp32")
            found = infer.in_onnx_runtime(net, raw.permute(0, 2, 3, 1), ten_crop, args, torch.device("cpu"))()
            torch.testing.assert_close(found, same, rtol=1e-4, atol=1e-6)


def test_the_operations_of_a_step_are_counted_as_by_hand():
    """Outputs times weights of each layer, forward, and twice that backward, but for the pictures' own gradient."""
    sides = {"conv1": 55, "conv2": 27, "conv3": 13, "conv4": 13, "conv5": 13, "fc6": 1, "fc7": 1, "fc8": 1}
    net = AlexNet()
    products = {name: getattr(net, name).weight.numel() * side**2 for name, side in sides.items()}
    assert step.step_flops(224, 3, 1000) == 3 * 2 * (3 * sum(products.values()) - products["conv1"])


def test_lrn(capsys, monkeypatch):
    lrn.main(["--batch", "2", "--repeats", "3", "--device", "cpu", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["shape"] == [2, 96, 55, 55]
    for layout in ("contiguous", "channels_last"):
        found = result["layouts"][layout]
        assert all(found[name]["median_ms"] > 0 for name in ("F.local_response_norm", "model.LocalResponseNorm"))
        assert "kernels.py, C" in found
    assert result["bytes"] == 5 * 4 * 2 * 96 * 55 * 55
    monkeypatch.setattr(torch, "compile", lambda net, **_: net)  # nothing below is about it
    for other in (["--dtype", "float16"], ["--size", "17"]):
        lrn.main(["--batch", "2", "--repeats", "3", "--device", "cpu", *other])
        printed = capsys.readouterr().out
        assert "kernels.py, C                                -  skipped: not for this machine" in printed
    assert printed.startswith("LRN over 17 channels, forward")


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision")
def test_loader(capsys, monkeypatch):
    """All but training; a peer that is not installed is named."""
    times = {"median_ms": 2.0, "quartiles_ms": [1.0, 3.0], "n": 3}
    monkeypatch.setattr(loader, "training", lambda *_: {"store": times, "fixed": times})
    monkeypatch.setattr(loader, "RESIDENT", 256)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    loader.main(["--count", "100", "--batch", "16", "--repeats", "3"])
    text = capsys.readouterr().out
    assert len(re.findall(r"skipped: .*webdataset.*; benchmarks/requirements.txt brings it", text)) == 6
    assert text.count("  this  ") == 4
    assert text.count("  ImageFolder + v2, decode_jpeg") == 2
    assert text.count("times 'DataLoader + v2 of a memory map'") == 2
    assert text.count("times 'ImageFolder + v2, simplejpeg'") == 2
    assert "2.0 ms a step, 2.0 ms on one fixed batch: +0.0%" in text


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision")
@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_peers_read_the_same_pictures(kind, tmp_path, monkeypatch):
    """Each picture once, with its label, as it is or mirrored; crops are as large as the pictures here. PIL and
    torchvision decode to pixels up to 3 of 255 away."""
    monkeypatch.setattr(loader, "CROP", loader.STORED)
    made = loader.squares(None, 24)
    stores = loader.make_files(tmp_path, made)
    for codec in ("raw", "jpeg"):
        readers = {"this": loader.ours(stores[codec], 8, kind)}
        readers |= loader.peers(codec, tmp_path, stores["jpeg"], 8, kind)
        found = {name: {} for name in readers if not isinstance(readers[name], str)}
        for name, seen in found.items():
            for batch, labels in readers[name]():
                assert batch.dtype == getattr(torch, kind)
                last = batch if batch.shape[3] == 3 else batch.permute(0, 2, 3, 1)
                seen |= {label: p.float() for label, p in zip(labels.tolist(), last.clone(), strict=True)}
            assert sorted(seen) == list(range(24))
            for label, picture in seen.items():
                right = found["this"][label]
                near = min((picture - p).abs().max().item() for p in (right, right.flip(1)))
                assert near <= (0.01 if "simplejpeg" in name or codec == "raw" else 3), (name, label)


def test_more_in_a_batch_than_there_are():
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


def test_the_loaders_peers_make_the_same_crops():
    picture = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    given = {"PIL": Image.fromarray(picture), "simplejpeg": torch.from_numpy(picture).permute(2, 0, 1)}
    for decoder, one in given.items():
        crop = loader.transforms(decoder)(one)
        assert (tuple(crop.shape), crop.dtype) == ((3, 224, 224), torch.uint8)


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
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "notes.md").touch()
    pack.main(["--pictures", str(tmp_path), "--repeats", "2", "--json"])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["pictures"] == 1
    assert "1 files are not named like pictures" in printed.err
    assert "1 pictures of" in pack.report(json.loads(printed.out))
    (tmp_path / "00003.JPEG").unlink()
    with pytest.raises(UserError, match="holds no JPEG files"):
        pack.main(["--pictures", str(tmp_path)])
