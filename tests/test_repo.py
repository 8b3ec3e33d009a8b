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
# What each file may import of the project itself; data is the whole folder.
ALLOWED = {
    "model": set(),
    "kernels": {"model"},
    "data": {"data"},
    "recipe": {"model"},
    "utils": {"model", "data"},
    "options": {"model", "data", "utils"},
    "run": {"model", "data", "utils", "recipe"},
    "start": {"model", "data", "utils"},
    "train": {"model", "kernels", "data", "utils", "options", "recipe", "run", "start"},
    "checkpoints": {"model", "data", "utils"},
    "test": {"model", "kernels", "data", "utils"},
    "hubconf": {"model", "utils"},
    "studies": {"model", "kernels", "data", "utils", "options", "recipe", "run", "start", "train", "test", "studies"},
    "benchmarks": {"model", "kernels", "data", "utils", "options", "recipe", "train", "benchmarks"},
}
HEAVY = {"matplotlib", "cv2", "h5py", "lmdb", "torchvision", "scipy", "google"}


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree, everywhere=True):
    nodes = ast.walk(tree) if everywhere else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    """model, data -> utils -> train, test, hubconf -> studies, benchmarks; heavy libraries inside functions."""
    tree = ast.parse(path.read_text())
    mine = set(imports(tree)) & set(ALLOWED)
    assert mine <= ALLOWED[part(path)], f"{path} may not import {mine - ALLOWED[part(path)]}"
    if part(path) not in ("studies", "benchmarks"):
        assert not set(imports(tree, everywhere=False)) & HEAVY
    assert ast.get_docstring(tree), f"{path} has no docstring"


def test_model_imports_torch_only():
    assert set(imports(ast.parse((ROOT / "model.py").read_text()))) == {"torch"}


def test_every_module_can_be_imported():
    """In one new process; none of them prints anything or starts a run."""
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in MODULES if p.name != "__init__.py"]
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
