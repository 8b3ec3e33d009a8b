"""data/trees.py: folders and lists as people make them."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import pictures
from helpers import ROOT
from PIL import Image

from benchmarks.faults import imagenet_files as small
from data import pack, sources, trees
from utils import UserError


def test_names_that_are_no_lines_of_text_stay_in_step(tree, tmp_path):
    """Line separators of every kind and bytes that are no UTF-8, in names of pictures: one name a picture."""
    names = ["a\rb", "c\x0cd", "e\x85f", "g\u2028h", "i\nj", "k\udcffl", "caf\u00e9", "9.41\u202fAM", "a\u200db"]
    for name in names:
        os.rename(tree / "val/cat/0.png", os.fsencode(tree / "val/cat" / f"{name}.png"))
        Image.fromarray(pictures(1, (80, 80, 3))[0]).save(tree / "val/cat/0.png")
    store = pack.pack(sources.find(str(tree)), tmp_path / "store", size=64)
    found = store.names("val")
    assert len(found) == store.counts["val"] == 15
    assert {"cat/9.41\u202fAM.png", "cat/a\u200db.png"} <= set(found)  # as the files are called
    assert {"cat/a\\rb.png", "cat/g\\u2028h.png", "cat/k\\udcffl.png", "cat/caf\u00e9.png"} <= set(found)
    assert [name.split("/")[0] for name in found] == ["cat"] * 12 + ["dog"] * 3


def test_a_tree_can_be_deeper_than_pythons_stack(tmp_path):
    deep = tmp_path / "deep"
    inside = deep / "/".join("x" * sys.getrecursionlimit())
    try:
        subprocess.run(["mkdir", "-p", inside], check=True)  # Python's own makedirs and rmtree call themselves
        (inside / "cat.png").touch()
        (deep / "x" / "dog.png").touch()
        assert trees.pictures_below(deep) == ["x/dog.png", str((inside / "cat.png").relative_to(deep))]
    finally:
        subprocess.run(["rm", "-r", deep], check=True)


def test_names_are_written_in_utf8_whatever_the_locale(tmp_path):
    """Else another machine, or the same one tomorrow, could not read them."""
    script = "import sys; from pathlib import Path; from utils import write_text; "
    script += "write_text(Path(sys.argv[1]), 'caf\\u00e9\\n')"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # ASCII alone
    subprocess.run([sys.executable, "-c", script, tmp_path / "names.txt"], cwd=ROOT, env=env, check=True)
    assert (tmp_path / "names.txt").read_bytes() == b"caf\xc3\xa9\n"


def test_names_that_are_no_text_are_printed_all_the_same(tree, tmp_path):
    """Under a strict UTF-8 locale: what is skipped, a source and an --out of such names."""
    (tree / os.fsdecode(b"train/cat/L\xe9.txt")).touch()
    (tree / os.fsdecode(b"train/L\xe9.jpg")).touch()
    odd = os.fsencode(tree.rename(tree.parent / os.fsdecode(b"tr\xe9e")))

    def packed(out: bytes):
        command = [sys.executable, "-m", "data.pack", odd, "--size", "64", "--out", os.fsencode(tmp_path) + out]
        env = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)

    done = packed(b"/st\xf6re")
    assert done.returncode == 2
    assert done.stderr.endswith("LMDB opens paths of UTF-8 text only; choose another --out\n")
    done = packed(b"/store")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 files are not named like pictures" in done.stdout
    assert "1 pictures lie in no class folder" in done.stdout


def test_links_to_folders_above_lead_nowhere(tree, capsys):
    """Else all of the other class's pictures, or the validation split's, would be this class's."""
    (tree / "train/cat/up").symlink_to("..")
    (tree / "train/cat/top").symlink_to("../..")
    (tree / "train/dog/loop").symlink_to(".")
    (tree / "elsewhere").mkdir()
    os.rename(tree / "train/dog/5.png", tree / "elsewhere/5.png")
    (tree / "train/dog/linked").symlink_to("../../elsewhere")
    assert np.bincount(sources.find(str(tree)).splits["train"].labels).tolist() == [6, 6]
    assert capsys.readouterr().out.count("is a link to a folder that holds it") == 3


def test_folders_of_other_names_are_found_and_doubts_are_said(tree, capsys):
    os.rename(tree / "train", tree / "Train")
    os.rename(tree / "val", tree / "validation")
    (tree / "TEST/Cat").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tree / "TEST/Cat/0.PNG")
    source = sources.find(str(tree))
    assert source.splits["test"].labels.tolist() == [-1]
    assert "has no class folders as train/ has: its 1 pictures are taken as unlabelled" in capsys.readouterr().out
    (tree / "val").mkdir()
    with pytest.raises(UserError, match="has val and validation: which one is val"):
        sources.find(str(tree))


def test_lists_say_what_is_wrong_with_them(tree):
    lines = {s: [f"{c}/{n}.png {label}" for label, c in enumerate(("cat", "dog")) for n in range(3)] for s in
             ("train", "val")}
    cases = (
        ("train", ["cat/0.png"], r"train.txt, line 7: 'cat/0.png' is not a path and a label"),
        ("train", ["cat/0.png -1"], "is not a path and a label"),
        ("train", ["cat/0.png 3"], "no picture of class 2; labels count from 0 without gaps"),
        ("train", ["cat/0.png 3000000000"], "from 0 to 999999"),
        ("val", ["cat/0.png " + "9" * 5000], "from 0 to 999999"),
        ("val", ["cat/0.png 2"], "val.txt has label 2, train.txt goes up to 1"),
    )
    for split, more, message in cases:
        for name, whole in lines.items():
            (tree / f"{name}.txt").write_text("\n".join(whole + (more if name == split else [])))
        with pytest.raises(UserError, match=message):
            sources.find(str(tree))
    (tree / "val.txt").write_text("")
    with pytest.raises(UserError, match="names no pictures"):
        sources.find(str(tree))
    for name, whole in lines.items():
        (tree / f"{name}.txt").write_text("\ufeff" + "\r\n".join(whole))  # a byte-order mark, and Windows' line ends
    assert [part.pictures[0].read()[1:4] for part in sources.find(str(tree)).splits.values()] == [b"PNG", b"PNG"]
    assert sources.find(str(tree)).classes == ["cat", "dog"]
    (tree / "classes.txt").write_text("a cat\na dog\n")
    assert sources.find(str(tree)).classes == ["a cat", "a dog"]
    (tree / "classes.txt").write_text("a cat\na cat\n")
    with pytest.raises(UserError, match=r"names 1 classes, train.txt has 2"):
        sources.find(str(tree))


@pytest.fixture
def classes(tmp_path):
    """ROOT/CLASS/...: 60 different pictures of each of two classes, some of them nested and oddly named."""
    root = tmp_path / "photos"
    for label, name in enumerate(("cat", "big dog")):
        (root / name / "deep").mkdir(parents=True)
        for number, pixels in enumerate(pictures(60, (20, 20, 3), label)):
            Image.fromarray(pixels).save(root / name / ("deep" if number % 3 else ".") / f"{number} caf\u00e9.png")
    return root


def names_of(source) -> dict[str, set[str]]:
    return {split: set(part.pictures.members) for split, part in source.splits.items()}


def test_a_folder_of_class_folders_gives_a_part_for_validation(classes, capsys):
    """A tenth or so, by the names; pictures stay where they are when others are added, whatever --val was made of."""
    before = names_of(sources.find(str(classes)))
    assert before["train"] | before["val"] == {str(p.relative_to(classes)) for p in classes.rglob("*.png")}
    assert not before["train"] & before["val"]
    assert 4 <= len(before["val"]) <= 24
    assert f"{len(before['val'])} of 120 are set aside for that" in capsys.readouterr().out
    for number, pixels in enumerate(pictures(40, (20, 20, 3), 7)):
        Image.fromarray(pixels).save(classes / "cat" / f"new {number}.png")
    after = names_of(sources.find(str(classes)))
    assert all(before[split] <= after[split] for split in before)
    half = names_of(sources.find(str(classes), val=0.5))
    assert after["val"] < half["val"]
    assert 60 <= len(half["val"]) <= 100


@pytest.mark.parametrize("names", [("seg_train", "seg_test"), ("Train images", "validation-images")])
def test_splits_that_are_called_otherwise_are_not_taken_for_classes(classes, names):
    os.rename(classes / "cat", classes / "steam train")
    sources.find(str(classes))
    os.rename(classes / "steam train", classes / "cat")
    for old, new in zip(("cat", "big dog"), names, strict=True):
        os.rename(classes / old, classes / new)
    wanted = f"{names[0]}/ and {names[1]}/ are called like splits, .* rename them to train/ and (val|test)/"
    with pytest.raises(UserError, match=wanted):
        sources.find(str(classes))


def test_train_and_test_without_val(classes, tmp_path, capsys):
    """test/ stays what it is; folders beside train/ or test/ are no classes, and that is said."""
    root = tmp_path / "tree"
    for split in ("train", "test"):
        shutil.copytree(classes, root / split)
    found = names_of(sources.find(str(root)))
    assert "are skipped" not in capsys.readouterr().out
    for name in ("zebra", "a\x1b[31m"):
        shutil.copytree(classes / "cat", root / name)
    assert names_of(sources.find(str(root))) == found
    assert f"{root}: 2 folders are not called train, val or test and are skipped (first: a\\x1b[31m)\n" in (
        capsys.readouterr().out)
    assert len(found["test"]) == 120
    assert len(found["train"]) + len(found["val"]) == 120
    shutil.move(classes / "cat" / "deep", tmp_path / "deep")
    for name, message in (("train", "train has no class folders.* no class is called"),
                          ("test", "has no folder train/.* no class is called")):
        os.rename(classes / "cat", classes / name)  # loose pictures, as Dogs vs. Cats has them
        with pytest.raises(UserError, match=message):
            sources.find(str(classes))
        os.rename(classes / name, classes / "cat")


def test_what_is_no_file_is_left_to_the_packer(classes):
    """Neither read nor waited for when pictures are compared: a FIFO, a device, a broken link, terabytes."""
    for folder in ("cat", "big dog"):
        os.mkfifo(classes / folder / "fifo.png")
        (classes / folder / "empty.png").touch()
        (classes / folder / "zero.png").symlink_to("/dev/zero")
        (classes / folder / "gone.png").symlink_to("/nonexistent")
        (classes / folder / "huge.png").touch()
        os.truncate(classes / folder / "huge.png", 2**42)
    source = sources.find(str(classes))
    assert sum(len(part.labels) for part in source.splits.values()) == 130


def test_identical_files_are_on_one_side_and_no_class_ends_empty(tmp_path):
    """Ten copies of each of 20 pictures; a class of one picture, and one of copies of another class's."""
    root = tmp_path / "photos"
    for number, pixels in enumerate(pictures(22, (16, 16, 3))):
        name = {20: "single", 21: "ab"}.get(number, "ab"[number % 2])
        (root / name).mkdir(parents=True, exist_ok=True)
        for copy in range(1 if number > 19 else 10):
            Image.fromarray(pixels).save(root / name / f"{copy}-{number}.png")
    (root / "copies").mkdir()
    for number in range(0, 6, 2):
        shutil.copy(root / "a" / f"3-{number}.png", root / "copies")
    for fraction in (0.05, 0.5, 0.99):
        found = names_of(sources.find(str(root), val=fraction))
        sides = {split: {(root / name).read_bytes() for name in part} for split, part in found.items()}
        assert not sides["train"] & sides["val"]
        assert found["val"]
        assert {name.split("/")[0] for name in found["train"]} == {"a", "b", "ab", "single", "copies"}


def test_a_class_without_a_training_picture_that_can_be_read(tmp_path):
    """The picture that was kept for training may be the broken one: no store, and the class named."""
    root = tmp_path / "photos"
    for name, count in (("many", 200), ("few", 1)):
        (root / name).mkdir(parents=True)
        for number, pixels in enumerate(pictures(count, (16, 16, 3))):
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    (root / "few" / "0.png").write_text("no picture")
    with pytest.raises(UserError, match=r"no training picture of few can be read: .*0\.png"):
        pack.pack(sources.find(str(root)), tmp_path / "store", size=64)
    assert not (tmp_path / "store").exists()


def test_what_can_not_be_divided_is_said(tree, tmp_path):
    with pytest.raises(UserError, match=r"--val 0.2: .* has validation pictures of its own, in val/"):
        sources.find(str(tree), val=0.2)
    with pytest.raises(UserError, match=r"--val 0.2 is for folders of class folders, which sample is not"):
        sources.find("sample", val=0.2)
    for name in ("one", "two"):
        (tmp_path / "few" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9), name and (len(name), ord(name[0]), 0)).save(tmp_path / "few" / name / "only.png")
    with pytest.raises(UserError, match="has no class with two different pictures: none can be spared"):
        sources.find(str(tmp_path / "few"))
    shutil.rmtree(tree / "train")
    with pytest.raises(UserError, match=r"has no folder train/, but val/ .*; expected .*/train/CLASS/PICTURES, or"):
        sources.find(str(tree))


def test_a_wnid_that_is_named_twice_is_refused(tree):
    for split in ("train", "val"):
        (tree / f"{split}.txt").write_text("cat/0.png 0\ndog/0.png 1\n")
    (tree / "synset_words.txt").write_text("n01440764 tench\nn01440764 another fish\n")
    with pytest.raises(UserError, match=r"names 1 classes, train.txt has 2"):
        sources.find(str(tree))


def test_lists_in_another_order_than_published_keep_their_own_names(tmp_path, capsys):
    """The development kit's numbers, say: the classes get the names of their folders, and it is said."""
    tree, root = small.tree(tmp_path / "tree"), tmp_path / "lists"
    root.mkdir()
    train = small.files()["train"]
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text("".join(
            f"{tree}/train/{small.WNIDS[label]}/{name} {999 - label}\n" for name, (label, _) in train.items()
        ))
    source = sources.find(str(root))
    assert (source.classes[999], source.wnids[0]) == ("tench", "n15075141")
    assert "in another order than published checkpoints" in capsys.readouterr().out
