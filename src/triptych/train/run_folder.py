"""Which run a folder belongs to: the same command goes on, another one is refused before anything is written."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from triptych.atomic_write import write_text_atomically
from triptych.config import first_difference, from_json
from triptych.data.config import DataConfig
from triptych.data.open import open_source, train_and_eval
from triptych.data.source import Source
from triptych.errors import UserError
from triptych.train.configs.registry import RunConfig, kind_of

ConfigDict = dict[str, Any]  # a config as JSON, and the fingerprint of its data

# What may change from one call to the next without making it another run.
CHANGEABLE = {
    "": ("features",),
    "loop": (
        *("log_every", "save_every", "keep", "device", "tensorboard", "on_nonfinite"),
        *("parallel", "recompute"),
    ),
    "loading": ("workers", "cache", "eval_batch_size"),
    "cache": ("folder", "shard", "batch_size"),
    "samples": ("count", "prompts", "steps", "guidance"),
}
EXAMPLES = "examples.json.gz"
# What a run leaves, besides its config.
OUTPUTS = ("model.safetensors", "lora.safetensors", "word.safetensors", "log.jsonl", "checkpoints")


def resume_identity(said: ConfigDict) -> ConfigDict:
    """`said` without what is free to change."""
    return {
        name: {k: v for k, v in value.items() if k not in CHANGEABLE.get(name, ())}
        if isinstance(value, dict)
        else value
        for name, value in said.items()
        if name not in CHANGEABLE[""]
    }


def claim(out: Path, said: ConfigDict, changed: Callable[[], str] = str) -> None:
    """Make `out` the folder of this run by writing its config.json.

    Args:
        changed: called where the data is not what it was; says in what.

    Raises:
        UserError: it is the folder of another run, or of something else.
    """
    path = out / "config.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, and a folder for the run is needed; give another --out")
    if path.exists():
        try:
            was = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            was = None
        if not isinstance(was, dict) or "fingerprint" not in was:
            raise UserError(f"{path} is not of a training run; give another --out")
        require_same(out, resume_identity(was), resume_identity(said), changed)
    elif any((out / name).exists() for name in OUTPUTS):
        raise UserError(f"{out} holds files of something else and no config.json; give another --out")
    write_text_atomically(path, json.dumps(said, indent=1) + "\n")


@contextlib.contextmanager
def claim_folder(out: Path, said: ConfigDict, changed: Callable[[], str] = str) -> Iterator[None]:
    """`claim` for as long as a run goes on, and for good once it has left anything. One that is refused before, at its
    first batch perhaps, gives the folder up, so that the corrected command may have it."""
    was_there, was_claimed = out.exists(), (out / "config.json").exists()
    claim(out, said, changed)
    try:
        yield
    except Exception:
        log = out / "log.jsonl"
        learnt = any((out / name).exists() for name in OUTPUTS if name != log.name)
        if not (was_claimed or learnt or (log.exists() and log.stat().st_size)):
            log.unlink(missing_ok=True)
            (out / EXAMPLES).unlink(missing_ok=True)
            (out / "config.json").unlink()
            if not was_there and not any(out.iterdir()):
                out.rmdir()
        raise


def require_same(out: Path, was: ConfigDict, now: ConfigDict, changed: Callable[[], str] = str) -> None:
    """Refuse to go on with another run's state; the message names the first difference."""
    found = first_difference(was, now)
    if found is None:
        return
    name, before, after = found
    if name == "fingerprint":
        more = " or the first stage" if "first_stage" in now else ""
        what = changed()
        raise UserError(
            f"the pictures in {now.get('data')}{more} changed since the run in {out} began"
            f"{': ' if what else ''}{what}; bring them back to go on, or give another --out"
        )
    raise UserError(
        f"{out} holds a run with {name} {before!r}, and {after!r} was asked for; "
        "give the same command to go on, or another --out"
    )


def open_evaluation(
    data: str | None, split: str | None, loading: DataConfig, config: RunConfig | None
) -> Source:
    """Open the data to evaluate on: the named split; of a run's own data the part that it held out; of other data its
    evaluation split, or all of it if it has none."""
    if config is not None and split is None and (data is None or _same(data, config.data)):
        return train_and_eval(config.data, loading.eval_fraction, config.loop.seed, **loading.columns)[1]
    return open_source(data or (config.data if config else ""), split or "eval", **loading.columns)


def _same(data: str, other: str) -> bool:
    """Whether two names of data are one path."""
    if Path(data).exists() and Path(other).exists():
        return Path(data).resolve() == Path(other).resolve()
    return data == other


def config_of(folder: str | Path) -> RunConfig | None:
    """Read the config of a RUN folder; None of anything else.

    Raises:
        UserError: its config.json is damaged.
    """
    path = Path(folder) / "config.json"
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
