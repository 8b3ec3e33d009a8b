"""model.py against the paper's tables, the sources' nets written out in numpy, torch's own LRN and finite
differences."""

import itertools
import re
import shutil
import subprocess
import sys

import numpy as np
import numpy_layers as ref
import pytest
import torch
import torch.nn.functional as F

import model
from kernels import FastDropout, TorchLRN
from model import AlexNet, Dropout, LocalResponseNorm, MapNorm

# Side of each layer's output; channels are the paper's everywhere.
SIDES = {
    224: {"conv1": 55, "pool1": 27, "conv2": 27, "pool2": 13, "conv3": 13, "conv4": 13, "conv5": 13, "pool3": 6},
    227: {"conv1": 55, "pool1": 27, "conv2": 27, "pool2": 13, "conv3": 13, "conv4": 13, "conv5": 13, "pool3": 6},
    64: {"conv1": 15, "pool1": 7, "conv2": 7, "pool2": 3, "conv3": 3, "conv4": 3, "conv5": 3, "pool3": 1},
}
CHANNELS = {"conv1": 96, "pool1": 96, "conv2": 256, "pool2": 256, "conv3": 384, "conv4": 384, "conv5": 256}
CHANNELS["pool3"] = CHANNELS["conv5"]


@pytest.mark.parametrize("size", SIDES)
@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("order", model.ORDERS)
def test_every_layer_has_the_papers_shape(size, columns, overlap, order):
    seen = {}
    with torch.device("meta"):
        net = AlexNet(10, image_size=size, columns=columns, overlapping_pool=overlap, order=order).eval()
        for name, layer in net.named_children():
            layer.register_forward_hook(lambda _l, _i, out, name=name: seen.update({name: tuple(out.shape)}))
        net(torch.zeros(2, 3, size, size))
    expected = {name: (2, CHANNELS[name], side, side) for name, side in SIDES[size].items()}
    expected |= {"norm1": expected["conv1"], "norm2": expected["conv2"]}
    expected |= {"fc6": (2, 4096), "fc7": (2, 4096), "fc8": (2, 10)}
    assert {name: seen[name] for name in expected} == expected
    assert isinstance(net.norm1, LocalResponseNorm)
    assert isinstance(net.norm2, LocalResponseNorm)


def test_the_net_has_659272_neurons():
    """The abstract: 650,000; figure 2 has 253,440 in conv1, 55 x 48 x 96, for 55 x 55 x 96."""
    counts = {}
    with torch.device("meta"):
        net = AlexNet(1000)
        for name in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"):
            getattr(net, name).register_forward_hook(lambda _l, _i, out, name=name: counts.update({name: out.numel()}))
        net(torch.zeros(1, 3, 224, 224))
    assert counts["conv1"] == 290_400
    assert sum(counts.values()) == 659_272


@pytest.mark.parametrize("overlap", [True, False])
def test_the_pools_are_3x3_or_2x2(overlap):
    """Paper, section 3.4: windows of 3 with stride 2, or of 2 with stride 2."""
    net, window = AlexNet(3, image_size=64, overlapping_pool=overlap), 3 if overlap else 2
    maps = torch.randn(1, 2, 15, 15)
    for pool in (net.pool1, net.pool2, net.pool3):
        by_hand = np.stack([ref.max_pool(maps[0].numpy(), window, 2)])
        np.testing.assert_array_equal(pool(maps).numpy(), by_hand)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 62_378_344), ({"columns": 2}, 60_965_224), ({"image_size": 227}, 62_378_344),
        ({"columns": 2, "order": "2012"}, 60_965_224),
    ],
)
def test_parameter_counts(options, count):
    with torch.device("meta"):
        net = AlexNet(**options)
    assert sum(p.numel() for p in net.parameters()) == count


def test_layer_table_of_the_docstring_adds_up():
    """The parameters that the module's docstring lists are those of the net."""
    net = AlexNet()
    listed = dict(re.findall(r"^    (\w+) .* ([\d,]+,\d{3})$", model.__doc__, re.MULTILINE))
    counts = {name: sum(p.numel() for p in layer.parameters()) for name, layer in net.named_children()}
    assert {k: int(v.replace(",", "")) for k, v in listed.items()} == {k: n for k, n in counts.items() if n}
    assert f"in all          {sum(counts.values()):,}" in model.__doc__


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 62}, {"image_size": "64"}, {"columns": 3}, {"columns": 0}, {"order": "caffe"},
        {"activation": "gelu"}, {"activation": ["relu"]},
        {"dropout": 1.0}, {"dropout": -0.1}, {"dropout": "0.5"}, {"columns": 1.0}, {"num_classes": 0},
        {"lrn_alpha": "caffe"}, {"lrn_k": 0}, {"lrn_k": "2"}, {"lrn_k": float("nan")},
        {"image_size": 63, "order": "2012"},
    ],
)
def test_a_wrong_option_is_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AlexNet(**{"num_classes": 10, "image_size": 64} | options)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 3, 224, 224), torch.zeros(2, 64, 64, 3), torch.zeros(3, 64, 64), torch.zeros(2, 3, 64, 64).byte()],
)
def test_wrong_inputs_say_what_is_taken(images):
    with pytest.raises(ValueError, match=r"\(N, 3, 64, 64\)"):
        AlexNet(10, image_size=64)(images)


# ---------------------------------------------------------------------------------------------- LRN


LRNS = [LocalResponseNorm, TorchLRN]  # the formula, and torch's operations with its derivative written out


def lrn_by_loop(a: torch.Tensor, columns: int = 1) -> torch.Tensor:
    """The paper's formula (section 3.3), channel by channel; alpha divided by n."""
    b, width = torch.empty_like(a), a.shape[1] // columns
    for i in range(a.shape[1]):
        first = i // width * width
        low, high = max(first, i - 2), min(first + width - 1, i + 2)
        total = sum(a[:, j] ** 2 for j in range(low, high + 1))
        b[:, i] = a[:, i] / (2 + 1e-4 / 5 * total) ** 0.75
    return b


@pytest.mark.parametrize("lrn", LRNS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 96, 5, 7), (3, 7, 4, 4), (1, 2, 3, 3), (2, 4, 1, 1), (0, 8, 3, 3)])
def test_lrn_equals_torch_and_a_loop(shape, layout, lrn):
    """Forward and gradient in float64, on shapes that are not round."""
    torch.manual_seed(0)
    a = (100 * torch.randn(shape, dtype=torch.float64)).to(memory_format=layout).requires_grad_()
    grad = torch.randn(shape, dtype=torch.float64)
    ours = lrn()(a)
    assert not a.numel() or ours.is_contiguous(memory_format=layout)
    (our_grad,) = torch.autograd.grad(ours, a, grad)
    references = [lrn_by_loop(a)]
    if a.numel():
        references.append(F.local_response_norm(a, 5, alpha=1e-4, beta=0.75, k=2.0))
    for theirs in references:
        (their_grad,) = torch.autograd.grad(theirs, a, grad)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(our_grad, their_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lrn", LRNS)
def test_lrn_gradient_by_finite_differences(lrn):
    a = (30 * torch.randn(2, 9, 2, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lrn(alpha=0.02), a)
    assert torch.autograd.gradcheck(lrn(size=3, beta=0.5, k=1.0, alpha=0.1), a)


@pytest.mark.parametrize("lrn", LRNS)
def test_lrn_stays_within_a_column(lrn):
    a = 100 * torch.randn(2, 8, 3, 3, dtype=torch.float64)
    halves = torch.cat([lrn()(half.contiguous()) for half in a.chunk(2, 1)], 1)
    torch.testing.assert_close(lrn(columns=2)(a), halves, rtol=0, atol=0)
    torch.testing.assert_close(lrn(columns=2)(a), lrn_by_loop(a, 2), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(lrn(columns=1)(a), halves)
    with pytest.raises(RuntimeError):
        lrn(columns=2)(a[:, :7])  # 7 channels are not two columns


@pytest.mark.parametrize("lrn", LRNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lrn_under_autocast_computes_in_float32(dtype, lrn):
    """A half-precision input gives the float32 result rounded once, and its own dtype, forward and gradient."""
    a = (100 * torch.randn(2, 16, 5, 5)).to(dtype).requires_grad_()
    grad = torch.randn(2, 16, 5, 5).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours = lrn()(a)
    exact = a.detach().double().requires_grad_()
    theirs = F.local_response_norm(exact, 5, alpha=1e-4, beta=0.75, k=2.0)
    assert ours.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), theirs, rtol=step, atol=1e-5)
    (our_grad,) = torch.autograd.grad(ours, a, grad)
    (their_grad,) = torch.autograd.grad(theirs, exact, grad.double())
    torch.testing.assert_close(our_grad.double(), their_grad, rtol=step, atol=1e-5)


# ---------------------------------------------------------------------------------------------- dropout, columns, init


@pytest.mark.parametrize("dropout", [Dropout, FastDropout])
def test_dropout_is_not_rescaled(dropout):
    """Paper, section 4.2: training gives 0 or x, testing x * 0.5."""
    x = torch.full((1000, 100), 3.0, requires_grad=True)
    out = dropout(0.5).train()(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, (out != 0).float())  # what is dropped learns nothing
    out = out.detach()
    assert (out == 0).float().std(0).min() > 0.4  # a mask of its own for each picture and unit
    assert (out == 0).float().std(1).min() > 0.3
    assert set(out.unique().tolist()) == {0.0, 3.0}
    assert abs((out == 0).float().mean().item() - 0.5) < 0.01
    assert torch.equal(dropout(0.5).eval()(x), x * 0.5)
    assert torch.equal(dropout(0.0).train()(x), x)
    assert abs((dropout(0.2).train()(x) == 0).float().mean().item() - 0.2) < 0.01


@pytest.mark.parametrize("dropout", [Dropout, FastDropout])
def test_dropout_masks_come_from_the_global_generator(dropout):
    x = torch.ones(50, 50)
    torch.manual_seed(5)
    first = dropout(0.5)(x)
    torch.manual_seed(5)
    assert torch.equal(first, dropout(0.5)(x))
    assert not torch.equal(first, dropout(0.5)(x))


def test_two_columns_are_two_nets_wired_by_hand():
    """conv2, conv4 and conv5 see their own half; conv3, fc6 and fc7 see both (paper, figure 2). In float64."""
    net = AlexNet(5, image_size=64, columns=2).double().eval()
    x = 50 * torch.randn(2, 3, 64, 64, dtype=torch.float64)

    def half(layer, part):
        return layer.weight.chunk(2)[part], layer.bias.chunk(2)[part]

    def norm_pool(maps):
        return F.max_pool2d(F.local_response_norm(maps, 5, 1e-4, 0.75, 2.0), 3, 2)

    maps = [norm_pool(F.conv2d(x, *half(net.conv1, p), stride=4, padding=2).relu()) for p in (0, 1)]
    maps = [norm_pool(F.conv2d(maps[p], *half(net.conv2, p), padding=2).relu()) for p in (0, 1)]
    both = torch.cat(maps, 1)
    maps = [F.conv2d(both, *half(net.conv3, p), padding=1).relu() for p in (0, 1)]
    maps = [F.conv2d(maps[p], *half(net.conv4, p), padding=1).relu() for p in (0, 1)]
    maps = [F.max_pool2d(F.conv2d(maps[p], *half(net.conv5, p), padding=1).relu(), 3, 2) for p in (0, 1)]
    x6 = F.linear(torch.cat(maps, 1).flatten(1), net.fc6.weight, net.fc6.bias).relu() * 0.5
    x7 = F.linear(x6, net.fc7.weight, net.fc7.bias).relu() * 0.5
    by_hand = F.linear(x7, net.fc8.weight, net.fc8.bias)
    torch.testing.assert_close(net(x), by_hand, rtol=1e-10, atol=1e-10)


def layers_145(net: AlexNet, picture: np.ndarray, beyond: int) -> np.ndarray:
    """Logits of the 2012 code's net (layers-145.cfg), each column a net of its own, in float64 by numpy."""

    def part(layer, column):
        return layer.weight.detach().chunk(2)[column].numpy(), layer.bias.detach().chunk(2)[column].numpy()

    def whole(layer):
        return layer.weight.detach().numpy(), layer.bias.detach().numpy()

    columns = []
    for column in (0, 1):
        x = ref.convolution(picture, *part(net.conv1, column), stride=4, pad=((0, beyond), (0, beyond)))
        x = ref.relu(ref.max_pool(ref.lrn(x)))
        x = ref.relu(ref.convolution(x, *part(net.conv2, column), pad=2))
        columns.append(ref.max_pool(ref.map_norm(ref.lrn(x))))
    both, columns = np.concatenate(columns), []
    for column in (0, 1):
        x = ref.relu(ref.convolution(both, *part(net.conv3, column), pad=1))
        x = ref.relu(ref.convolution(x, *part(net.conv4, column), pad=1))
        columns.append(ref.relu(ref.max_pool(ref.convolution(x, *part(net.conv5, column), pad=1))))
    x = np.concatenate(columns).ravel()
    for layer in (net.fc6, net.fc7):
        weight, bias = whole(layer)
        x = 0.5 * ref.relu(weight @ x + bias)
    weight, bias = whole(net.fc8)
    return weight @ x + bias


@pytest.mark.parametrize(("size", "beyond"), [(64, 3), (66, 1), (67, 0)])
def test_the_2012_net_is_the_authors(size, beyond):
    """Against the forward pass of layers-145.cfg written out; the zeros beyond the right and lower edge are as many as
    the last of ceil((size - 11) / 4) + 1 windows needs. Weights large enough for the norms to matter."""
    torch.manual_seed(0)
    net = AlexNet(5, image_size=size, columns=2, order="2012").double().eval()
    for layer in (net.conv1, net.conv2):
        torch.nn.init.normal_(layer.weight, 0, 0.1)
    pictures = 60 * torch.randn(2, 3, size, size, dtype=torch.float64)
    by_hand = np.stack([layers_145(net, picture.numpy(), beyond) for picture in pictures])
    np.testing.assert_allclose(net(pictures).detach().numpy(), by_hand, rtol=1e-9, atol=1e-12)
    other = AlexNet(5, image_size=size, columns=2).double().eval()
    other.load_state_dict(net.state_dict())
    assert not np.allclose(other(pictures).detach().numpy(), by_hand, rtol=0.01)


def test_224_with_rounding_up_is_227_with_zeros():
    torch.manual_seed(0)
    net, larger = (AlexNet(4, image_size=size, columns=2, order="2012").eval() for size in (224, 227))
    larger.load_state_dict(net.state_dict())
    pictures = 60 * torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(net(pictures), larger(F.pad(pictures, (0, 3, 0, 3))), rtol=0, atol=0)
    assert not torch.equal(net(pictures), larger(F.pad(pictures, (2, 1, 2, 1))))


def test_map_norm_under_autocast_computes_in_float32():
    a = (100 * torch.randn(2, 4, 6, 7)).bfloat16()
    out = MapNorm()(a)
    assert out.dtype == torch.bfloat16
    exact = np.stack([ref.map_norm(picture) for picture in a.double().numpy()])
    np.testing.assert_allclose(out.double().numpy(), exact, rtol=2**-8)
    assert torch.autograd.gradcheck(MapNorm(), (20 * torch.randn(1, 2, 6, 5, dtype=torch.float64)).requires_grad_())


@pytest.mark.parametrize(
    ("options", "alpha", "k", "across"),
    [
        ({}, 1e-4 / 5, 2.0, False), ({"lrn_alpha": "paper"}, 1e-4, 2.0, False), ({"lrn_k": 1}, 1e-4 / 5, 1.0, False),
        ({"lrn_across": True}, 1e-4 / 5, 2.0, True), ({"columns": 1}, 1e-4 / 5, 2.0, True),
    ],
)
def test_lrns_options_reach_both_norms(options, alpha, k, across):
    """alpha as the paper prints it or divided by n; k; windows that stay in a column or cross into the other."""
    net = AlexNet(3, image_size=64, **{"columns": 2} | options)
    for norm, channels in ((net.norm1, 96), (net.norm2, 256)):
        a = 200 * torch.randn(1, channels, 3, 3, dtype=torch.float64)
        parts = [a[0].numpy()] if across else np.split(a[0].numpy(), 2)
        by_hand = np.concatenate([ref.lrn(part, k=k, alpha=alpha) for part in parts])
        np.testing.assert_allclose(norm(a)[0].numpy(), by_hand, rtol=1e-12)


@pytest.mark.parametrize("recipe", ["2012", "paper"])
def test_initialisation_is_the_sources(recipe):
    torch.manual_seed(0)
    net = AlexNet(10, image_size=64)
    net.init_weights(recipe)
    for name, layer in net.named_children():
        if hasattr(layer, "bias"):
            wide = recipe == "2012" and name in ("conv3", "conv4", "conv5")
            assert layer.weight.std().item() == pytest.approx(0.03 if wide else 0.01, rel=0.03), name
            assert abs(layer.weight.mean().item()) < 0.001
            far = (layer.weight.abs() > 2 * layer.weight.std()).float().mean().item()
            assert far == pytest.approx(0.0455, abs=0.006), name  # a normal distribution's share
            ones = name in ("conv2", "conv4", "conv5", "fc6", "fc7")
            assert (layer.bias == (1.0 if ones else 0.0)).all(), name
    with pytest.raises(ValueError, match="2012 or paper"):
        net.init_weights("kaiming")


@pytest.mark.parametrize("name", list(model.ACTIVATIONS))
def test_options_build_a_net_that_learns(name):
    """Each activation, with and without LRN, overlap and dropout, in any mixture with ReLU: the gradient reaches every
    parameter."""
    mixtures = list(itertools.product((True, False), (True, False), (0.5, 0)))
    for lrn, overlap, dropout in mixtures if name == "relu" else (mixtures[0], mixtures[-1]):
        net = AlexNet(3, image_size=64, activation=name, lrn=lrn, overlapping_pool=overlap, dropout=dropout)
        acts = [layer for layer_name, layer in net.named_children() if layer_name.startswith("act")]
        assert len(acts) == 7
        assert all(type(act) is type(model.ACTIVATIONS[name]()) for act in acts)
        assert isinstance(net.norm1, LocalResponseNorm) == isinstance(net.norm2, LocalResponseNorm) == lrn
        assert net.drop6.p == net.drop7.p == dropout
        F.cross_entropy(net(30 * torch.randn(2, 3, 64, 64)), torch.tensor([0, 2])).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        assert net.conv1.weight.grad.abs().sum() > 0


def test_config_rebuilds_the_net():
    for more in ({"activation": "tanh", "lrn": False}, {"order": "2012", "lrn_k": 1.0, "lrn_alpha": "paper"}):
        net = AlexNet(7, image_size=96, columns=2, overlapping_pool=False, dropout=0.25, **more)
        again = AlexNet(**net.config)
        again.load_state_dict(net.state_dict())
        x = 50 * torch.randn(1, 3, 96, 96)
        assert torch.equal(net.eval()(x), again.eval()(x))
        assert torch.equal(net(x), net.fc8(net.features(x)))


def test_copied_alone_it_works(tmp_path):
    """In an empty folder; importing it draws nothing from torch's generator."""
    shutil.copy(model.__file__, tmp_path)
    code = """
import torch
state = torch.random.get_rng_state()
import model
assert torch.equal(state, torch.random.get_rng_state())
model.AlexNet(2, image_size=64)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
