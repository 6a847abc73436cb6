"""Compare generated images with real ones, and with the prompts or classes that were requested."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from triptych.data.augment.batch import preprocess_batch
from triptych.data.config import DataConfig
from triptych.data.example import Image
from triptych.data.images import decode
from triptych.data.loading.loader import make_loader
from triptych.data.resizing import resize_crop
from triptych.data.source import Source, Subset
from triptych.device import place_network
from triptych.diffusion.config import NUM_SEEDS
from triptych.errors import CheckpointError, ConfigError, DataError
from triptych.evaluation.feature_extractor import Extractor
from triptych.evaluation.reference_statistics import (
    load_or_measure_reference,
    read_reference,
    require_same_identity,
)
from triptych.evaluation.results import GenerationResult
from triptych.evaluation.runtime import Progress
from triptych.metrics.classification import ClassificationMetrics
from triptych.metrics.generation import GenerationMetrics
from triptych.model_card import ModelCard
from triptych.models.configs.image_tokens import ImageTokensConfig
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.network import Network


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What one image is generated from."""

    seed: int
    prompt: str = ""
    label: int | None = None
    """The model's index of the class; None for a model without classes."""
    row: int | None = None
    """Row of the data that the caption or class is from."""


def make_requests(
    config: LatentDiffusionConfig, card: ModelCard, source: Source | None, count: int, seed: int = 0
) -> list[GenerationRequest]:
    """Return requests whose captions, or classes, are distributed as those of the data.

    Rows of the data are drawn at random without replacement, and again from all of them once all were drawn. Image k
    has the seed `seed` + k. If the data does not have the names of the model's classes, all classes are equally
    frequent.

    Args:
        config, card: those of the model.
        source: the data; an unconditional model needs none.
        count: number of images.
        seed: seed of the first image, and of the draws.

    Raises:
        ConfigError: `count` is below 2, or the model needs boxes, masks or images as condition.
        DataError: the model needs prompts, and the data lacks captions, at least for some images.
    """
    if count < 2:
        raise ConfigError(
            f"samples is {count}, and a distance needs at least 2; give thousands for a meaningful value"
        )
    _require_prompt_or_class(config)
    seeds = [(seed + k) % NUM_SEEDS for k in range(count)]
    if config.classes is None and config.text_encoder is None:
        return [GenerationRequest(seed=s) for s in seeds]
    if config.classes is None:
        rows, captions = _draw_captions(source, count, seed)
        return [
            GenerationRequest(seed=s, prompt=caption, row=row)
            for s, caption, row in zip(seeds, captions, rows, strict=True)
        ]
    names, num_classes = card.classes or (), config.classes.num_classes
    if source is not None and source.labels is not None and set(source.classes or ()) <= set(names):
        index = [names.index(name) for name in source.classes or ()]
        rows = _draw_rows(source, count, seed, "classes")
        labels = [index[source.labels[row]] for row in rows]
        return [
            GenerationRequest(seed=s, label=label, row=row)
            for s, label, row in zip(seeds, labels, rows, strict=True)
        ]
    labels = _random_order(num_classes, count, seed)
    return [GenerationRequest(seed=s, label=label) for s, label in zip(seeds, labels, strict=True)]


def _require_prompt_or_class(config: LatentDiffusionConfig) -> None:
    """Raise a ConfigError if the model needs a condition that the data cannot provide."""
    takes_image = isinstance(config.text_encoder, ImageTokensConfig)
    if config.concat != "none" or takes_image or getattr(config.text_encoder, "boxes", False):
        condition = config.concat if config.concat != "none" else "an image" if takes_image else "boxes"
        raise ConfigError(
            f"the model also needs {condition} as condition, which the data does not have; generate images with it, "
            "then evaluate their folder with --samples DIR"
        )


def _draw_captions(source: Source | None, count: int, seed: int) -> tuple[list[int], list[str]]:
    """Draw rows of the data, and return them and their captions."""
    rows = _draw_rows(source, count, seed, "prompts") if source is not None else []
    captions = {row: source[row].caption for row in set(rows)} if source is not None else {}
    num_missing = sum(caption is None for caption in captions.values())
    if num_missing or source is None:
        raise DataError(
            f"the model needs prompts, and {num_missing or 'none'} of {len(captions)} images of the data have no "
            "caption; name the column with --caption-column, or put captions into its metadata.jsonl"
        )
    return rows, [captions[row] or "" for row in rows]


def evaluate_generation(
    images: Iterable[Image],
    extractor: Extractor,
    source: Source | None = None,
    *,
    requests: Sequence[GenerationRequest] = (),
    reference_file: str | Path | None = None,
    classifier: Network | None = None,
    name: str = "",
    loading: DataConfig | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> GenerationResult:
    """Compare generated images with real ones.

    Args:
        images: the generated images (files or arrays), which may be a generator. They are rounded to 8 bits first, as
            in image files.
        extractor: from `open_extractor`.
        source: the real images; None uses the statistics in the reference file.
        requests: what each image was generated from, in the same order; needed by `classifier`.
        reference_file: file with the statistics of the real images; see `load_or_measure_reference`.
        classifier: a network with the classes of the source, which measures `faithfulness`: how often it predicts the
            requested class, or its coarser name, for generated and for real images.
        name: name of the data, for messages.
        seed: seed of the random subsets of metrics.

    Returns:
        The metrics of `compute_generation_metrics`, and `faithfulness` if there is a classifier.

    Raises:
        ConfigError: there are neither real images nor a reference file, or faithfulness cannot be measured.
        DataError: the reference file is damaged, or of other data or another extractor; or no real image can be read.
    """
    loading = loading or DataConfig()
    if source is not None:
        reference = load_or_measure_reference(
            source, extractor, reference_file, name=name, loading=loading, progress=progress
        )
    elif reference_file is not None:
        reference = read_reference(reference_file)
        require_same_identity(reference_file, reference, extractor.identity)
    else:
        raise ConfigError("there are no real images to compare with; give --data, or a --reference file")
    faithfulness = None
    if classifier is not None:
        faithfulness = Faithfulness(classifier, source, requests, extractor.device)
    metrics_device = extractor.device if extractor.device.type == "cuda" else "cpu"  # MPS has no fp64
    metrics = GenerationMetrics(extractor, reference.statistics, seed=seed, device=metrics_device)
    start = 0
    for batch in _batches(images, loading.eval_batch_size or loading.batch_size):
        metrics.update(extractor.prepare(batch))
        if faithfulness is not None:
            faithfulness.update(batch, start)
        start += len(batch)
    values = metrics.compute()
    return GenerationResult(
        **values,
        faithfulness=None if faithfulness is None else faithfulness.compute(loading),
        extractor=extractor.name,
        identity=reference.identity,
        protocol=protocol_hash(reference.identity, values["count"]),
        bad=dict(reference.bad),
    )


def protocol_hash(identity: dict[str, Any], count: int) -> str:
    """Return a hash that two results must share to be compared, as 16 hexadecimal digits.

    It depends on the extractor, the preparation, the real images and the number of generated ones.
    """
    hashed = {**identity, "data": identity["data"]["fingerprint"], "generated": count}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16]


class Faithfulness:
    """How often a classifier that was trained on real images predicts the class that was requested.

    Args:
        classifier: a network whose card has names of classes and groupings.
        source: the real images, with labels.
        requests: what each generated image was generated from.
        device: device of the classifier.

    Raises:
        ConfigError: there are no labels, or the requests are not from the data.
        CheckpointError: the classifier lacks classes of the data.
    """

    def __init__(
        self,
        classifier: Network,
        source: Source | None,
        requests: Sequence[GenerationRequest],
        device: torch.device,
    ) -> None:
        card = classifier.card
        rows = [request.row for request in requests]
        if source is None or source.labels is None or None in rows or not rows:
            raise ConfigError(
                "faithfulness needs data with labels, and images generated from its captions or classes; leave "
                "--classifier out"
            )
        unknown = sorted(set(source.classes or ()) - set(card.classes or ()))
        if unknown:
            raise CheckpointError(
                f"the classifier does not have {len(unknown)} of the data's classes ({', '.join(unknown[:3])}); give "
                "another --classifier, or none"
            )
        index = np.array([(card.classes or ()).index(name) for name in source.classes or ()])
        self.rows = np.array(rows)
        self.truth = torch.from_numpy(index[source.labels[self.rows]])
        self.card, self.source, self.index, self.device = card, source, torch.from_numpy(index), device
        self.net: Any = place_network(classifier, device, torch.float32)
        self.generated = self._metrics()

    def update(self, images: Sequence[Image], start: int) -> None:
        """Add generated images, the first of which is number `start`."""
        options = self.card.preprocess
        resized = [
            resize_crop(
                decode(image),
                options.size,
                options.crop,
                options.mode,
                options.interpolation,
                options.background,
            )
            for image in images
        ]
        batch = torch.from_numpy(np.moveaxis(np.stack(resized), 3, 1).copy())
        self._add(self.generated, batch, self.truth[start : start + len(images)])

    def compute(self, loading: DataConfig) -> dict[str, Any]:
        """Return the fraction of images whose class, and for each grouping whose coarser name, is predicted.

        Returns:
            {"generated": {"top1": ..., GROUPING: ...}, "real": {...}}
        """
        real = self._metrics()
        for batch in make_loader(Subset(self.source, self.rows), loading, self.card.preprocess, train=False):
            self._add(real, batch["image"], self.index[batch["label"]])
        names = ("top1", *self.card.groupings)
        metrics = {"generated": self.generated.compute(), "real": real.compute()}
        return {side: {name: values[name] for name in names} for side, values in metrics.items()}

    def _metrics(self) -> ClassificationMetrics:
        return ClassificationMetrics(len(self.card.classes or ()), self.card.groupings)

    @torch.inference_mode()
    def _add(self, metrics: ClassificationMetrics, images: torch.Tensor, truth: torch.Tensor) -> None:
        preprocess = self.card.preprocess
        normalized = preprocess_batch(
            images.to(self.device), preprocess.mean, preprocess.std, preprocess.background
        )
        metrics.update(self.net(normalized).float().cpu(), truth)


def _draw_rows(source: Source, count: int, seed: int, what: str) -> list[int]:
    if not len(source):
        raise DataError(f"the data has no images to take {what} from; name data with images")
    return _random_order(len(source), count, seed)


def _random_order(number: int, count: int, seed: int) -> list[int]:
    """Return `count` numbers below `number`: random permutations of all of them, one after the other."""
    orders = (np.random.default_rng([seed, turn]).permutation(number).tolist() for turn in itertools.count())
    return list(itertools.islice(itertools.chain.from_iterable(orders), count))


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch
