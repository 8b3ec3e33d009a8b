"""The guides: commands that can run do, the others are parsed by the script that they call; python blocks run; links
lead somewhere. Guides are README.md, REPRODUCTION.md, results/SPEED.md and each folder's README.md."""

import importlib
import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import h5py
import pytest
from PIL import Image

import checkpoints
import test
import train
from checkpoints import export
from data import pack, sources

ROOT = Path(train.__file__).parent
TORCHRUN = {"--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port", "--max-restarts",
            "--signals-to-handle"}
SETUP = "pip install -r requirements.txt && "
PARSERS = {
    "train.py": "options", "test.py": "test", "data.pack": "data.pack", "studies.plateau": "studies.plateau",
    "studies.report": "studies.report",
    "studies.published": "studies.published", "studies.cifar2012": "studies.cifar2012",
    "studies.figure1": "studies.figure1",
    "studies.frelu": "studies.frelu", "studies.embedding": "studies.embedding",
    "benchmarks.step": "benchmarks.step", "benchmarks.lrn": "benchmarks.lrn",
    "benchmarks.infer": "benchmarks.infer",
    "benchmarks.loader": "benchmarks.loader", "benchmarks.pack": "benchmarks.pack",
    "benchmarks.faults": "benchmarks.faults.__main__",
    "checkpoints.convert": "checkpoints.convert", "checkpoints.export": "checkpoints.export",
}
PATHS = [ROOT / "README.md", ROOT / "REPRODUCTION.md", ROOT / "results/SPEED.md"]
PATHS += sorted([*ROOT.glob("[!.]*/README.md"), *ROOT.glob("results/*/README.md")])
GUIDES = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}
README, REPRODUCTION = GUIDES["README.md"], GUIDES["REPRODUCTION.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def fenced(text: str, language: str) -> list[str]:
    return [block for found, block in FENCE.findall(text) if found == language]


def commands(text: str) -> list[str]:
    """What a guide tells to run: the lines of its bash blocks, indented lines, `python ...` in running text."""
    lines = [line for block in fenced(text, "bash") for line in block.splitlines()]
    lines += [line.strip() for line in re.findall(r"^    (?:python|torchrun) .*$", text, re.MULTILINE)]
    lines += re.findall(r"`((?:python (?:-m )?[\w.]+|torchrun) [^`]*)`", FENCE.sub("", text))
    synopsis = re.compile(r"\[-|SOURCE|STORE|FILE |\\$")
    return [" ".join(line.split()) for line in lines if not synopsis.search(line) and not line.startswith("python3")]


COMMANDS = list(dict.fromkeys(line for text in GUIDES.values() for line in commands(text)))


def script_and_arguments(line: str) -> tuple[str, list[str]]:
    """("train.py", [...]) of `python train.py ...`, `python -m module ...` or `torchrun --nproc-per-node N ...`."""
    words = shlex.split(line.removeprefix(SETUP))
    if words[0] == "torchrun":
        script = words.index("train.py")
        assert set(words[1:script:2]) <= TORCHRUN
        assert "--nproc-per-node" in words
        return words[script], words[script + 1 :]
    assert words[0] == "python"
    return (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])


def test_readme_is_the_first_minute():
    """At most 200 lines, a picture and figures on the first screen, the two commands word for word."""
    assert len(README.splitlines()) <= 200
    assert fenced(README, "bash")[:2] == [SETUP + "python train.py\n", SETUP + "python -m pytest\n"]
    first_screen = "\n".join(README.splitlines()[:25])
    assert re.search(r"^!\[", first_screen, re.MULTILINE)
    assert re.search(r"^\|.*\d%", first_screen, re.MULTILINE)


def test_every_guide_with_commands_is_read():
    """So that a change of the guides' form doesn't leave the tests below without anything to do."""
    for name in ("README.md", "data", "checkpoints", "studies", "benchmarks", "results", "results/2026-11-22-speed"):
        assert commands(GUIDES[name if name.endswith(".md") else f"{name}/README.md"]), name
    assert len(COMMANDS) > 60


@pytest.mark.parametrize("line", [c for c in COMMANDS if " pytest" not in f"{c} " and "--help" not in c])
def test_a_command_is_parsed_by_its_script(line):
    script, arguments = script_and_arguments(line)
    importlib.import_module(PARSERS[script]).make_parser().parse_args(arguments)


def test_commands_of_pytest_and_help_name_files_that_exist():
    for line in COMMANDS:
        script, arguments = script_and_arguments(line)
        if script == "pytest":
            assert all((ROOT / name).is_file() for name in arguments)
        else:
            assert script in PARSERS, line


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A place without stores and runs, and without a network."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "STORES", folder / "data/stores")
        patch.setattr(sources, "DOWNLOADS", folder / "data/downloads")
        patch.setattr(sources, "_unreachable", lambda url: "no network in this test")
        patch.setattr(checkpoints, "FOLDER", folder / "checkpoints")
        patch.setattr(sources, "SAMPLE", part_of_the_sample(folder / "sample.h5"))
        patch.chdir(folder)
        assert train.main(["--max-steps", "2"]) == 0
        for name in "ab":
            shutil.copytree(folder / "checkpoints/sample-1", folder / "checkpoints" / name)
        (folder / "holiday").mkdir()
        for name in ("cat.jpg", "dog.png", "holiday/sea.jpg"):
            Image.effect_noise((90, 70), 50).convert("RGB").save(folder / name)
        for split, label in ((s, c) for s in ("train", "val") for c in ("cat", "dog")):
            (folder / "photos" / split / label).mkdir(parents=True)
            for number in range(64 if split == "train" else 2):
                Image.effect_noise((90, 70), 50).save(folder / "photos" / split / label / f"{number}.png")
        if find_spec("onnxruntime"):
            export.main(["checkpoints/a/last.pt", "photos.onnx"])
        yield folder


def part_of_the_sample(path: Path) -> Path:
    """The first images of each of the sample's splits: 64, 30 and 30."""
    with h5py.File(sources.SAMPLE) as whole, h5py.File(path, "w") as part:
        part.attrs["classes"] = whole.attrs["classes"]
        for split, count in (("train", 64), ("val", 30), ("test", 30)):
            for name in ("images", "labels"):
                part[f"{split}/{name}"] = whole[f"{split}/{name}"][:count]
    return path


# What needs neither a network nor a GPU nor somebody's pictures of ImageNet, and takes seconds.
RUN = ["python train.py --dataset sample", "python train.py --resume"]
RUN += [line for line in commands(README) if line.startswith("python test.py") and "imagenet" not in line]
RUN += ["python train.py --data photos"]


@pytest.mark.parametrize("line", RUN)
def test_a_command_runs(line, home, capsys):
    """In this order, one after the other; training for two steps, on pictures of 224 pixels two at a time."""
    assert line in COMMANDS
    script, arguments = script_and_arguments(line)
    if script == "train.py":
        arguments += ["--max-steps", "2"] + (["--batch-size", "2"] if "photos" in line else [])
    main = {"train.py": train.main, "test.py": test.main, "data.pack": pack.main}[script]
    assert main(arguments) == 0
    assert capsys.readouterr().out


BLOCKS = {
    f"{name} {number}": block
    for name, text in GUIDES.items() for number, block in enumerate(fenced(text, "python"))
}


@pytest.mark.parametrize("name", BLOCKS)
def test_python_blocks_run(name, home, monkeypatch):
    """In a folder with runs a and sample-1, a store of the sample, cat.jpg and dog.png."""
    monkeypatch.syspath_prepend(ROOT)
    block = BLOCKS[name]
    if "onnxruntime" in block:
        pytest.importorskip("onnxruntime")
    if "torch.hub" in block:
        block = block.replace('"."', repr(str(ROOT)))
    exec(block, {})


def anchors(text: str) -> set[str]:
    """What GitHub makes of a guide's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", GUIDES)
def test_links_lead_somewhere(name):
    """To files that exist and, in guides, to headings that exist."""
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", GUIDES[name])):
        if link.startswith("http"):
            continue
        target, _, anchor = link.partition("#")
        path = ((ROOT / name).parent / target).resolve() if target else ROOT / name
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(GUIDES[str(path.relative_to(ROOT))]), link


def test_every_guide_is_a_link_away_from_readme():
    linked = set(re.findall(r"\]\(([^)#]+)", README))
    assert {name for name in GUIDES if name.count("/") < 2} - {"README.md"} <= linked


@pytest.mark.parametrize("name", GUIDES)
def test_options_in_running_text_exist(name):
    known = {option for script in PARSERS.values() for option in options_of(script)}
    text = FENCE.sub("", GUIDES[name])
    used = {option for code in re.findall(r"`([^`]+)`", text) for option in re.findall(r"(?<!\S)--[a-z][\w-]*", code)}
    assert used <= known | TORCHRUN


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


def options_of(module: str) -> list[str]:
    return list(importlib.import_module(module).make_parser()._option_string_actions)


def test_the_file_map_is_complete():
    """Every file and folder at the top that git would show stands in the map, or is one everybody knows."""
    known = {"README.md", "LICENSE", "requirements.txt", "pyproject.toml", "venv", "node_modules"}
    block = next(block for block in fenced(README, "") if block.startswith("model.py"))
    for path in ROOT.iterdir():
        if path.name[0] not in "._" and path.name not in known and path.suffix in (".py", ""):
            assert path.name in block, path.name
