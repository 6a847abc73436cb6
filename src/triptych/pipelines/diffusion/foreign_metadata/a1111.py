"""The text of AUTOMATIC1111's web UI, which Forge, SD.Next, Civitai, Fooocus and many nodes of ComfyUI write too.

a red apple
Negative prompt: blurry
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model hash: 6ce0161689, Model: sd-v1-5
"""

import itertools
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from triptych.diffusion.config import NUM_SEEDS, SPACINGS
from triptych.pipelines.diffusion.foreign_metadata.settings import ForeignSettings, as_number

# One of `Name: value, Name: "value, with a comma", ...`
# A name's length is bounded: matching would else take quadratic time on a long line without a colon.
PAIR = re.compile(r'(\w[\w \-/]{1,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
# Names of which at least one is in every line of parameters.
_CORE = ("steps", "sampler", "cfg scale", "seed", "size", "model", "model hash")
_INLINE = re.compile(r"(?:^|[\s,.;])(?=Steps:\s*\d)")  # of a text that lost its line breaks
_JSON_VALUE = re.compile(
    r"(?:^|,)\s*(Hashes|Civitai resources|Civitai metadata|Generated resources):\s*(?=[\[{])"
)
_NEGATIVE = "Negative prompt:"
_TEMPLATE = re.compile(r"(Negative t|T)emplate: ")
# Parameters that change no pixel, or that another field already holds.
IDLE = frozenset(
    {
        *("vae", "vae hash", "version", "lora hashes", "ti hashes", "hashes", "user", "civitai metadata"),
        *("created date", "parser", "operations", "app", "backend", "pipeline", "raw prompt"),
        *("raw negative prompt", "refiner hash", "batch size", "batch pos", "score"),
        *("triptych schedule", "model", "model hash"),
    }
)
# The first words of parameters that belong to one feature -> its name.
FEATURES = {
    "hires": "hires fix",
    "refiner": "the refiner",
    "controlnet": "ControlNet",
    "adetailer": "ADetailer",
    "freeu": "FreeU",
    "addnet": "Additional Networks",
    "regional": "regional prompts",
    "rp": "regional prompts",
    "hypernet": "the hypernetwork",
    "face": "face restoration",
    "variation": "the variation seed",
    "mask": "the mask",
    "soft": "soft inpainting",
    "dynamic": "dynamic thresholding",
    "tiled": "tiled diffusion",
    "ultimate": "Ultimate SD upscale",
    "sharpness": "Fooocus' sharpness",
    "adm": "Fooocus' ADM guidance",
}
# Noise levels that the web UI takes for "Automatic"; others are uniform.
AUTOMATIC = {
    **dict.fromkeys(
        ("dpm++2m", "dpm++sde", "dpm++2s-ancestral", "dpm2", "dpm2-ancestral", "restart"), "karras"
    ),
    **dict.fromkeys(("dpm++2m-sde", "dpm++2m-sde-heun", "dpm++3m-sde"), "exponential"),
}
# Before 1.9 the levels were named with the sampler or uniform; ours are, for the samplers that are not listed.
BEFORE_1_9 = dict.fromkeys(("dpm++2m", "dpm++2m-sde", "dpm++2m-sde-heun", "dpm++3m-sde"), "uniform") | {
    "dpm2": "uniform",
    "dpm2-ancestral": "uniform",
    "restart": "karras",
}
# Our schedules -> those that it computes under their names.
VARIANTS = {"kl-optimal": "kl-optimal-to-first"}
REFORGE_VARIANTS = {"beta": "beta-times"}
# Samplers to which it adds noise, unless the text says "Eta: 0" -> ours that do.
WITH_ETA = {"dpm-fast": "dpm-fast-ancestral", "dpm-adaptive": "dpm-adaptive-ancestral"}
# Our upscalers of the second pass -> the web UI's.
HIRES_TITLES = {
    "latent": "Latent",
    "latent-antialiased": "Latent (antialiased)",
    "latent-bicubic": "Latent (bicubic)",
    "latent-bicubic-antialiased": "Latent (bicubic antialiased)",
    "latent-nearest": "Latent (nearest)",
    "latent-nearest-exact": "Latent (nearest-exact)",
    "lanczos": "Lanczos",
    "nearest": "Nearest",
}
GPU_PROGRAMS = ("AUTOMATIC1111", "Forge", "ReForge", "SD.Next")
DISCARDS = ("dpm2", "dpm2-ancestral", "dpm++3m-sde")


def recognizes(texts: Mapping[str, str]) -> bool:
    """Return whether there is a text with parameters."""
    return bool(split_text(texts.get("parameters", ""))[1])


def read(texts: Mapping[str, str]) -> ForeignSettings:
    """Return the settings of a text, which may be a prompt alone."""
    head, pairs, after = split_text(texts.get("parameters", ""))
    head, templates = _without_templates(head)
    prompt, negative_prompt = prompts_of_lines(head)
    values = {name.strip().lower(): unquoted(value.strip()) for name, value in pairs}
    settings = ForeignSettings(_source(values))
    settings.set_texts(prompt, negative_prompt)
    settings.set_number("num_steps", values.pop("steps", None), 1, 10**6, int, called="steps")
    _set_sampler(settings, values)
    settings.set_number("guidance_scale", values.pop("cfg scale", None), -1e6, 1e6, called="cfg scale")
    _set_noise(settings, values)
    _set_size(settings, values.pop("size", None))
    _set_passes(settings, values)
    share = values.pop("variation seed strength", None) or values.pop("variation strength", None)
    settings.set_number("guidance_rescale", values.pop("cfg rescale", None), 0, 1, called="cfg rescale")
    _set_fooocus_loras(settings, values)
    if values.get("noise schedule") == "Default":
        values.pop("noise schedule")
    if as_number(share, float):
        settings.set_number("variation_strength", share, 0, 1, called="variation seed strength")
        settings.set_number("variation_seed", values.pop("variation seed", None), 0, NUM_SEEDS - 1, int)
    clip_skip = values.pop("clip skip", None) or values.pop("clip-skip", None)  # SD.Next's has a hyphen
    if clip_skip != "1":
        settings.set_number("clip_skip", clip_skip, 1, 100, int, called="clip skip")
    tiling = values.pop("tiling", None)
    if tiling is not None:
        settings.values["tiling"] = "xy" if tiling.lower() == "true" else ""
    settings.set_number(
        "merge_tokens", values.pop("token merging ratio", None), 0, 0.75, called="token merging ratio"
    )
    _note_others(settings, values)
    if templates:
        settings.note(f"the templates that the prompts were made of are left out: {' '.join(templates)}")
    if edits := texts.get("postprocessing"):
        settings.leave_out("postprocessing", edits)
    if after:
        settings.note(f"the lines after the parameters are left out: {' '.join(after)}")
    return settings


def split_text(text: str) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """Return the lines of the prompts, the parameters, and lines after them that are neither.

    Parameters are the last line that starts with their first one, "Steps:", or the last line of all with three
    parameters; a text on one line is cut before "Steps:".
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").strip().split("\n")
    starts = [i for i, line in enumerate(lines) if re.match(r"\s*Steps:\s*\d", line)]
    if starts and _is_parameters(" ".join(lines[starts[-1] :])):
        first = starts[-1]
        pairs, after = _pairs(lines[first]), []
        for before, line in itertools.pairwise(lines[first:]):
            more = _pairs(line)
            if more and (before.rstrip().endswith(",") or more[0][0].strip().lower() in _CORE):
                pairs += more
            elif line.strip():
                after.append(line.strip())
        return lines[:first], pairs, after
    if _is_parameters(lines[-1]):
        inline = list(_INLINE.finditer(lines[-1]))
        if inline and _is_parameters(lines[-1][inline[-1].end() :]):
            cut = inline[-1]
            return [*lines[:-1], lines[-1][: cut.start()]], _pairs(lines[-1][cut.end() :]), []
        return lines[:-1], _pairs(lines[-1]), []
    return lines, [], []


def _without_templates(lines: list[str]) -> tuple[list[str], list[str]]:
    """Return the lines before SD.Next's templates, which it writes after the prompts, and those."""
    starts = [i for i, line in enumerate(lines) if _TEMPLATE.match(line)]
    negative = [i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)]
    if not starts or not negative or starts[0] < negative[-1]:
        return lines, []
    return lines[: starts[0]], lines[starts[0] :]


def prompts_of_lines(lines: list[str]) -> tuple[str, str]:
    """Return prompt and negative prompt of the lines before the parameters."""
    prompts: dict[bool, list[str]] = {False: [], True: []}
    negative = False
    for line in map(str.strip, lines):
        before, heading, rest = line.partition(_NEGATIVE)
        inside = heading and not negative and len(lines) == 1  # a text that lost its line breaks
        if heading and (not before or inside):
            if before:
                prompts[False].append(before.strip())
            negative, line = True, rest.strip()
        prompts[negative].append(line)
    return "\n".join(prompts[False]), "\n".join(prompts[True])


def unquoted(text: str) -> str:
    """Return the text of a quoted value."""
    if len(text) > 1 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text))
        except ValueError:
            return text
    return text


def _is_parameters(line: str) -> bool:
    pairs = _pairs(line)
    if len(pairs) < 3:
        return False
    names = [name.strip().lower() for name, _ in pairs]
    # On a line without breaks the prompt's last words are part of the first name.
    return any(name in _CORE or name.endswith((" steps", " sampler")) for name in names)


def _pairs(line: str) -> list[tuple[str, str]]:
    """Parameters of a line; values that are JSON are taken whole."""
    json_values, decoder = [], json.JSONDecoder()
    for _ in range(8):  # there are four of these names
        match = _JSON_VALUE.search(line)
        if match is None:
            break
        try:
            _, end = decoder.raw_decode(line, match.end())
        except (ValueError, RecursionError):
            break
        json_values.append((match[1], line[match.end() : end]))
        line = line[: match.start()] + line[end:]
    return PAIR.findall(line) + json_values


def _source(values: Mapping[str, str]) -> str:
    """The program that wrote the parameters, by its marks among them."""
    version = values.get("version", "")
    if "civitai resources" in values or "civitai metadata" in values:
        return "Civitai"
    if values.get("app", "") == "SD.Next" or "parser" in values:
        return "SD.Next"
    if not version:
        return "AUTOMATIC1111's web UI"
    if re.match(r"f\d", version):
        return f"{'ReForge' if version.startswith('f1.') else 'Forge'} {version}"
    return f"AUTOMATIC1111's web UI {version}" if re.match(r"v?\d", version) else version


def _set_sampler(settings: ForeignSettings, values: dict[str, str]) -> None:
    schedule = values.pop("schedule type", None) or values.pop("scheduler", None)
    if schedule and schedule.endswith("Scheduler"):  # SD.Next: the class of the sampler, without its levels
        schedule, usual = None, {}
        settings.note("the text does not name the noise levels; the sampler's usual ones are used")
    else:
        usual = AUTOMATIC if (schedule or "").lower() == "automatic" else BEFORE_1_9
    sampler = values.pop("sampler", None)
    if values.get("triptych schedule") in SPACINGS:  # one that the web UI has no exact name for
        settings.set_sampler(sampler)
        settings.values["schedule"] = values["triptych schedule"]
    else:
        variants = VARIANTS | REFORGE_VARIANTS if settings.source.startswith("ReForge") else VARIANTS
        settings.set_sampler(sampler, schedule, usual=usual, discards=DISCARDS, variants=variants)
    if sampler is None and "num_steps" in settings.values:
        settings.note("the text names no sampler; dpm++2m is used")
    if (name := settings.values.get("sampler")) in WITH_ETA:
        if as_number(values.get("eta"), float) == 0:
            values.pop("eta")
        else:
            settings.values["sampler"] = WITH_ETA[name]


def _set_fooocus_loras(settings: ForeignSettings, values: dict[str, str]) -> None:
    """Set LoRAs that Fooocus names next to the prompt: "ink: 0.5, off: 0.1"."""
    weights = values.pop("lora weights", None)
    pairs = (entry.rpartition(": ") for entry in (weights or "").split(", "))
    settings.set_loras({name: weight for name, _, weight in pairs if name})


def _set_size(settings: ForeignSettings, size: str | None) -> None:
    if size is not None:
        width, _, height = size.partition("x")
        settings.set_size(width, height)


def _set_noise(settings: ForeignSettings, values: dict[str, str]) -> None:
    """Set seed and generator: the web UI's is the GPU's, unless the text says otherwise."""
    rng, seed = values.pop("rng", ""), values.pop("seed", None)
    on_gpu = rng.lower() in ("nv", "gpu", "cuda") or (not rng and settings.source.startswith(GPU_PROGRAMS))
    if rng and not on_gpu and rng.lower() != "cpu":
        settings.note_noise(f"by the generator {rng!r}")
    settings.set_seed(seed, "gpu" if on_gpu else "cpu")
    if on_gpu and "seed" in settings.values:
        settings.values["rng"] = "cuda"
        if not rng:
            settings.note("noise is drawn as on an NVIDIA GPU, the default; other devices draw other numbers")


def _add_a_step(settings: ForeignSettings) -> None:
    """Raise the strength to what the web UI does with k-diffusion's samplers: of 20 steps, 0.5 takes 11."""
    strength, steps = settings.values.get("strength"), settings.values.get("num_steps")
    if not strength or not steps or settings.values.get("sampler") in ("ddim", "plms", "unipc"):
        return
    if not settings.source.startswith(("AUTOMATIC1111", "Forge", "ReForge")):
        return
    count = int(min(strength, 0.999) * steps) + 1
    if int(strength * steps) != count:
        settings.values["strength"] = math.ceil(1e6 * count / steps) / 1e6
        settings.note(
            f"denoising strength {strength:g} of {steps} steps takes {count}, which strength "
            f"{settings.values['strength']:g} does here"
        )


def _set_passes(settings: ForeignSettings, values: dict[str, str]) -> None:
    """Set the strength, of the second pass or of an image that the file does not name, and what belongs to them."""
    strength = values.pop("denoising strength", None)
    if not any(name.startswith(("hires", "first pass")) for name in values):
        settings.set_number("strength", strength, 0, 1, called="denoising strength")
        _add_a_step(settings)
        if "strength" in settings.values:
            settings.note(
                f"made from another image (denoising strength {strength}), which the file does not hold"
            )
        return
    scale = values.pop("hires upscale", None) or _scale_of_sizes(settings, values)
    if scale is None:
        return
    settings.set_number("hires_scale", scale, 1, 16, called="hires upscale")
    if settings.values.get("hires_scale", 1) <= 1:
        return
    if strength is not None and as_number(strength, float) != 0:
        settings.set_number("hires_strength", strength, 0, 1, called="denoising strength")
    steps = values.pop("hires steps", None)
    if steps != "0":  # as many as in the first pass
        settings.set_number("hires_steps", steps, 1, 10**6, int, called="hires steps")
    title = values.pop("hires upscaler", "Latent")
    names = {other.lower(): name for name, other in HIRES_TITLES.items()}
    settings.values["hires_upscaler"] = names.get(title.lower(), "lanczos")
    if title.lower() not in names and title != "None":
        settings.note(f"the upscaler {title!r} is unknown here; lanczos is used instead")


def _scale_of_sizes(settings: ForeignSettings, values: dict[str, str]) -> float | None:
    """The factor of the second pass, where the text has its size; None and left as it is if the sides differ in it."""
    width, height = settings.values.get("width"), settings.values.get("height")
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", values.get("hires resize", ""))
    if not match or not width or not height:
        return None
    factors = {int(match[1]) / width, int(match[2]) / height} - {0.0}
    if len(factors) != 1:
        return None
    values.pop("hires resize")
    return factors.pop()


def _note_others(settings: ForeignSettings, values: dict[str, str]) -> None:
    """Note the model, the noise and all parameters that nothing here reproduces, a feature in one line."""
    settings.note_model(values.get("model"), values.get("model hash"))
    settings.note_noise(sequential=True)
    features: dict[str, list[str]] = {}
    for name, value in values.items():
        if name in IDLE or name == "civitai resources":
            continue
        feature = FEATURES.get(re.split(r"[\s\d]", name, maxsplit=1)[0], name)
        features.setdefault(feature, []).append(f"{name}: {value}")
    for feature, own in features.items():
        single = len(own) == 1 and own[0].startswith(feature)
        settings.note(
            f"{own[0]} is not reproduced" if single else f"{feature} is not reproduced ({', '.join(own[:9])})"
        )
    _note_resources(settings, values.get("civitai resources"))


def _note_resources(settings: ForeignSettings, resources: str | None) -> None:
    """Note models of Civitai, which it names by number."""
    try:
        parsed: Any = json.loads(resources or "[]")
    except ValueError:
        return
    for resource in parsed if isinstance(parsed, list) else []:
        if isinstance(resource, dict):
            model_type = resource.get("type", "model")
            name = resource.get("modelName") or f"version {resource.get('modelVersionId')}"
            weight = f" with weight {resource['weight']}" if "weight" in resource else ""
            settings.note(f"made with the {model_type} {name} of Civitai{weight}; give its file")
