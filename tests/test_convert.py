"""checkpoints/convert.py on files that the tests write by hand: Caffe's by its published field numbers, torchvision's
with random weights. Damaged and foreign files end in one line."""

import argparse
import json
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import numpy_layers as ref
import pytest
import torch
import torchvision
from conftest import small_source
from helpers import ROOT, load, resume, run
from PIL import Image

import checkpoints
import test
import train
import utils
from checkpoints import convert
from data import pack
from data.augment import epoch_tables
from data.manifest import WARPED
from data.pictures import to_square
from utils import UserError

SHAPES = {
    "conv1": (96, 3, 11, 11), "conv2": (256, 48, 5, 5), "conv3": (384, 256, 3, 3), "conv4": (384, 192, 3, 3),
    "conv5": (256, 192, 3, 3), "fc6": (4096, 9216), "fc7": (4096, 4096), "fc8": (7, 4096),
}
ORDER = (
    "conv1", "norm1", "pool1", "conv2", "norm2", "pool2", "conv3", "conv4", "conv5", "pool5", "fc6", "fc7", "fc8",
)

# ------------------------------------------------------------------------------- a .caffemodel, byte by byte


def number(value: int) -> bytes:
    """A varint: seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(index: int, content: bytes | int | float) -> bytes:
    if isinstance(content, int):
        return number(index << 3) + number(content)
    if isinstance(content, float):
        return number(index << 3 | 5) + struct.pack("<f", content)
    return number(index << 3 | 2) + number(len(content)) + content


def blob(array: np.ndarray, old: bool) -> bytes:
    """BlobProto: num 1, channels 2, height 3, width 4 (old), or shape 7 with dim 1; data 5, packed."""
    if old:
        sides = (1,) * (4 - array.ndim) + array.shape
        shape = b"".join(field(index, side) for index, side in enumerate(sides, 1))
    else:
        shape = field(7, field(1, b"".join(map(number, array.shape))))
    return shape + field(5, array.astype("<f4").tobytes())


def layer(name: str, arrays=(), old=True, norm: bytes = b"") -> bytes:
    """V1LayerParameter (name 4, blobs 6, lrn_param 18) or LayerParameter (1, 7, 118)."""
    indices = (4, 6, 18) if old else (1, 7, 118)
    content = field(indices[0], name.encode())
    content += b"".join(field(indices[1], blob(array, old)) for array in arrays)
    return content + (field(indices[2], norm) if norm else b"")


def lrn(k: float | None = None, alpha: float = 1e-4) -> bytes:
    """LRNParameter: local_size 1, alpha 2, beta 3, k 5."""
    return field(1, 5) + field(2, alpha) + field(3, 0.75) + (field(5, k) if k else b"")


def random_weights(seed=0) -> dict[str, list[np.ndarray]]:
    """Weights that keep the signal's size, and biases."""
    rng, weights = np.random.default_rng(seed), {}
    for name, shape in SHAPES.items():
        deviation = (2 / np.prod(shape[1:])) ** 0.5
        values = [rng.standard_normal(shape, np.float32) * np.float32(deviation)]
        weights[name] = [*values, rng.standard_normal(shape[0], np.float32)]
    return weights


def write_net(path, weights, old=True, order=ORDER, norm=None):
    """NetParameter: layers 2 (old) or layer 100."""
    norm = lrn() if norm is None else norm
    with open(path, "wb") as file:
        file.write(field(1, b"AlexNet"))
        for name in order:
            content = layer(name, weights.get(name, ()), old, norm if name.startswith("norm") else b"")
            file.write(field(2 if old else 100, content))
    return path


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture(scope="module")
def caffe_file(weights, tmp_path_factory):
    return write_net(tmp_path_factory.mktemp("caffe") / "bvlc_alexnet.caffemodel", weights)


@pytest.fixture(scope="module")
def converted(caffe_file):
    out = caffe_file.with_name("caffe.pt")
    convert.main([str(caffe_file), str(out)])
    return out


def caffes_forward(weights, picture: np.ndarray) -> np.ndarray:
    """bvlc_alexnet's deploy.prototxt in numpy: picture (3, 227, 227) in blue, green, red minus the mean; logits.
    group 2 halves the channels; LRN goes across all of them with k 1; pooling rounds up, which 55, 27 and 13 do not
    need; dropout does nothing in testing."""

    def grouped(x, name):
        weight, bias = weights[name]
        halves = zip(np.split(x, 2), np.split(weight, 2), np.split(bias, 2), strict=True)
        return np.concatenate([ref.convolution(*half, pad=weight.shape[2] // 2) for half in halves])

    x = ref.relu(ref.convolution(picture, *weights["conv1"], stride=4))
    x = ref.max_pool(ref.lrn(x, k=1.0))
    x = ref.max_pool(ref.lrn(ref.relu(grouped(x, "conv2")), k=1.0))
    x = ref.relu(ref.convolution(x, *weights["conv3"], pad=1))
    x = ref.relu(grouped(x, "conv4"))
    x = ref.max_pool(ref.relu(grouped(x, "conv5"))).ravel()
    for name in ("fc6", "fc7"):
        x = ref.relu(weights[name][0] @ x + weights[name][1])
    return weights["fc8"][0] @ x + weights["fc8"][1]


# ------------------------------------------------------------------------------- Caffe


def test_caffes_logits(weights, converted):
    """A picture through load_model equals Caffe's layer definitions in numpy: warped to 256, blue first, means 104,
    117, 123 subtracted, centre 227."""
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 90, 3), np.uint8)).resize((400, 300))
    model, prepare = checkpoints.load_model(converted)
    with torch.no_grad():
        ours = model(prepare(picture))[0].numpy()
    warped = to_square(picture, 256, resize=WARPED)  # test_pictures.py compares it with Pillow's
    pixels = warped.astype(float)[14:241, 14:241]
    blue_first = pixels[:, :, ::-1] - (104, 117, 123)
    by_hand = caffes_forward(weights, blue_first.transpose(2, 0, 1))
    assert np.abs(ours - by_hand).max() < 1e-4 * np.abs(by_hand).max()
    assert by_hand.std() > 1


def test_the_new_form_and_a_mean_picture(weights, converted, tmp_path, capsys):
    """LayerParameter gives the weights of V1LayerParameter; mean files turn to red, green, blue, (256, 256, 3)."""
    mean = np.random.default_rng(2).uniform(90, 130, (3, 256, 256)).astype(np.float32)
    (tmp_path / "mean.binaryproto").write_bytes(blob(mean, old=True))
    np.save(tmp_path / "mean.npy", mean)
    file = write_net(tmp_path / "new.caffemodel", weights, old=False)
    before = load(converted)["model"]
    for name in ("mean.binaryproto", "mean.npy"):
        convert.main([str(file), str(tmp_path / "new.pt"), "--mean", str(tmp_path / name)])
        new = load(tmp_path / "new.pt")
        assert all(torch.equal(new["model"][key], before[key]) for key in before)
        assert np.array_equal(new["mean"].numpy(), mean[::-1].transpose(1, 2, 0))
    printed = capsys.readouterr().out
    assert "Caffe's AlexNet" in printed
    assert "7 classes" in printed


def test_k_is_the_files(weights, tmp_path):
    file = write_net(tmp_path / "k.caffemodel", weights, norm=lrn(k=2.0))
    convert.main([str(file), str(tmp_path / "k.pt")])
    assert load(tmp_path / "k.pt")["config"]["lrn_k"] == 2.0


def test_what_is_not_bvlc_alexnet_is_refused(weights, tmp_path):
    """CaffeNet has the same weights' shapes but pools first; other norms, shapes and missing layers are named."""
    swapped = ("conv1", "pool1", "norm1", "conv2", "pool2", "norm2", *ORDER[6:])
    # The dense layers, 230 MB, are read last: where a case ends before them, they are left out of its file.
    light = weights | {name: [np.zeros((1, 1)), np.zeros(1)] for name in ("fc6", "fc7")}
    odd = light | {"conv3": [weights["conv3"][0][:, :100], weights["conv3"][1]]}
    short = weights["fc8"][0].tobytes()[:-2]  # two bytes short
    cut = field(6, field(1, 1) + field(2, 1) + field(3, 7) + field(4, 4096) + field(5, short))
    cut = field(4, b"fc8") + cut + field(6, blob(weights["fc8"][1], old=True))
    (tmp_path / "g").write_bytes(write_net(tmp_path / "h", weights, order=ORDER[:-1]).read_bytes() + field(2, cut))
    cases = {
        r"fc8.weight has \d+ bytes": tmp_path / "g",
        "no layer norm1": write_net(tmp_path / "i", light, order=[n for n in ORDER if n != "norm1"]),
        "another layer with weights, bn1": write_net(
            tmp_path / "l", light | {"bn1": [np.zeros(96)]}, order=(*ORDER[:1], "bn1", *ORDER[1:])
        ),
        "in the order": write_net(tmp_path / "j", light, order=("norm1", *ORDER[:1], *ORDER[2:])),
        "not one k above 0": write_net(tmp_path / "k", light, norm=lrn(k=float("nan"))),
        "CaffeNet": write_net(tmp_path / "a", light, order=swapped),
        "norm1 is not": write_net(tmp_path / "b", light, norm=lrn(alpha=1.0)),
        r"conv3.weight is \(384, 100, 3, 3\)": write_net(tmp_path / "c", odd),
        "no layer fc7": write_net(tmp_path / "d", light, order=[n for n in ORDER if n != "fc7"]),
        "conv2 has 1 blobs": write_net(tmp_path / "e", light | {"conv2": weights["conv2"][:1]}),
        "not finite": write_net(tmp_path / "f", weights | {"fc8": [weights["fc8"][0] * np.nan, weights["fc8"][1]]}),
    }
    for message, file in cases.items():
        with pytest.raises(UserError, match=message):
            convert.main([str(file), str(tmp_path / "out.pt")])
    assert not (tmp_path / "out.pt").exists()


def test_caffes_net_trains_with_caffes_dropout(weights, converted):
    """Its weights are the file's, its dropout is rescaled in training and does nothing in testing (dropout_layer.cpp):
    fc7 and fc8 then learn at the rate that Caffe's would."""
    net = checkpoints.build_net(load(converted), converted)
    for name in ("fc6", "fc7", "fc8"):
        assert np.array_equal(getattr(net, name).weight.detach().numpy(), weights[name][0])
    x = torch.ones(1, 4096)
    for layer in (net.drop6, net.drop7):
        assert sorted(set(layer.train()(x).flatten().tolist())) == [0.0, 2.0]
        assert torch.equal(layer.eval()(x), x)


# ------------------------------------------------------------------------------- torchvision


@pytest.fixture(scope="module")
def torchvision_file(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("torchvision") / "alexnet.pth"
    net = torchvision.models.alexnet(num_classes=4)
    for weight in net.parameters():
        if weight.ndim > 1:
            torch.nn.init.kaiming_normal_(weight)  # logits that differ from picture to picture
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def from_torchvision(torchvision_file):
    out = torchvision_file.with_name("converted.pt")
    convert.main([str(torchvision_file), str(out)])
    return out


def test_torchvisions_logits(torchvision_file, from_torchvision):
    """The same picture through torchvision's own transforms and net, and through load_model. At 256 x 256 pixels, since
    the two resizes round differently."""
    net = torchvision.models.alexnet(num_classes=4).eval()
    net.load_state_dict(torch.load(torchvision_file, weights_only=True))
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8)).resize((256, 256))
    transforms = torchvision.models.AlexNet_Weights.IMAGENET1K_V1.transforms()
    model, prepare = checkpoints.load_model(from_torchvision)
    with torch.no_grad():
        theirs, ours = net(transforms(picture)[None]), model(prepare(picture))
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert theirs.std() > 0.1


def test_fine_tuning_has_the_losses_of_torchvisions_own_net(tmp_path, monkeypatch):
    """25 steps at learning rate 0.001, beside torchvision's net on torchvision's input, (pixel / 255 - mean) / std:
    same order, crops, dropout masks and update. Folding the division into conv1's weights would diverge here."""
    torch.manual_seed(0)
    net = torchvision.models.alexnet(num_classes=4)
    torch.save(net.state_dict(), tmp_path / "t.pth")
    convert.main([str(tmp_path / "t.pth"), str(tmp_path / "t.pt")])
    source = small_source(counts=(100, 4, 4))
    source.size = 256
    store = pack.pack(source, tmp_path / "store")
    found, step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a: found.append(step(*a)) or found[-1])
    options = ("--init", tmp_path / "t.pt", "--lr", 0.001, "--colour", "off", "--max-steps", 25)
    run(store, tmp_path / "run", *options, batch=4)

    weights, biases = ([p for n, p in net.named_parameters() if n.endswith(end)] for end in ("weight", "bias"))
    groups = [{"params": weights, "weight_decay": 5e-4}, {"params": biases, "lr": 0.002}]
    optimizer = torch.optim.SGD(groups, lr=0.001, momentum=0.9)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images, labels = (torch.from_numpy(x) for x in store.split("train").read(np.arange(100)))
    mean_image = torch.from_numpy(store.mean)[16:240, 16:240].permute(2, 0, 1)
    tables, losses = epoch_tables(0, 0, 100, 32), []
    for number, samples in enumerate(np.split(tables.order, 25), 1):
        cut = [images[i, top : top + 224, left : left + 224] for i in samples for top, left in [tables.offsets[i]]]
        cut = [c.flip(1) if tables.mirror[i] else c for i, c in zip(samples, cut, strict=True)]
        # train.py subtracts this store's mean image, not torchvision's: the pixels are shifted by the difference.
        pixels = torch.stack(cut).permute(0, 3, 1, 2) - mean_image + 255 * mean
        utils.seed_all(0, number, 0)
        loss = torch.nn.functional.cross_entropy(net((pixels / 255 - mean) / std), labels[samples])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [loss.item() for loss, _ in found] == pytest.approx(losses, rel=1e-3)


def test_test_py_and_init_take_it(from_torchvision, tmp_path, capsys):
    """test.py on a store of 256 pixels; train.py --init goes on with torchvision's net, as what it is, and resumes."""
    source = small_source(counts=(16, 4, 4))
    source.size = 256
    store = pack.pack(source, tmp_path / "store")
    capsys.readouterr()
    test.main([str(from_torchvision), "--data", str(store.path), "--json"])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["images"] == 4
    assert "made square" not in printed.err
    run(store, tmp_path / "run", "--init", from_torchvision, "--max-steps", 1, "--lr", 1e-12, batch=8)
    assert "torchvision's alexnet (another net than the paper's)" in capsys.readouterr().out
    start, before = load(tmp_path / "run" / "last.pt"), load(from_torchvision)
    assert start["config"] == before["config"]
    assert all(torch.allclose(start["model"][name], before["model"][name], atol=1e-6) for name in before["model"])
    assert resume(tmp_path / "run", "--max-steps", 2) == 0
    assert load(tmp_path / "run" / "last.pt")["step"] == 2
    with pytest.raises(UserError, match=r"--columns 2: the net of .* has no such option"):
        run(store, tmp_path / "two", "--init", from_torchvision, "--columns", 2, batch=8)


def test_torchvision_fetches_or_says_why_not(monkeypatch, tmp_path, torchvision_file):
    state = torch.load(torchvision_file, weights_only=True)
    weights = torchvision.models.AlexNet_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda *a, **k: state)
    convert.main(["torchvision", str(tmp_path / "t.pt")])
    assert load(tmp_path / "t.pt")["config"] == {
        "net": "torchvision", "num_classes": 4, "image_size": 224, "dropout": 0.5,
    }

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(weights, "get_state_dict", offline)
    with pytest.raises(UserError, match="could not fetch"):
        convert.main(["torchvision", str(tmp_path / "u.pt")])
    monkeypatch.setattr(weights, "get_state_dict", lambda *a, **k: state)
    with pytest.raises(UserError, match="--mean goes with Caffe"):
        convert.main(["torchvision", str(tmp_path / "u.pt"), "--mean", "x"])


# ------------------------------------------------------------------------------- damaged and foreign files


class Evil:
    def __reduce__(self):
        return open, ("ran", "w")


def test_bad_files_end_in_one_line_and_run_nothing(caffe_file, torchvision_file, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = torchvision_file.read_bytes()
    state = torch.load(torchvision_file, weights_only=True)
    torch.save({"features.0.weight": Evil()}, "evil.pth")
    with open("evil.pickle", "wb") as file:
        pickle.dump(Evil(), file, protocol=2)
    torch.save({k: v for k, v in state.items() if k != "classifier.6.bias"}, "short.pth")
    torch.save(state | {"classifier.6.weight": torch.zeros(1, 4096).expand(10**7, 4096)}, "huge.pth")
    torch.save([1, 2], "list.pth")
    last = "classifier.6.weight"
    odd = {"int": state[last].int(), "complex": state[last].cfloat(), "sparse": state[last].to_sparse(),
           "meta": state[last].to("meta"), "none": state[last][:0]}
    for name, value in odd.items():
        torch.save(state | {last: value}, f"{name}.pth")
    torch.save(state | {"a\nkey": state[last]}, "newline.pth")
    contents = {
        "empty": b"", "cut.pth": whole[: len(whole) // 2], "cut.caffemodel": caffe_file.read_bytes()[:1_000_000],
        "text": b"hello, this is no net\n" * 50, "zeros": bytes(5000), "png": b"\x89PNG\r\n\x1a\n" + bytes(300),
        "zip": b"PK\x03\x04" + bytes(300),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = [*contents, "evil.pth", "evil.pickle", "short.pth", "huge.pth", "list.pth", "missing", str(tmp_path)]
    files += [*(f"{name}.pth" for name in odd), str(run_folder / "best.pt")]
    for name in files:
        with pytest.raises(UserError) as error:
            convert.main([name, "out.pt"])
        assert "\n" not in str(error.value), name
    assert not (tmp_path / "out.pt").exists()
    assert not (tmp_path / "ran").exists()


def test_other_ways_to_save_torchvisions_weights(torchvision_file, from_torchvision, tmp_path):
    """Within a training script's checkpoint, with DataParallel's prefix, in half precision."""
    state = torch.load(torchvision_file, weights_only=True)
    before = load(from_torchvision)["model"]
    arguments = argparse.Namespace(lr=0.01, model="alexnet")  # torchvision's script keeps them
    parallel = {f"module.{name}": values for name, values in state.items()}
    for content in ({"model": state, "epoch": 3, "args": arguments}, {"state_dict": parallel}):
        torch.save(content, tmp_path / "a.pth")
        convert.main([str(tmp_path / "a.pth"), str(tmp_path / "a.pt")])
        after = load(tmp_path / "a.pt")["model"]
        assert all(torch.equal(after[name], before[name]) for name in before)
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "a.pth")
    convert.main([str(tmp_path / "a.pth"), str(tmp_path / "a.pt")])
    assert load(tmp_path / "a.pt")["model"]["features.3.weight"].dtype == torch.float32


def test_a_damaged_file_in_torchs_cache_is_one_line(tmp_path, monkeypatch):
    """What was cached once is not compared with its checksum again."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    for content in (b"", bytes(range(256))):
        (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").write_bytes(content)
        with pytest.raises(UserError, match=r"checkpoints/alexnet-owt-7be5be79.pth, .* is damaged; remove it"):
            convert.main(["torchvision", str(tmp_path / "out.pt")])


def test_what_is_written_is_called_a_pt(torchvision_file, tmp_path, capsys):
    """And the command that is printed can be pasted."""
    for ending in ("safetensors", "onnx"):
        with pytest.raises(UserError, match=rf"is a .pt, .* checkpoints.export makes a .{ending} of it"):
            convert.main([str(torchvision_file), str(tmp_path / f"out.{ending}")])
    (tmp_path / "mean.binaryproto").write_bytes(b"a mean")
    with pytest.raises(UserError, match=r"has the name of an input file; name a .pt to write, and a mean .* --mean"):
        convert.main([str(torchvision_file), str(tmp_path / "mean.binaryproto")])
    assert (tmp_path / "mean.binaryproto").read_bytes() == b"a mean"
    convert.main([str(torchvision_file), str(tmp_path / "my nets" / "a.pt")])
    assert f"test it: python test.py '{tmp_path / 'my nets' / 'a.pt'}' --data STORE" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"hello", bytes(100), b"\x93NUMPY"])
@pytest.mark.parametrize("suffix", [".npy", ".binaryproto"])
def test_bad_means_are_named(tmp_path, content, suffix):
    mean = tmp_path / f"mean{suffix}"
    mean.write_bytes(content)
    with pytest.raises(UserError, match="mean"):
        convert.read_mean(str(mean))


@pytest.mark.parametrize("array", [np.zeros((2, 3, 256, 256)), np.full((3, 256, 256), 1e300), np.zeros(3) > 0])
def test_means_of_other_shapes_are_named(tmp_path, array):
    np.save(tmp_path / "mean.npy", array)
    with pytest.raises(UserError, match=r"mean\.npy holds"):
        convert.read_mean(str(tmp_path / "mean.npy"))


def test_exit_status_and_overwriting(torchvision_file, tmp_path):
    """From the command line: 2 and one line; the file to convert is not overwritten, an older result is."""

    def start(*arguments):
        command = [sys.executable, "-m", "checkpoints.convert", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = start(torchvision_file, torchvision_file)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: ")
    os.mkfifo(tmp_path / "pipe")
    for file, out, message in (("missing.pth", "x.pt", "no such file"), (torchvision_file, "pipe", "no regular file")):
        with pytest.raises(UserError, match=message) as caught:
            convert.main([str(file), str(tmp_path / out)])
        assert "\n" not in str(caught.value)
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "x.pt").write_text("old")
    assert start(torchvision_file, tmp_path / "x.pt").returncode == 0
    assert load(tmp_path / "x.pt")["config"]["net"] == "torchvision"
