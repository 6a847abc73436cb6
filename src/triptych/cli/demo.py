"""`triptych demo`"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.cli.output import SHIPPED_CLASSIFIER, SHIPPED_GENERATOR, SHIPPED_SEGMENTER, print_json
from triptych.errors import ConfigError

if TYPE_CHECKING:
    from triptych.network import Network
    from triptych.plots.demo_samples import GeneratePanel
    from triptych.plots.demo_sheet import ClassifyPanel, SegmentPanel

# Classes from most groups, in a drawing style that was held out from training.
SHOWN = (
    *("fox", "strawberry", "sailboat", "guitar", "basketball"),
    *("cactus", "grinning face", "hamburger", "rocket", "owl"),
)
_SCENES = (9, 2)  # test scenes with many groups; the first is the one with the query point
ATTENTION_BLOCKS = 8  # blocks whose attention is shown

# The denoising steps of the first prompt are shown.
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
    """Run the shipped networks on images of a held-out emoji style, and plot the results on one page.

    It has three panels (see, parse, paint): images with their five most probable classes and attention rollout; scenes
    of such images with the class of each pixel and the attention of a query point; images that latent diffusion
    generates from prompts, with the denoising steps of the first one.
    """

    out: Path = Path("triptych.png")
    """PNG to write."""
    classifier: str = SHIPPED_CLASSIFIER
    """Classifier with the emoji classes: a file, or a RUN folder."""
    segmenter: str = SHIPPED_SEGMENTER
    """Segmenter with the classes of the scenes: a file, or a RUN folder."""
    generator: str = SHIPPED_GENERATOR
    """Text-conditioned latent diffusion model, such as a RUN of `latent_diffusion_emoji`; "" for none."""
    json: bool = False
    """Print classes and probabilities, the scenes' scores and the prompts as JSON."""

    def run(self) -> int:
        from triptych.plots import style
        from triptych.plots.demo_sheet import demo_sheet

        started = time.perf_counter()
        classifier, segmenter = load_classifier(self.classifier), load_segmenter(self.segmenter)
        classified, num_classes = classify_panel(classifier)
        segmented, scores = segment_panel(segmenter)
        generated = [generate_panel(self.generator)] if self.generator else []
        seconds = time.perf_counter() - started
        below = (
            "Drawings of a style held out from training: Twemoji, CC BY 4.0. The true class is blue; "
            f"there are {num_classes:,} classes"
        )
        style.save(demo_sheet([classified, segmented, *generated], below=below), self.out)
        if self.json:
            classes = [{"truth": card.truth, "top": list(card.guesses)} for card in classified.cards]
            prompts = [card.words for panel in generated for card in panel.cards]
            print_json({"see": classes, "parse": scores, "paint": prompts})  # words: quoted
            return 0
        correct = sum(card.guesses[0][0] == card.truth for card in classified.cards)
        for card in classified.cards:
            name, probability = card.guesses[0]
            mark = "right" if name == card.truth else "wrong"
            print(f"  {mark}  {card.truth}: {name} {probability:.0%}")
        for score in scores:
            print(
                f"  scene {score['scene']}: mIoU {score['miou']:.2f}, {score['pixel_accuracy']:.0%} of pixels correct"
            )
        print(f"{self.out}: {correct} of {len(classified.cards)} correct, {seconds:.1f} s")
        return 0


def load_classifier(model: str) -> "Network":
    """Load the classifier, if it has the emoji classes."""
    from triptych.data.builtin.emoji import emoji
    from triptych.weights import load

    net = load(model)
    if net.card.classes != emoji("test").classes:  # pyright: ignore[reportAttributeAccessIssue]
        raise ConfigError(
            f"{model} has other classes than emoji; use {SHIPPED_CLASSIFIER}, or a run on emoji"
        )
    return net


def load_segmenter(model: str) -> Any:
    """Load the segmenter, if it has the scenes' classes."""
    from triptych.data.builtin.scenes import scenes
    from triptych.pipelines.segmentation import SegmentationPipeline

    pipe = SegmentationPipeline(model, dtype="fp32")
    if set(pipe.classes) != set(scenes("test", 1).mask_classes):
        raise ConfigError(
            f"{model} has other classes than scenes; use {SHIPPED_SEGMENTER}, or a run on scenes"
        )
    return pipe


def classify_panel(net: "Network") -> tuple["ClassifyPanel", int]:
    """The first panel, and the number of classes."""
    from triptych.data.builtin.emoji import emoji
    from triptych.pipelines.explain.vit import explain
    from triptych.plots.demo_sheet import ClassifiedCard, ClassifyPanel

    source, cards = emoji("test"), []
    first = {source.classes[label]: i for i, label in reversed(list(enumerate(source.labels)))}
    for name in SHOWN:
        result = explain(net, source[first[name]].image)
        guesses = [(guess.name, guess.probability) for guess in result.classification]
        cards.append(ClassifiedCard(image=result.image, rollout=result.rollout, guesses=guesses, truth=name))
    return ClassifyPanel(cards=cards), len(source.classes)


def segment_panel(pipe: Any) -> tuple["SegmentPanel", list[dict[str, Any]]]:
    """The second panel, and the scores of its scenes."""
    import numpy as np
    import torch

    from triptych.data.builtin.scenes import scenes
    from triptych.metrics.segmentation import SegmentationMetrics
    from triptych.plots.demo_sheet import SegmentedCard, SegmentPanel

    source = scenes("test")
    names = source.mask_classes
    ours = torch.tensor([names.index(name) for name in pipe.classes])
    total, cards, scores = SegmentationMetrics(len(names)), [], []
    examples = [source[n] for n in _SCENES]
    for number, example in zip(_SCENES, examples, strict=True):
        result = pipe(np.asarray(example.image))
        own, predicted = SegmentationMetrics(len(names)), ours[torch.from_numpy(result.labels).long()][None]
        for metrics in (own, total):
            metrics.update(predicted, torch.from_numpy(example.mask)[None])
        figures = own.compute()
        score = {name: figures[name] for name in ("miou", "pixel_accuracy")}
        scores.append({"scene": number, **score})
        words = f"mIoU {score['miou']:.2f}, {score['pixel_accuracy']:.0%} of pixels correct"
        cards.append(SegmentedCard(image=result.image, overlay=np.asarray(result.overlay()), words=words))
    iou: Any = total.compute()["per_class_iou"]
    legend = [
        (
            name,
            pipe.colors[list(pipe.classes).index(name)].tolist(),
            "-" if iou[i] != iou[i] else f"{iou[i]:.2f}",
        )
        for i, name in enumerate(names)
    ]
    at = center_of_largest(examples[0])
    return SegmentPanel(cards=cards, legend=legend, **attention_cards(pipe, examples[0].image, at)), scores


def center_of_largest(scene: Any) -> tuple[float, float]:
    """x and y of the center of the largest drawing that is visible there."""
    middles = {
        (box.x1 - box.x0) * (box.y1 - box.y0): ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
        for box in scene.boxes
        if scene.mask[(box.y0 + box.y1) // 2, (box.x0 + box.x1) // 2] == box.label
    }
    return middles[max(middles)]


def attention_cards(pipe: Any, image: Any, point: tuple[float, float]) -> dict[str, Any]:
    """The attention of a point in the first blocks of each stage; empty for a network without windows."""
    from triptych.models.swin import Swin
    from triptych.pipelines.explain.vit import explain
    from triptych.plots.demo_sheet import AttentionCard

    if not isinstance(getattr(pipe.net, "backbone", None), Swin):
        return {}
    result = explain(pipe.net, image, point=point)
    cards, block = [], 0
    for stage, maps in enumerate(result.attention):
        for i, heads in enumerate(maps):
            if i < ATTENTION_BLOCKS // len(result.attention):
                block_type = "SW-MSA" if result.shifts[block].any() else "W-MSA"
                words = f"{block_type}, stage {stage + 1}, {heads.shape[1]} × {heads.shape[2]} cells"
                window, shift = result.windows[block], result.shifts[block]
                stride = int(result.strides[stage])
                cards.append(
                    AttentionCard(words=words, heat=heads.mean(0), stride=stride, window=window, shift=shift)
                )
            block += 1
    return {"attention_cards": cards, "image": result.image, "point": result.point}


def generate_panel(model: str) -> "GeneratePanel":
    """The third panel: an image for each prompt, generated in one batch, and the denoising steps of the first."""
    import numpy as np

    from triptych.cli.generate_output import StepRecorder
    from triptych.pipelines.diffusion.options import GenerationRecord
    from triptych.pipelines.diffusion.pipeline import DiffusionPipeline
    from triptych.plots.demo_samples import GeneratedCard, GeneratePanel

    pipe = DiffusionPipeline(model, dtype="fp32")
    recorder = StepRecorder(Path("strip"), None)  # keeps frames; nothing is written
    records = [GenerationRecord(prompt=prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    images = pipe.generate(records, batch_size=len(records), preview=recorder)
    images = [np.asarray(image.convert("RGB")) for image in images]
    cards = [GeneratedCard(image=image, words=words) for image, words in zip(images, PROMPTS, strict=True)]
    return GeneratePanel(
        cards=cards, frames=[*recorder.frames, images[0]], labels=[*recorder.labels, "result"]
    )
