"""studies/ and benchmarks/: each runs, small."""

import json

import numpy as np
import pytest

import train
import utils
from benchmarks import lrn
from studies import plateau


def test_plateau_trains_as_train_py_does(store, tmp_path, monkeypatch, capsys):
    """The mean of an epoch's losses is the one in the log of a run with the same seed; finished seeds are kept."""
    monkeypatch.setattr(plateau, "named_store", lambda name: store)
    monkeypatch.setattr(plateau, "WINDOW", 2)
    monkeypatch.setattr("options.DEFAULTS", {"epochs": 90, "batch_size": 16, "patience": 5})
    seen = []
    real = plateau.first_losses
    monkeypatch.setattr(plateau, "first_losses", lambda *a: seen.append(real(*a)) or seen[-1])
    arguments = ["--steps", "6", "--out", str(tmp_path / "x.jsonl"), "--dataset", "sample"]
    plateau.main(["--seeds", "1", *arguments])
    plateau.main(["--seeds", "2", *arguments])
    assert len(seen) == 2
    train.main(["--data", str(store.path), "--out", str(tmp_path / "run"), "--epochs", "1", "--batch-size", "16"])
    (entry,) = utils.read_log(tmp_path / "run" / "log.jsonl")
    assert entry["train_loss"] == pytest.approx(np.mean(seen[0]), rel=1e-5)
    lines = utils.read_log(tmp_path / "x.jsonl")
    assert [line["seed"] for line in lines] == [0, 1]
    assert lines[0]["losses"] == {"6": pytest.approx(np.mean(seen[0][-2:]))}
    out = capsys.readouterr().out
    assert "| seed | step 6 |" in out
    assert "under 1.0 at step 6: 0 of 2" in out


def test_lrn_benchmark_prints_one_line_of_json(capsys):
    lrn.main(["--batch", "2", "--repeats", "3", "--device", "cpu", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["shape"] == [2, 96, 55, 55]
    for layout in ("contiguous", "channels_last"):
        assert set(result["layouts"][layout]) == {"model.LocalResponseNorm", "F.local_response_norm"}
        assert all(entry["median_ms"] > 0 for entry in result["layouts"][layout].values())
    lrn.main(["--batch", "2", "--repeats", "3", "--device", "cpu"])
    assert "channels_last" in capsys.readouterr().out
