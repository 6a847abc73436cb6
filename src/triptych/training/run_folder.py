"""The RUN folder: which run it belongs to, and what it says about its data.

The same command resumes the run; another one is refused before anything is written.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from triptych.atomic_write import write_text_atomically
from triptych.config import first_difference
from triptych.data import manifest
from triptych.data.config import DataConfig
from triptych.data.open import is_built_in, open_source, train_and_eval
from triptych.data.source import Source, Subset
from triptych.errors import CheckpointError, StorageError
from triptych.training.configs.registry import RunConfig, check_version, is_run_json, run_from_json

log = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT")

ConfigDict = dict[
    str, Any
]  # the content of config.json: version, task, fields, and the fingerprint of the data

# Fields that may differ when a run is resumed.
CHANGEABLE = {
    "": ("features",),
    "loop": (
        *("log_every", "save_every", "keep", "device", "tensorboard", "on_nonfinite"),
        *("parallel", "recompute"),
    ),
    "loading": ("workers", "cache", "eval_batch_size"),
    "cache": ("folder", "shard", "batch_size"),
    "samples": ("num_images", "prompts", "num_steps", "guidance_scale"),
}
CONFIG = "config.json"
EXAMPLES = "examples.json.gz"
# What a run writes, besides its config.
MODEL_FILE = "model.safetensors"
NEWEST = "newest"  # folder of the newest network, unless that is the best
OUTPUTS = (MODEL_FILE, "lora.safetensors", "word.safetensors", "log.jsonl", "checkpoints")


def resume_identity(config: ConfigDict) -> ConfigDict:
    """Return a config without the fields that may differ when its run is resumed."""
    return {
        name: {k: v for k, v in value.items() if k not in CHANGEABLE.get(name, ())}
        if isinstance(value, dict)
        else value
        for name, value in config.items()
        if name not in CHANGEABLE[""]
    }


# Fields that may name files or folders.
PATHS = {"data", "init", "teacher", "first_stage", "features", "image_encoder", "encoder", "vgg", "heads",
         "mask_palette", "class_weights"}  # fmt: skip
PATHS_IN = {("perceptual", "model"), ("cache", "folder")}


def with_absolute_paths(config: ConfigT) -> ConfigT:
    """Return a config whose relative paths to existing files and folders are absolute, so that they mean the same
    wherever a run is resumed or evaluated from. Names of shipped networks, of built-in data and of the hub stay."""

    def absolute(group: str, name: str, value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return replace(
                value, **{f.name: absolute(name, f.name, getattr(value, f.name)) for f in fields(value)}
            )
        if not isinstance(value, str) or (name not in PATHS and (group, name) not in PATHS_IN):
            return value
        before, mark, path = value.partition(":") if is_built_in(value) else ("", "", value)
        place = Path(path).expanduser()
        return f"{before}{mark}{place.resolve()}" if path and place.exists() else value

    return absolute("", "", config)


def claim(out: Path, config: ConfigDict, data_changes: Callable[[], str] = str) -> None:
    """Make `out` the folder of a run by writing its config.json.

    Args:
        config: the content of config.json.
        data_changes: called if the data has changed; describes how.

    Raises:
        CheckpointError: it is the folder of another run, or of something else.
        StorageError: it is a file, or cannot be written.
    """
    path = out / CONFIG
    if out.exists() and not out.is_dir():
        raise StorageError(f"{out} is a file, and a folder for the run is needed; give another --out")
    if path.exists():
        try:
            existing = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            existing = None
        if not is_run_json(existing):
            raise CheckpointError(f"{path} does not belong to a training run; give another --out")
        check_version(existing, path)
        require_same(out, resume_identity(existing), resume_identity(config), data_changes)
    elif any((out / name).exists() for name in OUTPUTS):
        raise CheckpointError(f"{out} has files of something else and no {CONFIG}; give another --out")
    write_text_atomically(path, json.dumps(config, indent=1) + "\n")


@contextlib.contextmanager
def claim_folder(out: Path, config: ConfigDict, data_changes: Callable[[], str] = str) -> Iterator[None]:
    """`claim` a folder while a run trains, and permanently once it has written anything. If the run is refused before,
    perhaps at its first batch, the folder is released, so that the corrected command can use it."""
    existed, claimed = out.exists(), (out / CONFIG).exists()
    claim(out, config, data_changes)
    try:
        yield
    except Exception:
        log = out / "log.jsonl"
        trained = any((out / name).exists() for name in OUTPUTS if name != log.name)
        if not (claimed or trained or (log.exists() and log.stat().st_size)):
            log.unlink(missing_ok=True)
            (out / EXAMPLES).unlink(missing_ok=True)
            (out / CONFIG).unlink()
            if not existed and not any(out.iterdir()):
                out.rmdir()
        raise


def require_same(
    out: Path, existing: ConfigDict, config: ConfigDict, data_changes: Callable[[], str] = str
) -> None:
    """Refuse to resume another run. More epochs continue it: see `with_epochs_of`.

    Raises:
        CheckpointError: the two configs differ; names the first difference.
    """
    if existing.get("fingerprint") == config.get("fingerprint"):  # the same data, perhaps elsewhere
        existing = {**existing, "data": config.get("data")}
    difference = first_difference(with_epochs_of(config, existing), config)
    if difference is None:
        return
    name, before, after = difference
    if name == "fingerprint":
        more = " or the first stage" if "first_stage" in config else ""
        changes = data_changes()
        raise CheckpointError(
            f"the images in {config.get('data')}{more} changed since the run in {out} began"
            f"{': ' if changes else ''}{changes}; restore them to resume, or give another --out"
        )
    if name == "loop.epochs":
        raise CheckpointError(
            f"{out} has a run of {before:g} epochs, and {after:g} were requested; give at least {before:g} to continue "
            f"it, or another --out, with --init {out} to start from its weights"
        )
    raise CheckpointError(
        f"{out} has a run with {name} {before!r}, and {after!r} was requested; give the same command to resume it, or "
        f"another --out, with --init {out} to start from its weights"
    )


def with_epochs_of(config: ConfigDict, existing: ConfigDict) -> ConfigDict:
    """Return the config of an existing run with the epochs of `config`, if those are more: then the run continues."""
    before, after = existing.get("loop", {}).get("epochs"), config.get("loop", {}).get("epochs")
    if isinstance(before, int | float) and isinstance(after, int | float) and after > before:
        return {**existing, "loop": {**existing["loop"], "epochs": after}}
    return existing


def open_evaluation(
    data: str | None,
    split: str | None,
    loading: DataConfig,
    config: RunConfig | None,
    run_folder: Path | None = None,
) -> Source:
    """Open the data to evaluate on: the named split; of a run's own data the part that it held out; of other data its
    evaluation split, or all of it if it has none.

    Args:
        run_folder: a run, whose training images are left out of other data.
    """
    if config is not None and split is None and (data is None or _same(data, config.data)):
        return train_and_eval(config.data, loading.eval_fraction, config.loop.seed, **loading.columns)[1]
    source = open_source(data or (config.data if config else ""), split or "eval", **loading.columns)
    return source if run_folder is None else leave_out_trained(source, run_folder)


def leave_out_trained(source: Source, folder: Path) -> Source:
    """Return the examples of a source whose images a run was not trained on, and log how many were left out. If it was
    trained on all of them, log that and return the source."""
    trained = manifest.are_trained_on(folder / EXAMPLES, source)
    if trained is None or not trained.any():
        return source
    if trained.all():
        log.warning(
            "%s was trained on all %s images: these figures say nothing about new ones",
            folder,
            f"{len(source):,}",
        )
        return source
    log.warning(
        "%s was trained on %s of the %s images, which are left out (include_trained keeps them)",
        folder, f"{trained.sum():,}", f"{len(source):,}",
    )  # fmt: skip
    return Subset(source, np.flatnonzero(~trained))


def _same(data: str, other: str) -> bool:
    """Whether two names of data are one path."""
    if Path(data).exists() and Path(other).exists():
        return Path(data).resolve() == Path(other).resolve()
    return data == other


def config_of(folder: str | Path) -> RunConfig | None:
    """Return the config of a RUN folder; None if it is not one.

    Raises:
        CheckpointError: its config.json is damaged, or another version of the package wrote it.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); give the weights' file and --data instead"
        ) from error
    return run_from_json(data, path) if is_run_json(data) else None
