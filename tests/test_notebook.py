"""studies/alexnet.ipynb runs from top to bottom."""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parent.parent / "studies" / "alexnet.ipynb"


def test_the_notebook_runs(monkeypatch, tmp_path, capsys):
    """Its code cells, in order, in one namespace, started in its own folder as Jupyter does; 10 steps, not 100."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    namespace = {}
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    sources = {number: "".join(cell["source"]) for number, cell in enumerate(cells) if cell["cell_type"] == "code"}
    assert sum('"--max-steps", "100"' in source for source in sources.values()) == 1
    for number, source in sources.items():
        exec(compile(source.replace('"100"', '"10"'), f"cell {number}", "exec"), namespace)
    out = capsys.readouterr().out
    assert "62,378,344 parameters" in out
    assert "top-1 error" in out
    assert namespace["probabilities"].shape == (10,)
    assert len(namespace["kernels"]) == 96
