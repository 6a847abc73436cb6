"""The built-in data set: emoji drawings with labels, captions and two coarser groupings, by drawing style.

The training styles and the test style show the same concepts, drawn by different artists. Test accuracy therefore
measures whether a network recognizes a red apple in an unseen style, not whether it remembers a training image. The
files are written by `tools/make_emoji.py`.

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
from triptych.errors import ConfigError, DataError, near_names

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "emoji"
EMOJI_SPLITS = ("train", "test", "all")
Split = Literal["train", "test", "all"]


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A class: what a drawing shows, in any style."""

    id: str  # Unicode code points, lower case, without variation selectors: "1f34e"
    emoji: str
    label: str  # "red apple"
    tags: tuple[str, ...]  # ("fruit", "ripe", ...)
    group: str  # one of 6, "food-drink"
    subgroup: str  # one of 65, "food-fruit"


@dataclass(frozen=True, kw_only=True)
class Style:
    """A drawing style: an atlas of cells, each of which shows a concept."""

    name: str
    split: Literal["train", "test"]
    family: str  # styles of one family show the same drawings, so all of them belong to the same split
    license: str  # SPDX identifier of the artwork's license
    credit: str
    source: str
    cells: tuple[int, ...]  # class index of each cell, row by row


class EmojiSource:
    """Emoji drawings as a sequence of `Example`s. Small to pickle; an atlas is decoded when it is first used.

    Attributes:
        name: name of the data set and split, such as "emoji-train".
        classes: label of each class, the same tuple for every split and style.
        groupings: {"subgroup": ..., "group": ...}, a coarser name for each class.
        mask_classes: None, since there are no masks.
        labels: int64 (n,), class of each example.
        concepts: `Concept` of each class.
        styles: the chosen styles.
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
        """Return an example whose image is uint8: (64, 64, 4) with straight alpha, or (64, 64, 3) with a background."""
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range: {self.name} has {len(self)} examples")
        index %= len(self)
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        style, cell = self.styles[which], index - int(self._starts[which])
        concept = self.concepts[style.cells[cell]]
        # A style may show a concept several times, in adjacent cells: -2, -3 ... make the names unique.
        again = cell - style.cells.index(style.cells[cell]) + 1
        return Example(
            image=self._image(style, cell),
            label=style.cells[cell],
            caption=f"{concept.label}, {style.name} style",
            id=f"{style.name}/{concept.id}" + (f"-{again}" if again > 1 else ""),
        )

    @cached_property
    def captions(self) -> list[tuple[str, ...]]:
        """All captions of each drawing, the default one first: with and without an article, with the style at the
        front, at the end or left out, and with two of the tags."""
        return [
            _captions_of(self.concepts[concept], style.name)
            for style in self.styles
            for concept in style.cells
        ]

    def __repr__(self) -> str:
        styles = ", ".join(s.name for s in self.styles)
        return f"<{self.name}: {len(self)} drawings of {len(self.classes)} concepts in {styles}>"

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the table, the chosen atlases, the split and the background."""
        digest = hashlib.sha256((self.root / "emoji.json").read_bytes())
        for style in self.styles:
            digest.update(style.name.encode() + _atlas_path(self.root, style.name).read_bytes())
        digest.update(repr((self.split, self.background)).encode())
        return digest.hexdigest()[:32]

    def contents(self) -> None:
        """Return None: built-in data does not change."""

    def image_digests(self) -> None:
        """Return None: its drawings have one origin."""

    def _image(self, style: Style, cell: int) -> np.ndarray:
        atlas, size = _decode_atlas(self.root, style.name), self._cell
        y, x = cell // self._columns * size, cell % self._columns * size
        drawing = atlas[y : y + size, x : x + size]
        if self.background is None:
            return drawing.copy()  # callers may write to it, and the atlas is shared
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
    """Add an indefinite article unless the name is a plural: "an owl", "scissors"."""
    plural = name.endswith("s") and not name.endswith(("ss", "us", "is"))
    return name if plural else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def emoji(
    split: Split = "train",
    styles: Sequence[str] | str | None = None,
    root: str | PathLike[str] | None = None,
    background: tuple[int, int, int] | None = None,
) -> EmojiSource:
    """Open the built-in emoji drawings.

    Args:
        split: "train", "test" (a held-out style) or "all".
        styles: names of the drawing styles to use, or a string that lists them, separated by commas; they must belong
            to the split. None uses all of them.
        root: a folder written by `tools/make_emoji.py --styles all --out FOLDER`, which has twice as many training
            drawings; None uses the shipped files. Classes and test drawings are the same.
        background: RGB from 0 to 255 to composite the drawings over; None keeps them transparent.

    Returns:
        A source of `Example`s of 64 x 64 pixels, always in the same order.

    Raises:
        ConfigError: an unknown split or style, or an invalid background.
        DataError: a `root` without the data.
    """
    if split not in EMOJI_SPLITS:
        raise ConfigError(f"unknown split {split!r} of emoji; choose one of {', '.join(EMOJI_SPLITS)}")
    if background is not None and (len(background) != 3 or not all(0 <= v <= 255 for v in background)):
        raise ConfigError(f"background is {background!r}; it must be three numbers from 0 to 255")
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
        raise ConfigError(
            f"the list of emoji styles is empty; omit styles, or choose from {', '.join(s.name for s in here)}"
        )
    known = {s.name: s for s in styles}
    for name in names:
        if name not in known:
            near = near_names(name, known) or list(known)
            raise ConfigError(f"unknown emoji style {name!r} in {root}; did you mean {' or '.join(near)}?")
        if split not in ("all", known[name].split):
            raise ConfigError(
                f"emoji style {name!r} belongs to split {known[name].split!r}, not {split!r}; "
                f"choose from {', '.join(s.name for s in here)}"
            )
    return tuple(s for s in here if s.name in names)  # in the table's order, not that of `names`


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
                license=s["licence"],  # words: quoted
                credit=s["credit"],
                source=s["source"],
                cells=tuple(s["cells"]),
            )
            for s in table["styles"]
        )
        return concepts, styles, table["cell"], table["columns"]
    except OSError as problem:
        raise DataError(
            f"no emoji data in {root} (emoji.json: {problem.strerror}); "
            f"create it with tools/make_emoji.py --out {root}"
        ) from problem
    except (ValueError, KeyError, TypeError) as problem:
        raise DataError(
            f"{path} is not an emoji table ({problem}); recreate it with tools/make_emoji.py"
        ) from problem


def _atlas_path(root: Path, style: str) -> Path:
    path = root / f"{style}.webp"
    if not path.is_file():
        raise DataError(
            f"the drawings {path} are missing; recreate them with tools/make_emoji.py --out {root}"
        )
    return path


@lru_cache(maxsize=16)
def _decode_atlas(root: Path, style: str) -> np.ndarray:
    """Return the atlas of a style as uint8 (H, W, 4), read-only. It is decoded once per process."""
    path = _atlas_path(root, style)
    try:
        with Image.open(path) as image:
            atlas = np.asarray(image.convert("RGBA"))
    except OSError as problem:
        raise DataError(
            f"{path} cannot be decoded ({problem}); recreate it with tools/make_emoji.py"
        ) from problem
    atlas.setflags(write=False)
    return atlas
