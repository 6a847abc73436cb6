"""Civitai's generator where it ran a graph of ComfyUI: `extraMetadata` beside the nodes holds the settings.

{"resource-stack": {"class_type": "CheckpointLoaderSimple", ...}, "6": {...}, "extra": {"airs": ["urn:air:sd1:..."]},
"extraMetadata": "{'prompt': 'a red apple', 'negativePrompt': '', 'steps': 25, 'cfgScale': 7, ...}"}
"""

from collections.abc import Mapping
from typing import Any

from triptych.pipelines.diffusion.foreign_metadata.comfyui_names import COMFYUI_DISCARDS, COMFYUI_VARIANTS
from triptych.pipelines.diffusion.foreign_metadata.settings import ForeignSettings, json_object

IDLE = frozenset(
    {
        *(
            "workflowId",
            "resources",
            "remixOfId",
            "process",
            "quantity",
            "nsfw",
            "draft",
            "baseModel",
            "aspectRatio",
        ),
        *(
            "creationDate",
            "fluxMode",
            "disablePoi",
            "engine",
            "priority",
            "experimental",
            "outputFormat",
            "remixSimilarity",
        ),
    }
)


def recognizes(texts: Mapping[str, str]) -> bool:
    return _settings(texts) is not None


def read(texts: Mapping[str, str]) -> ForeignSettings:
    values = dict(_settings(texts) or {})
    settings = ForeignSettings("Civitai")
    settings.set_texts(values.pop("prompt", ""), values.pop("negativePrompt", ""))
    settings.set_number("num_steps", values.pop("steps", None), 1, 10**6, int, called="steps")
    settings.set_number("guidance_scale", values.pop("cfgScale", None), -1e6, 1e6, called="cfgScale")
    settings.set_size(values.pop("width", None), values.pop("height", None))
    settings.set_seed(values.pop("seed", None))
    sampler, scheduler = values.pop("sampler", None), values.pop("scheduler", None)
    settings.set_sampler(
        sampler, scheduler, usual="uniform", discards=COMFYUI_DISCARDS, variants=COMFYUI_VARIANTS
    )
    clip_skip = values.pop("clipSkip", None)
    settings.set_number("clip_skip", None if clip_skip == 1 else clip_skip, 1, 100, int, called="clipSkip")
    resources = values.get("resources")
    for resource in resources if isinstance(resources, list) else []:
        if isinstance(resource, dict):
            weight = f" with weight {resource['strength']}" if "strength" in resource else ""
            settings.note(
                f"made with version {resource.get('modelVersionId')} of Civitai's models{weight}; give its file"
            )
    for name, value in values.items():
        if name not in IDLE and value not in (None, "", [], False):
            settings.leave_out(name, value)
    settings.note_noise()
    return settings


def _settings(texts: Mapping[str, str]) -> dict[str, Any] | None:
    for key in ("parameters", "prompt", "UserComment"):
        extra = (json_object(texts.get(key)) or {}).get("extraMetadata")
        values = extra if isinstance(extra, dict) else json_object(extra)
        if values is not None and "prompt" in values:
            return values
    return None
