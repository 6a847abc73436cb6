"""Tables in docs/shipped-networks.md that scripts write: each is between two comments."""

from collections.abc import Sequence
from pathlib import Path

from triptych.atomic_write import write_text_atomically

PAGE = Path(__file__).parents[1] / "docs" / "shipped-networks.md"


def write_table(script: str, lines: Sequence[str]) -> None:
    """Replace what is between the comment that names `script` and the next end comment by `lines`, and print them."""
    begin, end = f"<!-- written by tools/{script} -->\n", "<!-- end -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    write_text_atomically(PAGE, before + begin + "\n".join(lines) + "\n" + end + rest.split(end, 1)[1])
    print("\n".join(lines))
