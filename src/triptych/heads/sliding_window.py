"""Logits of pictures, asked for a few rows at a time from the top down, so that none is ever held whole.

A map of logits has as many channels as there are classes: of 150 and 12 megapixels it would be 7 GB.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from triptych.layers.tiling import shares, starts

Run = Callable[[Sequence[UInt8[np.ndarray, "h w 3"]]], Float[Tensor, "n k h w"]]
"""Pieces of one size to their logits, fp32."""

AT_ONCE = 8_000_000
"""Numbers of a band of logits that are worked on together: 32 MB."""


@runtime_checkable
class Strip(Protocol):
    """Logits by rows."""

    size: tuple[int, int]

    def rows(self, first: int, last: int) -> Float[Tensor, "k n w"]:
        """Those from `first` up to, not including, `last`. Neither goes back from one call to the next, which may write
        over what this one gave."""
        ...


class Held:
    """Logits that are there."""

    def __init__(self, logits: Float[Tensor, "k h w"]):
        self.logits, self.size = logits, (logits.shape[-2], logits.shape[-1])

    def rows(self, first: int, last: int) -> Float[Tensor, "k n w"]:
        return self.logits[:, first:last]


class Mirrored:
    """Those of the mirrored picture, turned back."""

    def __init__(self, strip: Strip):
        self.strip, self.size = strip, strip.size

    def rows(self, first: int, last: int) -> Float[Tensor, "k n w"]:
        return self.strip.rows(first, last).flip(-1)


class Sliding:
    """Those of windows that overlap, made a row of windows at a time when one is needed.

    Where windows overlap each counts by the distance to its edge, less the last quarter of the overlap, where it knows
    too little of what is around; the shares of a pixel sum to one (`layers.tiling.shares`).

    Args:
        run: gives the logits of windows.
        pixels: what the windows slide over.
        window: height and width; never larger than `pixels`.
        overlap: of neighbouring windows, at least, as a share of the window.
        batch: windows at a time.
    """

    def __init__(
        self,
        run: Run,
        pixels: UInt8[np.ndarray, "h w 3"],
        window: tuple[int, int],
        overlap: float,
        batch: int,
    ):
        self.run, self.pixels, self.batch = run, pixels, batch
        self.size = height, width = pixels.shape[:2]
        self.window = h, w = min(window[0], height), min(window[1], width)
        shared = [min(round(overlap * side), side - 1) for side in self.window]
        self.tops, self.lefts = starts(height, h, shared[0]), starts(width, w, shared[1])
        self.down = shares(self.tops, height, h, shared[0] // 4)
        self.across = shares(self.lefts, width, w, shared[1] // 4)
        self.next, self.first = 0, 0  # row of windows, row of what is held
        self.held: Tensor | None = None

    def rows(self, first: int, last: int) -> Float[Tensor, "k n w"]:
        while self._whole() < last:
            self._more(first)
        assert self.held is not None
        return self.held[:, first - self.first : last - self.first]

    def _whole(self) -> int:
        """Rows that no further window adds to."""
        return self.size[0] if self.next == len(self.tops) else self.tops[self.next] if self.next else 0

    def _more(self, needed: int) -> None:
        """Add the next row of windows, and let go of the rows above `needed`."""
        (h, w), top = self.window, self.tops[self.next]
        cleared = False
        pairs = list(zip(self.lefts, self.across, strict=True))
        for lefts in (pairs[i : i + self.batch] for i in range(0, len(pairs), self.batch)):
            made = self.run([self.pixels[top : top + h, left : left + w] for left, _ in lefts])
            if not cleared:
                self._clear(made, min(needed, top), top + h)
                cleared = True
            assert self.held is not None
            down = self.down[self.next].to(made)[:, None]
            for part, (left, across) in zip(made, lefts, strict=True):
                place = self.held[:, top - self.first : top - self.first + h, left : left + w]
                place.addcmul_(part, down * across.to(made))
        self.next += 1

    def _clear(self, like: Tensor, first: int, last: int) -> None:
        """Hold rows `first` to `last`, with what is known of them, and zeros in those that no window has reached."""
        classes, width = like.shape[1], self.size[1]
        reached = self.tops[self.next - 1] + self.window[0] if self.next else 0
        kept, offset = max(0, reached - first), first - self.first
        if self.held is None or self.held.shape[1] < last - first:
            fresh = like.new_zeros((classes, last - first, width))
            if self.held is not None and kept:
                fresh[:, :kept] = self.held[:, offset : offset + kept]
            self.held = fresh
        else:
            for rows in self.held:  # a class at a time: the copy between them is small
                rows[:kept] = rows[offset : offset + kept].clone()
            self.held[:, kept:].zero_()
        self.first = first


def strips_of(
    run: Run,
    fed: Sequence[Sequence[tuple[UInt8[np.ndarray, "_ _ 3"], tuple[slice, slice]]]],
    window: tuple[int, int] | None,
    overlap: float,
    flip: bool,
    batch: int,
) -> list[list[Strip]]:
    """The strips of some pictures, all of a picture's to be averaged.

    Args:
        fed: of each picture what is fed, and where in that it lies.
        window: height and width that slide over each; none looks at all of it at once, what is of one size together.
        overlap: as in `Sliding`.
        flip: the mirrored picture, too.
        batch: pictures or windows at a time.
    """
    strips: list[list[Strip]] = [[] for _ in fed]
    if window is not None:
        for pieces, into in zip(fed, strips, strict=True):
            for pixels, _ in pieces:
                into.append(Sliding(run, pixels, window, overlap, batch))
                if flip:
                    into.append(Mirrored(Sliding(run, pixels[:, ::-1], window, overlap, batch)))
        return strips
    by_size: dict[tuple[int, ...], list[tuple[int, tuple[slice, slice], np.ndarray, bool]]] = {}
    for i, pieces in enumerate(fed):
        for pixels, inner in pieces:
            alike = by_size.setdefault(pixels.shape, [])
            alike.append((i, inner, pixels, False))
            if flip:
                alike.append((i, inner, pixels[:, ::-1], True))
    for alike in by_size.values():
        for some in (alike[at : at + batch] for at in range(0, len(alike), batch)):
            for logits, (i, inner, _, mirrored) in zip(run([p for _, _, p, _ in some]), some, strict=True):
                logits = (logits.flip(-1) if mirrored else logits)[:, inner[0], inner[1]]
                strips[i].append(Held(logits))
    return strips


def enlarged(strip: Strip, size: tuple[int, int], first: int, last: int) -> Float[Tensor, "k n w"]:
    """Rows `first` to `last` of the logits at another size, bilinearly, cells taken as areas: as `F.interpolate` of the
    whole, of which only the rows that matter are asked for."""
    (h, w), (H, W) = strip.size, size
    if (h, w) == (H, W):
        return strip.rows(first, last)
    y = ((torch.arange(first, last, dtype=torch.float64) + 0.5) * (h / H) - 0.5).clamp(0, h - 1)
    above = y.floor().long()
    below = (above + 1).clamp(max=h - 1)
    top = int(above[0])
    part = strip.rows(top, int(below[-1]) + 1)
    part = F.interpolate(part[None], size=(part.shape[1], W), mode="bilinear", align_corners=False)[0]
    share = (y - above).to(part)[:, None]
    return torch.lerp(part[:, (above - top).to(part.device)], part[:, (below - top).to(part.device)], share)


def parsed(
    strips: Sequence[Strip], size: tuple[int, int], classes: int, confidence: bool = False
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The best class of each pixel of a picture of `size`, and its probability if `confidence` is asked for, in bands
    from the top. Of several strips the probabilities are averaged.
    """
    H, W = size
    step = max(1, math.ceil(AT_ONCE / (classes * W)))
    for first in range(0, H, step):
        last = min(first + step, H)
        if len(strips) == 1 and not confidence:
            yield enlarged(strips[0], size, first, last).argmax(0), None
            continue
        mean = enlarged(strips[0], size, first, last).softmax(0)
        for strip in strips[1:]:
            mean += enlarged(strip, size, first, last).softmax(0)
        best, label = (mean / len(strips)).max(0)
        yield label, best if confidence else None
