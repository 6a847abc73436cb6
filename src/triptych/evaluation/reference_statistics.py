"""Statistics of real pictures in a file: made once, gone on with after a stop, refused if they are of others."""

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
from triptych.data.images import Resize
from triptych.data.loading.loader import make_loader
from triptych.data.source import Source, Subset
from triptych.errors import UserError
from triptych.evaluation.feature_extractor import Extractor, Prepared
from triptych.evaluation.runtime import Progress
from triptych.metrics.frechet_distance import Moments
from triptych.metrics.generation import Statistics

log = logging.getLogger(__name__)

KEY = "triptych_reference"
VERSION = 1
KEPT = 10_000  # features kept besides the moments of all; Naeem et al. 2020 count neighbours among as many
SAVE_EVERY = 60.0  # seconds between two savings of what is unfinished


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of real pictures, and what they are of."""

    statistics: Statistics
    identity: dict[str, Any]
    """JSON: the extractor, the preparation, and the data."""
    bad: dict[str, str]
    """Pictures that could not be read, and why."""


def reference(
    source: Source,
    extractor: Extractor,
    path: str | Path | None = None,
    *,
    name: str = "",
    loading: DataConfig | None = None,
    progress: Progress | None = None,
) -> Reference:
    """Statistics of all pictures of a source: from the file, if it holds them, else made, and kept there.

    Cut off, the same call goes on where it was, to the same bits. Of more than 10,000 pictures the moments are of all,
    and the features that are kept of 10,000, chosen at random by a fixed seed.

    Args:
        path: the file; None is one in the user's cache, named by the data's fingerprint, the network's hash and the
            preparation's.
        name: of the data, for people.
        loading: batch size, workers, and what to do about damaged pictures.
        progress: wraps an iterable, given its length and a description; for a progress bar.

    Raises:
        UserError: the file is damaged, or of another network, preparation or data, which is named; no pictures; a
            picture is damaged and `on_bad_image` is "fail".
    """
    identity = {
        **extractor.identity,
        "data": {"name": name, "fingerprint": source.fingerprint, "pictures": len(source)},
        "version": VERSION,
    }
    path = Path(path) if path is not None else cached(identity, extractor)
    if path.exists():
        found = read(path)
        require(path, found, identity)
        return found
    made = _made(source, extractor, path, identity, loading or DataConfig(), progress)
    _write(path, made, len(source))
    partial(path).unlink(missing_ok=True)
    return made


def read(path: str | Path) -> Reference:
    """What a finished file holds.

    Raises:
        UserError: nothing there, or no reference, or damaged.
    """
    made, done = _read(Path(path))
    pictures = made.identity["data"]["pictures"]
    if done < pictures:
        raise UserError(
            f"{path} holds {done} of {pictures} pictures; give the same --data again, and it is finished"
        )
    return made


def require(path: str | Path, found: Reference, asked: dict[str, Any]) -> None:
    """Refuse a file of something else; the message says of what.

    Args:
        asked: an identity; without "data", whatever pictures the file is of are taken.
    """
    was, now = ({key: _compared(one)[key] for key in asked} for one in (found.identity, asked))
    differs = first_difference(was, now)
    if differs is None:
        return
    name, before, after = differs
    data = found.identity["data"].get("name") or "other data"
    words = {
        "data.fingerprint": f"other pictures ({data}), or of what these were before they changed",
        "data.pictures": f"{before} pictures ({data}), and these are {after}",
        "extractor.weights": f"another network ({before}, and this one is {after})",
    }
    what = words.get(name, f"{name.partition('.')[2] or name} {before!r}, and this is {after!r}")
    raise UserError(f"{path} holds statistics of {what}; give another --reference, or none")


def cached(identity: dict[str, Any], extractor: Extractor) -> Path:
    """Where the statistics are kept if no file is named: `triptych/references` in XDG_CACHE_HOME, else in ~/.cache."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    precision = identity["extractor"]["precision"]
    parts = (identity["data"]["fingerprint"][:16], extractor.weights, extractor.preparation.digest, precision)
    return folder / "triptych" / "references" / ("-".join(parts) + ".safetensors")


def partial(path: Path) -> Path:
    """What is unfinished lies beside."""
    return path.with_name(f"{path.name}.partial")


def _made(
    source: Source,
    extractor: Extractor,
    path: Path,
    identity: dict[str, Any],
    loading: DataConfig,
    progress: Progress | None,
) -> Reference:
    kept = np.zeros(len(source), bool)
    kept[np.random.default_rng(0).choice(len(source), min(KEPT, len(source)), replace=False)] = True
    moments, parts, bad, done = None, [], {}, 0
    begun = partial(path)
    if begun.exists():
        before, done = _read(begun)
        require(begun, before, identity)
        moments, parts, bad = before.statistics.moments, [before.statistics.features], dict(before.bad)
        log.info("going on from %d of %d pictures in %s", done, len(source), begun)
    first, loader = done, pictures_of(Subset(source, np.arange(done, len(source))), extractor, loading)
    saved = time.monotonic()
    for batch in progress(loader, len(loader), "reading real images") if progress else loader:
        rows = first + np.asarray(batch["row"])
        features = extractor(batch["image"]).features.cpu()
        added = Moments.of(features)
        moments = added if moments is None else moments.merged(added)
        parts.append(features[torch.from_numpy(kept[rows])])
        done = int(rows.max()) + 1
        if time.monotonic() - saved >= SAVE_EVERY:
            so_far = _reference(moments, parts, identity, bad | loader.bad)
            _write(begun, so_far, done)
            saved = time.monotonic()
    if moments is None:
        raise UserError(
            f"none of the {len(source)} pictures could be read: {next(iter(loader.bad.values()))}"
        )
    return _reference(moments, parts, identity, bad | loader.bad)


def pictures_of(source: Any, extractor: Extractor, loading: DataConfig) -> Any:
    """A loader of batches as the extractor takes them; "row" tells the index of each picture."""
    prepared = Prepared(source, extractor.preparation)
    size = extractor.preparation.size or extractor.preparation.picture
    assert size is not None  # Inception's pictures have one of the two
    return make_loader(prepared, replace(loading, cache="off"), Resize(size=size), train=False)


def _reference(
    moments: Moments, parts: list[Tensor], identity: dict[str, Any], bad: dict[str, str]
) -> Reference:
    return Reference(statistics=Statistics(moments, torch.cat(parts)), identity=identity, bad=bad)


def _compared(identity: dict[str, Any]) -> dict[str, Any]:
    """Without what is there for people."""
    data = {key: value for key, value in identity.get("data", {}).items() if key != "name"}
    return {**identity, "data": data}


def _write(path: Path, made: Reference, done: int) -> None:
    moments = made.statistics.moments
    tensors = {
        "mean": moments.mean.cpu().contiguous(),
        "scatter": moments.scatter.cpu().contiguous(),
        "features": made.statistics.features.contiguous(),
    }
    said = {**made.identity, "count": moments.count, "done": done, "bad": made.bad}
    data = to_safetensors(tensors, metadata={KEY: json.dumps(said)})
    write_atomically(path, lambda file: file.write(data))


def _read(path: Path) -> tuple[Reference, int]:
    if not path.is_file():
        raise UserError(f"there is no file {path}; give --data to make it from")
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {}).get(KEY, "null"))
            if said is None:
                raise UserError(f"{path} is no file of reference statistics; give another --reference")
            mean, scatter, features = (file.get_tensor(name) for name in ("mean", "scatter", "features"))
        count, done, bad = said.pop("count"), said.pop("done"), said.pop("bad")
        fine = mean.dtype == torch.float64 and scatter.shape == (len(mean), len(mean))
        if (
            not fine
            or features.shape[1:] != mean.shape
            or not {"data", "extractor", "preparation"} <= said.keys()
        ):
            raise ValueError("its parts do not fit together")
    except UserError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError) as problem:
        raise UserError(f"{path} is damaged ({problem}); remove it, and it is made again") from problem
    return Reference(
        statistics=Statistics(Moments(count, mean, scatter), features), identity=said, bad=bad
    ), done
