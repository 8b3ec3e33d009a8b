"""kernels.py: the fast layers compute what model.py's and torch's do, or step aside."""

import copy
import itertools
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, environment, run
from torch import library, nn

import kernels
import model
import train
import utils
from data.augment import Augment, epoch_tables
from data.loader import Loader
from kernels import (
    CompiledLRN,
    FastConv2d,
    FastDropout,
    FastFReLU,
    FastLinear,
    FastSReLU,
    TorchLRN,
    TritonLRN,
    accelerate,
)
from model import AlexNet, LocalResponseNorm
from recipe import make_optimizer

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = [
    ((2, 96, 9, 7), 1), ((3, 48, 8, 8), 2), ((1, 3, 5, 5), 1), ((2, 2, 3, 70), 1), ((2, 4, 1, 1), 2), ((1, 1, 1, 1), 1),
    ((1, 1024, 2, 1), 1), ((1, 10, 13, 11), 2), ((1, 6, 20, 31), 2),
]


@pytest.fixture
def fresh(monkeypatch):
    """kernels.py without what it remembers of the compiler and of its checks; set CC, SOURCE or a wrong function."""
    forget()
    yield monkeypatch
    monkeypatch.undo()
    forget()


def forget() -> None:
    kernels.compiled.cache_clear()
    kernels.difference.cache_clear()


def numbers_like(shape, layout=torch.contiguous_format, dtype=torch.float32):
    return (30 * torch.randn(shape)).to(dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "columns", "size"), [
    *[(*one, 5) for one in SHAPES],
    *[(*one, size) for one in (SHAPES[1], SHAPES[3], SHAPES[7]) for size in (1, 3, 9, kernels.WIDEST)],
], ids=str)
def test_lrn_equals_the_formula_in_float64(shape, columns, size, layout, dtype):
    """Forward and gradient, shapes that are not round, windows cut off at columns; alpha so large that it matters.
    bfloat16 is rounded once, at the end, to eight bits: 1/256 of the number itself."""
    torch.manual_seed(0)
    x, g = (numbers_like(shape, LAYOUTS[layout], dtype) for _ in range(2))
    options = {"columns": columns, "size": size, "alpha": 1.0, "k": 1.5}
    x.requires_grad_()
    fast = CompiledLRN(**options)
    assert fast.fits(x)
    got = fast(x)
    assert got.stride() == x.stride()
    (grad,) = torch.autograd.grad(got, x, g)
    exact = x.detach().double().requires_grad_()
    expected = LocalResponseNorm(**options)(exact)
    (expected_grad,) = torch.autograd.grad(expected, exact, g.double())
    assert got.dtype == grad.dtype == dtype
    for one, right in ((got, expected), (grad, expected_grad)):
        own = right.abs() / 256 if dtype == torch.bfloat16 else 0
        assert ((one - right).abs() <= own + 1e-6 * right.abs().max()).all()


def test_what_is_not_finite_stays_so_in_bf16():
    """And is rounded to the even neighbour, as torch rounds."""
    x = torch.tensor([[float("nan"), float("inf"), 1.0, 0, 0, 0, 0, 0]]).bfloat16()[..., None, None]
    got = CompiledLRN()(x).flatten()
    assert got.isnan().tolist() == [True] * 3 + [False] * 5
    bits = torch.randint(-(2**31), 2**31, (1, 8, 100, 100), dtype=torch.int32)
    whole = bits.view(torch.float32).nan_to_num(0).clamp(-1e15, 1e15)
    identity = CompiledLRN(alpha=0.0, k=1.0)
    x = whole.bfloat16()
    assert torch.equal(identity(x), x)


def test_gradients_may_arrive_in_any_layout():
    x = numbers_like((2, 6, 5, 4), torch.channels_last).requires_grad_()
    fast, g = CompiledLRN(), numbers_like((2, 6, 5, 4))
    grads = [torch.autograd.grad(fast(x), x, h)[0] for h in (g, g.contiguous(memory_format=torch.channels_last))]
    grads.append(torch.autograd.grad(fast(x).sum(), x)[0])  # a gradient that is one number, expanded
    grads.append(torch.autograd.grad(fast(x), x, torch.ones_like(x))[0])
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[2], grads[3])


def test_the_threads_share_out_whole_rows():
    """The same bits whatever their number."""
    x = numbers_like((3, 96, 15, 15), torch.channels_last)
    fast, results = CompiledLRN(), []
    threads = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(fast(x))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


ODD = {
    "float64": numbers_like((1, 8, 3, 3), dtype=torch.float64),
    "float16": numbers_like((1, 8, 3, 3), dtype=torch.float16),
    "empty": torch.empty(0, 8, 3, 3),
    "gaps": numbers_like((1, 8, 6, 6))[:, :, ::2, ::2],
    "more channels than the stack takes": numbers_like((1, 1026, 1, 2)),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_kernels_c_cannot_do_goes_to_torchs_operations(odd):
    fast = CompiledLRN(columns=2)
    assert not fast.fits(ODD[odd])
    assert torch.equal(fast(ODD[odd]), TorchLRN(columns=2)(ODD[odd]))
    torch.testing.assert_close(fast(ODD[odd]), LocalResponseNorm(columns=2)(ODD[odd]))


def test_wider_windows_and_other_powers_go_to_torchs_operations():
    x = numbers_like((1, 8, 3, 3))
    for options in ({"size": kernels.WIDEST + 2}, {"beta": 0.5}):
        fast = CompiledLRN(**options)
        assert not fast.fits(x)
        assert torch.equal(fast(x), TorchLRN(**options)(x))
        torch.testing.assert_close(fast(x), LocalResponseNorm(**options)(x))
    with pytest.raises(RuntimeError):  # as the plain one: 7 channels are not two columns
        CompiledLRN(columns=2)(numbers_like((1, 7, 3, 3)))


def test_lrn_in_pieces_is_lrn_at_once(monkeypatch):
    """Torch's operations cut the batch on a CPU; where they cut makes no difference to a bit."""
    a = (50 * torch.randn(7, 16, 3, 3)).requires_grad_()
    whole = TorchLRN()(a)
    (whole_grad,) = torch.autograd.grad(whole.sum(), a)
    monkeypatch.setattr(kernels, "CPU_PIECE", 300)
    pieces = TorchLRN()(a)
    assert torch.equal(whole, pieces)
    assert torch.equal(whole_grad, torch.autograd.grad(pieces.sum(), a)[0])


@pytest.mark.parametrize(("n", "inputs", "outputs"), [(1, 3, 2), (7, 33, 19), (64, 256, 128), (5, 1, 1)])
def test_dense_layers_equal_torchs(n, inputs, outputs):
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs)
    fast = copy.copy(plain)
    fast.__class__ = FastLinear
    assert fast.weight is plain.weight
    x, g = torch.randn(n, inputs, requires_grad=True), torch.randn(n, outputs)
    wanted = (x, plain.weight, plain.bias)
    got = torch.autograd.grad(fast(x), wanted, g)
    expected = torch.autograd.grad(F.linear(*(t.double() for t in wanted)), wanted, g.double())
    torch.testing.assert_close(fast(x), plain(x))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    only = torch.autograd.grad(fast(x.detach()), wanted[1:], g)  # as in a first layer
    assert torch.equal(only[0], got[1])


def test_dense_layers_leave_to_torch_what_they_must():
    fast = FastLinear(4, 3)
    assert fast(torch.randn(2, 5, 4)).shape == (2, 5, 3)
    assert fast(torch.empty(0, 4)).shape == (0, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fast(torch.randn(2, 5))
    assert FastLinear(4, 3, bias=False)(torch.randn(2, 4)).shape == (2, 3)
    assert FastLinear(4, 3).double()(torch.randn(2, 4).double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(torch.randn(2, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("options", "shape"), [
    ({"kernel_size": 3, "padding": 1}, (5, 12, 3, 3)), ({"kernel_size": 3, "padding": 1, "groups": 2}, (5, 12, 3, 3)),
    ({"kernel_size": (5, 3), "padding": (2, 0), "groups": 4}, (2, 12, 2, 4)), ({"kernel_size": 1}, (1, 12, 1, 1)),
    ({"kernel_size": 2}, (3, 12, 4, 3)), ({"kernel_size": 3, "padding": 2}, (1, 12, 1, 1)),
], ids=str)
def test_convolutions_on_small_maps_equal_float64s(options, shape, layout):
    """All gradients, under autocast and in bfloat16 by itself. What is computed here is rounded once, at the end; the
    gradient of x is torch's, which is less exact where there is no AVX-512."""
    torch.manual_seed(0)
    plain = nn.Conv2d(12, 8, **options).bfloat16().float().to(memory_format=LAYOUTS[layout])
    x = torch.randn(shape).bfloat16().float().contiguous(memory_format=LAYOUTS[layout])
    exact = [t.detach().double().requires_grad_() for t in (x, plain.weight, plain.bias)]
    expected = F.conv2d(*exact, plain.stride, plain.padding, groups=plain.groups)
    g = torch.randn(expected.shape).bfloat16()
    expected = expected, *torch.autograd.grad(expected, exact, g.double())
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        fast = as_fast(plain).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            wanted = x.to(dtype).requires_grad_(), fast.weight, fast.bias
            got = fast(wanted[0])
        assert "_Convolution" in type(got.grad_fn).__name__
        got = got, *torch.autograd.grad(got, wanted, g)
        for i, (one, right) in enumerate(zip(got, expected, strict=True)):
            assert one.shape == right.shape
            largest = right.abs().max()
            assert ((one - right).abs() <= (0.01 * largest if i == 1 else right.abs() / 256 + 1e-5 * largest)).all()


def as_fast(conv: nn.Conv2d) -> FastConv2d:
    fast = copy.deepcopy(conv)
    fast.__class__ = FastConv2d
    return fast


@pytest.mark.parametrize(("options", "shape"), [
    ({"kernel_size": 3, "padding": 1}, (2, 4, 3, 4)), ({"kernel_size": 3, "padding": "same"}, (2, 4, 3, 3)),
    ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (2, 4, 3, 3)),
    ({"kernel_size": 3, "padding": 1, "stride": 2}, (2, 4, 3, 3)),
    ({"kernel_size": 3, "padding": 2, "dilation": 2}, (2, 4, 3, 3)),
    ({"kernel_size": 3, "padding": 1, "bias": False}, (2, 4, 3, 3)),
    ({"kernel_size": 3, "padding": 1}, (0, 4, 3, 3)), ({"kernel_size": 3, "padding": 1}, (4, 3, 3)),
], ids=str)
def test_other_convolutions_are_left_to_torch(options, shape):
    plain, x = nn.Conv2d(4, 6, **options).bfloat16(), torch.randn(shape).bfloat16()
    y = as_fast(plain)(x)
    assert "_Convolution" not in type(y.grad_fn).__name__
    assert torch.equal(y, plain(x))


def test_other_dtypes_and_weights_that_do_not_learn_are_left_to_torch():
    fast, x = as_fast(nn.Conv2d(4, 6, 3, padding=1)), torch.randn(2, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast.fits(x)
        assert fast.fits(x.bfloat16())
        assert not fast.fits(x.double())
        with torch.no_grad():
            assert not fast.fits(x)
        fast.weight.requires_grad_(False)
        assert not fast.fits(x)
        fast.weight.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        assert not fast.fits(x)
    assert not fast.fits(x)
    assert not fast.fits(x.bfloat16())
    for shape in ((2, 3, 3, 3), (2, 4, 0, 3)):  # as torch's layer: other channels; kernels larger than the picture
        with pytest.raises(RuntimeError):
            fast.bfloat16()(torch.randn(shape).bfloat16())
    fast.padding = 1
    assert fast(x.bfloat16()).shape == (2, 6, 3, 3)


def test_torch_compile_takes_convolutions_in_bf16_whole():
    torch.manual_seed(0)
    net = AlexNet(10, image_size=64, dropout=0)
    net.conv3, net.conv4, net.conv5 = map(as_fast, (net.conv3, net.conv4, net.conv5))
    images, grads, graphs = 50 * torch.randn(4, 3, 64, 64), [], []
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(net, backend=lambda graph, _: graphs.append(graph.code) or graph, fullgraph=True)(images)
    assert graphs[0].count(" = torch.ops.higher_order.autograd_function_apply(") == 3
    torch.compiler.reset()
    for forward in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(images).sum()
        loss.backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for one, other in zip(*grads, strict=True):
        assert (one - other).abs().max() <= 0.02 * one.abs().max()


def test_convolutions_are_swapped_where_bf16_is_fast(fresh):
    """In a step at 64 pixels conv3 to conv5 have the other derivative."""
    net = AlexNet(4, image_size=64)
    fresh.setattr(kernels, "multiplies_bf16", lambda device: False)
    accelerate(net)
    assert type(net.conv4) is nn.Conv2d
    fresh.setattr(kernels, "multiplies_bf16", lambda device: True)
    accelerate(net)
    assert type(net.conv4) is FastConv2d
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(50 * torch.randn(2, 3, 64, 64)).sum()
    names, left = [], {loss.grad_fn}
    while left:
        node = left.pop()
        names.append(type(node).__name__)
        left |= {after for after, _ in node.next_functions if after}
    assert names.count("_ConvolutionBackward") == 3
    assert names.count("ConvolutionBackward0") == 2


@pytest.mark.parametrize(
    "options",
    [
        {}, {"columns": 2, "order": "2012"}, {"columns": 2, "lrn_across": True}, {"lrn": False},
        {"activation": "frelu"}, {"activation": "prelu"},
    ],
    ids=str,
)
def test_a_net_computes_the_same_and_keeps_its_checkpoint(options):
    torch.manual_seed(0)
    plain = AlexNet(10, image_size=64, **options)
    fast = copy.deepcopy(plain)
    names, parameters = list(fast.state_dict()), list(fast.parameters())
    line = accelerate(fast)
    for name in ("drop6", "drop7"):  # the masks of the fast one
        plain.get_submodule(name).__class__ = FastDropout
    assert list(fast.state_dict()) == names
    assert all(a is b for a, b in zip(fast.parameters(), parameters, strict=True))  # an optimiser's too
    images, labels = 50 * torch.randn(6, 3, 64, 64), torch.arange(6)
    for net in (plain, fast):
        torch.manual_seed(1)
        F.cross_entropy(net(images), labels).backward()
    for one, other in zip(plain.parameters(), fast.parameters(), strict=True):
        assert (one.grad - other.grad).abs().max() <= 1e-4 * one.grad.abs().max()
    torch.testing.assert_close(plain.eval()(images), fast.eval()(images), rtol=1e-4, atol=1e-4)
    kinds = [type(m) for m in fast.modules()]
    assert accelerate(fast) == line  # once more changes nothing
    assert [type(m) for m in fast.modules()] == kinds
    assert FastLinear in kinds
    assert (CompiledLRN in kinds) == options.get("lrn", True)


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("order", model.ORDERS)
@pytest.mark.parametrize("activation", model.ACTIVATIONS)
def test_fast_and_plain_nets_agree(activation, order, columns):
    """Logits and each parameter's gradient. With a kink in one of three draws: a sum within rounding of the kink may
    go one way here and the other there, and then all gradients before it differ."""
    draws = 1 if activation in ("tanh", "elu") else 3
    found = []
    while [] not in found and len(found) < draws:
        found.append(nets_differ(len(found), activation=activation, order=order, columns=columns))
    assert [] in found, found


def nets_differ(seed: int, **options) -> list[str]:
    """The parameters whose gradients differ. Weights large enough for the norms and the kinks to matter."""
    torch.manual_seed(seed)
    plain = AlexNet(10, image_size=64, dropout=0, **options)
    for layer in (plain.conv1, plain.conv2):
        nn.init.normal_(layer.weight, 0, 0.03)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    images, labels = 50 * torch.randn(6, 3, 64, 64), torch.arange(6)
    logits = [net(images) for net in (plain, fast)]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4 * logits[0].abs().max().item())
    for one in logits:
        F.cross_entropy(one, labels).backward()
    differ = []
    for (name, one), other in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert one.grad.abs().max() > 0
        if not (one.grad - other.grad).abs().max() <= 1e-3 * one.grad.abs().max():
            differ.append(name)
    return differ


def test_twenty_steps_have_the_plain_nets_losses(store):
    """train.py's step, inputs and masks, with kernels.py and without; the weights end closer to each other than a
    tenth of the way that they have gone."""
    loader = Loader(store, "train")
    inputs = Augment(64, store.mean, colour="2012", pca=store.manifest["pca"])
    losses, ends = {}, {}
    for kind in ("plain", "fast"):
        utils.seed_all(0)
        net = AlexNet(4, image_size=64).to(memory_format=torch.channels_last)
        start = copy.deepcopy(net.state_dict())
        if kind == "fast":
            accelerate(net)
        net.drop6.__class__ = net.drop7.__class__ = FastDropout  # the same masks
        optimizer = make_optimizer(net, recipe="2012", lr=0.001, momentum=0.9, weight_decay=5e-4)
        losses[kind], ends[kind] = [], net.state_dict()
        for step in range(20):
            tables = epoch_tables(0, step, 96, 8)
            samples = tables.order[:32]
            utils.seed_all(0, step, 0)
            ((crops, labels),) = loader.batches([samples], tables, 64)
            pictures = inputs.train(crops, tables.colour[samples])
            losses[kind].append(train.train_step(net, optimizer, pictures, labels, "fp32")[0].item())
    assert losses["fast"][0] == pytest.approx(losses["plain"][0], rel=1e-6)
    assert losses["fast"] == pytest.approx(losses["plain"], rel=2e-4)
    for name, weight in ends["plain"].items():
        assert (ends["fast"][name] - weight).norm() < 0.1 * (weight - start[name]).norm(), name


@pytest.mark.parametrize("lrn", [CompiledLRN, TorchLRN])
def test_only_its_input_is_kept_for_lrns_derivative(lrn):
    x, kept = numbers_like((2, 8, 5, 5)).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lrn()(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


@pytest.mark.parametrize("name", ["relu", "srelu", "frelu"])
def test_torch_compile_takes_the_net_whole(name):
    """No graph break but those at dropout's masks; aot_eager traces forward and backward as torch.compile's own backend
    does, without a compiler."""
    torch.manual_seed(0)
    net = AlexNet(10, image_size=64, dropout=0, activation=name)
    accelerate(net)
    images = 50 * torch.randn(4, 3, 64, 64)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    grads = []
    for forward in (net, compiled):
        net.zero_grad()
        forward(images).sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for one, other in zip(*grads, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()


@pytest.mark.parametrize("lrn", [LocalResponseNorm, TorchLRN])
@pytest.mark.parametrize("columns", [1, 2])
def test_lrn_in_torchs_operations_under_torch_compile(columns, lrn):
    """The fast one takes another form there, for the same numbers."""
    torch.manual_seed(0)
    layer, results = lrn(columns, alpha=1.0), []
    x, g = numbers_like((2, 12, 5, 7)).requires_grad_(), torch.randn(2, 12, 5, 7)
    for forward in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        out = forward(x)
        results.append((out.detach(), *torch.autograd.grad(out, x, g)))
    torch.testing.assert_close(*results)


def test_the_operators_are_what_torch_expects():
    """torch's own check of custom operators: schema, autograd, what they say of shapes."""
    x = numbers_like((2, 8, 3, 3), torch.channels_last).requires_grad_()
    library.opcheck(kernels.lrn, (x, 2, 5, 0.2, 2.0))
    dense = [torch.randn(shape, requires_grad=True) for shape in ((3, 5), (4, 5), (4,))]
    library.opcheck(kernels.dense, tuple(dense))
    turned = torch.randn(5, 3).t().requires_grad_(), dense[1].detach().t().contiguous().t().requires_grad_(), dense[2]
    library.opcheck(kernels.dense, turned)
    with pytest.raises(ValueError, match="without gaps"):
        kernels.lrn(numbers_like((1, 8, 6, 6))[:, :, ::2, ::2], 1, 5, 0.2, 2.0)


@pytest.mark.parametrize(("compiler", "reason"), [
    ("no-such-compiler", "there is no C compiler no-such-compiler"), ("false", "false can't build kernels.c here"),
    ("true", "true can't build kernels.c here"),
    ("cc -fvisibility=hidden", "cc -fvisibility=hidden can't build kernels.c here"),
])
def test_without_a_compiler_lrn_is_done_by_torchs_operations(fresh, compiler, reason):
    fresh.setenv("CC", compiler)
    net = AlexNet(4, image_size=64)
    assert accelerate(net) == f"LRN in torch's operations ({reason}), dense layers by oneDNN in fp32"
    assert type(net.norm1) is type(net.norm2) is TorchLRN
    assert type(net.fc6) is FastLinear


def test_a_folder_that_may_not_hold_programs_is_not_laid_to_the_compiler(fresh, tmp_path):
    """As /tmp of many clusters, where what is built cannot be loaded; here because it is no program."""
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho > "$2"\n')
    compiler.chmod(0o755)
    fresh.setenv("CC", str(compiler))
    assert "kernels.c can't be loaded from " in kernels.compiled(5)[1]


def test_a_compiler_that_lacks_gccs_options_builds_the_kernels_too(fresh, tmp_path):
    """As clang does, which knows no -fvect-cost-model=dynamic."""
    compiler = tmp_path / "plain-cc"
    compiler.write_text('#!/bin/sh\ncase "$*" in *cost-model*) exit 1;; esac\nexec cc "$@"\n')
    compiler.chmod(0o755)
    fresh.setenv("CC", str(compiler))
    assert kernels.compiled(5)[0] is not None


def test_it_says_what_it_chose():
    assert accelerate(AlexNet(4, image_size=64)) == "LRN compiled from kernels.c, dense layers by oneDNN in fp32"
    assert accelerate(AlexNet(4, image_size=64, lrn=False)) == "dense layers by oneDNN in fp32"
    assert accelerate(nn.Sequential(nn.ReLU())) == "nothing to accelerate"
    for size, kind, line in (
        (9, CompiledLRN, "LRN compiled from kernels.c"),
        (17, TorchLRN, "LRN in torch's operations (the fast ones take windows of at most 15 channels)"),
    ):
        net = nn.Sequential(LocalResponseNorm(), LocalResponseNorm(size=size))
        assert accelerate(net) == line
        assert [type(layer) for layer in net] == [kind, kind]  # one window too wide, and all of a net's go that way
    line = accelerate(AlexNet(4, image_size=64).to("meta"))
    assert line.startswith("LRN in torch's operations (there is a fast one for CPUs")
    assert kernels.trouble_with_dense("cuda") == "there is another product for CPUs only"


def test_a_triton_lrn_that_does_not_agree_is_not_used(fresh):
    fresh.setattr(kernels, "difference", lambda *_, **more: "is wrong in bfloat16")
    fresh.setattr(kernels, "triton", kernels.triton or "there")
    assert kernels.trouble_with_lrn("cuda") == "the one in Triton is wrong in bfloat16"
    assert kernels.fast_versions("cuda") == {model.Dropout: FastDropout}
    fresh.setattr(kernels, "triton", None)
    assert kernels.trouble_with_lrn("cuda") == "there is no Triton"


def test_kernels_on_is_refused_where_there_are_none(store, tmp_path, fresh):
    fresh.setenv("CC", "no-such-compiler")
    with pytest.raises(utils.UserError, match=r"--kernels on: .* no C compiler no-such-compiler; --kernels auto does"):
        run(store, tmp_path / "run", "--kernels", "on", "--device", "cpu")
    train.require_kernels("cpu", lrn=False)  # nothing is to be compiled for --no-lrn


def test_a_blank_cc_is_none(fresh):
    fresh.setenv("CC", " ")
    assert kernels.compiled(5)[0] is not None


def test_a_library_that_computes_something_else_is_not_used(fresh, tmp_path):
    source = kernels.SOURCE.read_text()
    for right, wrong in (("1.5f", "1.4f"), ("int j = 1", "int j = 2")):
        assert right in source
        (tmp_path / "kernels.c").write_text(source.replace(right, wrong))
        fresh.setattr(kernels, "SOURCE", tmp_path / "kernels.c")
        forget()
        assert kernels.trouble_with_lrn("cpu") == "the one compiled from kernels.c is wrong"


def test_each_window_is_built_where_a_net_has_it_and_checked_by_itself(fresh, tmp_path):
    """Here that of 9 is wrong, that of 5 is right, and the others are not looked at."""
    built, run_of = [], subprocess.run
    fresh.setattr(subprocess, "run", lambda command, **more: built.append(command) or run_of(command, **more))
    sound = pickle.dumps(CompiledLRN(size=9))
    (tmp_path / "kernels.c").write_text(kernels.SOURCE.read_text().replace("1.5f", "(AROUND == 4 ? 1.4f : 1.5f)"))
    fresh.setattr(kernels, "SOURCE", tmp_path / "kernels.c")
    net = nn.Sequential(LocalResponseNorm(size=9))
    assert accelerate(net) == "LRN in torch's operations (the one compiled from kernels.c is wrong)"
    assert type(net[0]) is type(pickle.loads(sound)) is TorchLRN
    assert [word for command in built for word in command if "AROUND" in word] == ["-DAROUND=4"]
    assert accelerate(nn.Sequential(LocalResponseNorm())) == "LRN compiled from kernels.c"
    assert len(built) == 2


def test_layers_that_are_left_alone_have_no_say_in_the_choice():
    class Own(LocalResponseNorm):
        size = 31

        def __init__(self):
            nn.Module.__init__(self)

    net = nn.Sequential(LocalResponseNorm(), Own(), LocalResponseNorm(size=17))
    net[2].register_forward_hook(lambda *_: None)
    assert accelerate(net) == "LRN compiled from kernels.c"
    assert [type(layer) for layer in net] == [CompiledLRN, Own, LocalResponseNorm]


def test_a_window_set_later_says_why_it_cannot_be_built(fresh):
    net = nn.Sequential(LocalResponseNorm())
    accelerate(net)
    fresh.setenv("CC", "no-such-compiler")
    net[0].size = 7
    with pytest.raises(RuntimeError, match="LRN over 7 channels: there is no C compiler no-such-compiler"):
        net(numbers_like((1, 8, 3, 3)))


def off_backward(x, weight, bias=None):
    return x @ weight.t() * (1.001 if bias is None else 1) + (0 if bias is None else bias)


@pytest.mark.parametrize("wrong", [
    lambda x, weight, bias=None: x @ weight.t(), off_backward, lambda x, weight, bias=None: x.new_empty(0),
    lambda x, weight, bias=None, more=None: torch.ops.mkldnn._linear_pointwise(x, weight),
], ids=["no bias", "wrong backward alone", "another shape", "another interface"])
def test_a_dense_product_that_computes_something_else_is_not_used(fresh, wrong):
    """oneDNN's is not part of torch's documented interface: it is checked when it is first used."""
    assert kernels.trouble_with_dense("cpu") == ""
    forget()
    fresh.setattr(kernels, "_product", wrong)
    net = AlexNet(4, image_size=64)
    assert "dense layers of torch (oneDNN's product " in accelerate(net)
    assert type(net.fc6) is nn.Linear


@pytest.mark.parametrize("kind", [TorchLRN, FastFReLU, FastSReLU, FastConv2d])
def test_derivatives_that_are_wrong_are_not_used(fresh, kind):
    """The check of what is written in torch's operations: off by five times what it allows or more, backwards."""
    assert kernels.difference(kind) == ""
    forget()
    fresh.setattr(kernels, "multiplies_bf16", lambda device: True)
    function = {TorchLRN: kernels._LRN, FastConv2d: kernels._Convolution}.get(kind, kernels._Rectify)
    factor = 1.05 if kind is FastConv2d else 1.001
    backward = function.backward
    fresh.setattr(function, "backward", lambda *args: tuple(
        g if g is None else factor * g for g in backward(*args)
    ))
    plain, options, _ = kernels.EXAMPLES[kind]
    net = nn.Sequential(plain(**options))
    fresh.setenv("CC", "no-such-compiler")
    accelerate(net)
    assert type(net[0]) is plain


def test_random_bits_are_the_masks_of_dropout():
    """The draws that a seeded run depends on: the lowest bits of the bytes of whole words from torch's generator."""
    x = torch.ones(7, 9)
    torch.manual_seed(3)
    got = FastDropout(0.5)(x)
    torch.manual_seed(3)
    words = torch.empty(63 // 8 + 1, dtype=torch.int64).random_()
    assert got.flatten().tolist() == [byte % 2 for byte in words.numpy().tobytes()[:63]]


def test_only_an_alexnets_activations_work_in_place():
    """Another net may need what they would overwrite, and so may somebody who looks on by a hook."""
    for name in ("relu", "elu"):
        net, watched = (AlexNet(4, image_size=64, activation=name) for _ in range(2))
        watched.conv1.register_forward_hook(lambda *_: None)
        other = nn.Sequential(model.activation(name))
        for each in (net, watched, other):
            accelerate(each)
        acts = [net.get_submodule(f"act{number}") for number in range(1, 8)]
        assert all(act.inplace for act in acts)
        assert not watched.act1.inplace
        assert not other[0].inplace


def test_a_pickled_net_works_where_there_is_no_compiler(fresh):
    net = AlexNet(4, image_size=64).eval()
    accelerate(net)
    images, pickled = torch.randn(1, 3, 64, 64), pickle.dumps(net)
    expected = net(images)
    fresh.setenv("CC", "no-such-compiler")
    forget()
    other = pickle.loads(pickled)
    assert type(other.norm1) is TorchLRN
    torch.testing.assert_close(other(images), expected)


def test_the_first_use_may_be_in_inference_mode(fresh):
    with torch.inference_mode():
        accelerate(AlexNet(4, image_size=64))
    assert kernels.trouble_with_lrn("cpu") == kernels.trouble_with_dense("cpu") == ""


@pytest.mark.parametrize("size", [5, kernels.WIDEST])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lrn_needs_little_stack(layout, size):
    """Threads with 256 KB of it, the least that some systems give: AlexNet's 256 channels."""
    x, g = (numbers_like((2, 256, 20, 20), LAYOUTS[layout]) for _ in range(2))
    fast, grads = CompiledLRN(size=size), []
    x.requires_grad_()
    before = threading.stack_size(262144)
    thread = threading.Thread(target=lambda: grads.append(torch.autograd.grad(fast(x), x, g)[0]))
    thread.start()
    thread.join()
    threading.stack_size(before)
    assert torch.equal(grads[0], torch.autograd.grad(fast(x), x, g)[0])


def test_layers_with_hooks_stay():
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    torch.nn.utils.spectral_norm(net[0])
    net[1].register_forward_hook(lambda *_: None)
    accelerate(net)
    assert [type(layer) for layer in net] == [nn.Linear, nn.Linear, FastLinear]


def test_the_triton_kernels_in_tritons_interpreter():
    """float32, bfloat16, float16 in both layouts, against float64."""
    pytest.importorskip("triton")
    alone = [sys.executable, "-m", "tests.triton_alone"]
    done = subprocess.run(alone, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("name", ["_forward_kernel", "_backward_kernel"])
@pytest.mark.parametrize(("dtype", "one"), [("bf16", "channel_stride"), ("fp32", "pixel_stride")])
@pytest.mark.parametrize("size", [5, kernels.WIDEST])
def test_the_triton_kernels_compile_for_an_h100(size, name, dtype, one, tmp_path):
    """To machine code for compute capability 9.0, which needs no GPU; each number is loaded no more than it must be:
    for windows of 5, 5 times a result forward, 14 backward (9 of a, 5 of g). Prints the registers a thread (for them at
    most 96: a multiprocessor's 65,536 are then enough for 20 warps) and what is spilled to memory (nothing)."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    kernel = getattr(kernels, name)
    tensors = ("a", "b", "g", "grad")
    constants = {"P": kernels.TILE_PIXELS, "C": kernels.TILE_CHANNELS, "AROUND": size // 2, one: 1}
    kinds = {n: "*" + dtype if n in tensors else "fp32" if n in ("scale", "k") else "i32" for n in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, kinds | dict.fromkeys(constants, "constexpr"), constants)
    warps = kernels.WARPS
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    loads = (size if "forward" in name else 3 * size - 1) * kernels.TILE_PIXELS * kernels.TILE_CHANNELS // (32 * warps)
    assert built.asm["ptx"].count("ld.global") <= loads
    (tmp_path / "kernel.cubin").write_bytes(built.asm["cubin"])
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    used = subprocess.run([tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True)
    registers, stack = (int(re.search(rf"{what}:(\d+)", used.stdout)[1]) for what in ("REG", "STACK"))
    print(f"{name} over {size} channels in {dtype}: {registers} registers a thread, {stack} bytes spilled")  # pytest -s
    assert registers <= (96 if size == 5 else 255)
    assert stack == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_lrn_on_a_gpu():
    close = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
    sizes = (5, 9)
    for (shape, columns), size, layout, dtype in itertools.product(SHAPES, sizes, LAYOUTS.values(), close):
        x, g = (numbers_like(shape, layout, dtype).cuda() for _ in range(2))
        fast = TritonLRN(columns, size, alpha=1.0)
        assert fast.fits(x.requires_grad_())
        exact = x.detach().double().requires_grad_()
        got, expected = fast(x), LocalResponseNorm(columns, size, alpha=1.0)(exact)
        pairs = [(got, expected)]
        pairs.append((torch.autograd.grad(got, x, g)[0], torch.autograd.grad(expected, exact, g.double())[0]))
        for one, right in pairs:
            assert (one - right).abs().max() <= close[dtype] * right.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_on_a_gpu_never_wait_for_it(store):
    """From resident pictures to the update; the first step may."""
    loader, inputs = Loader(store, "train", "cuda"), Augment(64, store.mean, device="cuda")
    net = AlexNet(4, image_size=64).cuda().to(memory_format=torch.channels_last)
    accelerate(net)
    optimizer = make_optimizer(net, recipe="2012", lr=0.001, momentum=0.9, weight_decay=5e-4)
    tables, pictures = epoch_tables(0, 0, 96, 8), None
    for step, (crops, labels) in enumerate(loader.batches([tables.order[:32]] * 3, tables, 64)):
        pictures = inputs.train(crops, tables.colour[tables.order[:32]], out=pictures)
        train.train_step(net, optimizer, pictures, labels, "bf16")
        torch.cuda.set_sync_debug_mode("error" if step < 2 else "default")
