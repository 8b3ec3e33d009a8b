"""test.py: what it prints, on what, and what it refuses."""

import csv
import errno
import hashlib
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import small_source
from helpers import ROOT, load
from PIL import Image

import checkpoints
import test
from data import pack, sources
from data.pictures import File
from data.store import Store
from model import AlexNet
from utils import UserError


def run_json(capsys, *arguments) -> dict:
    capsys.readouterr()
    assert test.main([*map(str, arguments), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_the_default_is_the_test_split_of_the_training_data(run_folder, store, capsys):
    """Centre crop, by hand."""
    result = run_json(capsys, run_folder / "best.pt")
    model, _ = checkpoints.load_model(run_folder / "best.pt")
    images, labels = store.split("test").read(np.arange(30))
    inputs = torch.from_numpy((images[:, 4:68, 4:68] - store.mean[4:68, 4:68]).transpose(0, 3, 1, 2))
    with torch.no_grad():
        wrong = (model(inputs).argmax(1).numpy() != labels).sum()
    assert result["top1_error"] == pytest.approx(100 * wrong / 30)
    assert result["top5_error"] == 0  # four classes
    assert (result["images"], result["protocol"], result["models"], result["split"]) == (30, "center", 1, "test")
    assert run_json(capsys, run_folder / "best.pt", "--split", "val")["images"] == 21
    assert run_json(capsys, run_folder / "best.pt", "--batch-size", 7)["top1_error"] == result["top1_error"]


def test_ten_crops_and_ensembles(run_folder, capsys):
    result = run_json(capsys, run_folder / "best.pt", run_folder / "last.pt", "--ten-crop")
    assert (result["protocol"], result["models"]) == ("ten-crop", 2)
    assert run_json(capsys, run_folder / "best.pt", "--ten-crop", run_folder / "last.pt") == result
    alone = run_json(capsys, run_folder / "best.pt", "--ten-crop")
    twice = run_json(capsys, run_folder / "best.pt", run_folder / "best.pt", "--ten-crop")
    assert twice["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_a_store_that_was_packed_anew_is_told_of(run_folder, tmp_path, capsys):
    """With another --val pictures that were trained on are for validation now."""
    checkpoint = load(run_folder / "best.pt")
    assert checkpoint["fingerprint"] == Store(ROOT / checkpoint["store"]).fingerprint
    for fingerprint, told in ((checkpoint["fingerprint"], False), ("0" * 64, True), (None, False)):
        other = checkpoint | {"fingerprint": fingerprint}
        if not fingerprint:  # as converted ones, and those of an earlier version
            del other["fingerprint"]
        checkpoints.save_checkpoint(tmp_path / "other.pt", other)
        assert test.main([str(tmp_path / "other.pt"), "--split", "val"]) == 0
        said = f"was packed anew after {tmp_path / 'other.pt'} had been trained; its validation pictures"
        assert (said in capsys.readouterr().err) == told


def test_an_ensemble_whose_nets_had_other_validation_pictures_is_told_of(run_folder, tmp_path, capsys):
    """Those of the first one's store may be training pictures of the second one."""
    other = load(run_folder / "best.pt") | {"store": "data/stores/other", "fingerprint": "0" * 64}
    checkpoints.save_checkpoint(tmp_path / "other.pt", other)
    assert test.main([str(run_folder / "best.pt"), str(tmp_path / "other.pt"), "--split", "val"]) == 0
    assert f"is not the store on which {tmp_path / 'other.pt'} had been trained" in capsys.readouterr().err


def test_bf16_when_asked_for(run_folder, capsys):
    """fp32 otherwise; about the same loss, but not the same."""
    exact = run_json(capsys, run_folder / "best.pt")
    rounded = run_json(capsys, run_folder / "best.pt", "--precision", "bf16")
    assert (exact["precision"], rounded["precision"]) == ("fp32", "bf16")
    assert 0 < abs(rounded["loss"] / exact["loss"] - 1) < 0.02
    test.main([str(run_folder / "best.pt"), "--precision", "bf16"])
    assert "centre crop; 1 model; bf16\n" in capsys.readouterr().out


def test_the_report_is_readable(run_folder, capsys):
    test.main([str(run_folder / "best.pt"), "--ten-crop", "--per-class"])
    out = capsys.readouterr().out
    assert "small, test split, 30 images; ten crops, softmax outputs averaged; 1 model" in out
    assert out.count("95% interval") == 1
    assert "top-5" not in out  # of four classes
    assert sum(line.count("class ") > 0 for line in out.splitlines()) == 4


def test_the_default_checkpoint_is_the_newest(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "FOLDER", run_folder.parent)
    result = run_json(capsys)
    assert result["checkpoints"] == [str(run_folder / "best.pt")]
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path)
    with pytest.raises(UserError, match=r"best.pt yet; python train.py makes one"):
        test.main([])


def test_predictions_are_written(run_folder, store, tmp_path, capsys):
    result = run_json(capsys, run_folder / "best.pt", "--predictions", tmp_path / "p.csv")
    with open(tmp_path / "p.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(30))
    assert [row["class"] for row in rows] == [store.classes[n % 4] for n in range(30)]
    wrong = sum(row["class"] != row["predicted_1"] for row in rows)
    assert 100 * wrong / 30 == pytest.approx(result["top1_error"])
    assert all(0 < float(row["probability"]) <= 1 for row in rows)


def test_single_pictures(run_folder, store, tmp_path, capsys):
    for name in ("a.png", "b.jpg"):
        Image.effect_noise((120, 90), 60).convert("RGB").save(tmp_path / name)
    test.main([str(run_folder / "best.pt"), "--images", str(tmp_path / "a.png"), str(tmp_path / "b.jpg"), "--ten-crop"])
    out = capsys.readouterr().out
    assert out.count("%") == 8
    shares = [float(line.split("%")[0]) for line in out.splitlines() if "%" in line]
    assert sum(shares[:4]) == pytest.approx(100, abs=0.05)
    assert shares[:4] == sorted(shares[:4], reverse=True)
    (tmp_path / "c.png").write_bytes(b"no picture")
    Image.fromarray(np.ones((80, 80), np.float32)).save(tmp_path / "float.tif")
    for name in ("c.png", "missing.png", "float.tif"):
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            test.main([str(run_folder / "best.pt"), "--images", str(tmp_path / name)])


def test_the_five_likeliest_of_seven_classes(run_folder, tmp_path, capsys):
    net = AlexNet(7, image_size=64)
    seven = load(run_folder / "best.pt") | {"model": net.state_dict(), "config": net.config, "classes": list("abcdefg")}
    torch.save(seven, tmp_path / "seven.pt")
    Image.effect_noise((120, 90), 60).convert("RGB").save(tmp_path / "a.png")
    capsys.readouterr()
    test.main([str(tmp_path / "seven.pt"), "--images", str(tmp_path / "a.png")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    net, prepare = checkpoints.load_model(tmp_path / "seven.pt")
    with torch.no_grad():
        likeliest = net(prepare(Image.open(tmp_path / "a.png")))[0].topk(5).indices
    assert [line.split()[-1] for line in lines] == ["abcdefg"[label] for label in likeliest]


def test_folders_of_pictures_are_named_in_batches(run_folder, tmp_path, capsys):
    """Whatever the batch, as one by one; what can't be read is told, counted and left out; CSV, JSON and features."""
    photos = tmp_path / "photos"
    (photos / "deep" / "er").mkdir(parents=True)
    for number in range(7):
        picture = Image.effect_noise((120 + number, 90), 60).convert("RGB")
        picture.save(photos / ("deep/er" if number % 2 else ".") / f"{number}.png")
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    (photos / "notes.txt").touch()
    (photos / "self.jpg").symlink_to(photos / "self.jpg")
    best = str(run_folder / "best.pt")
    wanted = ["0.png", "2.png", "4.png", "6.png", "deep/er/1.png", "deep/er/3.png", "deep/er/5.png"]
    test.main([best, "--images", str(photos), "--json", "--batch-size", "3"])
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["picture"] for line in lines] == [str(photos / name) for name in wanted]
    assert "skipped: " in err
    assert "broken.jpg cannot be read as a picture" in err
    assert "2 of 9 pictures could not be read" in err
    assert "1 files are not named like pictures" in err
    test.main([best, best, "--images", *(str(photos / name) for name in wanted), "--json", "--ten-crop"])
    both = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["picture"] for line in both] == [line["picture"] for line in lines]
    table, arrays = tmp_path / "p.csv", tmp_path / "f.npz"
    test.main([best, "--images", str(photos), "--predictions", str(table), "--features", str(arrays)])
    assert f"7 pictures named, in {table} and {arrays}" in capsys.readouterr().out
    with open(table) as file:
        rows = list(csv.DictReader(file))
    assert [row["picture"] for row in rows] == [line["picture"] for line in lines]
    assert [row["predicted_1"] for row in rows] == [line["classes"][0][0] for line in lines]
    with np.load(arrays) as content:
        model, prepare = checkpoints.load_model(best)
        pictures = [Image.open(name) for name in content["names"]]
        with torch.no_grad():
            np.testing.assert_allclose(content["features"], model.features(prepare(pictures)), rtol=1e-4, atol=1e-4)
            chances = model(prepare(pictures)).softmax(1)
        assert content["labels"].tolist() == [-1] * 7
    for line, row in zip(lines, chances, strict=True):
        assert line["classes"][0] == [model.classes[row.argmax()], pytest.approx(row.max().item(), abs=1e-5)]


def test_memory_that_runs_out_is_one_line(run_folder, tmp_path, monkeypatch):
    """While nets are made and pictures read, too; no picture is skipped for it."""
    def short(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    Image.new("RGB", (70, 70)).save(tmp_path / "a.png")
    Image.new("RGB", (70, 70)).save(tmp_path / "b.png")
    for place in ("checkpoints.loose.to_square", "checkpoints.new_net"):
        with monkeypatch.context() as patch:
            patch.setattr(place, short)
            with pytest.raises(UserError, match=r"^memory ran out \(.*\); take a smaller --batch-size"):
                test.main([str(run_folder / "best.pt"), "--images", str(tmp_path / "a.png"), str(tmp_path / "b.png")])


def test_folders_without_pictures_are_one_line(run_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    best = str(run_folder / "best.pt")
    with pytest.raises(UserError, match=r"empty holds no pictures \(.bmp"):
        test.main([best, "--images", str(tmp_path / "empty")])
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"none of 2 pictures can be read; .*a.jpg cannot be read"):
        test.main([best, "--images", str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")])


def test_a_disk_that_fails_is_not_called_a_damaged_picture(run_folder, tmp_path, monkeypatch):
    """It ends the script: what follows would be missing from the predictions, too."""
    def fail(self):
        raise OSError(errno.EIO, "Input/output error", self.path)

    Image.effect_noise((90, 70), 50).save(tmp_path / "a.png")
    monkeypatch.setattr(File, "read", fail)
    with pytest.raises(OSError, match="Input/output error"):
        test.main([str(run_folder / "best.pt"), "--images", str(tmp_path)])


def test_features_and_confusion_of_a_data_set(run_folder, store, tmp_path):
    arrays, picture = tmp_path / "f.npz", tmp_path / "c.png"
    test.main([str(run_folder / "best.pt"), "--features", str(arrays), "--confusion", str(picture)])
    model, _ = checkpoints.load_model(run_folder / "best.pt")
    images, labels = store.split("test").read(np.arange(30))
    mean = torch.load(run_folder / "best.pt", weights_only=True)["mean"].numpy()
    inputs = torch.from_numpy((images - mean)[:, 4:68, 4:68].transpose(0, 3, 1, 2)).float()
    with np.load(arrays) as content, torch.no_grad():
        np.testing.assert_allclose(content["features"], model.features(inputs), rtol=1e-4, atol=1e-3)
        assert content["labels"].tolist() == labels.tolist()
        assert content["classes"].tolist() == store.classes
    assert Image.open(picture).size[0] > 200


def test_confusion_counts_by_row(tmp_path, monkeypatch):
    """Shares are of a class's own pictures; many classes have no names and numbers."""
    import matplotlib.axes

    drawn = []
    real = matplotlib.axes.Axes.imshow
    monkeypatch.setattr(matplotlib.axes.Axes, "imshow", lambda self, x, **k: drawn.append(x) or real(self, x, **k))
    rows = [(0, [0, 1], 0.9)] * 3 + [(0, [1, 0], 0.9)] + [(1, [1, 0], 0.9)]
    test.confusion_figure(rows, ["$a_b$", "<b>\x1b[31m"]).savefig(tmp_path / "c.png")
    assert drawn[0].tolist() == [[75, 25], [0, 100]]
    test.confusion_figure(rows, [str(n) for n in range(200)]).savefig(tmp_path / "c.png")
    assert drawn[1].shape == (200, 200)


def test_a_class_without_pictures_has_no_error():
    one, none = test.per_class([(0, [1], [0.9])], ["cat", "dog"])
    assert one == {"class": "cat", "images": 1, "top1_error": 100.0, "taken_for": "dog", "times": 1}
    assert none == {"class": "dog", "images": 0, "top1_error": None}
    result = {"data": "x", "split": "val", "images": 1, "protocol": "center", "precision": "fp32", "per_class": [none],
              "models": 1}
    assert test.report(result, 2).endswith("\n        - of     0  dog")


def test_what_does_not_fit_is_refused(run_folder, tmp_path, monkeypatch):
    three = pack.pack(small_source(classes=3), tmp_path / "three")
    best = str(run_folder / "best.pt")
    with pytest.raises(UserError, match=r"has 4 classes, .* has 3"):
        test.main([best, "--data", str(three.path)])
    tiny = pack.pack(small_source(), tmp_path / "tiny", size=63)
    with pytest.raises(UserError, match=r"trained on pictures of 72 pixels, .* has 63; .*--size 72"):
        test.main([best, "--data", str(tiny.path)])
    content = torch.load(best, weights_only=True)
    torch.save(content | {"store": "data/stores/gone"}, tmp_path / "gone.pt")
    with pytest.raises(UserError, match="--data or --dataset"):
        test.main([str(tmp_path / "gone.pt")])
    (tmp_path / "link.csv").symlink_to(best)
    for arguments, message in (
        (["nowhere.pt"], "no such checkpoint"),
        ([str(tmp_path)], "is a folder; name a checkpoint in it, such as .*best.pt"),
        ([best, "--split", "train"], "--split"),
        ([best, "--batch-size", "0"], "--batch-size"),
        ([best, "--data", str(tmp_path)], "is not a store"),
        ([best, "--predictions", "nowhere/p.csv"], "no such folder"),
        ([best, "--predictions", str(tmp_path)], "that is a folder; name a file in it"),
        ([best, "--predictions", "/dev/null"], "that is no regular file"),
        ([best, "--images", ".", "--predictions", str(tmp_path / "cat.png")], "that is a checkpoint or a picture"),
        ([best, "--images", "cat.jpg", "--per-class"], "go with a data set"),
        (["--images", "cat.jpg", best], "best.pt: that is a checkpoint; name it before --images"),
        ([best, "--confusion", str(tmp_path / "c.pdf")], "what is written is a PNG; name a .png"),
        ([best, "--images", "cat.jpg", "--confusion", "c.png"], "go with a data set"),
        ([best, "--features", "f.npz", "--ten-crop"], "of one net and centre crops"),
        ([best, best, "--features", "f.npz"], "of one net and centre crops"),
        ([best, "--images", "cat.jpg", "--predictions", "cat.jpg"], "that is a checkpoint or a picture"),
        ([best, "--predictions", str(tmp_path / "link.csv")], "that is a checkpoint or a picture"),
        ([best, "--predictions", str(tmp_path / "x"), "--confusion", str(tmp_path / "x")], "--predictions goes there"),
        ([best, "--features", str(tmp_path / "f.safetensors")], "that is a checkpoint or a picture"),
        ([best, "--predictions", best], "that is a checkpoint or a picture"),
    ):
        with pytest.raises(UserError, match=message):
            test.main(arguments)
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))  # root may write anywhere
    with pytest.raises(UserError, match=r"--features .*: .* can't be written to; name another folder"):
        test.main([best, "--features", str(tmp_path / "f.npz")])


def test_damaged_names_are_one_line(run_folder, tree, tmp_path, monkeypatch, capsys):
    """Bytes that are not UTF-8, or a name too many, in a file of the right size; or with the right checksum as well."""
    for split in ("train", "val"):
        for number, folder in enumerate(("cat", "dog", "cat", "dog")):  # the checkpoint's four classes
            shutil.copytree(tree / split / folder, tree / split / f"class {number}")
        for folder in ("cat", "dog"):
            shutil.rmtree(tree / split / folder)
    store = pack.pack(sources.find(str(tree)), tmp_path / "store", size=72)
    file = store.path / "val-names.txt"
    names = file.read_bytes()
    monkeypatch.setattr(sys, "argv", ["test.py", str(run_folder / "best.pt"), "--data", str(store.path)])
    manifest = json.loads((store.path / "manifest.json").read_text())
    del manifest["checksum"]
    for byte, reason in ((b"\xe9", "wrong SHA-256"), (b"\xe9", "not UTF-8 text"), (b"\n", "13 names for 12 pictures")):
        file.write_bytes(names.replace(b"0", byte, 1))
        if "SHA" not in reason:
            manifest["files"]["val-names.txt"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
            (store.path / "manifest.json").write_text(json.dumps(manifest))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            test.run_script(test.main)
        assert ended.value.code == 2
        assert capsys.readouterr().err == f"error: {file} is damaged ({reason}); copy or pack the store again\n"
    file.write_bytes(names.replace(b"0", b"1", 1))
    with pytest.raises(UserError, match=r"val-names.txt is damaged \(wrong SHA-256\)"):
        pack.main(["--verify", str(store.path)])


def test_grey_and_colour_are_warned_of(run_folder, store, grey_store, tmp_path, capsys):
    """A grey net takes colour pictures, and the other way round, but hardly ever should."""
    assert test.main([str(run_folder / "best.pt"), "--data", str(grey_store.path)]) == 0
    assert f"was trained on colour pictures, those of {grey_store.path} are grey\n" in capsys.readouterr().err
    assert test.main([str(run_folder / "best.pt")]) == 0
    assert "was trained on" not in capsys.readouterr().err
    content = load(run_folder / "best.pt")
    torch.save(content | {"mean": content["mean"][:, :, :1].clone()}, tmp_path / "grey.pt")
    assert test.main([str(tmp_path / "grey.pt"), "--data", str(store.path)]) == 0
    assert f"was trained on grey pictures, those of {store.path} are colour\n" in capsys.readouterr().err


def test_other_class_names_are_warned_of(run_folder, tmp_path, capsys):
    source = small_source()
    source.classes = ["w", "x", "y", "z"]
    other = pack.pack(source, tmp_path / "other")
    test.main([str(run_folder / "best.pt"), "--data", str(other.path)])
    assert "class names" in capsys.readouterr().err
    source.classes = small_source().classes[::-1]
    other = pack.pack(source, tmp_path / "reversed")
    with pytest.raises(UserError, match="in another order, and its predictions would be wrong there"):
        test.main([str(run_folder / "best.pt"), "--data", str(other.path)])


def test_json_stays_one_line_while_a_set_is_packed(run_folder, tmp_path, monkeypatch, capsys):
    """--dataset with a set that has no store yet."""
    monkeypatch.setattr(pack, "STORES", tmp_path / "stores")
    monkeypatch.setattr(sources, "find", lambda *_: small_source("sample"))
    result = run_json(capsys, run_folder / "best.pt", "--dataset", "sample")
    assert result["data"] == "sample"
    assert (tmp_path / "stores" / "sample").exists()


def test_wilson_interval_against_published_values():
    """10 of 100: 5.52% to 17.44%; 0 of 20: 0 to 16.11% (Newcombe 1998's method 3)."""
    assert test.wilson_interval(10, 100) == pytest.approx((5.5229, 17.4366), abs=1e-3)
    assert test.wilson_interval(0, 20) == pytest.approx((0, 16.1125), abs=1e-3)
