"""The arrows of the design: which folder may import which. The contracts are in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_import_contracts_hold():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([str(linter), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_folder_is_under_a_contract():
    """A new folder of the package has to be named in the contracts."""
    contracts = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    folders = [path.parent.name for path in (ROOT / "src" / "triptych").glob("*/__init__.py")]
    assert [name for name in folders if f'"triptych.{name}"' not in contracts] == []
