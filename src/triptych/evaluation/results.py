"""Results of evaluations: metrics by name, and the same as JSON. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import numpy as np
from jaxtyping import Float, Int

from triptych.metrics.classification import most_confused

MOST_CONFUSED_PAIRS = 100  # in JSON


@dataclass(frozen=True, eq=False, kw_only=True)
class EvaluationResult:
    """Fields and methods that all results have."""

    task: ClassVar[str]
    """"classification", "segmentation", "reconstruction" or "generation"."""
    count: int
    """Number of images, or of pixels for a segmenter."""
    bad: dict[str, str] = field(default_factory=dict)
    """Damaged images that were left out: {id: reason}."""

    def metrics(self) -> dict[str, float]:
        """Return the scalar metrics by name."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, int | float)}

    def to_json(self) -> dict[str, Any]:
        """Return the result in JSON's types, as metrics.json holds it. Absent metrics are left out; NaN is None."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name != "bad"}
        present = {name: value for name, value in values.items() if value is not None}
        return _plain({"task": self.task, **present, "skipped": self.bad})


@dataclass(frozen=True, eq=False, kw_only=True)
class PerClassResult(EvaluationResult):
    """A result with metrics for each class."""

    classes: tuple[str, ...]
    """Name of each class, by index."""
    groupings: dict[str, tuple[str, ...]]
    """Coarser name of each class, for each grouping."""

    @classmethod
    def of(
        cls,
        metrics: Mapping[str, Any],
        classes: Sequence[str],
        groupings: Mapping[str, Sequence[str]],
        bad: Mapping[str, str],
    ) -> Self:
        """Create a result from what the accumulator's `compute` returns.

        Args:
            metrics: of `ClassificationMetrics` or `SegmentationMetrics`.
            classes: name of each class, by index.
            groupings: coarser name of each class, for each grouping.
            bad: damaged images that were left out: {id: reason}.
        """
        return cls(
            **cls._metric_fields(metrics, groupings),
            classes=tuple(classes),
            groupings={name: tuple(names) for name, names in groupings.items()},
            bad=dict(bad),
        )

    @classmethod
    def _metric_fields(
        cls, metrics: Mapping[str, Any], groupings: Mapping[str, Sequence[str]]
    ) -> dict[str, Any]:
        """Return the metrics by the names of their fields."""
        return dict(metrics)


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassificationResult(PerClassResult):
    """Accuracy of a classifier. Fractions are from 0 to 1."""

    task: ClassVar[str] = "classification"
    loss: float
    """Mean cross entropy in nats."""
    top1: float
    """Fraction of images whose class has the largest logit."""
    top5: float
    """Fraction of images whose class is among the five largest logits."""
    mean_per_class: float
    """Mean of `per_class` over the classes that occur."""
    group_accuracy: dict[str, float]
    """Fraction of images whose coarser name is predicted, for each grouping of the classes."""
    per_class: Float[np.ndarray, " k"]
    """Accuracy on the images of each class; NaN if there are none."""
    per_class_count: Int[np.ndarray, " k"]
    """Number of images of each class."""
    confusion: Int[np.ndarray, "k k"] | None
    """Number of images by class (row) and prediction (column); None for more than 4096 classes."""

    @classmethod
    def _metric_fields(
        cls, metrics: Mapping[str, Any], groupings: Mapping[str, Sequence[str]]
    ) -> dict[str, Any]:
        values = {name: value for name, value in metrics.items() if name not in groupings}
        return {**values, "group_accuracy": {name: metrics[name] for name in groupings}}

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), **self.group_accuracy}

    def to_json(self) -> dict[str, Any]:
        """Return the metrics, those of each class and group by name, and the pairs of classes confused most."""
        per_class = zip(self.classes, self.per_class, self.per_class_count, strict=True)
        return _plain(
            {
                "task": self.task,
                **self.metrics(),
                "per_class": {name: {"accuracy": a, "count": n} for name, a, n in per_class},
                "per_group": {name: self._by_group(groups) for name, groups in self.groupings.items()},
                "most_confused": _confused_names(self.confusion, self.classes),
                "skipped": self.bad,
            }
        )

    def _by_group(self, groups: Sequence[str]) -> dict[str, dict[str, float]]:
        """Fraction of the images of each group whose class, and not only their group, is predicted."""
        result: dict[str, dict[str, float]] = {}
        for name, accuracy, count in zip(groups, self.per_class, self.per_class_count, strict=True):
            if count:
                group = result.setdefault(name, {"accuracy": 0.0, "count": 0})
                group["accuracy"] += float(accuracy) * int(count)
                group["count"] += int(count)
        for group in result.values():
            group["accuracy"] /= group["count"]
        return result


@dataclass(frozen=True, eq=False, kw_only=True)
class SegmentationResult(PerClassResult):
    """Metrics of a segmenter. All counts are of pixels, fractions are from 0 to 1."""

    task: ClassVar[str] = "segmentation"
    miou: float
    """Mean of `per_class_iou` over the classes that occur in masks or predictions."""
    pixel_accuracy: float
    """Fraction of pixels whose class is predicted."""
    mean_accuracy: float
    """Mean of `per_class_accuracy` over the classes that occur in masks."""
    per_class_iou: Float[np.ndarray, " k"]
    """Intersection over union of each class; NaN for a class that does not occur."""
    per_class_accuracy: Float[np.ndarray, " k"]
    """Fraction of the pixels of each class that are predicted as such; NaN if there are none."""
    per_class_count: Int[np.ndarray, " k"]
    """Number of pixels of each class."""
    confusion: Int[np.ndarray, "k k"]
    """Number of pixels by class (row) and prediction (column)."""

    def to_json(self) -> dict[str, Any]:
        """Return the metrics, those of each class by name, and the pairs of classes confused most."""
        per_class = zip(
            self.classes, self.per_class_iou, self.per_class_accuracy, self.per_class_count, strict=True
        )
        return _plain(
            {
                "task": self.task,
                **self.metrics(),
                "per_class": {
                    name: {"iou": iou, "accuracy": accuracy, "count": count}
                    for name, iou, accuracy, count in per_class
                },
                "most_confused": _confused_names(self.confusion, self.classes),
                "skipped": self.bad,
            }
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class ReconstructionResult(EvaluationResult):
    """Errors of an autoencoder's reconstructions: means over images, and distances of the two sets."""

    task: ClassVar[str] = "reconstruction"
    psnr: float
    """Peak signal-to-noise ratio in dB, at 8 bits."""
    ssim: float
    """Structural similarity (Wang et al. 2004), at most 1."""
    l1: float
    """Mean absolute error of values in [-1, 1]."""
    perceptual: float | None = None
    """Perceptual distance (`PerceptualConfig`)."""
    frechet: float | None = None
    """Fréchet distance between reconstructions and images (rFID in Inception's features)."""
    kernel: float | None = None
    """Kernel distance between reconstructions and images."""
    perplexity: float | None = None
    """Perplexity of the codebook; VQ only."""
    codes_used: float | None = None
    """Fraction of the codebook's entries that are used; VQ only."""
    extractor: str
    """Name of the network in whose features sets are compared."""
    identity: dict[str, Any]
    """Features and preparation of `frechet` and `kernel`; compare results of equal identity only."""


@dataclass(frozen=True, eq=False, kw_only=True)
class GenerationResult(EvaluationResult):
    """Distances between generated and real images, as sets of features; see `compute_generation_metrics`."""

    task: ClassVar[str] = "generation"
    real_count: int
    """Number of real images."""
    dimensions: int
    """Number of features of an image."""
    frechet: float
    """Fréchet distance (FID in Inception's features). Biased: compare results of equal `count` only."""
    frechet_floor: float
    """Fréchet distance that perfect samples would have at this count."""
    kernel: float
    """Kernel distance, as the mean over 100 random subsets. Unbiased."""
    kernel_std: float
    """Standard deviation over these subsets."""
    kernel_size: int
    """Number of images in a subset."""
    kernel_exact: float
    """Kernel distance over all pairs of images."""
    neighbors_count: int | None = None
    """Number of images of each set that precision, recall, density and coverage compare; None if fewer than six."""
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    inception_score: float | None = None
    """Inception score; only of extractors with classes."""
    inception_score_std: float | None = None
    faithfulness: dict[str, dict[str, float]] | None = None
    """Fraction of generated and of real images in which a classifier finds the requested class or group."""
    extractor: str
    """Name of the network in whose features sets are compared."""
    identity: dict[str, Any]
    """Features, preparation and real images of the metrics."""
    protocol: str
    """Hash of `identity` and `count`: compare results of equal protocol only."""
    settings: dict[str, Any] = field(default_factory=dict)
    """How the images were generated, or the folder that they are in."""

    def to_json(self) -> dict[str, Any]:
        """Return the result in JSON's types, with the settings in one level with the metrics."""
        values = super().to_json()
        if "neighbors_count" in values:  # files have the British spelling
            values["neighbours_count"] = values.pop("neighbors_count")  # words: quoted
        return {**values, **values.pop("settings")}


def _confused_names(confusion: Int[np.ndarray, "k k"] | None, classes: Sequence[str]) -> list[dict[str, Any]]:
    pairs = [] if confusion is None else most_confused(confusion, MOST_CONFUSED_PAIRS)
    return [
        {"truth": classes[truth], "prediction": classes[predicted], "count": count}
        for truth, predicted, count in pairs
    ]


def _plain(value: Any) -> Any:
    """Convert a value to JSON's types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
