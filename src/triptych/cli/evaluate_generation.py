"""`triptych evaluate` of latent diffusion models and of folders of generated images."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from triptych.cli.output import SHIPPED_CLASSIFIER, print_json, table, with_progress
from triptych.cli.parsing import height_width
from triptych.errors import ConfigError

if TYPE_CHECKING:
    from triptych.evaluation.results import GenerationResult

FAMILY = "latent-diffusion"
DEFAULT_NUM_SAMPLES = 1000
METRIC_TITLES = {
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
        metrics = self._evaluate().to_json()
        metrics |= {} if self.is_folder else {"model": self.model}
        metrics |= {"data": self.data, "split": self.split, "seconds": time.perf_counter() - started}
        is_run = bool(self.model) and (Path(self.model) / "log.jsonl").is_file()
        out = self.out or (Path(self.model) if is_run else None)
        if out is not None:
            from triptych.atomic_write import write_text_atomically

            text = json.dumps(metrics, indent=1, ensure_ascii=False) + "\n"
            write_text_atomically(out / "metrics.json", text)
        if self.json:
            print_json(metrics, indent=1)
        else:
            show(metrics)
            print(f"{out}: metrics.json" if out else "--out FOLDER writes metrics.json, --json prints it")
        return 0

    def _evaluate(self) -> "GenerationResult":
        from triptych.api.generation import evaluate_generator, evaluate_samples

        height, width = height_width(self.size) if self.size else (None, None)
        options: dict[str, Any] = {
            "split": self.split or None,
            "height": height,
            "width": width,
            "extractor": self.extractor or SHIPPED_CLASSIFIER,
            "reference": self.reference,
            "batch_size": self.batch_size,
            "workers": self.workers,
            "on_bad_image": self.on_bad_image,
            "image_column": self.image_column,
            "progress": with_progress,
        }
        if self.is_folder:
            if self.classifier not in ("", "none"):
                raise ConfigError(
                    "a folder of samples has no prompts, so faithfulness cannot be measured; leave --classifier out"
                )
            return evaluate_samples(self.samples, self.data or None, **options)
        return evaluate_generator(
            self.model,
            self.data or None,
            num_samples=int(self.samples or DEFAULT_NUM_SAMPLES),
            num_steps=self.num_steps,
            guidance_scale=self.guidance_scale,
            sampler=self.sampler,
            seed=self.seed,
            classifier=None if self.classifier == "none" else self.classifier or "auto",
            label_column=self.label_column,
            caption_column=self.caption_column,
            dtype=None if self.dtype == "auto" else self.dtype,
            compile=self.compile,
            **options,
        )


def show(metrics: dict[str, Any]) -> None:
    """Print the metrics, and how they were measured."""
    rows = []
    for name, title in METRIC_TITLES.items():
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
