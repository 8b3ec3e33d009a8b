"""studies/published.py: nets made once, whatever stops them; tables that say what is there and what is not."""

import shutil

import pytest

import checkpoints
import test
import train
from checkpoints.run import locked, read_log
from data.store import Store
from studies import published
from utils import Diverged, UserError


@pytest.fixture
def small(store, tmp_path, monkeypatch):
    """Two rows of two nets each on the small store, and an idea that compares them."""
    options = ["--data", str(store.path), "--epochs", "2", "--drops", "1", "--batch-size", "48", "--workers", "0",
               "--device", "cpu"]
    rows = {
        "base": published.Row("small", options, 2, together=True),
        "plain": published.Row("the same without LRN", [*options, "--no-lrn"], 2),
    }
    monkeypatch.setattr(published, "ROWS", rows)
    monkeypatch.setattr(published, "IDEAS", {"LRN": ("plain", "base", "1.4")})
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(published, "RESULTS", tmp_path / "results" / "nets.jsonl")
    monkeypatch.setattr(published, "LOGS", tmp_path / "results" / "nets")
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path)
    return tmp_path


def test_nets_are_made_once_and_stopped_ones_go_on(small, store, monkeypatch, capsys):
    real, calls = train.main, []

    def stop_first(argv):
        calls.append(argv)
        return 143 if len(calls) == 1 and real([*argv, "--max-steps", "1"]) == 0 else real(
            [*argv, "--max-steps", "100"] if "--resume" in argv else argv)

    monkeypatch.setattr(train, "main", stop_first)
    assert published.main([]) == 143
    assert not published.RESULTS.exists()
    assert published.main([]) == 0
    assert published.main([]) == 0
    assert ["--resume" in argv for argv in calls] == [False, True, False, False, False]
    *nets, together = read_log(published.RESULTS)
    assert [(e["row"], e["seed"]) for e in nets] == [("base", 0), ("plain", 0), ("base", 1), ("plain", 1)]
    for e in nets:
        best = small / "published" / f"{e['row']}-{e['seed']}" / "run" / "best.pt"
        for protocol in ("center", "ten-crop"):
            found = test.errors([best], Store(store.path), ten_crop=protocol == "ten-crop")
            assert e[f"{protocol}_error"] == found["top1_error"]
        assert e["command"].startswith("python train.py --data ")
        assert (e["precision"], e["epochs"]) == ("fp32", 2)
        log = read_log(published.LOGS / f"{e['row']}-{e['seed']}.jsonl")
        assert e["val_top1_error"] == min(line["val_top1_error"] for line in log)
    both = [small / "published" / f"base-{seed}" / "run" / "best.pt" for seed in (0, 1)]
    assert together["ten-crop_error"] == test.errors(both, Store(store.path), ten_crop=True)["top1_error"]
    assert not list(small.rglob("last.pt"))
    one, other = ([e["center_error"] for e in nets if e["row"] == row] for row in ("plain", "base"))
    printed = capsys.readouterr().out
    assert ", ".join(f"{a - b:+.2f}" for a, b in zip(one, other, strict=True)) + " | too few seeds |" in printed
    assert f"| {together['ten-crop_error']:.2f} |" in printed
    assert "| 2 of 2 |" in printed


def test_what_another_process_is_at_is_left_to_it(small):
    place = published.folder("base", 0)
    place.mkdir(parents=True)
    with locked(place):
        assert published.main(["base"]) == 0
    assert [e["seed"] for e in read_log(published.RESULTS)] == [1]


def test_a_row_without_pictures_is_left_out(small, monkeypatch, capsys):
    options, arguments = published.packed("nowhere", str(small / "no such folder"))
    monkeypatch.setitem(published.ROWS, "base", published.Row("none", options, 1, arguments))
    assert published.main(["base"]) == 0
    assert "base is left out: " in capsys.readouterr().out
    assert not published.done("base")


def test_tables_say_what_is_not_there(small, monkeypatch, capsys):
    monkeypatch.setattr(train, "main", lambda argv: pytest.fail("trains"))
    assert published.main(["--tables"]) == 0
    printed = capsys.readouterr().out
    assert "| small | not measured yet | | | | 0 of 2 | |" in printed
    assert "| LRN | 1.4 | not measured yet | | | |" in printed
    with pytest.raises(UserError, match="no row tanh; the rows are base, plain"):
        published.main(["tanh"])


def test_a_net_that_diverged_is_a_line_too(small, monkeypatch, capsys):
    real = train.main

    def diverge(argv):
        real([*argv, "--max-steps", "1"])
        raise Diverged("the loss is no longer finite at step 7")

    monkeypatch.setattr(train, "main", diverge)
    published.main(["base"])
    assert [e["diverged"][:8] for e in read_log(published.RESULTS)] == ["the loss"] * 2  # and none of both together
    assert "diverged: base with seed 0, base with seed 1" in capsys.readouterr().out
    assert len(list(published.LOGS.iterdir())) == 2


def test_what_a_kill_leaves_does_not_stand_in_the_way(small):
    """A folder with no more than a config.json; one whose net is finished while its line is gone."""
    out = published.folder("base", 0) / "run"
    out.mkdir(parents=True)
    (out / "config.json").write_text("{}")
    published.main(["base"])
    before = read_log(published.RESULTS)
    shutil.move(published.RESULTS, small / "away")
    published.main(["base"])
    after = read_log(published.RESULTS)
    assert [e.get("center_error") for e in after] == [e.get("center_error") for e in before]


def test_pairs_are_of_one_machine_and_precision(small, monkeypatch):
    lines = [
        {"row": row, "seed": seed, "center_error": error, "device": "here", "precision": precision}
        for row, seed, error, precision in (
            ("base", 0, 10.0, "bf16"), ("plain", 0, 12.0, "bf16"), ("base", 1, 10.0, "bf16"),
            ("plain", 1, 19.0, "fp32"),
        )
    ]
    monkeypatch.setattr(published, "read_log", lambda path: lines)
    assert published.idea_table()[-1] == "| LRN | 1.4 | 12.00 | 10.00 | +2.00 | too few seeds |"


def test_rows_are_commands_of_train_py():
    """Each row's options are train.py's, and an idea compares rows that differ in one thing."""
    import options

    for row in published.ROWS.values():
        args = options.make_parser().parse_args(row.options)
        assert not args.drops or max(args.drops) < args.epochs
        assert bool(args.data) == bool(row.pack)
    for before, after, _ in published.IDEAS.values():
        one, other = (vars(options.make_parser().parse_args(published.ROWS[r].options)) for r in (before, after))
        assert sum(one[name] != other[name] for name in one) == 1


def test_the_guides_have_what_it_prints():
    """results/README.md has both tables as they are; README.md the errors of the rows that it shows."""
    results, readme = ((published.ROOT / name).read_text() for name in ("results/README.md", "README.md"))
    assert "\n".join(published.error_table()) in results
    assert "\n".join(published.idea_table()) in results
    for name, words in (("cifar10-default", "CIFAR-10, all defaults (65 epochs)"),
                        ("cifar10", "CIFAR-10, 30 epochs, five seeds")):
        shown = [published.spread_of(published.done(name), key) for key in ("center_error", "ten-crop_error")]
        assert f"| {words} | 10,000 | {shown[0]}% | {shown[1]}% |" in readme.replace("**", "")
    for e in read_log(published.RESULTS):
        assert "seed" not in e or (published.LOGS / f"{e['row']}-{e['seed']}.jsonl").exists()
