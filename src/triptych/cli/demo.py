"""`triptych demo`"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.cli.output import SHIPPED_CLASSIFIER, SHIPPED_GENERATOR, SHIPPED_SEGMENTER, print_json
from triptych.errors import UserError

if TYPE_CHECKING:
    from triptych.network import Network
    from triptych.plots.demo_samples import PaintPanel
    from triptych.plots.demo_sheet import ParsePanel, SeePanel

# Two of most groups, by their names; drawn by a hand that no training picture is by.
SHOWN = (
    *("fox", "strawberry", "sailboat", "guitar", "basketball"),
    *("cactus", "grinning face", "hamburger", "rocket", "owl"),
)
SCENES = (9, 2)  # numbers of test scenes, taken for their many groups; the first is the one with the point
LOOK = 8  # blocks whose attention is shown

# What is painted: the first comes out of noise, step after step.
PROMPTS = (
    *(
        "a red apple, fluent-3d style",
        "an owl, noto style",
        "a sailboat, noto style",
        "a cactus, fluent-3d style",
    ),
    *(
        "a guitar, noto style",
        "a grinning face, fluent-3d style",
        "a rocket, noto style",
        "a hamburger, noto-v1 style",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Put shipped drawings of a style never trained on through the shipped networks, and draw what they see in them.

    Writes a sheet. See: each picture, its five most probable names, and its attention rollout. Parse: scenes of such
    drawings, the class of every pixel, and what one point attends to through its windows. Paint: what latent diffusion
    makes of prompts, and how the first picture comes out of noise.
    """

    out: Path = Path("triptych.png")
    """PNG to write."""
    model: str = SHIPPED_CLASSIFIER
    """Another classifier of the same drawings: a file, or a RUN folder."""
    parser: str = SHIPPED_SEGMENTER
    """Another segmenter of the same scenes."""
    painter: str = SHIPPED_GENERATOR
    """Another latent diffusion model that reads prompts, such as a RUN of `latent_diffusion_emoji`; "" for none."""
    json: bool = False
    """Print the names and probabilities, the scores of the scenes, and the prompts, as JSON."""

    def run(self) -> int:
        from triptych.plots import style
        from triptych.plots.demo_sheet import demo_sheet

        started = time.perf_counter()
        classifier, parser = seer(self.model), parser_of(self.parser)
        see, names = seen(classifier)
        parse, scores = parsed(parser)
        paint = [painted(self.painter)] if self.painter else []
        seconds = time.perf_counter() - started
        below = (
            "Drawings by a hand that the networks have never seen: Twemoji, CC BY 4.0. The right name is blue; "
            f"there are {names:,}"
        )
        style.save(demo_sheet([see, parse, *paint], below=below), self.out)
        if self.json:
            found = [{"truth": card.truth, "top": list(card.guesses)} for card in see.cards]
            words = [card.words for panel in paint for card in panel.cards]
            print_json({"see": found, "parse": scores, "paint": words})
            return 0
        right = sum(card.guesses[0][0] == card.truth for card in see.cards)
        for card in see.cards:
            name, probability = card.guesses[0]
            mark = "right" if name == card.truth else "wrong"
            print(f"  {mark}  {card.truth}: {name} {probability:.0%}")
        for score in scores:
            print(
                f"  scene {score['scene']}: mIoU {score['miou']:.2f}, {score['pixel_accuracy']:.0%} of pixels right"
            )
        print(f"{self.out}: {right} of {len(see.cards)} right, {seconds:.1f} s")
        return 0


def seer(model: str) -> "Network":
    """The classifier, if it names emoji."""
    from triptych.data.builtin.emoji import emoji
    from triptych.weights import load

    net = load(model)
    if net.card.classes != emoji("test").classes:  # pyright: ignore[reportAttributeAccessIssue]
        raise UserError(f"{model} names other things than emoji; use {SHIPPED_CLASSIFIER}, or a run on emoji")
    return net


def parser_of(model: str) -> Any:
    """A pipeline of the segmenter, if it parses scenes."""
    from triptych.data.builtin.scenes import scenes
    from triptych.pipelines.segmentation import SegmentationPipeline

    pipe = SegmentationPipeline(model, dtype="fp32")
    if set(pipe.classes) != set(scenes("test", 1).mask_classes):
        raise UserError(
            f"{model} parses other things than scenes; use {SHIPPED_SEGMENTER}, or a run on scenes"
        )
    return pipe


def seen(net: "Network") -> tuple["SeePanel", int]:
    """The first panel, and how many names there are to choose from."""
    from triptych.data.builtin.emoji import emoji
    from triptych.pipelines.explain.vit import explain
    from triptych.plots.demo_sheet import Seen, SeePanel

    source, cards = emoji("test"), []
    first = {source.classes[label]: i for i, label in reversed(list(enumerate(source.labels)))}
    for name in SHOWN:
        found = explain(net, source[first[name]].image)
        guesses = [(guess.name, guess.probability) for guess in found.classification]
        cards.append(Seen(image=found.image, rollout=found.rollout, guesses=guesses, truth=name))
    return SeePanel(cards=cards), len(source.classes)


def parsed(pipe: Any) -> tuple["ParsePanel", list[dict[str, Any]]]:
    """The second panel, and the scores of its scenes."""
    import numpy as np
    import torch

    from triptych.data.builtin.scenes import scenes
    from triptych.metrics.segmentation import SegmentationMetrics
    from triptych.plots.demo_sheet import Parsed, ParsePanel

    source = scenes("test")
    names = source.mask_classes
    ours = torch.tensor([names.index(name) for name in pipe.classes])
    together, cards, scores = SegmentationMetrics(len(names)), [], []
    examples = [source[n] for n in SCENES]
    for number, example in zip(SCENES, examples, strict=True):
        found = pipe(np.asarray(example.image))
        alone, predicted = SegmentationMetrics(len(names)), ours[torch.from_numpy(found.labels).long()][None]
        for metrics in (alone, together):
            metrics.update(predicted, torch.from_numpy(example.mask)[None])
        figures = alone.compute()
        score = {name: figures[name] for name in ("miou", "pixel_accuracy")}
        scores.append({"scene": number, **score})
        words = f"mIoU {score['miou']:.2f}, {score['pixel_accuracy']:.0%} of pixels right"
        cards.append(Parsed(image=found.image, overlay=np.asarray(found.overlay()), words=words))
    iou: Any = together.compute()["per_class_iou"]
    legend = [
        (
            name,
            pipe.colors[list(pipe.classes).index(name)].tolist(),
            "-" if iou[i] != iou[i] else f"{iou[i]:.2f}",
        )
        for i, name in enumerate(names)
    ]
    at = middle_of_the_largest(examples[0])
    return ParsePanel(cards=cards, legend=legend, **looked(pipe, examples[0].image, at)), scores


def middle_of_the_largest(scene: Any) -> tuple[float, float]:
    """x and y of the middle of the largest drawing that is seen there."""
    middles = {
        (box.x1 - box.x0) * (box.y1 - box.y0): ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
        for box in scene.boxes
        if scene.mask[(box.y0 + box.y1) // 2, (box.x0 + box.x1) // 2] == box.label
    }
    return middles[max(middles)]


def looked(pipe: Any, image: Any, point: tuple[float, float]) -> dict[str, Any]:
    """What a point attends to in the first blocks of each stage; nothing of a network without windows."""
    from triptych.models.swin import Swin
    from triptych.pipelines.explain.vit import explain
    from triptych.plots.demo_sheet import Looked

    if not isinstance(getattr(pipe.net, "backbone", None), Swin):
        return {}
    found = explain(pipe.net, image, point=point)
    made, block = [], 0
    for stage, maps in enumerate(found.attention):
        for i, heads in enumerate(maps):
            if i < LOOK // len(found.attention):
                kind = "SW-MSA" if found.shifts[block].any() else "W-MSA"
                words = f"{kind}, stage {stage + 1}, {heads.shape[1]} × {heads.shape[2]} cells"
                window, shift = found.windows[block], found.shifts[block]
                stride = int(found.strides[stage])
                made.append(
                    Looked(words=words, heat=heads.mean(0), stride=stride, window=window, shift=shift)
                )
            block += 1
    return {"looked": made, "image": found.image, "point": found.point}


def painted(model: str) -> "PaintPanel":
    """The third panel: a picture for each prompt, all made at once, and the first one's way out of noise."""
    import numpy as np

    from triptych.cli.generate_output import StepRecorder
    from triptych.pipelines.diffusion.options import GenerationRecord
    from triptych.pipelines.diffusion.pipeline import DiffusionPipeline
    from triptych.plots.demo_samples import Painted, PaintPanel

    pipe = DiffusionPipeline(model, dtype="fp32")
    watch = StepRecorder(Path("strip"), None)  # keeps frames; nothing is written
    asked = [GenerationRecord(prompt=prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    images = pipe.generate(asked, batch_size=len(asked), preview=watch)
    pictures = [np.asarray(image.convert("RGB")) for image in images]
    cards = [Painted(image=image, words=words) for image, words in zip(pictures, PROMPTS, strict=True)]
    return PaintPanel(cards=cards, frames=[*watch.frames, pictures[0]], labels=[*watch.labels, "the picture"])
