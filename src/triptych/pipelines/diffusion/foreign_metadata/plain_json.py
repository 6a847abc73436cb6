"""JSON of programs that have no dialect of their own here, by the names that most of them use for their settings.

TensorArt: {"prompt": "...", "negativePrompt": "...", "samplerName": "Euler a", "steps": 25, "cfgScale": 7, "seed": "1"}
AI Horde: {"prompt": "a cat ### blurry", "sampler_name": "k_euler", "steps": 20, "cfg_scale": 7, "seed": "1"}
Scripts around diffusers: {"prompt": "...", "num_inference_steps": 25, "guidance_scale": 7.5, "seed": 1}
Mochi Diffusion: Include in Image: a cat; Exclude from Image: blurry; Steps: 20; Seed: 1; Guidance Scale: 7
"""

import re
from collections.abc import Mapping
from typing import Any

from triptych.pipelines.diffusion.foreign_metadata.settings import ForeignSettings, json_object

# Names by their letters: "cfg_scale" and "cfgScale" are one.
_PROMPT = ("prompt", "positiveprompt", "positive", "includeinimage")
_NEGATIVE = ("negativeprompt", "negative", "uc", "excludefromimage")
_STEPS = ("steps", "numinferencesteps", "inferencesteps", "samplingsteps", "numsteps")
_SCALE = ("cfgscale", "cfg", "guidancescale", "guidance", "scale")
_SEED = ("seed",)
_SAMPLER = ("samplername", "sampler", "samplingmethod")
_SCHEDULE = ("scheduler", "scheduletype", "schedule", "noiseschedule")
_MODEL = ("model", "modelname", "checkpoint", "basemodel", "sdmodelname")
_SIZE = ("size", "resolution")
_MOCHI = "Include in Image:"
_NOTHING = (None, "", "None", "none", [], {}, 0, False)


def recognizes(texts: Mapping[str, str]) -> bool:
    return bool(_values(texts))


def read(texts: Mapping[str, str]) -> ForeignSettings:
    values = _values(texts)
    settings = ForeignSettings("a program without a name")

    def pop(names: tuple[str, ...]) -> Any:
        present = [values.pop(name) for name in names if name in values]
        return present[0] if present else None

    prompt, negative = pop(_PROMPT), pop(_NEGATIVE)
    if negative is None and isinstance(prompt, str) and "###" in prompt:  # AI Horde's separator
        prompt, _, negative = (part.strip() for part in prompt.partition("###"))
    settings.set_texts(prompt, negative)
    settings.set_number("num_steps", pop(_STEPS), 1, 10**6, int, called="steps")
    settings.set_number("guidance_scale", pop(_SCALE), -1e6, 1e6, called="guidance scale")
    settings.set_seed(pop(_SEED))
    sides = re.findall(r"\d+", str(pop(_SIZE) or ""))
    width, height = pop(("width",)), pop(("height",))
    settings.set_size(*(sides if len(sides) == 2 else (width, height)))
    sampler, schedule = pop(_SAMPLER), pop(_SCHEDULE)
    settings.set_sampler(*((schedule, None) if sampler is None else (sampler, schedule)))
    clip_skip = pop(("clipskip",))
    settings.set_number(
        "clip_skip", None if clip_skip in (*_NOTHING, 1) else clip_skip, 1, 100, int, called="clip skip"
    )
    settings.note_model(pop(_MODEL))
    settings.note("the settings have common names, but no known program wrote them: details may differ")
    settings.note_noise()
    for name, value in values.items():
        if value not in _NOTHING:
            settings.leave_out(name, value)
    return settings


def _values(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return settings by the letters of their names; an empty dict if no text has a prompt and two numbers with it."""
    for text in texts.values():
        values: Mapping[str, Any] = json_object(text) or {}
        if text.startswith(_MOCHI):
            values = dict(part.split(":", 1) for part in text.split(";") if ":" in part)
            values = {name: value.strip() for name, value in values.items()}
        known = {re.sub(r"[^a-z]", "", name.lower()): value for name, value in values.items()}
        numbers = sum(any(name in known for name in names) for names in (_STEPS, _SCALE, _SEED))
        if numbers >= 2 and any(isinstance(known.get(name), str) for name in _PROMPT):
            return known
    return {}
