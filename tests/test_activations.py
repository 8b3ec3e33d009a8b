"""model.py's activations: the formulas in float64, exact gradients, what is kept for them; how train.py treats what
they learn."""


import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_state, load, numbers, resume, run
from torch import nn

import checkpoints
import model
import train
from kernels import FastFReLU, FastSReLU, accelerate
from model import AlexNet, FReLU, SReLU, activation, activation_parameters
from recipe import make_optimizer
from studies import networks
from train import watch_activations
from watch import Watch

FORMULAS = {"frelu": lambda x, b: F.relu(x) + b, "srelu": lambda x, b: torch.where(x > b, x, b)}
LAYERS = {"frelu": (FReLU, FastFReLU), "srelu": (SReLU, FastSReLU)}
EACH = [pytest.param(name, kind, id=kind.__name__) for name, kinds in LAYERS.items() for kind in kinds]
SHAPES = [(7,), (3, 5), (2, 3, 5, 7), (1, 1, 1, 1), (0, 3, 2, 2), (4, 0)]


def applied(kind):
    """The module as a function of x and b."""
    return lambda x, b: torch.func.functional_call(kind(), {"bias": b}, (x,))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("b", [-1.0, -0.37, 0.0, 0.6])
@pytest.mark.parametrize(("name", "kind"), EACH)
def test_frelu_and_srelu_equal_autograd_on_the_formula(name, kind, b, shape):
    """In float64, output and both gradients; b's is the sum over the tensor."""
    torch.manual_seed(0)
    x, g = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    x.view(-1)[:2] = torch.tensor([0.0, b])[: x.numel()]  # at the kinks: there nothing passes to x
    results = []
    for function in (FORMULAS[name], applied(kind)):
        leaves = x.clone().requires_grad_(), torch.tensor(b, dtype=torch.float64, requires_grad=True)
        y = function(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, g)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)
    reached = g if name == "frelu" else g[x <= b]
    torch.testing.assert_close(results[1][2], reached.sum(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_finite_differences(name, kind):
    """First and second derivatives, away from the kink."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    x = torch.where((x.abs() < 0.01) | ((x + 0.8).abs() < 0.01), 0.5, x).requires_grad_()
    b = torch.tensor(-0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(applied(kind), (x, b))
    assert torch.autograd.gradgradcheck(applied(kind), (x, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("b", [-1.0, -0.3, 0.0, 2.5])
@pytest.mark.parametrize("kind", LAYERS["frelu"])
def test_the_gradient_is_exact_however_small_the_input(kind, dtype, b):
    """Where x + b is rounded to b the output cannot be told from b's; the gradient passes all the same, and the output
    is off by two units in the last place at most."""
    tiny = torch.finfo(dtype).tiny
    values = [-3.0, -1e-3, -tiny, 0.0, -0.0, tiny, 1e-7, 1e-4, 1e-3, 0.02, 1.0, 300.0, float("inf"), -float("inf")]
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    layer = kind()
    nn.init.constant_(layer.bias, b)
    y = layer(x)
    y.backward(torch.ones_like(y))
    assert y.dtype == dtype
    assert torch.equal(x.grad, (x > 0).to(dtype))
    right = x.detach().double().clamp_min(0) + layer.bias.detach().to(dtype).double()
    finite = right.isfinite()
    error = (y.detach().double() - right)[finite].abs()
    assert (error <= torch.finfo(dtype).eps * right[finite].abs().clamp_min(abs(b))).all()
    assert y[-2] == float("inf")


@pytest.mark.parametrize("compiled", [False, True])
def test_nan_is_passed_on(compiled):
    for layer in (FReLU(), SReLU(), FastFReLU(), FastSReLU()):
        forward = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        assert forward(torch.tensor([float("nan"), -2.0])).isnan().tolist() == [True, False]


@pytest.mark.parametrize(("name", "kind"), EACH)
@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_and_autocast(name, kind, compiled):
    """The output has the input's dtype, as a convolution's under autocast; b's gradient is summed up in float32."""
    torch.manual_seed(0)
    x = torch.randn(64, 8, 16, 16).bfloat16().requires_grad_()
    layer = kind()
    forward = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    with torch.autocast("cpu", torch.bfloat16):
        y = forward(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), FORMULAS[name](x.double(), torch.tensor(-1.0)), rtol=2**-7, atol=2**-7)
    g = torch.rand_like(y)
    y.backward(g)
    assert x.grad.dtype == torch.bfloat16
    assert layer.bias.grad.dtype == torch.float32
    reached = g if name == "frelu" else g[x <= -1]
    assert layer.bias.grad.item() == pytest.approx(reached.double().sum().item(), rel=1e-5)


@pytest.mark.parametrize("kind", [*model.ACTIVATIONS.values(), FastFReLU, FastSReLU])
def test_layouts_and_batches_of_none(kind):
    x = torch.randn(3, 4, 5, 6)
    right = kind()(x)
    for given in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        strides = given.stride()
        y = kind()(given)
        assert y.stride() == strides
        torch.testing.assert_close(y, right)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    g = torch.randn(3, 4, 5, 6)  # a gradient may arrive in the other layout
    (grad,) = torch.autograd.grad(kind()(x), x, g)
    torch.testing.assert_close(grad, torch.autograd.grad(kind()(x.contiguous()), x, g)[0])
    assert kind()(torch.empty(0, 4, 5, 6)).shape == (0, 4, 5, 6)


@pytest.mark.parametrize("fast", [False, True])
def test_a_net_takes_a_batch_of_none(fast):
    net = AlexNet(10, image_size=64, activation="frelu")
    if fast:
        accelerate(net)
    net(torch.empty(0, 3, 64, 64)).sum().backward()
    assert all((p.grad == 0).all() for p in net.parameters())


def kept_bytes(net, x) -> int:
    """What autograd keeps of an accelerated net's forward pass, each piece of memory once, parameters not at all."""
    accelerate(net)
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = net(x)
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("name", ["frelu", "srelu"])
def test_no_more_is_kept_for_the_backward_pass_than_by_a_relu(name):
    """Of the layer alone, and of nets, where the next layer holds the activation's output anyway."""
    x = torch.randn(4, 8, 6, 6).requires_grad_()
    assert kept_bytes(nn.Sequential(nn.Identity(), activation(name)), x * 1) <= 4 * x.numel()
    for network in ("smallnet-bn", "resnet20"):
        nets = [networks.build(network, 10, act) for act in (name, "relu")]
        pictures = torch.randn(4, 3, 32, 32)
        assert kept_bytes(nets[0], pictures) <= kept_bytes(nets[1], pictures)
    if name == "frelu":
        nets = [AlexNet(10, image_size=64, activation=act) for act in (name, "relu")]
        pictures = torch.randn(4, 3, 64, 64)
        assert kept_bytes(nets[0], pictures) <= kept_bytes(nets[1], pictures)


def test_by_name():
    kinds = {"relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU, "prelu": nn.PReLU, "srelu": SReLU, "frelu": FReLU}
    assert {name: type(activation(name)) for name in model.ACTIVATIONS} == kinds
    assert activation("elu").alpha == 1
    starts = {name: [p.tolist() for p in activation(name).parameters()] for name in kinds}
    assert starts == {"relu": [], "tanh": [], "elu": [], "prelu": [[0.25]], "srelu": [-1.0], "frelu": [-1.0]}
    with pytest.raises(ValueError, match=r"activation must be relu or tanh or .* not 'gelu'"):
        activation("gelu")


@pytest.mark.parametrize("recipe", ["2012", "paper"])
@pytest.mark.parametrize("name", ["frelu", "srelu", "prelu"])
def test_what_they_learn_does_not_decay(name, recipe):
    """A group of its own: the weights' rate, no decay, under both recipes. A step without gradient leaves it alone."""
    net = networks.build("smallnet", 10, name)
    learnt = activation_parameters(net)
    assert list(learnt) == [f"act{i}" for i in range(1, 5)]
    optimizer = make_optimizer(net, recipe=recipe, lr=0.1, momentum=0.9, weight_decay=0.5)
    group = optimizer.param_groups[-1]
    assert (group["lr"], group["weight_decay"]) == (0.1, 0)
    assert {id(p) for p in group["params"]} == {id(p) for p in learnt.values()}
    members = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(members) == len(set(members)) == len(list(net.parameters()))
    start = 0.25 if name == "prelu" else -1.0
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    before = net.conv1.weight.detach().clone()
    optimizer.step()
    assert all(p.item() == start for p in learnt.values())
    torch.testing.assert_close(net.conv1.weight.detach(), before * (1 - 0.1 * 0.5))


@pytest.mark.parametrize(("name", "start"), [("frelu", -1.0), ("srelu", -1.0), ("prelu", 0.25)])
def test_init_weights_starts_them_anew(name, start):
    net = AlexNet(2, image_size=64, activation=name)
    assert list(activation_parameters(net)) == [f"act{i}" for i in range(1, 8)]
    for p in activation_parameters(net).values():
        nn.init.zeros_(p)
    net.init_weights()
    assert all(p.item() == start for p in activation_parameters(net).values())


@pytest.mark.parametrize("order", ["paper", "2012"])
@pytest.mark.parametrize("fast", [False, True])
def test_a_frelu_net_is_the_formula_layer_by_layer(order, fast):
    """AlexNet with FReLU against the same net with each activation replaced by the formula: a check that nothing in it
    relies on activations that work in place."""
    torch.manual_seed(0)
    net = AlexNet(5, image_size=64, activation="frelu", order=order, dropout=0)
    for number, p in enumerate(activation_parameters(net).values()):
        nn.init.constant_(p, -0.1 * number)
    if fast:
        accelerate(net)
    images, labels = 50 * torch.randn(3, 3, 64, 64), torch.tensor([0, 1, 2])
    grads = []
    for _ in range(2):
        net.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        grads.append([p.grad.clone() for p in net.parameters()])
        for layer in (net.get_submodule(f"act{i}") for i in range(1, 8)):
            layer.forward = lambda x, layer=layer: F.relu(x) + layer.bias
    for one, other in zip(*grads, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_a_run_logs_what_is_learnt_and_resumes(store, tmp_path):
    """A line an epoch, the checkpoint's value; stopped and resumed it is the unbroken run."""
    options = ["--activation", "frelu", "--lr", "0.001", "--epochs", "2"]
    run(store, tmp_path / "whole", *options, batch=48)
    run(store, tmp_path / "parts", *options, "--max-steps", "3", batch=48)
    resume(tmp_path / "parts", "--max-steps", "4")
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "parts")
    log = numbers(tmp_path / "whole")
    assert [list(entry["activations"]) for entry in log] == [[f"act{i}" for i in range(1, 8)]] * 2
    assert log[0]["activations"] != log[1]["activations"]
    weights = load(tmp_path / "whole" / "last.pt")["model"]
    assert log[1]["activations"] == {f"act{i}": weights[f"act{i}.bias"].item() for i in range(1, 8)}
    assert checkpoints.load_model(tmp_path / "whole" / "best.pt")[0].config["activation"] == "frelu"


def test_relus_log_nothing(run_folder):
    assert all("activations" not in entry for entry in numbers(run_folder))


@pytest.mark.parametrize(("name", "warnings"), [("frelu", 1), ("srelu", 1), ("prelu", 0)])
def test_a_b_that_turns_positive_is_warned_of_once(name, warnings, capsys):
    """Of a layer once, at 0 not yet; a PReLU's slope is meant to be positive."""
    net = networks.build("smallnet", 10, name)
    for layer, value in (("act2", 0.5), ("act3", 0.0)):
        nn.init.constant_(activation_parameters(net)[layer], value)
    watch = Watch(torch.device("cpu"))
    for _ in range(2):
        values = watch_activations(net, watch)
        assert (values["act2"], values["act3"], values["act4"]) == (0.5, 0, 0.25 if name == "prelu" else -1)
    said = capsys.readouterr().err
    assert said.count("b has turned positive in act2 (0.500). That harms") == warnings
    assert said.count("warning") == warnings
    nn.init.constant_(activation_parameters(net)["act4"], 2.0)
    watch_activations(net, watch)
    assert ("act4 (2.000)" in capsys.readouterr().err) == bool(warnings)


def test_train_py_watches(store, tmp_path, capsys, monkeypatch):
    real = train.starting_net

    def shifted(*args):
        net = real(*args)
        nn.init.constant_(net.act2.bias, 0.5)
        return net

    monkeypatch.setattr(train, "starting_net", shifted)
    run(store, tmp_path / "run", "--activation", "srelu", "--lr", "0.0001", "--epochs", "2", batch=96)
    assert capsys.readouterr().err.count("b has turned positive in act2 (0.") == 1
