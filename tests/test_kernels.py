"""kernels.py: the fast LRN and the fast dense layer compute what model.py's and torch's do, or step aside."""

import copy
import itertools
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, environment
from torch import library, nn

import kernels
import train
import utils
from data.augment import Augment, epoch_tables
from data.loader import Loader
from kernels import FastLinear, FastLRN, accelerate
from model import AlexNet, LocalResponseNorm
from recipe import make_optimizer

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = [
    ((2, 96, 9, 7), 1), ((3, 48, 8, 8), 2), ((1, 3, 5, 5), 1), ((2, 2, 3, 70), 1), ((2, 4, 1, 1), 2), ((1, 1, 1, 1), 1),
    ((1, 1024, 2, 1), 1), ((1, 10, 13, 11), 2), ((1, 6, 20, 31), 2),
]


@pytest.fixture
def no_library(monkeypatch):
    """kernels.compiled without what it remembers; set CC or SOURCE, then call it."""
    kernels.compiled.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    kernels.compiled.cache_clear()


def silent(_line) -> None:
    pass


def numbers_like(shape, layout=torch.contiguous_format, dtype=torch.float32):
    return (30 * torch.randn(shape)).to(dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "columns"), SHAPES, ids=str)
def test_lrn_equals_the_formula_in_float64(shape, columns, layout):
    """Forward and gradient, shapes that are not round, windows cut off at columns; alpha so large that it matters."""
    torch.manual_seed(0)
    x, g = (numbers_like(shape, LAYOUTS[layout]) for _ in range(2))
    options = {"columns": columns, "alpha": 1.0, "k": 1.5}
    x.requires_grad_()
    fast = FastLRN(LocalResponseNorm(**options))
    assert fast.fits(x)
    got = fast(x)
    assert got.stride() == x.stride()
    (grad,) = torch.autograd.grad(got, x, g)
    exact = x.detach().double().requires_grad_()
    expected = LocalResponseNorm(**options)(exact)
    (expected_grad,) = torch.autograd.grad(expected, exact, g.double())
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (grad - expected_grad).abs().max() <= 1e-6 * expected_grad.abs().max()


def test_gradients_may_arrive_in_any_layout():
    x = numbers_like((2, 6, 5, 4), torch.channels_last).requires_grad_()
    fast, g = FastLRN(LocalResponseNorm()), numbers_like((2, 6, 5, 4))
    grads = [torch.autograd.grad(fast(x), x, h)[0] for h in (g, g.contiguous(memory_format=torch.channels_last))]
    grads.append(torch.autograd.grad(fast(x).sum(), x)[0])  # a gradient that is one number, expanded
    grads.append(torch.autograd.grad(fast(x), x, torch.ones_like(x))[0])
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[2], grads[3])


def test_the_threads_share_out_whole_rows():
    """The same bits whatever their number."""
    x = numbers_like((3, 96, 15, 15), torch.channels_last)
    fast, results = FastLRN(LocalResponseNorm()), []
    threads = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(fast(x))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


ODD = {
    "float64": numbers_like((1, 8, 3, 3), dtype=torch.float64),
    "bfloat16": numbers_like((1, 8, 3, 3), dtype=torch.bfloat16),
    "empty": torch.empty(0, 8, 3, 3),
    "gaps": numbers_like((1, 8, 6, 6))[:, :, ::2, ::2],
    "more channels than the stack takes": numbers_like((1, 1026, 1, 2)),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_the_fast_lrn_cannot_do_goes_to_the_plain_one(odd):
    plain = LocalResponseNorm(columns=2)
    fast = FastLRN(plain)
    assert not fast.fits(ODD[odd])
    assert torch.equal(fast(ODD[odd]), plain(ODD[odd]))


def test_other_windows_and_powers_stay_plain():
    x = numbers_like((1, 8, 3, 3))
    for plain in (LocalResponseNorm(size=3), LocalResponseNorm(beta=0.5)):
        assert not FastLRN(plain).fits(x)
        assert torch.equal(FastLRN(plain)(x), plain(x))
    with pytest.raises(RuntimeError):  # as the plain one: 7 channels are not two columns
        FastLRN(LocalResponseNorm(columns=2))(numbers_like((1, 7, 3, 3)))


@pytest.mark.parametrize(("n", "inputs", "outputs"), [(1, 3, 2), (7, 33, 19), (64, 256, 128), (5, 1, 1)])
def test_dense_layers_equal_torchs(n, inputs, outputs):
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs)
    fast = FastLinear(plain)
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
    fast = FastLinear(nn.Linear(4, 3))
    assert fast(torch.randn(2, 5, 4)).shape == (2, 5, 3)
    assert fast(torch.empty(0, 4)).shape == (0, 3)
    assert FastLinear(nn.Linear(4, 3, bias=False))(torch.randn(2, 4)).shape == (2, 3)
    assert FastLinear(nn.Linear(4, 3).double())(torch.randn(2, 4).double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(torch.randn(2, 4)).dtype == torch.bfloat16


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
    lines = []
    fast = copy.deepcopy(plain)
    names, parameters = list(fast.state_dict()), list(fast.parameters())
    assert accelerate(fast, say=lines.append) is fast
    assert len(lines) == 1
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
    accelerate(fast, say=silent)  # once more changes nothing
    assert [type(m) for m in fast.modules()] == kinds
    assert FastLinear in kinds
    assert (FastLRN in kinds) == options.get("lrn", True)


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
            accelerate(net, say=silent)
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


def test_only_its_input_is_kept_for_lrns_derivative():
    x, kept = numbers_like((2, 8, 5, 5)).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        FastLRN(LocalResponseNorm())(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


@pytest.mark.parametrize("name", ["relu", "srelu", "frelu"])
def test_torch_compile_takes_the_net_whole(name):
    """No graph break; aot_eager traces forward and backward as torch.compile's own backend does, without a compiler."""
    torch.manual_seed(0)
    net = accelerate(AlexNet(10, image_size=64, dropout=0, activation=name), say=silent)
    images = 50 * torch.randn(4, 3, 64, 64)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    grads = []
    for forward in (net, compiled):
        net.zero_grad()
        forward(images).sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for one, other in zip(*grads, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()


@pytest.mark.parametrize("columns", [1, 2])
def test_the_plain_lrn_under_torch_compile(columns):
    """It takes another form there, for the same numbers."""
    torch.manual_seed(0)
    plain, results = LocalResponseNorm(columns, alpha=1.0), []
    x, g = numbers_like((2, 12, 5, 7)).requires_grad_(), torch.randn(2, 12, 5, 7)
    for forward in (plain, torch.compile(plain, backend="aot_eager", fullgraph=True)):
        out = forward(x)
        results.append((out.detach(), *torch.autograd.grad(out, x, g)))
    torch.testing.assert_close(*results)


def test_the_operators_are_what_torch_expects():
    """torch's own check of custom operators: schema, autograd, what they say of shapes."""
    x = numbers_like((2, 8, 3, 3), torch.channels_last).requires_grad_()
    library.opcheck(kernels.lrn, (x, 2, 0.2, 2.0))
    dense = [torch.randn(shape, requires_grad=True) for shape in ((3, 5), (4, 5), (4,))]
    library.opcheck(kernels.dense, tuple(dense))
    turned = torch.randn(5, 3).t().requires_grad_(), dense[1].detach().t().contiguous().t().requires_grad_(), dense[2]
    library.opcheck(kernels.dense, turned)
    with pytest.raises(ValueError, match="without gaps"):
        kernels.lrn(numbers_like((1, 8, 6, 6))[:, :, ::2, ::2], 1, 0.2, 2.0)


@pytest.mark.parametrize(("compiler", "reason"), [
    ("no-such-compiler", "there is no C compiler no-such-compiler"), ("false", "false can't build kernels.c here"),
    ("true", "true can't build kernels.c here"),
    ("cc -fvisibility=hidden", "cc -fvisibility=hidden can't build kernels.c here"),
])
def test_without_a_compiler_lrn_is_the_plain_one(no_library, compiler, reason):
    no_library.setenv("CC", compiler)
    lines = []
    net = accelerate(AlexNet(4, image_size=64), say=lines.append)
    assert lines[0].startswith(f"LRN of model.py ({reason}")
    assert lines[0].endswith("), dense layers by oneDNN (in float32)")
    assert type(net.norm1) is type(net.norm2) is LocalResponseNorm
    assert type(net.fc6) is FastLinear


def test_it_says_what_it_chose():
    def said(net):
        lines = []
        accelerate(net, say=lines.append)
        return lines

    assert said(AlexNet(4, image_size=64)) == ["LRN compiled from kernels.c, dense layers by oneDNN (in float32)"]
    assert said(AlexNet(4, image_size=64, lrn=False)) == ["dense layers by oneDNN (in float32)"]
    assert said(nn.Sequential(nn.ReLU())) == ["nothing to accelerate"]
    why = "the Triton one has run on no GPU yet and has to be asked for"
    assert said(AlexNet(4, image_size=64).to("meta"))[0].startswith("LRN of model.py (there is a fast one for CPUs")
    assert (kernels.trouble_with_lrn("cuda", False), kernels.trouble_with_linear("cuda")) == (
        why, "there is another product for CPUs only",
    )


def test_a_library_that_computes_something_else_is_not_used(no_library, tmp_path):
    source = kernels.SOURCE.read_text()
    for right, wrong in (("1.5f", "1.4f"), ("s[3] + s[4])", "s[3])")):
        assert right in source
        (tmp_path / "kernels.c").write_text(source.replace(right, wrong))
        no_library.setattr(kernels, "SOURCE", tmp_path / "kernels.c")
        kernels.compiled.cache_clear()
        assert kernels.compiled()[1].endswith("makes of kernels.c is wrong")


def test_a_pickled_net_works_where_there_is_no_compiler(no_library):
    net = accelerate(AlexNet(4, image_size=64), say=silent).eval()
    images, pickled = torch.randn(1, 3, 64, 64), pickle.dumps(net)
    expected = net(images)
    no_library.setenv("CC", "no-such-compiler")
    kernels.compiled.cache_clear()
    other = pickle.loads(pickled)
    assert not other.norm1.fits(images)
    torch.testing.assert_close(other(images), expected)


def test_the_first_use_may_be_in_inference_mode(no_library):
    with torch.inference_mode():
        accelerate(AlexNet(4, image_size=64), say=silent)
    assert kernels.compiled()[1] == ""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lrn_needs_little_stack(layout):
    """Threads with 256 KB of it, the least that some systems give: AlexNet's 256 channels."""
    x, g = (numbers_like((2, 256, 20, 20), LAYOUTS[layout]) for _ in range(2))
    fast, grads = FastLRN(LocalResponseNorm()), []
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
    accelerate(net, say=silent)
    assert [type(layer) for layer in net] == [nn.Linear, nn.Linear, FastLinear]


def test_the_triton_kernels_in_tritons_interpreter():
    """float32, bfloat16, float16 in both layouts, against float64."""
    pytest.importorskip("triton")
    alone = [sys.executable, "-m", "tests.triton_alone"]
    done = subprocess.run(alone, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("name", ["_forward_kernel", "_backward_kernel"])
@pytest.mark.parametrize(("dtype", "one"), [("bf16", "channel_stride"), ("fp32", "pixel_stride")])
def test_the_triton_kernels_compile_for_an_h100(name, dtype, one):
    """To machine code for compute capability 9.0, which needs no GPU; each number is loaded no more than it must be:
    5 times a result forward, 14 backward (9 of a, 5 of g)."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    kernel = getattr(kernels, name)
    tensors, constants = ("a", "b", "g", "grad"), {"P": 64, "C": 32, one: 1}
    kinds = {n: "*" + dtype if n in tensors else "fp32" if n in ("scale", "k") else "i32" for n in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, kinds | dict.fromkeys(constants, "constexpr"), constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert built.asm["cubin"]
    assert built.asm["ptx"].count("ld.global") <= (5 if "forward" in name else 14) * 64 * 32 // 128


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_lrn_on_a_gpu():
    close = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
    for (shape, columns), layout, dtype in itertools.product(SHAPES, LAYOUTS.values(), close):
        x, g = (numbers_like(shape, layout, dtype).cuda() for _ in range(2))
        fast = FastLRN(LocalResponseNorm(columns, alpha=1.0), "cuda")
        assert fast.fits(x.requires_grad_())
        exact = x.detach().double().requires_grad_()
        got, expected = fast(x), LocalResponseNorm(columns, alpha=1.0)(exact)
        pairs = [(got, expected)]
        pairs.append((torch.autograd.grad(got, x, g)[0], torch.autograd.grad(expected, exact, g.double())[0]))
        for one, right in pairs:
            assert (one - right).abs().max() <= close[dtype] * right.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_on_a_gpu_never_wait_for_it(store):
    """From resident pictures to the update; the first step may."""
    loader, inputs = Loader(store, "train", "cuda"), Augment(64, store.mean, device="cuda")
    net = accelerate(AlexNet(4, image_size=64).cuda().to(memory_format=torch.channels_last), say=silent)
    optimizer = make_optimizer(net, recipe="2012", lr=0.001, momentum=0.9, weight_decay=5e-4)
    tables, pictures = epoch_tables(0, 0, 96, 8), None
    for step, (crops, labels) in enumerate(loader.batches([tables.order[:32]] * 3, tables, 64)):
        pictures = inputs.train(crops, tables.colour[tables.order[:32]], out=pictures)
        train.train_step(net, optimizer, pictures, labels, "bf16")
        torch.cuda.set_sync_debug_mode("error" if step < 2 else "default")
