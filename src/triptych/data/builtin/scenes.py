"""The built-in data set for dense prediction: emoji drawings on procedural backgrounds, with exact masks.

A scene depends only on (split, seed, index) and is generated on demand: 128 x 128 pixels take about 3 ms on one core,
so a training run need not use a scene twice. As in `emoji`, training scenes use the training styles and test scenes the
held-out style: test scores measure how well a network segments drawings of an unseen style.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from os import PathLike

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from triptych.data.builtin.emoji import EmojiSource, emoji, with_article
from triptych.data.builtin.procedural_backgrounds import random_background
from triptych.data.example import Box, Example
from triptych.errors import ConfigError

SCENE_VERSION = 1  # part of the fingerprint; increase it when scenes change
DEFAULT_COUNTS = {"train": 20_000, "test": 500}
MIN_DRAWINGS, MAX_DRAWINGS = 2, 6  # drawings in a scene
_SIDE = (0.24, 0.62)  # side of a drawing, in units of the scene's shorter side
DEGREES = 30  # largest rotation
VISIBLE = 0.6  # smallest fraction of a drawing that is inside the scene and not covered
MAX_TRIES = 40  # positions tried per scene


class SceneSource:
    """Scenes as a sequence of `Example`s. Small to pickle.

    Attributes:
        name: name of the data set and split, such as "scenes-train".
        mask_classes: "background" and the six groups of the emoji.
        classes, labels: None, since a scene has no single class.
    """

    classes = labels = mask_colors = None

    def __init__(self, drawings: EmojiSource, count: int, size: tuple[int, int], seed: int):
        self.drawings, self.count, self.size, self.seed = drawings, count, size, seed
        self.name = f"scenes-{drawings.split}"
        self.groupings: dict[str, tuple[str, ...]] = {}
        groups = tuple(dict.fromkeys(drawings.groupings["group"]))
        self.mask_classes = ("background", *groups)
        group_of = np.array([groups.index(group) for group in drawings.groupings["group"]])[drawings.labels]
        self._by_group = [np.flatnonzero(group_of == group) for group in range(len(groups))]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int, /) -> Example:
        """Return a scene: uint8 image (h, w, 3), mask (h, w), a box per drawing, and a caption, both from left to
        right."""
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range: {self.name} has {len(self)} scenes")
        index %= len(self)
        # The split is part of the seed, so that training and test scenes have different backgrounds.
        rng = np.random.default_rng([self.seed % 2**64, self.drawings.split == "test", index])
        canvas = Image.fromarray(random_background(rng, self.size))
        mask, boxes, names = self._paste(canvas, rng)
        return Example(np.array(canvas), None, _join_names(names), f"{self.name}/{index}", mask, boxes)

    @property
    def captions(self) -> list[tuple[str, ...]]:
        """Caption of each scene. All scenes are generated for it."""
        return [(example.caption or "",) for example in (self[i] for i in range(len(self)))]

    def _paste(
        self, canvas: Image.Image, rng: np.random.Generator
    ) -> tuple[UInt8[np.ndarray, "h w"], tuple[Box, ...], list[str]]:
        """Paste drawings on the canvas, later ones over earlier ones; return the mask, and boxes and names from left to
        right."""
        owner = np.zeros(self.size, np.uint8)  # number of the drawing that is visible at a pixel, or 0
        labels, names = [0], ["background"]
        areas, visible = (  # pixels of each drawing
            np.zeros(MAX_DRAWINGS + 1, int),
            np.zeros(MAX_DRAWINGS + 1, int),
        )
        wanted = int(rng.integers(MIN_DRAWINGS, MAX_DRAWINGS + 1))
        for _ in range(MAX_TRIES):
            number = len(names)
            if number > wanted:
                break
            sprite, label, name = self._sprite(rng)
            top, left = (_random_start(side, sprite.width, rng) for side in self.size)
            here = owner[max(top, 0) : top + sprite.height, max(left, 0) : left + sprite.width]
            # A pixel belongs to the drawing if at least half of it is covered.
            solid = np.asarray(sprite.getchannel("A")) >= 128
            covered = solid[max(-top, 0) :, max(-left, 0) :][: here.shape[0], : here.shape[1]]
            remaining = visible - np.bincount(here[covered], minlength=MAX_DRAWINGS + 1)
            remaining[0], remaining[number], areas[number] = 0, covered.sum(), solid.sum()
            if remaining[number] == 0 or (remaining[: number + 1] < VISIBLE * areas[: number + 1]).any():
                continue
            here[covered], visible = number, remaining
            canvas.paste(sprite, (left, top), sprite)
            labels.append(label)
            names.append(name)
        boxes = [_box(owner == number, label) for number, label in enumerate(labels)][1:]
        order = sorted(range(len(boxes)), key=lambda i: boxes[i].x0 + boxes[i].x1)
        mask = np.array(labels, np.uint8).take(owner)
        return mask, tuple(boxes[i] for i in order), [names[i + 1] for i in order]

    def _sprite(self, rng: np.random.Generator) -> tuple[Image.Image, int, str]:
        """Draw a random drawing: the transformed image, its mask class and its name. Groups are equally likely."""
        group = int(rng.integers(len(self._by_group)))
        members = self._by_group[group]
        drawing = self.drawings[int(members[rng.integers(len(members))])]
        assert drawing.label is not None
        name = self.drawings.classes[drawing.label]
        return _transform_drawing(np.asarray(drawing.image), rng, min(self.size)), group + 1, name

    def __repr__(self) -> str:
        height, width = self.size
        styles = ", ".join(style.name for style in self.drawings.styles)
        return f"<{self.name}: {len(self)} scenes of {height} x {width} with drawings in {styles}>"

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the drawings and of everything else that a scene depends on."""
        parts = (self.drawings.fingerprint, self.count, self.size, self.seed, SCENE_VERSION)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def contents(self) -> None:
        """Return None: built-in data does not change."""

    def image_digests(self) -> None:
        """Return None: its drawings have one origin."""


def scenes(
    split: str = "train",
    count: int | None = None,
    size: tuple[int, int] = (128, 128),
    root: str | PathLike[str] | None = None,
    seed: int = 0,
) -> SceneSource:
    """Open scenes of 2 to 6 emoji drawings, which may partly cover each other, with the class of each pixel.

    Args:
        split: "train", or "test" (also "val" or "eval"), which has the held-out drawing style.
        count: number of scenes; None means 20,000 for training, too many for the loader's cache, and 500 for testing.
        size: height and width in pixels, at least 32. Drawings have 64 pixels and blur when they are enlarged.
        root: a folder written by `tools/make_emoji.py` with more styles, as for `emoji`.
        seed: seed of the scenes; scene k depends on the seed and not on `count`.

    Raises:
        ConfigError: an unknown split, or a count or size that is too small.
        DataError: a `root` without the data.
    """
    named = {"val": "test", "eval": "test"}.get(split, split)
    if named not in ("train", "test"):
        raise ConfigError(f"unknown split {split!r} of scenes; choose train or test")
    if count is not None and count < 1:
        raise ConfigError(f"count is {count}; scenes need at least 1")
    if min(size) < 32:
        raise ConfigError(f"size is {size[0]} x {size[1]}; scenes need at least 32 pixels along each side")
    return SceneSource(emoji(named, root=root), count or DEFAULT_COUNTS[named], size, seed)


def _transform_drawing(
    drawing: UInt8[np.ndarray, "c c 4"], rng: np.random.Generator, unit: int
) -> Image.Image:
    """Resize, rotate and perhaps mirror a drawing at random; return a square RGBA image."""
    cell = len(drawing)
    side = unit * np.exp(rng.uniform(*np.log(_SIDE)))
    angle = np.radians(rng.uniform(-DEGREES, DEGREES))
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    # A transparent border, so that drawings that fill their cell get smooth edges.
    rimmed = np.zeros((cell + 4, cell + 4, 4), np.uint8)
    rimmed[2:-2, 2:-2] = drawing
    image = Image.fromarray(rimmed).convert("RGBa")  # premultiplied, so that it can be interpolated
    if side < 0.6 * cell:  # bilinear interpolation reads only 2 x 2 pixels
        image = image.reduce(2)
    pixels = image.width * cell / (cell + 4) / side  # of the drawing per pixel of the scene
    cos, sin = np.cos(angle) * pixels, np.sin(angle) * pixels
    extent = int(np.ceil(side * (abs(np.cos(angle)) + abs(np.sin(angle))))) + 2
    middle, to = extent / 2, image.width / 2
    a, b, c, d = mirror * cos, mirror * sin, -sin, cos
    matrix = (a, b, to - middle * (a + b), c, d, to - middle * (c + d))
    resampling = Image.Resampling.BILINEAR if pixels > 0.8 else Image.Resampling.BICUBIC
    return image.transform((extent, extent), Image.Transform.AFFINE, matrix, resampling).convert("RGBA")


def _random_start(side: int, extent: int, rng: np.random.Generator) -> int:
    """Draw where a sprite begins along a side of the scene; up to a quarter of it may lie outside."""
    return int(rng.integers(-extent // 4, max(side - extent * 3 // 4, 1 - extent // 4)))


def _box(visible: np.ndarray, label: int) -> Box:
    y, x = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    return Box(label, int(x[0]), int(y[0]), int(x[-1]) + 1, int(y[-1]) + 1)


def _join_names(names: list[str]) -> str:
    """Join names with articles: "a red apple, an owl and scissors"."""
    things = [with_article(name) for name in names]
    return " and ".join([", ".join(things[:-1]), things[-1]] if len(things) > 1 else things)
