"""Pictures in, names and probabilities out."""

import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from triptych.errors import UserError
from triptych.hardware import choose_device, choose_dtype, placed, say_dtype
from triptych.pipelines.pixels import Picture, fitted, images_below, name_of, normalised
from triptych.pipelines.results import Classification, Guess

log = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")


class ClassificationPipeline:
    """A classifier with what surrounds it: reading, resizing, normalising, batching, naming.

    ```python
    pipe = tp.ClassificationPipeline(net)           # or a name, a file, a RUN folder, a hub id
    pipe("cat.jpg", top=3)                          # <cat.jpg: tabby 0.81, tiger cat 0.12, lynx 0.02>
    pipe(["a.png", pil_image, array, open("b.jpg", "rb").read()])      # a list of them
    for found in pipe("folder/"): ...               # one after another, memory flat
    ```

    Args:
        net: a network with `card` (which holds preprocessing and class names), or what `tp.load` takes.
        device: None takes CUDA, then MPS, then the processor.
        dtype: "fp32", "bf16", "fp16"; None takes bf16 where the hardware multiplies it natively, and logs it
            once.
        batch_size: images a forward pass.
        workers: threads that read and resize ahead; 0 does it in between.
        on_bad_image: "fail" raises at the first image that cannot be read; "skip" leaves it out of the
            results, logs it, and lists it in `skipped`. A single image always raises.

    Raises:
        UserError: the network has no classes, or an argument is out of its range.
    """

    def __init__(
        self,
        net: nn.Module | str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int = 16,
        workers: int = 0,
        on_bad_image: Literal["skip", "fail"] = "fail",
    ) -> None:
        if batch_size < 1 or workers < 0:
            raise UserError(f"batch_size {batch_size} must be at least 1 and workers {workers} at least 0")
        if on_bad_image not in ("skip", "fail"):
            raise UserError(f"on_bad_image is {on_bad_image!r}, which must be 'skip' or 'fail'")
        if not isinstance(net, nn.Module):
            from triptych.weights import load

            net = load(net)
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.net: Any = placed(net, self.device, self.dtype)
        self.card = self.net.card
        self.config = self.net.config
        if self.config.num_classes == 0:
            raise UserError(
                "the network has no classes; tp.load(source, num_classes=N) gives it a head to train"
            )
        self.batch_size, self.workers, self.on_bad_image = batch_size, workers, on_bad_image
        self.skipped: list[str] = []

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class, by index; its number where the card has no names."""
        count, names = self.config.num_classes, self.card.classes
        return names if names and len(names) == count else tuple(f"class {i}" for i in range(count))

    @overload
    def __call__(self, images: bytes | Image.Image | np.ndarray, top: int = 5) -> Classification: ...
    @overload
    def __call__(self, images: str | os.PathLike[str], top: int = 5) -> Any: ...
    @overload
    def __call__(self, images: Sequence[Picture], top: int = 5) -> list[Classification]: ...
    @overload
    def __call__(self, images: Iterable[Picture], top: int = 5) -> Iterator[Classification]: ...
    def __call__(self, images: Any, top: int = 5) -> Any:
        """Classify one image, several, or a stream of them.

        Args:
            images: one picture (path, bytes of a file, PIL image, uint8 array) gives a `Classification`; a
                list or tuple gives a list; the path of a folder (everything below it) and any other iterable
                give an iterator that reads one batch at a time.
            top: how many classes, best first; fewer if the network has fewer.

        Raises:
            UserError: an image cannot be read; a folder has none; `top` is below 1.
        """
        _check(top)
        if isinstance(images, str | os.PathLike) and os.path.isdir(images):
            return self.stream(
                _some(images_below(images), f"{images} has no images below it; give a folder of images"), top
            )
        if isinstance(images, str | os.PathLike | bytes | Image.Image | np.ndarray):
            return self._name(self.logits(self._tensor(images)[None]), [name_of(images)], top)[0]
        found = self.stream(images, top)
        return list(found) if isinstance(images, list | tuple) else found

    def stream(self, pictures: Iterable[Picture], top: int = 5) -> Iterator[Classification]:
        """Results in the order of the pictures; at most a batch, and what `workers` read ahead, are held."""
        _check(top)
        self.skipped = []
        for batch in _batches(self._readable(pictures), self.batch_size):
            names, tensors = zip(*batch, strict=True)
            yield from self._name(self.logits(torch.stack(tensors)), names, top)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) to logits (B, classes), fp32 on the processor."""
        say_dtype(self.dtype, self.device)
        return self.net(images.to(self.device, self.dtype)).float().cpu()

    def _readable(self, pictures: Iterable[Picture]) -> Iterator[tuple[str, Tensor]]:
        for name, read in _ahead(self._read, pictures, self.workers):
            if isinstance(read, Tensor):
                yield name, read
            elif self.on_bad_image == "fail":
                raise read
            else:
                log.warning("skipped: %s", read)
                self.skipped.append(name)

    def _read(self, picture: Picture) -> tuple[str, Tensor | UserError]:
        try:
            return name_of(picture), self._tensor(picture)
        except UserError as problem:
            return name_of(picture), problem

    def _tensor(self, picture: Picture) -> Tensor:
        return normalised(
            fitted(picture, self.card.preprocess), self.card.preprocess, self.config.in_channels
        )

    def _name(self, logits: Tensor, sources: Sequence[str], top: int) -> list[Classification]:
        probabilities, indices = logits.softmax(1).topk(min(top, logits.shape[1]), dim=1)
        classes = self.classes
        return [
            Classification(tuple(Guess(classes[i], i, p) for i, p in zip(row_i, row_p, strict=True)), source)
            for row_i, row_p, source in zip(indices.tolist(), probabilities.tolist(), sources, strict=True)
        ]


def _check(top: int) -> None:
    if top < 1:
        raise UserError(f"top is {top}, which must be at least 1")


def _batches(items: Iterable[A], size: int) -> Iterator[list[A]]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _ahead(function: Callable[[A], B], items: Iterable[A], workers: int) -> Iterator[B]:
    """`map` in order with a few results made ahead by threads; nothing runs ahead without bound."""
    if workers == 0:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _some(items: Iterator[A], otherwise: str) -> Iterator[A]:
    """The same items; a `UserError` now, not at the first `next`, if there are none."""
    try:
        first = next(items)
    except StopIteration:
        raise UserError(otherwise) from None
    return itertools.chain([first], items)
