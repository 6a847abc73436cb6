"""Procedural background images: gradients, clouds, stripes, checks, blobs and hard-edged shapes.

They are varied on purpose. On a plain background a network could find each drawing by its edge; here edges, texture and
color occur everywhere, so that it has to recognize the drawing. numpy and Pillow suffice, because scenes are generated
in the loader's worker processes.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

Field = Float[np.ndarray, "h w"]
"""Values from 0 to 1, to which a palette is applied."""


def random_background(rng: np.random.Generator, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Return a random image of `size` (height, width), which depends only on the state of `rng`.

    It is a colored field; half of the images blend two of them, and half have noise added.
    """
    image = _apply_palette(_field(rng, size), rng)
    if rng.random() < 0.5:
        opacity = _field(rng, size)[..., None] * rng.uniform(0.3, 1.0)
        image += (_apply_palette(_field(rng, size), rng) - image) * opacity
    if rng.random() < 0.5:
        image += rng.standard_normal(size, np.float32)[..., None] * np.float32(rng.uniform(2, 16))
    return image.clip(0, 255).astype(np.uint8)


def _apply_palette(field: Field, rng: np.random.Generator) -> Float[np.ndarray, "h w 3"]:
    """Color a field by a palette of three random colors of random contrast; return RGB from 0 to 255."""
    stops = rng.uniform(0, 255, (3, 3))
    stops = stops.mean(0) + (stops - stops.mean(0)) * rng.uniform(0.2, 1.0)
    steps = np.linspace(0, 2, 256)
    palette = np.stack([np.interp(steps, range(3), channel) for channel in stops.T], -1).astype(np.float32)
    return palette.take((field * 255).astype(np.uint8), axis=0)


def _field(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    patterns: tuple[Callable[[np.random.Generator, tuple[int, int]], Field], ...]
    patterns = (ramp, clouds, stripes, checks, blobs, shapes)
    return patterns[rng.integers(len(patterns))](rng, size).clip(0, 1)


def _axes(size: tuple[int, int], angle: float) -> tuple[Field, Field]:
    """Return the coordinates along an angle and across it: 0 at the center, in units of the shorter side."""
    height, width = size
    y = ((np.arange(height, dtype=np.float32) + 0.5 - height / 2) / min(size))[:, None]
    x = ((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / min(size))[None]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


def ramp(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    """Return a linear or radial gradient."""
    along, across = _axes(size, rng.uniform(0, 2 * np.pi))
    if rng.random() < 0.5:
        return 0.5 + along * np.float32(rng.uniform(0.4, 1.0))
    center = rng.uniform(-0.5, 0.5, 2).astype(np.float32)
    return np.hypot(along - center[0], across - center[1]) * np.float32(rng.uniform(0.7, 1.6))


def clouds(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    """Return value noise: the sum of random grids of increasing resolution and decreasing weight, interpolated."""
    height, width = size
    cells, weight, field = float(rng.uniform(2, 14)), 1.0, np.zeros(size, np.float32)
    fade = rng.uniform(0.35, 0.8)
    for _ in range(rng.integers(1, 5)):
        grid = [max(2, round(cells * side / min(size))) for side in size]
        noise = Image.fromarray(rng.standard_normal(grid, np.float32))
        field += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) * np.float32(weight)
        cells, weight = cells * 2, weight * fade
    low, high = field.min(), field.max()
    return (field - low) / max(high - low, 1e-6)


def stripes(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    """Return parallel stripes with soft or hard edges, straight or bent."""
    along, across = _axes(size, rng.uniform(0, np.pi))
    bend = rng.uniform(0, 0.15) * np.sin(across * np.float32(rng.uniform(3, 15)) + rng.uniform(0, 6))
    return _wave(along + bend.astype(np.float32), rng.uniform(2, 16), _hardness(rng))


def checks(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    """Return a checkerboard, rotated and stretched."""
    along, across = _axes(size, rng.uniform(0, np.pi))
    count, hardness = rng.uniform(1.5, 8), _hardness(rng)
    a, b = _wave(along, count, hardness), _wave(across, count * rng.uniform(0.6, 1.6), hardness)
    return a + b - 2 * a * b


def _hardness(rng: np.random.Generator) -> float:
    return float(rng.choice([1.0, 2.0, 12.0]))


def _wave(along: Field, count: float, hardness: float) -> Field:
    return 0.5 + 0.5 * np.clip(np.sin(along * np.float32(2 * np.pi * count)) * np.float32(hardness), -1, 1)


def blobs(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    """Return bright and dark Gaussian spots."""
    count = int(rng.integers(3, 16))
    width = rng.uniform(0.04, 0.25, (count, 1)) * min(size)
    by_y, by_x = (
        np.exp(-(((np.arange(side) + 0.5 - rng.uniform(0, side, (count, 1))) / width) ** 2) / 2)
        for side in size
    )
    sign = rng.choice([-0.5, 0.5], (count, 1))
    return (0.5 + (by_y * sign).T @ by_x).astype(np.float32)


def shapes(rng: np.random.Generator, size: tuple[int, int]) -> Field:
    """Return gray discs, rings, boxes and triangles, antialiased, as distractors."""
    fine = 2
    height, width = (side * fine for side in size)
    canvas = Image.new("L", (width, height), int(rng.integers(256)))
    draw = ImageDraw.Draw(canvas)
    for shape in rng.integers(4, size=rng.integers(3, 13)):
        gray, reach = int(rng.integers(256)), rng.uniform(0.04, 0.28) * min(height, width)
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        if shape < 2:
            box, line = (x - reach, y - reach, x + reach, y + reach), max(2, round(reach / 4))
            draw.ellipse(box, fill=gray) if shape == 0 else draw.ellipse(box, outline=gray, width=line)
        else:
            corners = int(shape) + 1
            angles = rng.uniform(0, 2 * np.pi) + np.arange(corners) * (2 * np.pi / corners)
            stretch = rng.uniform(0.4, 1.0)
            draw.polygon(
                [(x + reach * np.cos(a), y + reach * stretch * np.sin(a)) for a in angles], fill=gray
            )
    return np.asarray(canvas.reduce(fine), np.float32) / 255
