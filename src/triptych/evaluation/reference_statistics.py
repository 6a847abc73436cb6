"""Statistics of real images in a file.

They are measured once. An interrupted measurement resumes, and a file of other images or another extractor is refused.
"""

import json
import logging
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from triptych.atomic_write import write_atomically
from triptych.config import first_difference
from triptych.data.config import DataConfig
from triptych.data.loading.loader import make_loader
from triptych.data.resizing import Resize
from triptych.data.source import Source, Subset
from triptych.errors import DataError, TriptychError
from triptych.evaluation.feature_extractor import Extractor, PreparedSource
from triptych.evaluation.runtime import Progress
from triptych.metrics.frechet_distance import Moments
from triptych.metrics.generation import Statistics

log = logging.getLogger(__name__)

KEY = "triptych_reference"
COUNT_KEY = "pictures"  # words: quoted
VERSION = 1
NUM_STORED_FEATURES = 10_000  # as many as Naeem et al. 2020 search for neighbors; moments are of all images
SAVE_EVERY = 60.0  # seconds between saves of an unfinished measurement


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of real images, and what identifies them."""

    statistics: Statistics
    identity: dict[str, Any]
    """Extractor, preparation and data, as JSON values."""
    bad: dict[str, str]
    """Images that could not be read: {id: reason}."""


def load_or_measure_reference(
    source: Source,
    extractor: Extractor,
    path: str | Path | None = None,
    *,
    name: str = "",
    loading: DataConfig | None = None,
    progress: Progress | None = None,
) -> Reference:
    """Return the statistics of all images of a source: from a file if it has them, else measure them and write it.

    After an interruption, the same call resumes and gives bitwise the same result. Moments are those of all images;
    features are stored for at most 10,000 of them, chosen at random with a fixed seed.

    Args:
        source: the real images.
        extractor: from `open_extractor`.
        path: the file; None is a file in the user's cache, named by the data's fingerprint and the hashes of network
            and preparation.
        name: name of the data, for messages.
        loading: batch size, worker processes, and what to do about damaged images.
        progress: wraps an iterable, given its length and a description; for a progress bar.

    Raises:
        DataError: the file is damaged, or of another network, preparation or data, which the message names; no image
            can be read; or an image is damaged and `on_bad_image` is "fail".
        StorageError: the file cannot be written.
    """
    identity = {
        **extractor.identity,
        "data": {"name": name, "fingerprint": source.fingerprint, COUNT_KEY: len(source)},
        "version": VERSION,
    }
    path = Path(path) if path is not None else cache_path(identity, extractor)
    if path.exists():
        reference = read_reference(path)
        require_same_identity(path, reference, identity)
        return reference
    reference = _measure(source, extractor, path, identity, loading or DataConfig(), progress)
    _write(path, reference, len(source))
    partial_path(path).unlink(missing_ok=True)
    return reference


def read_reference(path: str | Path) -> Reference:
    """Read the file of a finished measurement.

    Raises:
        DataError: the file does not exist, is damaged or unfinished, or is not a file of reference statistics.
    """
    reference, done = _read(Path(path))
    count = reference.identity["data"][COUNT_KEY]
    if done < count:
        raise DataError(f"{path} has only {done} of {count} images; give the same --data again to finish it")
    return reference


def require_same_identity(path: str | Path, reference: Reference, requested: dict[str, Any]) -> None:
    """Refuse a reference of another extractor, preparation or data.

    Args:
        path: its file, for the message.
        requested: the identity that is needed; without "data", any real images are accepted.

    Raises:
        DataError: the identities differ; names the first difference.
    """
    stored, needed = (
        {key: _without_names(identity)[key] for key in requested}
        for identity in (reference.identity, requested)
    )
    difference = first_difference(stored, needed)
    if difference is None:
        return
    name, before, after = difference
    data = reference.identity["data"].get("name") or "other data"
    descriptions = {
        "data.fingerprint": f"other images ({data}), or of these images before they changed",
        f"data.{COUNT_KEY}": f"{before} images ({data}), and there are {after}",
        "extractor.weights": f"another network ({before}, and this one is {after})",
    }
    description = descriptions.get(
        name, f"{name.partition('.')[2] or name} {before!r}, and {after!r} is needed"
    )
    raise DataError(f"{path} has statistics of {description}; give another --reference, or none")


def cache_path(identity: dict[str, Any], extractor: Extractor) -> Path:
    """Return the file to use if none is named: in `triptych/references` of XDG_CACHE_HOME, else of ~/.cache."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    precision = identity["extractor"]["precision"]
    parts = (identity["data"]["fingerprint"][:16], extractor.weights, extractor.preparation.digest, precision)
    return folder / "triptych" / "references" / ("-".join(parts) + ".safetensors")


def partial_path(path: Path) -> Path:
    """Return the file of the unfinished measurement, in the same folder."""
    return path.with_name(f"{path.name}.partial")


def _measure(
    source: Source,
    extractor: Extractor,
    path: Path,
    identity: dict[str, Any],
    loading: DataConfig,
    progress: Progress | None,
) -> Reference:
    """Measure the statistics, from where an interrupted measurement was saved."""
    is_stored = np.zeros(len(source), bool)
    rows = np.random.default_rng(0).choice(len(source), min(NUM_STORED_FEATURES, len(source)), replace=False)
    is_stored[rows] = True
    moments, parts, bad, done = None, [], {}, 0
    partial = partial_path(path)
    if partial.exists():
        before, done = _read(partial)
        require_same_identity(partial, before, identity)
        moments, parts, bad = before.statistics.moments, [before.statistics.features], dict(before.bad)
        log.info("resuming from %d of %d images in %s", done, len(source), partial)
    first, loader = done, prepared_loader(Subset(source, np.arange(done, len(source))), extractor, loading)
    last_saved = time.monotonic()
    for batch in progress(loader, len(loader), "reading real images") if progress else loader:
        rows = first + np.asarray(batch["row"])
        features = extractor(batch["image"]).features.cpu()
        added = Moments.of(features)
        moments = added if moments is None else moments.merge(added)
        parts.append(features[torch.from_numpy(is_stored[rows])])
        done = int(rows.max()) + 1
        if time.monotonic() - last_saved >= SAVE_EVERY:
            _write(partial, _reference(moments, parts, identity, bad | loader.bad), done)
            last_saved = time.monotonic()
    if moments is None:
        raise DataError(
            f"none of the {len(source)} images could be read; the first: {next(iter(loader.bad.values()))}"
        )
    return _reference(moments, parts, identity, bad | loader.bad)


def prepared_loader(source: Any, extractor: Extractor, loading: DataConfig) -> Any:
    """Return a loader of batches for the extractor; "row" has the index of each image."""
    prepared = PreparedSource(source, extractor.preparation)
    size = extractor.preparation.size or extractor.preparation.image_size
    assert size is not None  # for Inception, one of the two is set
    return make_loader(prepared, replace(loading, cache="off"), Resize(size=size), train=False)


def _reference(
    moments: Moments, parts: list[Tensor], identity: dict[str, Any], bad: dict[str, str]
) -> Reference:
    return Reference(statistics=Statistics(moments, torch.cat(parts)), identity=identity, bad=bad)


def _without_names(identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity without the name of the data, which does not identify it."""
    data = {key: value for key, value in identity.get("data", {}).items() if key != "name"}
    return {**identity, "data": data}


def _write(path: Path, reference: Reference, done: int) -> None:
    """Write a reference; `done` is the number of images that it includes."""
    moments = reference.statistics.moments
    tensors = {
        "mean": moments.mean.cpu().contiguous(),
        "scatter": moments.scatter.cpu().contiguous(),
        "features": reference.statistics.features.contiguous(),
    }
    metadata = {**reference.identity, "count": moments.count, "done": done, "bad": reference.bad}
    data = to_safetensors(tensors, metadata={KEY: json.dumps(metadata)})
    write_atomically(path, lambda file: file.write(data))


def _read(path: Path) -> tuple[Reference, int]:
    """Return a reference and the number of images that it includes."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; give --data to create it from")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(KEY, "null"))
            if metadata is None:
                raise DataError(f"{path} is not a file of reference statistics; give another --reference")
            mean, scatter, features = (file.get_tensor(name) for name in ("mean", "scatter", "features"))
        count, done, bad = metadata.pop("count"), metadata.pop("done"), metadata.pop("bad")
        moments_fit = mean.dtype == torch.float64 and scatter.shape == (len(mean), len(mean))
        if (
            not moments_fit
            or features.shape[1:] != mean.shape
            or not {"data", "extractor", "preparation"} <= metadata.keys()
        ):
            raise ValueError("its parts do not fit together")
    except TriptychError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it, and it is created again") from error
    return Reference(
        statistics=Statistics(Moments(count, mean, scatter), features), identity=metadata, bad=bad
    ), done
