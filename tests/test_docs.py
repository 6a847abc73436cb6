"""The pages of docs/ agree with the code: quoted lines are in the source, examples run, tables and links hold."""

import re
import shutil
from pathlib import Path

import pytest

from triptych.diffusion.config import ProcessConfig, usual_spacing
from triptych.models.configs import swin as swin_config
from triptych.models.configs import vit as vit_config
from triptych.models.registry import config_for
from triptych.pipelines.diffusion import image_metadata
from triptych.recipes import RECIPES
from triptych.weights.mapping.registry import all_formats

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path for path in sorted(DOCS.rglob("*.md"))}


def read(name: str) -> str:
    return PAGES[name].read_text(encoding="utf-8")


def python_blocks(text: str, quoted: bool) -> list[str]:
    """Return the Python blocks of a page: those that quote the source, or the examples."""
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [block for block in blocks if block.startswith("# src/") == quoted]


def squeezed(line: str) -> str:
    """The line without its indentation, and without the spaces that align a column of shapes."""
    return " ".join(line.split())


@pytest.mark.parametrize(
    ("page", "quote"), [(name, quote) for name in PAGES for quote in python_blocks(read(name), True)]
)
def test_quoted_lines_are_in_the_source_in_that_order(page, quote):
    first, *lines = quote.strip().splitlines()
    path = ROOT / first.removeprefix("# ")
    source = [squeezed(line) for line in path.read_text(encoding="utf-8").splitlines()]
    # Lines that are not separated by "..." follow each other; comments between them may be left out.
    position, gap = 0, True
    for line in map(squeezed, lines):
        if line == "...":
            gap = True
            continue
        rest = source[position:]
        assert line in rest, line
        skipped = rest[: rest.index(line)]
        assert gap or all(not between or between.startswith("#") for between in skipped), (line, skipped)
        position, gap = position + len(skipped) + 1, False


# What a page's examples must have computed; a page that is not listed only has to run.
RESULTS = {
    "papers/vit.md": lambda names: names["A"].shape == (1, 3, 197, 197),
    "papers/swin.md": lambda names: (
        names["logits"].shape == (1, 7, 90, 130)
        and names["light"].shape == (56, 72)
        and names["light"].sum() == pytest.approx(1)
    ),
    "guides/generate.md": lambda names: names["inpainted"].size == (64, 64),
}


ELSEWHERE = {
    "guides/export.md"
}  # its examples read what its commands write: tests/weights/graphs/test_guide.py


@pytest.mark.parametrize(
    "page", [name for name in PAGES if name not in ELSEWHERE and python_blocks(read(name), False)]
)
def test_examples_run(page, tmp_path, monkeypatch):
    """All examples of a page run in order, in one namespace and in a folder with one image."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(DOCS / "images" / "strawberry.png", tmp_path)
    names: dict = {"__name__": "__main__"}
    for example in python_blocks(read(page), False):
        exec(example, names)
    assert RESULTS.get(page, lambda _: True)(names)


@pytest.mark.parametrize(
    ("page", "last"),
    [
        ("papers/vit.md", 8),
        ("papers/swin.md", 4),
        ("papers/latent-diffusion.md", 2),
        ("papers/sampling.md", 3),
    ],
)
def test_every_equation_is_there(page, last):
    assert sorted(map(int, re.findall(r"\\tag\{(\d)\}", read(page)))) == list(range(1, last + 1))


def test_the_table_of_samplers():
    rows = re.findall(
        r"^\| `([\w+-]+)` \| \d \| \d \| ([\w ]+) \| `([\w-]+)` \| \w+ \| ([^|]+) \|$",
        read("papers/sampling.md"),
        re.MULTILINE,
    )
    assert {name: title for name, _, _, title in rows} == image_metadata.SAMPLERS
    for name, _, levels, _ in rows:
        assert usual_spacing(name, ProcessConfig()) == levels


def test_the_table_of_sizes():
    rows = re.findall(
        r"\| `(vit-\w+)` \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \| ([\d.]+) \|", read("papers/vit.md")
    )
    assert len(rows) == 5
    for name, depth, dim, heads, count, gmacs in rows:
        config = config_for(name)
        assert (config.depth, config.embed_dim, config.num_heads) == (
            int(depth),
            int(dim),
            int(heads),
        )
        assert vit_config.parameters(config) == int(count.replace(",", ""))
        assert f"{vit_config.macs(config) / 1e9:.3f}" == gmacs


def test_the_table_of_sizes_of_swin():
    cells = (
        r"`(swin[\w-]+)`",
        r"(\d+)",
        r"([\d, ]+)",
        r"([\d, ]+)",
        r"(\d+)",
        r"([\d,]+)",
        r"([\d.]+)",
        r"(\d+)",
    )
    rows = re.findall(r"\| " + r" \| ".join(cells) + r" \|", read("papers/swin.md"))
    assert {row[0] for row in rows} == {name for name in swin_config.SIZES if name != "swin-emoji"}
    for name, dim, depths, heads, window, count, gmacs, size in rows:
        config = config_for(name)
        assert (config.embed_dim, config.image_size) == (int(dim), (int(size),) * 2)
        assert config.depths == tuple(map(int, depths.split(",")))
        assert config.num_heads == tuple(map(int, heads.split(",")))
        assert set(config.window_size) == {(int(window),) * 2}
        assert swin_config.parameters(config) == int(count.replace(",", ""))
        assert f"{swin_config.macs(config) / 1e9:.3f}" == gmacs


def test_the_table_of_costs():
    page = read("papers/swin.md")
    sides = [int(side) for side in re.search(r"\| \|((?: \d+ px \|)+)", page)[1].replace("px |", "").split()]
    rows = re.findall(r"\| `(swin-t|vit-s16)` \|((?: [\d.]+ \|){4})\n", page)
    assert len(rows) == 2
    for name, cells in rows:
        macs = (swin_config if name == "swin-t" else vit_config).macs
        costs = [macs(config_for(name, image_size=(side, side))) for side in sides]
        assert [f"{cost / 1e9:.1f}" for cost in costs] == cells.replace("|", "").split()


def test_the_table_of_formats():
    section = read("papers/swin.md").split("## Checkpoints")[1]
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|([^|]*)\|$", section, re.MULTILINE)
    listed = {
        (family, name)
        for name, *texts in rows
        for family, text in zip(("swin", "segmenter"), texts, strict=True)
        if text.strip()
    }
    assert listed == {
        (format.family, format.name) for format in all_formats() if format.family in ("swin", "segmenter")
    }


@pytest.mark.parametrize("page", [name for name in PAGES if "| recipe |" in read(name)])
def test_recipes_that_are_named_exist(page):
    table = read(page).split("| recipe |")[1].split("\n\n")[0]
    named = [
        name
        for row in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    ]
    assert len(named) >= 3
    assert set(named) <= set(RECIPES)


@pytest.mark.parametrize("page", PAGES)
def test_images_and_files_that_pages_name_exist(page):
    text = read(page)
    for path in re.findall(r"\]\(((?!https?:)[^)#]+)(?:#[^)]*)?\)", text):
        assert (PAGES[page].parent / path).exists(), path
    for path in re.findall(r"`((?:src|docs|tests|tools|examples)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path


def test_images_are_light():
    for image in (DOCS / "images").glob("[vs][iw]*_*.png"):  # vit_ and swin_
        assert image.stat().st_size < 200_000, image.name


def test_the_compatibility_page_lists_every_marked_test():
    page = read("compatibility.md")
    listed = set(re.findall(r"`(tests/[\w/]+\.py)`", page))
    marked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if path != Path(__file__) and "mark.proves(" in path.read_text()
    }
    assert listed == marked, "run tools/make_compatibility_page.py"
