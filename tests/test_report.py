"""studies/report.py and look.py: the page is well-formed and has test.py's numbers; the computations are those of a
plain recomputation."""

import json
import re
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import small_source
from helpers import resume, run
from torch import nn

import checkpoints
import test
from data import pack
from model import AlexNet, LocalResponseNorm
from studies import look, report
from utils import UserError


def smooth(net):
    """The same windows, but every number in a window counts: average pools, no ReLU, no norm, weights above 0."""
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.MaxPool2d):
                setattr(parent, name, nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding))
            if isinstance(layer, nn.ReLU | LocalResponseNorm):
                setattr(parent, name, nn.Identity())
    for parameter in net.parameters():
        parameter.data = parameter.data.abs() + 0.001
    return net.double()


@pytest.mark.parametrize("kind", ["paper", "2012", "torchvision"])
def test_receptive_fields_are_where_gradients_are(kind):
    def fresh():
        if kind == "torchvision":
            return checkpoints.torchvision_net(4, 224)
        return AlexNet(4, image_size=224, columns=2 if kind == "2012" else 1, order=kind)

    net, plain = smooth(fresh()), fresh()
    for name in look.CONVOLUTIONS:
        size, stride, start = look.receptive_field(plain, name)
        inputs = torch.rand(1, 3, 224, 224, dtype=torch.float64, requires_grad=True)
        found = []
        checkpoints.layer_called(net, name).register_forward_hook(lambda *a, found=found: found.append(a[2]))
        net(inputs)
        row, column = 6, 5
        (gradient,) = torch.autograd.grad(found[0][0, :, row, column].sum(), inputs)
        touched = gradient[0].abs().sum(0) > 0
        for along, place in ((touched.any(1), row), (touched.any(0), column)):
            where = along.nonzero().flatten()
            first = start + place * stride
            assert (where[0].item(), where[-1].item()) == (max(0, first), min(224, first + size) - 1), name


def test_strongest_patches_are_those_of_a_loop():
    torch.manual_seed(0)
    net = AlexNet(4, image_size=64).eval()
    pictures = 60 * torch.randn(20, 3, 64, 64)
    batches = [(part, None) for part in pictures.split(8)]
    found = look.strongest(net, ["conv2", "conv5"], batches, each=3, units=4)
    output = look.outputs(net, ["conv2"], pictures)["conv2"]
    for kernel, places in found["conv2"]:
        peaks = output[:, kernel].flatten(1).max(1)
        assert [p[0] for p in places] == peaks.values.topk(3).indices.tolist()
        for picture, row, column in places:
            assert output[picture, kernel, row, column] == peaks.values[picture]
    assert len(found["conv5"]) == 4
    picture = np.arange(64 * 64 * 3).reshape(64, 64, 3)
    assert np.array_equal(look.cut(picture, (11, 4, -2), 0, 3), picture[0:9, 10:21])


def test_neighbours_by_numpy():
    generator = np.random.default_rng(0)
    queries, among = generator.normal(size=(7, 5)), generator.normal(size=(40, 5))
    found = look.nearest(torch.tensor(queries), torch.tensor(among), 6, at_once=3).numpy()
    distances = ((queries[:, None] - among) ** 2).sum(2)
    assert np.array_equal(found, distances.argsort(1)[:, :6])
    labels, among_labels = torch.tensor([0, 1, 2, 0, 1, 2, 0]), torch.arange(40) % 3
    share, half = look.share_of_right(torch.tensor(found), labels, among_labels)
    by_query = [100 * np.mean([n % 3 == label for n in row]) for row, label in zip(found, labels.tolist(), strict=True)]
    assert share == pytest.approx(np.mean(by_query))
    assert half == pytest.approx(1.96 * np.std(by_query, ddof=1) / 7**0.5)


def test_calibration_by_hand():
    """Two pictures at 0.95, one of them right, and two at 0.55, both right: (2 * 0.45 + 2 * 0.45) / 4."""
    rows, error = look.calibration(np.array([0.95, 0.95, 0.55, 0.55]), np.array([True, False, True, True]), bins=10)
    assert rows == [(0.5, 2, pytest.approx(0.55), 1.0), (0.9, 2, pytest.approx(0.95), 0.5)]
    assert error == pytest.approx(0.45)
    assert look.calibration(np.array([1.0]), np.array([True]))[1] == 0


class OnePatch(nn.Module):
    """Its answer hangs on the pixels of rows 8 to 15 and columns 24 to 31 alone."""

    def forward(self, x):
        score = x[:, :, 8:16, 24:32].mean((1, 2, 3))
        return torch.stack([score, -score], 1)


def test_occlusion_and_deletion_of_a_net_that_looks_at_one_patch():
    net, picture = OnePatch(), torch.ones(3, 32, 32)
    fall, before = look.occlusion(net, picture, 0, square=8, step=4)
    assert before == pytest.approx(torch.tensor([1.0, -1.0]).softmax(0)[0].item())
    assert fall.max() == pytest.approx(fall[8:16, 24:32].max())
    assert fall[:, :20].max() == fall[20:].max() == 0  # squares that miss the patch
    order = look.by_block(fall, 8)
    assert order[0] == 1 * 4 + 3
    curve = look.deletion(net, picture, 0, order, block=8, steps=16)
    assert len(curve) == 17
    assert curve[0] == pytest.approx(before)
    assert curve[1:] == pytest.approx([0.5] * 16)
    late = look.deletion(net, picture, 0, order[::-1].copy(), block=8, steps=16)
    assert late[:16] == pytest.approx([before] * 16)


def test_saturation_and_signals():
    generator = np.random.default_rng(0)
    kernels = generator.normal(size=(500, 3, 5, 5))
    assert look.saturation(kernels) == pytest.approx(2 / 3, abs=0.01)
    assert look.saturation(np.repeat(kernels[:, :1], 3, 1)) == pytest.approx(0)
    net = AlexNet(4, image_size=64).eval()
    net.conv2.bias.data[:64] = -1e6  # a quarter of its kernels never pass the ReLU
    pictures = 60 * torch.randn(6, 3, 64, 64)
    found = look.signals(net, pictures)
    assert found["conv2"][3] == pytest.approx(25, abs=2)
    x = net.conv1(pictures).detach()
    assert found["conv1"][:2] == pytest.approx((x.mean().item(), x.std().item()), rel=1e-4)
    assert found["conv1"][2] == pytest.approx(x.flatten(1).var(0, correction=0).mean().sqrt().item(), rel=1e-4)


# ---------------------------------------------------------------------------------------------- the page


def read(path):
    """The page's text; raises where it is not well-formed."""
    text = path.read_text()
    root = ElementTree.fromstring(text)
    assert not re.search(r'(?:src|href)="(?!data:)', text)  # nothing from elsewhere
    return text, " ".join(" ".join(root.itertext()).split())


def test_the_page_of_a_run_has_test_pys_numbers(store, tmp_path, capsys):
    out = tmp_path / "run"
    run(store, out, "--epochs", "2", "--columns", "2", "--activation", "frelu")
    assert report.main([str(out), "--pictures", str(tmp_path / "figures")]) == 0
    capsys.readouterr()
    text, said = read(out / "report.html")
    assert "Left out" not in said
    test.main([str(out / "best.pt"), "--json"])
    result = json.loads(capsys.readouterr().out)
    low, high = result["top1_interval"]
    assert f"top-1 error {result['top1_error']:.2f}% (95% interval {low:.2f} to {high:.2f}%)" in said
    assert "--columns 2" in said
    assert "--activation frelu" in said
    assert "First and second column" in said
    assert "to epoch 2:" in said
    model, _ = checkpoints.load_model(out / "best.pt")
    halves = np.split(model.conv1.weight.detach().numpy(), 2)
    assert ", ".join(f"{look.saturation(half):.2f}" for half in halves) in said
    assert text.count("data:image/webp") == 1
    names = {"curves-1.png", "curves-4.png", "kernels-1.png", "kernels-2.png", "neighbours.png", "occlusion.png",
             "deletion.png", "confusion.png", "reliability.png", "patches-conv5.png"}
    assert names <= {p.name for p in (tmp_path / "figures").iterdir()}
    assert (out / "report.html").stat().st_size < 10e6


def test_class_names_stay_text_and_missing_things_are_told(tmp_path):
    """Markup and control characters in class names; then without the store; unlabelled test pictures."""
    source = small_source(classes=4)
    source.classes = ["<script>alert(1)</script>", "a\x1b[31m & b", "$x_1$", "\u202eevil"]
    store = pack.pack(source, tmp_path / "odd")
    run(store, tmp_path / "run", "--max-steps", "7")
    (tmp_path / "run" / "conv1.npy").unlink()
    report.main([str(tmp_path / "run"), "--out", str(tmp_path / "page.html")])
    text, said = read(tmp_path / "page.html")
    assert "<script" not in text
    assert "<script>alert(1)</script>" in said
    assert "\x1b" not in text
    assert "the run has no conv1.npy" in said
    resume(tmp_path / "run", "--max-steps", "8")  # a run that goes on
    shutil.rmtree(store.path)
    report.main([str(tmp_path / "run"), "--out", str(tmp_path / "page.html")])
    _, said = read(tmp_path / "page.html")
    assert said.count("Left out: the store that the run was trained on can't be read") == 7
    assert "How coloured" in said


def test_runs_next_to_each_other(store, tmp_path):
    for name, more in (("a", []), ("b", ["--no-lrn", "--seed", "3"])):
        run(store, tmp_path / name, "--epochs", "1", *more)
    report.main([str(tmp_path / "a"), "--compare", str(tmp_path / "b"), "--seed", "1"])
    _, said = read(tmp_path / "a" / "report.html")
    assert "lrn seed lowest validation error epochs" in said
    with pytest.raises(UserError, match="--compare"):
        report.main([str(tmp_path / "a"), "--compare", str(tmp_path / "nowhere")])


def test_what_is_no_run_is_one_line(run_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["nowhere"], "no such run"), ([str(tmp_path / "empty")], "config.json is missing or damaged"),
        ([str(run_folder), "--out", str(tmp_path)], "that is a folder"),
        ([str(run_folder), "--out", str(tmp_path / "x" / "y.html")], "there is no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            report.main(arguments)
    shutil.copy(run_folder / "config.json", tmp_path / "empty")
    with pytest.raises(UserError, match=r"has no best.pt yet"):
        report.main([str(tmp_path / "empty")])


def test_figures_of_a_grid():
    tiles = [np.full((2, 3, 3), n, np.uint8) for n in range(5)]
    out = report.grid(tiles, 3, scale=2, gap=1)
    assert out.shape == (2 * 5 - 1, 3 * 7 - 1, 3)
    assert (out[0, 0, 0], out[5, 7, 0], out[4, 0, 0], out[5, 14, 0]) == (0, 4, 255, 255)
    assert report.fitted(np.zeros((10, 5, 3), np.uint8), 20).shape == (20, 20, 3)
