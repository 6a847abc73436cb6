"""Measure a model on data, whatever the size of the last batch."""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from triptych import weights
from triptych.config import from_json
from triptych.data.config import AugmentConfig, DataConfig
from triptych.data.loading.loader import Loader, make_full_image_loader, make_loader
from triptych.data.loading.test_time_views import ViewOptions
from triptych.data.masks import mask_dtype, void_label
from triptych.data.open import open_source, train_and_eval
from triptych.data.source import Source
from triptych.device import choose_device, choose_dtype, placed, say_dtype
from triptych.errors import UserError
from triptych.evaluation.feature_extractor import open_extractor
from triptych.evaluation.perceptual_distance import make_distance
from triptych.heads.segmenter import Segmenter
from triptych.models.autoencoder import FirstStage
from triptych.network import Network
from triptych.torch_compile import compile_blocks
from triptych.train.configs.base import LossConfig
from triptych.train.configs.first_stage import CompressConfig
from triptych.train.configs.registry import RunConfig, kind_of
from triptych.train.first_stage.task import Compress
from triptych.train.task import Batch, Classify, Segment

SEGMENTER_BATCH = 4  # pictures whose logits are held together


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
    progress: Callable[[Iterable[Batch], int], Iterable[Batch]] | None = None,
) -> dict[str, Any]:
    """Figures of a classifier, a segmenter or an autoencoder: what `ClassificationMetrics.compute`,
    `SegmentationMetrics.compute` or `ReconstructionMetrics.compute` returns, with "task" ("classification",
    "segmentation" or "reconstruction"), "bad" (images left out, and why), of the first two "classes" (names by index)
    and "groupings" (the coarser names that were scored), and of the last "frechet" and "kernel" (how far the
    reconstructions are from their pictures as sets of features: `ReconstructionDistance`), "extractor" (its name) and
    "identity" (what features and preparation they are of; figures of others cannot be compared with them).

    A segmenter is shown whole pictures, as `triptych.SegmentationPipeline` shows them, also where its card crops; its
    logits are enlarged to each mask's own size and every pixel counts, as is usual for ADE20K. (While training, masks
    are compared at the size that the network is fed.)

    Args:
        model: a network, or anything `triptych.load` takes; a RUN folder brings its data along.
        data: as in training; none means the run's own.
        split: one of the data's; none means its evaluation split.
        batch_size: images a forward pass; none means the run's own, else 64, or 4 of a segmenter.
        workers, on_bad_image, image_column, label_column, mask_column, ignore_index, reduce_zero_label: as in
            `DataConfig`; none means the run's own.
        passes: of a segmenter, at which size and scales pictures are looked at, in which windows, mirrored or not; none
            is once, as the card says.
        compile: `torch.compile` each block of a classifier or a segmenter; see `triptych.torch_compile`.
        extractor: of an autoencoder, in whose features sets are compared, as `open_extractor` takes it; none means the
            run's own, else vit-emoji.
        progress: given the batches and their number, hands them on; for a progress bar.

    Raises:
        UserError: no data is named, none of it can be read, it has no labels or masks, or classes that the model does
            not know; `passes` for what does not parse, `extractor` for what does not reconstruct.
    """
    config = _config_of(model)
    if data is None and config is None:
        raise UserError(
            "no data was named and the model is no training run; give --data, for example a folder of class folders"
        )
    given = {
        "eval_batch_size": batch_size, "workers": workers, "on_bad_image": on_bad_image,
        "image_column": image_column, "label_column": label_column, "mask_column": mask_column,
        "ignore_index": ignore_index, "reduce_zero_label": reduce_zero_label,
    }  # fmt: skip
    loading = replace(
        config.loading if config else DataConfig(), **{k: v for k, v in given.items() if v is not None}
    )
    net = model if isinstance(model, Network) else weights.load(str(model))
    parsing, reconstructing = isinstance(net, Segmenter), isinstance(net, FirstStage)
    if passes is not None and not parsing:
        raise UserError(
            f"{type(net).__name__} is no segmenter, and only those take a size, window, scales or flip"
        )
    if extractor is not None and not reconstructing:
        raise UserError(
            f"{type(net).__name__} makes no pictures to compare in the features of an extractor; leave it out"
        )
    source = open_evaluation(data, split, loading, config)
    where = choose_device(device)
    precision = choose_dtype(dtype, where)
    autocast = functools.partial(
        torch.autocast, where.type, dtype=precision, enabled=precision != torch.float32
    )

    def shown(loader: Loader) -> Iterator[Batch]:
        read = False
        for batch in progress(loader, len(loader)) if progress else loader:
            read = True
            yield batch
        if not read:
            first = next(iter(loader.bad.values()))
            raise UserError(f"none of the {len(source)} images could be evaluated; the first: {first}")

    if reconstructing:
        assert isinstance(net, FirstStage)
        compress = config if isinstance(config, CompressConfig) else CompressConfig()
        smallest = None if compress.enlarge else net.card.preprocess.size
        loader = make_loader(source, loading, net.card.preprocess, train=False, min_size=smallest)
        features = open_extractor(
            extractor or compress.features or "vit-emoji", picture=net.card.preprocess.size, device=where
        )
        reconstruct = Compress(
            compress, AugmentConfig(), make_distance(compress.perceptual, where), extractor=features
        )
        say_dtype(precision, where)
        with autocast():
            figures = reconstruct.measure(placed(net, where, torch.float32), shown(loader))
        said = {"extractor": features.name, "identity": features.identity}
        return {"task": "reconstruction", **figures, **said, "bad": dict(loader.bad)}
    card, classes = net.card, tuple((source.mask_classes if parsing else source.classes) or ())
    if not classes:
        lacking, flag = ("masks", "--mask-column") if parsing else ("labels", "--label-column")
        raise UserError(
            f"{data or (config and config.data)} has no {lacking}, and evaluation needs them; name {flag}"
        )
    known = card.classes or (classes if len(classes) == net.config.num_classes else ())
    unknown = sorted(set(classes) - set(known))
    if unknown:
        raise UserError(
            f"the data has {len(unknown)} classes that the model does not know ({', '.join(unknown[:3])}); "
            "fine-tune on that data first, or rename its classes to the model's"
        )
    groupings = card.groupings or (dict(source.groupings) if classes == known else {})
    say_dtype(precision, where)
    net = placed(net, where, torch.float32)
    if compile:
        compile_blocks(net)

    if parsing:
        assert isinstance(net, Segmenter)
        look, size = passes or ViewOptions(), loading.eval_batch_size or SEGMENTER_BATCH
        least = net.backbone.strides[0]
        look.check_window(least)
        loader = make_full_image_loader(source, loading, card.preprocess, look, least, size)
        index = np.full(void_label(len(classes)) + 1, void_label(len(known)), mask_dtype(len(known)))
        index[: len(classes)] = [known.index(name) for name in classes]
        batches = ({**batch, "mask": [index[m] for m in batch["mask"]]} for batch in shown(loader))
        with autocast():
            found = Segment(AugmentConfig(), card, len(known), LossConfig()).measure_whole(
                net, batches, look, size
            )
    else:
        loader = make_loader(source, loading, card.preprocess, train=False)
        order = torch.tensor([known.index(name) for name in classes])
        batches = ({**batch, "label": order[batch["label"]]} for batch in shown(loader))
        with autocast():
            found = Classify(AugmentConfig(), replace(card, groupings=groupings), len(known)).measure(
                net, batches
            )
    return {
        "task": "segmentation" if parsing else "classification",
        **found,
        "classes": list(known),
        "groupings": groupings,
        "bad": dict(loader.bad),
    }


def open_evaluation(
    data: str | None, split: str | None, loading: DataConfig, config: RunConfig | None
) -> Source:
    """The named split; of a run's own data the part that it held back; of other data its own evaluation split, or
    all of it where there is none."""
    if config is not None and split is None and (data is None or _same(data, config.data)):
        return train_and_eval(config.data, loading.eval_fraction, config.loop.seed, **loading.columns)[1]
    return open_source(data or (config.data if config else ""), split or "eval", **loading.columns)


def _same(data: str, other: str) -> bool:
    """Whether two names of data are one place."""
    if Path(data).exists() and Path(other).exists():
        return Path(data).resolve() == Path(other).resolve()
    return data == other


def _config_of(model: str | Path | Network) -> RunConfig | None:
    """The config in a RUN folder."""
    if isinstance(model, Network):
        return None
    path = Path(model) / "config.json"
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise UserError(
            f"{path} is damaged ({problem}); give the weights' file and --data instead"
        ) from problem
    if "loading" not in data:  # another library's config.json
        return None
    data.pop("fingerprint", None)
    return from_json(kind_of(data), data)
