"""README's commands: those that can run do, the others are parsed by the script that they call."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import h5py
import pytest
from PIL import Image

import test
import train
import utils
from data import pack, sources

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
SETUP = "pip install -r requirements.txt && "
PARSERS = {
    "train.py": "options", "test.py": "test", "data.pack": "data.pack", "studies.plateau": "studies.plateau",
    "studies.ablations": "studies.ablations", "studies.frelu": "studies.frelu", "studies.figures": "studies.figures",
    "benchmarks.step": "benchmarks.step", "benchmarks.lrn": "benchmarks.lrn",
    "benchmarks.loader": "benchmarks.loader", "benchmarks.pack": "benchmarks.pack",
    "checkpoints.convert": "checkpoints.convert",
}


REPRODUCTION = (ROOT / "REPRODUCTION.md").read_text()
GUIDES = [ROOT / "REPRODUCTION.md", *ROOT.glob("*/README.md"), *ROOT.glob("results/*/README.md")]


def fenced(language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for found, text in blocks if found == language]


COMMANDS = [line for block in fenced("bash") for line in block.splitlines()]


def script_and_arguments(line: str) -> tuple[str, list[str]]:
    """("train.py", [...]) of `python train.py ...`, `python -m module ...` or `torchrun --nproc-per-node N ...`."""
    words = shlex.split(line.removeprefix(SETUP))
    if words[0] == "torchrun":
        assert words[1] == "--nproc-per-node"
        assert words[2].isdigit()
        return words[3], words[4:]
    assert words[0] == "python"
    return (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])


def test_the_two_commands_of_the_setup():
    assert COMMANDS[:2] == [SETUP + "python train.py", SETUP + "python -m pytest"]


@pytest.mark.parametrize("line", [line for line in COMMANDS if not line.endswith("pytest") and "--help" not in line])
def test_a_command_is_parsed_by_its_script(line):
    script, arguments = script_and_arguments(line)
    importlib.import_module(PARSERS[script]).make_parser().parse_args(arguments)


def test_commands_also_in_running_text():
    """`python ...` in backquotes, in README and in the other guides."""
    texts = [README, *(p.read_text() for p in GUIDES)]
    lines = [line for text in texts for line in re.findall(r"`(python (?:-m )?[\w.]+ [^`]*)`", text)]
    lines += [line.strip() for text in texts[1:] for line in re.findall(r"^(?:    )?python .*[^\]\\]$", text, re.M)]
    lines = [line for line in lines if "[" not in line and "SOURCE" not in line]  # synopses
    assert lines
    for line in lines:
        script, arguments = script_and_arguments(line)
        if script in PARSERS:
            importlib.import_module(PARSERS[script]).make_parser().parse_args(arguments)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A place without stores and runs, and without a network."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "STORES", folder / "data/stores")
        patch.setattr(sources, "DOWNLOADS", folder / "data/downloads")
        patch.setattr(sources, "_unreachable", lambda url: "no network in this test")
        patch.setattr(utils, "CHECKPOINTS", folder / "checkpoints")
        patch.setattr(sources, "SAMPLE", part_of_the_sample(folder / "sample.h5"))
        patch.chdir(folder)
        assert train.main(["--max-steps", "2"]) == 0
        for name in "ab":
            shutil.copytree(folder / "checkpoints/sample-1", folder / "checkpoints" / name)
        for name in ("cat.jpg", "dog.png"):
            Image.effect_noise((90, 70), 50).convert("RGB").save(folder / name)
        for split, label in ((s, c) for s in ("train", "val") for c in ("cat", "dog")):
            (folder / "photos" / split / label).mkdir(parents=True)
            for number in range(64 if split == "train" else 2):
                Image.effect_noise((90, 70), 50).save(folder / "photos" / split / label / f"{number}.png")
        yield folder


def part_of_the_sample(path: Path) -> Path:
    """The first images of each of the sample's splits: 64, 30 and 30."""
    with h5py.File(sources.SAMPLE) as whole, h5py.File(path, "w") as part:
        part.attrs["classes"] = whole.attrs["classes"]
        for split, count in (("train", 64), ("val", 30), ("test", 30)):
            for name in ("images", "labels"):
                part[f"{split}/{name}"] = whole[f"{split}/{name}"][:count]
    return path


# What needs neither a network nor a GPU nor somebody's pictures of ImageNet.
RUN = ["python train.py --dataset sample", "python train.py --resume"]
RUN += [line for line in COMMANDS if line.startswith("python test.py") and "imagenet" not in line]
RUN += ["python -m data.pack photos --out data/stores/photos"]
RUN += ["python -m data.pack --verify data/stores/photos", "python train.py --data data/stores/photos"]


@pytest.mark.parametrize("line", RUN)
def test_a_command_runs(line, home, capsys):
    """In README's order, one after the other; training for two steps, on pictures of 224 pixels two at a time."""
    assert f"{line}\n" in README or f"`{line}`" in README
    script, arguments = script_and_arguments(line)
    if script == "train.py":
        arguments += ["--max-steps", "2"] + (["--batch-size", "2"] if "photos" in line else [])
    main = {"train.py": train.main, "test.py": test.main, "data.pack": pack.main}[script]
    assert main(arguments) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("block", fenced("python"))
def test_python_blocks_run(block, home, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    if "torch.hub" in block:
        block = block.replace('"."', repr(str(ROOT)))
    exec(block, {})


def test_links_lead_somewhere():
    for text, folder in ((README, ROOT), *((p.read_text(), p.parent) for p in GUIDES)):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http"):
                assert (folder / target).exists(), target


def test_reproduction_names_code_options_and_tests_that_exist():
    """Every table row that names code names a test, too; each name is found where it is said to be."""
    rows = [line for line in REPRODUCTION.splitlines() if line.startswith("|") and "test_" in line]
    assert len(rows) > 35
    for row in rows:
        cell = row.split("|")[-2]
        where, tests = cell.split(";") if ";" in cell else ("", cell)
        for file, name in re.findall(r"`([\w/]+\.py)` (\w+)", where):
            assert re.search(rf"^(?:def |class |    def )?{name}\b", (ROOT / file).read_text(), re.M), f"{file} {name}"
        file = "test_model.py"
        for word in re.findall(r"test_\w+(?:\.py)?", tests):
            if word.endswith(".py"):
                file = word
            else:
                assert f"def {word}(" in (ROOT / "tests" / file).read_text(), f"{file} {word}"
    known = {option for script in PARSERS.values() for option in options_of(script)}
    assert set(re.findall(r"`(?:test\.py )?(--[\w-]+)", REPRODUCTION)) <= known


def options_of(module: str) -> list[str]:
    return list(importlib.import_module(module).make_parser()._option_string_actions)


def test_the_file_map_is_complete():
    """Every file and folder at the top that git would show stands in the map, or is one everybody knows."""
    known = {"README.md", "LICENSE", "requirements.txt", "pyproject.toml"}
    block = next(block for block in fenced("") if block.startswith("model.py"))
    for path in ROOT.iterdir():
        if path.name[0] not in "._" and path.name not in known and path.suffix in (".py", "") and path.name != "venv":
            assert path.name in block, path.name
