"""Metadata in an image's file: AUTOMATIC1111's `parameters` text for other programs, and a `GenerationRecord` as JSON.

Other programs' metadata are read by `foreign_metadata`.

a red apple
Negative prompt: blurry
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model hash: 6ce0161689, Model: sd-v1-5
"""

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from triptych.atomic_write import write_atomically
from triptych.config import from_json
from triptych.errors import ConfigError, DataError
from triptych.pipelines.diffusion import foreign_metadata
from triptych.pipelines.diffusion.foreign_metadata import a1111
from triptych.pipelines.diffusion.foreign_metadata.a1111 import (
    BEFORE_1_9,
    DISCARDS,
    HIRES_TITLES,
    VARIANTS,
    WITH_ETA,
)
from triptych.pipelines.diffusion.foreign_metadata.settings import ForeignSettings
from triptych.pipelines.diffusion.foreign_metadata.texts import PARAMETERS, image_texts
from triptych.pipelines.diffusion.options import GenerationRecord
from triptych.pipelines.image_input import ImageInput, name_of

log = logging.getLogger(__name__)

JSON = "triptych"  # name of our own PNG chunk

# Our samplers and schedules -> the web UI's.
SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "plms": "PLMS",
    "euler": "Euler",
    "euler-ancestral": "Euler a",
    "heun": "Heun",
    "heun++2": "HeunPP2",
    "restart": "Restart",
    "lms": "LMS",
    "dpm2": "DPM2",
    "dpm2-ancestral": "DPM2 a",
    "dpm-fast": "DPM fast",
    "dpm-fast-ancestral": "DPM fast",
    "dpm-adaptive": "DPM adaptive",
    "dpm-adaptive-ancestral": "DPM adaptive",
    "dpm++2s-ancestral": "DPM++ 2S a",
    "dpm++sde": "DPM++ SDE",
    "dpm++2m": "DPM++ 2M",
    "dpm++2m-sde": "DPM++ 2M SDE",
    "dpm++2m-sde-heun": "DPM++ 2M SDE Heun",
    "dpm++3m-sde": "DPM++ 3M SDE",
    "deis": "DEIS",
    "unipc": "UniPC",
    "lcm": "LCM",
}
SCHEDULES = {
    "uniform": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "sgm-uniform": "SGM Uniform",
    "simple": "Simple",
    "beta": "Beta",
    "kl-optimal-to-first": "KL Optimal",
    "align-your-steps": "Align Your Steps",
    "leading": "DDIM",
}
# Schedules for which the web UI has one with nearly the same levels only; ours is written besides.
NEAR_SCHEDULES = {
    "multistep": "SGM Uniform",
    "trailing": "Simple",
    "linspace": "Normal",
    "compvis": "DDIM",
    "multistep-leading": "DDIM",
    "multistep-karras": "Karras",
    "multistep-exponential": "Exponential",
    "multistep-beta": "Beta",
    "beta-times": "Beta",
    "multistep-beta-times": "Beta",
    "kl-optimal": "KL Optimal",
    "multistep-kl-optimal": "KL Optimal",
    "multistep-align-your-steps": "Align Your Steps",
}
OWN_SCHEDULE = "Triptych schedule"
_EXIF, _COMMENT = 0x8769, 0x9286  # the EXIF block, and its UserComment
_JPEG_HOLDS = 2**16 - 3  # bytes of one block


# Writing


def parameters(record: GenerationRecord) -> str:
    """Return the text that AUTOMATIC1111's web UI writes and reads. Noise is drawn as it does with "RNG: CPU" or
    "RNG: NV"."""
    height, width = record.size or (0, 0)
    denoises = record.task in ("image_to_image", "inpaint") and record.strength is not None
    hires, varies = record.hires_scale > 1, record.variation_strength > 0
    strength = record.strength if denoises else record.hires_strength if hires else None
    loras = {Path(path).stem: weight for path, weight in record.loras.items()}
    exact = _reads_as(record.sampler, record.schedule)
    known = {
        "Steps": record.num_steps,
        "Sampler": SAMPLERS[record.sampler],
        "Schedule type": (SCHEDULES | NEAR_SCHEDULES).get(record.schedule or ""),
        "CFG scale": f"{1.0 if record.guidance_scale is None else record.guidance_scale:g}",
        "Seed": record.seed,
        "Size": f"{width}x{height}",
        "Model hash": record.model_hash or None,
        "Model": Path(record.model).stem if record.model else None,
        "Variation seed": record.variation_seed if varies else None,
        "Variation seed strength": f"{record.variation_strength:g}" if varies else None,
        "Denoising strength": None if strength is None else f"{strength:g}",
        "Clip skip": record.clip_skip,
        "Eta": 0 if record.sampler in WITH_ETA else None,
        "Hires upscale": f"{record.hires_scale:g}" if hires else None,
        "Hires steps": record.hires_steps if hires else None,
        "Hires upscaler": HIRES_TITLES[record.hires_upscaler] if hires else None,
        "RNG": "NV" if record.rng == "cuda" else "CPU",
        "Tiling": "True" if record.tiling else None,
        "Token merging ratio": f"{record.merge_tokens:g}" if record.merge_tokens else None,
        "Lora hashes": ", ".join(f"{name}: {_lora_hash(record, name)}" for name in loras) or None,
        OWN_SCHEDULE: None if exact else record.schedule,
        "Version": record.software or None,
    }
    pairs = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in known.items() if value is not None)
    prompt = record.prompt if record.label is None else record.class_name or f"class {record.label}"
    prompt = " ".join(
        [prompt, *(f"<lora:{name}:{_weights(weight)}>" for name, weight in loras.items())]
    ).strip()
    negative = f"\nNegative prompt: {record.negative_prompt}" if record.negative_prompt else ""
    return f"{prompt}{negative}\n{pairs}".strip()


def _weights(weight: float | tuple[float, float]) -> str:
    return ":".join(f"{one:g}" for one in (weight if isinstance(weight, tuple) else (weight,)))


def _reads_as(sampler: str, schedule: str | None) -> bool:
    """Whether the web UI's names of sampler and schedule stand for exactly these."""
    read = ForeignSettings("")
    title = SCHEDULES.get(schedule or "")
    read.set_sampler(SAMPLERS[sampler], title, usual=BEFORE_1_9, discards=DISCARDS, variants=VARIANTS)
    return schedule is None or read.values.get("schedule") == schedule


def _lora_hash(record: GenerationRecord, name: str) -> str:
    return record.hashes.get(f"LoRA {name}", "")


def save(images: Sequence[Image.Image], out: str | os.PathLike[str]) -> list[Path]:
    """Write images with their metadata; each file is written completely or not at all.

    PNG holds both chunks, JPEG and WebP only the text, in EXIF's UserComment. Text that is too long for a JPEG (some
    32,000 letters) is left out, with a warning.

    Args:
        images: images that a `DiffusionPipeline` returned.
        out: a file (.png, .jpg or .webp), to whose name the seeds are added if there are several images; or a folder,
            whose files are numbered from the last one.

    Returns:
        The files, in the images' order.

    Raises:
        ConfigError: another suffix.
        StorageError: the place cannot be written.
    """
    out = Path(out)
    if not out.suffix or out.is_dir():
        last = [int(m[1]) for path in out.glob("*") if (m := re.match(r"(\d{4,9})-", path.name))]
        start = max(last, default=0) + 1
        paths = [out / f"{start + i:04d}-{_slug(image)}.png" for i, image in enumerate(images)]
    elif len(images) == 1:
        paths = [out]
    else:
        seeds = [image.info.get("seed", i) for i, image in enumerate(images)]
        names = seeds if len(set(seeds)) == len(seeds) else range(len(images))
        paths = [out.with_name(f"{out.stem}-{name}{out.suffix}") for name in names]
    for image, path in zip(images, paths, strict=True):
        content = encoded(image, path.suffix)
        write_atomically(path, lambda file, content=content: file.write(content))
    return paths


def encoded(image: Image.Image, suffix: str = ".png") -> bytes:
    """Return an image as the bytes of a file.

    Raises:
        ConfigError: a format that holds no text.
    """
    text = image.info.get(PARAMETERS, "")
    more: dict[str, Any] = {}
    plain = Image.fromarray(np.asarray(image))  # without `info`, parts of which Pillow would write
    if suffix.lower() == ".png":
        chunks = PngImagePlugin.PngInfo()
        if text:
            chunks.add_text(PARAMETERS, text)  # tEXt for Latin letters, else iTXt, as the web UI does
        if fields_of_record := _record_in(image.info):
            chunks.add_text(JSON, json.dumps(fields_of_record, sort_keys=True))
        format, more = "PNG", {"pnginfo": chunks}
    elif suffix.lower() in (".jpg", ".jpeg", ".webp"):
        exif = Image.Exif()
        exif.get_ifd(_EXIF)[_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be", "surrogatepass")
        format, block = "WEBP" if suffix.lower() == ".webp" else "JPEG", exif.tobytes()
        if format == "JPEG" and len(block) > _JPEG_HOLDS:
            log.warning("the metadata are longer than a JPEG can hold and are left out; .png keeps them")
            block = b""
        more = {"exif": block, "quality": 95}
    else:
        raise ConfigError(
            f"images are written as .png, .jpg or .webp, not as {suffix or 'a file without suffix'}"
        )
    file = io.BytesIO()
    plain.save(file, format=format, **more)
    return file.getvalue()


def model_hash(source: str) -> str:
    """Return the web UI's hash of a checkpoint file, or "" if it is no file.

    It is the start of the SHA-256 (10 digits) of a file below 256 MB; of a larger one, which would take seconds, the
    older hash of 64 KB in it (8 digits).
    """
    path = Path(source)
    if not source or not path.is_file():
        return ""
    with path.open("rb") as file:
        if path.stat().st_size < 2**28:
            return hashlib.file_digest(file, "sha256").hexdigest()[:10]
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


# Reading


@dataclass(frozen=True)
class ImageSettings:
    """The settings in an image's file."""

    record: GenerationRecord
    source: str
    """The program that wrote them, with its version where the file names it."""
    notes: tuple[str, ...] = ()
    """What cannot be reproduced, a line each."""
    model: str = ""
    """The checkpoint that another program names, which is no file here."""

    def log_notes(self, name: str) -> None:
        """Log a line for each note.

        Args:
            name: name of the image.
        """
        for note in self.notes:
            log.warning("%s (%s): %s", name, self.source, note)


def read(image: ImageInput) -> GenerationRecord:
    """Return the record in an image's file: ours, else one from another program's metadata (`foreign_metadata`). What
    cannot be reproduced is logged, a line each.

    Args:
        image: a path, the bytes of a file, or a PIL image with its `info`.

    Raises:
        DataError: there is no such file, it is no image, or it has no metadata.
    """
    settings = read_settings(image)
    settings.log_notes(name_of(image))
    return settings.record


def read_settings(image: ImageInput) -> ImageSettings:
    """Return the record in an image's file with the program that wrote it; arguments and exceptions as for `read`."""
    name, texts = name_of(image), image_texts(image)
    if isinstance(image, Image.Image) and (values := _record_in(image.info)):
        return ImageSettings(from_json(GenerationRecord, values), str(values["software"]))
    if JSON in texts:
        try:
            record = from_json(GenerationRecord, json.loads(texts[JSON]))
            return ImageSettings(record, record.software)
        except (ValueError, RecursionError) as problem:  # a TriptychError too: of another version, or edited
            log.warning("%s: its JSON cannot be read (%s); reading the text instead", name, problem)
    settings = foreign_metadata.read_foreign_settings(texts)
    if settings is None:
        raise DataError(
            f"{name} has no generation metadata; give an image written by `triptych generate`, or by "
            f"{', '.join(dialect.name for dialect in foreign_metadata.DIALECTS)}"
        )
    return ImageSettings(settings.record(), settings.source, tuple(settings.notes), settings.model)


def parse_parameters(text: str, name: str = "the text") -> GenerationRecord:
    """Return the record of another program's text, such as AUTOMATIC1111's parameters or SwarmUI's JSON; text without
    parameters is a prompt. What cannot be reproduced is logged, a line each.

    Args:
        name: name of the text in the log.
    """
    settings = foreign_metadata.read_foreign_settings({PARAMETERS: text}) or a1111.read({PARAMETERS: text})
    for note in settings.notes:
        log.warning("%s (%s): %s", name, settings.source, note)
    return settings.record()


def _record_in(info: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the fields of a `GenerationRecord` in an image's info; an empty dict if any is missing."""
    names = [field.name for field in fields(GenerationRecord)]
    return {name: info[name] for name in names} if all(name in info for name in names) else {}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,\n:]", text) else text


def _slug(image: Image.Image) -> str:
    """A file's name: the first words of the prompt or the class, and the seed."""
    text = str(image.info.get(PARAMETERS, "")).split("\nSteps:")[0]
    text = re.sub(r"<lora:[^<>]*>", "", text.split("\nNegative prompt:")[0])
    plain = re.sub(r"[^\w]+", "-", text.lower()).strip("-")[:40].strip("-")
    return f"{plain or 'image'}-{image.info.get('seed', 0)}"
