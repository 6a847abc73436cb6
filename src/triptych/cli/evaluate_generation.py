"""`triptych evaluate` of latent diffusion models and of folders of generated images."""

import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from triptych.cli.output import SHIPPED_CLASSIFIER, plain, print_json, table, with_progress
from triptych.cli.parsing import height_width
from triptych.errors import ConfigError, DataError

if TYPE_CHECKING:
    from triptych.data.config import DataConfig
    from triptych.data.open import Source
    from triptych.evaluation.generation import Asked
    from triptych.pipelines.diffusion.pipeline import DiffusionPipeline

FAMILY = "latent-diffusion"
SAMPLES, BATCH = 1000, 64
PIXELS = BATCH * 64 * 64  # of the images generated in one forward pass, by default
TITLES = {
    "frechet": "Fréchet distance",
    "frechet_floor": "  its floor at this count",
    "kernel": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "inception_score": "Inception score",
    "psnr": "PSNR",
    "ssim": "SSIM",
}


@dataclass(frozen=True, kw_only=True)
class EvaluateGeneration:
    """The flags of `triptych evaluate` that matter for generated images; `Evaluate` describes them."""

    model: str
    data: str
    split: str
    batch_size: int | None
    workers: int
    dtype: Literal["auto", "fp32", "bf16"]
    compile: bool
    on_bad_image: Literal["fail", "skip"]
    image_column: str | None
    label_column: str | None
    caption_column: str | None
    size: str
    samples: str
    extractor: str
    reference: Path | None
    classifier: str
    num_steps: int
    guidance_scale: float | None
    sampler: str
    seed: int
    out: Path | None
    json: bool

    @property
    def is_folder(self) -> bool:
        """Whether --samples is a folder of images rather than a number."""
        return bool(self.samples) and not self.samples.isdecimal()

    def applies(self) -> bool:
        """Whether there are generated images to evaluate.

        Raises:
            ConfigError: neither a model nor a folder is named, or both.
            CheckpointError: there is no such model.
        """
        if self.is_folder:
            if self.model:
                raise ConfigError(
                    f"--samples {self.samples} is a folder, and {self.model} would generate images; give one of the "
                    "two"
                )
            return True
        if not self.model:
            raise ConfigError(
                "triptych evaluate needs MODEL-or-RUN, or --samples DIR; see triptych evaluate --help"
            )
        from triptych.weights import inspect

        return inspect(self.model).get("family") == FAMILY

    def run(self) -> int:
        """Evaluate, write metrics.json where --out or a RUN folder says, and print."""
        started = time.perf_counter()
        metrics = self._folder() if self.is_folder else self._model()
        metrics["skipped"] = metrics.pop("bad")
        metrics |= {"data": self.data, "split": self.split, "seconds": time.perf_counter() - started}
        is_run = bool(self.model) and (Path(self.model) / "log.jsonl").is_file()
        out = self.out or (Path(self.model) if is_run else None)
        if out is not None:
            from triptych.atomic_write import write_text_atomically

            text = json.dumps(plain(metrics), indent=1, ensure_ascii=False) + "\n"
            write_text_atomically(out / "metrics.json", text)
        if self.json:
            print_json(metrics, indent=1)
        else:
            show(metrics)
            print(f"{out}: metrics.json" if out else "--out FOLDER writes metrics.json, --json prints it")
        return 0

    def _model(self) -> dict[str, Any]:
        """Compare images that the model generates from the data's captions or classes with the data."""
        from triptych.evaluation.feature_extractor import open_extractor
        from triptych.evaluation.generation import ask, evaluate_generation
        from triptych.pipelines.diffusion.pipeline import DiffusionPipeline

        count = int(self.samples or SAMPLES)
        source, loading = self._real_images()
        dtype = None if self.dtype == "auto" else self.dtype
        pipe = DiffusionPipeline(self.model, None, dtype, compile=self.compile)
        size = height_width(self.size) if self.size else None
        height, width = size or pipe.config.image_size
        extractor = open_extractor(self.extractor or SHIPPED_CLASSIFIER, picture=(height, width))
        requests = ask(pipe.config, pipe.card, source, count, self.seed)
        options = {
            "num_steps": self.num_steps,
            "guidance_scale": self.guidance_scale,
            "sampler": self.sampler,
            "height": size and height,
            "width": size and width,
        }
        batch_size = self.batch_size or max(1, min(BATCH, PIXELS // (height * width)))
        images = generated(pipe, requests, batch_size, options)
        first = next(images)  # wrong settings show before the real images are read
        result = evaluate_generation(
            with_progress(itertools.chain([first], images), count, "generating"),
            extractor,
            source,
            asked=requests,
            reference_file=self.reference,
            classifier=self._classifier(source, requests),
            name=self.data,
            loading=loading,
            progress=reading_progress,
        )
        model = {"model": self.model, "weights_hash": pipe.model.weights_hash, "seed": self.seed}
        return result | model | options

    def _folder(self) -> dict[str, Any]:
        """Compare the images of a folder with the data."""
        from triptych.evaluation.feature_extractor import open_extractor
        from triptych.evaluation.generation import evaluate_generation
        from triptych.pipelines.image_input import images_below

        if not Path(self.samples).is_dir():
            raise DataError(f"--samples {self.samples} is neither a number nor a folder of images")
        files = list(images_below(self.samples))
        if len(files) < 2:
            raise DataError(
                f"--samples {self.samples} has {len(files)} images below it; a distance needs 2 at least"
            )
        if self.classifier not in ("", "none"):
            raise ConfigError(
                "a folder of samples has no prompts, so faithfulness cannot be measured; leave --classifier out"
            )
        source, loading = self._real_images()
        size = height_width(self.size) if self.size else common_size(files)
        result = evaluate_generation(
            with_progress(files, len(files), "reading samples"),
            open_extractor(self.extractor or SHIPPED_CLASSIFIER, picture=size),
            source,
            reference_file=self.reference,
            name=self.data,
            loading=loading,
            progress=reading_progress,
        )
        return result | {"samples": self.samples}

    def _real_images(self) -> "tuple[Source | None, DataConfig]":
        """The real images, if any are named, and how they are loaded. Without --split it is the split for training,
        which a generator is trained to resemble."""
        from triptych.data.config import DataConfig
        from triptych.data.open import open_source

        loading = DataConfig(
            eval_batch_size=self.batch_size or BATCH,
            workers=self.workers,
            on_bad_image=self.on_bad_image,
            image_column=self.image_column,
            label_column=self.label_column,
            caption_column=self.caption_column,
        )
        data = self.data or data_of_run(self.model)
        if not data and self.reference is None:
            raise ConfigError(
                "no data was named; give --data, a folder of real images, or a --reference file"
            )
        return (open_source(data, self.split or None, **loading.columns) if data else None), loading

    def _classifier(self, source: "Source | None", requests: Sequence["Asked"]) -> Any:
        """The named classifier; by default the shipped one, if images of the data's classes were requested and it knows
        them."""
        if self.classifier == "none":
            return None
        from triptych.weights import load

        if self.classifier:
            return load(self.classifier)
        if source is None or source.labels is None or any(request.row is None for request in requests):
            return None
        shipped = load(SHIPPED_CLASSIFIER)
        return shipped if set(source.classes or ()) <= set(shipped.card.classes or ()) else None


def generated(
    pipe: "DiffusionPipeline", requests: Sequence["Asked"], batch_size: int, options: dict[str, Any]
) -> Iterator[Any]:
    """Yield the images in order, each from its own seed. Captions are literal text, not prompt syntax; a batch holds
    contexts of one length only, so that no image depends on the others."""
    from triptych.models.tokenization.prompt_syntax import literal
    from triptych.pipelines.diffusion.options import GenerationRecord

    records = [
        GenerationRecord(
            task=pipe.config.tasks[0],
            prompt=literal(request.prompt),
            label=request.label,
            seed=request.seed,
            **options,
        )
        for request in requests
    ]
    reads_text = pipe.config.condition == "text"
    lengths = [pipe.net.text_encoder.chunks(record.prompt) if reads_text else 1 for record in records]
    first = 0
    for i in range(1, len(records) + 1):
        if i == len(records) or i - first == batch_size or lengths[i] != lengths[first]:
            yield from pipe.generate(records[first:i], batch_size=i - first, progress=False)
            first = i


def data_of_run(model: str) -> str:
    """Return the data that a RUN folder was trained on; an empty string for anything else."""
    from triptych.train.run_folder import config_of

    config = config_of(model) if model else None
    return "" if config is None else config.data


def common_size(files: Sequence[Path]) -> tuple[int, int] | None:
    """The height and width that all images have; None if they differ."""
    from triptych.data.images import image_errors, open_image

    sizes = set()
    for file in files:
        with image_errors(str(file)):
            image = open_image(file, str(file))
            sizes.add((image.height, image.width))
        if len(sizes) > 1:
            return None
    return sizes.pop()


def reading_progress(batches: Any, total: int) -> Any:
    return with_progress(batches, total, "reading real images")


def show(metrics: dict[str, Any]) -> None:
    """Print the metrics, and how they were measured."""
    rows = []
    for name, title in TITLES.items():
        if name in metrics:
            spread = metrics.get(f"{name}_std")
            rows.append((title, f"{metrics[name]:.4g}" + (f" ± {spread:.2g}" if spread is not None else "")))
    rows.append(("generated images", f"{metrics['count']:,}"))
    rows.append(("real images", f"{metrics['real_count']:,}"))
    table("", {"metric": "left", "": "right"}, rows)
    if "faithfulness" in metrics:
        generated, real = (metrics["faithfulness"][side] for side in ("generated", "real"))
        titles = {name: "class" if name == "top1" else name for name in generated}
        shares = ((titles[name], f"{generated[name]:.1%}", f"{real[name]:.1%}") for name in generated)
        table("requested class recognized", {"": "left", "generated": "right", "real": "right"}, shares)
    layer = metrics["identity"]["extractor"]["layer"]
    print(
        f"features of {metrics['extractor']} ({layer}, {metrics['dimensions']} numbers); protocol "
        f"{metrics['protocol']}: compare with metrics of the same protocol only"
    )
    for name, reason in metrics["skipped"].items():
        print(f"skipped: {name}: {reason}", file=sys.stderr)
