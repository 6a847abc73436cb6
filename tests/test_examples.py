"""The notebooks of examples/ run from top to bottom without other files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
QUICK = ("networks_layer_by_layer",)  # under ten seconds


def code_of(notebook: Path) -> str:
    """Return the code of all cells, one after the other."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize(
    "notebook",
    [pytest.param(path, marks=[] if path.stem in QUICK else pytest.mark.slow) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_the_notebook_runs(notebook, tmp_path):
    script = tmp_path / "notebook.py"
    script.write_text(code_of(notebook), encoding="utf-8")
    environment = {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT / "src"), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_has_outputs(notebook):
    """Notebooks are also read on the web, where nothing runs: `make notebooks` stores the outputs."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert any(cell.get("outputs") for cell in cells)
    assert not any(output["output_type"] == "error" for cell in cells for output in cell.get("outputs", ()))
    assert notebook.stat().st_size < 600_000
