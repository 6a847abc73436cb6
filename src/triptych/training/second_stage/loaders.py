"""Loaders of the second stage: cached latents or images, of one shape or in buckets of several shapes."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from triptych.data.loading.aspect_buckets import (
    BucketedDataset,
    BucketOrder,
    ImageShape,
    assign_buckets,
    bucket_shapes,
)
from triptych.data.loading.batch_order import EpochOrder
from triptych.data.loading.loader import Loader, make_loader
from triptych.data.source import Source, Subset
from triptych.distributed import SINGLE_PROCESS, ProcessGroup
from triptych.model_card import Preprocess
from triptych.models.autoencoder import FirstStage
from triptych.training.configs.second_stage import SecondStageConfig, flips_only
from triptych.training.second_stage.latent_cache import LatentCache

log = logging.getLogger(__name__)


def latent_loader(
    config: SecondStageConfig, source: Source, first_stage: FirstStage, preprocess: Preprocess, train: bool
) -> Loader:
    """Return a loader of latents, which are cached once `fill_caches` was called."""
    cache = config.cache
    mirrored = train and config.augment.flip > 0

    def cached(part: Source, shape: ImageShape) -> LatentCache:
        options = (cache.dtype, cache.shard, cache.batch_size)
        return LatentCache(
            part, first_stage, replace(preprocess, size=shape), mirrored, config.loading, *options
        )

    if config.buckets > 1:
        return _bucketed(config, source, first_stage, preprocess, train, cached, workers=0)
    size = _batch_size(config, train)
    order = EpochOrder(len(source), size, config.loop.seed, shuffle=train)
    return Loader(cached(source, preprocess.size), order, 0, False, config.loading.on_bad_image)


def image_loader(
    config: SecondStageConfig, source: Source, first_stage: FirstStage, preprocess: Preprocess, train: bool
) -> Loader:
    """Return a loader of images, which are encoded at each step."""
    loading = config.loading
    if config.buckets > 1:

        def decoded(part: Source, shape: ImageShape) -> Any:
            return make_loader(part, loading, replace(preprocess, size=shape), train=False).dataset

        return _bucketed(config, source, first_stage, preprocess, train, decoded, loading.workers)
    if loading.load_size is None and flips_only(config.augment):
        loading = replace(loading, load_size=preprocess.size)
    return make_loader(source, loading, preprocess, train=train, seed=config.loop.seed)


def fill_caches(
    folder: str | None, train: Loader, held_out: Loader, out: Path, group: ProcessGroup = SINGLE_PROCESS
) -> None:
    """Encode the latents that are not cached yet.

    Args:
        folder: folder of the cache; None is in the run's folder.
        train, held_out: loaders from `latent_loader`.
        out: the run's folder.
        group: the processes of the run, all of which call this.
    """
    root = Path(folder) if folder else out / "latents"
    deviations = []
    for loader, name in ((train, "train"), (held_out, "held-out")):
        for cache, part in _caches(loader):
            cache.fill(root / name / part, group)
            deviations.append(cache.deviation())
    if not 0.5 < (deviation := float(np.mean(deviations))) < 2:
        log.warning(
            "the latents have a standard deviation of %.3g, and diffusion expects 1: the first stage's scale was not "
            "measured",
            deviation,
        )


def _caches(loader: Loader) -> list[tuple[LatentCache, str]]:
    dataset: Any = loader.dataset
    if isinstance(dataset, BucketedDataset):
        return [
            (part, f"{part.preprocess.size[0]}x{part.preprocess.size[1]}") for part in dataset.parts.values()
        ]
    return [(dataset, "")]


def _bucketed(
    config: SecondStageConfig,
    source: Source,
    first_stage: FirstStage,
    preprocess: Preprocess,
    train: bool,
    make: Callable[[Source, ImageShape], Any],
    workers: int,
) -> Loader:
    shapes = bucket_shapes(preprocess.size, config.buckets, first_stage.config.downsample_factor)
    buckets = assign_buckets(source, shapes)
    dataset = BucketedDataset(buckets, lambda number, rows: make(Subset(source, rows), shapes[number]))
    order = BucketOrder(buckets, _batch_size(config, train), config.loop.seed, shuffle=train)
    return Loader(dataset, order, workers, False, config.loading.on_bad_image)


def _batch_size(config: SecondStageConfig, train: bool) -> int:
    loading = config.loading
    return loading.batch_size if train else loading.eval_batch_size or loading.batch_size
