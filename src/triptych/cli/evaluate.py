"""`triptych evaluate`; `evaluate_generation` measures models that generate images."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from triptych.cli.output import print_json, with_progress
from triptych.cli.parsing import flag, height_width
from triptych.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate a model on a data set.

    Classifiers: top-1 and top-5 accuracy, also per class and per coarser group. Segmenters: mIoU, pixel accuracy and
    IoU per class. Autoencoders: PSNR, SSIM, perceptual distance, and the Fréchet and kernel distance of the
    reconstructions. Latent diffusion models: --samples images are generated from captions or classes of the data and
    compared with the data by Fréchet and kernel distance, precision, recall, density and coverage; a classifier
    measures how often they show the requested class.

    Writes metrics.json, and for classifiers and segmenters the confusion matrix confusion.png, into --out or the RUN
    folder.
    """

    model: Annotated[str, tyro.conf.Positional, flag("[MODEL-or-RUN]")] = ""
    """A model's file, folder, hub id or name, or a RUN folder. Leave it out if --samples is a folder."""
    data: Annotated[str, flag("DATA", "that of the RUN")] = ""
    """emoji, a folder, tar shards, a parquet file or a hub id."""
    split: Annotated[str, flag("NAME", "the evaluation split")] = ""
    """One of the data's splits."""
    include_trained: bool = False
    """Also evaluate the images that the RUN was trained on; by default they are left out of any copy of its data."""
    batch_size: Annotated[int | None, flag("INT", "that of the RUN, else 64, for segmenters 4")] = None
    """Images per forward pass."""
    workers: int = 2
    """Worker processes that read and decode."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products; auto is bf16 if the hardware multiplies it natively, else fp32."""
    compile: bool = False
    """Compile the network's blocks: slow to start, faster for many images of one size."""
    on_bad_image: Literal["fail", "skip"] = "skip"
    """Stop at an image that cannot be read, or skip and report it."""
    max_pixels: Annotated[int | None, flag("INT", "that of the RUN, else 178 million")] = None
    """Largest number of pixels of an image."""
    image_column: Annotated[str | None, flag("NAME")] = None
    """Column of the images, if there are several candidates."""
    label_column: Annotated[str | None, flag("NAME")] = None
    """Column of the labels, if there are several candidates."""
    mask_column: Annotated[str | None, flag("NAME")] = None
    """Column of the masks, if there are several candidates."""
    ignore_index: Annotated[int | None, flag("INT", "that of the RUN")] = None
    """Mask value to ignore, in addition to 255."""
    reduce_zero_label: bool = False
    """Ignore 0 in masks and take 1 as the first class."""
    mask_threshold: Annotated[float | None, flag("FLOAT", "that of the RUN")] = None
    """Masks have two classes: pixels brighter than this are the second one."""
    mask_palette: Annotated[str | None, flag("FILE", "that of the RUN")] = None
    """File with the name and color of each class of colored masks, such as a class_dict.csv (name, r, g, b)."""
    size: Annotated[str, flag("PIXELS-or-WxH", "the model's own")] = ""
    """Segmenters: resize images to this shorter side. Others: width and height of generated images."""
    window: Annotated[str, flag("WxH")] = ""
    """Segmenters: slide a window of this width and height in pixels over each image."""
    overlap: float = 0.5
    """Overlap of adjacent windows, as a fraction of the window."""
    scales: tuple[float, ...] = (1.0,)
    """Segmenters: average over these relative sizes, for example 0.75 1 1.5."""
    flip: bool = False
    """Segmenters: average with the horizontally flipped image."""
    caption_column: Annotated[str | None, flag("NAME")] = None
    """Column of the captions, if there are several candidates."""
    samples: Annotated[str, flag("N-or-DIR", "1000")] = ""
    """Number of images to generate; or a folder of generated images, of any origin."""
    extractor: Annotated[str, flag("MODEL", "that of an autoencoder's RUN, else vit-emoji")] = ""
    """Feature extractor for distances, in fp32: a ViT (also DINOv2), a Swin, or inception."""
    reference: Annotated[Path | None, flag("FILE", "in the cache")] = None
    """File for the statistics of the real images. They are computed once; then --data can be left out."""
    classifier: Annotated[str, flag("MODEL", "vit-emoji, if it has the data's classes")] = ""
    """Classifier that looks for the requested class in generated images; "none" turns it off."""
    num_steps: int = 30
    """Sampler steps."""
    guidance_scale: Annotated[float | None, flag("FLOAT", "the model's own, else 7.5, 1.5 for classes")] = (
        None
    )
    """Classifier-free guidance; 1 is off."""
    sampler: str = "dpm++2m"
    """Sampler, as in triptych generate."""
    seed: int = 0
    """Random seed of the first generated image; each further image adds one. Also selects the captions."""
    out: Annotated[Path | None, flag("FOLDER", "the RUN folder")] = None
    """Folder to write into."""
    json: bool = False
    """Print the content of metrics.json."""

    def run(self) -> int:
        from triptych.cli.evaluate_generation import EvaluateGeneration

        names = [field.name for field in fields(EvaluateGeneration)]
        generation = EvaluateGeneration(**{name: getattr(self, name) for name in names})
        if generation.applies():
            return generation.run()
        if self.samples:
            raise ConfigError(
                f"{self.model} generates no images; leave --samples out, or name a latent diffusion model"
            )
        from triptych.api.evaluation import evaluate
        from triptych.cli import evaluate_report
        from triptych.data.loading.test_time_views import ViewOptions

        window = height_width(self.window, "window") if self.window else None
        passes = ViewOptions(
            size=self.shorter_side(), window=window, overlap=self.overlap, scales=self.scales, flip=self.flip
        )
        result = evaluate(
            self.model,
            self.data or None,
            split=self.split or None,
            include_trained=self.include_trained,
            batch_size=self.batch_size,
            workers=self.workers,
            on_bad_image=self.on_bad_image,
            max_pixels=self.max_pixels,
            image_column=self.image_column,
            label_column=self.label_column,
            mask_column=self.mask_column,
            ignore_index=self.ignore_index,
            reduce_zero_label=self.reduce_zero_label or None,
            mask_threshold=self.mask_threshold,
            mask_palette=self.mask_palette,
            passes=None if passes == ViewOptions() else passes,
            dtype=None if self.dtype == "auto" else self.dtype,
            compile=self.compile,
            extractor=self.extractor or None,
            progress=with_progress,
        )
        metrics = result.to_json() | {"model": self.model, "data": self.data, "split": self.split}
        is_run = (Path(self.model) / "log.jsonl").is_file()
        out = self.out or (Path(self.model) if is_run else None)
        if out is not None:
            evaluate_report.write(result, metrics, out)
        if self.json:
            print_json(metrics, indent=1)
        else:
            evaluate_report.SHOW[result.task](metrics)
            files = "metrics.json, confusion.png" if hasattr(result, "confusion") else "metrics.json"
            print(f"{out}: {files}" if out else "--out FOLDER writes metrics.json and the confusion matrix")
        return 0

    def shorter_side(self) -> int | None:
        """The --size of a segmenter.

        Raises:
            ConfigError: it is no number of pixels.
        """
        if self.size and not self.size.isdecimal():
            raise ConfigError(f"size is {self.size!r}, which must be a number of pixels for {self.model}")
        return int(self.size) if self.size else None
