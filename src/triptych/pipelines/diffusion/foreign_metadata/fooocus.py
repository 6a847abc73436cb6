"""Fooocus, Fooocus MRE and RuinedFooocus: JSON in `parameters`.

Fooocus: {"prompt": "...", "negative_prompt": "...", "full_prompt": [...], "steps": 30, "guidance_scale": 4,
"resolution": "(1152, 896)", "seed": "1", "sampler": "dpmpp_2m_sde_gpu", "scheduler": "karras", "base_model": "...",
"loras": [["name", 0.1, "hash"]], "styles": "['Fooocus V2']", "performance": "Speed", "version": "Fooocus v2.5.5"}
RuinedFooocus: {"Prompt": "...", "Negative": "...", "steps": 30, "cfg": 8, "width": 1152, "height": 896, "seed": 1,
"sampler_name": "dpmpp_2m_sde_gpu", "scheduler": "karras", "base_model_name": "...", "loras": [["hash", "0.1 - name"]],
"software": "RuinedFooocus"}
"""

import re
from collections.abc import Mapping
from typing import Any

from triptych.pipelines.diffusion.foreign_metadata.comfyui_names import COMFYUI_DISCARDS, COMFYUI_VARIANTS
from triptych.pipelines.diffusion.foreign_metadata.settings import (
    ForeignSettings,
    json_object,
    model_name,
)

IDLE = frozenset(
    {
        *(
            "vae",
            "full_prompt",
            "full_negative_prompt",
            "real_prompt",
            "real_negative_prompt",
            "metadata_scheme",
            "version",
            "created_by",
        ),
        *(
            "base_model_hash",
            "refiner_model_hash",
            "software",
            "image_number",
            "start_step",
            "inpaint_engine_version",
        ),
    }
)
# Steps of what Fooocus calls performance, which are all that it wrote before 2.3; some use a distilled LoRA.
PERFORMANCE_STEPS = {"Quality": 60, "Speed": 30, "Extreme Speed": 8, "Lightning": 4, "Hyper-SD": 4}
DISTILLED = ("Extreme Speed", "Lightning", "Hyper-SD")
NOTHING = (None, "", "None", "none", [], "[]", 0, False)


def recognizes(texts: Mapping[str, str]) -> bool:
    values = _values(texts)
    return "base_model" in values or "base_model_name" in values or values.get("software") == "RuinedFooocus"


def read(texts: Mapping[str, str]) -> ForeignSettings:
    values = _values(texts)
    source = values.get("software") or values.get("version")
    settings = ForeignSettings(source if isinstance(source, str) else "Fooocus")
    settings.set_texts(
        values.pop("prompt", ""), values.pop("negative", None) or values.pop("negative_prompt", "")
    )
    performance = values.pop("performance", None)
    steps = values.pop("steps", None) or PERFORMANCE_STEPS.get(str(performance))
    settings.set_number("num_steps", steps, 1, 10**6, int, called="steps")
    if performance in DISTILLED:
        settings.leave_out("performance", performance)
    scale, cfg = values.pop("guidance_scale", None), values.pop("cfg", None)
    scale = cfg if scale is None else scale
    settings.set_number("guidance_scale", scale, -1e6, 1e6, called="guidance scale")
    sides = re.findall(r"\d+", str(values.pop("resolution", "")))
    width, height = values.pop("width", None), values.pop("height", None)
    settings.set_size(*(sides if len(sides) == 2 else (width, height)))
    settings.set_seed(values.pop("seed", None))
    sampler = values.pop("sampler_name", None) or values.pop("sampler", None)
    settings.set_sampler(
        sampler, values.pop("scheduler", None), discards=COMFYUI_DISCARDS, variants=COMFYUI_VARIANTS
    )
    _set_loras(settings, values)
    clip_skip = values.pop("clip_skip", None)
    settings.set_number("clip_skip", None if clip_skip == 1 else clip_skip, 1, 100, int, called="clip skip")
    model = values.pop("base_model", None) or values.pop("base_model_name", None)
    settings.note_model(model, values.get("base_model_hash"))
    settings.note_noise()
    for name, value in values.items():
        if name not in IDLE and value not in NOTHING:
            settings.leave_out(name.replace("_", " "), value)
    return settings


def _values(texts: Mapping[str, str]) -> dict[str, Any]:
    """Values by Fooocus' newer keys; its older ones are titles: "Base Model"."""
    values = json_object(texts.get("parameters")) or {}
    return {name.lower().replace(" ", "_"): value for name, value in values.items()}


def _set_loras(settings: ForeignSettings, values: dict[str, Any]) -> None:
    """LoRAs of each of the notations: a list of lists, one text, or one key each."""
    loras: dict[str, Any] = {}
    listed = values.pop("loras", None)
    if isinstance(listed, str):  # "Loras:<name:0.1>,<name:0.2>"
        loras |= dict(re.findall(r"<([^<>:]+):([-\d.]+)>", listed))
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, list) and len(entry) == 3:
            loras[str(entry[0])] = entry[1]
        elif isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str):
            weight, _, name = entry[1].partition(" - ")
            loras[model_name(name)] = weight
    for key in [key for key in values if re.fullmatch(r"l\d", key)]:  # of MRE, with its weight as w1
        name, weight = values.pop(key), values.pop(f"w{key[1:]}", 1.0)
        if isinstance(name, str) and name != "None":
            loras[model_name(name)] = weight
    for key in [key for key in values if re.fullmatch(r"lora(_combined)?_\d+", key)]:
        parts = str(values.pop(key)).split(" : ")  # "name : 0.1", or "True : name : 0.1"
        if len(parts) >= 2 and parts[0] != "False" and parts[-2] != "None":
            loras.setdefault(model_name(parts[-2]), parts[-1])
    settings.set_loras(loras)
