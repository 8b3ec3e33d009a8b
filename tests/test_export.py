"""checkpoints/export.py: files for other programs give what the net gives, and say nothing of this machine."""

import json
import math
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

import checkpoints
import test
import train
from checkpoints import export, load_checkpoint, load_model
from data.manifest import WARPED
from model import AlexNet
from utils import UserError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("safetensors")

NETS = {
    "one column": {}, "two columns": {"columns": 2}, "the 2012 order": {"columns": 2, "order": "2012"},
    "across": {"columns": 2, "lrn_across": True, "lrn_k": 1.0}, "frelu": {"activation": "frelu"},
    "srelu": {"activation": "srelu"}, "prelu": {"activation": "prelu"}, "no lrn": {"lrn": False},
    "no overlap": {"overlapping_pool": False},
}


def checkpoint_of(net, path, grey=False, **more):
    """A checkpoint of a net with weights large enough for its outputs to differ."""
    size, classes = net.config["image_size"], net.config["num_classes"]
    stored = size * 9 // 8
    content = {
        "model": net.state_dict(), "config": net.config, "classes": [f"<b>class {n}</b>" for n in range(classes)],
        "wnids": None, "mean": 120 + 20 * torch.rand(stored, stored, 1 if grey else 3), "store_size": stored,
        "resize": "shorter side, antialiased bilinear, centre", "image_size": size, "epoch": 1, "step": 1, "best": 1.0,
        "dataset": "x", "store": "",
    }
    torch.save(content | more, path)
    return path


def lively(net):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("fc8.weight") or name.endswith("classifier.6.weight"):
                parameter.mul_(30)
    return net


def outputs(path, pictures):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], {"pictures": pictures})[0]


@pytest.mark.parametrize("name", NETS)
def test_onnx_gives_the_nets_probabilities(name, tmp_path, capsys):
    """Of every kind of net, at any batch size; LRN is ONNX's own operator, once a column."""
    net = lively(AlexNet(5, image_size=64, **NETS[name]))
    path = checkpoint_of(net, tmp_path / "net.pt")
    assert export.main([str(path), str(tmp_path / "net.onnx")]) == 0
    assert "checked in ONNX Runtime" in capsys.readouterr().out
    model, prepare = load_model(path)
    for count in (1, 7):
        squares = np.random.default_rng(count).integers(0, 256, (count, 72, 72, 3), np.uint8)
        with torch.no_grad():
            right = model(prepare([Image.fromarray(s) for s in squares])).softmax(1).numpy()
        found = outputs(tmp_path / "net.onnx", np.ascontiguousarray(squares[:, 4:68, 4:68]))
        np.testing.assert_allclose(found, right, atol=1e-5)
        assert (found.argmax(1) == right.argmax(1)).all()
    operators = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    columns = 1 if net.config["lrn_across"] else net.config["columns"]
    assert operators.count("LRN") == (2 * columns if net.config["lrn"] else 0)


@pytest.mark.parametrize("kind", ["grey", "torchvision"])
def test_onnx_of_grey_nets_and_of_torchvisions(kind, tmp_path):
    """A grey net takes RGB, and turns it grey as Pillow does."""
    torch.manual_seed(0)
    net = AlexNet(3, image_size=64) if kind == "grey" else checkpoints.torchvision_net(4, 224)
    path = checkpoint_of(lively(net), tmp_path / "net.pt", grey=kind == "grey")
    export.main([str(path), str(tmp_path / "net.onnx")])
    size = net.config["image_size"]
    edge = size // 16
    squares = np.random.default_rng(0).integers(0, 256, (3, size + 2 * edge, size + 2 * edge, 3), np.uint8)
    model, prepare = load_model(path)
    with torch.no_grad():
        right = model(prepare([Image.fromarray(s) for s in squares])).softmax(1).numpy()
    crops = np.ascontiguousarray(squares[:, edge : edge + size, edge : edge + size])
    np.testing.assert_allclose(outputs(tmp_path / "net.onnx", crops), right, atol=1e-5)


def test_onnx_says_how_to_use_it_and_nothing_of_this_machine(run_folder, store, tmp_path):
    export.main([str(run_folder / "best.pt"), str(tmp_path / "net.onnx")])
    about = onnxruntime.InferenceSession(tmp_path / "net.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == store.classes
    assert (about["store_size"], about["image_size"]) == ("72", "64")
    assert about["resize"] == store.manifest["resize"]
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model)
    for weights in model.graph.initializer:
        weights.raw_data = b""
    content = model.SerializeToString()
    assert not [word for word in (str(ROOT).encode(), b"/", b".py") if word in content]


def test_a_file_that_differs_is_not_written(run_folder, tmp_path, monkeypatch):
    real = export.OnnxLRN.__init__

    def louder(self, plain):
        real(self, plain)
        self.numbers["alpha"] *= 50

    monkeypatch.setattr(export.OnnxLRN, "__init__", louder)
    with pytest.raises(UserError, match="away from the net's; nothing was written"):
        export.main([str(run_folder / "best.pt"), str(tmp_path / "net.onnx")])
    assert not list(tmp_path.iterdir())


def test_safetensors_come_back_to_the_bit(run_folder, store, tmp_path, capsys):
    out = tmp_path / "net.safetensors"
    export.main([str(run_folder / "best.pt"), str(out)])
    before, after = load_checkpoint(run_folder / "best.pt"), load_checkpoint(out)
    assert all(torch.equal(before["model"][name], after["model"][name]) for name in before["model"] | after["model"])
    assert torch.equal(before["mean"], after["mean"])
    same = set(checkpoints.KEYS) - {"model", "mean", "store"}
    assert {key: before[key] for key in same} == {key: after[key] for key in same}
    results = []
    for path in (run_folder / "best.pt", out):
        capsys.readouterr()
        test.main([str(path), "--data", str(store.path), "--json"])
        results.append(json.loads(capsys.readouterr().out)["loss"])
    assert results[0] == results[1]
    train.main(["--data", str(store.path), "--init", str(out), "--max-steps", "1", "--out", str(tmp_path / "run")])
    assert str(store.path.parent).encode() not in out.read_bytes()[:4000]  # where the store was is nobody's business


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"), (b"\x00" * 7, "is damaged"), (struct.pack("<Q", 2**62) + b"{}", "is damaged"),
        (struct.pack("<Q", 2) + b"{}", "is damaged"), (struct.pack("<Q", 5) + b"hello", "is damaged"),
    ],
)
def test_safetensors_of_other_kinds_are_one_line(content, message, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / "x.safetensors")


def test_checkpoints_with_more_in_them_are_exported(run_folder, tmp_path):
    """Weights that share memory, and an entry of somebody else's."""
    content = torch.load(run_folder / "best.pt", weights_only=True)
    content["model"]["conv4.bias"] = content["model"]["conv3.bias"]
    torch.save(content | {"notes": {"a": torch.zeros(1)}}, tmp_path / "more.pt")
    export.main([str(tmp_path / "more.pt"), str(tmp_path / "more.safetensors")])
    assert torch.equal(load_checkpoint(tmp_path / "more.safetensors")["model"]["conv4.bias"],
                       content["model"]["conv3.bias"])


def test_a_config_that_is_too_large_for_its_weights_takes_no_memory(run_folder, tmp_path):
    content = torch.load(run_folder / "best.pt", weights_only=True)
    huge = content["config"] | {"image_size": 200_000}
    changed = {"config": huge, "image_size": 200_000, "store_size": 200_000, "mean": torch.zeros(1, 1, 3)}
    torch.save(content | changed, tmp_path / "huge.pt")
    with pytest.raises(UserError, match=r"the weights do not fit the net: fc6.weight is"):
        load_model(tmp_path / "huge.pt")


def test_a_converted_net_without_a_best_error_gives_a_header_of_strict_json(run_folder, tmp_path):
    from safetensors import safe_open

    def refuse(word):
        raise AssertionError(word)

    path = tmp_path / "net.safetensors"
    torch.save(load_checkpoint(run_folder / "best.pt") | {"best": math.inf}, tmp_path / "converted.pt")
    export.main([str(tmp_path / "converted.pt"), str(path)])
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["alexnet"], parse_constant=refuse)
    assert about["best"] is None
    assert load_checkpoint(path)["best"] == math.inf


def test_a_flipped_bit_in_safetensors_is_refused(run_folder, tmp_path):
    """In a weight or in a class's name; a file without a checksum, from before, is taken as it is. The same net gives
    the same bytes."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "net.safetensors"
    export.main([str(run_folder / "best.pt"), str(path)])
    content = path.read_bytes()
    for where in (len(content) // 2, content.index(b"class 1")):
        damaged = bytearray(content)
        damaged[where] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            load_checkpoint(path)
    path.write_bytes(content)
    for _ in range(3):
        export.main([str(run_folder / "best.pt"), str(path)])
        assert path.read_bytes() == content
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["alexnet"])
    del about["crc32"]
    save_file(load_file(path), tmp_path / "old.safetensors", {"alexnet": json.dumps(about)})
    assert load_checkpoint(tmp_path / "old.safetensors")["classes"] == load_checkpoint(path)["classes"]


def test_headers_that_lie_are_one_line(run_folder, tmp_path):
    """A metadata entry of another kind, a config that fits no weights, a mean of another size."""
    from safetensors.torch import load_file, save_file

    export.main([str(run_folder / "best.pt"), str(tmp_path / "good.safetensors")])
    tensors = load_file(tmp_path / "good.safetensors")
    about = {k: v for k, v in load_checkpoint(run_folder / "best.pt").items() if k not in ("model", "mean", "store")}
    for number, (change, message) in enumerate([
        ({"classes": "cat"}, "invalid classes"), ({"resize": "folded"}, "invalid resize"),
        ({"config": about["config"] | {"columns": 2}}, "the weights do not fit the net"),
        ({"store_size": 71}, "invalid mean"), ({"config": None}, "invalid config"),
    ]):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path, {"alexnet": json.dumps(about | change)})
        with pytest.raises(UserError, match=message):
            load_model(path)
    save_file(tensors, tmp_path / "a.safetensors", {"alexnet": "[1, 2]"})
    with pytest.raises(UserError, match="is damaged"):
        load_model(tmp_path / "a.safetensors")


def test_what_cannot_be_written_is_one_line(run_folder, tmp_path, monkeypatch):
    best = str(run_folder / "best.pt")
    for arguments, message in (
        ([best, "net.pb"], r"has to end with .onnx or .safetensors"), ([best, "/nowhere/net.onnx"], "no such folder"),
        (["nowhere.pt", str(tmp_path / "net.onnx")], "no such checkpoint"),
        ([best, "/dev/full.onnx"], "could not be written"),
    ):
        with pytest.raises(UserError, match=message):
            export.main(arguments) if "full" not in arguments[1] else full_disk(arguments, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(export, "LARGEST", 10**6)
        with pytest.raises(UserError, match=r"take 0.1 GB, and an .onnx file holds at most 2; write a .safetensors"):
            export.main([best, str(tmp_path / "large.onnx")])
    (tmp_path / "net.onnx").write_bytes(b"")
    with pytest.raises(UserError, match="is for ONNX Runtime and the like"):
        test.main([str(tmp_path / "net.onnx")])
    monkeypatch.setattr(checkpoints.importlib.util, "find_spec", lambda name: None)
    for name in ("net.onnx", "net.safetensors"):
        with pytest.raises(UserError, match=r"needs the package \w+: pip install -r checkpoints/requirements.txt"):
            export.main([best, str(tmp_path / name)])


def full_disk(arguments, tmp_path):
    """A file system without room: nothing of the file stays."""
    script = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000000, 1000000)); "
        "from checkpoints import export; import utils, sys; sys.argv = ['x', *sys.argv[1:]]; "
        "utils.run_script(export.main)"
    )
    out = tmp_path / "full" / "net.onnx"
    out.parent.mkdir()
    command = [sys.executable, "-c", script, arguments[0], str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert not list(out.parent.iterdir())
    raise UserError(done.stderr)


def test_a_warped_picture_is_said_to_be_warped(tmp_path):
    path = checkpoint_of(lively(AlexNet(3, image_size=64)), tmp_path / "net.pt", resize=WARPED)
    export.main([str(path), str(tmp_path / "net.onnx")])
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert session.get_modelmeta().custom_metadata_map["resize"] == WARPED
