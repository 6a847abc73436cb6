"""The tasks that can be trained, and the config.json of a RUN folder, which names its task."""

from typing import Any, NamedTuple, TypeGuard

from triptych.config import from_json, to_json
from triptych.errors import CheckpointError
from triptych.training.configs.base import ClassifyConfig, PretrainConfig, SegmentConfig
from triptych.training.configs.first_stage import CompressConfig
from triptych.training.configs.second_stage import SecondStageConfig

RunConfig = ClassifyConfig | SegmentConfig | PretrainConfig | CompressConfig | SecondStageConfig

VERSION = 1
"""Version of config.json; another one is refused."""
TAG = "triptych"
"""Key of version and task in config.json: {"triptych": {"version": 1, "task": "segmentation"}, ...fields}."""


class RunTask(NamedTuple):
    """A task that can be trained."""

    config: type[RunConfig]
    module: str
    """The module whose `prepare` builds a run from such a config."""


TASKS: dict[str, RunTask] = {
    "classification": RunTask(ClassifyConfig, "triptych.training.tasks.classification"),
    "segmentation": RunTask(SegmentConfig, "triptych.training.tasks.segmentation"),
    "masked_image": RunTask(PretrainConfig, "triptych.training.tasks.masked_image"),
    "first_stage": RunTask(CompressConfig, "triptych.training.first_stage.build"),
    "second_stage": RunTask(SecondStageConfig, "triptych.training.second_stage.build"),
}


def task_of(config: RunConfig) -> str:
    """Return the name of the task that a config is of."""
    return next(name for name, task in TASKS.items() if type(config) is task.config)


def run_to_json(config: RunConfig) -> dict[str, Any]:
    """Return the content of config.json: version, task, and the fields of the config."""
    return {TAG: {"version": VERSION, "task": task_of(config)}, **to_json(config)}


def is_run_json(data: Any) -> TypeGuard[dict[str, Any]]:
    """Return whether JSON data is of a RUN folder, of any version; other libraries have a config.json too."""
    return isinstance(data, dict) and (TAG in data or {"loading", "loop"} <= data.keys())


def check_version(data: dict[str, Any], path: Any) -> None:
    """Refuse the config.json of another version of the package.

    Raises:
        CheckpointError: it has no version, or another one; or its task is unknown.
    """
    tag = data.get(TAG)
    version, task = (tag.get("version"), tag.get("task")) if isinstance(tag, dict) else (None, None)
    if version != VERSION or task not in TASKS:
        raise CheckpointError(
            f"{path} was written by another version of triptych (config version {version}, task {task}; needed is "
            f"version {VERSION}); use that version, or give the weights' file in place of the folder"
        )


def run_from_json(data: dict[str, Any], path: Any) -> RunConfig:
    """Return the config in the content of config.json.

    Args:
        data: what `run_to_json` returned; a "fingerprint" is ignored.
        path: the file, for error messages.

    Raises:
        CheckpointError: another version of the package wrote it.
        ConfigError: a field is unknown or invalid.
    """
    check_version(data, path)
    fields = {name: value for name, value in data.items() if name not in (TAG, "fingerprint")}
    return from_json(TASKS[data[TAG]["task"]].config, fields)
