"""Draw Things: JSON in EXIF's UserComment.

{"c": "a red apple", "uc": "blurry", "steps": 20, "scale": 7.5, "seed": 1, "size": "512x768", "sampler": "Euler A",
"model": "sd_v1.5_f16.ckpt", "strength": 1, "lora": [{"model": "ink_lora_f16.ckpt", "weight": 0.6}], "v2": {...}}
"""

from collections.abc import Mapping
from typing import Any

from triptych.pipelines.diffusion.foreign_metadata.settings import ForeignSettings, json_object, model_name

IDLE = frozenset({"v2", "profile", "mask_blur", "size"})


def recognizes(texts: Mapping[str, str]) -> bool:
    return {"c", "uc", "sampler"} <= _comment(texts).keys()


def read(texts: Mapping[str, str]) -> ForeignSettings:
    values = dict(_comment(texts))
    settings = ForeignSettings("Draw Things")
    settings.set_texts(values.pop("c"), values.pop("uc"))
    settings.set_number("num_steps", values.pop("steps", None), 1, 10**6, int, called="steps")
    settings.set_number("guidance_scale", values.pop("scale", None), -1e6, 1e6, called="scale")
    width, _, height = str(values.get("size", "")).partition("x")
    if width:
        settings.set_size(width, height)
    settings.set_seed(values.pop("seed", None), "gpu")
    settings.set_sampler(values.pop("sampler"))
    strength = values.pop("strength", 1)
    if strength != 1:
        settings.set_number("strength", strength, 0, 1)
        settings.note("made from another image, which the file does not hold")
    loras = values.pop("lora", None)
    for lora in loras if isinstance(loras, list) else []:
        if isinstance(lora, dict):
            settings.set_loras({model_name(str(lora.get("model", ""))): lora.get("weight", 1.0)})
    settings.note_model(values.pop("model", None))
    settings.note_noise("on the GPU of an Apple device")
    for name, value in values.items():
        if name not in IDLE and value not in (None, "", [], False, 0):
            settings.leave_out(name, value)
    return settings


def _comment(texts: Mapping[str, str]) -> dict[str, Any]:
    return json_object(texts.get("UserComment")) or {}
