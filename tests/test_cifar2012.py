"""studies/fourlayer.py and cifar2012.py: the nets against loops in float64, the update against
cuda-convnet's formula, pictures against PIL, and runs that stop and go on."""

import json
import math
import signal
import statistics

import numpy as np
import pytest
import torch
from helpers import ROOT
from numpy_layers import convolution, lrn, relu
from PIL import Image

import checkpoints
from checkpoints.run import locked, read_log
from studies import cifar2012, fourlayer
from studies.fourlayer import Pictures, build, lower_rate, make_optimizer
from utils import UserError

CPU = torch.device("cpu")
PARAMETERS = {"13pct": 1_116_490, "13pct-lrn": 1_116_490, "11pct-no-lrn": 2_112_970, "11pct": 2_112_970}


@pytest.fixture
def study(small_pictures, tmp_path, monkeypatch):
    """The study on the small store, with batches of 16."""
    monkeypatch.setattr(cifar2012, "small_store", lambda name: small_pictures)
    monkeypatch.setattr(fourlayer, "BATCH", 16)
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------- the nets


def local(x, layer):
    """A locally connected layer, place by place. x: (C, H, W)."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    channels, height, width = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros((weight.shape[2], height, width))
    for row in range(height):
        for column in range(width):
            place = row * width + column
            for filter_ in range(weight.shape[2]):
                total = bias[place, filter_]
                for i in range(3):
                    for j in range(3):
                        numbers = weight[place, (3 * i + j) * channels : (3 * i + j + 1) * channels, filter_]
                        total += numbers @ padded[:, row + i, column + j]
                out[filter_, row, column] = total
    return out


def pool(x):
    """The largest of 3 x 3, every 2, the last windows reaching over the edge (cuda-convnet rounds up)."""
    outputs = math.ceil((x.shape[1] - 3) / 2) + 1
    rows = [slice(2 * i, 2 * i + 3) for i in range(outputs)]
    return np.array([[x[:, r, c].max((1, 2)) for c in rows] for r in rows]).transpose(2, 0, 1)


def by_loops(net, picture, normalised):
    weights = {name: p.detach().numpy() for name, p in net.named_parameters()}

    def convolved(x, name):
        return relu(convolution(x, weights[f"{name}.weight"], weights[f"{name}.bias"], pad=2))

    def norm(x):
        return lrn(x, k=1.0, alpha=0.001 / 9, around=4) if normalised else x

    x = norm(pool(convolved(picture, "conv1")))
    x = pool(norm(convolved(x, "conv2")))
    x = relu(local(relu(local(x, net.local3)), net.local4))
    return weights["fc10.weight"] @ x.ravel() + weights["fc10.bias"]


def louder(net):
    """Weights large enough for every layer to matter, in float64."""
    torch.manual_seed(1)
    for name, parameter in net.double().named_parameters():
        scale = 0.001 if name == "conv1.weight" else 0.05
        parameter.data = scale * torch.randn(parameter.shape, dtype=torch.float64)
    return net


@pytest.mark.parametrize("name", list(cifar2012.NETS))
def test_forward_pass_is_that_of_loops(name):
    options = cifar2012.NETS[name]
    net = louder(build(options["lrn"], options["filters"]))
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    pictures = 60 * torch.randn(2, 3, 24, 24, dtype=torch.float64)
    with torch.no_grad():
        found = net(pictures).numpy()
    for logits, picture in zip(found, pictures.numpy(), strict=True):
        np.testing.assert_allclose(logits, by_loops(net, picture, options["lrn"]), rtol=1e-9)
    assert found.std() > 0.01


def test_whole_pictures_and_tanh():
    """The net of figure 1: 32 x 32, so 16, 8 and 8 pixels a side."""
    net = build(lrn=False, filters=32, act="tanh", side=32)
    assert net.local3.weight.shape == (64, 576, 32)
    assert net.fc10.in_features == 2048
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(isinstance(layer, torch.nn.Tanh) for layer in net) == 4


@pytest.mark.parametrize("name", ["13pct", "11pct"])
def test_gradients_are_those_of_finite_differences(name):
    """In float64, three numbers of each parameter, and the input's through a locally connected layer."""
    options = cifar2012.NETS[name]
    net = louder(build(options["lrn"], options["filters"]))
    pictures, labels = 60 * torch.randn(4, 3, 24, 24, dtype=torch.float64), torch.tensor([1, 2, 3, 4])

    def loss():
        return torch.nn.functional.cross_entropy(net(pictures), labels)

    loss().backward()
    for parameter in net.parameters():
        flat, gradient = parameter.data.view(-1), parameter.grad.reshape(-1)
        for i in (*gradient.abs().topk(2).indices.tolist(), len(flat) // 2):
            before, step = flat[i].item(), 1e-8  # so small that no ReLU and no pool changes its mind
            found = []
            for value in (before + step, before - step):
                flat[i] = value
                with torch.no_grad():
                    found.append(loss().item())
            flat[i] = before
            assert (found[0] - found[1]) / (2 * step) == pytest.approx(gradient[i].item(), rel=1e-4, abs=1e-5)
    layer = fourlayer.LocallyConnected(3, 2, 4).double()
    layer.weight.data.normal_()
    assert torch.autograd.gradcheck(layer, torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True))


def test_initialisation():
    torch.manual_seed(0)
    net = build(lrn=True, filters=64)
    for name, std in fourlayer.STD.items():
        layer = net.get_submodule(name)
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
        assert not layer.bias.any()


def test_nets_and_decays_are_the_files():
    """layer-params-conv-local-13pct.cfg and -11pct.cfg: wc; layers-*.cfg: local3's filters, cmrnorm."""
    assert cifar2012.NETS["13pct"] == {"lrn": False, "filters": 32, "decay": 0.004}
    assert cifar2012.NETS["11pct"] == {"lrn": True, "filters": 64, "decay": 0.01}
    assert cifar2012.NETS["13pct-lrn"] == cifar2012.NETS["13pct"] | {"lrn": True}
    assert cifar2012.NETS["11pct-no-lrn"] == cifar2012.NETS["11pct"] | {"lrn": False}


def test_update_is_cuda_convnets_over_a_drop():
    """v = 0.9 v - lr decay w - lr g; w = w + v; the weights' lr is lowered after two steps, the biases' is not."""
    net = build(lrn=False, filters=32).double()
    optimizer = make_optimizer(net, decay=0.01)
    decays = {"local3.weight": 0.004, "local4.weight": 0.004, "fc10.weight": 0.01}
    wanted = {name: [p.detach().numpy().copy(), np.zeros(p.shape)] for name, p in net.named_parameters()}
    generator = np.random.default_rng(0)
    for step in range(5):
        if step == 2:
            lower_rate(optimizer, 0.0001)
        for name, parameter in net.named_parameters():
            gradient = generator.standard_normal(parameter.shape)
            parameter.grad = torch.from_numpy(gradient)
            w, v = wanted[name]
            weights = 0.001 if step < 2 else 0.0001
            rate = weights if name.endswith("weight") else 0.002
            v = 0.9 * v - rate * decays.get(name, 0.0) * w - rate * gradient
            wanted[name] = [w + v, v]
        optimizer.step()
    for name, parameter in net.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), wanted[name][0], rtol=1e-9, atol=1e-12)
    assert not any(group["weight_decay"] for group in make_optimizer(net, decay=0.0).param_groups)


# ---------------------------------------------------------------------------------------------- the pictures


def test_views_are_pil_crops(small_pictures):
    """Ten: four corners and centre, mirrored too. Nine: 3 x 3 places. Minus the middle of all pictures' mean."""
    pictures = Pictures(small_pictures, 24, CPU)
    images = pictures.test.images[:3]
    mean = pictures.train.images.double().mean(0).numpy()[4:28, 4:28]
    corners = [(0, 0), (0, 8), (8, 0), (8, 8), (4, 4)]
    nine = [(top, left) for top in (0, 4, 8) for left in (0, 4, 8)]
    places = {"ten": [(p, m) for m in (False, True) for p in corners], "nine": [(p, False) for p in nine],
              "centre": [((4, 4), False)]}
    for protocol, wanted in places.items():
        found = torch.cat(list(pictures.views(protocol)(images))).unflatten(0, (-1, 3))
        assert len(found) == len(wanted)
        for view, ((top, left), mirrored) in zip(found, wanted, strict=True):
            for inputs, image in zip(view, images, strict=True):
                crop = Image.fromarray(image.numpy()).crop((left, top, left + 24, top + 24))
                if mirrored:
                    crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                expected = (np.asarray(crop) - mean).transpose(2, 0, 1)
                np.testing.assert_allclose(inputs.numpy(), expected, atol=1e-4)


def test_batches_have_a_fixed_order_and_random_crops(small_pictures, monkeypatch):
    """Each part ends with a smaller batch; the last part is held out; an epoch's crops are others than the next's;
    crops come from all 9 x 9 places, half of them mirrored."""
    monkeypatch.setattr(fourlayer, "BATCH", 16)
    pictures = Pictures(small_pictures, 24, CPU)
    assert len(pictures.train.labels) == 101  # those set aside for validation among them
    plan = pictures.plan(4)
    assert [len(batch) for batch in plan] == [16, 5, *([16, 4] * 3)]
    seen, held_out = set(np.concatenate(plan)), set(pictures.parts[4])
    assert len(seen) == 81
    assert not seen & held_out
    assert seen | held_out == set(range(101)) == set(np.concatenate(pictures.plan(5)))
    assert sum(len(labels) for _, labels in pictures.held_out()) == 20
    labels = [torch.cat([y for _, y in pictures.batches(plan, seed=0, epoch=epoch)]) for epoch in (0, 1)]
    assert torch.equal(*labels)
    crops = [torch.cat([x for x, _ in pictures.batches(plan, seed=0, epoch=epoch)]) for epoch in (0, 0, 1)]
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])
    stored = [small_pictures.split(split).read(np.arange(small_pictures.counts[split])) for split in ("train", "val")]
    images, truth = (np.concatenate(part) for part in zip(*stored, strict=True))
    mean = images.mean(0)[4:28, 4:28]
    places, mirrors = set(), []
    for epoch in range(8):
        batches = list(pictures.batches(plan, seed=0, epoch=epoch))
        crops, labels = (torch.cat(part).numpy() for part in zip(*batches, strict=True))
        for crop, label, sample in zip(crops, labels, np.concatenate(plan), strict=True):
            pixels, found = (crop.transpose(1, 2, 0) + mean).round(), []
            assert label == truth[sample]
            for mirrored, straight in ((False, pixels), (True, pixels[:, ::-1])):
                windows = np.lib.stride_tricks.sliding_window_view(images[sample], (24, 24, 3))[:, :, 0]
                found += [(*place, mirrored) for place in np.argwhere((windows == straight).all((2, 3, 4))).tolist()]
            ((top, left, mirrored),) = found
            places.add((top, left))
            mirrors.append(mirrored)
    assert len(places) == 81
    assert 0.4 < np.mean(mirrors) < 0.6
    whole = Pictures(small_pictures, 32, CPU)
    inputs, _ = next(whole.batches(plan, seed=0, epoch=0))
    torch.testing.assert_close(inputs, whole.augment.center(whole.train.images[plan[0]]))


def test_the_four_parts_of_the_training():
    plan = cifar2012.plan_of(520)
    assert plan == [(0.001, 4)] * 350 + [(0.001, 5)] * 150 + [(0.0001, 5)] * 10 + [(0.00001, 5)] * 10
    plan = cifar2012.plan_of(130)
    assert [plan.count(part) for part in dict.fromkeys(plan)] == [77, 33, 10, 10]
    plan = cifar2012.plan_of(26)
    assert [plan.count(part) for part in dict.fromkeys(plan)] == [15, 7, 2, 2]
    for epochs in range(4, 521):
        plan = cifar2012.plan_of(epochs)
        assert len(plan) == epochs
        assert len(set(plan)) == 4


# ---------------------------------------------------------------------------------------------- runs


def test_a_net_that_was_stopped_ends_as_one_that_was_not(study, monkeypatch, capsys):
    arguments = ["--nets", "13pct", "--epochs", "5", "--out", str(study / "x.jsonl")]
    assert cifar2012.main(arguments) == 0
    first = study / "cifar2012" / "13pct-5-fp32-0"
    (line,) = read_log(study / "x.jsonl")
    assert set(line["error"]) == {"ten", "nine", "centre"}
    before, log = torch.load(first / "last.pt", weights_only=True), read_log(first / "log.jsonl")
    sizes = [21, 20, 20, 20, 20]  # 101 pictures in five parts
    assert [e["parts"] for e in log] == [4, 4, 5, 5, 5]
    rates = [group["lr"] for group in before["optimizer"]["param_groups"]]
    assert rates == pytest.approx([0.00001] * 5 + [0.002])  # the weights' has fallen twice, the biases' never
    assert ["val_top1_error" in e for e in log] == [False, True, False, False, False]
    for entry in log:
        mean = np.average(entry["part_errors"], weights=sizes[: entry["parts"]])
        assert entry["train_top1_error"] == pytest.approx(mean)
    with monkeypatch.context() as patch:
        patch.setattr(cifar2012, "train_epoch", lambda *a: pytest.fail("trains again"))
        assert cifar2012.main(arguments) == 0

    monkeypatch.setattr(checkpoints, "FOLDER", study / "again")
    batches = Pictures.batches

    def stop(self, plan, seed, epoch):
        for number, batch in enumerate(batches(self, plan, seed, epoch)):
            if (epoch, number) == (2, 3):
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(Pictures, "batches", stop)
    arguments[-1] = str(study / "y.jsonl")
    assert cifar2012.main(arguments) == 143
    assert "stopped in epoch 3" in capsys.readouterr().out
    monkeypatch.setattr(Pictures, "batches", batches)
    assert cifar2012.main(arguments) == 0
    after = torch.load(study / "again" / "cifar2012" / "13pct-5-fp32-0" / "last.pt", weights_only=True)
    assert all(torch.equal(before["model"][name], after["model"][name]) for name in before["model"])
    (other,) = read_log(study / "y.jsonl")
    assert other["error"] == line["error"]
    printed = capsys.readouterr().out
    assert f"| 13pct | 13% | {line['error']['ten']:.2f}% (n = 1) |" in printed
    assert "| 11pct | 11% | not measured yet | | | |" in printed


def test_the_guide_has_what_it_prints():
    """results/README.md has the table of the nets of 130 epochs, as it is, and the rows of those of 520; the other two
    guides have their errors."""
    guide, lines = (ROOT / "results" / "README.md").read_text(), read_log(ROOT / "results" / "cifar2012.jsonl")
    readme, reproduction = ((ROOT / name).read_text() for name in ("README.md", "REPRODUCTION.md"))
    short, long = ([e for e in lines if (e["epochs"], e["precision"]) == (n, "bf16")] for n in (130, 520))
    for table in cifar2012.table(short).split("\n\n"):
        assert table in guide
    for row in cifar2012.table(long).splitlines():
        assert row in guide or "not measured yet" in row
    for name in cifar2012.NETS:
        errors = [e["error"]["ten"] for e in short if e["net"] == name]
        assert f"{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f}" in reproduction
    for e in long:
        assert f"{e['error']['ten']:.2f}" in reproduction
        assert e["net"] != "11pct" or f"{e['error']['centre']:.2f}% | **{e['error']['ten']:.2f}%**" in readme
    for e in short + long:
        name = "-".join(str(e[key]) for key in cifar2012.KEY)
        log = read_log(ROOT / "results" / "2026-11-27-cifar2012" / f"{name}.jsonl")
        assert len(log) == e["epochs"]
        assert log[-1]["train_top1_error"] == e["train_top1_error"]


def test_table_compares_nets_of_one_seed():
    entries = [
        {"net": name, "seed": seed, "error": {"ten": error + seed, "nine": 20.0, "centre": 21.0}, "train_top1_error": 1}
        for name, error in (("13pct", 13.0), ("13pct-lrn", 12.0), ("11pct", 11.0)) for seed in range(3)
    ] + [{"net": "11pct", "seed": 3, "diverged": "the loss"}]
    printed = cifar2012.table(entries)
    assert "| 13pct | 13% | 14.00% ± 1.00 (n = 3) | 20.00% (n = 3) | 21.00% (n = 3) | 1.00% (n = 3) |" in printed
    assert "| normalisation | 13pct | 13pct-lrn | +1.00, +1.00, +1.00 | +1.00 ± 0.00: helps |" in printed
    assert "| both | 13pct | 11pct | +2.00, +2.00, +2.00 | +2.00 ± 0.00: helps |" in printed
    assert "| normalisation | 11pct-no-lrn | 11pct | not measured yet |  |" in printed
    assert "diverged: 11pct with seed 3" in printed


def test_what_is_not_a_state_is_named(study):
    folder = study / "cifar2012" / "13pct-4-fp32-0"
    folder.mkdir(parents=True)
    (folder / "last.pt").write_text("no checkpoint")
    with pytest.raises(UserError, match=r"last.pt is damaged or of another net .*; remove .*13pct-4-fp32-0 to train"):
        cifar2012.main(["--nets", "13pct", "--epochs", "4", "--out", str(study / "x.jsonl")])
    (study / "x.jsonl").write_text('{"net": "13pct"}\n')
    with pytest.raises(UserError, match="holds lines of another kind"):
        cifar2012.main(["--out", str(study / "x.jsonl")])


def test_a_net_that_has_lost_something_is_told_before_it_is_trained_on(study, monkeypatch):
    """Lines of its log, or a bit of its weights, which torch would not notice."""
    arguments = ["--nets", "13pct", "--epochs", "4", "--out"]
    cifar2012.main([*arguments, str(study / "x.jsonl")])
    folder = study / "cifar2012" / "13pct-4-fp32-0"
    monkeypatch.setattr(cifar2012, "fit", lambda *_: pytest.fail("trains"))
    log, content = (folder / "log.jsonl").read_text(), bytearray((folder / "last.pt").read_bytes())
    (folder / "log.jsonl").write_text("".join(log.splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"log.jsonl has lost lines; to train this net anew, remove its folder"):
        cifar2012.main([*arguments, str(study / "y.jsonl")])
    (folder / "log.jsonl").write_text(log)
    content[len(content) // 2] ^= 1
    (folder / "last.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"last.pt is damaged .*checksum"):
        cifar2012.main([*arguments, str(study / "y.jsonl")])


def test_a_net_that_another_process_trains_is_told(study, capsys):
    folder = study / "cifar2012" / "13pct-4-fp32-0"
    folder.mkdir(parents=True)
    with locked(folder):
        assert cifar2012.main(["--nets", "13pct", "--epochs", "4", "--out", str(study / "x.jsonl")]) == 0
    assert "13pct, seed 0: left to the process that trains it" in capsys.readouterr().out


def test_speed_names_each_layer(monkeypatch, capsys):
    monkeypatch.setattr(cifar2012, "BATCH", 4)
    assert cifar2012.main(["--speed", "--nets", "11pct"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in ("conv2", "norm2", "local3", "local4", "fc10"))
    assert "% of the step" in printed


def test_a_log_that_was_cut_short_is_trained_again_from_last_pt(study):
    """Lines after last.pt's epoch go; a store that was packed anew is refused."""
    arguments = ["--nets", "13pct", "--epochs", "4", "--out", str(study / "x.jsonl")]
    cifar2012.main(arguments)
    folder = study / "cifar2012" / "13pct-4-fp32-0"
    before = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text(before + json.dumps({"epoch": 5}) + "\n")
    cifar2012.main([*arguments[:-1], str(study / "y.jsonl")])
    assert (folder / "log.jsonl").read_text() == before
    one, other = read_log(study / "x.jsonl") + read_log(study / "y.jsonl")
    assert one == other
    last = torch.load(folder / "last.pt", weights_only=True)
    torch.save(last | {"fingerprint": "another"}, folder / "last.pt")
    with pytest.raises(UserError, match="was trained on another store of CIFAR-10; remove"):
        cifar2012.main([*arguments[:-1], str(study / "z.jsonl")])
