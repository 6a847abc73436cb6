"""Measure a model on data, whatever the size of the last batch."""

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from triptych import weights
from triptych.config import from_json
from triptych.data.config import AugmentConfig, DataConfig
from triptych.data.loader import make_loader
from triptych.data.sources import Source, open_source, train_and_eval
from triptych.errors import UserError
from triptych.hardware import choose_device, choose_dtype, placed, say_dtype
from triptych.heads.segmenter import Segmenter
from triptych.network import Network
from triptych.train.config import LossConfig
from triptych.train.kinds import RunConfig, kind_of
from triptych.train.tasks import Batch, Classify, Segment


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
    device: str | None = None,
    dtype: str | None = None,
    progress: Callable[[Iterable[Batch], int], Iterable[Batch]] | None = None,
) -> dict[str, Any]:
    """Figures of a classifier or a segmenter: what `ClassificationMetrics.compute` or `SegmentationMetrics.compute`
    returns, with "task" ("classification" or "segmentation"), "classes" (names by index), "groupings" (the coarser
    names that were scored) and "bad" (images left out, and why). Masks are compared at the size the network is fed.

    Args:
        model: a network, or anything `triptych.load` takes; a RUN folder brings its data along.
        data: as in training; none means the run's own.
        split: one of the data's; none means its evaluation split.
        batch_size, workers, on_bad_image, image_column, label_column, mask_column: as in `DataConfig`; none means the
            run's own.
        progress: given the batches and their number, hands them on; for a progress bar.

    Raises:
        UserError: no data is named, it has no labels or masks, or classes that the model does not know.
    """
    config = _config_of(model)
    if data is None and config is None:
        raise UserError(
            "no data was named and the model is no training run; give --data, for example a folder of class folders"
        )
    given = {
        "eval_batch_size": batch_size, "workers": workers, "on_bad_image": on_bad_image,
        "image_column": image_column, "label_column": label_column, "mask_column": mask_column,
    }  # fmt: skip
    loading = replace(
        config.loading if config else DataConfig(), **{k: v for k, v in given.items() if v is not None}
    )
    net = model if isinstance(model, Network) else weights.load(str(model))
    source = open_evaluation(data, split, loading, config)
    where = choose_device(device)
    precision = choose_dtype(dtype, where)
    parsing = isinstance(net, Segmenter)
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
    loader = make_loader(source, loading, card.preprocess, train=False)
    autocast = functools.partial(
        torch.autocast, where.type, dtype=precision, enabled=precision != torch.float32
    )
    shown = progress(loader, len(loader)) if progress else loader
    index = torch.tensor([known.index(name) for name in classes])
    if parsing:
        task: Segment | Classify = Segment(AugmentConfig(), card, len(known), LossConfig())
        index = torch.cat([index, torch.full((256 - len(index),), 255)]).to(torch.uint8)
        batches = ({**batch, "mask": index[batch["mask"].long()]} for batch in shown)
    else:
        task = Classify(AugmentConfig(), replace(card, groupings=groupings), len(known))
        batches = ({**batch, "label": index[batch["label"]]} for batch in shown)
    say_dtype(precision, where)
    with autocast():
        found = task.measure(placed(net, where, torch.float32), batches)
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
