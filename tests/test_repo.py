"""The house: which file may import which, and what importing one does."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = [
    *(p for p in sorted(ROOT.glob("*.py"))),
    *(p for folder in ("data", "studies", "benchmarks", "checkpoints") for p in sorted((ROOT / folder).rglob("*.py"))),
]
# What each file or folder may import of the project: those before it; files of one level do not import each other.
LEVELS = (
    {"model", "utils", "memory"}, {"data"}, {"kernels", "recipe", "processes", "watch"}, {"checkpoints"}, {"options"},
    {"train", "test", "hubconf"}, {"studies", "benchmarks"},
)
HEAVY = {"matplotlib", "cv2", "h5py", "lmdb", "torchvision", "scipy", "google"}
LINES = {"utils.py": 250, "README.md": 200}  # at most


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree, everywhere=True):
    nodes = ast.walk(tree) if everywhere else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def allowed(name: str) -> set[str]:
    level = next(number for number, names in enumerate(LEVELS) if name in names)
    before = set().union(*LEVELS[:level]) | ({name} if (ROOT / name).is_dir() else set())
    return before - ({"model"} if name == "data" else set())


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    """By LEVELS; heavy libraries inside functions; studies do not import each other."""
    tree, name = ast.parse(path.read_text()), part(path)
    mine = set(imports(tree)) & set().union(*LEVELS)
    assert mine <= allowed(name), f"{path} may not import {mine - allowed(name)}"
    if name not in ("studies", "benchmarks"):
        assert not set(imports(tree, everywhere=False)) & HEAVY
    if name == "studies":
        # What several studies share is no study.
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        names = ("common", "loop", "networks", "fourlayer", "variants", "folder", "look", "page", "seen")
        shared = {f"studies.{name}" for name in names}
        apart = {m for m in modules if m.startswith("studies.")} - shared
        assert not apart, f"{path} imports {apart}"
    assert ast.get_docstring(tree), f"{path} has no docstring"


@pytest.mark.parametrize("name", LINES)
def test_files_that_stay_short(name):
    assert len((ROOT / name).read_text().splitlines()) <= LINES[name]


def test_model_imports_torch_only():
    assert set(imports(ast.parse((ROOT / "model.py").read_text()))) == {"torch"}


def test_every_module_can_be_imported():
    """In one new process; none of them prints anything or starts a run."""
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in MODULES if p.name != "__init__.py"]
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
