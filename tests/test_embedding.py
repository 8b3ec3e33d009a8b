"""studies/embedding.py: what is drawn and printed is what the nets give."""

import os
import signal

import numpy as np
import pytest
import torch
from helpers import assert_same_study_run

import checkpoints
from data.augment import epoch_tables
from studies import common, embedding, loop
from studies.networks import build
from utils import UserError


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    kept, real = [], embedding.save_figure
    monkeypatch.setattr(embedding, "save_figure", lambda figure, out: (kept.append(figure), real(figure, out)))
    return kept


def lines_of(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def embed(home, small_pictures, monkeypatch, *more):
    monkeypatch.setattr(checkpoints, "FOLDER", home / "checkpoints")
    monkeypatch.setattr(loop, "small_store", lambda name: small_pictures)
    monkeypatch.setattr(loop, "BATCH", 32)
    arguments = ["--dataset", "sample", "--epochs", "1", "--out", str(home / "e.png"), *more]
    return embedding.main(arguments)


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


def test_many_classes_have_colours_of_their_own(tmp_path, drawn):
    """A legend names them; more than 20 are told apart by a scale, and the panels keep their width."""
    for count in (1, 10, 11, 100):
        assert len({str(colour) for colour in common.colours(count)}) == count
    points = {"relu": (np.random.default_rng(0).normal(size=(200, 2)), np.arange(200) % 100, 5.0)}
    store = type("Store", (), {"classes": [f"class {number}" for number in range(100)]})
    embedding.draw_embedding(tmp_path / "x.png", points, store)
    assert not drawn[0].legends
    assert drawn[0].axes[1].get_ylabel() == "class"


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
    assert embedding.dead_units(np.array([[0.0, 1.0], [0.0, 2.0]])) == [0]
    assert embedding.dead_units(np.array([[0.0, -1.0], [0.1, -1.0]])) == [1]


def test_the_embeddings_recipe():
    """Of 78 epochs the learning rate is divided by 10 from epoch 40 and from epoch 62 on; no Nesterov; b does not
    decay."""
    lrs = loop.learning_rates(0.01, 78, embedding.DROPS, embedding.EPOCHS)
    assert lrs == [0.01] * 39 + [0.01 / 10] * 22 + [0.01 / 100] * 17
    optimizer = embedding.plain_momentum(build("two-units", 10, "frelu"))
    assert [(g["nesterov"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (False, 0.9, 5e-4), (False, 0.9, 0.0)
    ]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--activations", "gelu"], "--activations"),
    (["--epochs", "0"], "--epochs"),
    (["--out", "{home}/last.pt"], r"does not end in \.png"),
    (["--out", "{home}/folder.png"], "is no regular file"),
])
def test_bad_input_is_one_line(tmp_path, arguments, message):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=message):
        embedding.main([a.format(home=tmp_path) for a in arguments])
