"""studies/alexnet.ipynb runs from top to bottom."""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parent.parent / "studies" / "alexnet.ipynb"


def test_the_notebook_runs(monkeypatch, tmp_path, capsys):
    """Its code cells, in order, in one namespace, started in its own folder as Jupyter does."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    namespace = {}
    for number, cell in enumerate(json.loads(NOTEBOOK.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
    out = capsys.readouterr().out
    assert "62,378,344 parameters" in out
    assert "top-1 error" in out
    assert namespace["probabilities"].shape == (10,)
    assert len(namespace["kernels"]) == 96
