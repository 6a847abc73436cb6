"""The checker of retired words finds them where they are meant, and nothing else."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("check_words", ROOT / "tools" / "check_words.py")
check_words = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_words)


def findings(tmp_path: Path, name: str, text: str) -> list[str]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return list(check_words.check_file(path))


@pytest.mark.parametrize(
    "source",
    [
        "told = 1",
        "def f(how): ...",
        "class ColourMatrix: ...",
        "import a as said",
        "x.picture_grid = 1",
        "# one of many pictures",
        'x = "the sampler paints it"',
        '"""Initialise the network."""',
        'raise ValueError(f"the run is gone on with by {x}")',
    ],
)
def test_retired_words_are_found(tmp_path, source):
    assert len(findings(tmp_path, "module.py", source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "result = image = color = 1",
        "def inpaint(self): ...",
        "# preprocessor_config.json is read by an image processor",
        'x = "not found"  # nothing else is known of it',
        'NAME = "framed picture"',
        'x = "colour"  # words: quoted',
    ],
)
def test_other_words_are_not(tmp_path, source):
    assert findings(tmp_path, "module.py", source) == []


def test_pages_and_notebooks_are_checked(tmp_path):
    assert findings(tmp_path, "page.md", "The Vision Transformer *sees*, latent diffusion *paints*.\n") == []
    assert len(findings(tmp_path, "page.md", "Two pictures.\n")) == 1
    cells = [
        {"cell_type": "markdown", "source": ["A picture.\n"], "metadata": {}},
        {"cell_type": "code", "source": ["told = 1\n"], "metadata": {}, "outputs": [{"text": "picture"}]},
    ]
    assert len(findings(tmp_path, "notebook.ipynb", json.dumps({"cells": cells}))) == 2
