"""studies/look.py: what a net sees is that of a plain recomputation."""

import numpy as np
import pytest
import torch
from torch import nn

import checkpoints
from model import AlexNet, LocalResponseNorm
from studies import look, seen


def smooth(net):
    """The same convolutions' windows, but every number in a window counts: average pools, no ReLU, no norm, weights
    above 0. Without the dense layers."""
    net = net.to_empty(device="cpu").double()
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.MaxPool2d):
                setattr(parent, name, nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding))
            if isinstance(layer, nn.ReLU | LocalResponseNorm | nn.Linear):
                setattr(parent, name, nn.Identity())
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data.fill_(0.01)
    return net


@pytest.mark.parametrize("kind", ["paper", "2012", "torchvision"])
def test_receptive_fields_are_where_gradients_are(kind):
    with torch.device("meta"):
        if kind == "torchvision":
            net = checkpoints.torchvision_net(4, 224)
        else:
            net = AlexNet(4, image_size=224, columns=2 if kind == "2012" else 1, order=kind)
    fields = {name: look.receptive_field(net, name) for name in look.CONVOLUTIONS}
    net, found = smooth(net), {}
    for name in fields:
        layer = checkpoints.layer_called(net, name)
        layer.register_forward_hook(lambda *a, name=name: found.update({name: a[2]}))
    inputs = torch.rand(1, 3, 224, 224, dtype=torch.float64, requires_grad=True)
    net(inputs)
    row, column = 6, 5
    for name, (size, stride, start) in fields.items():
        (gradient,) = torch.autograd.grad(found[name][0, :, row, column].sum(), inputs, retain_graph=True)
        touched = gradient[0].abs().sum(0) > 0
        for along, place in ((touched.any(1), row), (touched.any(0), column)):
            where = along.nonzero().flatten()
            first = start + place * stride
            assert (where[0].item(), where[-1].item()) == (max(0, first), min(224, first + size) - 1), name


def test_strongest_patches_are_those_of_a_loop():
    torch.manual_seed(0)
    net = AlexNet(4, image_size=64).eval()
    pictures = 60 * torch.randn(20, 3, 64, 64)
    found = look.strongest(net, ["conv2", "conv5"], pictures.split(8), each=3, units=4)
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
    alone = look.share_of_right(torch.tensor(found[:1]), labels[:1], among_labels)
    assert seen.percent(*alone) == f"{by_query[0]:.1f}%"
    assert seen.percent(33.33, 2.52) == "33.3% ± 2.5"


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
