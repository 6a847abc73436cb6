"""Measure generated pictures: beside real ones, and against what they were asked to show."""

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
from triptych.data.images import decode, resize_crop
from triptych.data.loading.loader import make_loader
from triptych.data.source import Source, Subset
from triptych.device import place_network
from triptych.errors import UserError
from triptych.evaluation.feature_extractor import Extractor
from triptych.evaluation.reference_statistics import read, reference, require
from triptych.evaluation.results import GenerationResult
from triptych.evaluation.runtime import Progress
from triptych.metrics.classification import ClassificationMetrics
from triptych.metrics.generation import GenerationMetrics
from triptych.model_card import ModelCard
from triptych.models.configs.image_tokens import ImageTokensConfig
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.network import Network

SEEDS = 2**32


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What one picture is to be painted from."""

    seed: int
    prompt: str = ""
    label: int | None = None
    """The class, by the model's index; of a model that takes one."""
    row: int | None = None
    """Of the data: the picture whose caption or class it is."""


def ask(
    config: LatentDiffusionConfig, card: ModelCard, source: Source | None, count: int, seed: int = 0
) -> list[Asked]:
    """What to paint so that the pictures should be distributed as the data: its captions, or its classes.

    Rows are drawn without repetition, by `seed`, until all were drawn, and then again. Picture k has the seed
    `seed` + k. A model of classes whose names the data does not have gets all its classes equally often.

    Raises:
        UserError: the model reads prompts and the data has no captions, or pictures without; it is shown boxes, masks
            or maps.
    """
    if count < 2:
        raise UserError(f"samples is {count}; a distance needs 2 at least, and means little below thousands")
    seeds = [(seed + k) % SEEDS for k in range(count)]
    pictured = isinstance(config.text_encoder, ImageTokensConfig)
    if config.concat != "none" or pictured or getattr(config.text_encoder, "boxes", False):
        shown = config.concat if config.concat != "none" else "a picture" if pictured else "boxes"
        raise UserError(
            f"the model is shown {shown} besides, of which the data says nothing; paint with it, then measure the "
            "folder with --samples DIR"
        )
    if config.classes is None and config.text_encoder is None:
        return [Asked(seed=s) for s in seeds]
    if config.classes is None:
        rows = _rows(source, count, seed, "prompts") if source is not None else []
        captions = {row: source[row].caption for row in set(rows)} if source is not None else {}
        lacking = sum(caption is None for caption in captions.values())
        if lacking or source is None:
            raise UserError(
                f"the model reads prompts, and {lacking or 'none'} of {len(captions)} images of the data have no "
                "caption; name the column with --caption-column, or put captions into its metadata.jsonl"
            )
        return [
            Asked(seed=s, prompt=captions[row] or "", row=row) for s, row in zip(seeds, rows, strict=True)
        ]
    names, number = card.classes or (), config.classes.num_classes
    if source is not None and source.labels is not None and set(source.classes or ()) <= set(names):
        index = [names.index(name) for name in source.classes or ()]
        rows = _rows(source, count, seed, "classes")
        labels = [index[source.labels[row]] for row in rows]
        return [Asked(seed=s, label=i, row=row) for s, i, row in zip(seeds, labels, rows, strict=True)]
    labels = _order(number, count, seed)
    return [Asked(seed=s, label=i) for s, i in zip(seeds, labels, strict=True)]


def evaluate_generation(
    pictures: Iterable[Image],
    extractor: Extractor,
    source: Source | None = None,
    *,
    asked: Sequence[Asked] = (),
    reference_file: str | Path | None = None,
    classifier: Network | None = None,
    name: str = "",
    loading: DataConfig | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> GenerationResult:
    """Figures of generated pictures beside real ones.

    Args:
        pictures: the generated ones, of any kind, one after another; they are rounded to 8 bits before anything is
            measured, as files hold them.
        extractor: from `open_extractor`.
        source: the real ones; None takes the reference file's.
        asked: what each picture was to show, in the pictures' order; for `classifier`.
        reference_file: where their statistics are, or are kept; see `references.reference`.
        classifier: a network that knows the source's classes: how often does it find in a generated picture the class
            of the real one whose caption was the prompt, or a coarser name of it, beside how often in the real one?
        name: of the data, for people.
        seed: of the metrics' subsets.

    Returns:
        The metrics of `generation_figures`; with a classifier `faithfulness`, too.

    Raises:
        UserError: no real pictures, a reference of something else, or a classifier that does not know the classes.
    """
    loading = loading or DataConfig()
    if source is not None:
        real = reference(source, extractor, reference_file, name=name, loading=loading, progress=progress)
    elif reference_file is not None:
        real = read(reference_file)
        require(reference_file, real, extractor.identity)
    else:
        raise UserError("there are no real pictures to compare with; give --data, or a --reference file")
    faith = None
    if classifier is not None:
        faith = Faithfulness(classifier, source, asked, extractor.device)
    where = extractor.device if extractor.device.type == "cuda" else "cpu"  # where there is fp64
    metrics = GenerationMetrics(extractor, real.statistics, seed=seed, device=where)
    size, at = loading.eval_batch_size or loading.batch_size, 0
    for batch in _batches(pictures, size):
        metrics.update(extractor.fitted(batch))
        if faith is not None:
            faith.update(batch, at)
        at += len(batch)
    figures = metrics.compute()
    return GenerationResult(
        **figures,
        faithfulness=None if faith is None else faith.compute(loading),
        extractor=extractor.name,
        identity=real.identity,
        protocol=protocol(real.identity, figures["count"]),
        bad=dict(real.bad),
    )


def protocol(identity: dict[str, Any], count: int) -> str:
    """Hexadecimal digits that figures must share to be compared: of the extractor, the preparation, the real pictures
    and the number of generated ones."""
    said = {**identity, "data": identity["data"]["fingerprint"], "generated": count}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


class Faithfulness:
    """How often a classifier trained on real pictures finds in a picture what was asked for.

    Args:
        classifier: with names of classes and groupings on its card.
        source: the real pictures, with labels.
        asked: what each generated picture was to show.

    Raises:
        UserError: no labels, or classes that the classifier does not know.
    """

    def __init__(
        self, classifier: Network, source: Source | None, asked: Sequence[Asked], device: torch.device
    ) -> None:
        card = classifier.card
        if source is None or source.labels is None or any(one.row is None for one in asked) or not asked:
            raise UserError(
                "faithfulness needs data with labels whose captions or classes the pictures were made from; leave "
                "--classifier out"
            )
        unknown = sorted(set(source.classes or ()) - set(card.classes or ()))
        if unknown:
            raise UserError(
                f"the classifier does not know {len(unknown)} of the data's classes ({', '.join(unknown[:3])}); give "
                "another --classifier, or none"
            )
        index = np.array([(card.classes or ()).index(name) for name in source.classes or ()])
        self.rows = np.array([one.row for one in asked])
        self.truth = torch.from_numpy(index[source.labels[self.rows]])
        self.card, self.source, self.index, self.device = card, source, torch.from_numpy(index), device
        self.net: Any = place_network(classifier, device, torch.float32)
        self.made = self._metrics()

    def update(self, pictures: Sequence[Image], start: int) -> None:
        """Add generated pictures, the first of which is number `start`."""
        how = self.card.preprocess
        fitted = [
            resize_crop(decode(one), how.size, how.crop, how.mode, how.interpolation, how.background)
            for one in pictures
        ]
        images = torch.from_numpy(np.moveaxis(np.stack(fitted), 3, 1).copy())
        self._add(self.made, images, self.truth[start : start + len(pictures)])

    def compute(self, loading: DataConfig) -> dict[str, Any]:
        """Shares of the generated and of the real pictures: "top1", and each grouping of the classifier."""
        real = self._metrics()
        for batch in make_loader(Subset(self.source, self.rows), loading, self.card.preprocess, train=False):
            self._add(real, batch["image"], self.index[batch["label"]])
        names = ("top1", *self.card.groupings)
        found = {side: m.compute() for side, m in (("generated", self.made), ("real", real))}
        return {side: {name: figures[name] for name in names} for side, figures in found.items()}

    def _metrics(self) -> ClassificationMetrics:
        return ClassificationMetrics(len(self.card.classes or ()), self.card.groupings)

    @torch.inference_mode()
    def _add(self, metrics: ClassificationMetrics, images: torch.Tensor, truth: torch.Tensor) -> None:
        how = self.card.preprocess
        prepared = preprocess_batch(images.to(self.device), how.mean, how.std, how.background)
        metrics.update(self.net(prepared).float().cpu(), truth)


def _rows(source: Source, count: int, seed: int, what: str) -> list[int]:
    if not len(source):
        raise UserError(f"the data holds no pictures to take {what} from")
    return _order(len(source), count, seed)


def _order(number: int, count: int, seed: int) -> list[int]:
    """`count` of the first `number` whole numbers: a random order, and when it is through another one."""
    orders = (np.random.default_rng([seed, turn]).permutation(number).tolist() for turn in itertools.count())
    return list(itertools.islice(itertools.chain.from_iterable(orders), count))


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch
