"""Evaluate generated images: those of a latent diffusion model, or those in a folder."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from triptych import weights
from triptych.data.config import DataConfig
from triptych.data.images import image_errors, open_image
from triptych.data.open import open_source
from triptych.data.source import Source
from triptych.errors import ConfigError, DataError
from triptych.evaluation.feature_extractor import open_extractor
from triptych.evaluation.generation import GenerationRequest, evaluate_generation, make_requests
from triptych.evaluation.results import GenerationResult
from triptych.evaluation.runtime import Progress
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.tokenization.prompt_syntax import literal
from triptych.network import Network
from triptych.pipelines.diffusion.options import GenerationRecord
from triptych.pipelines.diffusion.pipeline import DiffusionPipeline
from triptych.pipelines.image_input import images_below
from triptych.training.run_folder import config_of

CLASSIFIER = "vit-emoji"  # the default extractor, and the default classifier of data whose classes it knows
BATCH_SIZE = 64
BATCH_PIXELS = BATCH_SIZE * 64 * 64  # of the images generated in one forward pass, by default


def evaluate_generator(
    model: str | Path | LatentDiffusion,
    data: str | Path | None = None,
    *,
    num_samples: int = 1000,
    split: str | None = None,
    num_steps: int = 30,
    guidance_scale: float | None = None,
    sampler: str = "dpm++2m",
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    extractor: str | Network = CLASSIFIER,
    reference: str | Path | None = None,
    classifier: str | Network | None = "auto",
    batch_size: int | None = None,
    workers: int = 2,
    on_bad_image: Literal["skip", "fail"] = "skip",
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    compile: bool = False,
    progress: Progress | None = None,
) -> GenerationResult:
    """Generate images from the data's captions or classes, and compare them with the data.

    Args:
        model: a latent diffusion model, or what `triptych.load` takes.
        data: real images, with captions or labels for a conditional model; None is the data of the RUN.
        num_samples: number of images to generate.
        split: of the data; None is the one to train on, which a generator is trained to resemble.
        num_steps, guidance_scale, sampler, height, width: as in `DiffusionPipeline.text_to_image`.
        seed: of the first image, incremented by one for each further one; also chooses the captions or classes.
        extractor: network in whose features images are compared; see `open_extractor`.
        reference: file with the statistics of the real images, created if it does not exist. With one that exists
            `data` may be None for an unconditional model. None is a file in the cache.
        classifier: recognizes the requested class in images; "auto" is vit-emoji if it knows the data's classes.
        batch_size: images in a forward pass; None is 64 of 64 x 64 pixels, fewer of larger ones.
        workers, on_bad_image, image_column, label_column, caption_column: as in `DataConfig`.
        progress: wraps an iterable, given its length and a description; for a progress bar.

    Raises:
        ConfigError: no data, or options that the model does not have.
        DataError: data without captions or labels for a model that needs them.
    """
    loading = DataConfig(
        eval_batch_size=batch_size or BATCH_SIZE, workers=workers, on_bad_image=on_bad_image,
        image_column=image_column, label_column=label_column, caption_column=caption_column,
    )  # fmt: skip
    data = _data_of_run(model) if data is None else data
    source = open_real_images(data, split, loading, reference)
    pipe = DiffusionPipeline(model, device, dtype, compile=compile)
    requests = make_requests(pipe.config, pipe.card, source, num_samples, seed)
    options: dict[str, Any] = {
        "num_steps": num_steps, "guidance_scale": guidance_scale, "sampler": sampler, "height": height, "width": width,
    }  # fmt: skip
    size = (height or pipe.config.image_size[0], width or pipe.config.image_size[1])
    images = _start_generation(pipe, requests, batch_size or _default_batch_size(size), options)
    result = evaluate_generation(
        progress(images, num_samples, "generating") if progress else images,
        open_extractor(extractor, image_size=size),
        source,
        requests=requests,
        reference_file=reference,
        classifier=_open_classifier(classifier, source, requests),
        name=str(data or ""),
        loading=loading,
        progress=progress,
    )
    settings = {"weights_hash": pipe.model.weights_hash, "seed": seed, **options}
    return replace(result, settings=settings)


def _data_of_run(model: str | Path | LatentDiffusion) -> str | None:
    """Return the data that a RUN was trained on; None if the model is not a RUN."""
    config = None if isinstance(model, LatentDiffusion) else config_of(model)
    return None if config is None else config.data


def _default_batch_size(size: tuple[int, int]) -> int:
    """Return how many images of a size to generate in one forward pass."""
    return max(1, min(BATCH_SIZE, BATCH_PIXELS // (size[0] * size[1])))


def _start_generation(
    pipe: DiffusionPipeline, requests: Sequence[GenerationRequest], batch_size: int, options: dict[str, Any]
) -> Iterator[Image.Image]:
    """Return the images of `generate_requested`. The first one is generated at once, so that invalid options raise
    before the real images are read."""
    images = generate_requested(pipe, requests, batch_size, options)
    return itertools.chain([next(images)], images)


def evaluate_samples(
    samples: str | Path,
    data: str | Path | None = None,
    *,
    split: str | None = None,
    height: int | None = None,
    width: int | None = None,
    extractor: str | Network = CLASSIFIER,
    reference: str | Path | None = None,
    batch_size: int | None = None,
    workers: int = 2,
    on_bad_image: Literal["skip", "fail"] = "skip",
    image_column: str | None = None,
    progress: Progress | None = None,
) -> GenerationResult:
    """Compare the images of a folder, by whatever program, with real images.

    Args:
        samples: folder with at least two images below it.
        height, width: size that all images are brought to before the comparison; None is the size of the samples if all
            have the same.
        data, split, extractor, reference, batch_size, workers, on_bad_image, image_column, progress: as in
            `evaluate_generator`.

    Raises:
        ConfigError: neither data nor a reference file.
        DataError: no folder, or fewer than two images.
    """
    if not Path(samples).is_dir():
        raise DataError(f"samples {samples} is neither a number nor a folder of images")
    files = list(images_below(str(samples)))
    if len(files) < 2:
        raise DataError(f"samples {samples} has {len(files)} images below it; a distance needs 2 at least")
    if (height is None) != (width is None):
        raise ConfigError(f"height is {height} and width {width}; give both or none")
    loading = DataConfig(
        eval_batch_size=batch_size or BATCH_SIZE,
        workers=workers,
        on_bad_image=on_bad_image,
        image_column=image_column,
    )
    source = open_real_images(data, split, loading, reference)
    size = common_size(files) if height is None or width is None else (height, width)
    result = evaluate_generation(
        progress(files, len(files), "reading samples") if progress else files,
        open_extractor(extractor, image_size=size),
        source,
        reference_file=reference,
        name=str(data or ""),
        loading=loading,
        progress=progress,
    )
    return replace(result, settings={"samples": str(samples)})


def open_real_images(
    data: str | Path | None, split: str | None, loading: DataConfig, reference: str | Path | None
) -> Source | None:
    """Open the real images, all of them or a split; None where a reference file stands for them."""
    if data is None and reference is None:
        raise ConfigError("no data was named; give --data, a folder of real images, or a --reference file")
    return None if data is None else open_source(str(data), split, **loading.columns)


def generate_requested(
    pipe: DiffusionPipeline, requests: Sequence[GenerationRequest], batch_size: int, options: dict[str, Any]
) -> Iterator[Image.Image]:
    """Yield the requested images in order, each from its own seed. Captions are literal text, not prompt syntax; a
    batch holds contexts of one length only, so that no image depends on the others."""
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


def common_size(files: Iterable[Path]) -> tuple[int, int] | None:
    """Return the height and width that all images have; None if they differ."""
    sizes = set()
    for file in files:
        with image_errors(str(file)):
            image = open_image(file, str(file))
            sizes.add((image.height, image.width))
        if len(sizes) > 1:
            return None
    return sizes.pop()


def _open_classifier(
    classifier: str | Network | None, source: Source | None, requests: Sequence[GenerationRequest]
) -> Network | None:
    if classifier is None or isinstance(classifier, Network):
        return classifier
    if classifier != "auto":
        return weights.load(classifier)
    if source is None or source.labels is None or any(request.row is None for request in requests):
        return None
    shipped = weights.load(CLASSIFIER)
    return shipped if set(source.classes or ()) <= set(shipped.card.classes or ()) else None
