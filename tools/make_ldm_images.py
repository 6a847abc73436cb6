"""Make docs/images/ldm_*.png, the figures of docs/papers/latent-diffusion.md, with the package itself.

    python tools/make_ldm_images.py EMOJI                     # of the shipped model
    python tools/make_ldm_images.py EMOJI --model RUN         # of another one

EMOJI is the output of tools/make_emoji.py --styles all, which lists the concepts of each style.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import triptych as tp
from triptych.cli.generate_output import StepRecorder
from triptych.data.builtin.emoji import EmojiSource, emoji
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.pipelines.diffusion.options import GenerationRecord
from triptych.plots import style
from triptych.plots.denoising_strip import denoising_strip
from triptych.plots.grid import captioned_grid

Pixels = np.ndarray
BATCH = 32
PROMPTS = (
    "a red apple, noto style",
    "an owl, fluent-3d style",
    "a sailboat, fluent-flat style",
    "a cactus, emojione style",
)
CONCEPTS = (
    *("red apple", "fox", "sailboat", "guitar", "grinning face"),
    *("hamburger", "rocket", "cactus", "owl", "bicycle"),
)
ODD = (  # combinations that no style has
    "a blue apple, noto style",
    "a green fox, noto style",
    "a cat and a dog, fluent-3d style",
    "a pizza with a face, noto style",
    "an apple on a table, noto style",
    "a red rocket, fluent-flat style",
    "a yellow car, noto style",
    "a sad banana, noto style",
)


def generate(pipe: tp.DiffusionPipeline, each: Sequence[GenerationRecord]) -> list[Pixels]:
    batches = (
        pipe.generate(each[i : i + BATCH], batch_size=BATCH, progress=False)
        for i in range(0, len(each), BATCH)
    )
    return [np.asarray(image.convert("RGB")) for image in itertools.chain.from_iterable(batches)]


def reconstructions(pipe: tp.DiffusionPipeline, source: EmojiSource) -> Figure:
    """Draw images of the held-out style, the first channels of their latents, and their reconstructions."""
    assert isinstance(pipe.net, LatentDiffusion)
    first = {source.classes[label]: i for i, label in reversed(list(enumerate(source.labels)))}
    drawings = [np.asarray(source[first[name]].image) for name in CONCEPTS]
    images = torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        latents = pipe.net.autoencoder.encode(images)
        decoded = pipe.net.autoencoder.decode(latents)
    pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    shown = (latents[:, :3] / 5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return captioned_grid(
        [drawings, list(shown), list(pixels)],
        "Perceptual compression",
        "64 x 64 pixels to 8 x 8 x 8 latents and back, of images of a held-out style",
        row_words=("image", "latents (3 of 8)", "reconstruction"),
        column_words=CONCEPTS,
    )


def styles(pipe: tp.DiffusionPipeline, source: EmojiSource) -> Figure:
    """Draw concepts in every training style; those that a style lacks are marked."""
    names = [one.name for one in source.styles]
    have = {one.name: {source.classes[cell] for cell in one.cells} for one in source.styles}
    each = [
        GenerationRecord(prompt=f"{concept}, {name} style", seed=1) for name in names for concept in CONCEPTS
    ]
    images = generate(pipe, each)
    rows = [images[i : i + len(CONCEPTS)] for i in range(0, len(images), len(CONCEPTS))]
    marked = {
        (i, j)
        for i, name in enumerate(names)
        for j, concept in enumerate(CONCEPTS)
        if concept not in have[name]
    }
    below = "One seed. Rows: the requested style" + (
        ". Orange frame: the style has no image of this concept" if marked else ""
    )
    return captioned_grid(rows, "Prompts", below, row_words=names, column_words=CONCEPTS, marked=marked)


def unseen(pipe: tp.DiffusionPipeline, source: EmojiSource) -> Figure:
    """Draw concepts in styles that lack them, evenly chosen, and odd combinations: four seeds each."""
    have = {(source.classes[cell], one.name) for one in source.styles for cell in one.cells}
    known = sorted({concept for concept, _ in have})
    lacking = [(c, one.name) for c in known for one in source.styles if (c, one.name) not in have]
    some = [lacking[round((i + 0.5) * len(lacking) / 8)] for i in range(8)]
    prompts = [f"{concept}, {name} style" for concept, name in some] + list(ODD)
    images = generate(
        pipe, [GenerationRecord(prompt=words, seed=seed) for words in prompts for seed in range(4)]
    )
    blocks = [images[i : i + 4] for i in range(0, len(images), 4)]
    return captioned_grid(
        blocks,
        "Unseen combinations",
        "Top: concepts in styles that lack them. Bottom: combinations that no style has. Seeds 0 to 3",
        row_words=prompts,
        row_margin=3.2,
    )


def guidance(pipe: tp.DiffusionPipeline) -> Figure:
    scales = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 12.0)
    each = [
        GenerationRecord(prompt=words, seed=0, guidance_scale=scale) for words in PROMPTS for scale in scales
    ]
    return captioned_grid(
        chunks([generate(pipe, [one])[0] for one in each], len(scales)),
        "Guidance",
        "Guidance scales, where 1 is no guidance; the noise is the same along a row",
        row_words=PROMPTS,
        column_words=[f"{scale:g}" for scale in scales],
        row_margin=2.2,
    )


def samplers(pipe: tp.DiffusionPipeline) -> Figure:
    steps, names = (2, 4, 6, 8, 12, 20, 30, 50), ("ddim", "euler", "heun", "dpm++2m", "unipc")
    each = [
        GenerationRecord(prompt=PROMPTS[0], seed=0, sampler=name, num_steps=n)
        for name in names
        for n in steps
    ]
    return captioned_grid(
        chunks([generate(pipe, [one])[0] for one in each], len(steps)),
        "Samplers and steps",
        f"{PROMPTS[0]}, from the same noise",
        row_words=names,
        column_words=[f"{n} steps" for n in steps],
        row_margin=1.0,
    )


def chunks(items: Sequence[Pixels], size: int) -> list[Sequence[Pixels]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def strip(pipe: tp.DiffusionPipeline) -> Figure:
    watch = StepRecorder(Path("strip"), None)  # keeps frames; nothing is written
    (image,) = pipe.generate([GenerationRecord(prompt=PROMPTS[1], seed=0)], preview=watch, progress=False)
    frames, labels = [*watch.frames, np.asarray(image.convert("RGB"))], [*watch.labels, "result"]
    return denoising_strip(frames, labels, "Denoising", PROMPTS[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("emoji", type=Path, help="the folder of all styles")
    parser.add_argument("--model", default="ldm-emoji", help="what triptych.load takes")
    parser.add_argument("--only", nargs="*", help="names of figures; all if left out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "images")
    args = parser.parse_args()
    pipe = tp.DiffusionPipeline(args.model, dtype="fp32")
    train, test = emoji("train", root=args.emoji), emoji("test", background=(255, 255, 255))
    figures = {
        "reconstructions": lambda: reconstructions(pipe, test),
        "styles": lambda: styles(pipe, train),
        "unseen": lambda: unseen(pipe, train),
        "guidance": lambda: guidance(pipe),
        "samplers": lambda: samplers(pipe),
        "strip": lambda: strip(pipe),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only or figures:
        path = args.out / f"ldm_{name}.png"
        style.save(figures[name](), path)
        with Image.open(path) as image:
            fewer = image.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, kmeans=3)
        fewer.save(path, optimize=True)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
