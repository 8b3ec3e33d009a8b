"""studies/figures.py: what is drawn and printed is what the runs hold."""

import os
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers import assert_same_study_run, run
from PIL import Image

import checkpoints
from checkpoints.run import read_log
from data.augment import epoch_tables
from studies import figures, frelu, loop
from studies.networks import build
from utils import UserError


@pytest.fixture(scope="module")
def runs(store, small_pictures, tmp_path_factory):
    """Two epochs of train.py with FReLU, one with PReLU, and two of the study's SmallNet with SReLU."""
    home = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "FOLDER", home)
        patch.setattr(loop, "small_store", lambda name: small_pictures)
        patch.setattr(loop, "BATCH", 32)
        for act, epochs in (("frelu", "2"), ("prelu", "1")):
            run(store, home / act, "--activation", act, "--epochs", epochs, "--lr", "0.001", batch=96)
        frelu.main(["--dataset", "sample", "--networks", "smallnet", "--activations", "srelu", "--seeds", "1",
                    "--epochs", "2", "--out", str(home / "x.jsonl")])
        (home / "frelu/sample-2/smallnet-srelu-0").rename(home / "srelu")
    return home


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    kept, real = [], figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda figure, out: (kept.append(figure), real(figure, out)))
    return kept


def lines_of(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


@pytest.mark.parametrize("act", ["frelu", "srelu", "prelu"])
def test_bias_of_a_run(runs, act, drawn, capsys):
    """A line a layer, from its start over the epochs of log.jsonl; the last values printed."""
    assert figures.main(["bias", str(runs / act)]) == 0
    log = read_log(runs / act / "log.jsonl")
    start = 0.25 if act == "prelu" else -1
    (axes,) = [a for a in drawn[0].axes if a.get_lines()]
    found = lines_of(axes)
    layers = list(log[0]["activations"])
    for layer in layers:
        values = [start, *(entry["activations"][layer] for entry in log)]
        assert found[layer] == list(enumerate(values))
    assert (axes.get_xlabel(), axes.get_legend() is not None) == ("epoch", True)
    assert act in axes.get_title()
    assert ("slope" in axes.get_ylabel()) == (act == "prelu")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed[:-1]] == [[n, f"{v:+.4f}"] for n, v in log[-1]["activations"].items()]
    with Image.open(runs / act / "bias.png") as picture:
        assert picture.format == "PNG"
        assert picture.width <= 1000  # README's width


@pytest.mark.parametrize("name", ["frelu/best.pt", "prelu/last.pt", "srelu/last.pt"])
def test_bias_of_a_checkpoint(runs, name, capsys):
    assert figures.main(["bias", str(runs / name)]) == 0
    weights = torch.load(runs / name, weights_only=True)["model"]
    kind = "weight" if "prelu" in name else "bias"
    expected = {n: w.item() for n, w in weights.items() if n.startswith("act") and n.endswith(kind)}
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed == {name.rpartition(".")[0]: f"{value:+.4f}" for name, value in expected.items()}


def test_many_layers_get_a_scale_of_colours(tmp_path, drawn):
    values = {f"blocks.{i}.act1": [-1.0, -0.9 + i / 100] for i in range(40)}
    figures.draw_bias(tmp_path / "x.png", tmp_path, [1, 2], values)
    assert len(drawn[0].axes) == 2
    assert "from the first to the last" in drawn[0].axes[1].get_ylabel()
    assert drawn[0].axes[0].get_legend() is None


def test_curves_of_several_runs(runs, drawn, capsys):
    assert figures.main(["curves", str(runs / "frelu"), str(runs / "srelu"), "--out", str(runs / "a/b.png")]) == 0
    (axes,) = drawn[0].axes
    found = lines_of(axes)
    for name in ("frelu", "srelu"):
        log = read_log(runs / name / "log.jsonl")
        assert found[name] == [(e["epoch"], e["val_top1_error"]) for e in log]
        train = [(e["epoch"], e["train_top1_error"]) for e in log]
        assert any(list(zip(*line.get_data(), strict=True)) == train for line in axes.get_lines())
    assert {"validation", "training (dropout, random crops)"} <= set(found)
    assert "%" in axes.get_ylabel()
    assert "b.png" in capsys.readouterr().out


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    paths = [tmp_path / a / "nin-relu-0" for a in ("one", "two")]
    assert [figures.label_of(p, paths) for p in paths] == ["one/nin-relu-0", "two/nin-relu-0"]
    paths = [tmp_path / a / "runs" / "nin" for a in ("one", "two")] + [tmp_path / "other"]
    assert [figures.label_of(p, paths) for p in paths] == ["one/runs/nin", "two/runs/nin", "other"]


@pytest.mark.parametrize("name", ["a$\\foo$b", "_hidden", "x^y_{z}$ $"])
def test_a_runs_name_is_drawn_as_it_is(runs, tmp_path, drawn, name):
    shutil.copytree(runs / "frelu", tmp_path / name)
    assert figures.main(["curves", str(tmp_path / name)]) == 0
    assert figures.main(["bias", str(tmp_path / name)]) == 0
    texts = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert texts[0].strip().replace("\\$", "$") == name


def embed(home, small_pictures, monkeypatch, *more):
    monkeypatch.setattr(checkpoints, "FOLDER", home / "checkpoints")
    monkeypatch.setattr(loop, "small_store", lambda name: small_pictures)
    monkeypatch.setattr(loop, "BATCH", 32)
    arguments = ["embedding", "--dataset", "sample", "--epochs", "1", "--out", str(home / "e.png"), *more]
    return figures.main(arguments)


def test_embedding(small_pictures, tmp_path, monkeypatch, drawn, capsys):
    """A point a test picture, by class, at what the two units give; the printed error is the net's; a second call
    trains nothing more."""
    assert embed(tmp_path, small_pictures, monkeypatch) == 0
    printed = capsys.readouterr().out
    images, labels = small_pictures.split("test").read(np.arange(30))
    panels = [axes for axes in drawn[0].axes if axes.get_lines()]
    for axes, act in zip(panels, ("relu", "frelu"), strict=True):
        last = torch.load(tmp_path / f"checkpoints/embedding/sample-1/{act}-0/last.pt", weights_only=True)
        net = build("two-units", 4, act)
        net.load_state_dict(last["model"])
        inputs = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127.5) / 128
        with torch.no_grad():
            units = net.eval().embed(inputs)
            wrong = (net(inputs).argmax(1).numpy() != labels).sum()
        for label, points in enumerate(lines_of(axes).values()):
            np.testing.assert_allclose(points, units[labels == label].numpy(), rtol=1e-3, atol=1e-4)
        assert f"{act}: test error {100 * wrong / 30:.2f}%" in printed
        assert act in axes.get_xlabel()
        assert act in axes.get_ylabel()
    assert len(drawn[0].legends[0].get_texts()) == 4
    monkeypatch.setattr(loop, "train_step", None)
    assert embed(tmp_path, small_pictures, monkeypatch) == 0


def test_the_embedding_trains_by_its_recipe_and_goes_on(small_pictures, tmp_path, monkeypatch):
    """Whole pictures, never mirrored, on their own scale; the learning rate of each step; stopped in mid-epoch it ends
    as the unbroken one."""
    seen, real = [], loop.train_step

    def looking(net, optimizer, pictures, *rest):
        seen.append((pictures.clone(), optimizer.param_groups[0]["lr"]))
        if len(seen) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(net, optimizer, pictures, *rest)

    monkeypatch.setattr(loop, "train_step", looking)
    given = ("--activations", "frelu", "--epochs", "3")
    stop_at = None
    assert embed(tmp_path / "whole", small_pictures, monkeypatch, *given) == 0
    assert [lr for _, lr in seen] == [0.01] * 4 + [0.01 / 10] * 2
    images, _ = small_pictures.split("train").read(np.arange(80))
    first = images[epoch_tables(0, 0, 80, 0).order[:32]]
    expected = (torch.from_numpy(first).permute(0, 3, 1, 2).float() - 127.5) / 128
    torch.testing.assert_close(seen[0][0], expected)
    seen.clear()
    stop_at = 3
    assert embed(tmp_path / "parts", small_pictures, monkeypatch, *given) == 143
    assert embed(tmp_path / "parts", small_pictures, monkeypatch, *given) == 0
    with monkeypatch.context() as patch:  # a signal while the last epoch is validated: no second net
        patch.setattr(loop, "validate", lambda *a, real=loop.validate: os.kill(os.getpid(), signal.SIGINT) or real(*a))
        assert embed(tmp_path / "third", small_pictures, patch, "--activations", "elu", "relu") == 130
    assert [f.name for f in (tmp_path / "third/checkpoints/embedding/sample-1").iterdir()] == ["elu-0"]
    folders = [tmp_path / part / "checkpoints/embedding/sample-3/frelu-0" for part in ("whole", "parts")]
    assert_same_study_run(*folders)


def test_an_embedding_that_diverges_says_what_to_do(small_pictures, tmp_path, monkeypatch):
    real = loop.start

    def breaking(*args, **how):
        run = real(*args, **how)
        run.net.fc.bias.data[0] = float("nan")
        return run

    monkeypatch.setattr(loop, "start", breaking)
    with pytest.raises(UserError, match=r"relu diverged: .* Another --seed may do better"):
        embed(tmp_path, small_pictures, monkeypatch)


def test_many_classes_and_many_runs_keep_colours_of_their_own():
    for count in (1, 10, 11, 100):
        assert len({str(colour) for colour in figures.colours("turbo", count)}) == count


def test_dead_units_are_reported(small_pictures, tmp_path, monkeypatch, drawn, capsys):
    real = loop.start

    def killing(*args, **how):
        run = real(*args, **how)
        run.net.units.bias.data[1] = -1e6
        return run

    monkeypatch.setattr(loop, "start", killing)
    assert embed(tmp_path, small_pictures, monkeypatch, "--activations", "frelu") == 0
    printed = capsys.readouterr().out
    assert "1 dead unit, unit 2 gives -" in printed
    assert "for all 30 pictures" in printed
    assert "unit 2 is dead" in drawn[0].axes[0].get_title()
    assert figures.dead_units(np.array([[0.0, 1.0], [0.0, 2.0]])) == [0]
    assert figures.dead_units(np.array([[0.0, -1.0], [0.1, -1.0]])) == [1]


def test_the_embeddings_recipe():
    """Of 78 epochs the learning rate is divided by 10 from epoch 40 and from epoch 62 on; no Nesterov; b does not
    decay."""
    lrs = loop.learning_rates(0.01, 78, figures.DROPS, figures.EPOCHS)
    assert lrs == [0.01] * 39 + [0.01 / 10] * 22 + [0.01 / 100] * 17
    optimizer = figures.plain_momentum(build("two-units", 10, "frelu"))
    assert [(g["nesterov"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (False, 0.9, 5e-4), (False, 0.9, 0.0)
    ]


@pytest.mark.parametrize(("arguments", "message"), [
    (["bias", "{home}/none"], "no such run or checkpoint"),
    (["bias", "{home}"], r"holds no log\.jsonl"),
    (["bias", "{home}/relu"], "only frelu, srelu and prelu learn one"),
    (["bias", "{home}/relu/best.pt"], "its activations learn nothing"),
    (["bias", "{home}/torn.pt"], "is damaged|no checkpoint"),
    (["bias", "{home}/other.pt"], "the weights do not fit the net"),
    (["bias", "{home}/other"], "is no log of a run"),
    (["curves", "{home}/none"], "no such run"),
    (["curves"], "RUN"),
    (["curves", "{home}/torn.pt"], "no such run"),
    (["embedding", "--activations", "gelu"], "--activations"),
    (["embedding", "--epochs", "0"], "--epochs"),
    (["bias", "{home}/relu", "--out", "{home}/relu/last.pt"], r"does not end in \.png"),
    (["bias", "{home}/other.pt", "--out", "{home}/x.png"], "is printed, not drawn"),
    (["embedding", "--out", "{home}/folder.png"], "is no regular file"),
    (["curves", "{home}/numbers"], "is no log of a run"),
    (["violin"], "FIGURE"),
    ([], "FIGURE"),
])
def test_bad_input_is_one_line(runs, run_folder, tmp_path, arguments, message):
    (tmp_path / "relu").symlink_to(run_folder)
    (tmp_path / "torn.pt").write_bytes((runs / "frelu" / "best.pt").read_bytes()[:5000])
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers" / "log.jsonl").write_text(
        '{"epoch": 1, "train_top1_error": 1, "val_top1_error": 2, "activations": ["x"]}\n5\n\x00\xff\n', "latin-1"
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.jsonl").write_text('{"cell": 1}\n')
    foreign = torch.load(runs / "srelu" / "last.pt", weights_only=True)
    torch.save(foreign | {"config": foreign["config"] | {"network": "nin"}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=message):
        figures.main([a.format(home=tmp_path) for a in arguments])
