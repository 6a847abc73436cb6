"""The scale of an adapter's updates: PEFT's config, in adapter_config.json or in a header of diffusers."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triptych.errors import CheckpointError
from triptych.weights.diffusion.adapters.formulas import Formula
from triptych.weights.diffusion.adapters.tensors import PEFT
from triptych.weights.files.checkpoint import CheckpointFile
from triptych.weights.files.sanitize import printable

ConfigScale = Callable[[str, Formula, int | None], float]
"""(layer, formula, rank) -> alpha / rank."""
_DEFAULT_ALPHA = _DEFAULT_RANK = 8
_HEADER = "lora_adapter_metadata"
_MOVED_START = re.compile("pissa|olora|corda|loftq|lora_ga")
"""Values of `init_lora_weights` with which PEFT changes the base model too."""
_MAX_QUANTIFIERS = 5
_TYPES = ("LORA", "LOHA", "LOKR", "IA3")
_NEEDED_ALPHA = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}


@dataclass(frozen=True)
class PeftConfig:
    """What scales an adapter's updates."""

    type: str
    alpha: float
    rank: float
    alpha_pattern: Mapping[str, float]
    rank_pattern: Mapping[str, float]
    by_root: bool
    """Whether alpha is divided by the root of the rank (rsLoRA, Kalajdzievski 2023)."""

    def scale(self, layer: str, formula: Formula, rank: int | None) -> float:
        """Return the scale of a layer, by its name in the base model."""
        if self.type == "IA3" or formula.title not in ("LoRA", "LoHa", "LoKr"):
            return 1.0
        alpha = _of_layer(self.alpha_pattern, layer, self.alpha)
        # A LoKr's factors may be full, and its own files divide by the rank of the config all the same.
        if formula.title == "LoKr" or rank is None:
            rank = int(_of_layer(self.rank_pattern, layer, self.rank))
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def config_scale(file: Path, checkpoint: CheckpointFile) -> ConfigScale:
    """Return the scale of layers without an alpha of their own: by PEFT's config, else 1.

    Raises:
        CheckpointError: the config is damaged, or it belongs to weights that PEFT has changed.
    """
    try:
        known = _configs(file, checkpoint)
    except (ValueError, TypeError, AttributeError, RecursionError, OSError) as problem:
        raise CheckpointError(
            f"{file}: the config of its adapter is damaged ({printable(problem)}); fetch it again"
        ) from problem

    def scale(layer: str, formula: Formula, rank: int | None) -> float:
        for prefix, config in known:
            if layer.startswith(prefix):
                return config.scale(layer.removeprefix(prefix), formula, rank)
        return 1.0

    return scale


def _configs(file: Path, checkpoint: CheckpointFile) -> list[tuple[str, PeftConfig]]:
    """Return the configs that there are, each with the prefix of its layers."""
    configs: list[tuple[str, PeftConfig]] = []
    header = json.loads(checkpoint.metadata.get(_HEADER, "{}"))
    parts = {part: _part(header, f"{part}.") for part in ("unet", "text_encoder")}
    configs += [(f"{part}.", _peft(file, values)) for part, values in parts.items() if values]
    if header and not configs:
        configs.append(("", _peft(file, header)))
    folder = file if file.is_dir() else file.parent
    adapter_config = folder / "adapter_config.json"
    of_peft = any(name.startswith(PEFT) for name in checkpoint.entries)
    if of_peft and adapter_config.is_file() and adapter_config.stat().st_size < 2**20:
        configs.append((PEFT, _peft(file, json.loads(adapter_config.read_text()))))
    return configs


def _part(header: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in header.items() if key.startswith(prefix)}


def _peft(file: Path, config: Mapping[str, Any]) -> PeftConfig:
    """Read a config; what it leaves out has PEFT's default."""
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and _MOVED_START.match(start):
        raise CheckpointError(
            f"{file} was trained with init_lora_weights {start!r}, which changes the base model as well; convert it in "
            "PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    type = str(config.get("peft_type") or "LORA")
    if type not in _TYPES:
        raise CheckpointError(
            f"{file} is no LoRA: it is PEFT's {printable(type, 40)}; give one of {', '.join(_TYPES)}, or a merged model"
        )
    name = _NEEDED_ALPHA.get(type, "lora_alpha")
    alpha, rank = config.get(name, _DEFAULT_ALPHA), config.get("r", _DEFAULT_RANK)
    return PeftConfig(
        type,
        _number(name, alpha),
        _number("r", rank, least=1),
        _patterns(file, config, "alpha_pattern"),
        _patterns(file, config, "rank_pattern"),
        bool(config.get("use_rslora")),
    )


def _number(field: str, value: Any, least: float = -math.inf) -> float:
    number = float(value)
    if not math.isfinite(number) or number < least:
        raise ValueError(f"{field} is {value!r}")
    return number


def _patterns(file: Path, config: Mapping[str, Any], field: str) -> dict[str, float]:
    """Return the values by pattern, after checking that none of them can take hours to match."""
    least = 1 if field == "rank_pattern" else -math.inf
    patterns = {
        str(pattern): _number(field, value, least) for pattern, value in (config.get(field) or {}).items()
    }
    for pattern in patterns:
        nested = re.search(r"\)[*+{]", pattern)
        if nested or len(re.findall(r"[*+{]", pattern)) > _MAX_QUANTIFIERS:
            raise CheckpointError(
                f"{file}: {field} has {printable(pattern, 60)}, a regular expression with too many repetitions; "
                "write layer names instead"
            )
        try:
            re.compile(pattern)
        except re.error as problem:
            raise CheckpointError(
                f"{file}: {field} has {printable(pattern, 60)}, no regular expression ({problem}); fetch it again"
            ) from problem
    return patterns


def _of_layer(patterns: Mapping[str, float], layer: str, default: float) -> float:
    """Return the value of the first pattern that matches the end of a layer's name, as PEFT searches it."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", layer)), default)
