"""Semantic segmentation: from images to a class for each pixel."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from triptych.data.geotiff import GeoTags, read_geo_tags
from triptych.data.loading.test_time_views import View, ViewOptions, make_views
from triptych.device import log_dtype
from triptych.errors import ConfigError
from triptych.heads.segmenter import Segmenter
from triptych.heads.sliding_window import LogitRows, logits_of_views, predicted_bands
from triptych.kernels.linear import packed_linears
from triptych.model_card import Preprocess
from triptych.network import Network
from triptych.pipelines.base import ImagePipeline, batches
from triptych.pipelines.image_input import ImageInput, batched, name_of, read_full
from triptych.pipelines.palette import class_colors
from triptych.pipelines.segmentation_result import Segmentation


@dataclass(frozen=True)
class _Read:
    """An image, and its views for the network."""

    pixels: UInt8[np.ndarray, "H W C"]
    fed: list[View]
    geo_tags: GeoTags


@dataclass(frozen=True)
class _ImageReader:
    """Reads an image and makes its views; sent to worker processes."""

    preprocess: Preprocess
    passes: ViewOptions
    least: int
    max_pixels: int | None = None

    def __call__(self, image: ImageInput) -> _Read:
        pixels = read_full(image, self.preprocess, self.max_pixels)
        views = make_views(pixels, self.preprocess, self.passes, self.least)
        return _Read(pixels, views, read_geo_tags(image))


def _shown(pixels: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W 3"]:
    """Return the colors to show an image in: of several bands the first three, of two the first as gray."""
    return pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, axis=2)


class SegmentationPipeline(ImagePipeline):
    """Segment images: read, resize, cut into windows, scale and batch them, run a segmenter, name and color classes.

    ```python
    pipe = tp.SegmentationPipeline(net)             # or a name, a file, a RUN folder, a hub id
    result = pipe("street.jpg")                      # <street.jpg: road 34.1%, building 22.0%, sky 15.3%>
    result.labels, result.areas, result.overlay()
    pipe("large.jpg", window=(512, 512))            # a window slides over the image at its own size
    pipe("street.jpg", scales=(0.5, 1.0, 1.5), flip=True)
    for result in pipe("folder/"): result.save("segmented")
    ```

    By default an image of any size is processed in one pass and uncropped, at the size that the card's preprocessing
    resizes to: squashed, or scaled so that the shorter side is that before the crop, or that fits inside the padding.
    A large image loses detail, as in training; `size` processes it larger, and `window` at full resolution in bounded
    memory.

    Args:
        net: a `Segmenter`, or what `tp.load` takes. Or any module with `config.num_classes` and `card` that turns
            normalized images (B, C, H, W) into logits (B, classes, H, W).
        device, dtype, workers, on_bad_image, compile, max_pixels: as in `ClassificationPipeline`.
        batch_size: images, or windows, per forward pass.
        colors: red, green and blue of each class, from 0 to 255; by default the card's, else the package's.

    Raises:
        ConfigError: the network is a classifier, or an argument is out of its range.
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
        max_pixels: int | None = None,
    ) -> None:
        super().__init__(net, device, dtype, batch_size, workers, on_bad_image, compile, max_pixels)
        self.colors = class_colors(self.classes, colors or self.card.colors)
        # Windows smaller than one patch are useless.
        self.least = self.net.backbone.strides[0] if isinstance(self.net, Segmenter) else 1

    def check(self, net: Any) -> None:
        named, type_name = self.source or "the network", type(net).__name__
        if isinstance(net, Network) and not isinstance(net, Segmenter):
            if getattr(net.config, "num_classes", 0):
                raise ConfigError(
                    f"{named} is a classifier ({type_name}), which classifies images; use ClassificationPipeline or "
                    "`triptych classify`, or give a segmenter"
                )
            raise ConfigError(
                f"{named} is a {type_name}, which predicts no class per pixel; give a segmenter"
            )

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
        """Segment one image, several, or a stream of them.

        Args:
            images: one image (path, bytes of a file, PIL image, uint8 array) gives a `Segmentation`; a list or tuple
                gives a list; the path of a folder (everything below it) and any other iterable give an iterator that
                reads a few at a time.
            size: length in pixels to which the shorter side is resized, keeping the aspect ratio; or (height, width)
                to fit into.
            window: (height, width) or side in pixels of a window that slides over the image, at the image's own size
                unless `size` is given. Logits are blended where windows overlap.
            overlap: of adjacent windows, at least, as a share of the window.
            scales: run at each of these relative sizes and average the probabilities.
            flip: average with the horizontally flipped image, too.
            confidence: keep the probability of each pixel's class.

        Raises:
            DataError: an image cannot be read, or a folder has none.
            ConfigError: an argument is out of its range.
        """
        passes = ViewOptions(size=size, window=window, overlap=overlap, scales=scales, flip=flip)
        passes.check_window(self.least)
        return self.answer(
            images,
            lambda one: self._segment([(name_of(one), self._reader(passes)(one))], passes, confidence)[0],
            lambda many: self.stream(many, passes, confidence),
        )

    def stream(
        self, images: Iterable[ImageInput], passes: ViewOptions | None = None, confidence: bool = False
    ) -> Iterator[Segmentation]:
        """Yield results in the images' order. A few images are held, and two that each worker reads ahead."""
        passes = passes or ViewOptions()
        passes.check_window(self.least)
        # One image per request: they are sent at full size, and may be large.
        read = self.readable(images, self._reader(passes), 1)
        with packed_linears(self.net):
            for some in batches(read, max(1, self.batch_size // passes.count)):
                yield from self._segment(some, passes, confidence)

    @torch.inference_mode()
    def logits(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        """Return the logits of normalized images, in fp32 on the pipeline's device."""
        log_dtype(self.dtype, self.device)
        logits = self.net(images.to(self.device, self.dtype)).float()
        expected = (len(images), self.config.num_classes, *images.shape[-2:])
        if logits.shape != expected:
            raise ConfigError(
                f"the network gives {tuple(logits.shape)} for images of {tuple(images.shape)}, not {expected}"
            )
        return logits

    def _run(self, pieces: Sequence[UInt8[np.ndarray, "h w C"]]) -> Float[Tensor, "n k h w"]:
        return self.logits(batched(pieces, self.card.preprocess, self.config.in_channels))

    def _reader(self, passes: ViewOptions) -> "_ImageReader":
        return _ImageReader(self.card.preprocess, passes, self.least, self.max_pixels)

    def _segment(
        self, some: list[tuple[str, _Read]], passes: ViewOptions, confidence: bool
    ) -> list[Segmentation]:
        fed = [read.fed for _, read in some]
        strips = logits_of_views(
            self._run, fed, passes.window_size, passes.overlap, passes.flip, self.batch_size
        )
        return [
            self._finish(name, read, rows, confidence)
            for (name, read), rows in zip(some, strips, strict=True)
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
            image=_shown(read.pixels),
            confidence=sure,
            source=name,
            geo_tags=read.geo_tags,
        )
