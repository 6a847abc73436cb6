"""From a source to uint8 batches: workers decode (`pictures`), small sets stay in memory, passes resume."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from triptych.data.config import DataConfig
from triptych.data.example import Batch, SourceChangedError
from triptych.data.images import Resize, ResizeLike
from triptych.data.loading.batch_order import BatchOrder, DividedOrder, EpochOrder
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
from triptych.data.source import Source, Streamable
from triptych.errors import UserError
from triptych.kernels.loader_workers import current_iterator, forget_iterator, shut_down

CACHE_BYTES = 1 << 30  # of uint8 pixels that `cache="auto"` keeps


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
    """A loader over `source`; see `Loader` for what it yields.

    Args:
        source: the examples.
        config: batch size, workers, cache, what to do about damaged images.
        preprocess: a model card's `Preprocess` or a `Resize`. Evaluation follows it; training takes its size
            and interpolation, and loads at `config.load_size`, else 8/7 of the size, rounded.
        train: a new order each epoch and only full batches, or the source's order and all of it.
        seed: with the epoch's number, it fixes the order.
        batch_size: instead of the one in `config`.
        smallest: height and width; a picture that is smaller counts as damaged, instead of being enlarged.
        order: which examples are in which batch, instead of what these say.

    Raises:
        UserError: an empty source.
    """
    if len(source) == 0:
        raise UserError("the data holds no images; give a source with at least one")
    resize = Resize(**{name: getattr(preprocess, name) for name in Resize.__dataclass_fields__})
    if train:
        height, width = config.load_size or tuple(round(side * 8 / 7) for side in resize.size)
        resize = replace(resize, size=(height, width), crop=1.0, mode="squash")
    dataset = DecodingDataset(
        source, resize, config.keep_alpha or _has_alpha(source), fast=train, min_size=min_size
    )
    if batch_size is None:
        batch_size = config.batch_size if train else config.eval_batch_size or config.batch_size
    workers = _processes(config)
    if order is None and config.stream and train:
        if not isinstance(source, Streamable):
            raise UserError(
                "this source is no stream; open it with stream=True, or leave --loading.stream out"
            )
        order = StreamOrder(source.bounds, batch_size, seed, buffer=config.shuffle_buffer, lanes=config.lanes)
        source.hold(order.buffered_rows(workers), order.window)
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
    """A loader for the evaluation of a segmenter: as `make_loader`'s, but with whole pictures and masks.

    In its batches "image" is a list of what `triptych.data.loading.test_time_views.feed` makes of each picture, and
    "mask" one of masks at their own sizes.
    """
    order = EpochOrder(len(source), batch_size, 0, shuffle=False)
    return Loader(
        FullImageDataset(source, preprocess, options, patch_size),
        order,
        _processes(config),
        False,
        config.on_bad_image,
    )


def _processes(config: DataConfig) -> int:
    return min(config.workers, available_cores())


def _has_alpha(source: Source) -> bool:
    """Whether all batches are RGBA: only for sources of RGBA arrays, such as the emoji."""
    try:
        image = source[0].image
    except UserError:
        return False
    return isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[-1] == 4


class Loader(StatefulDataLoader):
    """Iterating is one epoch; the next iteration is the next.

    It yields `triptych.data.example.Batch`. `bad` collects the damaged images of all batches. `state_dict()` within the
    loop is the position in the epoch; after `load_state_dict()` the next iteration yields exactly the batches that were
    still to come. The state is two integers, because the order is a function of (seed, epoch): torchdata's own state
    would fix the number of workers.

    Raises (while iterating):
        UserError: a damaged image, where `on_bad_image` is "fail"; what the examples lie in is missing or has changed;
            names the file.
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
        # A batch of a stream is made by all workers together, so that each reads parts of the data of its own.
        self._shares = max(1, workers) if isinstance(order, StreamOrder) and self._cache is None else 1
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*set_vital"
            )  # torchdata 0.11 calls what torch deprecates
            super().__init__(
                dataset,  # type: ignore[arg-type]
                batch_sampler=self._plan,  # type: ignore[arg-type]
                persistent_workers=workers > 0 and not cached,  # with a cache one epoch is all they do
                **loader_options(workers, 2 * self._shares),
            )

    @property
    def source(self) -> Source:
        """What the batches hold examples of."""
        return cast(BatchDataset, self.dataset).source

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._order)

    def divide(self, rank: int, world: int, within: bool) -> None:
        """Give process `rank` of `world` its part from now on (`Divided`). Within batches, those of which it has no
        picture come too, empty, so that all processes count alike."""
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
            next(fetched, None)  # lets the workers end
        except BaseException:
            if current_iterator(self) is fetched:
                forget_iterator(self)
            with deferred_interrupt(HOLDS_LOCK):
                shut_down(fetched)
            raise
        self.epoch, self._done = self.epoch + 1, 0

    def _next(self, fetched: Iterator[Batch]) -> Batch:
        """A batch that was fetched, put together if several workers made it."""
        with deferred_interrupt(HOLDS_LOCK):
            parts = [next(fetched) for _ in range(self._shares)]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _note_bad(self, bad: dict[str, str]) -> None:
        if bad and self._on_bad_image == "fail":
            raise UserError(f"{next(iter(bad.values()))}, or set on_bad_image to skip")
        self.bad.update(bad)

    def state_dict(self) -> dict[str, int]:
        """How far it came: the epoch, and the batches of it that were given out."""
        return {"epoch": self.epoch, "batch": self._done}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """The next iteration goes on from there, whatever the number of workers."""
        if not 0 <= state_dict["batch"] <= len(self):
            raise UserError(
                f"the state is at batch {state_dict['batch']} of an epoch of {len(self)}; "
                "resume with the data and batch size that it was made with"
            )
        self.epoch, self._resume_at = state_dict["epoch"], state_dict["batch"]
        self._done = self._resume_at


class _Plan:
    """What the workers are asked for, request by request: made as they go."""

    requests: Callable[[], Iterator[np.ndarray]] = staticmethod(lambda: iter(()))

    def __iter__(self) -> Iterator[list[int]]:
        return (rows.tolist() for rows in self.requests())


def _requests(batches: Sequence[np.ndarray], shares: int) -> Callable[[], Iterator[np.ndarray]]:
    """What is asked for of each batch, in as many parts as workers share it."""
    return lambda: (part for rows in batches if len(rows) for part in np.array_split(rows, shares))


def _joined(parts: "list[Any]") -> Batch:
    """One batch of several, one after the other."""
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
    """Decoded examples by row, filled as they come."""

    def __init__(self, dataset: DecodingDataset):
        count = len(dataset.source)
        self.images = torch.empty(count, *dataset.shape, dtype=torch.uint8)  # pages are taken when written
        masks = np.empty((count * dataset.has_masks, *dataset.shape[1:]), dataset.mask_type)
        self.masks = torch.from_numpy(masks)
        self.labels = torch.empty(count, dtype=torch.int64)
        self.aspects = torch.empty(count)
        self.captions: list[str | None] = [None] * count
        self.ids = [""] * count
        self.seen = np.zeros(count, bool)
        self.good = np.zeros(count, bool)

    def missing(self, rows: np.ndarray) -> np.ndarray:
        return np.unique(rows[~self.seen[rows]])

    def batch(self, rows: np.ndarray, absent: np.ndarray, fetched: Batch) -> Batch:
        """The batch of `rows`, after what was fetched for the absent ones among them is kept."""
        at = fetched["row"]
        if at:
            self.images[at], self.labels[at] = fetched["image"], fetched["label"]
            self.aspects[at] = fetched["aspect"]
            if "mask" in fetched:
                self.masks[at] = fetched["mask"]
        for row, caption, name in zip(at, fetched["caption"], fetched["id"], strict=True):
            self.captions[row], self.ids[row] = caption, name
        self.seen[absent] = True
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
