"""What is learnt: a task turns a batch into a loss, and a model and a loader into figures."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from triptych import distributed
from triptych.data.augment.batch import augment, augment_with_masks, preprocess_batch
from triptych.data.config import AugmentConfig
from triptych.data.loading.test_time_views import ViewOptions
from triptych.data.masks import void_label
from triptych.device import sent
from triptych.heads.segmenter import Segmenter
from triptych.heads.sliding_window import parsed, strips_of
from triptych.metrics.classification import ClassificationMetrics
from triptych.metrics.segmentation import SegmentationMetrics
from triptych.model_card import Card
from triptych.network import Network
from triptych.train.configs.base import LossConfig

Batch = dict[str, Any]


class Task(Protocol):
    """What the loop needs to know of a task."""

    headline: str
    """The figure that says how good a model is."""
    config: AugmentConfig

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The mean loss of a batch in fp32, and what to log of it. `batch["seed"]` is all its randomness,
        `batch["progress"]` the share of the run that is done. What an opponent needs is left in the batch."""
        ...

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> Iterator[tuple[str, float]]:
        """Figures by name."""
        ...

    def rank(self, figures: dict[str, float]) -> tuple[float, ...]:
        """What orders evaluations; the greatest marks the best weights."""
        ...

    def product(self, net: Any) -> Any:
        """Of what was trained, the network that is kept."""
        ...


class Classify:
    """Classification of augmented batches with soft targets: cross entropy, or one binary cross entropy a class
    whose targets are 1 for every class that was mixed in (DeiT III, Touvron et al. 2022, Section 3.1)."""

    headline = "top1"

    def __init__(
        self,
        config: AugmentConfig,
        card: Card,
        num_classes: int,
        loss: str = "cross_entropy",
        teacher: "Teacher | None" = None,
    ):
        self.config, self.card, self.num_classes, self.kind = config, card, num_classes, loss
        self.teacher = teacher

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
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
        return loss, {"train_top1": right.detach()}

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> Iterator[tuple[str, float]]:
        for name, value in self.measure(model, loader).items():
            if isinstance(value, int | float):
                yield name, value

    def rank(self, figures: dict[str, float]) -> tuple[float, ...]:
        """By top-1; among equals, as a small set has many, by the loss."""
        return figures["top1"], -figures["loss"]

    def product(self, net: Any) -> Any:
        return net

    @torch.no_grad()
    def measure(self, model: nn.Module, loader: Iterable[Batch]) -> dict[str, Any]:
        """All of `ClassificationMetrics.compute`, arrays too."""
        device = next(model.parameters()).device
        metrics = ClassificationMetrics(self.num_classes, self.card.groupings).to(device)
        metrics.dist_sync_fn = distributed.gather_tensors
        how = self.card.preprocess
        for batch in loader:
            images = preprocess_batch(batch["image"].to(device), how.mean, how.std, how.background)
            metrics.update(model(images).float(), batch["label"].to(device))
        return metrics.compute()


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
        card: Card,
    ) -> Float[Tensor, ""]:
        """(1 - share) times the loss on the labels, plus share T^2 KL(teacher || student) at temperature T."""
        told = self.answer(images, card).div(self.temperature).log_softmax(1)
        guessed = (logits / self.temperature).log_softmax(1)
        gap = (told.exp() * (told - guessed)).sum(1).mean()
        return (1 - self.share) * loss + self.share * self.temperature**2 * gap

    @torch.no_grad()
    def answer(self, images: Float[Tensor, "b c h w"], card: Card) -> Float[Tensor, "b k"]:
        """The teacher's logits for images that were normalised as the student's card says."""
        now, then = card.preprocess, self.net.card.preprocess
        self.net.to(images.device)
        if (now.mean, now.std) != (then.mean, then.std):
            rows = torch.tensor((now.mean, now.std, then.mean, then.std))
            columns = sent(rows, images.device)[:, :, None, None]
            images = (images * columns[1] + columns[0] - columns[2]) / columns[3]
        if images.shape[-2:] != then.size:
            images = F.interpolate(images, size=then.size, mode="bicubic", antialias=True)
        return self.net(images).float()


class Segment:
    """Semantic segmentation: image and mask augmented alike, a weighted sum of losses."""

    headline = "miou"

    def __init__(self, config: AugmentConfig, card: Card, num_classes: int, loss: LossConfig):
        self.config, self.card, self.num_classes, self.weights = config, card, num_classes, loss

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        with torch.autocast(batch["image"].device.type, enabled=False):
            images, masks = augment_with_masks(
                batch["image"], batch["mask"], self.config, batch["seed"], batch["aspect"]
            )
        assert isinstance(model, Segmenter)
        logits, aux = model.with_aux(images)
        masks = masks.long()
        loss = pixel_loss(logits.float(), masks, self.weights)
        if aux is not None and self.weights.aux:
            loss = loss + self.weights.aux * pixel_loss(aux.float(), masks, self.weights)
        known = masks != void_label(self.num_classes)
        right = distributed.sum_over_batch(((logits.argmax(1) == masks) & known).sum())
        return loss, {"train_pixels": right / distributed.sum_over_batch(known.sum()).clamp(min=1)}

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> Iterator[tuple[str, float]]:
        for name, value in self.measure(model, loader).items():
            if isinstance(value, int | float):
                yield name, value

    def rank(self, figures: dict[str, float]) -> tuple[float, ...]:
        return figures["miou"], figures["pixel_accuracy"]

    def product(self, net: Any) -> Any:
        return net

    @torch.no_grad()
    def measure(self, model: nn.Module, loader: Iterable[Batch]) -> dict[str, Any]:
        """All of `SegmentationMetrics.compute`, arrays too, on pictures and masks at the size the network is fed."""
        device = next(model.parameters()).device
        metrics = SegmentationMetrics(self.num_classes, void_label(self.num_classes)).to(device)
        metrics.dist_sync_fn = distributed.gather_tensors
        how = self.card.preprocess
        for batch in loader:
            images = preprocess_batch(batch["image"].to(device), how.mean, how.std, how.background)
            metrics.update(model(images).float(), batch["mask"].to(device))
        return metrics.compute()

    @torch.no_grad()
    def measure_whole(
        self, model: nn.Module, loader: Iterable[Batch], passes: ViewOptions, batch_size: int
    ) -> dict[str, Any]:
        """The same of whole pictures (`make_whole_loader`), at each mask's own size: logits are enlarged to it."""
        device, K = next(model.parameters()).device, self.num_classes
        metrics = SegmentationMetrics(K, void_label(K)).to(device)
        how = self.card.preprocess

        def run(pieces: Sequence[np.ndarray]) -> Tensor:
            images = torch.from_numpy(np.stack(pieces)).to(device).permute(0, 3, 1, 2)
            return model(preprocess_batch(images.contiguous(), how.mean, how.std)).float()

        for batch in loader:
            looks = strips_of(
                run, batch["image"], passes.window_size, passes.overlap, passes.flip, batch_size
            )
            for strips, mask in zip(looks, batch["mask"], strict=True):
                truth, first = torch.as_tensor(mask).to(device), 0
                for guess, _ in parsed(strips, mask.shape, K):
                    metrics.update(guess[None], truth[None, first : first + len(guess)])
                    first += len(guess)
        return metrics.compute()


def pixel_loss(
    logits: Float[Tensor, "b k h w"], masks: Int[Tensor, "b h w"], weights: LossConfig
) -> Float[Tensor, ""]:
    """The weighted sum of `LossConfig` over the pixels of known class (`data.masks.void_of`); 0 where there is none.
    Of a batch that several processes share it is that of the whole, in each of them."""
    K = logits.shape[1]
    known = masks != void_label(K)
    count = distributed.sum_over_batch(known.sum()).clamp(min=1)
    logs = logits.log_softmax(dim=1)
    target = masks.masked_fill(~known, 0)
    right = logs.gather(1, target[:, None]).squeeze(1)  # b h w: log of the probability of the true class
    loss = logits.new_zeros(())
    if weights.cross_entropy:
        smooth = weights.label_smoothing
        each = -(1 - smooth) * right - smooth * logs.mean(dim=1)
        loss = (
            loss
            + weights.cross_entropy * distributed.sum_over_batch(each.masked_fill(~known, 0.0).sum()) / count
        )
    if weights.focal:
        # 1 - p, never 0: below gamma = 1 the slope of its power has no end there, though the loss is flat.
        wrong = (-right.expm1()).clamp(min=torch.finfo(right.dtype).tiny)
        each = -(wrong**weights.focal_gamma) * right
        loss = loss + weights.focal * distributed.sum_over_batch(each.masked_fill(~known, 0.0).sum()) / count
    if weights.dice:
        # Sums of each class over all pixels, without a map that says for each class where it is.
        hits = right.new_zeros(K).index_add(0, target.flatten(), (right.exp() * known).flatten())
        guessed = torch.einsum("bkhw,bhw->k", logs.exp(), known.to(logs))
        hits, guessed = distributed.sum_over_batch(hits), distributed.sum_over_batch(guessed)
        counted = known.flatten().int()
        truth = distributed.sum_over_batch(counted.new_zeros(K).index_add(0, target.flatten(), counted))
        dice = (2 * hits + 1) / (guessed + truth + 1)
        there = truth > 0
        loss = loss + weights.dice * (1 - dice).masked_fill(~there, 0.0).sum() / there.sum().clamp(min=1)
    return loss


class MaskedPixels:
    """SimMIM (Xie et al. 2022, Section 3): squares of the picture are hidden; the loss is the mean absolute error of
    the guessed pixels, normalised as the network's input is, on the hidden ones alone."""

    headline = "loss"

    def __init__(self, config: AugmentConfig, card: Card, patch: int, ratio: float):
        self.config, self.card, self.patch, self.ratio = config, card, patch, ratio

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        with torch.autocast(batch["image"].device.type, enabled=False):
            images, _ = augment(batch["image"], None, self.config, batch["seed"], aspect=batch["aspect"])
        return self.error(model, images, batch["seed"]), {}

    def error(
        self, model: nn.Module, images: Float[Tensor, "b c h w"], seed: Sequence[int]
    ) -> Float[Tensor, ""]:
        mask = random_squares(images, self.patch, self.ratio, seed)
        guessed = model(images, mask).float()
        wrong = (guessed - images).abs().mean(dim=1)
        return (wrong * mask).sum() / mask.sum()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> Iterator[tuple[str, float]]:
        """The loss, under masks that are the same each time."""
        device, how = next(model.parameters()).device, self.card.preprocess
        total, count = 0.0, 0
        for i, batch in enumerate(loader):
            images = preprocess_batch(batch["image"].to(device), how.mean, how.std, how.background)
            total += self.error(model, images, (0, batch.get("number", i))).item() * len(images)
            count += len(images)
        total, count = distributed.all_sum(total, count)
        yield "loss", total / count
        yield "count", int(count)

    def rank(self, figures: dict[str, float]) -> tuple[float, ...]:
        return (-figures["loss"],)

    def product(self, net: Any) -> Any:
        """The backbone: a fine-tuning run starts from it."""
        return net.backbone


def random_squares(
    images: Float[Tensor, "b c h w"], side: int, ratio: float, seed: Sequence[int]
) -> Bool[Tensor, "b h w"]:
    """True in the hidden squares, the same number in each image; a function of `seed` alone."""
    b, (rows, columns) = images.shape[0], (images.shape[-2] // side, images.shape[-1] // side)
    rng = np.random.default_rng([n % 2**64 for n in seed])
    order = distributed.draw_rows(b, lambda n: rng.random((n, rows * columns))).argsort(axis=1)
    hidden = torch.from_numpy(order < math.ceil(ratio * rows * columns)).view(b, rows, columns)
    hidden = sent(hidden, images.device).repeat_interleave(side, 1).repeat_interleave(side, 2)
    return F.pad(hidden, (0, images.shape[-1] - columns * side, 0, images.shape[-2] - rows * side))
