"""The YAML beside a CompVis file (v1-inference.yaml): what its names and shapes cannot tell. Read as plain values;
class paths in it are passed over."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from triptych.diffusion.config import COMPVIS_SCHEDULES, Prediction, ProcessConfig
from triptych.errors import UserError
from triptych.weights.files.sanitize import printable

PREDICTIONS: dict[str, Prediction] = {"eps": "eps", "v": "v", "x0": "x0"}
LARGEST = 2**20  # bytes


@dataclass(frozen=True)
class ModelYaml:
    """`model.params` of such a file; empty where there is none."""

    path: Path | None = None
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "" if self.path is None else self.path.name

    def at(self, *way: str) -> dict[str, Any]:
        """The object that keys lead to; empty where one is missing.

        Raises:
            UserError: something else stands there.
        """
        found: Any = self.params
        for key in way:
            found = found.get(key)
            if found is None:
                return {}
            if not isinstance(found, dict):
                raise UserError(
                    f"{self.path} says {'.'.join(way)} is {printable(found, 40)}, which must hold values"
                )
        return found

    def prediction(self) -> Prediction | None:
        said = self.params.get("parameterization")
        if said is None:
            return None
        if not isinstance(said, str) or said not in PREDICTIONS:
            raise UserError(
                f"{self.path} says parameterization {printable(said, 40)!r}; known are {', '.join(PREDICTIONS)}"
            )
        return PREDICTIONS[said]

    def process(self, usual: ProcessConfig, *way: str) -> ProcessConfig:
        """`usual` with the betas that are said."""
        said = self.at(*way)
        more: dict[str, Any] = {}
        for theirs, ours in (
            ("linear_start", "beta_start"),
            ("linear_end", "beta_end"),
            ("timesteps", "steps"),
        ):
            if theirs in said:
                more[ours] = self._number(said, theirs)
        if "steps" in more:
            more["steps"] = round(more["steps"])
        if "beta_schedule" in said:
            schedule = said["beta_schedule"]
            if not isinstance(schedule, str) or schedule not in COMPVIS_SCHEDULES:
                raise UserError(
                    f"{self.path} says beta_schedule {printable(schedule, 40)!r}; known are "
                    f"{', '.join(COMPVIS_SCHEDULES)}"
                )
            more["schedule"] = COMPVIS_SCHEDULES[schedule]
        elif more:
            more["schedule"] = COMPVIS_SCHEDULES["linear"]  # CompVis' own default
        try:
            return replace(usual, **more)
        except UserError as problem:
            raise UserError(f"{self.path}: {problem}") from problem

    def scale(self) -> float | None:
        return self._number(self.params, "scale_factor") if "scale_factor" in self.params else None

    def averaged(self) -> bool:
        """Whether CompVis' scripts sample with averaged weights; they do unless told otherwise."""
        return self.path is not None and self.params.get("use_ema", True) is not False

    def heads(self) -> tuple[int, int] | None:
        """Heads, or channels a head, of the UNet."""
        said = self.at("unet_config", "params")
        for name, place in (("num_head_channels", 1), ("num_heads", 0)):
            count = said.get(name, -1)
            if isinstance(count, int) and not isinstance(count, bool) and count > 0:
                return (count, 0) if place == 0 else (0, count)
        return None

    def latent_size(self) -> tuple[int, int] | None:
        side = self.params.get("image_size")
        return (side, side) if isinstance(side, int) and side > 0 else None

    def skipped(self) -> int | None:
        """Last blocks of OpenCLIP that are left out."""
        layer = self.at("cond_stage_config", "params").get("layer")
        return {"last": 0, "penultimate": 1}.get(layer) if isinstance(layer, str) else None

    def boxes(self) -> bool | None:
        """Whether the text encoder is given tokens of its own kind, no words."""
        said = self.at("cond_stage_config", "params").get("use_tokenizer")
        return None if said is None else said is False

    def _number(self, said: dict[str, Any], name: str) -> float:
        try:
            value = float(said[name])  # 1e-4 without a point is a string in YAML 1.1
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{self.path} says {name} {printable(said[name], 40)!r}, which must be a number")
        return value


def read_yaml(path: Path | None) -> ModelYaml:
    """What a YAML file says of a model; nothing where there is no file, or it speaks of something else.

    Raises:
        UserError: it is no YAML of plain values, or too large for one.
    """
    if path is None:
        return ModelYaml()
    import yaml

    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} has {path.stat().st_size} bytes, too many for a config; remove it")
        whole = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        where = getattr(problem, "problem", None) or problem
        raise UserError(
            f"{path} is no YAML of plain values ({printable(where, 80)}); fetch it again or remove it"
        ) from problem
    except OSError as problem:
        raise UserError(f"cannot read {path}: {problem.strerror}; check its permissions") from problem
    model = whole.get("model") if isinstance(whole, dict) else None
    params = model.get("params") if isinstance(model, dict) else None
    return ModelYaml(path, params) if isinstance(params, dict) else ModelYaml()
