"""utils.py: errors, evaluation, checkpoints, the log."""

import errno
import math
import os
import pickle
import re

import numpy as np
import numpy_layers as ref
import pytest
import torch
from PIL import Image

import utils
from data import UserError
from data.augment import Augment
from data.loader import Loader
from data.pictures import to_square
from model import AlexNet


def test_error_counts_by_numpy():
    scores = torch.randn(200, 9)
    labels = torch.randint(9, (200,))
    order = np.argsort(-scores.numpy(), axis=1)
    top1 = (order[:, 0] != labels.numpy()).sum()
    top5 = sum(label not in row[:5] for row, label in zip(order, labels.tolist(), strict=True))
    assert utils.error_counts(scores, labels).tolist() == [top1, top5]
    assert utils.error_counts(scores[:, :3], labels % 3).tolist()[1] == 0  # three classes: always among the best five


def test_wilson_interval_against_published_values():
    """10 of 100: 5.52% to 17.44%; 0 of 20: 0 to 16.11% (Newcombe 1998's method 3)."""
    assert utils.wilson_interval(10, 100) == pytest.approx((5.5229, 17.4366), abs=1e-3)
    assert utils.wilson_interval(0, 20) == pytest.approx((0, 16.1125), abs=1e-3)


@pytest.mark.parametrize("ten_crop", [False, True])
def test_evaluate_averages_softmax_outputs(store, ten_crop):
    """Two nets, one or ten crops, against numpy: softmax of each output, mean, then errors and cross-entropy."""
    torch.manual_seed(0)
    nets = [AlexNet(4, image_size=64, lrn=False).eval() for _ in range(2)]
    inputs = Augment(64, store.mean)
    for net in nets:
        torch.nn.init.normal_(net.fc8.weight, 0, 0.3)  # so that the outputs are far apart
    images, labels = (torch.from_numpy(x) for x in store.split("val").read(np.arange(21)))
    outputs = []
    with torch.no_grad():
        for net in nets:
            for view in inputs.ten_crop(images) if ten_crop else [inputs.center(images)]:
                logits = net(view).double().numpy()
                e = np.exp(logits - logits.max(1, keepdims=True))
                outputs.append(e / e.sum(1, keepdims=True))
    mean = np.mean(outputs, 0)
    sums = utils.evaluate([(n, inputs) for n in nets], Loader(store, "val"), ten_crop=ten_crop, batch_size=8)
    assert sums[0].item() == pytest.approx(-np.log(mean[np.arange(21), labels]).sum(), rel=1e-5)
    assert sums[1].item() == (mean.argmax(1) != labels.numpy()).sum()


def test_ten_crops_by_pil_and_numpy(store):
    """The paper's test (section 4.1) without this project's crops: PIL crops and flips, the mean image's centre
    subtracted, numpy's softmax averaged over the ten."""
    net = AlexNet(4, image_size=64, lrn=False).eval()
    torch.nn.init.normal_(net.fc8.weight, 0, 0.3)
    images, _ = store.split("val").read(np.arange(5))
    by_hand = []
    for pixels in images:
        outputs, mean = [], store.mean[4:68, 4:68].astype(np.float64)
        for left, top in ((0, 0), (8, 0), (0, 8), (8, 8), (4, 4)):
            crop = Image.fromarray(pixels).crop((left, top, left + 64, top + 64))
            for view in (crop, crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
                inputs = torch.from_numpy((np.asarray(view) - mean).transpose(2, 0, 1)).float()[None]
                with torch.no_grad():
                    outputs.append(ref.softmax(net(inputs)[0].double().numpy()))
        by_hand.append(np.mean(outputs, 0))
    seen = []
    utils.evaluate(
        [(net, Augment(64, store.mean))], Loader(store, "val"), ten_crop=True, batch_size=5,
        each_batch=lambda _indices, probabilities, _labels: seen.append(probabilities),
    )
    np.testing.assert_allclose(seen[0].numpy(), by_hand, rtol=1e-4)


def test_shards_of_an_evaluation_add_up(store):
    net, inputs = AlexNet(4, image_size=64).eval(), Augment(64, store.mean)
    whole = utils.evaluate([(net, inputs)], Loader(store, "val"))
    seen = []
    parts = sum(
        utils.evaluate(
            [(net, inputs)], Loader(store, "val"), batch_size=4, shard=(rank, 3),
            each_batch=lambda indices, *_: seen.extend(indices.tolist()),
        )
        for rank in range(3)
    )
    assert sorted(seen) == list(range(21))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- checkpoints


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL_FOLDER"],)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "evil"))
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"model": Evil()}, tmp_path / "zip.pt")
    for name in ("plain.pt", "zip.pt"):
        with pytest.raises(UserError, match=rf"{name} .*code") as caught:
            utils.load_checkpoint(tmp_path / name)
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
            utils.load_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", torch.zeros(3)), ("mean", torch.zeros(10, 10, 3)), ("mean", torch.full((1, 1, 3), math.nan)),
        ("mean", None), ("classes", 4), ("classes", ["a"]), ("store_size", 0), ("image_size", 300),
        ("image_size", "64"),
        ("resize", "stretched"), ("store", 5), ("config", None), ("config", {}), ("model", {"fc8.bias": 1}),
    ],
)
def test_a_checkpoint_whose_parts_do_not_fit_is_one_line(run_folder, tmp_path, key, value):
    content = torch.load(run_folder / "best.pt", weights_only=True) | {key: value}
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="cannot be right") as caught:
        utils.load_checkpoint(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_not_taken(run_folder, tmp_path):
    content = torch.load(run_folder / "best.pt", weights_only=True)
    content["model"]["fc8.bias"][1] = math.nan
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not finite"):
        utils.load_model(tmp_path / "x.pt")


def test_weights_that_do_not_fit_are_one_line(run_folder, tmp_path):
    content = torch.load(run_folder / "best.pt", weights_only=True)
    config = content["config"]
    for change in ({"config": config | {"columns": 2}}, {"config": config | {"depth": 3}}, {"model": {}}):
        torch.save(content | change, tmp_path / "x.pt")
        with pytest.raises(UserError, match="do not fit the net") as caught:
            utils.load_model(tmp_path / "x.pt")
        assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"the last sound one")
    with pytest.raises(UserError, match="w is no longer finite at step 7"):
        utils.save_checkpoint(tmp_path / "x.pt", {"model": {"w": torch.tensor([1.0, float("nan")])}, "step": 7})
    assert (tmp_path / "x.pt").read_bytes() == b"the last sound one"


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "x.pt").write_bytes(b"the last sound one")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for target in ("torch.save", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(target, full)
            with pytest.raises(UserError, match=r"No space left on device; \d+ MB are free"):
                utils.save_checkpoint(tmp_path / "x.pt", {"model": {}, "step": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]
    assert (tmp_path / "x.pt").read_bytes() == b"the last sound one"


def test_load_model_prepares_pictures_as_training_did(run_folder, store):
    """PIL picture in, the net's input out: resize, centre crop, mean."""
    model, prepare = utils.load_model(run_folder / "best.pt")
    assert not model.training
    assert model.classes == store.classes
    picture = Image.effect_noise((300, 200), 80).convert("RGB")
    stored = to_square(picture, 72)
    expected = (stored[4:68, 4:68] - store.mean[4:68, 4:68]).transpose(2, 0, 1)
    assert np.array_equal(prepare(picture)[0].numpy(), expected)
    assert prepare([picture, picture]).shape == (2, 3, 64, 64)
    assert len(prepare(picture, ten_crop=True)) == 10
    assert model(prepare(picture)).shape == (1, 4)


# ---------------------------------------------------------------------------------------------- the log


def test_a_log_with_a_torn_last_line_is_read(tmp_path):
    utils.append_line(tmp_path / "log", {"a": 1})
    utils.append_line(tmp_path / "log", {"a": 2})
    with open(tmp_path / "log", "a") as file:
        file.write('{"a": ')
    assert utils.read_log(tmp_path / "log") == [{"a": 1}, {"a": 2}]
    assert utils.read_log(tmp_path / "none") == []
    utils.append_line(tmp_path / "log", {"a": 4})  # on a line of its own
    utils.append_line(tmp_path / "log", {"a": 5})
    assert utils.read_log(tmp_path / "log") == [{"a": 1}, {"a": 2}, {"a": 4}, {"a": 5}]


def test_seeds_are_apart():
    draws = set()
    for numbers in ((0,), (0, 1, 0), (0, 2, 0), (1, 1, 0), (0, 1, 1)):
        utils.seed_all(*numbers)
        draws.add(torch.rand(1).item())
    assert len(draws) == 5
    utils.seed_all(0, 2, 0)
    assert torch.rand(1).item() in draws


def test_environment_names_versions_and_hardware():
    found = utils.environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert found["device"]
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", found["commit"])


def test_a_file_of_results_is_looked_at_and_not_made(tmp_path):
    assert utils.results_file(str(tmp_path / "new" / "x.jsonl")) == tmp_path / "new" / "x.jsonl"
    assert not list((tmp_path / "new").iterdir())
    for content in ("", '{"a": 1}\n', '{"a": '):
        (tmp_path / "x").write_text(content)
        assert utils.results_file(str(tmp_path / "x")).read_text() == content
    (tmp_path / "x").write_text("# Notes\n")
    with pytest.raises(UserError, match="holds no lines of results"):
        utils.results_file(str(tmp_path / "x"))
    for odd in (tmp_path, "/dev/full"):
        with pytest.raises(UserError, match="is no regular file"):
            utils.results_file(str(odd))
