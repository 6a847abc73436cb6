"""Draw docs/images/architecture.svg: the folders of the package and which imports which.

python tools/make_architecture_image.py
"""

from html import escape
from pathlib import Path

OUT = Path(__file__).parents[1] / "docs" / "images" / "architecture.svg"
WIDTH, HEIGHT = 960, 730
BOX, TALL = 216, 58

# Folder -> left edge, row, what it contains, group.
FOLDERS = {
    "cli": (372, 0, "the command line", "use"),
    "recipes": (60, 1, "complete run configurations", "train"),
    "bench": (372, 1, "benchmarks against references", "use"),
    "plots": (684, 1, "arrays in, figures out", "leaf"),
    "training": (60, 2, "loop, tasks, checkpoints", "train"),
    "pipelines": (684, 2, "pixels and text in, results out", "use"),
    "evaluation": (60, 3, "metrics of trained models", "train"),
    "metrics": (60, 4, "update() and compute()", "leaf"),
    "weights": (372, 4, "checkpoint files and formats", "net"),
    "data": (684, 4, "files to batches", "leaf"),
    "models": (254, 5, "one network per file", "net"),
    "heads": (490, 5, "segmentation heads", "net"),
    "diffusion": (60, 6, "noise, samplers, losses", "leaf"),
    "layers": (372, 6, "attention, patches, windows", "net"),
    "kernels": (684, 6, "fast paths, private PyTorch", "leaf"),
}
# Direct imports; those that follow from others are left out.
ARROWS = [
    ("cli", "recipes"), ("cli", "bench"), ("cli", "plots"), ("bench", "training"),
    ("bench", "pipelines"), ("recipes", "training"), ("training", "evaluation"), ("evaluation", "metrics"),
    ("evaluation", "weights"), ("evaluation", "data"), ("pipelines", "weights"), ("pipelines", "data"),
    ("weights", "models"), ("weights", "heads"), ("models", "layers"), ("models", "diffusion"), ("heads", "layers"),
    ("layers", "kernels"),
]  # fmt: skip
COLORS = {
    "use": ("#e8eefc", "#3b5bdb"),
    "train": ("#e6f4ea", "#2b8a3e"),
    "net": ("#fff4e0", "#d9730d"),
    "leaf": ("#f1f3f5", "#868e96"),
}
GROUPS = {
    "use": "command line and inference",
    "train": "training and evaluation",
    "net": "networks and weights",
    "leaf": "import no other folder",
}


def top(name: str) -> float:
    return 56 + FOLDERS[name][1] * 96


def arrow(start: str, end: str) -> str:
    """A curve from the lower edge of one box to the upper edge of another, or sideways within a row."""
    x0, x1 = FOLDERS[start][0] + BOX / 2, FOLDERS[end][0] + BOX / 2
    if FOLDERS[start][1] == FOLDERS[end][1]:
        y = top(start) + TALL / 2
        return f'<path d="M {x0 + BOX / 2:g} {y:g} H {x1 - BOX / 2 - 7:g}" class="arrow"/>'
    # Arrows that leave for another column start and end a little to that side.
    lean = max(-60, min(60, (x1 - x0) / 5))
    x0, x1 = x0 + lean, x1 - lean
    y0, y1 = top(start) + TALL, top(end) - 7
    bend = (y1 - y0) * 0.6
    return (
        f'<path d="M {x0:g} {y0:g} C {x0:g} {y0 + bend:g} {x1:g} {y1 - bend:g} {x1:g} {y1:g}" class="arrow"/>'
    )


def box(name: str) -> str:
    left, _, text, group = FOLDERS[name]
    fill, line = COLORS[group]
    middle, y = left + BOX / 2, top(name)
    return (
        f'<rect x="{left}" y="{y:g}" width="{BOX}" height="{TALL}" rx="8" fill="{fill}" stroke="{line}"/>'
        f'<text x="{middle:g}" y="{y + 25:g}" class="name">{name}/</text>'
        f'<text x="{middle:g}" y="{y + 44:g}" class="what">{escape(text)}</text>'
    )


def legend() -> str:
    parts = []
    for i, (group, text) in enumerate(GROUPS.items()):
        fill, line = COLORS[group]
        x = 60 + i * 215
        parts.append(f'<rect x="{x}" y="14" width="16" height="16" rx="4" fill="{fill}" stroke="{line}"/>')
        parts.append(f'<text x="{x + 24}" y="27" class="key">{text}</text>')
    return "".join(parts)


def main() -> None:
    style = (
        "text{font-family:system-ui,Segoe UI,Helvetica,Arial,sans-serif;text-anchor:middle;fill:#212529}"
        ".name{font-size:16px;font-weight:600}.what{font-size:12.5px;fill:#495057}"
        ".key{font-size:13px;text-anchor:start}.arrow{fill:none;stroke:#adb5bd;stroke-width:1.6;marker-end:url(#head)}"
    )
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="2" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M 0 0 L 8 4 L 0 8 z" fill="#868e96"/></marker>'
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        f"<title>Folders of triptych and their imports</title><style>{style}</style><defs>{head}</defs>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        legend(),
        *(arrow(*pair) for pair in ARROWS),
        *map(box, FOLDERS),
        "</svg>",
    ]
    OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
