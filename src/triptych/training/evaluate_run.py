"""Evaluate the network of a training run on its held-out data, or any network on other data."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from triptych import weights
from triptych.data.config import DataConfig
from triptych.data.loading.test_time_views import ViewOptions
from triptych.errors import ConfigError
from triptych.evaluation.evaluate import check_options, evaluate_network
from triptych.evaluation.results import ClassificationResult, ReconstructionResult, SegmentationResult
from triptych.evaluation.runtime import Progress, Runtime
from triptych.network import Network
from triptych.training.configs.first_stage import CompressConfig
from triptych.training.run_folder import config_of, open_evaluation


def evaluate(
    model: str | Path | Network,
    data: str | None = None,
    *,
    split: str | None = None,
    include_trained: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    on_bad_image: Literal["skip", "fail"] | None = None,
    max_pixels: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    mask_column: str | None = None,
    ignore_index: int | None = None,
    reduce_zero_label: bool | None = None,
    mask_threshold: float | None = None,
    mask_palette: str | None = None,
    passes: ViewOptions | None = None,
    device: str | None = None,
    dtype: str | None = None,
    compile: bool = False,
    extractor: str | Network | None = None,
    progress: Progress | None = None,
) -> ClassificationResult | SegmentationResult | ReconstructionResult:
    """Evaluate a classifier, a segmenter or an autoencoder.

    A segmenter gets full images, as in `triptych.SegmentationPipeline`, even if its card crops. Its logits are enlarged
    to the size of each mask and every pixel counts, as is usual for ADE20K. (During training, masks have the size of
    the network's input.)

    Args:
        model: a network, or anything `triptych.load` takes. For a RUN folder, data and loading default to the run's.
        data: data set, as in training; None is that of the run.
        split: split of the data; None is its evaluation split.
        include_trained: also evaluate the images that the run was trained on. By default they are left out, also of a
            renamed or moved copy of its data, unless there are no others.
        batch_size: images per forward pass; None is the run's, else 64, or 4 for a segmenter.
        workers, on_bad_image, max_pixels, image_column, label_column, mask_column, ignore_index, reduce_zero_label,
            mask_threshold, mask_palette: as in `DataConfig`; None is the run's.
        passes: for a segmenter, sizes, windows and flips at test time; None is one pass, as the card says.
        compile: `torch.compile` each block of a classifier or a segmenter; see `triptych.torch_compile`.
        extractor: for an autoencoder, the network in whose features sets of images are compared, as in
            `open_extractor`; None is the run's, else vit-emoji.
        progress: wraps an iterable, given its length and a description; for a progress bar.

    Raises:
        ConfigError: no data is named, or an option does not apply to the type of network.
        DataError: no image can be read, there are no labels or masks, or the network does not have their classes.
    """
    config = None if isinstance(model, Network) else config_of(model)
    if data is None and config is None:
        raise ConfigError(
            "no data was named and the model is not a training run; give --data, such as a folder of class folders"
        )
    changes = {
        "eval_batch_size": batch_size, "workers": workers, "on_bad_image": on_bad_image,
        "max_pixels": max_pixels,
        "image_column": image_column, "label_column": label_column, "mask_column": mask_column,
        "ignore_index": ignore_index, "reduce_zero_label": reduce_zero_label,
        "mask_threshold": mask_threshold, "mask_palette": mask_palette,
    }  # fmt: skip
    loading = replace(
        config.loading if config else DataConfig(), **{k: v for k, v in changes.items() if v is not None}
    )
    net = model if isinstance(model, Network) else weights.load(str(model))
    check_options(net, passes, extractor)
    first_stage = config if isinstance(config, CompressConfig) else CompressConfig()
    return evaluate_network(
        net,
        open_evaluation(
            data, split, loading, config, None if config is None or include_trained else Path(str(model))
        ),
        loading,
        Runtime.choose(device, dtype, compile, progress),
        passes=passes,
        perceptual=first_stage.perceptual,
        extractor=extractor or (first_stage.features if isinstance(config, CompressConfig) else None),
        enlarge=first_stage.enlarge,
        name=data or (config.data if config else ""),
    )
