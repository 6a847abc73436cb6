"""Tables in the README that scripts write: each stands between two comments."""

from collections.abc import Sequence
from pathlib import Path

from triptych.atomic_write import write_text_atomically

README = Path(__file__).parents[1] / "README.md"


def write_table(script: str, lines: Sequence[str]) -> None:
    """Put `lines` between the comment that names `script` and the next end comment, and show them."""
    begin, end = f"<!-- written by tools/{script} -->\n", "<!-- end -->"
    before, rest = README.read_text(encoding="utf-8").split(begin)
    write_text_atomically(README, before + begin + "\n".join(lines) + "\n" + end + rest.split(end, 1)[1])
    print("\n".join(lines))
