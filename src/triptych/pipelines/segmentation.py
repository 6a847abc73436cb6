"""Pictures in, a class for each pixel out."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from triptych.data.loading.test_time_views import View, ViewOptions, make_views
from triptych.device import log_dtype
from triptych.errors import UserError
from triptych.heads.segmenter import Segmenter
from triptych.heads.sliding_window import LogitRows, logits_of_views, predicted_bands
from triptych.kernels.linear import packed_linears
from triptych.model_card import Preprocess
from triptych.network import Network
from triptych.pipelines.base import ImagePipeline, batches
from triptych.pipelines.image_input import ImageInput, batched, name_of, read_full
from triptych.pipelines.palette import colors_of
from triptych.pipelines.segmentation_result import Segmentation


@dataclass(frozen=True)
class _Read:
    """A picture, and what of it is fed."""

    pixels: UInt8[np.ndarray, "H W 3"]
    fed: list[View]


@dataclass(frozen=True)
class _Reading:
    """From a picture to what is read of it; goes to other processes."""

    preprocess: Preprocess
    passes: ViewOptions
    least: int

    def __call__(self, picture: ImageInput) -> _Read:
        pixels = read_full(picture, self.preprocess)
        return _Read(pixels, make_views(pixels, self.preprocess, self.passes, self.least))


class SegmentationPipeline(ImagePipeline):
    """A segmenter with what surrounds it: reading, resizing, windows, scales, batching, names, colors.

    ```python
    pipe = tp.SegmentationPipeline(net)             # or a name, a file, a RUN folder, a hub id
    found = pipe("street.jpg")                      # <street.jpg: road 34.1%, building 22.0%, sky 15.3%>
    found.labels, found.areas, found.overlay()
    pipe("large.jpg", window=(512, 512))            # a window slides over the picture at its own size
    pipe("street.jpg", scales=(0.5, 1.0, 1.5), flip=True)
    for found in pipe("folder/"): found.save("parsed")
    ```

    Without further words a picture of whatever size is looked at once, whole, at the size that the card names; nothing
    of it is cut off. A card that squashes gets it squashed; one that crops gets the whole picture with its shorter side
    as before the crop, and one that pads gets it inside its padding. So detail of a large picture is lost, as in
    training; `size` looks closer, and `window` at every pixel, in bounded memory.

    Args:
        net: a `Segmenter`, or what `tp.load` takes. Or any module with `config.num_classes` and `card` that turns
            normalised images (B, C, H, W) into logits (B, classes, H, W).
        device, dtype, workers, on_bad_image, compile: as in `ClassificationPipeline`.
        batch_size: pictures, or windows, a forward pass.
        colors: red, green and blue of each class, from 0 to 255; ours if left out.

    Raises:
        UserError: the network is a classifier, or an argument is out of its range.
    """

    def __init__(
        self,
        net: nn.Module | str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int = 4,
        workers: int = 0,
        on_bad_image: Literal["skip", "fail"] = "fail",
        colors: Sequence[Sequence[int]] | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(net, device, dtype, batch_size, workers, on_bad_image, compile)
        self.colors = colors_of(self.classes, colors or self.card.colors)
        # Below one patch there is nothing to see.
        self.least = self.net.backbone.strides[0] if isinstance(self.net, Segmenter) else 1

    def check(self, net: Any) -> None:
        named, kind = self.source or "the network", type(net).__name__
        if isinstance(net, Network) and not isinstance(net, Segmenter):
            if getattr(net.config, "num_classes", 0):
                raise UserError(
                    f"{named} is a classifier ({kind}), which names whole pictures; use ClassificationPipeline or "
                    "`triptych classify`, or give a segmenter"
                )
            raise UserError(f"{named} is a {kind}, which gives no class for each pixel; give a segmenter")

    def __call__(
        self,
        images: Any,
        *,
        size: int | tuple[int, int] | None = None,
        window: int | tuple[int, int] | None = None,
        overlap: float = 0.5,
        scales: tuple[float, ...] = (1.0,),
        flip: bool = False,
        confidence: bool = False,
    ) -> Any:
        """Parse one picture, several, or a stream of them.

        Args:
            images: one picture (path, bytes of a file, PIL image, uint8 array) gives a `Segmentation`; a list or tuple
                gives a list; the path of a folder (everything below it) and any other iterable give an iterator that
                reads a few at a time.
            size: resize the picture, its aspect kept, to this shorter side in pixels, or to fit into (height, width).
            window: slide a window of (height, width) pixels, or of this side, over the picture: over one of its own
                size, unless `size` is given. Logits are blended where windows overlap.
            overlap: of neighbouring windows, at least, as a share of the window.
            scales: look at the picture at each of these relative sizes; probabilities are averaged.
            flip: average with the mirrored picture, too.
            confidence: keep the probability of each pixel's class.

        Raises:
            UserError: a picture cannot be read; a folder has none; an argument is out of its range.
        """
        passes = ViewOptions(size=size, window=window, overlap=overlap, scales=scales, flip=flip)
        passes.check_window(self.least)
        return self.answer(
            images,
            lambda one: self._parse([(name_of(one), self._reading(passes)(one))], passes, confidence)[0],
            lambda many: self.stream(many, passes, confidence),
        )

    def stream(
        self, pictures: Iterable[ImageInput], passes: ViewOptions | None = None, confidence: bool = False
    ) -> Iterator[Segmentation]:
        """Results in the order of the pictures; a few pictures, and two that each worker read ahead, are held."""
        passes = passes or ViewOptions()
        passes.check_window(self.least)
        # A picture a request: they travel whole, and may be large.
        read = self.readable(pictures, self._reading(passes), 1)
        with packed_linears(self.net):
            for some in batches(read, max(1, self.batch_size // passes.count)):
                yield from self._parse(some, passes, confidence)

    @torch.inference_mode()
    def logits(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        """Normalised images to logits in fp32, on the pipeline's device."""
        log_dtype(self.dtype, self.device)
        made = self.net(images.to(self.device, self.dtype)).float()
        expected = (len(images), self.config.num_classes, *images.shape[-2:])
        if made.shape != expected:
            raise UserError(
                f"the network gives {tuple(made.shape)} for images of {tuple(images.shape)}, not {expected}"
            )
        return made

    def _run(self, pieces: Sequence[UInt8[np.ndarray, "h w 3"]]) -> Float[Tensor, "n k h w"]:
        return self.logits(batched(pieces, self.card.preprocess, self.config.in_channels))

    def _reading(self, passes: ViewOptions) -> "_Reading":
        return _Reading(self.card.preprocess, passes, self.least)

    def _parse(
        self, some: list[tuple[str, _Read]], passes: ViewOptions, confidence: bool
    ) -> list[Segmentation]:
        fed = [read.fed for _, read in some]
        strips = logits_of_views(
            self._run, fed, passes.window_size, passes.overlap, passes.flip, self.batch_size
        )
        return [
            self._finish(name, read, made, confidence)
            for (name, read), made in zip(some, strips, strict=True)
        ]

    @torch.inference_mode()
    def _finish(self, name: str, read: _Read, strips: list[LogitRows], confidence: bool) -> Segmentation:
        H, W = read.pixels.shape[:2]
        count = self.config.num_classes
        labels = np.empty((H, W), np.uint8 if count <= 256 else np.uint16)
        sure = np.empty((H, W), np.float32) if confidence else None
        first = 0
        for label, best in predicted_bands(strips, (H, W), count, confidence):
            last = first + len(label)
            labels[first:last] = label.cpu().numpy()
            if sure is not None and best is not None:
                sure[first:last] = best.cpu().numpy()
            first = last
        return Segmentation(
            labels=labels,
            classes=self.classes,
            colors=self.colors,
            image=read.pixels,
            confidence=sure,
            source=name,
        )
