"""studies/frelu.py and studies/loop.py: the study's recipe, runs that stop and go on, the table."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import small_source
from helpers import assert_same_study_run

import checkpoints
import train
from checkpoints.run import locked, read_log
from data import pack
from data.augment import epoch_tables
from studies import frelu, loop
from studies.networks import build
from utils import UserError

ARGUMENTS = ["--dataset", "sample", "--networks", "smallnet-bn", "--activations", "frelu", "--seeds", "1"]
BATCH = loop.BATCH


@pytest.fixture
def home(small_pictures, tmp_path, monkeypatch):
    """Where runs and results land. Batches are of 32 pictures there, two an epoch."""
    monkeypatch.setattr(loop, "small_store", lambda name: small_pictures)
    monkeypatch.setattr(loop, "BATCH", 32)
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path / "checkpoints")
    return tmp_path


def study(home, *more) -> int:
    return frelu.main([*ARGUMENTS, "--out", str(home / "x.jsonl"), *more])


def results(home) -> list[dict]:
    return [{k: v for k, v in e.items() if k != "seconds"} for e in read_log(home / "x.jsonl")]


def interrupt(monkeypatch, step: int, how) -> None:
    """Have something happen after so many steps."""
    real, taken = loop.train_step, []

    def counting(*args):
        taken.append(1)
        if len(taken) == step:
            how()
        return real(*args)

    monkeypatch.setattr(loop, "train_step", counting)


def test_the_study_packs_its_own_store(tmp_path, monkeypatch):
    """At data/stores/NAME-32, once; one of another size in that place is refused."""
    monkeypatch.setattr(pack, "STORES", tmp_path)
    source, packed = small_source(counts=(9, 4, 4)), []
    monkeypatch.setattr("data.sources.find", lambda name: packed.append(name) or source)
    for _ in range(2):
        store = loop.small_store("sample")
        assert (store.path, store.size) == (tmp_path / "sample-32", 32)
    assert packed == ["sample"]
    pack.pack(source, tmp_path / "cifar10-32", size=40)
    with pytest.raises(UserError, match="has pictures of 40 pixels, not of 32; remove it"):
        loop.small_store("cifar10")


def test_the_learning_rate_falls_where_the_study_says():
    """Divided by 10 from epoch 81 and again from epoch 122 on, of 164 counted from 1; at the same fractions of more or
    fewer."""
    of_study = (frelu.DROPS, frelu.EPOCHS)
    assert loop.learning_rates(0.1, 164, *of_study) == [0.1] * 80 + [0.1 / 10] * 41 + [0.1 / 100] * 43
    assert loop.learning_rates(1, 6, *of_study) == [1, 1, 1, 0.1, 0.1, 0.01]
    assert loop.learning_rates(1, 1, *of_study) == [1]
    assert [frelu.first_lr(n) for n in ("smallnet", "smallnet-bn", "nin", "resnet20")] == [0.01, 0.1, 0.1, 0.1]


def test_the_update_is_nesterovs_written_out():
    """v = 0.9 v + g, w = w - rate (g + 0.9 v), with g the gradient and 1e-4 w; what activations learn: no decay, b at
    its own rate."""
    torch.manual_seed(0)
    net = build("smallnet-bn", 3, "frelu").double()
    optimizer = frelu.make_optimizer(net, {"network": "smallnet-bn", "bias_rate": 0.1})
    values = {name: p.detach().clone() for name, p in net.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in values.items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.03 * group["scale"]
    for _ in range(5):
        for name, p in net.named_parameters():
            p.grad = torch.randn_like(p)
            apart = name.startswith("act")
            g = p.grad + (0 if apart else 1e-4 * values[name])
            velocity[name] = 0.9 * velocity[name] + g
            values[name] = values[name] - 0.03 * (0.1 if apart else 1) * (g + 0.9 * velocity[name])
        optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), values[name], rtol=1e-12, atol=1e-12)
    slopes = frelu.make_optimizer(build("nin", 3, "prelu"), {"network": "nin", "bias_rate": None}).param_groups[1]
    assert (slopes["scale"], slopes["weight_decay"], slopes["lr"], len(slopes["params"])) == (1, 0, 0.1, 9)


@pytest.mark.parametrize("channels", [1, 3])
def test_inputs_are_normalised_colour_by_colour(channels, tmp_path):
    """Mean 0 and standard deviation 1 over the training pixels of each colour, against numpy."""
    source = small_source(shape=(32, 32, 3)[: 2 + (channels == 3)], counts=(150, 5, 5))
    store = pack.pack(source, tmp_path / "s", size=32)
    pixels = source.splits["train"].pictures.reshape(150, 32, 32, channels).astype(float)
    expected = (pixels - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2))
    images, _ = store.split("train").read(np.arange(150))
    found = loop.Inputs(*frelu.moments(store), "cpu")(torch.from_numpy(images))
    assert found.shape == (150, 3, 32, 32)
    for c in range(3):
        np.testing.assert_allclose(found[:, c].numpy(), expected[..., c % channels], atol=1e-4)


def test_a_run_that_was_stopped_or_killed_is_the_unbroken_one(home, monkeypatch, capsys):
    """SIGTERM in the midst of the second of three epochs; then a death without any notice in the third, after the
    checkpoint of every few minutes was written there. The second epoch's seconds include those before the stop, which
    the test makes 1,000 more."""
    assert study(home, "--epochs", "3") == 0
    whole, log = home / "checkpoints" / "frelu" / "sample-3" / "smallnet-bn-frelu-0", results(home)
    monkeypatch.setattr(checkpoints, "FOLDER", home / "again")
    (home / "x.jsonl").unlink()
    with monkeypatch.context() as patch:
        interrupt(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert study(home, "--epochs", "3") == 143
    assert results(home) == []
    parts = home / "again" / "frelu" / "sample-3" / "smallnet-bn-frelu-0"
    stopped = torch.load(parts / "last.pt", weights_only=True)
    assert 0 < stopped["seconds"] < 100
    torch.save(stopped | {"seconds": stopped["seconds"] + 1000}, parts / "last.pt")
    with monkeypatch.context() as patch:
        interrupt(patch, 3, raise_interrupt)
        patch.setattr(loop, "LOOK_EVERY", 1)
        patch.setattr(loop, "SAVE_SECONDS", 0)
        with pytest.raises(KeyboardInterrupt):
            study(home, "--epochs", "3")
    killed = torch.load(parts / "last.pt", weights_only=True)
    assert killed["step"] == 5
    assert 0 < killed["seconds"] < 100
    assert study(home, "--epochs", "3") == 0
    assert_same_study_run(whole, parts)
    assert results(home) == log
    lines = read_log(whole / "log.jsonl")
    assert [entry["lr"] for entry in lines] == [0.1, 0.1, 0.1 / 10]
    assert [entry["epoch"] for entry in lines] == [1, 2, 3]
    assert [entry["seconds"] // 1000 for entry in read_log(parts / "log.jsonl")] == [0, 1, 0]
    capsys.readouterr()
    interrupt(monkeypatch, 1, raise_interrupt)
    assert study(home, "--epochs", "3") == 0  # trains nothing
    assert f"| smallnet-bn | **{log[0]['test_top1_error']:.2f}% (n = 1)** | - |" in capsys.readouterr().out


def test_each_step_is_taken_at_its_learning_rate(home, monkeypatch):
    """What the optimiser has at each step of three epochs: the weights' learning rate, and a tenth of it for b."""
    seen, real = [], loop.train_step
    monkeypatch.setattr(
        loop, "train_step", lambda *a: seen.append(tuple(g["lr"] for g in a[1].param_groups)) or real(*a)
    )
    assert study(home, "--epochs", "3") == 0
    rates = [0.1, 0.1, 0.1, 0.1, 0.1 / 10, 0.1 / 10]  # two steps an epoch
    assert [weights for weights, _ in seen] == rates
    assert [b for _, b in seen] == pytest.approx([0.1 * r for r in rates])


def test_a_signal_between_two_epochs_is_heard(home, monkeypatch, capsys):
    """Also one that arrives while the epoch is validated. SIGINT is Ctrl-C."""
    real, number = loop.validate, signal.SIGTERM
    monkeypatch.setattr(loop, "validate", lambda *a: os.kill(os.getpid(), number) or real(*a))
    assert study(home, "--epochs", "2") == 143
    assert capsys.readouterr().out.count("epoch ") == 1
    assert results(home) == []
    number = signal.SIGINT
    assert study(home, "--epochs", "2") == 130  # after the last epoch, before the test
    assert study(home, "--epochs", "2") == 0
    assert len(results(home)) == 1


def raise_interrupt():
    raise KeyboardInterrupt


def test_a_line_says_what_it_is_and_its_error_is_the_nets(home, small_pictures):
    """The test error is that of the last epoch's net, over all test pictures; b as the checkpoint has it."""
    assert study(home, "--epochs", "2") == 0
    (line,) = results(home)
    key = {"dataset": "sample", "epochs": 2, "network": "smallnet-bn", "activation": "frelu", "bias_rate": 0.1}
    assert line["seed"] == 0
    assert {k: line[k] for k in key} == key
    last = torch.load(home / "checkpoints/frelu/sample-2/smallnet-bn-frelu-0/last.pt", weights_only=True)
    net = build("smallnet-bn", 4, "frelu")
    net.load_state_dict(last["model"])
    images, labels = small_pictures.split("test").read(np.arange(30))
    inputs = loop.Inputs(*frelu.moments(small_pictures), "cpu")
    with torch.no_grad():
        logits = net.eval()(inputs(torch.from_numpy(images)))
    wrong = (logits.argmax(1).numpy() != labels).sum()
    assert (line["test_top1_error"], line["test_images"]) == (pytest.approx(100 * wrong / 30), 30)
    assert line["activations"] == {name: getattr(net, name).bias.item() for name in ("act1", "act2", "act3", "act4")}
    assert all(value != -1 for value in line["activations"].values())
    assert {"torch", "device", "threads", "commit", "val_top1_error", "train_top1_error"} <= set(line)


def test_crops_come_out_of_a_frame(home, small_pictures, monkeypatch):
    """The first batch's pictures are those of the tables, cut out of framed pictures; half of them mirrored."""
    seen = []
    monkeypatch.setattr(loop, "train_step", lambda net, opt, pictures, *a: seen.append(pictures.clone()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        study(home, "--epochs", "1")
    images, _ = small_pictures.split("train").read(np.arange(80))
    framed = np.empty((80, 40, 40, 3), np.uint8)
    framed[:] = small_pictures.mean.mean((0, 1)).round()
    framed[:, 4:36, 4:36] = images
    tables = epoch_tables(0, 0, 80, 8)
    cut = []
    for i in tables.order[:32]:
        top, left = tables.offsets[i]
        crop = framed[i, top : top + 32, left : left + 32]
        cut.append(crop[:, ::-1] if tables.mirror[i] else crop)
    expected = loop.Inputs(*frelu.moments(small_pictures), "cpu")(torch.from_numpy(np.stack(cut)))
    torch.testing.assert_close(seen[0], expected)
    assert 10 < tables.mirror[tables.order[:32]].sum() < 22


def test_a_run_that_diverges_is_noted_and_the_grid_goes_on(home, monkeypatch, capsys):
    """Whether the loss or a weight is no longer finite first."""
    real = loop.build

    def broken(network, classes, act):
        net = real(network, classes, act)

        def ruin(_gradient):
            net.norm1.running_var.fill_(float("inf"))

        if act == "srelu":
            net.fc5.register_forward_hook(lambda layer, inputs, output: output * float("nan"))
        elif act == "elu":
            net.norm1.weight.register_hook(ruin)
        return net

    monkeypatch.setattr(loop, "build", broken)
    assert study(home, "--activations", "srelu", "elu", "relu", "--epochs", "1") == 0
    assert [(e["activation"], e.get("diverged"), "test_top1_error" in e) for e in results(home)] == [
        ("srelu", 2, False), ("elu", 2, False), ("relu", None, True)
    ]
    assert "| smallnet-bn | diverged (1 of 1) | diverged (1 of 1) | **" in capsys.readouterr().out


def test_config_json_describes_the_study(home):
    """Not train.py's AlexNet; train.py and test.py refuse such a checkpoint."""
    assert study(home, "--epochs", "1") == 0
    folder = home / "checkpoints/frelu/sample-1/smallnet-bn-frelu-0"
    given = json.loads((folder / "config.json").read_text())["arguments"]
    wanted = {"network": "smallnet-bn", "activation": "frelu", "bias_rate": 0.1, "nesterov": True, "frame": 4,
              "lr": 0.1, "weight_decay": 1e-4, "batch_size": loop.BATCH, "epochs": 1}
    assert BATCH == 128
    assert {name: given.get(name) for name in wanted} == wanted
    assert not {"lrn", "columns", "recipe", "patience"} & set(given)
    with pytest.raises(UserError, match="is no checkpoint of this project"):
        checkpoints.load_model(folder / "last.pt")
    with pytest.raises(UserError, match="the run cannot be resumed"):
        train.main(["--resume", "--out", str(folder)])
    with pytest.raises(UserError, match="is no checkpoint of this project"):
        train.main(["--dataset", "sample", "--init", str(folder / "last.pt")])


def test_processes_share_a_grid(home, capsys):
    """A run that another process is at is left to it; of no two runs the folder is the same."""
    folder = home / "checkpoints/frelu/sample-1/smallnet-bn-frelu-0"
    folder.mkdir(parents=True)
    with locked(folder):
        assert study(home, "--activations", "frelu", "relu", "--epochs", "1") == 0
    assert [e["activation"] for e in results(home)] == ["relu"]
    assert "runs left to other processes: 1" in capsys.readouterr().out
    assert study(home, "--activations", "frelu", "relu", "--epochs", "1", "--bias-rate", "0.5") == 0
    assert study(home, "--activations", "frelu", "relu", "--epochs", "1") == 0
    assert [(e["activation"], e["bias_rate"]) for e in results(home)] == [
        ("relu", None), ("frelu", 0.5), ("frelu", 0.1)
    ]
    folders = sorted(f.name for f in (home / "checkpoints/frelu/sample-1").iterdir())
    assert folders == ["smallnet-bn-frelu-0", "smallnet-bn-frelu-0-bias-rate-0.5", "smallnet-bn-relu-0"]


def test_a_death_between_the_first_two_files_is_no_hindrance(home):
    folder = home / "checkpoints/frelu/sample-1/smallnet-bn-frelu-0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert study(home, "--epochs", "1") == 0


def entry(act, seed, error, network="nin"):
    bias_rate = 0.1 if act in ("frelu", "srelu") else None
    key = {"dataset": "cifar10", "epochs": 9, "network": network, "activation": act, "bias_rate": bias_rate}
    return key | {"seed": seed} | ({"diverged": 7} if error is None else {"test_top1_error": error})


def test_the_table_says_what_the_seeds_allow():
    """The lowest mean in bold; differences paired by seed with Student's t: 4.30 x 0.1 / sqrt 3 = 0.25."""
    args = frelu.make_parser().parse_args(
        ["--dataset", "cifar10", "--epochs", "9", "--networks", "nin", "resnet20", "--activations", "relu", "elu",
         "frelu", "prelu", "tanh"]
    )
    entries = [entry("relu", s, e) for s, e in enumerate((8.0, 9.0, 10.0))]
    entries += [entry("frelu", s, e) for s, e in enumerate((7.0, 7.9, 9.1))]  # 1.0, 1.1, 0.9 less
    entries += [entry("elu", s, e) for s, e in enumerate((7.2, 7.7, 9.2))]  # 0.2, -0.2, 0.1 more
    entries += [entry("prelu", 0, 6.0, "resnet20"), entry("prelu", 1, 7.0, "resnet20"), entry("tanh", 0, None)]
    entries += [entry("relu", 0, 1.0) | {"epochs": 8}, entry("frelu", 0, 1.0) | {"bias_rate": 1.0}]
    lines = frelu.table(args, entries).splitlines()
    assert "standard deviation over seeds" in lines[-1]
    assert lines[0] == "| net | relu | elu | frelu | prelu | tanh | worse than the lowest, in points |"
    assert lines[2] == (
        "| nin | 9.00% ± 1.00 (n = 3) | 8.03% ± 1.04 (n = 3) | **8.00% ± 1.05 (n = 3)** | not measured yet | "
        "diverged (1 of 1) | relu +1.00 ± 0.25; elu +0.03 ± 0.52, within the spread |"
    )
    assert lines[3] == (
        "| resnet20 | not measured yet | not measured yet | not measured yet | **6.50% ± 0.71 (n = 2)** | "
        "not measured yet | - |"
    )


def test_the_table_compares_like_with_like():
    """A lower mean over fewer or easier seeds is not called the best, and a lower one is never within the spread."""
    args = frelu.make_parser().parse_args(
        ["--dataset", "cifar10", "--epochs", "9", "--networks", "nin", "--activations", "relu", "frelu", "elu"]
    )
    entries = [entry("relu", s, e) for s, e in enumerate((8.0, 8.2, 8.1, 9.9, 9.8))]
    entries += [entry("frelu", s, e) for s, e in enumerate((8.5, 8.6, 8.7))]
    entries += [entry("elu", 0, 7.0), entry("elu", 1, None), entry("elu", 2, None)]
    entries *= 2  # two files put together: each line twice
    assert frelu.table(args, entries).splitlines()[2] == (
        "| nin | **8.80% ± 0.96 (n = 5)** | 8.60% ± 0.10 (n = 3) | 7.00% (n = 1), 2 diverged | "
        "frelu +0.50 ± 0.25; elu too few seeds |"
    )


def test_a_torn_line_hides_no_other(home):
    """A crash left half a line: what is appended later is read all the same."""
    (home / "x.jsonl").write_text('{"dataset": "sam')
    assert study(home, "--epochs", "1") == 0
    assert len(results(home)) == 1


KEYS = '"dataset": "a", "epochs": 1, "network": "nin", "activation": "elu", "bias_rate": null, '


@pytest.mark.parametrize(("content", "message"), [
    ('{"cell": "base"}\n', "lines of another kind"),
    ("{" + KEYS + '"seed": 0}\n', "lines of another kind"),
    ("{" + KEYS + '"seed": [1], "test_top1_error": 1.0}\n', "lines of another kind"),
    ("{" + KEYS + '"seed": 0, "test_top1_error": "1"}\n', "lines of another kind"),
    ("# A README\n", "holds no lines of results"),
    ("PK\x00\x01", "holds no lines of results"),
    ("5\n", "holds no lines of results"),
])
def test_a_file_of_another_kind_is_refused(home, content, message):
    """Before anything is trained, and left as it is."""
    (home / "x.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        study(home)
    assert (home / "x.jsonl").read_text() == content


def test_out_is_looked_at_before_the_training(home):
    (home / "folder").mkdir()
    for out in ("/dev/null", str(home / "folder")):
        with pytest.raises(UserError, match="is no regular file"):
            study(home, "--out", out)
    assert not (home / "checkpoints").exists()


def test_what_cannot_go_on_can_be_begun_anew(home, monkeypatch):
    """A damaged or foreign checkpoint is refused with the way out, which works."""
    assert study(home, "--epochs", "1") == 0
    assert study(home, "--epochs", "1", "--activations", "relu") == 0
    folder, foreign = (home / f"checkpoints/frelu/sample-1/smallnet-bn-{act}-0" for act in ("frelu", "relu"))
    (home / "x.jsonl").unlink()
    whole = (folder / "last.pt").read_bytes()
    damaged = torch.load(folder / "last.pt", weights_only=True) | {"optimizer": {}}
    torch.save(damaged, folder / "bad.pt")
    flipped = whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
    for content in (whole[:1000], flipped, (foreign / "last.pt").read_bytes(), (folder / "bad.pt").read_bytes()):
        (folder / "last.pt").write_bytes(content)
        with pytest.raises(UserError, match="to train this run anew, remove"):
            study(home, "--epochs", "1")
    (folder / "last.pt").unlink()
    with pytest.raises(UserError, match="to train this run anew, remove"):
        study(home, "--epochs", "1")
    (folder / "last.pt").write_bytes(whole)
    (folder / "log.jsonl").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "fit", lambda *_: pytest.fail("trains"))
        with pytest.raises(UserError, match="has lost lines"):
            study(home, "--epochs", "1")
    shutil.rmtree(folder)
    assert study(home, "--epochs", "1") == 0
    assert len(results(home)) == 1


@pytest.mark.parametrize("bad", [
    ["--networks", "vgg"], ["--activations", "gelu"], ["--epochs", "0"], ["--seeds", "0"], ["--bias-rate", "0"],
    ["--dataset", "mnist"], ["--networks"],
])
def test_bad_options_are_one_line(home, bad):
    with pytest.raises(UserError, match=bad[0]):
        study(home, *bad)
