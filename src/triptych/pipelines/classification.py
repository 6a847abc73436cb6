"""Image classification: from images to class names and probabilities."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from triptych.device import log_dtype
from triptych.errors import ConfigError
from triptych.heads.segmenter import Segmenter
from triptych.kernels.linear import packed_linears
from triptych.model_card import Preprocess
from triptych.pipelines.base import ImagePipeline, batches
from triptych.pipelines.classification_result import Classification, Guess
from triptych.pipelines.image_input import ImageInput, batched, fitted, name_of


class ClassificationPipeline(ImagePipeline):
    """Classify images: read, resize, normalize and batch them, run a classifier, name its classes.

    ```python
    pipe = tp.ClassificationPipeline(net)           # or a name, a file, a RUN folder, a hub id
    pipe("cat.jpg", top=3)                          # <cat.jpg: tabby 0.81, tiger cat 0.12, lynx 0.02>
    pipe(["a.png", pil_image, array, open("b.jpg", "rb").read()])      # a list of them
    for result in pipe("folder/"): ...              # one after another, in constant memory
    ```

    Args:
        net: a network with `card` (which holds preprocessing and class names), or what `tp.load` takes.
        device: None picks CUDA, then MPS, then CPU.
        dtype: "fp32", "bf16", "fp16"; None picks bf16 where the hardware multiplies it natively, and logs it
            once.
        batch_size: images per forward pass.
        workers: worker processes that read and resize ahead; 0 reads in this process.
        on_bad_image: "fail" raises at the first image that cannot be read; "skip" leaves it out of the
            results, logs it, and lists it in `skipped`. A single image always raises.
        compile: `torch.compile` each block at the first images, see `triptych.torch_compile`.
        max_pixels: largest number of pixels of an image; None is 178 million.

    Raises:
        TriptychError: the network has no classes, or an argument is out of its range.
    """

    def check(self, net: Any) -> None:
        if isinstance(net, Segmenter):
            raise ConfigError(
                f"{self.source or 'the network'} is a segmenter, which classifies pixels; use SegmentationPipeline or "
                "`triptych segment`, or give a classifier"
            )
        if not getattr(net.config, "num_classes", 0):
            raise ConfigError(
                "the network has no classes; tp.load(source, num_classes=N) gives it a head to train"
            )

    @overload
    def __call__(self, images: bytes | Image.Image | np.ndarray, top: int = 5) -> Classification: ...
    @overload
    def __call__(self, images: str | os.PathLike[str], top: int = 5) -> Any: ...
    @overload
    def __call__(self, images: Sequence[ImageInput], top: int = 5) -> list[Classification]: ...
    @overload
    def __call__(self, images: Iterable[ImageInput], top: int = 5) -> Any: ...
    def __call__(self, images: Any, top: int = 5) -> Any:
        """Classify one image, several, or a stream of them.

        Args:
            images: one image (path, bytes of a file, PIL image, uint8 array) gives a `Classification`; a
                list or tuple gives a list; the path of a folder (everything below it) and any other iterable
                give an iterator that reads one batch at a time.
            top: number of classes, best first, at least 1.

        Raises:
            DataError: an image cannot be read, or a folder has none.
            ConfigError: `top` is below 1.
        """
        _check(top)
        return self.answer(
            images,
            lambda image: self._classify([(name_of(image), self._fitting(image))], top)[0],
            lambda many: self.stream(many, top),
        )

    def stream(self, images: Iterable[ImageInput], top: int = 5) -> Iterator[Classification]:
        """Yield results in the images' order. One batch is held, and two that each worker reads ahead."""
        _check(top)
        with packed_linears(self.net):
            for batch in batches(self.readable(images, self._fitting, self.batch_size), self.batch_size):
                yield from self._classify(batch, top)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes), fp32 on the CPU, of normalized images (B, C, H, W)."""
        log_dtype(self.dtype, self.device)
        return self.net(images.to(self.device, self.dtype)).float().cpu()

    @property
    def _fitting(self) -> "_Fitting":
        return _Fitting(self.card.preprocess, self.max_pixels)

    def _classify(self, batch: list[tuple[str, np.ndarray]], top: int) -> list[Classification]:
        names, pixels = zip(*batch, strict=True)
        return self._name(
            self.logits(batched(pixels, self.card.preprocess, self.config.in_channels)), names, top
        )

    def _name(self, logits: Tensor, sources: Sequence[str], top: int) -> list[Classification]:
        probabilities, indices = logits.softmax(1).topk(min(top, logits.shape[1]), dim=1)
        classes = self.classes
        return [
            Classification(tuple(Guess(classes[i], i, p) for i, p in zip(row_i, row_p, strict=True)), source)
            for row_i, row_p, source in zip(indices.tolist(), probabilities.tolist(), sources, strict=True)
        ]


@dataclass(frozen=True)
class _Fitting:
    """`fitted` with a card's preprocessing; sent to worker processes."""

    preprocess: Preprocess
    max_pixels: int | None = None

    def __call__(self, image: ImageInput) -> np.ndarray:
        return fitted(image, self.preprocess, self.max_pixels)


def _check(top: int) -> None:
    if top < 1:
        raise ConfigError(f"top is {top}, which must be at least 1")
