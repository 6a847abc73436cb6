"""Image classification: the task, and how a run of it is built."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych import weights
from triptych.data.augment.batch import augment
from triptych.data.config import AugmentConfig
from triptych.data.example import Batch, TrainBatch
from triptych.data.loading.loader import make_loader
from triptych.data.open import train_and_eval
from triptych.device import copy_to_device
from triptych.distributed import SINGLE_PROCESS, ProcessGroup
from triptych.errors import UserError
from triptych.evaluation.classification import measure_classification
from triptych.heads.segmenter import Segmenter
from triptych.layers.lora import add_low_rank
from triptych.model_card import ModelCard
from triptych.models.registry import build, config_for
from triptych.network import Network
from triptych.training.configs.base import ClassifyConfig
from triptych.training.runner import Run, make_run, match_preprocessing
from triptych.training.task import LossOutput
from triptych.training.tasks.initial_network import freeze, load_backbone, origin, parsed, set_drop_path


class Classify:
    """Classification of augmented batches with soft targets: cross entropy, or one binary cross entropy a class
    whose targets are 1 for every class that was mixed in (DeiT III, Touvron et al. 2022, Section 3.1)."""

    headline = "top1"

    def __init__(
        self,
        config: AugmentConfig,
        card: ModelCard,
        num_classes: int,
        loss: str = "cross_entropy",
        teacher: "Teacher | None" = None,
    ):
        self.config, self.card, self.num_classes, self.kind = config, card, num_classes, loss
        self.teacher = teacher

    def loss(self, model: nn.Module, batch: TrainBatch) -> LossOutput:
        with torch.autocast(batch["image"].device.type, enabled=False):  # pixels are warped and mixed in fp32
            images, targets = augment(
                batch["image"], batch["label"], self.config, batch["seed"], self.num_classes, batch["aspect"]
            )
        assert targets is not None  # there are labels
        logits = model(images).float()  # B K
        if self.kind == "binary":
            present = (targets > self.config.label_smoothing / self.num_classes).float()
            loss = F.binary_cross_entropy_with_logits(logits, present, reduction="none").sum(1).mean()
        else:
            loss = -(targets * logits.log_softmax(dim=1)).sum(1).mean()
        if self.teacher is not None:
            loss = self.teacher.join(loss, logits, images, self.card)
        right = (logits.argmax(1) == batch["label"]).float().mean()
        return LossOutput(loss, {"train_top1": right.detach()})

    def evaluate(
        self, model: nn.Module, loader: Iterable[Batch], group: ProcessGroup = SINGLE_PROCESS
    ) -> Iterator[tuple[str, float]]:
        figures = measure_classification(
            model, loader, self.card.preprocess, self.num_classes, self.card.groupings, group
        )
        for name, value in figures.items():
            if isinstance(value, int | float):
                yield name, value

    def rank(self, figures: dict[str, float]) -> tuple[float, ...]:
        """By top-1; among equals, as a small set has many, by the loss."""
        return figures["top1"], -figures["loss"]

    def product(self, net: Any) -> Any:
        return net


class Teacher:
    """Distillation (Hinton et al. 2015, Section 2): the student also learns the probabilities that a trained network of
    the same classes gives to the same augmented images."""

    def __init__(self, net: Network, share: float, temperature: float):
        self.net, self.share, self.temperature = net.eval().requires_grad_(False), share, temperature

    def join(
        self,
        loss: Float[Tensor, ""],
        logits: Float[Tensor, "b k"],
        images: Float[Tensor, "b c h w"],
        card: ModelCard,
    ) -> Float[Tensor, ""]:
        """(1 - share) times the loss on the labels, plus share T^2 KL(teacher || student) at temperature T."""
        told = self.answer(images, card).div(self.temperature).log_softmax(1)
        guessed = (logits / self.temperature).log_softmax(1)
        gap = (told.exp() * (told - guessed)).sum(1).mean()
        return (1 - self.share) * loss + self.share * self.temperature**2 * gap

    @torch.no_grad()
    def answer(self, images: Float[Tensor, "b c h w"], card: ModelCard) -> Float[Tensor, "b k"]:
        """The teacher's logits for images that were normalised as the student's card says."""
        now, then = card.preprocess, self.net.card.preprocess
        self.net.to(images.device)
        if (now.mean, now.std) != (then.mean, then.std):
            rows = torch.tensor((now.mean, now.std, then.mean, then.std))
            columns = copy_to_device(rows, images.device)[:, :, None, None]
            images = (images * columns[1] + columns[0] - columns[2]) / columns[3]
        if images.shape[-2:] != then.size:
            images = F.interpolate(images, size=then.size, mode="bicubic", antialias=True)
        return self.net(images).float()


def prepare(config: ClassifyConfig) -> Run:
    """Open the data, build the network, and place it."""
    loading = config.loading
    source, held_out = train_and_eval(config.data, loading.eval_fraction, config.loop.seed, **loading.columns)
    classes = tuple(source.classes or ())
    if not classes:
        raise UserError(
            f"{config.data} has no labels, and classification needs them; name --loading.label-column"
        )
    if len(classes) == 1:
        raise UserError(
            f"{config.data} has one class, {classes[0]!r}, and two are needed; add another folder of images"
        )
    net = build_network(config, classes, dict(source.groupings))
    how = net.card.preprocess
    return make_run(
        config,
        net,
        Classify(
            match_preprocessing(config.augment, how),
            net.card,
            len(classes),
            config.loss,
            load_teacher(config, classes),
        ),
        make_loader(source, loading, how, train=True, seed=config.loop.seed),
        make_loader(held_out, loading, how, train=False),
        source.fingerprint,
        (len(source), len(held_out)),
    )


def load_teacher(config: ClassifyConfig, classes: tuple[str, ...]) -> Teacher | None:
    """The network to learn from, if one is named."""
    if config.teacher is None:
        return None
    net = weights.load(config.teacher).float()
    if (
        isinstance(net, Segmenter)
        or net.config.num_classes != len(classes)
        or (net.card.classes or classes) != classes
    ):
        raise UserError(
            f"the teacher {config.teacher} knows {net.config.num_classes} classes, which are not the {len(classes)} of "
            f"{config.data}; give a classifier that was trained on them"
        )
    return Teacher(net, config.teacher_share, config.temperature)


def build_network(
    config: ClassifyConfig, classes: tuple[str, ...], groupings: dict[str, tuple[str, ...]]
) -> Network:
    """The network to train: by name with random weights, or loaded; with a head for `classes`."""
    with torch.random.fork_rng():
        torch.manual_seed(config.loop.seed)
        if config.init is None:
            changes: dict[str, Any] = parsed(config.model_args)
            changes["num_classes"] = len(classes)
            if config.image_size is not None:
                changes["image_size"] = config.image_size
            if config.head is not None:
                changes["head"] = config.head
            net = build(config_for(config.model, **changes))
        else:
            net = load_backbone(config.init, config.image_size)
            if net.card.classes != classes or config.head is not None:
                net.replace_head(len(classes), config.head or "linear")
        if config.drop_path_rate is not None:
            set_drop_path(net, config.drop_path_rate)
        if config.train == "lora":
            add_low_rank(net, config.lora_rank)
    how = replace(net.card.preprocess, size=net.config.image_size)
    if config.eval_crop is not None:
        how = replace(how, crop=config.eval_crop)
    net.card = replace(
        net.card, preprocess=how, classes=classes, groupings=groupings, figures={}, **origin(config)
    )
    if config.train != "all":
        if config.train == "head":
            net.requires_grad_(False)
        for name in ("head", "head_distill"):
            if hasattr(net, name):
                getattr(net, name).requires_grad_(True)
    elif config.frozen_blocks:
        freeze(net, config.frozen_blocks)
    return net
