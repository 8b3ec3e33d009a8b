"""studies/published.py: nets made once, whatever stops them; tables that say what is there and what is not."""

import re
import shutil

import pytest
import torch
from conftest import small_source

import checkpoints
import test
import train
import utils
from checkpoints.run import environment, locked, read_log
from data import pack
from data.store import Store
from model import AlexNet
from studies import published, report, variants
from studies.folder import Run
from utils import Diverged, UserError

CPU = ["--device", "cpu"]
HERE = published.machine_of(torch.device("cpu"), "fp32")


@pytest.fixture
def small(store, tmp_path, monkeypatch):
    """Two rows of two nets each on the small store, and an idea that compares them."""
    options = ["--data", str(store.path), "--epochs", "2", "--drops", "1", "--batch-size", "48", "--workers", "0"]
    rows = {
        "base": published.Row("small", options, 2, together=True),
        "plain": published.Row("the same without LRN", [*options, "--no-lrn"], 2),
    }
    monkeypatch.setattr(published, "ROWS", rows)
    monkeypatch.setattr(published, "IDEAS", {
        "LRN": published.Idea("plain", "base", "1.4"),
        "ten crops": published.Idea("base", "base", "1.5", published.TEN_CROP),
    })
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
    assert published.main(CPU) == 143
    assert not published.RESULTS.exists()
    assert published.main(CPU) == 0
    assert published.main(CPU) == 0
    assert ["--resume" in argv for argv in calls] == [False, True, False, False, False]
    *nets, together = read_log(published.RESULTS)
    assert [(e["row"], e["seed"]) for e in nets] == [("base", 0), ("plain", 0), ("base", 1), ("plain", 1)]
    for e in nets:
        best = small / "published" / e["log"].removesuffix(".jsonl") / "run" / "best.pt"
        for protocol in ("center", "ten-crop"):
            found = test.errors([best], Store(store.path), ten_crop=protocol == "ten-crop")
            assert e[f"{protocol}_error"] == found["top1_error"]
        assert e["command"].startswith("python train.py --data ")
        assert e["command"].endswith(f" --seed {e['seed']} --precision fp32")
        assert e["pictures"] == {"train": 96, "val": 21, "test": 30}
        assert (e["precision"], e["epochs"]) == ("fp32", 2)
        log = read_log(published.LOGS / e["log"])
        assert e["val_top1_error"] == min(line["val_top1_error"] for line in log)
    both = [small / "published" / nets[2 * seed]["log"].removesuffix(".jsonl") / "run" / "best.pt" for seed in (0, 1)]
    assert together["ten-crop_error"] == test.errors(both, Store(store.path), ten_crop=True)["top1_error"]
    assert not list(small.rglob("last.pt"))
    one, other = ([e["center_error"] for e in nets if e["row"] == row] for row in ("plain", "base"))
    printed = capsys.readouterr().out
    assert ", ".join(f"{a - b:+.2f}" for a, b in zip(one, other, strict=True)) + " | too few seeds |" in printed
    assert f"| {together['ten-crop_error']:.2f} |" in printed
    assert "| 2 of 2 |" in printed


def test_what_another_process_is_at_is_left_to_it(small, capsys):
    place = published.folder("base", 0, HERE)
    place.mkdir(parents=True)
    with locked(place):
        assert published.main(["base", *CPU]) == 0
    assert [e["seed"] for e in read_log(published.RESULTS)] == [1]
    assert "base, seed 0: left to the process that trains it" in capsys.readouterr().out


def test_a_row_without_pictures_is_left_out(small, monkeypatch, capsys):
    options, arguments = published.packed("nowhere", str(small / "no such folder"))
    monkeypatch.setitem(published.ROWS, "base", published.Row("none", options, 1, arguments))
    assert published.main(["base", *CPU]) == 0
    assert "base is left out: " in capsys.readouterr().out
    assert not published.finished("base")


@pytest.mark.parametrize(("asked", "message"), [
    (["--size", "64", "--val", "0.5"], "64 pixels a side, and this row takes 72; rename or remove it"),
    (["--size", "72", "--val", "0.2"], "17% of its training pictures for validation, and this row takes 50%"),
    (["--size", "72", "--val", "0.5", "--codec", "jpeg"], "jpeg records, and this row takes raw"),
    (["--size", "72", "--val", "0.5", "--codec", "raw"], ""),
], ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_a_store_that_was_packed_otherwise_is_left_out(small, tree, monkeypatch, capsys, asked, message):
    """By hand, under the name that the row gives its own."""
    trained = []
    monkeypatch.setattr(train, "main", lambda argv: trained.append(argv) or 143)
    shutil.rmtree(tree / "val")
    for label in ("cat", "dog"):
        shutil.copytree(tree / "train" / label, tree / "test" / label)
    pack.main([str(tree), "--out", str(small / "store"), *asked, *([] if "--codec" in asked else ["--codec", "raw"])])
    packing = (str(tree), "--size", "72", "--val", "0.5", "--codec", "raw")
    monkeypatch.setitem(published.ROWS, "base", published.Row("none", ["--data", str(small / "store")], 1, packing))
    assert published.main(["base", *CPU]) == (0 if message else 143)
    assert bool(trained) != bool(message)
    assert message in capsys.readouterr().out


def test_a_named_set_that_was_packed_larger_is_left_out(small, tree, monkeypatch, capsys):
    store = pack.pack(small_source(), small / "large", size=100)
    monkeypatch.setattr(published, "named_store", lambda name: store)
    monkeypatch.setitem(published.ROWS, "base", published.Row("none", ["--dataset", "cifar10"], 1))
    assert published.main(["base", *CPU]) == 0
    assert "large has 100 pixels a side, and this row takes 72" in capsys.readouterr().out


def test_a_store_without_test_pictures_is_left_out_before_the_training(small, tree, monkeypatch, capsys):
    """A tree with train/ and val/ alone, as Imagenette's archive has it, packed by hand."""
    monkeypatch.setattr(train, "main", lambda argv: pytest.fail("trains"))
    pack.main([str(tree), "--out", str(small / "store")])
    monkeypatch.setitem(published.ROWS, "base", published.Row("none", ["--data", str(small / "store")], 1))
    assert published.main(["base", *CPU]) == 0
    assert "store has no test pictures with labels; remove it, put the pictures into" in capsys.readouterr().out


def test_tables_say_what_is_not_there(small, monkeypatch, capsys):
    monkeypatch.setattr(train, "main", lambda argv: pytest.fail("trains"))
    assert published.main(["--tables"]) == 0
    printed = capsys.readouterr().out
    assert "| small | not measured yet | | | | 0 of 2 | |" in printed
    assert "| LRN | 1.4 | not measured yet | | | | |" in printed
    with pytest.raises(UserError, match="no row tanh; the rows are base, plain"):
        published.main(["tanh"])


def test_a_net_that_diverged_is_a_line_too(small, monkeypatch, capsys):
    real = train.main

    def diverge(argv):
        real([*argv, "--max-steps", "1"])
        raise Diverged("the loss is no longer finite at step 7")

    monkeypatch.setattr(train, "main", diverge)
    published.main(["base", *CPU])
    assert [e["diverged"][:8] for e in read_log(published.RESULTS)] == ["the loss"] * 2  # and none of both together
    name = environment(torch.device("cpu"))["device"]
    assert f"diverged: base with seed 0 on {name}, base with seed 1 on {name}" in capsys.readouterr().out
    assert len(list(published.LOGS.iterdir())) == 2
    assert published.error_table()[2] == "| small | not measured yet | | | | 0 of 2, 2 diverged | |"
    assert published.idea_table()[3] == "| ten crops | 1.5 | not measured yet, 2 diverged without | | | | |"


def test_what_a_kill_leaves_does_not_stand_in_the_way(small):
    """A folder with no more than a config.json; one whose net is finished while its line is gone."""
    out = published.folder("base", 0, HERE) / "run"
    out.mkdir(parents=True)
    (out / "config.json").write_text("{}")
    published.main(["base", *CPU])
    before, trained = read_log(published.RESULTS), (out / "best.pt").stat().st_mtime_ns
    shutil.move(published.RESULTS, small / "away")
    published.main(["base", *CPU])
    after = read_log(published.RESULTS)
    assert (out / "best.pt").stat().st_mtime_ns == trained  # an hour's work: tested again, not trained again
    assert [e.get("center_error") for e in after] == [e.get("center_error") for e in before]


def test_half_of_the_kernels_is_a_row_like_others(small, store, monkeypatch):
    """Trained by train.py's loop, stopped and resumed as its runs are; its checkpoint is not taken for AlexNet's, and
    its page has what its log says."""
    net = variants.build("half", 1000, 224)
    assert sum(p.numel() for p in net.parameters()) == 59_798_312
    assert net(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert net.conv3.weight.std().item() == pytest.approx(0.03, rel=0.02)
    row = published.ROWS["base"]._replace(seeds=1, variant="half", together=False)
    monkeypatch.setitem(published.ROWS, "base", row)
    real, calls = variants.main, []

    def stop_first(variant, argv):
        calls.append(argv)
        if len(calls) > 1:
            return real(variant, [*argv, "--max-steps", "9"])
        return real(variant, [*argv, "--max-steps", "1"]) or 143

    monkeypatch.setattr(variants, "main", stop_first)
    assert published.main(["base", *CPU]) == 143
    assert published.main(["base", *CPU]) == 0
    (line,) = read_log(published.RESULTS)
    assert line["command"] == "python -m studies.published base --precision fp32"
    run = published.folder("base", 0, HERE) / "run"
    assert run.joinpath("best.pt").exists()
    for crops in (False, True):
        found = variants.errors(run / "best.pt", Store(store.path), ten_crop=crops, device="cpu")["top1_error"]
        assert found == line[published.TEN_CROP if crops else published.CENTER]
    with pytest.raises(UserError, match="unknown net half"):
        test.errors([run / "best.pt"], Store(store.path))
    assert report.main([str(run), "--device", "cpu"]) == 0  # of its log
    said = (run / "report.html").read_text()
    assert said.count("<img") == 3
    assert "the net, half, is not one of" in said


def test_a_net_of_its_own_takes_train_pys_options_or_refuses_them(store, tmp_path, monkeypatch, capsys):
    """--kernels off is heeded; a last.pt that is damaged is told of; its page can tell it from AlexNet."""
    out, options = tmp_path / "run", ["--data", str(store.path), "--batch-size", "48", "--kernels", "off"]
    assert variants.main("half", [*options, "--out", str(out), "--max-steps", "1"]) == 0
    assert "LRN of model.py, dense layers of torch" in capsys.readouterr().out
    (out / "last.pt").write_bytes(b"torn")
    assert variants.main("half", ["--out", str(out), "--resume", "--max-steps", "2"]) == 0
    assert "last.pt is damaged or missing" in capsys.readouterr().err
    assert Run(out).settings["network"] == "half"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="this net trains in one process"):
        variants.main("half", options)


def test_a_net_without_masks_starts_as_its_pair_does():
    """The table compares it with the net of the same seed, as the other rows."""
    plain = AlexNet(3, image_size=64)
    utils.seed_all(7)
    plain.init_weights("2012")
    found = variants.build("no-masks", 3, 64, seed=7).state_dict()
    assert all(torch.equal(found[name], weights) for name, weights in plain.state_dict().items())


def test_a_net_without_masks_halves_in_training_too():
    """In testing it is AlexNet with the paper's dropout; in training it gives the same."""
    net = variants.build("no-masks", 3, 64)
    plain = AlexNet(3, image_size=64).eval()
    plain.load_state_dict(net.state_dict())
    pictures = torch.randn(2, 3, 64, 64)
    for mode in (True, False):
        assert torch.equal(net.train(mode)(pictures), plain(pictures))


def test_tables_show_one_machine_and_precision(small, monkeypatch):
    """Each row's machine with the most nets, of two with as many the one whose nets were tested as one, or the
    first; pairs are made on one machine."""

    def lines(*made):
        return [
            {"row": row, "seed": seed, "center_error": error, "ten-crop_error": error - 1, "train_top1_error": 1.0,
             "device": "here", "kind": "CPU", "precision": precision}
            for row, seed, error, precision in made
        ]

    found = lines(("base", 0, 10.0, "bf16"), ("plain", 0, 12.0, "bf16"), ("base", 1, 11.0, "bf16"),
                  ("plain", 1, 19.0, "fp32"))
    found += [{"row": "base", "together": 2, "ten-crop_error": 8.0, "kind": "CPU", "precision": p}
              for p in ("bf16", "fp32")]
    monkeypatch.setattr(published, "read_log", lambda path: found)
    assert published.idea_table()[-2:] == [
        "| LRN | 1.4 | 12.00 | 10.00 | +2.00 | too few seeds | here, bf16 |",
        "| ten crops | 1.5 | 10.50 ± 0.71 | 9.50 ± 0.71 | +1.00, +1.00 | too few seeds | here, bf16 |",
    ]
    assert published.error_table()[-2:] == [
        "| small | 10.50 ± 0.71 | 9.50 ± 0.71 | 8.00 | 1.00 ± 0.00 | 2 of 2 | here, bf16 |",
        "| the same without LRN | 12.00 | 11.00 |  | 1.00 | 1 of 2 | here, bf16 |",
    ]
    found += lines(("base", 0, 10.0, "fp32"), ("base", 1, 10.0, "fp32"))
    found[:] = [e for e in found if "together" not in e or e["precision"] == "fp32"]
    assert published.error_table()[-2].startswith("| small | 10.00 ± 0.00 | 9.00 ± 0.00 | 8.00 |")


def test_processors_are_one_kind_and_named(small, monkeypatch):
    """Nets that different CPUs made are pairs and one row, which names the CPUs; those of a GPU are others."""
    errors = {"center_error": 10.0, "ten-crop_error": 9.0, "train_top1_error": 1.0, "precision": "bf16"}
    found = [errors | {"row": row, "seed": seed, "device": device, "kind": kind} for row, seed, device, kind in (
        ("base", 0, "EPYC", "CPU"), ("base", 1, "Xeon", "CPU"), ("plain", 0, "Xeon", "CPU"),
        ("base", 0, "GPU A", "GPU A"), ("plain", 1, "GPU A", "GPU A"))]
    monkeypatch.setattr(published, "read_log", lambda path: found)
    assert published.error_table()[-2].endswith("| 2 of 2 | EPYC and Xeon, bf16 |")
    assert published.idea_table()[-2] == (
        "| LRN | 1.4 | 10.00 | 10.00 | +0.00 | too few seeds | EPYC and Xeon, bf16 |")


def test_another_precision_is_another_net(small, monkeypatch):
    """A line of one machine and precision does not keep another from training."""
    calls = []

    def stopped(row, seed, device, precision, out):
        calls.append(precision)
        return 3, None

    monkeypatch.setattr(published, "train_net", stopped)
    published.RESULTS.write_text(
        '{"row": "base", "seed": 0, "kind": "GPU A", "precision": "fp32"}\n'
        f'{{"row": "base", "seed": 0, "kind": "{HERE.kind}", "precision": "bf16"}}\n'
    )
    assert published.main(["base", *CPU]) == 3
    assert published.main(["base", *CPU, "--precision", "bf16"]) == 3  # of seed 1
    assert calls == ["fp32", "bf16"]
    places = {published.folder("base", 0, published.Machine(name, "bf16")).name for name in ("GPU A", "GPU B")}
    assert places == {"base-0-gpu-a-bf16", "base-0-gpu-b-bf16"}  # so none overwrites the other's net and log
    assert not (published.folder("base", 0, HERE._replace(precision="bf16")) / "run").exists()


def test_a_line_says_how_its_pictures_were_packed(run_folder):
    store = str(published.ROOT / "data" / "stores" / "x")
    row = published.Row("words", ["--data", store], 1, ("photos", "--val", "0.05", "--out", store))
    line = published.about("x", row, 0, run_folder)
    pack = "python -m data.pack photos --val 0.05 --out data/stores/x"
    assert line["command"] == f"{pack} && python train.py --data data/stores/x --seed 0 --precision fp32"


def test_rows_are_commands_of_train_py():
    """Each row's options are train.py's, and an idea compares rows that differ in one of them, or are another net."""
    import options

    for row in published.ROWS.values():
        args = options.make_parser().parse_args(row.options)
        assert not args.drops or max(args.drops) < args.epochs
        assert bool(args.data) == bool(row.pack)
    for idea in published.IDEAS.values():
        before, after = published.ROWS[idea.before], published.ROWS[idea.after]
        one, other = (vars(options.make_parser().parse_args(row.options)) for row in (before, after))
        differ = sum(one[name] != other[name] for name in one) or before.variant != after.variant
        assert differ == (idea.tested_with == published.CENTER)


def test_the_guides_have_what_it_prints():
    """results/README.md has both tables as they are, README.md and REPRODUCTION.md the errors of the rows that they
    show, the latter what ideas are worth, too."""
    guides = ("results/README.md", "README.md", "REPRODUCTION.md")
    results, readme, reproduction = ((published.ROOT / name).read_text() for name in guides)
    assert "\n".join(published.error_table()) in results
    assert "\n".join(published.idea_table()) in results
    one = published.together("cifar10", published.best_covered("cifar10")[0])
    for name, words, more in (("cifar10-default", "CIFAR-10, all defaults (65 epochs)", ""),
                              ("cifar10", "CIFAR-10, 30 epochs, five seeds", f", as one model {one:.2f}%")):
        nets = published.best_covered(name)[1]
        shown = [published.spread_of(nets, key) for key in (published.CENTER, published.TEN_CROP)]
        assert f"| {words} | 10,000 | {shown[0]}% | {shown[1]}%{more} |" in readme.replace("**", "")
    for crops, figure in (("1 CNN, centre", shown[0]), ("1 CNN, ten", shown[1]), ("5 CNNs, ten", f"{one:.2f}")):
        assert re.search(rf"\| {crops} crops? \| [^|]* \| {figure}% \|", reproduction)
    for line in published.idea_table():
        idea, worth = (line.split("|")[column].strip() for column in (1, 6))
        if idea in ("LRN", "overlapping pooling", "colour noise", "ten crops"):
            assert f"{worth.split(':')[0].lstrip('+')} points" in reproduction
    for e in read_log(published.RESULTS):
        assert "seed" not in e or (published.LOGS / e["log"]).exists()
