"""ImageNet in each layout that people have: the same store from all of them, and the right labels."""

import contextlib
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

import test as testing
from benchmarks.faults import imagenet_files as small
from benchmarks.faults.packing import content
from data import imagenet, pack, sources
from data.trees import Split, ilsvrc_wnids
from utils import UserError


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder for each layout."""
    root = tmp_path_factory.mktemp("imagenet")
    return {name: make(root / name / "files") for name, make in small.LAYOUTS.items()}


@pytest.fixture(scope="module")
def stores(places):
    """Packed from each layout, each time with another number of workers."""
    made = {}
    for workers, (name, place) in enumerate(places.items(), 1):
        source = sources.find(str(place))
        made[name] = pack.pack(source, place.parent / "store", size=64, workers=workers, shards=3)
    return made


@pytest.mark.parametrize("name", ["kaggle", "official", "lists"])
def test_every_layout_gives_the_same_store(stores, name):
    """Bit for bit, as the one packed from an ImageFolder tree; the number of workers differs, too."""
    tree, other = content(stores["tree"].path), content(stores[name].path)
    assert list(tree) == list(other)
    assert [file for file in tree if tree[file] != other[file]] == []


def test_labels_are_places_in_the_sorted_list_of_wnids(stores):
    """Known pairs, and every picture's own colour."""
    store = stores["official"]
    for label, wnid, name in ((0, "n01440764", "tench"), (281, "n02123045", "tabby"), (999, "n15075141",
                                                                                       "toilet tissue")):
        assert (store.wnids[label], store.classes[label]) == (wnid, name)
    assert store.name == "imagenet"
    assert store.counts == {"train": 1999, "val": 1000, "test": 20}
    for split in ("train", "val"):
        images, labels = store.split(split).read(np.arange(store.counts[split]))
        assert [small.label_of(image) for image in images] == labels.tolist()
        assert (np.diff(labels) >= 0).all()
        assert np.bincount(labels).tolist() == [1 if split == "val" or c == 500 else 2 for c in range(1000)]


def test_the_list_of_wnids():
    """Known pairs of wnid and number; sorted, without doubles."""
    wnids = ilsvrc_wnids()
    assert (len(set(wnids)), list(wnids)) == (1000, sorted(wnids))
    assert [wnids[i] for i in (0, 1, 281, 285, 388, 999)] == [
        "n01440764", "n01443537", "n02123045", "n02124075", "n02510455", "n15075141"
    ]  # tench, goldfish, tabby, Egyptian cat, giant panda, toilet tissue


def test_what_is_odd_is_counted_and_named(stores):
    manifest = stores["kaggle"].manifest
    repaired = {split: dict(kinds) for split, kinds in manifest["repaired"].items()}
    enlarged = {split: kinds.pop("enlarged")["count"] for split, kinds in repaired.items()}
    assert enlarged == stores["kaggle"].counts  # these pictures are smaller than the store's
    assert repaired == {
        "val": {}, "test": {}, "train": {
            "CMYK": {"count": 1, "first": ["n01440764_18.JPEG"]},
            "PNG named as another format": {"count": 1, "first": [f"{small.WNIDS[7]}_18.JPEG"]},
        }
    }
    broken = f"{small.WNIDS[500]}_1003.JPEG"
    reason = f"{broken} cannot be read as a picture (no format that is known)"
    assert manifest["skipped"] == [{"split": "train", "picture": broken, "reason": reason}]


def test_shards_make_no_difference_to_records(stores, places):
    """Records, mean, names and all that the manifest says of the pictures, for 1, 3 and 7 shards; the one that is left
    out makes a gap in the keys."""
    three = stores["tree"]
    for shards in (1, 7):
        other = pack.pack(sources.find(str(places["tree"])), places["tree"].parent / f"by-{shards}", size=64,
                          shards=shards)
        for split, count in three.counts.items():
            for one, two in zip(*(s.split(split).read(np.arange(count)) for s in (three, other)), strict=True):
                assert np.array_equal(one, two)
            assert three.names(split) == other.names(split)
        for key in set(three.manifest) - {"shards", "files", "checksum"}:
            assert three.manifest[key] == other.manifest[key], key
    firsts = [(shard["first"], shard["count"]) for shard in three.manifest["shards"]["train"]]
    assert firsts == [(0, 667), (667, 666), (1334, 666)]


def test_unlabelled_test_pictures_are_named_and_predicted(stores, tmp_path, imagenet_run, capsys):
    """test.py writes their classes; without --predictions there is nothing to say of them, and the default split is the
    labelled one."""
    store = stores["tree"]
    assert store.unlabelled == ["test"]
    assert store.names("test") == [f"ILSVRC2012_test_{number:08d}.JPEG" for number in range(1, 21)]
    assert store.names("train") is None
    best = str(imagenet_run / "best.pt")
    with pytest.raises(UserError, match=r"have no labels; --predictions"):
        testing.main([best, "--data", str(store.path), "--split", "test"])
    file = tmp_path / "p.csv"
    assert testing.main([best, "--data", str(store.path), "--split", "test", "--predictions", str(file)]) == 0
    lines = file.read_text().splitlines()
    assert lines[0].startswith("index,picture,class,predicted_1")
    assert lines[3].startswith("2,ILSVRC2012_test_00000003.JPEG,,")
    assert len(lines) == 21
    assert "20 images" in capsys.readouterr().out
    assert testing.main([best, "--data", str(store.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "val"


@pytest.fixture(scope="module")
def imagenet_run(stores, tmp_path_factory):
    import train

    out = tmp_path_factory.mktemp("imagenet-run") / "run"
    train.main(["--data", str(stores["tree"].path), "--out", str(out), "--batch-size", "8", "--max-steps", "2",
                "--image-size", "64"])
    return out


def proportional_memory(group: int) -> int:
    """Bytes of all processes of a session, what several share counted once (PSS)."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if os.getsid(int(process.name)) == group:
                lines = (process / "smaps_rollup").read_text().splitlines()
                total += 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def run_watched(command: list[str]) -> int:
    """Run a command to its end; the most memory that it and its workers took at once."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    most = 0
    while process.poll() is None:
        most = max(most, proportional_memory(process.pid))
        time.sleep(0.3)  # reading the sizes of 2 GB of pages takes time, too
    assert process.returncode == 0
    return most


def test_a_thousand_classes_at_224_pixels_train_and_test_within_the_memory(places, tmp_path):
    """10 steps of batch 8 from a streamed store of 256 x 256 JPEG records, validation, test.py: 2.5 GB at most."""
    source = sources.find(str(places["tree"]))
    val = source.splits["val"]
    source.splits["val"] = Split(val.pictures[:100], val.labels[:100])
    store = pack.pack(source, tmp_path / "store", workers=2)
    assert (store.size, store.codec) == (256, "jpeg")
    streamed = "import sys, memory; memory.keep(); import data.loader, {0}; from utils import run_script; "
    streamed += "data.loader.RESIDENT_BYTES = 0; "
    streamed += "sys.argv[1:] = {1!r}; run_script({0}.main)"
    train = ["--data", str(store.path), "--out", str(tmp_path / "run"), "--batch-size", "8", "--max-steps", "10",
             "--workers", "2", "--device", "cpu"]
    test = [str(tmp_path / "run/best.pt"), "--device", "cpu"]
    for script, arguments in (("train", train), ("test", test)):
        most = run_watched([sys.executable, "-c", streamed.format(script, arguments)])
        assert 0.3e9 < most < 2.5e9, script
        print(f"{script}: {most / 1e9:.2f} GB")
    assert json.loads((tmp_path / "run/log.jsonl").read_text())["step"] == 10


# ---------------------------------------------------------------------------------------------- what is wrong


def copied(places, name, tmp_path) -> Path:
    return Path(shutil.copytree(places[name], tmp_path / "copy", symlinks=True))


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_kaggle_folder_says_what_is_wrong_with_it(places, tmp_path):
    root = copied(places, "kaggle", tmp_path)
    cases = (
        ("LOC_val_solution.csv", "ILSVRC2012_val_00000005,", "ILSVRC2012_val_00009999,", "no class for 1 pictures"),
        ("LOC_val_solution.csv", "ImageId", "Id", "is damaged"),
        ("LOC_val_solution.csv", f",{small.WNIDS[3]}", ",n99999999", "n99999999, which is no folder of train/"),
        ("LOC_val_solution.csv", f",{small.WNIDS[3]} 85 1 499 272 {small.WNIDS[3]} 3 4 5 6 ", ",", "is damaged"),
        ("LOC_synset_mapping.txt", small.WNIDS[3], "n99999999", "have different classes: n01491361, n99999999"),
    )
    for name, old, new, message in cases:
        whole = (root / name).read_text()
        change(root / name, old, new)
        with pytest.raises(UserError, match=message):
            sources.find(str(root))
        (root / name).write_text(whole)
    (root / "ILSVRC/Data/CLS-LOC/train" / small.WNIDS[5]).rename(root / "aside")
    (root / "ILSVRC/Data/CLS-LOC/train" / small.WNIDS[5]).mkdir()
    with pytest.raises(UserError, match=f"{small.WNIDS[5]} holds no pictures"):
        sources.find(str(root))
    (root / "aside").rename(root / "ILSVRC/Data/CLS-LOC/train" / small.WNIDS[5])
    (root / "LOC_synset_mapping.txt").unlink()
    with pytest.raises(UserError, match=r"has no LOC_synset_mapping.txt"):
        sources.find(str(root))
    with pytest.raises(UserError, match=r"give the folder that holds LOC_val_solution.csv"):
        sources.find(str(root / "ILSVRC/Data/CLS-LOC"))


def test_a_validation_picture_that_is_not_there_is_named(places, tmp_path, capfd):
    root = copied(places, "kaggle", tmp_path)
    (root / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000007.JPEG").unlink()
    store = pack.pack(sources.find(str(root)), tmp_path / "store", size=64)
    assert store.counts["val"] == 999
    line = "CLS-LOC/val: ILSVRC2012_val_00000007.JPEG cannot be read (No such file or directory)"
    assert line in capfd.readouterr().err


def test_the_official_files_say_what_is_wrong_with_them(places, tmp_path):
    root = copied(places, "official", tmp_path)
    kit, val = root / "ILSVRC2012_devkit_t12.tar.gz", root / "ILSVRC2012_img_val.tar"
    truth = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    numbers = "".join(f"{small.kit_numbers()[label]}\n" for label in small.val_labels())
    meta = {"ILSVRC2012_devkit_t12/data/meta.mat": small.meta()}
    pictures = {name: data for name, (_, data) in small.files()["val"].items()}
    first = next(iter(pictures))
    cases = (
        (kit, b"no tar", "devkit_t12.tar.gz is damaged"),
        (kit, small.tar_bytes({}), r"has no data/meta.mat"),
        (kit, small.tar_bytes(meta), r"has no data/ILSVRC2012_validation_ground_truth.txt"),
        (kit, small.tar_bytes(meta | {truth: b"1\nx\n"}), "ground_truth.txt is damaged"),
        (kit, small.tar_bytes(meta | {truth: numbers.encode() + b"1002\n"}), "ground_truth.txt is damaged"),
        (kit, small.tar_bytes(meta | {truth: numbers.encode() + b"3\n"}), "has 1000 pictures, the .* kit 1001 labels"),
        (kit, small.tar_bytes(meta | {truth: numbers[: len(numbers) // 2].encode()}), "no label for ILSVRC"),
        (kit, small.tar_bytes({next(iter(meta)): b"MATLAB", truth: numbers.encode()}), "meta.mat is damaged"),
        (val, small.tar_bytes(pictures | {"strange.JPEG": pictures[first]}), "no label for strange.JPEG"),
        (val, small.tar_bytes({}), "holds no pictures"),
        (val, small.tar_bytes(pictures)[:-10240], "damaged or cut off"),
    )
    for file, data, message in cases:
        whole = file.read_bytes()
        file.write_bytes(data)
        with pytest.raises(UserError, match=message):
            sources.find(str(root))
        file.write_bytes(whole)
    train = root / "ILSVRC2012_img_train.tar"
    whole = train.read_bytes()
    for cut in (len(whole) // 2, len(whole) // 2 // 512 * 512, len(whole) - 10240, 1000, 0):
        train.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="damaged or cut off"):
            sources.find(str(root))
    for missing in (kit, val):
        missing.unlink()
        train.write_bytes(whole)
        with pytest.raises(UserError, match=f"{root} has no {missing.name.split('_t12')[0]}"):
            sources.find(str(train))


def test_the_unpacked_kit_and_the_path_of_a_tar_will_do(places, tmp_path):
    root = copied(places, "official", tmp_path)
    packed = sources.find(str(root / "ILSVRC2012_img_train.tar"))
    file = root / "ILSVRC2012_devkit_t12.tar.gz"
    (tmp_path / "kit.tar").write_bytes(gzip.decompress(file.read_bytes()))
    file.unlink()
    shutil.unpack_archive(tmp_path / "kit.tar", root)
    wnids, numbers = imagenet.development_kit(root)
    assert [wnids[number] for number in numbers] == [small.WNIDS[label] for label in small.val_labels()]
    assert np.array_equal(sources.find(str(root)).splits["val"].labels, packed.splits["val"].labels)


def test_a_tar_that_was_left_over_does_not_hide_the_tree(places, tmp_path):
    """Its pictures were unpacked next to it, as torchvision's ImageNet does, and the other tar removed for its size."""
    root = copied(places, "official", tmp_path)
    (root / imagenet.TRAIN_TAR).unlink()
    with pytest.raises(UserError, match=f"has no {imagenet.TRAIN_TAR}"):
        sources.find(str(root))
    for split in ("train", "val"):
        for wnid in small.WNIDS[:2]:
            (root / split / wnid).mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(root / split / wnid / f"{wnid}_{split}.JPEG")
    assert {split: len(part.labels) for split, part in sources.find(str(root)).splits.items()} == {"train": 2, "val": 2}


def test_a_long_tar_needs_no_object_for_each_picture(places):
    """A slice of a split that is sent to a worker is small; what it reads is the member itself."""
    part = sources.find(str(places["official"])).splits["train"].pictures
    by_name = {file.name: file for file in part[:4]}
    assert by_name["n01440764_1003.JPEG"].read() == small.files()["train"]["n01440764_1003.JPEG"][1]
    assert part[:64].offsets.nbytes == 64 * 8


def test_what_is_there_twice_or_is_a_link_is_not_passed_over(places, tmp_path, capsys):
    """A tar to which a file was appended again, a picture of the same name elsewhere, a hard link, a text."""
    root = copied(places, "official", tmp_path)
    val, train = root / "ILSVRC2012_img_val.tar", root / "ILSVRC2012_img_train.tar"
    pictures = {name: data for name, (_, data) in small.files()["val"].items()}
    first, *_, last = sorted(pictures)
    whole = small.tar_bytes(pictures | {"readme.txt": b"nothing to see"})
    val.write_bytes(small.tar_bytes({name: data for name, data in pictures.items() if name != last}
                                    | {f"val/{first}": pictures[first]}))
    with pytest.raises(UserError, match="has 999 pictures, the development kit 1000 labels"):
        sources.find(str(root))
    val.write_bytes(small.tar_bytes(pictures | {f"val/{first}": pictures[first]}))
    with pytest.raises(UserError, match="pictures of the same name"):
        sources.find(str(root))
    val.write_bytes(whole)
    with tarfile.open(train, "a") as tar:
        link = tarfile.TarInfo("n00000000.tar")
        link.type, link.linkname = tarfile.LNKTYPE, "n01440764.tar"
        tar.addfile(link)
    sources.find(str(root))
    said = capsys.readouterr().out
    assert "n00000000.tar is a link or sparse and is skipped" in said
    assert "ILSVRC2012_img_val.tar: readme.txt is not named like a picture and is skipped" in said
    with tarfile.open(train, "a") as tar:
        again = small.tar_bytes({"n01440764_18.JPEG": pictures[first]})
        info = tarfile.TarInfo("n01440764.tar")
        info.size = len(again)
        tar.addfile(info, io.BytesIO(again))
    with pytest.raises(UserError, match="pictures of the same name"):
        sources.find(str(root))
    kaggle = Path(shutil.copytree(places["kaggle"], tmp_path / "kaggle"))
    small.write(kaggle / "ILSVRC/Data/CLS-LOC/val/more" / first, pictures[last])
    with pytest.raises(UserError, match="several pictures of one name"):
        sources.find(str(kaggle))
