"""The pages of docs/ say what the code says: quoted lines are in the source, examples run, tables and links hold."""

import re
from pathlib import Path

import pytest

from triptych.diffusion.config import ProcessConfig, usual_spacing
from triptych.models.configs import swin as swin_config
from triptych.models.configs import vit as vit_config
from triptych.models.registry import config_for
from triptych.pipelines.diffusion import image_metadata
from triptych.recipes import RECIPES
from triptych.weights.mapping.registry import known

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
VIT, SWIN, PAINT = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("vit", "swin", "latent-diffusion")
)


def python_blocks(text: str, quoted: bool) -> list[str]:
    """Those that quote the source, or the examples."""
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return [block for block in blocks if block.startswith("# src/") == quoted]


def squeezed(line: str) -> str:
    """The line without its indentation, and without the spaces that hold a column of shapes to the right."""
    return " ".join(line.split())


@pytest.mark.parametrize(
    "quote", [quote for page in (VIT, SWIN, PAINT) for quote in python_blocks(page, True)]
)
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


def run_examples(page: str) -> dict:
    names: dict = {}
    for example in python_blocks(page, False):
        exec(example, names)
    return names


def test_examples_run():
    assert run_examples(VIT)["A"].shape == (1, 3, 197, 197)


def test_examples_of_swin_run():
    names = run_examples(SWIN)
    assert names["logits"].shape == (1, 7, 90, 130)
    assert names["light"].shape == (56, 72)
    assert names["light"].sum() == pytest.approx(1)


def test_examples_of_latent_diffusion_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it writes a LoRA
    assert run_examples(PAINT)["painted"].size == (48, 32)


@pytest.mark.parametrize(
    ("page", "last"), [(VIT, 8), (SWIN, 4), (PAINT, 6)], ids=["vit", "swin", "latent-diffusion"]
)
def test_every_equation_is_there(page, last):
    assert sorted(map(int, re.findall(r"\\tag\{(\d)\}", page))) == list(range(1, last + 1))


def test_the_table_of_samplers():
    rows = re.findall(
        r"^\| `([\w+-]+)` \| \d \| \d \| ([\w ]+) \| `([\w-]+)` \| \w+ \| ([^|]+) \|$", PAINT, re.MULTILINE
    )
    assert {name: title for name, _, _, title in rows} == image_metadata.SAMPLERS
    for name, _, levels, _ in rows:
        assert usual_spacing(name, ProcessConfig()) == levels


def test_the_table_of_sizes():
    rows = re.findall(r"\| `(vit-\w+)` \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \| ([\d.]+) \|", VIT)
    assert len(rows) == 5
    for name, depth, dim, heads, count, gmacs in rows:
        config = config_for(name)
        assert (config.depth, config.embed_dim, config.num_heads) == (int(depth), int(dim), int(heads))
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
    rows = re.findall(r"\| " + r" \| ".join(cells) + r" \|", SWIN)
    assert {row[0] for row in rows} == {name for name in swin_config.SIZES if name != "swin-emoji"}
    for name, dim, depths, heads, window, count, gmacs, size in rows:
        config = config_for(name)
        assert (config.embed_dim, config.image_size) == (int(dim), (int(size),) * 2)
        assert config.depths == tuple(map(int, depths.split(",")))
        assert config.num_heads == tuple(map(int, heads.split(",")))
        assert set(config.window) == {(int(window),) * 2}
        assert swin_config.parameters(config) == int(count.replace(",", ""))
        assert f"{swin_config.macs(config) / 1e9:.3f}" == gmacs


def test_the_table_of_costs():
    sides = [int(side) for side in re.search(r"\| \|((?: \d+ px \|)+)", SWIN)[1].replace("px |", "").split()]
    found = re.findall(r"\| `(swin-t|vit-s16)` \|((?: [\d.]+ \|){4})\n", SWIN)
    assert len(found) == 2
    for name, cells in found:
        macs = (swin_config if name == "swin-t" else vit_config).macs
        costs = [macs(config_for(name, image_size=(side, side))) for side in sides]
        assert [f"{cost / 1e9:.1f}" for cost in costs] == cells.replace("|", "").split()


def test_the_table_of_formats():
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|([^|]*)\|$", SWIN.split("## Checkpoints")[1], re.MULTILINE)
    told = {
        (kind, name)
        for name, *texts in rows
        for kind, text in zip(("swin", "segmenter"), texts, strict=True)
        if text.strip()
    }
    assert told == {
        (format.family, format.name) for format in known() if format.family in ("swin", "segmenter")
    }


def test_recipes_that_are_named_exist():
    table = SWIN.split("| recipe |")[1].split("\n\n")[0]
    named = [
        name
        for row in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    ]
    assert len(named) >= 8
    assert set(named) <= set(RECIPES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_and_files_that_pages_name_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"\]\(((?!https?:)[^)#]+)\)", text):
        assert (page.parent / path).exists(), path
    for path in re.findall(r"`((?:src|docs|tests|tools)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path


def test_pictures_are_light():
    for picture in (ROOT / "docs" / "images").glob("[vs][iw]*_*.png"):  # vit_ and swin_
        assert picture.stat().st_size < 200_000, picture.name
