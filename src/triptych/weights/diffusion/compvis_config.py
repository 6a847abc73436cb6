"""The YAML next to a CompVis file (v1-inference.yaml), for what keys and shapes do not determine.

It is read as plain values; class paths in it are ignored."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from triptych.diffusion.config import COMPVIS_SCHEDULES, Prediction, ProcessConfig
from triptych.errors import CheckpointError, TriptychError
from triptych.weights.files.sanitize import printable

PREDICTIONS: dict[str, Prediction] = {"eps": "eps", "v": "v", "x0": "x0"}
LARGEST = 2**20  # bytes


@dataclass(frozen=True)
class ModelYaml:
    """`model.params` of such a file; empty if there is none."""

    path: Path | None = None
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "" if self.path is None else self.path.name

    def at(self, *way: str) -> dict[str, Any]:
        """Return the object that the keys lead to; empty if one is missing.

        Raises:
            CheckpointError: the value is no object.
        """
        node: Any = self.params
        for key in way:
            node = node.get(key)
            if node is None:
                return {}
            if not isinstance(node, dict):
                raise CheckpointError(
                    f"{self.path} says {'.'.join(way)} is {printable(node, 40)}, which must hold values"
                )
        return node

    def prediction(self) -> Prediction | None:
        value = self.params.get("parameterization")
        if value is None:
            return None
        if not isinstance(value, str) or value not in PREDICTIONS:
            raise CheckpointError(
                f"{self.path} says parameterization {printable(value, 40)!r}; known are {', '.join(PREDICTIONS)}"
            )
        return PREDICTIONS[value]

    def process(self, usual: ProcessConfig, *way: str) -> ProcessConfig:
        """Return `usual` with the betas of the file."""
        params = self.at(*way)
        more: dict[str, Any] = {}
        for theirs, ours in (
            ("linear_start", "beta_start"),
            ("linear_end", "beta_end"),
            ("timesteps", "num_timesteps"),
        ):
            if theirs in params:
                more[ours] = self._number(params, theirs)
        if "num_timesteps" in more:
            more["num_timesteps"] = round(more["num_timesteps"])
        if "beta_schedule" in params:
            schedule = params["beta_schedule"]
            if not isinstance(schedule, str) or schedule not in COMPVIS_SCHEDULES:
                raise CheckpointError(
                    f"{self.path} says beta_schedule {printable(schedule, 40)!r}; known are "
                    f"{', '.join(COMPVIS_SCHEDULES)}"
                )
            more["schedule"] = COMPVIS_SCHEDULES[schedule]
        elif more:
            more["schedule"] = COMPVIS_SCHEDULES["linear"]  # CompVis' default
        try:
            return replace(usual, **more)
        except TriptychError as problem:
            raise CheckpointError(f"{self.path}: {problem}") from problem

    def scale(self) -> float | None:
        return self._number(self.params, "scale_factor") if "scale_factor" in self.params else None

    def averaged(self) -> bool:
        """Return whether CompVis' scripts sample with averaged weights, which is their default."""
        return self.path is not None and self.params.get("use_ema", True) is not False

    def heads(self) -> tuple[int, int] | None:
        """Return (heads, channels per head) of the UNet, one of them 0; None if the file has neither."""
        params = self.at("unet_config", "params")
        for name, place in (("num_head_channels", 1), ("num_heads", 0)):
            count = params.get(name, -1)
            if isinstance(count, int) and not isinstance(count, bool) and count > 0:
                return (count, 0) if place == 0 else (0, count)
        return None

    def latent_size(self) -> tuple[int, int] | None:
        side = self.params.get("image_size")
        return (side, side) if isinstance(side, int) and side > 0 else None

    def skipped(self) -> int | None:
        """Return the number of last blocks of OpenCLIP that are skipped."""
        layer = self.at("cond_stage_config", "params").get("layer")
        return {"last": 0, "penultimate": 1}.get(layer) if isinstance(layer, str) else None

    def boxes(self) -> bool | None:
        """Return whether the text encoder takes bounding box tokens in place of words."""
        value = self.at("cond_stage_config", "params").get("use_tokenizer")
        return None if value is None else value is False

    def _number(self, params: dict[str, Any], name: str) -> float:
        try:
            value = float(params[name])  # 1e-4 without a point is a string in YAML 1.1
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise CheckpointError(
                f"{self.path} says {name} {printable(params[name], 40)!r}, which must be a number"
            )
        return value


def read_yaml(path: Path | None) -> ModelYaml:
    """Read the YAML of a model. The result is empty without a file, or if it describes no model.

    Raises:
        CheckpointError: it is no YAML of plain values, or too large.
    """
    if path is None:
        return ModelYaml()
    import yaml

    try:
        if path.stat().st_size > LARGEST:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, too many for a config; remove it")
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except TriptychError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        where = getattr(problem, "problem", None) or problem
        raise CheckpointError(
            f"{path} is no YAML of plain values ({printable(where, 80)}); fetch it again or remove it"
        ) from problem
    except OSError as problem:
        raise CheckpointError(f"cannot read {path}: {problem.strerror}; check its permissions") from problem
    model = document.get("model") if isinstance(document, dict) else None
    params = model.get("params") if isinstance(model, dict) else None
    return ModelYaml(path, params) if isinstance(params, dict) else ModelYaml()
