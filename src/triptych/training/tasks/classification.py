"""Image classification: the task, distillation, and building a run."""

import logging
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
from triptych.errors import CheckpointError, DataError
from triptych.evaluation.class_names import describe_unmeasured
from triptych.evaluation.classification import measure_classification
from triptych.heads.segmenter import Segmenter
from triptych.layers.lora import add_low_rank
from triptych.model_card import ModelCard
from triptych.models.registry import build, config_for
from triptych.network import Network
from triptych.training.configs.base import ClassifyConfig
from triptych.training.runner import Run, make_run, match_preprocessing
from triptych.training.task import LossOutput
from triptych.training.tasks.class_weights import count_labels, read_class_weights
from triptych.training.tasks.initial_network import (
    describe_origin,
    freeze,
    load_backbone,
    parse_model_args,
    read_as,
    set_drop_path,
)

log = logging.getLogger(__name__)


class Classify:
    """Classification of augmented batches with soft targets.

    The loss is the cross entropy, or the sum of a binary cross entropy for each class, with target 1 for all classes
    that are mixed into an image (DeiT III, Touvron et al. 2022, Section 3.1).

    Args:
        config: augmentation.
        card: model card of the network.
        num_classes: number of classes.
        loss: "cross_entropy" or "binary".
        teacher: for distillation; None is off.
        class_weights: weight of each class in the loss; None is 1.
    """

    headline = "top1"

    def __init__(
        self,
        config: AugmentConfig,
        card: ModelCard,
        num_classes: int,
        loss: str = "cross_entropy",
        teacher: "Teacher | None" = None,
        class_weights: Float[Tensor, " k"] | None = None,
    ):
        self.config, self.card, self.num_classes, self.loss_type = config, card, num_classes, loss
        self.teacher, self.class_weights = teacher, class_weights

    def loss(self, model: nn.Module, batch: TrainBatch) -> LossOutput:
        with torch.autocast(batch["image"].device.type, enabled=False):  # images are augmented in fp32
            images, targets = augment(
                batch["image"], batch["label"], self.config, batch["seed"], self.num_classes, batch["aspect"]
            )
        assert targets is not None  # there are labels
        logits = model(images).float()  # B K
        if self.loss_type == "binary":
            present = (targets > self.config.label_smoothing / self.num_classes).float()
            losses = F.binary_cross_entropy_with_logits(logits, present, reduction="none")  # B K
        else:
            losses = -targets * logits.log_softmax(dim=1)
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(losses)
            losses = losses * self.class_weights
        loss = losses.sum(1).mean()
        if self.teacher is not None:
            loss = self.teacher.distillation_loss(loss, logits, images, self.card)
        top1 = (logits.argmax(1) == batch["label"]).float().mean()
        return LossOutput(loss, {"train_top1": top1.detach()})

    def evaluate(
        self, model: nn.Module, loader: Iterable[Batch], group: ProcessGroup = SINGLE_PROCESS
    ) -> Iterator[tuple[str, float]]:
        metrics = measure_classification(
            model, loader, self.card.preprocess, self.num_classes, self.card.groupings, group
        )
        for name, value in metrics.items():
            if isinstance(value, int | float):
                yield name, value

    def rank(self, metrics: dict[str, float], /) -> tuple[float, ...]:
        """Rank by top-1, and by the loss if it is equal, which is frequent on small sets."""
        return metrics["top1"], -metrics["loss"]

    def product(self, net: Any) -> Any:
        return net


class Teacher:
    """Distillation (Hinton et al. 2015, Section 2): the student is also trained to predict the probabilities that a
    trained network of the same classes predicts for the same augmented images.

    Args:
        net: the teacher; it gets frozen.
        share: weight of the distillation loss, from 0 to 1; the loss on labels has the rest.
        temperature: temperature that both networks' logits are divided by.
    """

    def __init__(self, net: Network, share: float, temperature: float):
        self.net, self.share, self.temperature = net.eval().requires_grad_(False), share, temperature

    def distillation_loss(
        self,
        loss: Float[Tensor, ""],
        logits: Float[Tensor, "b k"],
        images: Float[Tensor, "b c h w"],
        card: ModelCard,
    ) -> Float[Tensor, ""]:
        """Return (1 - share) loss + share T^2 KL(teacher || student), at temperature T.

        Args:
            loss: loss on the labels.
            logits: logits of the student.
            images: inputs of the student.
            card: model card of the student.
        """
        targets = self.predict(images, card).div(self.temperature).log_softmax(1)
        predicted = (logits / self.temperature).log_softmax(1)
        divergence = (targets.exp() * (targets - predicted)).sum(1).mean()
        return (1 - self.share) * loss + self.share * self.temperature**2 * divergence

    @torch.no_grad()
    def predict(self, images: Float[Tensor, "b c h w"], card: ModelCard) -> Float[Tensor, "b k"]:
        """Return the teacher's logits for images that are normalized as the student's card says."""
        current, needed = card.preprocess, self.net.card.preprocess
        self.net.to(images.device)
        if (current.mean, current.std) != (needed.mean, needed.std):
            rows = torch.tensor((current.mean, current.std, needed.mean, needed.std))
            columns = copy_to_device(rows, images.device)[:, :, None, None]
            images = (images * columns[1] + columns[0] - columns[2]) / columns[3]
        if images.shape[-2:] != needed.size:
            images = F.interpolate(images, size=needed.size, mode="bicubic", antialias=True)
        return self.net(images).float()


def prepare(config: ClassifyConfig) -> Run:
    """Open the data, build the network, and place it on the device.

    Raises:
        ConfigError, DataError, CheckpointError: config, data and weights do not fit together.
    """
    loading = config.loading
    source, held_out = train_and_eval(config.data, loading.eval_fraction, config.loop.seed, **loading.columns)
    classes = tuple(source.classes or ())
    if not classes:
        raise DataError(
            f"{config.data} has no labels, and classification needs them: put the images of each class into a "
            "folder, add a table of file names and labels, or name --loading.label-column"
        )
    if len(classes) == 1:
        raise DataError(
            f"{config.data} has one class, {classes[0]!r}, and two are needed; add another folder of images"
        )
    if held_out.labels is not None and (note := describe_unmeasured(count_labels(held_out), classes)):
        log.warning("evaluation: %s", note)
    net = build_network(config, classes, dict(source.groupings))
    preprocess = net.card.preprocess
    return make_run(
        config,
        net,
        Classify(
            match_preprocessing(config.augment, preprocess),
            net.card,
            len(classes),
            config.loss.type,
            load_teacher(config, classes, net.config.in_channels),
            read_class_weights(config.loss.class_weights, classes, lambda: count_labels(source)),
        ),
        make_loader(source, loading, preprocess, train=True, seed=config.loop.seed),
        make_loader(held_out, loading, preprocess, train=False),
        source.fingerprint,
        (len(source), len(held_out)),
    )


def load_teacher(config: ClassifyConfig, classes: tuple[str, ...], channels: int) -> Teacher | None:
    """Load the teacher of a config; None if it names none.

    Raises:
        CheckpointError: it is not a classifier of `classes`, or takes images of other than `channels` channels.
    """
    if config.teacher is None:
        return None
    net = weights.load(config.teacher).float()
    if getattr(net.config, "in_channels", channels) != channels:
        raise CheckpointError(
            f"the teacher {config.teacher} takes images of {net.config.in_channels} channels, and the network to train "
            f"{channels}; give a teacher of the same images"
        )
    if (
        isinstance(net, Segmenter)
        or net.config.num_classes != len(classes)
        or (net.card.classes or classes) != classes
    ):
        raise CheckpointError(
            f"the teacher {config.teacher} has {net.config.num_classes} classes, which are not the {len(classes)} of "
            f"{config.data}; give a classifier that was trained on them"
        )
    return Teacher(net, config.teacher_share, config.temperature)


def build_network(
    config: ClassifyConfig, classes: tuple[str, ...], groupings: dict[str, tuple[str, ...]]
) -> Network:
    """Return the network to train, created by name with random weights or loaded, with a head for `classes`."""
    with torch.random.fork_rng():
        torch.manual_seed(config.loop.seed)
        if config.init is None:
            changes: dict[str, Any] = parse_model_args(config.model_args)
            changes["num_classes"] = len(classes)
            if config.in_channels is not None:
                changes["in_channels"] = config.in_channels
            if config.image_size is not None:
                changes["image_size"] = config.image_size
            if config.head is not None:
                changes["head"] = config.head
            net = build(config_for(config.model, **changes))
        else:
            net = load_backbone(config.init, config.image_size, config.in_channels)
            if net.card.classes != classes or config.head is not None:
                net.replace_head(len(classes), config.head or "linear")
        if config.drop_path_rate is not None:
            set_drop_path(net, config.drop_path_rate)
        if config.train == "lora":
            add_low_rank(net, config.lora_rank)
    preprocess = replace(net.card.preprocess, size=net.config.image_size)
    preprocess = read_as(preprocess, config.loading, net.config.in_channels)
    if config.eval_crop is not None:
        preprocess = replace(preprocess, crop=config.eval_crop)
    net.card = replace(
        net.card,
        preprocess=preprocess,
        classes=classes,
        groupings=groupings,
        figures={},
        **describe_origin(config),
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
