"""studies/report.py, folder.py, seen.py and page.py: the page is well-formed and has test.py's numbers; any folder with
a log has a page."""

import json
import math
import re
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import small_source
from helpers import run

import checkpoints
import test
from checkpoints import load_checkpoint
from checkpoints.run import read_log
from data import pack
from model import AlexNet
from studies import look, page, report, seen
from studies.folder import LeftOut, Run
from utils import UserError


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """One picture in the sections that show some."""
    monkeypatch.setattr(seen, "SHOWN", 1)


@pytest.fixture
def drawn(monkeypatch):
    """The figures of a page, by name."""
    kept, real = {}, page.drawing
    monkeypatch.setattr(page, "drawing", lambda figure, name, words: kept.update({name: figure}) or real(
        figure, name, words))
    return kept


@pytest.fixture(scope="module")
def two_columns(store, tmp_path_factory):
    """One step of the paper's two columns with FReLU."""
    out = tmp_path_factory.mktemp("report") / "two-columns"
    run(store, out, "--epochs", "1", "--columns", "2", "--activation", "frelu", batch=96)
    return out


def made_run(store, out, epochs: int = 1, best: float = 50.0, **arguments):
    """A run's folder as train.py leaves it, of a net that was not trained."""
    torch.manual_seed(0)
    net = AlexNet(len(store.classes), image_size=64)
    out.mkdir()
    checkpoint = {
        "model": net.state_dict(), "config": net.config, "classes": store.classes, "wnids": None,
        "mean": torch.from_numpy(store.mean), "store_size": store.size, "resize": store.manifest["resize"],
        "image_size": 64, "epoch": epochs, "step": epochs, "best": best, "dataset": store.name,
        "store": str(store.path),
    }
    torch.save(checkpoint, out / "best.pt")
    write_run(out, {"dataset": None, "data": str(store.path), "image_size": 64, "seed": 0} | arguments, epochs)
    return out


def write_run(out, arguments: dict, epochs: int, learnt=()):
    """config.json and log.jsonl as train.py and studies.loop write them."""
    out.mkdir(exist_ok=True)
    config = {"arguments": arguments, "kernels": "none", "device": "a CPU", "threads": 1, "torch": "2", "commit": None}
    (out / "config.json").write_text(json.dumps(config))
    lines = [{
        "epoch": epoch, "step": epoch, "lr": 0.1 if epoch < 3 else 0.01, "train_loss": 2.0 / epoch,
        "train_top1_error": 80.0 / epoch, "val_loss": 1.5 / epoch, "val_top1_error": 60.0 / epoch,
        "val_top5_error": 5.0, **({"activations": dict.fromkeys(learnt, -1 + epoch / 10)} if learnt else {}),
        "images_per_second": 100.0, "stall": 1.0, "seconds": 30.0,
    } for epoch in range(1, epochs + 1)]
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def frelu_run(out, layers: int = 25, act: str = "frelu", epochs: int = 4):
    """A folder of studies.frelu's."""
    arguments = {"dataset": "sample", "network": "resnet20", "activation": act, "seed": 1, "epochs": epochs, "lr": 0.1}
    return write_run(out, arguments, epochs, [f"blocks.{number}.act1" for number in range(layers)])


def read(path):
    """The page's text, as it is and as a reader sees it; raises where it is not well-formed."""
    text = path.read_text()
    root = ElementTree.fromstring(text)
    assert not re.search(r'(?:src|href)="(?!data:)', text)  # nothing from elsewhere
    return text, " ".join(" ".join(root.itertext()).split())


def lines_of(figure) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in figure.axes[0].get_lines()}


def test_the_page_of_a_run_has_test_pys_numbers(two_columns, drawn, tmp_path, capsys):
    assert report.main([str(two_columns), "--pictures", str(tmp_path / "figures")]) == 0
    capsys.readouterr()
    text, said = read(two_columns / "report.html")
    assert "Left out" not in said
    test.main([str(two_columns / "best.pt"), "--json"])
    result = json.loads(capsys.readouterr().out)
    low, high = result["top1_interval"]
    assert f"top-1 error {result['top1_error']:.2f}% (95% interval {low:.2f} to {high:.2f}%)" in said
    assert "--columns 2" in said
    assert "--activation frelu" in said
    assert "First and second column" in said
    assert "to epoch 1, again" in said
    model, _ = checkpoints.load_model(two_columns / "best.pt")
    halves = np.split(model.conv1.weight.detach().numpy(), 2)
    assert ", ".join(f"{look.saturation(half):.2f}" for half in halves) in said
    assert text.count("data:image/webp") == 1
    names = {"curves-loss.png", "curves-top1-error.png", "curves-lr.png", "activations.png", "kernels-1.png",
             "kernels-2.png", "kernels-over-epochs.webp", "neighbours.png", "deletion.png", "confusion.png",
             "reliability.png"}
    assert names <= {p.name for p in (tmp_path / "figures").iterdir()}
    assert len(list((tmp_path / "figures").glob("patches-conv5-*.png"))) == 6
    assert (tmp_path / "figures/neighbours.png").read_bytes().startswith(b"\x89PNG")
    assert text.count("<img") == len(list((tmp_path / "figures").iterdir()))
    assert (two_columns / "report.html").stat().st_size < 10e6
    log = read_log(two_columns / "log.jsonl")
    assert lines_of(drawn["curves-top1-error"])["validation"] == [(e["epoch"], e["val_top1_error"]) for e in log]
    assert lines_of(drawn["curves-loss"])["training (dropout, crops)"] == [(e["epoch"], e["train_loss"]) for e in log]
    for name, found in lines_of(drawn["activations"]).items():
        if name.startswith("act"):  # from where it started
            assert found == [(0, -1), *((entry["epoch"], entry["activations"][name]) for entry in log)]


def test_class_names_stay_text_and_missing_things_are_told(tmp_path):
    """Markup and control characters in class names; a run with one epoch; unlabelled test pictures, so that the
    validation pictures are tested, as by test.py. Then without the store and config.json."""
    source = small_source(classes=4)
    source.splits["test"].labels[:] = -1
    source.classes = ["<script>alert(1)</script>", "a\x1b[31m & b", "$x_1$", "\u202eevil"]
    store = pack.pack(source, tmp_path / "odd")
    out = made_run(store, tmp_path / "run")
    report.main([str(out), "--out", str(tmp_path / "page.html")])
    text, said = read(tmp_path / "page.html")
    assert "Left out" not in said
    assert "On 21 pictures of the val split" in said
    anew = load_checkpoint(out / "best.pt") | {"fingerprint": "0" * 64}  # whose validation pictures may be others
    (tmp_path / "anew").mkdir()
    checkpoints.save_checkpoint(tmp_path / "anew" / "best.pt", anew)
    with pytest.raises(LeftOut, match="is another store than the run was trained on"):
        Run(tmp_path / "anew").store  # noqa: B018
    assert "<script" not in text
    assert "<script>alert(1)</script>" in said
    assert "\x1b" not in text
    assert "the run has no conv1.npy" in said
    shutil.rmtree(store.path)
    (out / "config.json").unlink()
    report.main([str(out), "--out", str(tmp_path / "page.html")])
    _, said = read(tmp_path / "page.html")
    assert said.count("Left out: the store that the run was trained on can't be read") == 7
    assert "Settings and machine are not known" in said
    assert "How coloured" in said


def test_signals_are_of_pictures_drawn_from_all(store, tmp_path, monkeypatch):
    """The first rows of a folder's store are of one class."""
    made_run(store, tmp_path / "run")
    asked, real = [], Run.inputs
    monkeypatch.setattr(seen, "BATCH", 8)
    monkeypatch.setattr(Run, "inputs", lambda self, split, rows: asked.append((split, list(rows))) or real(
        self, split, rows))
    for seed in (0, 0, 1):
        assert "over 8 training pictures" in seen.signals(Run(tmp_path / "run", seed=seed))
    (split, first), again, other = asked
    assert split == "train"
    assert len(set(first)) == 8
    assert first[-1] > 40  # of 96, with 8 drawn
    assert again == ("train", first)
    assert other != again


def test_settings_that_train_py_chose_itself_are_its_defaults(run_folder):
    """Those for few pictures."""
    run = Run(run_folder)
    assert run.arguments["batch_size"] == 16
    assert run.standard["batch_size"] == 32
    run.arguments["batch_size"] = 32
    (said,) = re.findall(r"defaults</td><td>(.*?)</td>", report.what(run))
    assert said.split(", ") == ["--epochs 1"]


def test_a_run_that_was_stopped_in_its_first_epoch(store, tmp_path):
    made_run(store, tmp_path / "run", epochs=0, best=math.inf)
    report.main([str(tmp_path / "run")])
    _, said = read(tmp_path / "run" / "report.html")
    assert "best.pt of a run that was stopped in its first epoch" in said
    assert "inf%" not in said


def test_a_thousand_classes_fit(tmp_path, drawn, monkeypatch):
    """30 lines of errors, five bars a picture, a confusion matrix without names. Of the sections that know classes."""
    sections = [(title, make) for title, make in report.SECTIONS if make not in (seen.patches, seen.signals)]
    monkeypatch.setattr(report, "SECTIONS", sections)
    store = pack.pack(small_source(classes=1000, counts=(100, 20, 40)), tmp_path / "store")
    report.main([str(made_run(store, tmp_path / "run"))])
    text, said = read(tmp_path / "run/report.html")
    assert "Left out: it gets no picture right" in said
    assert "The 30 of 40 classes with the highest errors. Classes without pictures here: 960." in said
    assert text.count("<tr>") < 60
    assert text.count('class="bar') == 5
    assert max(len(axes.get_xticks()) for axes in drawn["confusion"].axes) < 20
    assert max(drawn["confusion"].get_size_inches()) < 10
    assert (tmp_path / "run/report.html").stat().st_size < 3e6


# ---------------------------------------------------------------------------------------------- logs without nets


@pytest.mark.parametrize("layers", [4, 25])
def test_a_run_of_another_study_has_its_curves(tmp_path, drawn, layers):
    """Its settings, errors, what each activation learnt: with a legend, or with a scale where they are many."""
    out = frelu_run(tmp_path / "run", layers)
    assert report.main([str(out)]) == 0
    text, said = read(out / "report.html")
    assert "run: resnet20" in said
    assert "network resnet20, activation frelu, seed 1" in said
    assert said.count("Left out: the net, resnet20, is not one of train.py's") == 8
    assert text.count("<img") == 4
    figure = drawn["activations"]
    found = lines_of(figure)
    assert found["blocks.3.act1"] == [(0, -1.0), *((epoch, -1 + epoch / 10) for epoch in range(1, 5))]
    assert len(figure.legends) == (layers == 4)
    assert [axes.get_ylabel() for axes in figure.axes[1:]] == (
        [] if layers == 4 else ["activation, from the first to the last"])
    drop = [line for line in drawn["curves-loss"].axes[0].get_lines() if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in drop] == [2.5]
    assert 'In the last epoch from -0.6000 (blocks.0.act1)' in said


@pytest.mark.parametrize(("act", "start", "label"), [("srelu", -1, "b (should"), ("prelu", 0.25, "slope below 0")])
def test_what_activations_learn_starts_where_they_do(tmp_path, drawn, act, start, label):
    report.main([str(frelu_run(tmp_path / "run", 4, act))])
    assert lines_of(drawn["activations"])["blocks.0.act1"][0] == (0, start)
    assert drawn["activations"].axes[0].get_ylabel().startswith(label)


def test_a_run_that_goes_on_has_a_page_once_there_is_an_epoch(tmp_path):
    out = write_run(tmp_path / "run", {"dataset": "sample", "epochs": 9}, epochs=0)
    with pytest.raises(UserError, match="its first epoch is not over"):
        report.main([str(out)])
    write_run(out, {"dataset": "sample", "epochs": 9}, epochs=1)
    report.main([str(out)])
    _, said = read(out / "report.html")
    assert said.count("Left out: there is no best.pt") == 8
    assert "--epochs 9" in said


def test_runs_next_to_each_other(two_columns, tmp_path, drawn):
    """Settings that differ, the lowest error, both errors over epochs; a run of another study among them."""
    here, config = tmp_path / "b", json.loads((two_columns / "config.json").read_text())
    write_run(here, config["arguments"] | {"lrn": False, "seed": 3}, epochs=3)
    there = frelu_run(tmp_path / "c", 4)
    report.main([str(here), "--compare", str(two_columns)])
    _, said = read(here / "report.html")
    assert "run lrn seed lowest validation error epochs done b False 3 20.00% 3 two-columns True 0" in said
    report.main([str(here), "--compare", str(two_columns), str(there), "--seed", "1"])
    _, said = read(here / "report.html")
    assert "run dataset epochs lr network seed lowest" in said  # what both kinds have, and which net it is
    assert "c sample 4 0.1 resnet20 1 15.00% 4" in said
    lines = drawn["compared"].axes[0].get_lines()
    for path, validation, training in zip((here, two_columns, there), lines[1::2], lines[::2], strict=True):
        log = read_log(path / "log.jsonl")
        assert list(validation.get_ydata()) == [entry["val_top1_error"] for entry in log]
        assert list(training.get_ydata()) == [entry["train_top1_error"] for entry in log]
        assert validation.get_label() == path.name
    with pytest.raises(UserError, match="no such run"):
        report.main([str(here), "--compare", str(tmp_path / "nowhere")])


def test_a_damaged_checkpoint_costs_its_sections_not_the_page(store, tmp_path):
    """Its own, or that of a run beside it, which is read last."""
    out, other = made_run(store, tmp_path / "run"), write_run(tmp_path / "other", {"dataset": "sample"}, epochs=2)
    for folder in (out, other):
        (folder / "best.pt").write_bytes(b"PK no checkpoint")
    report.main([str(out), "--compare", str(other)])
    _, said = read(out / "report.html")
    assert said.count("Left out: ") >= 7
    assert said.count("best.pt is no checkpoint of this project") >= 7
    assert "lowest validation error" in said


def test_many_runs_get_a_scale_of_colours(tmp_path, drawn):
    runs = [str(frelu_run(tmp_path / f"run-{number}", 1)) for number in range(25)]
    report.main([*runs[:1], "--compare", *runs[1:]])
    assert not drawn["compared"].legends
    assert len(drawn["compared"].axes) == 2


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    paths = [tmp_path / a / "nin-relu-0" for a in ("one", "two")]
    assert [report.name_among(p, paths) for p in paths] == ["one/nin-relu-0", "two/nin-relu-0"]
    paths = [tmp_path / a / "runs" / "nin" for a in ("one", "two")] + [tmp_path / "other"]
    assert [report.name_among(p, paths) for p in paths] == ["one/runs/nin", "two/runs/nin", "other"]


@pytest.mark.parametrize("name", ["a$\\foo$b", "_hidden", "x^y_{z}$ $"])
def test_a_runs_name_is_drawn_as_it_is(tmp_path, drawn, name):
    report.main([str(frelu_run(tmp_path / name, 1)), "--compare", str(frelu_run(tmp_path / "other", 1))])
    texts = [text.get_text() for text in drawn["compared"].legends[0].get_texts()]
    assert texts[0].strip().replace("\\$", "$") == name


def test_what_is_no_run_is_one_line(two_columns, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.jsonl").write_text('{"cell": 1}\n')
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers" / "log.jsonl").write_text('{"epoch": 1, "val_top1_error": 2, "activations": ["x"]}\n5\n\x00')
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "log.jsonl").write_text('{"epoch": 1, "val_top1_error": "low"}\n')
    for arguments, message in (
        (["nowhere"], "no such run"), ([str(tmp_path / "empty")], "it is no run's folder"),
        ([str(two_columns / "best.pt")], "no such run"), ([str(tmp_path / "other")], "is no log of a run"),
        ([str(tmp_path / "numbers")], "is no log of a run"), ([str(tmp_path / "words")], "is no log of a run"),
        ([str(two_columns), "--out", str(tmp_path)], "that is a folder"),
        ([str(two_columns), "--out", str(tmp_path / "x" / "y.html")], "there is no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            report.main(arguments)


def test_figures_of_a_grid():
    tiles = [np.full((2, 3, 3), n, np.uint8) for n in range(5)]
    out = page.grid(tiles, 3, scale=2, gap=1)
    assert out.shape == (2 * 5 - 1, 3 * 7 - 1, 3)
    assert (out[0, 0, 0], out[5, 7, 0], out[4, 0, 0], out[5, 14, 0]) == (0, 4, 255, 255)
    assert page.fitted(np.zeros((10, 5, 3), np.uint8), 20).shape == (20, 20, 3)
