"""checkpoints/__init__.py: what is read as a checkpoint, and the nets and pictures that come of it."""

import math
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
from data.pictures import to_square
from utils import UserError


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL_FOLDER"],)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
], ids=lambda error: type(error).__name__)
def test_too_little_memory_is_not_damage(error, run_folder, monkeypatch):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(UserError, match=r"best.pt: cpu has too little free memory to load it$"):
        checkpoints.load_checkpoint(run_folder / "best.pt")


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "evil"))
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"model": Evil()}, tmp_path / "zip.pt")
    for name in ("plain.pt", "zip.pt"):
        with pytest.raises(UserError, match=rf"{name} .*code") as caught:
            checkpoints.load_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil").exists()


def test_files_that_are_no_checkpoints_are_one_line(tmp_path, run_folder):
    whole = (run_folder / "best.pt").read_bytes()
    files = {"empty": b"", "cut": whole[: len(whole) // 2], "head": whole[:100], "png": b"\x89PNG"}
    files |= {f"text {first}": f"{first}his is text".encode() for first in "abehqrstuMQR."}
    torch.save({"state_dict": {}}, tmp_path / "other")
    torch.save(torch.zeros(3), tmp_path / "tensor")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in [*files, "other", "tensor", "missing", "."]:
        with pytest.raises(UserError) as caught:
            checkpoints.load_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", torch.zeros(3)), ("mean", torch.zeros(10, 10, 3)), ("mean", torch.full((1, 1, 3), math.nan)),
        ("mean", None), ("classes", 4), ("classes", ["a"]), ("store_size", 0), ("image_size", 300),
        ("image_size", "64"), ("best", math.nan), ("best", "7"), ("epoch", None),
        ("resize", "stretched"), ("store", 5), ("config", None), ("config", {}), ("model", {"fc8.bias": 1}),
        ("mean", torch.zeros(1, 1, 3, device="meta")), ("model", {"fc8.bias": torch.zeros(4).to_sparse()}),
        ("model", {"fc8.weight": torch.zeros(1).expand(10**6, 10**6)}),  # 4 TB that take 4 bytes in the file
    ],
)
def test_a_checkpoint_whose_parts_do_not_fit_is_one_line(run_folder, tmp_path, key, value):
    content = torch.load(run_folder / "best.pt", weights_only=True) | {key: value}
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="or was changed: invalid ") as caught:
        checkpoints.load_checkpoint(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", [0x01, 0x20, 0x40], ids=["encrypted", "patched", "strongly encrypted"])
def test_an_archive_of_a_kind_that_zipfile_does_not_read_is_damaged(tmp_path, flag):
    """It raises RuntimeError and NotImplementedError for parts with these flags."""
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.pt")
    checkpoints.check_archive(tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= flag  # of its first part, in the central directory
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"encrypted|patched|encryption"):
        checkpoints.check_archive(tmp_path / "x.pt")


def test_weights_that_are_not_finite_are_not_taken(run_folder, tmp_path):
    content = torch.load(run_folder / "best.pt", weights_only=True)
    content["model"]["fc8.bias"][1] = math.nan
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not finite"):
        checkpoints.load_model(tmp_path / "x.pt")


def test_weights_that_do_not_fit_are_one_line(run_folder, tmp_path):
    content = torch.load(run_folder / "best.pt", weights_only=True)
    config = content["config"]
    for change in ({"config": config | {"columns": 2}}, {"config": config | {"depth": 3}}, {"model": {}}):
        torch.save(content | change, tmp_path / "x.pt")
        with pytest.raises(UserError, match="do not fit the net") as caught:
            checkpoints.load_model(tmp_path / "x.pt")
        assert "\n" not in str(caught.value)


def test_load_model_prepares_pictures_as_training_did(run_folder, store):
    """PIL picture in, the net's input out: resize, centre crop, mean."""
    model, prepare = checkpoints.load_model(run_folder / "best.pt")
    assert not model.training
    assert model.classes == store.classes
    picture = Image.effect_noise((300, 200), 80).convert("RGB")
    stored = to_square(picture, 72)
    expected = (stored[4:68, 4:68] - store.mean[4:68, 4:68]).transpose(2, 0, 1)
    assert np.array_equal(prepare(picture)[0].numpy(), expected)
    assert prepare([picture, picture]).shape == (2, 3, 64, 64)
    assert len(prepare(picture, ten_crop=True)) == 10
    assert model(prepare(picture)).shape == (1, 4)
