"""InvokeAI: JSON in `invokeai_metadata` (3 and later) or `sd-metadata` (2), or a command in `Dream` (1 and 2).

invokeai_metadata: {"app_version": "4.2.0", "generation_mode": "txt2img", "positive_prompt": "...", "negative_prompt":
"...", "width": 512, "height": 512, "seed": 1, "rand_device": "cpu", "cfg_scale": 7.5, "steps": 30, "scheduler":
"dpmpp_2m_k", "clip_skip": 0, "model": {"name": "..."}, "loras": [{"model": {"name": "..."}, "weight": 0.75}]}
sd-metadata: {"app_version": "2.3.5", "model_weights": "...", "image": {"prompt": [{"prompt": "a [bad] apple", "weight":
1}], "steps": 30, "cfg_scale": 7.5, "width": 512, "height": 512, "seed": 1, "sampler": "k_lms", "type": "txt2img"}}
Dream: "a red apple [blurry]" -s 30 -S 1 -W 512 -H 512 -C 7.5 -A k_lms
"""

import re
from collections.abc import Mapping
from typing import Any

from triptych.pipelines.diffusion.foreign_metadata.settings import ForeignSettings, as_number, json_object

IDLE = frozenset(
    {
        *(
            "app_version",
            "generation_mode",
            "vae",
            "_canvas_objects",
            "canvas_v2_metadata",
            "positive_style_prompt",
        ),
        *(
            "negative_style_prompt",
            "board",
            "created_by",
            "type",
            "postprocessing",
            "metadata_version",
            "ref_images",
        ),
        *(
            "seed_behaviour",
            "threshold",
            "perlin",
            "app_id",
            "model_hash",
            "model_weights",
            "cfg_rescale_multiplier",
        ),
    }
)
NOTHING = (None, "", [], {}, False, 0, "txt2img")
_DREAM = re.compile(r"\s-([A-Za-z])\s*([^\s]+)")


def recognizes(texts: Mapping[str, str]) -> bool:
    if any(json_object(texts.get(key)) for key in ("invokeai_metadata", "sd-metadata")):
        return True
    return bool(_DREAM.search(texts.get("Dream", "")))


def read(texts: Mapping[str, str]) -> ForeignSettings:
    if (values := json_object(texts.get("invokeai_metadata"))) is not None:
        return _read_3(values)
    if (values := json_object(texts.get("sd-metadata"))) is not None:
        return _read_2(values)
    return _read_dream(texts["Dream"])


def _read_3(values: dict[str, Any]) -> ForeignSettings:
    settings = ForeignSettings(f"InvokeAI {values.get('app_version', '')}".strip())
    device = values.pop("rand_device", "cpu")
    settings.set_texts(values.pop("positive_prompt", ""), values.pop("negative_prompt", ""))
    settings.set_number("num_steps", values.pop("steps", None), 1, 10**6, int, called="steps")
    settings.set_number("guidance_scale", values.pop("cfg_scale", None), -1e6, 1e6, called="cfg_scale")
    settings.set_number("guidance_rescale", values.get("cfg_rescale_multiplier"), 0, 1)
    settings.set_size(values.pop("width", None), values.pop("height", None))
    settings.set_seed(values.pop("seed", None), "cpu" if device == "cpu" else "gpu")
    settings.set_sampler(values.pop("scheduler", None))
    skipped = as_number(values.pop("clip_skip", None), int)  # how many blocks, not which one
    settings.set_number("clip_skip", skipped + 1 if skipped else None, 1, 100, int)
    tiles = [values.pop("seamless_x", False), values.pop("seamless_y", False)]
    if any(tiles):
        settings.values["tiling"] = "".join(axis for axis, wraps in zip("xy", tiles, strict=True) if wraps)
    loras = values.pop("loras", None)
    for entry in loras if isinstance(loras, list) else []:
        if isinstance(entry, dict):
            settings.set_loras({_name(entry.get("lora") or entry.get("model")): entry.get("weight", 1.0)})
    if "img2img" in str(values.get("generation_mode")) or "inpaint" in str(values.get("generation_mode")):
        settings.set_number("strength", values.pop("strength", None), 0, 1)
        settings.note("made from another image, which the file does not hold")
    settings.note_model(_name(values.pop("model", None)))
    if device == "cuda":
        settings.values["rng"] = "cuda"
    settings.note_noise("" if device in ("cpu", "cuda") else f"on the device {device}")
    for name, value in values.items():
        if name not in IDLE and value not in NOTHING:
            settings.leave_out(name, value)
    return settings


def _read_2(values: dict[str, Any]) -> ForeignSettings:
    image = values.get("image")
    fields = dict(image) if isinstance(image, dict) else {}
    settings = ForeignSettings(f"InvokeAI {values.get('app_version', '')}".strip())
    prompts = fields.pop("prompt", "")
    parts = prompts if isinstance(prompts, list) else [prompts]
    texts = [str(part.get("prompt", "")) if isinstance(part, dict) else str(part) for part in parts]
    if any(isinstance(part, dict) and part.get("weight", 1) != 1 for part in parts):
        settings.note("the weights of several prompts are not reproduced")
    _set_common(settings, " ".join(texts), fields)
    settings.note_model(values.get("model_weights") or values.get("model"), values.get("model_hash"))
    for name, value in fields.items():
        if name not in IDLE and value not in NOTHING:
            settings.leave_out(name, value)
    return settings


def _read_dream(command: str) -> ForeignSettings:
    settings = ForeignSettings("InvokeAI")
    quoted = re.match(r'\s*"((?:\\.|[^"\\])*)"|\s*(.*?)(?=\s-[A-Za-z]\s*\S|$)', command)
    prompt = (quoted[1] or quoted[2] or "") if quoted else ""
    options = dict(_DREAM.findall(command[quoted.end() if quoted else 0 :]))
    names = {"s": "steps", "S": "seed", "W": "width", "H": "height", "C": "cfg_scale", "A": "sampler"}
    _set_common(settings, prompt, {name: options.pop(flag, None) for flag, name in names.items()})
    for flag, value in options.items():
        settings.leave_out(f"-{flag}", value)
    return settings


def _set_common(settings: ForeignSettings, prompt: str, fields: dict[str, Any]) -> None:
    """Set what versions 1 and 2 have; the negative prompt stands in brackets inside the prompt."""
    negative = re.findall(r"\[([^\[\]]*)\]", prompt)
    settings.set_texts(re.sub(r"\s*\[[^\[\]]*\]", "", prompt).strip(), ", ".join(negative))
    settings.set_number("num_steps", fields.pop("steps", None), 1, 10**6, int, called="steps")
    settings.set_number("guidance_scale", fields.pop("cfg_scale", None), -1e6, 1e6, called="cfg_scale")
    settings.set_size(fields.pop("width", None), fields.pop("height", None))
    settings.set_seed(fields.pop("seed", None), "gpu")
    # These versions sampled with k-diffusion, by default on a Karras ramp below 30 steps (`--karras_max 29`).
    sampler, steps = fields.pop("sampler", None), as_number(settings.values.get("num_steps"), int)
    ramp = str(sampler).startswith("k_") and steps is not None and steps < 30
    settings.set_sampler(sampler, "karras" if ramp else None, usual={"dpm++2m": "uniform"})
    if fields.pop("seamless", False):
        settings.values["tiling"] = "xy"
    settings.note_noise("on the GPU")


def _name(model: Any) -> str:
    """The name of a model, whose key differs by version."""
    if isinstance(model, str):
        return model
    names = (model.get(key) for key in ("name", "model_name", "key")) if isinstance(model, dict) else ()
    return next((name for name in names if isinstance(name, str)), "")
