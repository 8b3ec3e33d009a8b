"""studies/networks.py: parameter counts as published, shapes, initialisation, both forms of residual block."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import ACTIVATIONS, activation_parameters
from studies import networks
from studies.networks import NETWORKS, NIN, ResNet, SmallNet, build


def count(net) -> int:
    return sum(p.numel() for p in net.parameters())


# He et al. 2016, table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M; to the unit by the layers: 3 x 3 convolutions without
# biases, two numbers a map for each batch norm, a dense layer with biases.
@pytest.mark.parametrize(
    ("depth", "million", "exact"),
    [(20, 0.27, 269_722), (32, 0.46, 464_154), (44, 0.66, 658_586), (56, 0.85, 853_018), (110, 1.7, 1_727_962)],
)
def test_resnets_have_the_published_number_of_parameters(depth, million, exact):
    n = (depth - 2) // 6
    first, inner = 3 * 16 * 9, 16 * 16 * 9
    stages = 2 * n * inner + (16 * 32 + (2 * n - 1) * 32 * 32) * 9 + (32 * 64 + (2 * n - 1) * 64 * 64) * 9
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    assert exact == first + stages + norms + 64 * 10 + 10
    assert round(exact / 1e6, 2 if million < 1 else 1) == million
    assert count(build(f"resnet{depth}")) == exact
    assert count(build(f"resnet{depth}-no-act-after-add")) == exact - 2 * 16  # no batch norm at the start


def test_nin_has_the_published_number_of_parameters():
    """966,986 as published with biases (Caffe's model zoo, CIFAR-10); with batch norm two numbers a map instead."""
    maps = 192 + 160 + 96 + 192 * 5 + 10
    assert count(NIN(10, batch_norm=False)) == 966_986
    assert count(build("nin")) == 966_986 - maps + 2 * maps


def test_smallnet_layer_by_layer():
    """9 x (3 x 32 + 32 x 64 + 64 x 128) weights in convolutions; dense layers of 2048 x 512 and 512 x classes, with
    biases."""
    convs, dense = 9 * (3 * 32 + 32 * 64 + 64 * 128), 2048 * 512 + 512
    assert count(build("smallnet")) == convs + dense + 512 * 10 + 10
    assert count(build("smallnet-bn", 100)) == convs + dense + 512 * 100 + 100 + 2 * (32 + 64 + 128 + 512)
    kinds = [type(layer) for layer in SmallNet(batch_norm=True)]
    block = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.Dropout]
    assert kinds == block * 3 + [nn.Flatten, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout, nn.Linear]
    assert [layer.p for layer in SmallNet() if isinstance(layer, nn.Dropout)] == [0.2, 0.2, 0.2, 0.5]


# How many activations each net has.
ACTS = {"smallnet": 4, "smallnet-bn": 4, "nin": 9, "two-units": 1}
ACTS |= {f"resnet{d}": 1 + 2 * (d - 2) // 6 * 3 for d in networks.DEPTHS}
ACTS |= {f"resnet{d}-no-act-after-add": 2 + (d - 2) // 6 * 3 for d in networks.DEPTHS}


@pytest.mark.parametrize("name", [n for n in (*NETWORKS, "two-units") if n not in ("resnet56", "resnet110")])
def test_each_net_with_each_activation(name):
    """The logits' shape, the number of activations, a finite gradient for every parameter, a config that rebuilds."""
    torch.manual_seed(0)
    for act in ACTIVATIONS if name in ("smallnet", "resnet20") else ("relu", "frelu"):
        net = build(name, 7, act)
        logits = net(torch.randn(3, 3, 32, 32))
        assert logits.shape == (3, 7)
        F.cross_entropy(logits, torch.tensor([0, 3, 6])).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        assert len(activation_parameters(net)) == (ACTS[name] if act in ("frelu", "srelu", "prelu") else 0)
        again = build(net.config["network"], net.config["num_classes"], net.config["activation"])
        again.load_state_dict(net.state_dict())


def said(net) -> list[str]:
    return [re.sub(r"\w+=0\.25|, bias=\w+|inplace=True|dilation=1, ", "", str(layer)) for layer in net]


def test_nin_layer_by_layer():
    """Lin, Chen and Yan's net with batch norm, as the study has it: windows, pools that round up, dropout."""
    block = [(3, 192, 5), (192, 160, 1), (160, 96, 1), (96, 192, 5), (192, 192, 1), (192, 192, 1), (192, 192, 3),
             (192, 192, 1), (192, 10, 1)]
    expected = []
    for number, (inputs, outputs, side) in enumerate(block, 1):
        padding = f", padding=({side // 2}, {side // 2})" if side > 1 else ""
        expected += [
            f"Conv2d({inputs}, {outputs}, kernel_size=({side}, {side}), stride=(1, 1){padding})",
            f"BatchNorm2d({outputs}, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)", "ReLU()",
        ]
        if number in (3, 6):
            expected.append("MaxPool2d(kernel_size=3, stride=2, padding=0, ceil_mode=True)")
            expected.append("Dropout(p=0.5, inplace=False)")
    expected += ["AvgPool2d(kernel_size=8, stride=8, padding=0)", "Flatten(start_dim=1, end_dim=-1)"]
    assert said(build("nin")) == expected
    published = said(NIN(10, batch_norm=False))
    assert sum(layer == "Identity()" for layer in published) == 9
    assert [layer for layer in published if "Pool" in layer] == [
        "MaxPool2d(kernel_size=3, stride=2, padding=0, ceil_mode=True)",
        "AvgPool2d(kernel_size=3, stride=2, padding=0)", "AvgPool2d(kernel_size=8, stride=8, padding=0)",
    ]


def test_two_units_layer_by_layer():
    net = build("two-units", 10, "frelu")
    expected = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        for one in (inputs, outputs):
            expected += [f"Conv2d({one}, {outputs}, kernel_size=(5, 5), stride=(1, 1), padding=(2, 2))", "ReLU()"]
        expected.append("MaxPool2d(kernel_size=2, stride=2, padding=0, ceil_mode=False)")
    assert said(net.blocks) == expected
    assert (net.units.in_features, net.units.out_features, net.fc.in_features) == (2048, 2, 2)
    images = torch.randn(2, 3, 32, 32)
    units = F.linear(net.blocks(images).flatten(1), net.units.weight, net.units.bias).clamp_min(0) + net.act.bias
    torch.testing.assert_close(net.embed(images), units)
    torch.testing.assert_close(net(images), F.linear(units, net.fc.weight, net.fc.bias))


def test_he_initialisation_by_what_goes_out():
    torch.manual_seed(0)
    for name in ("smallnet", "nin", "resnet110"):
        for layer in build(name).modules():
            if isinstance(layer, nn.Conv2d):
                spread = math.sqrt(2 / (layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]))
                error = spread * 4 / math.sqrt(2 * layer.weight.numel())  # four deviations of a sample's deviation
                assert layer.weight.std().item() == pytest.approx(spread, abs=error)
                assert layer.bias is None
            if isinstance(layer, nn.Linear):
                assert (layer.bias == 0).all()
                assert layer.weight.abs().max() <= 1 / math.sqrt(layer.in_features)
    assert all((layer.bias == 0).all() for layer in NIN(batch_norm=False) if isinstance(layer, nn.Conv2d))


def norm(layer, x):
    """Batch norm in training, written out."""
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    scaled = (x - mean) / (variance + 1e-5).sqrt()
    return scaled * layer.weight[:, None, None] + layer.bias[:, None, None]


@pytest.mark.parametrize("after_addition", [True, False])
def test_both_forms_of_residual_net_written_out(after_addition):
    """ResNet-20 with FReLU: where the norms, the activations and the shortcuts are, in float64."""
    torch.manual_seed(0)
    net = ResNet(20, 10, "frelu", after_addition).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)  # each norm, bias and b its own values
    x = images = torch.randn(4, 3, 32, 32, dtype=torch.float64)

    def frelu(layer, x):
        return x.clamp_min(0) + layer.bias

    x = F.conv2d(x, net.conv.weight, padding=1)
    x = frelu(net.act, norm(net.norm, x) if after_addition else x)
    for number, block in enumerate(net.blocks):
        stride = 2 if number in (3, 6) else 1
        y = frelu(block.act1, norm(block.norm1, F.conv2d(x, block.conv1.weight, stride=stride, padding=1)))
        y = norm(block.norm2, F.conv2d(y, block.conv2.weight, padding=1))
        if stride == 2:  # every second pixel, then as many zero maps again
            x = torch.cat([x[:, :, ::2, ::2], torch.zeros_like(x[:, :, ::2, ::2])], 1)
        x = frelu(block.act2, x + y) if after_addition else x + y
    x = x if after_addition else frelu(net.last_act, x)
    logits = x.mean((2, 3)) @ net.fc.weight.T + net.fc.bias
    torch.testing.assert_close(net(images), logits, rtol=1e-9, atol=1e-9)


def test_wrong_names_and_depths():
    with pytest.raises(ValueError, match=r"network must be one of smallnet, .* not 'vgg'"):
        build("vgg")
    with pytest.raises(ValueError, match="activation must be"):
        build("nin", 10, "gelu")
    for depth in (0, 2, 18, 21):
        with pytest.raises(ValueError, match=r"depth must be 6 n \+ 2"):
            ResNet(depth)
