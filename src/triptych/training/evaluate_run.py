"""Evaluate what a training run produced, on the data that it held out or on other data."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from triptych import weights
from triptych.data.config import DataConfig
from triptych.data.loading.test_time_views import ViewOptions
from triptych.errors import UserError
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
    batch_size: int | None = None,
    workers: int | None = None,
    on_bad_image: Literal["skip", "fail"] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    mask_column: str | None = None,
    ignore_index: int | None = None,
    reduce_zero_label: bool | None = None,
    passes: ViewOptions | None = None,
    device: str | None = None,
    dtype: str | None = None,
    compile: bool = False,
    extractor: str | Network | None = None,
    progress: Progress | None = None,
) -> ClassificationResult | SegmentationResult | ReconstructionResult:
    """Evaluate a classifier, a segmenter or an autoencoder.

    A segmenter gets full images, as `triptych.SegmentationPipeline` feeds them, also where its card crops; its
    logits are enlarged to each mask's own size and every pixel counts, as is usual for ADE20K. (During training, masks
    are compared at the size that the network is fed.)

    Args:
        model: a network, or anything `triptych.load` takes; a RUN folder brings its data along.
        data: as in training; None is the run's own.
        split: one of the data's; None is its evaluation split.
        batch_size: images a forward pass; None is the run's own, else 64, or 4 for a segmenter.
        workers, on_bad_image, image_column, label_column, mask_column, ignore_index, reduce_zero_label: as in
            `DataConfig`; None is the run's own.
        passes: for a segmenter, sizes, windows and flips at test time; None is one pass, as the card says.
        compile: `torch.compile` each block of a classifier or a segmenter; see `triptych.torch_compile`.
        extractor: for an autoencoder, in whose features sets are compared, as `open_extractor` takes it; None is the
            run's own, else vit-emoji.
        progress: wraps an iterable, given its length and a description; for a progress bar.

    Raises:
        UserError: no data is named, none of it can be read, it has no labels or masks, or classes that the model does
            not know; `passes` for what does not parse, `extractor` for what does not reconstruct.
    """
    config = None if isinstance(model, Network) else config_of(model)
    if data is None and config is None:
        raise UserError(
            "no data was named and the model is no training run; give --data, for example a folder of class folders"
        )
    changes = {
        "eval_batch_size": batch_size, "workers": workers, "on_bad_image": on_bad_image,
        "image_column": image_column, "label_column": label_column, "mask_column": mask_column,
        "ignore_index": ignore_index, "reduce_zero_label": reduce_zero_label,
    }  # fmt: skip
    loading = replace(
        config.loading if config else DataConfig(), **{k: v for k, v in changes.items() if v is not None}
    )
    net = model if isinstance(model, Network) else weights.load(str(model))
    check_options(net, passes, extractor)
    first_stage = config if isinstance(config, CompressConfig) else CompressConfig()
    return evaluate_network(
        net,
        open_evaluation(data, split, loading, config),
        loading,
        Runtime.choose(device, dtype, compile, progress),
        passes=passes,
        perceptual=first_stage.perceptual,
        extractor=extractor or (first_stage.features if isinstance(config, CompressConfig) else None),
        enlarge=first_stage.enlarge,
        name=data or (config.data if config else ""),
    )
