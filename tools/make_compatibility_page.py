"""Write docs/compatibility.md: every format that is read or written, and what proves it.

    python tools/make_compatibility_page.py

The page is made from the tests: `@pytest.mark.proves(SECTION, FORMAT, by=..., reads=True, writes=False)`, where `by` is
the name of the package that the test compares with, or one of `PROOFS`.
"""

import contextlib
import importlib.metadata
import io
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
SECTIONS = (
    "Checkpoints",
    "LoRA and embeddings",
    "Prompts and generation metadata",
    "Samplers",
    "Data",
    "Export",
)
PROOFS = {
    "names": "published names and shapes",
    "formula": "published formulas, in the test",
    "file": "a real file",
    "recorded": "results that the program gave",
}
HEAD = """# Compatibility

Each row is a format of another program, and what the test in the last column compares with. "Published names and
shapes" means that the original code cannot be installed next to a current PyTorch: names and shapes are those of its
source or of its files, and numbers were not compared with it.

This page is written by `python tools/make_compatibility_page.py` from the marks of the tests.
"""


@dataclass(frozen=True)
class Proof:
    """A test that proves a format."""

    section: str
    format: str
    by: str
    reads: bool
    writes: bool
    test: str

    @property
    def reference(self) -> str:
        """What the test compares with, and its version."""
        if self.by in PROOFS:
            return PROOFS[self.by]
        return f"{self.by} {importlib.metadata.version(self.by)}"

    @property
    def directions(self) -> str:
        return ", ".join(word for word, holds in (("read", self.reads), ("written", self.writes)) if holds)


def proof_of(
    section: str, format: str, *, by: str, reads: bool = True, writes: bool = False, test: str
) -> Proof:
    """Return what a mark says.

    Raises:
        ValueError: an unknown section.
    """
    if section not in SECTIONS:
        raise ValueError(f"{test} names the section {section!r}; there are {', '.join(SECTIONS)}")
    return Proof(section, format, by, reads, writes, test)


class Collector:
    """Collects the marks of all tests."""

    def __init__(self) -> None:
        self.proofs: list[Proof] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("proves"):
                path = item.path.relative_to(ROOT).as_posix()
                self.proofs.append(proof_of(*mark.args, **mark.kwargs, test=path))


def collect() -> list[Proof]:
    """Return the proofs of all tests, each once, in the order of the sections."""
    collector = Collector()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(
            ["--collect-only", "-q", "-p", "no:cacheprovider", str(ROOT / "tests")], plugins=[collector]
        )
    proofs = dict.fromkeys(collector.proofs)
    return sorted(proofs, key=lambda proof: (SECTIONS.index(proof.section), proof.format.lower(), proof.by))


def page(proofs: list[Proof]) -> str:
    """Return the page as Markdown."""
    lines = [HEAD]
    for section in SECTIONS:
        rows = [proof for proof in proofs if proof.section == section]
        if rows:
            lines += [f"## {section}\n", "| format | direction | compared with | test |", "|---|---|---|---|"]
            lines += [f"| {p.format} | {p.directions} | {p.reference} | `{p.test}` |" for p in rows]
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(collect()))
