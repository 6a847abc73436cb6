"""Latents of a whole source, encoded once and kept on disk: shards that appear whole or not at all.

    latents/train/about.json          what they were made of: first stage, data, size
    latents/train/00000.safetensors   mean and std of each picture and of its mirror image, scaled; which rows these are

A shard is what is lost at most when a run is killed: the next one goes on with those that are missing.
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
from triptych.errors import UserError
from triptych.models.autoencoder import FirstStage
from triptych.network import Network


@dataclass(frozen=True)
class _Encoded:
    """Moments of some pictures, and which rows they are, in rising order."""

    tensors: dict[str, Tensor]
    rows: list[int]

    def joined(self, other: "_Encoded") -> "_Encoded":
        if not self.rows:
            return other
        tensors = {name: torch.cat([t, other.tensors[name]]) for name, t in self.tensors.items()}
        return _Encoded(tensors, self.rows + other.rows)

    def split(self, row: int) -> tuple["_Encoded", "_Encoded"]:
        """What comes before that row, and the rest."""
        at = bisect.bisect_left(self.rows, row)
        return (
            _Encoded({name: t[:at] for name, t in self.tensors.items()}, self.rows[:at]),
            _Encoded({name: t[at:] for name, t in self.tensors.items()}, self.rows[at:]),
        )


class _ShardOrder:
    """Batches that lie within a shard, so that what stands beside a picture, and with it the last bits of its latents,
    does not depend on which shards are missing."""

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
MAX_MEMORY = 1 << 30  # bytes of latents that are held in memory; more are read from the mapped files
LOG_EVERY = 15.0  # seconds


class LatentCache(Dataset):
    """Asked for indices, gives the batch of their latents: "mean" and, of a KL first stage, "std" (b, ways, c, h, w),
    the second way being the mirror image; "label", "id", "row", "bad" and "caption" as of pictures.

    Until `fill` was called nothing is written, and what is asked for is encoded each time.

    Args:
        source: the pictures.
        first_stage: on the device to encode on; in fp32 whatever the precision of the run.
        how: size, crop, mean and std of what the first stage is fed.
        mirrored: keep mirror images too.
        loading: workers, and what to do about damaged pictures.
        dtype: of the numbers kept, "fp16" or "fp32".
        shard: pictures a file.
        batch_size: pictures encoded at a time.
    """

    def __init__(
        self,
        source: Source,
        first_stage: FirstStage,
        how: Any,
        mirrored: bool,
        loading: DataConfig,
        dtype: str = "fp16",
        shard: int = 1024,
        batch_size: int = 32,
    ):
        self.source, self.first_stage, self.how, self.mirrored = source, first_stage, how, mirrored
        self.loading = loading
        self.dtype, self.shard, self.batch_size = DTYPES[dtype], shard, batch_size
        self.labels = source.labels
        self.about = {
            "version": 1,
            "first stage": encoder_hash(first_stage),
            "data": source.fingerprint,
            "pictures": len(source),
            "size": list(how.size),
            "mirrored": mirrored,
            "numbers": dtype,
            "shard": shard,
        }
        self._shards: list[dict[str, Tensor]] = []
        self._shard_of = self._at = np.empty(0, np.int64)
        self._bad: dict[int, tuple[str, str]] = {}
        self._reasons: dict[str, str] = {}  # what is wrong with damaged pictures, by name

    def __len__(self) -> int:
        return len(self.source)

    def fill(self, folder: Path, group: ProcessGroup = SINGLE_PROCESS) -> None:
        """Encode what `folder` does not hold yet, and use what it holds from now on.

        Raises:
            UserError: it holds the latents of another first stage, of other data or another size.
        """
        if group.is_main:
            claim(folder, self.about)
        group.barrier()
        parts = [range(i, min(i + self.shard, len(self))) for i in range(0, len(self), self.shard)]
        paths = [folder / f"{i:05d}.safetensors" for i in range(len(parts))]
        missing = [i for i, path in enumerate(paths) if not _intact(path)]
        group.barrier()  # all have looked
        mine = missing[group.rank :: group.size]
        if mine:
            self._encode_shards([(parts[i], paths[i]) for i in mine])
        group.barrier()  # all have written
        self._open(paths)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = np.asarray(indices, np.int64)
        if not self._shards:
            found = _Encoded({}, [])
            for batch in self._encoded(rows.tolist()):
                found = found.joined(batch)
            return self._make_batch(found.tensors, found.rows, {})
        bad = dict(self._bad[row] for row in rows[self._shard_of[rows] < 0].tolist())
        rows = rows[self._shard_of[rows] >= 0]
        found = {name: self._gather(name, rows) for name in self._shards[0] if name != "rows"}
        return self._make_batch(found, rows.tolist(), bad)

    def deviation(self) -> float:
        """Standard deviation of the latents, which a second stage expects to be 1."""
        total = squares = count = 0.0
        for shard in self._shards:
            mean = shard["mean"][:4096].double()
            total, squares, count = (
                total + mean.sum().item(), squares + mean.square().sum().item(), count + mean.numel()
            )  # fmt: skip
        return max(squares / count - (total / count) ** 2, 0.0) ** 0.5 if count else 1.0

    def _make_batch(self, found: dict[str, Tensor], rows: list[int], bad: dict[str, str]) -> Batch:
        labels = torch.full((len(rows),), -1) if self.labels is None else torch.from_numpy(self.labels[rows])
        more = {"row": rows, "id": [str(row) for row in rows], "caption": [None] * len(rows), "bad": bad}
        return cast(Batch, {**found, "label": labels, **more})

    def _gather(self, name: str, rows: np.ndarray) -> Tensor:
        shards, at = self._shard_of[rows], self._at[rows]
        if len(self._shards) == 1:
            return self._shards[0][name][torch.from_numpy(at)]
        out = torch.empty(len(rows), *self._shards[0][name].shape[1:], dtype=self.dtype)
        for number in np.unique(shards):
            here = torch.from_numpy(np.flatnonzero(shards == number))
            out[here] = self._shards[number][name][torch.from_numpy(at)[here]]
        return out

    def _open(self, paths: Sequence[Path]) -> None:
        """Map the shards; few are copied into memory as one."""
        shards = [shard for shard in map(load_file, paths) if len(shard["rows"])]
        for path in paths:
            with safe_open(path, framework="pt") as file:
                self._bad |= {
                    int(row): (name, why) for row, (name, why) in json.loads(file.metadata()["bad"]).items()
                }
        if not shards:
            raise UserError(f"no picture could be read; the first: {next(iter(self._bad.values()))[1]}")
        whole = sum(t.nbytes for shard in shards for t in shard.values()) <= MAX_MEMORY
        if whole:
            shards = [{name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}]
        self._shards = shards
        self._shard_of, self._at = np.full(len(self), -1, np.int64), np.zeros(len(self), np.int64)
        for number, shard in enumerate(shards):
            rows = shard["rows"].numpy()
            self._shard_of[rows], self._at[rows] = number, np.arange(len(rows))

    def _encode_shards(self, work: Sequence[tuple[range, Path]]) -> None:
        """Encode in one pass of the loader, and write each shard as soon as it is whole."""
        count = sum(len(rows) for rows, _ in work)
        began = said = time.monotonic()
        batches = self._encoded([row for rows, _ in work for row in rows])
        found, done = _Encoded({}, []), 0
        for rows, path in work:
            while (not found.rows or found.rows[-1] < rows.stop) and (
                more := next(batches, None)
            ) is not None:
                found = found.joined(more)
            here, found = found.split(rows.stop)
            self._write(path, here, rows)
            done += len(rows)
            now = time.monotonic()
            if now - said > LOG_EVERY or done == count:
                log.info(
                    "encoded %s of %s pictures, %.0f a second",
                    f"{done:,}",
                    f"{count:,}",
                    done / (now - began),
                )
                said = now

    def _write(self, path: Path, found: "_Encoded", rows: Sequence[int]) -> None:
        tensors = {name: t.to(self.dtype).contiguous() for name, t in found.tensors.items()}
        if not all(t.isfinite().all() for t in tensors.values()):
            raise UserError(
                f"latents are not finite in {str(self.dtype).removeprefix('torch.')}; set cache.dtype to fp32, or use "
                "another first stage"
            )
        bad = self._bad_reasons(sorted(set(rows).difference(found.rows)))
        tensors["rows"] = torch.tensor(found.rows, dtype=torch.int64)
        data = to_safetensors(tensors, metadata={"bad": json.dumps(bad)})
        write_atomically(path, lambda file: file.write(data))

    def _bad_reasons(self, rows: Sequence[int]) -> dict[int, list[str]]:
        """Name of each damaged picture, and what is wrong with it."""
        found = {}
        for row in rows:
            try:
                name = self.source[row].id
            except UserError as problem:
                found[row] = [f"example {row}", str(problem)]
            else:
                found[row] = [name, self._reasons.get(name, "it could not be read")]
        return found

    @torch.no_grad()
    def _encoded(self, rows: list[int]) -> Iterator["_Encoded"]:
        """The moments of some pictures, batch by batch; damaged ones are left out."""
        device = next(self.first_stage.parameters()).device
        few = len(rows) <= 2 * self.batch_size  # no processes for so little
        loading = replace(
            self.loading,
            eval_batch_size=self.batch_size,
            cache="off",
            workers=0 if few else self.loading.workers,
        )
        order = _ShardOrder(rows, self.shard, self.batch_size)
        loader = make_loader(Subset(self.source, rows), loading, self.how, train=False, order=order)
        for batch in loader:
            self._reasons |= loader.bad
            images = preprocess_batch(
                batch["image"].to(device), self.how.mean, self.how.std, self.how.background
            )
            with torch.autocast(device.type, enabled=False):
                each = [
                    self._moments(way) for way in ([images, images.flip(-1)] if self.mirrored else [images])
                ]
            found = {name: torch.stack([way[name] for way in each], 1).cpu() for name in each[0]}
            yield _Encoded(found, [rows[i] for i in batch["row"]])
        self._reasons |= loader.bad

    def _moments(self, images: Tensor) -> dict[str, Tensor]:
        """Scaled mean of the latents, and their standard deviation where there is one."""
        stage = self.first_stage
        moments = stage.embed(images)
        mean = stage.scaled(stage.draw(moments))
        if getattr(stage.config, "regularization", "") != "kl":
            return {"mean": mean}
        return {"mean": mean, "std": stage.scaled(stage.draw(moments, noise=torch.ones_like(mean))) - mean}


def encoder_hash(net: Network) -> str:
    """Hex digits of what latents depend on: the config and every number but a decoder's."""
    digest = hashlib.sha256(json.dumps(to_json(net.config), sort_keys=True).encode())
    for name, tensor in sorted(net.state_dict().items()):
        if not name.startswith(("decoder.", "post_quant.", "codebook.")):
            digest.update(
                name.encode()
                + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()[:32]


def claim(folder: Path, about: dict[str, Any]) -> None:
    """Make `folder` the place of these latents.

    Raises:
        UserError: it holds others, or something else.
    """
    path = folder / "about.json"
    if path.exists():
        try:
            was = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            was = {}
        for name, value in about.items():
            if was.get(name) != value:
                what = (
                    f"another {name}"
                    if name in ("first stage", "data")
                    else f"{name} {was.get(name)}, not {value}"
                )
                raise UserError(
                    f"{folder} holds latents of {what}; remove it, or give another --cache.folder"
                )
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds files and no about.json; give another --cache.folder")
    write_text_atomically(path, json.dumps(about, indent=1) + "\n")


def _intact(path: Path) -> bool:
    """Whether a shard is there and its header and length agree; one that was damaged since is made again."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return "bad" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False
