"""SwarmUI and StableSwarmUI: JSON with `sui_image_params` (docs/Image Metadata Format.md of SwarmUI).

{"sui_image_params": {"prompt": "a red apple", "model": "sd15", "seed": 1, "steps": 20, "cfgscale": 7.0, "width": 512,
"height": 512, "sampler": "euler", "scheduler": "normal", "negativeprompt": "blurry", "swarm_version": "0.9.1.1"}}
"""

from collections.abc import Mapping
from typing import Any

from triptych.pipelines.diffusion.foreign_metadata.comfyui_names import COMFYUI_DISCARDS, COMFYUI_VARIANTS
from triptych.pipelines.diffusion.foreign_metadata.settings import (
    ForeignSettings,
    as_number,
    json_object,
    model_name,
)

IDLE = frozenset(
    {
        *("aspectratio", "images", "swarm_version", "date", "generation_time", "prep_time", "wildcardseed"),
        *("nopreviews", "imageformat", "automaticvae", "personalnote", "batchsize", "original_prompt", "vae"),
        *("original_negativeprompt", "used_wildcards", "donotsave", "presets", "rawresolution", "sidelength"),
        *("saveintermediateimages", "internalbackendtype", "exactbackendid", "colordepth", "loraweights"),
    }
)


def recognizes(texts: Mapping[str, str]) -> bool:
    return "sui_image_params" in texts.get("parameters", "") and _parameters(texts) is not None


def read(texts: Mapping[str, str]) -> ForeignSettings:
    values = dict(_parameters(texts) or {})
    settings = ForeignSettings(f"SwarmUI {values.get('swarm_version', '')}".strip())
    settings.set_texts(values.pop("prompt", ""), values.pop("negativeprompt", ""))
    settings.set_number("num_steps", values.pop("steps", None), 1, 10**6, int, called="steps")
    settings.set_number("guidance_scale", values.pop("cfgscale", None), -1e6, 1e6, called="cfgscale")
    settings.set_size(values.pop("width", None), values.pop("height", None))
    settings.set_seed(values.pop("seed", None))
    # What it asks of ComfyUI where nothing is chosen.
    old = values.pop("comfyuisampler", "euler"), values.pop("comfyuischeduler", "normal")
    sampler, scheduler = values.pop("sampler", old[0]), values.pop("scheduler", old[1])
    settings.set_sampler(sampler, scheduler, discards=COMFYUI_DISCARDS, variants=COMFYUI_VARIANTS)
    names, weights = _items(values.pop("loras", [])), _items(values.get("loraweights", []))
    settings.set_loras(
        dict(zip(map(model_name, map(str, names)), [*weights, *[1.0] * len(names)], strict=False))
    )
    layer = as_number(values.pop("clipstopatlayer", None), int)
    settings.set_number("clip_skip", None if layer in (None, -1) else -layer, 1, 100, int)
    settings.note_model(values.pop("model", None))
    settings.note_noise()
    for name, value in values.items():
        if name not in IDLE and value not in (None, "", [], False):
            settings.leave_out(name, value)
    return settings


def _parameters(texts: Mapping[str, str]) -> dict[str, Any] | None:
    parameters = (json_object(texts.get("parameters")) or {}).get("sui_image_params")
    return parameters if isinstance(parameters, dict) else None


def _items(value: Any) -> list[Any]:
    """A list, which older versions write as one text."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return [item for item in value if isinstance(item, str | int | float)] if isinstance(value, list) else []
