"""NovelAI: `Software` is its name, `Description` the prompt, and `Comment` JSON.

{"prompt": "...", "uc": "...", "steps": 28, "scale": 5.0, "seed": 1, "sampler": "k_euler_ancestral", "width": 832,
"height": 1216, "noise_schedule": "karras", "cfg_rescale": 0.0, "sm": false, "request_type": "PromptGenerateRequest"}
"""

from collections.abc import Mapping
from typing import Any

from triptych.pipelines.diffusion.foreign_metadata.settings import ForeignSettings, json_object

IDLE = frozenset(
    {
        *(
            "request_type",
            "signed_hash",
            "n_samples",
            "legacy",
            "legacy_v3_extend",
            "version",
            "add_original_image",
        ),
        *(
            "deliberate_euler_ancestral_bug",
            "prefer_brownian",
            "extra_noise_seed",
            "uncond_scale",
            "params_version",
        ),
        *(
            "lora_unet_weights",
            "lora_clip_weights",
            "hide_debug_overlay",
            "cfg_sched_eligibility",
            "explike_fine_detail",
        ),
        *(
            "minimize_sigma_inf",
            "uncond_per_vibe",
            "wonky_vibe_correlation",
            "stream",
            "legacy_uc",
            "use_order",
        ),
        *("reference_information_extracted_multiple", "reference_strength_multiple", "controlnet_strength"),
        *(
            "dynamic_thresholding_mimic_scale",
            "dynamic_thresholding_percentile",
            "v4_prompt",
            "v4_negative_prompt",
        ),
        *("qualityToggle", "ucPreset", "image_format", "normalize_reference_strength_multiple", "source"),
    }
)


def recognizes(texts: Mapping[str, str]) -> bool:
    comment = _comment(texts)
    named = "NovelAI" in texts.get("Software", "") + texts.get("Title", "")
    return bool(comment) and (named or {"prompt", "uc", "scale"} <= comment.keys())


def read(texts: Mapping[str, str]) -> ForeignSettings:
    values = _comment(texts)
    model = texts.get("Source", "")
    settings = ForeignSettings("NovelAI")
    prompt = values.pop("prompt", None)
    settings.set_texts(texts.get("Description", "") if prompt is None else prompt, values.pop("uc", ""))
    settings.set_number("num_steps", values.pop("steps", None), 1, 10**6, int, called="steps")
    settings.set_number("guidance_scale", values.pop("scale", None), -1e6, 1e6, called="scale")
    settings.set_number("guidance_rescale", values.pop("cfg_rescale", None), 0, 1, called="cfg_rescale")
    settings.set_size(values.pop("width", None), values.pop("height", None))
    settings.set_seed(values.pop("seed", None), "gpu")
    settings.set_sampler(values.pop("sampler", None), values.pop("noise_schedule", None))
    if "strength" in values:
        settings.set_number("strength", values.pop("strength"), 0, 1)
        settings.note("made from another image, which the file does not hold")
    settings.note_model(model or "of NovelAI")
    settings.note_noise("on NovelAI's GPUs")
    if any(sign in settings.values.get("prompt", "") for sign in "{}"):
        settings.note(
            "the prompt's braces, NovelAI's emphasis by 1.05, are read as text; (word:1.05) is the same here"
        )
    if characters := _characters(values.get("v4_prompt")):
        settings.note(f"the prompts of {characters} characters are not reproduced")
    for name, value in values.items():
        if name not in IDLE and value not in (None, "", [], False, 0):
            settings.leave_out(name, value)
    return settings


def _comment(texts: Mapping[str, str]) -> dict[str, Any]:
    comment = json_object(texts.get("Comment")) or json_object(texts.get("parameters")) or {}
    inner = json_object(comment.get("Comment"))  # in WebP and in the alpha channel all chunks are one JSON
    return inner or comment


def _characters(prompt: Any) -> int:
    caption = prompt.get("caption") if isinstance(prompt, dict) else None
    captions = caption.get("char_captions") if isinstance(caption, dict) else None
    return len(captions) if isinstance(captions, list) else 0
