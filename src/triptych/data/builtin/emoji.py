"""The built-in data set: emoji drawings with labels, captions and two coarser groupings, by drawing style.

Training styles and the test style draw the same concepts by different hands, so test accuracy asks whether a
network knows what a red apple looks like, not whether it has seen this apple. `tools/make_emoji.py` made the
files.

    train: fluent-3d (MIT), noto, noto-v1 (Apache-2.0)        test: twemoji (CC BY 4.0)
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from triptych.data.example import Example
from triptych.errors import UserError, near_names

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "emoji"
EMOJI_SPLITS = ("train", "test", "all")
Split = Literal["train", "test", "all"]


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One class: what is drawn, whatever the hand."""

    id: str  # Unicode code points, lower case, without variation selectors: "1f34e"
    emoji: str
    label: str  # "red apple"
    tags: tuple[str, ...]  # ("fruit", "ripe", ...)
    group: str  # one of 6, "food-drink"
    subgroup: str  # one of 65, "food-fruit"


@dataclass(frozen=True, kw_only=True)
class Style:
    """One hand: an atlas of cells, each showing a concept."""

    name: str
    split: Literal["train", "test"]
    family: str  # styles of one family are redrawings of each other, never on both sides of a split
    license: str  # SPDX, of the artwork
    credit: str
    source: str
    cells: tuple[int, ...]  # the concept in each cell, row by row


class EmojiSource:
    """Emoji drawings as a sequence of `Example`s. Small to pickle; an atlas is decoded at first use.

    Attributes:
        name: "emoji-train"; classes: label of each class, the same tuple for every split and style.
        groupings: {"subgroup": ..., "group": ...}, a coarser name for each class.
        mask_classes: None, there are no masks.
        labels: int64 (n,), the class of each example; concepts: one `Concept` a class; styles: the chosen.
    """

    mask_classes = mask_colors = None

    def __init__(
        self, root: Path, split: Split, styles: Sequence[str] | None, background: tuple[int, int, int] | None
    ):
        concepts, everything, self._cell, self._columns = _read_table(root)
        self.root, self.split, self.background = root, split, background
        self.name = f"emoji-{split}"
        self.concepts = concepts
        self.styles = _choose(everything, split, styles, root)
        self.classes = tuple(c.label for c in concepts)
        self.groupings = {
            "subgroup": tuple(c.subgroup for c in concepts),
            "group": tuple(c.group for c in concepts),
        }
        self.labels = np.array([concept for style in self.styles for concept in style.cells], np.int64)
        self._starts = np.cumsum([0, *(len(style.cells) for style in self.styles)])

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        """Example `index`: uint8 (64, 64, 4) with straight alpha, or (64, 64, 3) pasted on the background."""
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} examples, asked for number {index}")
        index %= len(self)
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        style, cell = self.styles[which], index - int(self._starts[which])
        concept = self.concepts[style.cells[cell]]
        # A style may draw a concept more than once, in neighbouring cells: they are told apart by -2, -3.
        again = cell - style.cells.index(style.cells[cell]) + 1
        return Example(
            image=self._image(style, cell),
            label=style.cells[cell],
            caption=f"{concept.label}, {style.name} style",
            id=f"{style.name}/{concept.id}" + (f"-{again}" if again > 1 else ""),
        )

    @cached_property
    def captions(self) -> list[tuple[str, ...]]:
        """What each drawing may be called, its plain caption first: with an article or without, with its style before
        or behind, without any, and with two of its tags."""
        return [
            _captions_of(self.concepts[concept], style.name)
            for style in self.styles
            for concept in style.cells
        ]

    def __repr__(self) -> str:
        hands = ", ".join(s.name for s in self.styles)
        return f"<{self.name}: {len(self)} drawings of {len(self.classes)} concepts by {hands}>"

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the bytes of the table and the chosen atlases, and of the choice."""
        digest = hashlib.sha256((self.root / "emoji.json").read_bytes())
        for style in self.styles:
            digest.update(style.name.encode() + _atlas_path(self.root, style.name).read_bytes())
        digest.update(repr((self.split, self.background)).encode())
        return digest.hexdigest()[:32]

    def contents(self) -> None:
        """None: what is built in does not change."""

    def _image(self, style: Style, cell: int) -> np.ndarray:
        atlas, size = _decode_atlas(self.root, style.name), self._cell
        y, x = cell // self._columns * size, cell % self._columns * size
        drawing = atlas[y : y + size, x : x + size]
        if self.background is None:
            return drawing.copy()  # the caller may write into it; the atlas is shared
        alpha = drawing[..., 3:].astype(np.float32) / 255
        pasted = drawing[..., :3] * alpha + np.array(self.background, np.float32) * (1 - alpha)
        return pasted.round().astype(np.uint8)


def _captions_of(concept: Concept, style: str) -> tuple[str, ...]:
    label, named = concept.label, with_article(concept.label)
    captions = [f"{label}, {style} style", f"{named}, {style} style", f"{style} style {label}", named]
    fresh = [tag for tag in concept.tags if tag not in label]
    if fresh:
        captions.append(f"{label}, {', '.join(fresh[:2])}, {style} style")
    subgroup_name = concept.subgroup.replace("-", " ")
    return (*captions, f"{subgroup_name}: {label}, {style} style")


def with_article(name: str) -> str:
    """ "an owl", "scissors"."""
    plural = name.endswith("s") and not name.endswith(("ss", "us", "is"))
    return name if plural else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def emoji(
    split: Split = "train",
    styles: Sequence[str] | str | None = None,
    root: str | PathLike[str] | None = None,
    background: tuple[int, int, int] | None = None,
) -> EmojiSource:
    """The built-in emoji drawings.

    Args:
        split: "train", "test" (a hand never trained on) or "all".
        styles: only these drawing styles, which must belong to the split; None is all of them.
        root: a folder that `tools/make_emoji.py --styles all --out FOLDER` made, with twice the training
            drawings; None is what is shipped. Classes and test drawings are the same.
        background: RGB 0..255 to paste the drawings on; None leaves them transparent.

    Returns:
        A source of 64 x 64 `Example`s, in the same order every time.

    Raises:
        UserError: an unknown split or style, or a `root` without the data.
    """
    if split not in EMOJI_SPLITS:
        raise UserError(f"unknown split {split!r} of emoji; choose one of {', '.join(EMOJI_SPLITS)}")
    if background is not None and (len(background) != 3 or not all(0 <= v <= 255 for v in background)):
        raise UserError(f"background is {background!r}; it must be three numbers from 0 to 255")
    if isinstance(styles, str):
        styles = styles.split(",")
    return EmojiSource(Path(root).resolve() if root is not None else ASSETS, split, styles, background)


def _choose(
    styles: tuple[Style, ...], split: Split, names: Sequence[str] | None, root: Path
) -> tuple[Style, ...]:
    here = tuple(s for s in styles if split in ("all", s.split))
    if names is None:
        return here
    if not names:
        raise UserError(
            f"no emoji style was named; leave styles out, or choose from {', '.join(s.name for s in here)}"
        )
    known = {s.name: s for s in styles}
    for name in names:
        if name not in known:
            near = near_names(name, known) or list(known)
            raise UserError(f"unknown emoji style {name!r} in {root}; did you mean {' or '.join(near)}?")
        if split not in ("all", known[name].split):
            raise UserError(
                f"emoji style {name!r} belongs to split {known[name].split!r}, not {split!r}; "
                f"choose from {', '.join(s.name for s in here)}"
            )
    return tuple(
        s for s in here if s.name in names
    )  # in the table's order, whatever order they were named in


@lru_cache(maxsize=8)
def _read_table(root: Path) -> tuple[tuple[Concept, ...], tuple[Style, ...], int, int]:
    path = root / "emoji.json"
    try:
        table: dict[str, Any] = json.loads(path.read_bytes())
        concepts = tuple(
            Concept(
                id=c["id"],
                emoji=c["emoji"],
                label=c["label"],
                tags=tuple(c["tags"]),
                group=c["group"],
                subgroup=c["subgroup"],
            )
            for c in table["concepts"]
        )
        styles = tuple(
            Style(
                name=s["name"],
                split=s["split"],
                family=s["family"],
                license=s["licence"],
                credit=s["credit"],
                source=s["source"],
                cells=tuple(s["cells"]),
            )
            for s in table["styles"]
        )
        return concepts, styles, table["cell"], table["columns"]
    except OSError as problem:
        raise UserError(
            f"no emoji data in {root} (emoji.json: {problem.strerror}); "
            f"make it with tools/make_emoji.py --out {root}"
        ) from problem
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(
            f"{path} is not an emoji table ({problem}); make it again with tools/make_emoji.py"
        ) from problem


def _atlas_path(root: Path, style: str) -> Path:
    path = root / f"{style}.webp"
    if not path.is_file():
        raise UserError(
            f"the drawings {path} are missing; make them again with tools/make_emoji.py --out {root}"
        )
    return path


@lru_cache(maxsize=16)
def _decode_atlas(root: Path, style: str) -> np.ndarray:
    """uint8 (H, W, 4), read-only: looked for and decoded once a process."""
    path = _atlas_path(root, style)
    try:
        with Image.open(path) as image:
            atlas = np.asarray(image.convert("RGBA"))
    except OSError as problem:
        raise UserError(
            f"{path} cannot be decoded ({problem}); make it again with tools/make_emoji.py"
        ) from problem
    atlas.setflags(write=False)
    return atlas
