"""Loaders of uint8 batches: worker processes decode, small data sets are cached, and epochs can be resumed."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from triptych.data.config import DataConfig
from triptych.data.example import Batch, SourceChangedError
from triptych.data.loading.batch_order import BalancedOrder, BatchOrder, DividedOrder, EpochOrder
from triptych.data.loading.collate import BatchDataset, DecodingDataset, FullImageDataset, empty_batch
from triptych.data.loading.stream_order import StreamOrder
from triptych.data.loading.test_time_views import ViewOptions
from triptych.data.loading.workers import (
    HOLDS_LOCK,
    available_cores,
    deferred_interrupt,
    loader_options,
    shut_down_at_exit,
)
from triptych.data.resizing import ResizeLike, resize_of
from triptych.data.source import Source, Streamable
from triptych.errors import ConfigError, DataError, TriptychError
from triptych.kernels.loader_workers import current_iterator, forget_iterator, shut_down

CACHE_BYTES = 1 << 30  # largest size of the decoded images that `cache="auto"` caches


def make_loader(
    source: Source,
    config: DataConfig,
    preprocess: ResizeLike,
    *,
    train: bool,
    seed: int = 0,
    batch_size: int | None = None,
    min_size: tuple[int, int] | None = None,
    order: BatchOrder | None = None,
) -> "Loader":
    """Create a loader over `source`; see `Loader` for what it yields.

    Args:
        source: the examples.
        config: batch size, workers, cache, and how to handle damaged images.
        preprocess: the `Preprocess` of a model card, or a `Resize`. Evaluation follows it exactly. Training uses its
            interpolation, and loads images at `config.load_size`, by default 8/7 of its size, rounded.
        train: shuffle each epoch and yield full batches only; otherwise yield each example once, in the source's order.
        seed: seed of the order, which depends on (seed, epoch).
        batch_size: overrides the batch size in `config`.
        min_size: height and width; a smaller image counts as damaged instead of being enlarged.
        order: overrides the order that the other arguments define.

    Raises:
        DataError: an empty source, or balanced sampling of a source without labels.
        ConfigError: `config.stream` with a source that is not a stream.
    """
    if len(source) == 0:
        raise DataError("the data holds no images; give a source with at least one")
    resize = resize_of(preprocess)
    if train:
        height, width = config.load_size or tuple(round(side * 8 / 7) for side in resize.size)
        resize = replace(resize, size=(height, width), crop=1.0, mode="squash")
    dataset = DecodingDataset(
        source,
        resize,
        config.keep_alpha or _has_alpha(source),
        fast=train,
        min_size=min_size,
        max_pixels=config.max_pixels,
    )
    if batch_size is None:
        batch_size = config.batch_size if train else config.eval_batch_size or config.batch_size
    workers = _processes(config)
    if order is None and config.stream and train:
        if not isinstance(source, Streamable):
            raise ConfigError(
                "the source was not opened as a stream; open it with stream=True, or omit --loading.stream"
            )
        order = StreamOrder(source.bounds, batch_size, seed, buffer=config.shuffle_buffer, lanes=config.lanes)
        source.hold(order.buffered_rows(workers), order.window)
    if order is None and config.sampling == "balanced" and train:
        if source.labels is None:
            raise DataError("the data has no labels to balance; leave --loading.sampling out")
        order = BalancedOrder(source.labels, batch_size, seed)
    order = order or EpochOrder(len(source), batch_size, seed, shuffle=train)
    cached = config.cache == "on" or (config.cache == "auto" and dataset.nbytes <= CACHE_BYTES)
    return Loader(dataset, order, workers, cached, config.on_bad_image)


def make_full_image_loader(
    source: Source,
    config: DataConfig,
    preprocess: ResizeLike,
    options: ViewOptions,
    patch_size: int,
    batch_size: int,
) -> "Loader":
    """Create a loader for evaluating a segmenter on full images.

    In its batches "image" is a list with the views of each image (`triptych.data.loading.test_time_views.make_views`),
    and "mask" is a list of masks at their own sizes.

    Args:
        source, config, preprocess: as in `make_loader`.
        options: size, window, scales and flip of the views.
        patch_size: smallest side of a view in pixels.
        batch_size: number of images in a batch.
    """
    order = EpochOrder(len(source), batch_size, 0, shuffle=False)
    return Loader(
        FullImageDataset(source, preprocess, options, patch_size, config.max_pixels),
        order,
        _processes(config),
        False,
        config.on_bad_image,
    )


def _processes(config: DataConfig) -> int:
    return min(config.workers, available_cores())


def _has_alpha(source: Source) -> bool:
    """Return whether the source holds RGBA arrays, as the emoji do: then all batches are RGBA."""
    try:
        image = source[0].image
    except TriptychError:
        return False
    return isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[-1] == 4


class Loader(StatefulDataLoader):
    """Yields `triptych.data.example.Batch`es. Each iteration over the loader is one epoch.

    `bad` collects the damaged images of all batches: {id: reason}. `state_dict()` holds the position within the epoch;
    after `load_state_dict()` the next iteration yields exactly the remaining batches. The state is two integers,
    because the order is a function of (seed, epoch). torchdata's own state would fix the number of workers.

    Args:
        dataset: returns the batch of some indices.
        order: the indices in each batch.
        workers: number of worker processes; 0 decodes in the main process.
        cached: keep decoded images in memory.
        on_bad_image: "skip" or "fail".

    Raises (while iterating):
        DataError: an image is damaged and `on_bad_image` is "fail", or a file of the source is missing or has changed.
    """

    def __init__(
        self,
        dataset: BatchDataset,
        order: BatchOrder,
        workers: int,
        cached: bool,
        on_bad_image: str,
    ):
        self.bad: dict[str, str] = {}
        self.epoch = 0
        self._order, self._on_bad_image, self._in_step = order, on_bad_image, False
        self._done = self._resume_at = 0  # batches
        self._cache = _Cache(dataset) if cached and isinstance(dataset, DecodingDataset) else None
        self._plan = _Plan()
        # All workers together load each batch of a stream, so that each worker reads its own lanes.
        self._shares = max(1, workers) if isinstance(order, StreamOrder) and self._cache is None else 1
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*set_vital"
            )  # torchdata 0.11 calls a deprecated function of torch
            super().__init__(
                dataset,  # type: ignore[arg-type]
                batch_sampler=self._plan,  # type: ignore[arg-type]
                persistent_workers=workers > 0
                and not cached,  # with a cache they are needed for one epoch only
                **loader_options(workers, 2 * self._shares),
            )

    @property
    def source(self) -> Source:
        """The source of the examples."""
        return cast(BatchDataset, self.dataset).source

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self._order)

    def divide(self, rank: int, world: int, within: bool) -> None:
        """Restrict the loader to the part of process `rank` of `world` (see `DividedOrder`).

        If `within` is true, batches of which this process has no image are yielded empty, so that all processes
        iterate over the same number of batches.
        """
        self._order, self._in_step = DividedOrder(self._order, rank, world, within), within

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self._done, self._resume_at = self._resume_at, 0
        batches = self._order.batches(self.epoch)[self._done :]
        missing = batches if self._cache is None else [self._cache.missing(rows) for rows in batches]
        self._plan.requests = _requests(missing, self._shares)
        before, fetched = current_iterator(self), iter(())
        try:
            if any(map(len, missing)):
                with deferred_interrupt():
                    fetched = super().__iter__()
                if fetched is not before:
                    shut_down_at_exit(fetched)
            for rows, absent in zip(batches, missing, strict=True):
                batch = self._next(fetched) if len(absent) else empty_batch()
                if "gone" in batch:
                    raise SourceChangedError(batch["gone"])
                self._note_bad(batch["bad"])
                if self._cache is not None:
                    batch = self._cache.batch(rows, absent, batch)
                self._done += 1
                if batch["id"] or self._in_step:
                    yield batch
            next(fetched, None)  # so that the workers end
        except BaseException:
            if current_iterator(self) is fetched:
                forget_iterator(self)
            with deferred_interrupt(HOLDS_LOCK):
                shut_down(fetched)
            raise
        self.epoch, self._done = self.epoch + 1, 0

    def _next(self, fetched: Iterator[Batch]) -> Batch:
        """Return the next batch of the workers, joined from parts if they share each batch."""
        with deferred_interrupt(HOLDS_LOCK):
            parts = [next(fetched) for _ in range(self._shares)]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _note_bad(self, bad: dict[str, str]) -> None:
        if bad and self._on_bad_image == "fail":
            raise DataError(f"{next(iter(bad.values()))}, or set on_bad_image to skip")
        self.bad.update(bad)

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, and the number of its batches that have been yielded."""
        return {"epoch": self.epoch, "batch": self._done}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume from a position in the next iteration. The number of workers may differ.

        Raises:
            ConfigError: the position is beyond the end of the epoch.
        """
        if not 0 <= state_dict["batch"] <= len(self):
            raise ConfigError(
                f"the state is at batch {state_dict['batch']} of an epoch of {len(self)}; "
                "resume with the same data and batch size"
            )
        self.epoch, self._resume_at = state_dict["epoch"], state_dict["batch"]
        self._done = self._resume_at


class _Plan:
    """Batch sampler of the requests to the workers, which are created on demand."""

    requests: Callable[[], Iterator[np.ndarray]] = staticmethod(lambda: iter(()))

    def __iter__(self) -> Iterator[list[int]]:
        return (rows.tolist() for rows in self.requests())


def _requests(batches: Sequence[np.ndarray], shares: int) -> Callable[[], Iterator[np.ndarray]]:
    """Return a function that iterates over the indices of each batch, split into as many parts as workers share it."""
    return lambda: (part for rows in batches if len(rows) for part in np.array_split(rows, shares))


def _joined(parts: "list[Any]") -> Batch:
    """Concatenate the parts of a batch."""
    if gone := [part for part in parts if "gone" in part]:
        return gone[0]
    batch: dict[str, Any] = {}
    for name, first in cast(dict[str, Any], parts[0]).items():
        if isinstance(first, torch.Tensor):
            batch[name] = torch.cat([part[name] for part in parts])
        elif isinstance(first, dict):
            batch[name] = {key: value for part in parts for key, value in part[name].items()}
        else:
            batch[name] = [value for part in parts for value in part[name]]
    return cast(Batch, batch)


class _Cache:
    """Decoded examples by row, stored when they are first loaded."""

    def __init__(self, dataset: DecodingDataset):
        count = len(dataset.source)
        self.images = torch.empty(
            count, *dataset.shape, dtype=torch.uint8
        )  # memory is allocated when it is written
        masks = np.empty((count * dataset.has_masks, *dataset.shape[1:]), dataset.mask_type)
        self.masks = torch.from_numpy(masks)
        self.labels = torch.empty(count, dtype=torch.int64)
        self.aspects = torch.empty(count)
        self.captions: list[str | None] = [None] * count
        self.ids = [""] * count
        self.loaded = np.zeros(count, bool)
        self.good = np.zeros(count, bool)

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows that have not been loaded yet."""
        return np.unique(rows[~self.loaded[rows]])

    def batch(self, rows: np.ndarray, absent: np.ndarray, fetched: Batch) -> Batch:
        """Store the batch that was fetched for the missing rows, and return the batch of `rows`."""
        at = fetched["row"]
        if at:
            self.images[at], self.labels[at] = fetched["image"], fetched["label"]
            self.aspects[at] = fetched["aspect"]
            if "mask" in fetched:
                self.masks[at] = fetched["mask"]
        for row, caption, name in zip(at, fetched["caption"], fetched["id"], strict=True):
            self.captions[row], self.ids[row] = caption, name
        self.loaded[absent] = True
        self.good[at] = True

        rows = rows[self.good[rows]]
        keep = torch.from_numpy(rows)
        batch: Batch = {
            "image": self.images[keep],
            "label": self.labels[keep],
            "caption": [self.captions[row] for row in rows],
            "id": [self.ids[row] for row in rows],
            "aspect": self.aspects[keep],
            "row": rows.tolist(),
            "bad": fetched["bad"],
        }
        if len(self.masks):
            batch["mask"] = self.masks[keep]
        return batch
