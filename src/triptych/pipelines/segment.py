"""Pictures in, a class for each pixel out."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from triptych.card import Preprocess
from triptych.data.images import FILTERS
from triptych.errors import UserError
from triptych.hardware import say_dtype
from triptych.heads.segmenter import Segmenter
from triptych.network import Network
from triptych.pipelines.palette import colours_of
from triptych.pipelines.pipeline import PicturePipeline, batches
from triptych.pipelines.pixels import Picture, name_of, normalised, whole
from triptych.pipelines.segmentation import Segmentation
from triptych.pipelines.strips import Held, Mirrored, Sliding, Strip, parsed

LONGEST = 8
"""Of a card that crops: a picture longer than this, in shorter sides, is squeezed to it."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How a picture is looked at: at which size, in which pieces, and how often. Checked when made."""

    size: int | tuple[int, int] | None = None
    """The picture is resized, its aspect kept: to this shorter side, or as large as fits into this height and width.
    None: as the card says, or not at all with a window."""
    window: int | tuple[int, int] | None = None
    """Height and width in pixels of a window that slides over the picture; one number for a square."""
    overlap: float = 0.5
    """Of neighbouring windows, at least, as a share of the window."""
    scales: tuple[float, ...] = (1.0,)
    """The picture is looked at once at each of these, relative to that size, and the probabilities are averaged."""
    flip: bool = False
    """Each time the mirrored picture, too."""

    def __post_init__(self):
        if not _pixels(self.size):
            raise UserError(
                f"size is {self.size!r}, which must be a side in pixels, or (height, width) to fit into"
            )
        if not _pixels(self.window):
            raise UserError(
                f"window is {self.window!r}, which must be (height, width) in pixels, or one number"
            )
        if not _number(self.overlap) or not 0 <= self.overlap < 1:
            raise UserError(f"overlap is {self.overlap!r}, which must be at least 0 and below 1")
        if not self.scales or not all(_number(scale) and 0 < scale <= 16 for scale in self.scales):
            raise UserError(
                f"scales is {self.scales!r}, which must be numbers above 0 and up to 16: (0.5, 1.0, 1.5)"
            )

    @property
    def count(self) -> int:
        return len(self.scales) * (2 if self.flip else 1)


@dataclass(frozen=True)
class _Read:
    """A picture, and what of it is fed: at each scale all of it, and where it lies in that."""

    pixels: UInt8[np.ndarray, "H W 3"]
    fed: list[UInt8[np.ndarray, "_ _ 3"]]
    inner: list[tuple[slice, slice]]


class SegmentationPipeline(PicturePipeline):
    """A segmenter with what surrounds it: reading, resizing, windows, scales, batching, names, colours.

    ```python
    pipe = tp.SegmentationPipeline(net)             # or a name, a file, a RUN folder, a hub id
    found = pipe("street.jpg")                      # <street.jpg: road 34.1%, building 22.0%, sky 15.3%>
    found.labels, found.areas, found.overlay()
    pipe("large.jpg", window=(512, 512))            # a window slides over the picture at its own size
    pipe("street.jpg", scales=(0.5, 1.0, 1.5), flip=True)
    for found in pipe("folder/"): found.save("parsed")
    ```

    Without further words a picture of whatever size is looked at once, whole, at the size that the card names; nothing
    of it is cut off. A card that squashes gets it squashed; one that crops gets the whole picture with its shorter side
    as before the crop, and one that pads gets it inside its padding. So detail of a large picture is lost, as in
    training; `size` looks closer, and `window` at every pixel, in bounded memory.

    Args:
        net: a `Segmenter`, or what `tp.load` takes. Or any module with `config.num_classes` and `card` that turns
            normalised images (B, C, H, W) into logits (B, classes, H, W).
        device, dtype, workers, on_bad_image: as in `ClassificationPipeline`.
        batch_size: pictures, or windows, a forward pass.
        colours: red, green and blue of each class, from 0 to 255; ours if left out.

    Raises:
        UserError: the network is a classifier, or an argument is out of its range.
    """

    def __init__(
        self,
        net: nn.Module | str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int = 4,
        workers: int = 0,
        on_bad_image: Literal["skip", "fail"] = "fail",
        colours: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(net, device, dtype, batch_size, workers, on_bad_image)
        self.colours = colours_of(self.classes, colours or self.card.colours)
        # Below one patch there is nothing to see.
        self.least = self.net.backbone.strides[0] if isinstance(self.net, Segmenter) else 1

    def check(self, net: Any) -> None:
        named, kind = self.source or "the network", type(net).__name__
        if isinstance(net, Network) and not isinstance(net, Segmenter):
            if getattr(net.config, "num_classes", 0):
                raise UserError(
                    f"{named} is a classifier ({kind}), which names whole pictures; use ClassificationPipeline or "
                    "`triptych classify`, or give a segmenter"
                )
            raise UserError(f"{named} is a {kind}, which gives no class for each pixel; give a segmenter")

    def __call__(
        self,
        images: Any,
        *,
        size: int | tuple[int, int] | None = None,
        window: int | tuple[int, int] | None = None,
        overlap: float = 0.5,
        scales: tuple[float, ...] = (1.0,),
        flip: bool = False,
        confidence: bool = False,
    ) -> Any:
        """Parse one picture, several, or a stream of them.

        Args:
            images: one picture (path, bytes of a file, PIL image, uint8 array) gives a `Segmentation`; a list or tuple
                gives a list; the path of a folder (everything below it) and any other iterable give an iterator that
                reads a few at a time.
            size: resize the picture, its aspect kept, to this shorter side in pixels, or to fit into (height, width).
            window: slide a window of (height, width) pixels, or of this side, over the picture: over one of its own
                size, unless `size` is given. Logits are blended where windows overlap.
            overlap: of neighbouring windows, at least, as a share of the window.
            scales: look at the picture at each of these relative sizes; probabilities are averaged.
            flip: average with the mirrored picture, too.
            confidence: keep the probability of each pixel's class.

        Raises:
            UserError: a picture cannot be read; a folder has none; an argument is out of its range.
        """
        passes = Passes(size=size, window=window, overlap=overlap, scales=tuple(scales), flip=flip)
        self._check(passes)
        return self.answer(
            images,
            lambda one: self._parse([(name_of(one), self._read(one, passes))], passes, confidence)[0],
            lambda many: self.stream(many, passes, confidence),
        )

    def stream(
        self, pictures: Iterable[Picture], passes: Passes | None = None, confidence: bool = False
    ) -> Iterator[Segmentation]:
        """Results in the order of the pictures; a few pictures, and what `workers` read ahead, are held."""
        passes = passes or Passes()
        self._check(passes)
        for some in batches(
            self.readable(pictures, lambda one: self._read(one, passes)),
            max(1, self.batch_size // passes.count),
        ):
            yield from self._parse(some, passes, confidence)

    @torch.inference_mode()
    def logits(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        """Normalised images to logits in fp32, on the pipeline's device."""
        say_dtype(self.dtype, self.device)
        made = self.net(images.to(self.device, self.dtype)).float()
        expected = (len(images), self.config.num_classes, *images.shape[-2:])
        if made.shape != expected:
            raise UserError(
                f"the network gives {tuple(made.shape)} for images of {tuple(images.shape)}, not {expected}"
            )
        return made

    def _check(self, passes: Passes) -> None:
        if passes.window is not None and min(_pair(passes.window)) < self.least:
            raise UserError(
                f"window is {passes.window}; it must hold a patch, which is of {self.least} pixels"
            )

    def _run(self, pieces: Sequence[UInt8[np.ndarray, "h w 3"]]) -> Float[Tensor, "n k h w"]:
        how, channels = self.card.preprocess, self.config.in_channels
        return self.logits(torch.stack([normalised(piece, how, channels) for piece in pieces]))

    def _read(self, picture: Picture, passes: Passes) -> _Read:
        how = self.card.preprocess
        pixels = whole(picture, how)
        read = _Read(pixels, [], [])
        for scale in passes.scales:
            (h, w), (height, width) = fed_sizes(pixels.shape[:2], how, passes, scale, self.least)
            image = Image.fromarray(pixels)
            if image.size != (w, h):
                image = image.resize((w, h), FILTERS[how.interpolation])
            top, left = (height - h) // 2, (width - w) // 2
            fed = np.asarray(image)
            if (h, w) != (height, width):
                fed = np.full((height, width, 3), how.background, np.uint8)
                fed[top : top + h, left : left + w] = np.asarray(image)
            read.fed.append(fed)
            read.inner.append((slice(top, top + h), slice(left, left + w)))
        return read

    def _parse(self, some: list[tuple[str, _Read]], passes: Passes, confidence: bool) -> list[Segmentation]:
        strips: list[list[Strip]] = [[] for _ in some]
        if passes.window is None:
            self._look(some, passes, strips)
        else:
            for (_, read), into in zip(some, strips, strict=True):
                for pixels in read.fed:
                    window = _pair(passes.window)
                    into.append(Sliding(self._run, pixels, window, passes.overlap, self.batch_size))
                    if passes.flip:
                        mirrored = Sliding(
                            self._run, pixels[:, ::-1], window, passes.overlap, self.batch_size
                        )
                        into.append(Mirrored(mirrored))
        return [
            self._finish(name, read, made, confidence)
            for (name, read), made in zip(some, strips, strict=True)
        ]

    def _look(self, some: list[tuple[str, _Read]], passes: Passes, strips: list[list[Strip]]) -> None:
        """Run all that is fed of some pictures, what is of one size together."""
        by_size: dict[tuple[int, ...], list[tuple[int, tuple[slice, slice], np.ndarray, bool]]] = {}
        for i, (_, read) in enumerate(some):
            for pixels, inner in zip(read.fed, read.inner, strict=True):
                alike = by_size.setdefault(pixels.shape, [])
                alike.append((i, inner, pixels, False))
                if passes.flip:
                    alike.append((i, inner, pixels[:, ::-1], True))
        for alike in by_size.values():
            for batch in batches(alike, self.batch_size):
                made = self._run([pixels for _, _, pixels, _ in batch])
                for logits, (i, inner, _, mirrored) in zip(made, batch, strict=True):
                    logits = (logits.flip(-1) if mirrored else logits)[:, inner[0], inner[1]]
                    strips[i].append(Held(logits))

    @torch.inference_mode()
    def _finish(self, name: str, read: _Read, strips: list[Strip], confidence: bool) -> Segmentation:
        H, W = read.pixels.shape[:2]
        count = self.config.num_classes
        labels = np.empty((H, W), np.uint8 if count <= 256 else np.uint16)
        sure = np.empty((H, W), np.float32) if confidence else None
        first = 0
        for label, best in parsed(strips, (H, W), count, confidence):
            last = first + len(label)
            labels[first:last] = label.cpu().numpy()
            if sure is not None and best is not None:
                sure[first:last] = best.cpu().numpy()
            first = last
        return Segmentation(
            labels=labels,
            classes=self.classes,
            colours=self.colours,
            image=read.pixels,
            confidence=sure,
            source=name,
        )


def fed_sizes(
    picture: tuple[int, int], how: Preprocess, passes: Passes, scale: float, least: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width that a picture is resized to, and of what it is then padded to; neither below `least`.

    The card's `size` and `crop` give the size before its crop, which is not done: what is cut off has no class.
    """
    H, W = picture
    padded = None
    if passes.size is not None:
        if isinstance(passes.size, int):
            factor = passes.size / min(H, W)
        else:
            factor = min(passes.size[0] / H, passes.size[1] / W)
        h, w = H * factor, W * factor
    elif passes.window is not None:
        h, w = H, W
    else:
        h, w = (math.floor(side / how.crop) for side in how.size)
        if how.mode == "crop":
            factor = max(h / H, w / W)
            h, w = min(H * factor, LONGEST * h), min(W * factor, LONGEST * w)
        elif how.mode == "pad":
            padded, factor = (h, w), min(h / H, w / W)
            h, w = H * factor, W * factor
    inner = _whole(h * scale, least), _whole(w * scale, least)
    if padded is None:
        return inner, inner
    outer = tuple(max(_whole(side * scale, least), n) for side, n in zip(padded, inner, strict=True))
    return inner, (outer[0], outer[1])


def _whole(side: float, least: int) -> int:
    return max(round(side), least)


def _pair(sides: int | tuple[int, int]) -> tuple[int, int]:
    return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])


def _pixels(sides: Any) -> bool:
    """Whether this is None, a side in pixels, or two."""
    if sides is None:
        return True
    pair = sides if isinstance(sides, tuple | list) else (sides, sides)
    return len(pair) == 2 and all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in pair)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
