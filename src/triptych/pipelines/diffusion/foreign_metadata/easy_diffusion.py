"""Easy Diffusion: JSON in EXIF's UserComment, or one PNG chunk for each setting, with API names or titles.

{"prompt": "...", "negative_prompt": "...", "seed": 1, "width": 512, "height": 512, "num_inference_steps": 25,
"guidance_scale": 7.5, "sampler_name": "euler_a", "use_stable_diffusion_model": "sd-v1-5", "clip_skip": false}
"""

from collections.abc import Mapping
from typing import Any

from triptych.pipelines.diffusion.foreign_metadata.settings import ForeignSettings, json_object, model_name

# Title -> API name.
NAMES_OF_TITLES = {
    "Prompt": "prompt",
    "Negative Prompt": "negative_prompt",
    "Seed": "seed",
    "Width": "width",
    "Height": "height",
    "Steps": "num_inference_steps",
    "Guidance Scale": "guidance_scale",
    "Sampler": "sampler_name",
    "Stable Diffusion model": "use_stable_diffusion_model",
    "VAE model": "use_vae_model",
    "Hypernetwork model": "use_hypernetwork_model",
    "Hypernetwork Strength": "hypernetwork_strength",
    "Use Face Correction": "use_face_correction",
    "Use Upscaling": "use_upscale",
    "Upscale By": "upscale_amount",
    "Prompt Strength": "prompt_strength",
    "Clip Skip": "clip_skip",
    "Lora model": "use_lora_model",
    "Lora Strength": "lora_alpha",
    "Seamless Tiling": "tiling",
    "ControlNet model": "use_controlnet_model",
}
LOSSES = {
    "use_hypernetwork_model": "the hypernetwork",
    "use_face_correction": "face restoration",
    "use_upscale": "upscaling",
    "use_controlnet_model": "ControlNet",
    "clip_skip": "clip skip",
}
NOTHING = (None, "", "None", "none", False, "False", "false", [])


def recognizes(texts: Mapping[str, str]) -> bool:
    values = _values(texts)
    return "use_stable_diffusion_model" in values and "prompt" in values


def read(texts: Mapping[str, str]) -> ForeignSettings:
    values = _values(texts)
    settings = ForeignSettings("Easy Diffusion")
    settings.set_texts(values.get("prompt", ""), values.get("negative_prompt", ""))
    settings.set_number("num_steps", values.get("num_inference_steps"), 1, 10**6, int, called="steps")
    settings.set_number("guidance_scale", values.get("guidance_scale"), -1e6, 1e6)
    settings.set_size(values.get("width"), values.get("height"))
    settings.set_seed(values.get("seed"), "gpu")
    settings.set_sampler(values.get("sampler_name"))
    if values.get("tiling") in ("x", "y", "xy"):
        settings.values["tiling"] = values["tiling"]
    _set_loras(settings, values.get("use_lora_model"), values.get("lora_alpha"))
    if values.get("prompt_strength") not in NOTHING and "init_image" in values:
        settings.set_number("strength", values["prompt_strength"], 0, 1)
        settings.note("made from another image, which the file does not hold")
    for name, feature in LOSSES.items():
        if values.get(name) not in NOTHING:
            settings.note(f"{feature} is not reproduced ({values[name]})")
    settings.note_model(values.get("use_stable_diffusion_model"))
    settings.note_noise("on the GPU")
    return settings


def _values(texts: Mapping[str, str]) -> dict[str, Any]:
    values: Mapping[str, Any] = json_object(texts.get("parameters")) or texts
    return {NAMES_OF_TITLES.get(name, name): value for name, value in values.items()}


def _set_loras(settings: ForeignSettings, models: Any, weights: Any) -> None:
    names = models if isinstance(models, list) else [models]
    strengths = weights if isinstance(weights, list) else [weights]
    for name, weight in zip(names, [*strengths, *[1.0] * len(names)], strict=False):
        if isinstance(name, str) and name not in NOTHING:
            settings.set_loras({model_name(name): 1.0 if weight is None else weight})
