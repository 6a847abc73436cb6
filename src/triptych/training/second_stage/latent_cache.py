"""Latents of all images of a source, encoded once and cached on disk in shards that are written atomically.

    latents/train/about.json          what they depend on: first stage, data, size
    latents/train/00000.safetensors   mean and std of each image and of its mirror image, scaled; and their rows

If a run is killed, at most one shard of each process is lost; the next run encodes those that are missing.
"""

import bisect
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.utils.data import Dataset

from triptych.atomic_write import write_atomically, write_text_atomically
from triptych.config import to_json
from triptych.data.augment.batch import preprocess_batch
from triptych.data.config import DataConfig
from triptych.data.example import Batch
from triptych.data.loading.loader import make_loader
from triptych.data.source import Source, Subset
from triptych.distributed import SINGLE_PROCESS, ProcessGroup
from triptych.errors import ConfigError, DataError, TriptychError
from triptych.models.autoencoder import FirstStage
from triptych.network import Network


@dataclass(frozen=True)
class _Encoded:
    """Moments of some images, and their rows in ascending order."""

    tensors: dict[str, Tensor]
    rows: list[int]

    def append(self, other: "_Encoded") -> "_Encoded":
        """Return both, those of `other` after these."""
        if not self.rows:
            return other
        tensors = {name: torch.cat([t, other.tensors[name]]) for name, t in self.tensors.items()}
        return _Encoded(tensors, self.rows + other.rows)

    def split(self, row: int) -> tuple["_Encoded", "_Encoded"]:
        """Return the images before a row, and the rest."""
        index = bisect.bisect_left(self.rows, row)
        return (
            _Encoded({name: t[:index] for name, t in self.tensors.items()}, self.rows[:index]),
            _Encoded({name: t[index:] for name, t in self.tensors.items()}, self.rows[index:]),
        )


class _ShardOrder:
    """Batches that do not cross shards, so that the other images of a batch, which change the last bits of latents, do
    not depend on which shards are missing."""

    def __init__(self, rows: Sequence[int], shard: int, batch_size: int):
        numbers = np.asarray(rows) // shard
        runs = [np.flatnonzero(numbers == number) for number in np.unique(numbers)]
        self.parts = [run[i : i + batch_size] for run in runs for i in range(0, len(run), batch_size)]

    def __len__(self) -> int:
        return len(self.parts)

    def batches(self, epoch: int, /) -> list[np.ndarray]:
        return self.parts


log = logging.getLogger(__name__)

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
MAX_MEMORY = 1 << 30  # bytes of latents that are copied into memory; more are read from the mapped files
LOG_EVERY = 15.0  # seconds


class LatentCache(Dataset):
    """A data set of latents, which returns a batch for a list of indices.

    A batch has "mean" and, for a KL first stage, "std" (b, views, c, h, w), where the second view is the mirror image;
    and "label", "id", "row", "bad" and "caption" as batches of images have.

    Until `fill` is called nothing is written, and latents are encoded at each request.

    Args:
        source: the images.
        first_stage: the encoder, on its device; it runs in fp32 regardless of the run's precision.
        preprocess: size, crop, mean and std of the first stage's inputs.
        mirrored: also cache mirror images.
        loading: worker processes, and what to do about damaged images.
        dtype: data type in the cache, "fp16" or "fp32".
        shard: images per file.
        batch_size: images that are encoded at a time.
    """

    def __init__(
        self,
        source: Source,
        first_stage: FirstStage,
        preprocess: Any,
        mirrored: bool,
        loading: DataConfig,
        dtype: str = "fp16",
        shard: int = 1024,
        batch_size: int = 32,
    ):
        self.source, self.first_stage, self.preprocess, self.mirrored = (
            source,
            first_stage,
            preprocess,
            mirrored,
        )
        self.loading = loading
        self.dtype, self.shard, self.batch_size = DTYPES[dtype], shard, batch_size
        self.labels = source.labels
        self.about = {
            "version": 1,
            "first stage": encoder_hash(first_stage),
            "data": source.fingerprint,
            "pictures": len(source),  # words: quoted
            "size": list(preprocess.size),
            "mirrored": mirrored,
            "numbers": dtype,
            "shard": shard,
        }
        self._shards: list[dict[str, Tensor]] = []
        self._shard_of = self._position = np.empty(0, np.int64)
        self._bad: dict[int, tuple[str, str]] = {}
        self._reasons: dict[str, str] = {}  # why damaged images could not be read, by name

    def __len__(self) -> int:
        return len(self.source)

    def fill(self, folder: Path, group: ProcessGroup = SINGLE_PROCESS) -> None:
        """Encode what is missing in `folder`, and read latents from there from now on. All processes call this.

        Raises:
            ConfigError: the folder has latents of another first stage, other data or another size; or latents are NaN
                or infinite in the cache's data type.
            DataError: no image can be read.
        """
        if group.is_main:
            claim_cache(folder, self.about)
        group.barrier()
        parts = [range(i, min(i + self.shard, len(self))) for i in range(0, len(self), self.shard)]
        paths = [folder / f"{i:05d}.safetensors" for i in range(len(parts))]
        missing = [i for i, path in enumerate(paths) if not _is_intact(path)]
        group.barrier()  # before the first shard is written
        own = missing[group.rank :: group.size]
        if own:
            self._encode_shards([(parts[i], paths[i]) for i in own])
        group.barrier()  # after the last one is written
        self._open(paths)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = np.asarray(indices, np.int64)
        if not self._shards:
            encoded = _Encoded({}, [])
            for batch in self._encode(rows.tolist()):
                encoded = encoded.append(batch)
            return self._make_batch(encoded.tensors, encoded.rows, {})
        bad = dict(self._bad[row] for row in rows[self._shard_of[rows] < 0].tolist())
        rows = rows[self._shard_of[rows] >= 0]
        tensors = {name: self._gather(name, rows) for name in self._shards[0] if name != "rows"}
        return self._make_batch(tensors, rows.tolist(), bad)

    def deviation(self) -> float:
        """Return the standard deviation of the latents, which the second stage expects to be 1."""
        total = squares = count = 0.0
        for shard in self._shards:
            mean = shard["mean"][:4096].double()
            total, squares, count = (
                total + mean.sum().item(), squares + mean.square().sum().item(), count + mean.numel()
            )  # fmt: skip
        return max(squares / count - (total / count) ** 2, 0.0) ** 0.5 if count else 1.0

    def _make_batch(self, tensors: dict[str, Tensor], rows: list[int], bad: dict[str, str]) -> Batch:
        labels = torch.full((len(rows),), -1) if self.labels is None else torch.from_numpy(self.labels[rows])
        more = {"row": rows, "id": [str(row) for row in rows], "caption": [None] * len(rows), "bad": bad}
        return cast(Batch, {**tensors, "label": labels, **more})

    def _gather(self, name: str, rows: np.ndarray) -> Tensor:
        shards, positions = self._shard_of[rows], self._position[rows]
        if len(self._shards) == 1:
            return self._shards[0][name][torch.from_numpy(positions)]
        out = torch.empty(len(rows), *self._shards[0][name].shape[1:], dtype=self.dtype)
        for number in np.unique(shards):
            index = torch.from_numpy(np.flatnonzero(shards == number))
            out[index] = self._shards[number][name][torch.from_numpy(positions)[index]]
        return out

    def _open(self, paths: Sequence[Path]) -> None:
        """Map the shards into memory; small ones are copied into memory as one."""
        shards = [shard for shard in map(load_file, paths) if len(shard["rows"])]
        for path in paths:
            with safe_open(path, framework="pt") as file:
                self._bad |= {
                    int(row): (name, reason)
                    for row, (name, reason) in json.loads(file.metadata()["bad"]).items()
                }
        if not shards:
            raise DataError(f"no image could be read; the first: {next(iter(self._bad.values()))[1]}")
        if sum(t.nbytes for shard in shards for t in shard.values()) <= MAX_MEMORY:
            shards = [{name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}]
        self._shards = shards
        self._shard_of, self._position = np.full(len(self), -1, np.int64), np.zeros(len(self), np.int64)
        for number, shard in enumerate(shards):
            rows = shard["rows"].numpy()
            self._shard_of[rows], self._position[rows] = number, np.arange(len(rows))

    def _encode_shards(self, work: Sequence[tuple[range, Path]]) -> None:
        """Encode in one pass over the loader, and write each shard as soon as it is complete."""
        count = sum(len(rows) for rows, _ in work)
        started = last_logged = time.monotonic()
        batches = self._encode([row for rows, _ in work for row in rows])
        pending, done = _Encoded({}, []), 0
        for rows, path in work:
            while (not pending.rows or pending.rows[-1] < rows.stop) and (
                more := next(batches, None)
            ) is not None:
                pending = pending.append(more)
            shard, pending = pending.split(rows.stop)
            self._write(path, shard, rows)
            done += len(rows)
            now = time.monotonic()
            if now - last_logged > LOG_EVERY or done == count:
                log.info(
                    "encoded %s of %s images, %.0f per second",
                    f"{done:,}",
                    f"{count:,}",
                    done / (now - started),
                )
                last_logged = now

    def _write(self, path: Path, shard: "_Encoded", rows: Sequence[int]) -> None:
        """Write a shard; those of `rows` that it lacks are damaged."""
        tensors = {name: t.to(self.dtype).contiguous() for name, t in shard.tensors.items()}
        if not all(t.isfinite().all() for t in tensors.values()):
            raise ConfigError(
                f"latents are NaN or infinite in {str(self.dtype).removeprefix('torch.')}; set cache.dtype to fp32, or "
                "use another first stage"
            )
        bad = self._bad_reasons(sorted(set(rows).difference(shard.rows)))
        tensors["rows"] = torch.tensor(shard.rows, dtype=torch.int64)
        data = to_safetensors(tensors, metadata={"bad": json.dumps(bad)})
        write_atomically(path, lambda file: file.write(data))

    def _bad_reasons(self, rows: Sequence[int]) -> dict[int, list[str]]:
        """Return the name of each damaged image, and why it could not be read."""
        reasons = {}
        for row in rows:
            try:
                name = self.source[row].id
            except TriptychError as error:
                reasons[row] = [f"example {row}", str(error)]
            else:
                reasons[row] = [name, self._reasons.get(name, "it could not be read")]
        return reasons

    @torch.no_grad()
    def _encode(self, rows: list[int]) -> Iterator["_Encoded"]:
        """Yield the moments of some images, batch by batch. Damaged images are left out."""
        device = next(self.first_stage.parameters()).device
        few = len(rows) <= 2 * self.batch_size  # not worth worker processes
        loading = replace(
            self.loading,
            eval_batch_size=self.batch_size,
            cache="off",
            workers=0 if few else self.loading.workers,
        )
        order = _ShardOrder(rows, self.shard, self.batch_size)
        loader = make_loader(Subset(self.source, rows), loading, self.preprocess, train=False, order=order)
        for batch in loader:
            self._reasons |= loader.bad
            images = preprocess_batch(
                batch["image"].to(device),
                self.preprocess.mean,
                self.preprocess.std,
                self.preprocess.background,
            )
            with torch.autocast(device.type, enabled=False):
                views = [images, images.flip(-1)] if self.mirrored else [images]
                moments = [self._moments(view) for view in views]
            tensors = {name: torch.stack([view[name] for view in moments], 1).cpu() for name in moments[0]}
            yield _Encoded(tensors, [rows[i] for i in batch["row"]])
        self._reasons |= loader.bad

    def _moments(self, images: Tensor) -> dict[str, Tensor]:
        """Return the scaled mean of the latents, and for a KL first stage their standard deviation."""
        stage = self.first_stage
        moments = stage.embed(images)
        mean = stage.scaled(stage.draw(moments))
        if getattr(stage.config, "regularization", "") != "kl":
            return {"mean": mean}
        return {"mean": mean, "std": stage.scaled(stage.draw(moments, noise=torch.ones_like(mean))) - mean}


def encoder_hash(net: Network) -> str:
    """Return a hash of what latents depend on: the config and all weights except a decoder's."""
    digest = hashlib.sha256(json.dumps(to_json(net.config), sort_keys=True).encode())
    for name, tensor in sorted(net.state_dict().items()):
        if not name.startswith(("decoder.", "post_quant.", "codebook.")):
            digest.update(
                name.encode()
                + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()[:32]


def claim_cache(folder: Path, about: dict[str, Any]) -> None:
    """Claim a folder for these latents by writing its about.json.

    Args:
        about: the content of about.json.

    Raises:
        ConfigError: the folder has other latents, or other files.
    """
    path = folder / "about.json"
    if path.exists():
        try:
            existing = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            existing = {}
        for name, value in about.items():
            if existing.get(name) != value:
                difference = (
                    f"another {name}"
                    if name in ("first stage", "data")
                    else f"{name} {existing.get(name)}, not {value}"
                )
                raise ConfigError(
                    f"{folder} has latents of {difference}; remove it, or give another --cache.folder"
                )
        return
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} has files and no about.json; give another --cache.folder")
    write_text_atomically(path, json.dumps(about, indent=1) + "\n")


def _is_intact(path: Path) -> bool:
    """Return whether a shard exists and its header fits its length; a damaged one is encoded again."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return "bad" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False
