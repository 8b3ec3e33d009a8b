"""From a folder of pictures to a net: train.py --data FOLDER, --val, --balance, --init with --freeze."""

import json
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from conftest import pictures
from helpers import ROOT, assert_same_state, load, resume, run
from PIL import Image

import checkpoints
import options
import test
import train
from checkpoints.run import read_log
from data import pack
from data.augment import balanced, epoch_tables
from data.loader import Loader
from data.store import Store
from utils import UserError
from watch import Watch

SMALL = ["--image-size", "64", "--max-steps", "1", "--batch-size", "4", "--workers", "0"]


@pytest.fixture
def stores(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "STORES", tmp_path / "stores")
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path / "checkpoints")
    return tmp_path / "stores"


def fill(folder, count, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures(first + count, (80, 70, 3))[first:], first):
        Image.fromarray(picture).save(folder / f"{number}.png")


def split_of(store, name):
    return set(store.names(name))


# ---------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("splits", [[], ["train"], ["train", "val"], ["train", "test"], ["train", "val", "test"]])
def test_every_layout_trains_in_one_line_and_is_tested_in_another(splits, stores, tmp_path, capsys):
    photos = tmp_path / "photos"
    for split in splits or [""]:
        for number, label in enumerate(("cat", "dög \u201cx\u201d", "owl's")):
            fill(photos / split / label, 12 if split in ("", "train") else 3, first=20 * number)
    assert train.main(["--data", str(photos), *SMALL]) == 0
    (store,) = map(Store, stores.iterdir())
    assert store.size == 72  # as 64 pixels are asked for
    assert store.path.name.startswith("photos-")
    assert (tmp_path / "checkpoints" / "photos-1" / "last.pt").exists()
    assert (store.counts.get("test", 0) > 0) == ("test" in splits)
    assert sum(store.counts.values()) == 36 + 9 * (len(splits) - 1 if splits else 0)
    said = capsys.readouterr().out
    assert ("set aside for that" in said) == ("val" not in splits)
    assert test.main([str(tmp_path / "checkpoints" / "photos-1" / "last.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == store.counts["test" if "test" in splits else "val"]
    train.main(["--data", str(photos), *SMALL])
    assert "packing" not in capsys.readouterr().out
    assert len(list(stores.iterdir())) == 1


def test_nested_folders_duplicates_and_a_class_of_one_picture(stores, tmp_path, capsys):
    photos = tmp_path / "photos"
    fill(photos / "cat" / "deep" / "deeper", 10)
    fill(photos / "dog", 60, first=20)
    fill(photos / "lone", 1, first=100)
    for copy in range(5):
        shutil.copy(photos / "cat" / "deep" / "deeper" / "3.png", photos / "cat" / f"copy {copy}.png")
    assert train.main(["--data", str(photos), "--val", "0.3", *SMALL]) == 0
    (store,) = map(Store, stores.iterdir())
    labels = store.split("train").every_label()
    assert (labels == store.classes.index("lone")).sum() == 1
    copies = [name for name in split_of(store, "val") if "copy" in name or name.split("/")[-1] == "3.png"]
    assert len(copies) in (0, 6)
    said = capsys.readouterr().out
    assert "classes are uneven, from 1 (lone) to 41 (dog) training pictures; train.py --balance" in said
    assert "2 of 3 classes have fewer than 20 training pictures (lone: 1)" in said
    assert "repaired in train: " in said
    assert " enlarged" in said  # 70 pixels to 72
    assert "training pictures are few to train from scratch" in said


def test_pictures_that_are_added_leave_the_validation_pictures_where_they_were(stores, tmp_path):
    photos = tmp_path / "photos"
    for number, label in enumerate(("cat", "dog")):
        fill(photos / label, 40, first=100 * number)
    before = pack.store_of(photos, size=64)
    fill(photos / "dog", 45, first=500)
    after = pack.store_of(photos, size=64)
    assert after.path != before.path
    assert sum(after.counts.values()) == sum(before.counts.values()) + 45
    assert split_of(before, "val") <= split_of(after, "val")
    content = bytearray((photos / "cat" / "1.png").read_bytes())
    content[-1] ^= 1
    (photos / "cat" / "1.png").write_bytes(content)  # another file, the same name and size
    assert pack.store_of(photos, size=64).path not in (before.path, after.path)


def test_what_a_broken_picture_stopped_can_be_cleared_away(stores, tmp_path, capsys):
    """Repaired pictures make another store, which would leave the finished shards of the first one for ever."""
    for number, split in enumerate(("train", "val")):
        fill(tmp_path / "photos" / split / "cat", 3, first=20 * number)
        fill(tmp_path / "photos" / split / "dog", 3, first=20 * number + 10)
    (tmp_path / "photos" / "val" / "dog" / "30.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1 of 6 pictures of val cannot be read, more than 1%; repair or replace them"):
        pack.store_of(tmp_path / "photos", size=64)
    assert "1 of 2 shards are kept in " in capsys.readouterr().out
    (left,) = stores.iterdir()
    fill(tmp_path / "photos" / "val" / "dog", 1, first=30)
    assert pack.store_of(tmp_path / "photos", size=64).counts == {"train": 6, "val": 6}
    assert f"{left} is an unfinished packing of other pictures; remove it" in capsys.readouterr().out


def test_a_run_goes_on_when_its_folder_is_gone(stores, tmp_path):
    photos = tmp_path / "photos"
    for number, label in enumerate(("cat", "dog")):
        fill(photos / label, 12, first=100 * number)
    train.main(["--data", str(photos), "--val", "0.2", "--out", str(tmp_path / "run"), *SMALL])
    shutil.rmtree(photos)
    assert resume(tmp_path / "run", "--data", photos, "--val", "0.2", "--max-steps", "2") == 0  # as it was started
    with pytest.raises(UserError, match=r"--val 0.3: .* was started with --val 0.2"):
        resume(tmp_path / "run", "--val", "0.3")
    assert resume(tmp_path / "run", "--max-steps", "3") == 0
    assert load(tmp_path / "run" / "last.pt")["step"] == 3


def test_a_run_whose_store_is_gone_packs_its_folder_anew(stores, tmp_path, capsys):
    """As long as the pictures are the same. Where the repository was moved, the store is where config.json says."""
    for number, label in enumerate(("cat", "dog")):
        fill(tmp_path / "photos" / label, 12, first=100 * number)
    train.main(["--data", str(tmp_path / "photos"), "--val", "0.2", "--out", str(tmp_path / "run"), *SMALL])
    shutil.rmtree(stores)
    assert resume(tmp_path / "run", "--max-steps", "2") == 0
    assert "packed " in capsys.readouterr().out
    (store,) = stores.glob("*/")
    moved = store.rename(tmp_path / "moved")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["store"] = str(moved)
    (tmp_path / "run" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "checksum"}))
    assert resume(tmp_path / "run", "--max-steps", "3") == 0
    assert not list(stores.glob("*/"))
    shutil.rmtree(moved)
    fill(tmp_path / "photos" / "cat", 1, first=500)
    with pytest.raises(UserError, match="another store"):
        resume(tmp_path / "run", "--max-steps", "4")


def test_a_run_from_an_h5_file_whose_store_is_gone_packs_it_anew(stores, tmp_path):
    with h5py.File(tmp_path / "set.h5", "w") as file:
        file.attrs["classes"] = ["a", "b"]
        for split in ("train", "val"):
            file[f"{split}/images"], file[f"{split}/labels"] = pictures(20, (72, 72, 3)), np.arange(20) % 2
    train.main(["--data", str(tmp_path / "set.h5"), "--out", str(tmp_path / "run"), *SMALL])
    shutil.rmtree(stores)
    assert resume(tmp_path / "run", "--max-steps", "2") == 0


def test_sizes_and_folders_that_no_store_holds(stores, store, tmp_path):
    fill(tmp_path / "photos" / "cat", 3)
    fill(tmp_path / "photos" / "dog", 3, first=10)
    with pytest.raises(UserError, match=r"22856 x 22856 pixels are more than a store holds \(4096\)"):
        train.main(["--data", str(tmp_path / "photos"), "--image-size", "20000"])
    torn = shutil.copytree(store.path, tmp_path / "torn")
    (torn / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"is a store without its manifest.json"):
        train.main(["--data", str(torn)])
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="no such folder"):
        train.main(["--data", str(tmp_path / "loop")])


def test_somebody_elses_manifest_among_the_pictures(stores, tmp_path):
    fill(tmp_path / "photos" / "cat", 12)
    fill(tmp_path / "photos" / "dog", 12, first=20)
    (tmp_path / "photos" / "manifest.json").write_text('{"files": []}')
    assert train.main(["--data", str(tmp_path / "photos"), "--val", "0.2", *SMALL]) == 0
    assert len(list(stores.iterdir())) == 1
    with pytest.raises(UserError, match=r"photos is not a store; pack it first"):
        Store(tmp_path / "photos")


def test_empty_arguments_are_told():
    for words in (("train.py", "--data", ""), ("test.py", "--data=")):
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (2, "error: one of the arguments is empty; is a variable not set?\n")


@pytest.mark.parametrize(
    ("made", "arguments", "message"),
    [
        ("photos/", [], "has no folder train/; expected"),
        ("photos/valid/x.png", [], "has no folder train/, but valid/ \\(a class cannot be called so; rename it\\)"),
        ("photos/cat/", [], "cat holds no pictures"),
        ("photos/cat/x.png", [], "has no class with two different pictures"),
        ("photos/train/cat/x.png", ["--val", "2"], "--val: 2 is not a number"),
        ("", ["--val", "0.1"], "no such folder"),
        ("", [], "no such folder"),
    ],
)
def test_folders_that_are_none_are_one_line(made, arguments, message, stores, tmp_path):
    path = tmp_path / made
    path.parent.mkdir(parents=True, exist_ok=True)
    if made.endswith("png"):
        fill(path.parent, 1)
    elif made:
        path.mkdir(exist_ok=True)
    with pytest.raises(UserError, match=message):
        train.main(["--data", str(tmp_path / "photos"), *arguments])
    assert not stores.exists() or not list(stores.iterdir())


def test_val_is_for_folders(store, stores, tmp_path):
    with pytest.raises(UserError, match="is a store, with validation pictures of its own"):
        run(store, tmp_path / "run", "--val", "0.2")
    with pytest.raises(UserError, match="--val is for --data FOLDER"):
        train.main(["--dataset", "sample", "--val", "0.2"])


def test_several_processes_need_a_store(tmp_path):
    fill(tmp_path / "photos" / "cat", 2)
    args = options.make_parser().parse_args(["--data", str(tmp_path / "photos")])
    with pytest.raises(UserError, match=r"is not a store; several processes need one: python -m data.pack"):
        train.stored(args, Watch(torch.device("cpu"), world=2))


# ---------------------------------------------------------------------------------------------- --balance


def test_balanced_draws_each_class_equally_often():
    labels = np.repeat([0, 1, 2], [90, 9, 1])
    for seed in range(5):
        drawn = balanced(np.random.default_rng(seed), labels)
        assert len(drawn) == 100
        assert sorted(np.bincount(labels[drawn])) == [33, 33, 34]
        times = np.bincount(drawn, minlength=100)
        assert set(times[:90]) == {0, 1}  # each sample of a class as often as any other, or once more
        assert set(times[90:99]) <= {3, 4}
        assert times[99] in (33, 34)


@pytest.mark.parametrize("resident", [True, False])
def test_a_picture_that_comes_often_is_cropped_anew_each_time(store, resident):
    loader = Loader(store, "train", resident=resident)
    labels = np.where(np.arange(96) == 7, 1, 0)  # a class of one picture
    tables = epoch_tables(0, 0, 96, 8, labels=labels)
    sevens = np.flatnonzero(tables.samples == 7)
    assert len(sevens) == 48
    ((crops, found),) = loader.batches([sevens], tables, 64)
    whole, label = store.split("train").read([7])
    for draw, crop in zip(sevens, crops.numpy(), strict=True):
        (top, left), mirrored = tables.offsets[draw], tables.mirror[draw]
        wanted = whole[0, top : top + 64, left : left + 64]
        assert np.array_equal(crop, wanted[:, ::-1] if mirrored else wanted)
    assert set(found.tolist()) == {label[0]}
    assert len({tuple(tables.offsets[draw]) for draw in sevens}) > 20
    assert np.array_equal(loader.every_label, store.split("train").read(np.arange(96))[1])


def test_balance_resumes_to_the_bit(store, tmp_path):
    run(store, tmp_path / "whole", "--balance", "--max-steps", "9")
    run(store, tmp_path / "parts", "--balance", "--max-steps", "4")
    resume(tmp_path / "parts", "--max-steps", "9")
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    run(store, tmp_path / "plain", "--max-steps", "9")
    one, other = (load(tmp_path / name / "last.pt")["model"]["conv1.weight"] for name in ("whole", "plain"))
    assert not torch.equal(one, other)
    with pytest.raises(UserError, match="was started without --balance"):
        resume(tmp_path / "plain", "--balance")


# ---------------------------------------------------------------------------------------------- --init, --freeze


@pytest.mark.parametrize("layer", ["conv1", "conv5", "fc7"])
def test_frozen_layers_keep_their_weights_to_the_bit(layer, store, tmp_path):
    """Those before it, too, with what their activations have learnt; the others learn; resuming is exact."""
    run(store, tmp_path / "first", "--activation", "frelu", "--max-steps", "3")
    init = ["--init", tmp_path / "first" / "last.pt", "--freeze", layer]
    run(store, tmp_path / "whole", *init, "--max-steps", "8")
    run(store, tmp_path / "parts", *init, "--max-steps", "5")
    resume(tmp_path / "parts", "--max-steps", "8")
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    before, last = load(tmp_path / "first" / "last.pt")["model"], load(tmp_path / "whole" / "last.pt")
    layers = list(checkpoints.LAYERS)
    frozen = layers[: layers.index(layer) + 1]
    for name, tensor in last["model"].items():
        number = name.partition(".")[0][-1]
        same = number in {f[-1] for f in frozen}
        assert torch.equal(before[name], tensor) == same, name
    kept = sum(len(group["params"]) for group in last["optimizer"]["param_groups"])
    assert kept == 3 * (8 - len(frozen)) - 1  # weight, bias and b of each; fc8 has no b


def test_frozen_layers_cost_no_backward_pass(store, tmp_path, monkeypatch):
    run(store, tmp_path / "first", "--max-steps", "1")
    real, nets = train.train_step, []
    monkeypatch.setattr(train, "train_step", lambda net, *a: nets.append(net) or real(net, *a))
    run(store, tmp_path / "run", "--init", tmp_path / "first" / "last.pt", "--freeze", "conv5", "--max-steps", "1")
    (net,) = nets
    seen = []
    for name, layer in net.named_children():
        layer.register_forward_hook(lambda *a, name=name: seen.append((name, a[2].requires_grad)))
    net(torch.zeros(2, 3, 64, 64))
    without = [name for name, tracked in seen if not tracked]
    assert [name for name in without if name[:2] == "fc"] == []
    assert without[-1] in ("pool3", "flatten")
    assert all(p.grad is None for name, p in net.named_parameters() if name.startswith("conv"))


def test_layers_of_torchvisions_net_have_alexnets_names():
    net = checkpoints.torchvision_net(10, 224)
    for layer, theirs in checkpoints.LAYERS.items():
        assert isinstance(net.get_submodule(theirs), torch.nn.Conv2d if layer.startswith("conv") else torch.nn.Linear)
    checkpoints.freeze(net, "conv5")
    assert [name for name, p in net.named_parameters() if p.requires_grad] == [
        f"classifier.{number}.{part}" for number in (1, 4, 6) for part in ("weight", "bias")
    ]


def test_init_without_dropout_starts_from_the_same_function(store, tmp_path):
    """Testing multiplies by 0.5 where dropout was; without dropout that factor is in the weights."""
    run(store, tmp_path / "first", "--max-steps", "3")
    first = tmp_path / "first" / "last.pt"
    args = options.parse(["--data", str(store.path), "--init", str(first), "--no-dropout"])
    options.settle(args, store, torch.device("cpu"), 1)
    net = train.starting_net(args, store, Watch(torch.device("cpu"))).eval()
    before, prepare = checkpoints.load_model(first)
    inputs = prepare([Image.fromarray(p) for p in pictures(3, (80, 80, 3))])
    torch.testing.assert_close(net(inputs), before(inputs))


def test_init_from_a_net_without_dropout_has_none_either(run_folder, store, tmp_path, capsys):
    content = load(run_folder / "best.pt")
    content["config"]["dropout"] = 0
    torch.save(content, tmp_path / "none.pt")
    run(store, tmp_path / "run", "--init", tmp_path / "none.pt", "--max-steps", "1")
    assert "net     AlexNet, one column, without dropout, 64" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["arguments"]["dropout"] is False


def test_freeze_needs_weights(store, tmp_path):
    with pytest.raises(UserError, match="--freeze conv5 would freeze untrained weights; add --init CHECKPOINT"):
        run(store, tmp_path / "run", "--freeze", "conv5")


def test_defaults_suit_trained_weights_and_few_pictures(store, tmp_path, capsys):
    """Printed, and as README's guides have them."""
    run(store, tmp_path / "first", "--max-steps", "1")
    train.main(["--data", str(store.path), "--out", str(tmp_path / "run"), "--max-steps", "1", "--freeze", "conv5",
                "--init", str(tmp_path / "first" / "last.pt")])
    said = capsys.readouterr().out
    assert "batch 32, learning rate 0.001, momentum 0.9, weight decay 0.0005, at most 30 epochs, patience 5" in said
    assert "parameters, all up to conv5 frozen" in said
    arguments = json.loads((tmp_path / "run" / "config.json").read_text())["arguments"]
    assert (arguments["lr"], arguments["epochs"], arguments["freeze"]) == (0.001, 30, "conv5")
    assert read_log(tmp_path / "run" / "log.jsonl")[0]["lr"] == 0.001
