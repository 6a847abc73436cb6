"""Results of benchmarks as data and as a page: benchmarks.json and benchmarks.md."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from triptych.atomic_write import write_text_atomically
from triptych.bench.harness.targets import judged
from triptych.bench.harness.timing import Spread
from triptych.plots import style

HEADER = """# Benchmarks

Written by `triptych bench`, never by hand; the same figures are in `benchmarks.json`. Each section is one run on one
machine: ours and the reference implementation in turn, A B A B, on the same inputs with equal weights and outputs
checked equal. A figure is the median, with the minimum and the maximum in brackets. A ratio is ours over theirs, taken
round by round; of times and of memory less than 1 is better.
"""

TARGETS_HEADER = """## Targets

Ratios of time, ours over theirs, less is better; or a fraction of the CPU's measured peak. Each is the median of the
last run of its suite, below. Of two reference implementations of one network either target is enough: if only one is
met, the verdict of the other names it. For why one is missed see the section `profile`: it shows where the time goes.
"""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: the key of its values in a row, its heading, and how numbers are printed."""

    key: str
    heading: str
    form: str = ""
    """A format specification, such as ".1f" or ".0%"; empty for words."""


@dataclass(kw_only=True)
class Table:
    """A title, what is measured and how, and rows of values: words, numbers, spreads, or None if not measured."""

    title: str
    description: str
    columns: list[Column]
    rows: list[dict[str, Any]] = field(default_factory=list)
    image: str = ""
    """File with a plot of it, relative to the page; empty for none."""


@dataclass(kw_only=True)
class Report:
    """The results of one run of a suite."""

    suite: str
    """Name of the suite, such as "vit"."""
    command: str
    """The command line that repeats the run."""
    machine: Mapping[str, str]
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    day: str = field(default_factory=lambda: date.today().isoformat())
    figures: dict[str, Any] = field(default_factory=dict)
    """The plots, by the file that a table names."""

    def as_json(self) -> dict[str, Any]:
        """Return plain values; a spread is {"median", "low", "high"}. Figures are left out."""
        return json.loads(json.dumps(asdict(replace(self, figures={}))))


def write(report: Report, folder: Path) -> list[Path]:
    """Write a run as a section of `folder`/benchmarks.json and .md, and its figures; sections of other suites stay.

    Returns:
        The files written.

    Raises:
        StorageError: they cannot be written.
    """
    data, page = folder / "benchmarks.json", folder / "benchmarks.md"
    try:
        sections = json.loads(data.read_text())
    except (OSError, ValueError):
        sections = {}
    sections = {**(sections if isinstance(sections, dict) else {}), report.suite: report.as_json()}
    for name, figure in report.figures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        style.save(figure, folder / name)
    write_text_atomically(data, json.dumps(sections, indent=1, ensure_ascii=False) + "\n")
    targets = grid(["target", "required", "measured", ""], judged(sections), [False, True, True, False])
    parts = [
        HEADER,
        "\n".join(["", TARGETS_HEADER, *targets, ""]),
        *("\n" + markdown(sections[name]) for name in sorted(sections)),
    ]
    write_text_atomically(page, "".join(parts))
    return [data, page, *(folder / name for name in report.figures)]


def markdown(section: Mapping[str, Any]) -> str:
    """Return a run, as `Report.as_json` gives it, as a section of the page."""
    lines = [
        f"## {section['suite']}",
        "",
        f"Repeat with `{section['command']}`. Measured on {section['day']}.",
        "",
    ]
    lines += grid(
        ["machine", ""], [[name, words] for name, words in section["machine"].items()], numbers=False
    )
    for note in section["notes"]:
        lines += ["", note]
    for table in section["tables"]:
        columns = table["columns"]
        rows = [[cell(row.get(c["key"]), c["form"]) for c in columns] for row in table["rows"]]
        lines += ["", f"### {table['title']}", "", table["description"], ""]
        lines += grid([c["heading"] for c in columns], rows, [bool(c["form"]) for c in columns])
        if table.get("image"):
            lines += ["", f"![{table['title']}]({table['image']})"]
    return "\n".join(lines) + "\n"


def cell(value: Any, form: str) -> str:
    """Format a value: a spread as "median (low to high)", None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, Spread):
        value = asdict(value)
    if isinstance(value, Mapping):
        median, low, high = (format(value[name], form) for name in ("median", "low", "high"))
        return median if low == high == median else f"{median} ({low} to {high})"
    return format(value, form) if form and not isinstance(value, str) else str(value)


def grid(headings: list[str], rows: list[list[str]], numbers: bool | list[bool] = True) -> list[str]:
    """Return a Markdown table whose source is aligned, too; numbers to the right."""
    right = numbers if isinstance(numbers, list) else [numbers] * len(headings)
    all_rows = [[text.replace("|", "\\|") for text in row] for row in [headings, *rows]]
    widths = [max(3, *(len(row[i]) for row in all_rows)) for i in range(len(headings))]

    def line(row: list[str]) -> str:
        cells = (t.rjust(w) if r else t.ljust(w) for t, w, r in zip(row, widths, right, strict=True))
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)]
    return [line(all_rows[0]), line(rule), *(line(row) for row in all_rows[1:])]
