"""The pages of docs/ say what the code says: quoted lines are in the source, examples run, tables and links hold."""

import re
from pathlib import Path

import pytest

from triptych.models.registry import config_for
from triptych.models.vit_config import macs, parameters

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
VIT = (ROOT / "docs" / "vit.md").read_text(encoding="utf-8")


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


QUOTES = [block for block in python_blocks(VIT) if block.startswith("# src/")]
EXAMPLES = [block for block in python_blocks(VIT) if not block.startswith("# src/")]


def squeezed(line: str) -> str:
    """The line without its indentation, and without the spaces that hold a column of shapes to the right."""
    return " ".join(line.split())


@pytest.mark.parametrize("quote", QUOTES)
def test_quoted_lines_are_in_the_source_in_that_order(quote):
    first, *lines = quote.strip().splitlines()
    path = ROOT / first.removeprefix("# ")
    source = [squeezed(line) for line in path.read_text(encoding="utf-8").splitlines()]
    # Lines that are not parted by "..." follow each other; comments between them may be left out.
    at, gap = 0, True
    for line in map(squeezed, lines):
        if line == "...":
            gap = True
            continue
        rest = source[at:]
        assert line in rest, line
        skipped = rest[: rest.index(line)]
        assert gap or all(not between or between.startswith("#") for between in skipped), (line, skipped)
        at, gap = at + len(skipped) + 1, False


def test_examples_run():
    names: dict = {}
    for example in EXAMPLES:
        exec(example, names)
    assert names["A"].shape == (1, 3, 197, 197)


def test_every_equation_is_there():
    assert sorted(map(int, re.findall(r"\\tag\{(\d)\}", VIT))) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_table_of_sizes():
    rows = re.findall(r"\| `(vit-\w+)` \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \| ([\d.]+) \|", VIT)
    assert len(rows) == 5
    for name, depth, dim, heads, count, gmacs in rows:
        config = config_for(name)
        assert (config.depth, config.embed_dim, config.num_heads) == (int(depth), int(dim), int(heads))
        assert parameters(config) == int(count.replace(",", "")) and f"{macs(config) / 1e9:.3f}" == gmacs  # noqa: PT018


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_and_files_that_pages_name_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"\]\(((?!https?:)[^)#]+)\)", text):
        assert (page.parent / path).exists(), path
    for path in re.findall(r"`((?:src|docs|tests|tools)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path


def test_pictures_are_light():
    for picture in (ROOT / "docs" / "images").glob("vit_*.png"):
        assert picture.stat().st_size < 200_000, picture.name
