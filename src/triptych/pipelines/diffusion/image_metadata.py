"""Metadata in an image's file: AUTOMATIC1111's `parameters` text for other programs, and a `GenerationRecord` as JSON.

a red apple
Negative prompt: blurry
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model hash: 6ce0161689, Model: sd-v1-5
"""

import hashlib
import io
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from triptych.atomic_write import write_atomically
from triptych.config import from_json
from triptych.data.images import image_errors, open_image
from triptych.diffusion.config import NUM_SEEDS
from triptych.errors import ConfigError, DataError
from triptych.pipelines.diffusion.options import GenerationRecord
from triptych.pipelines.image_input import ImageInput, name_of

log = logging.getLogger(__name__)

PARAMETERS, JSON = "parameters", "triptych"  # names of the PNG chunks

# Our samplers and schedules -> the web UI's. Its schedules are in sigma / alpha; these are the same levels up to
# rounding.
SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "plms": "PLMS",
    "euler": "Euler",
    "euler-ancestral": "Euler a",
    "heun": "Heun",
    "lms": "LMS",
    "dpm2": "DPM2",
    "dpm2-ancestral": "DPM2 a",
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
    "trailing": "Simple",
    "linspace": "Normal",
    "leading": "DDIM",
}
# Further names that other programs and older versions write.
ALIASES = {
    "k_euler": "euler",
    "k_euler_a": "euler-ancestral",
    "k_euler_ancestral": "euler-ancestral",
    "euler_ancestral": "euler-ancestral",
    "k_heun": "heun",
    "k_dpmpp_2m": "dpm++2m",
    "dpmpp_2m": "dpm++2m",
    "dpmpp2m": "dpm++2m",
    "dpmpp_2m_sde": "dpm++2m-sde",
    "pndm": "plms",
}
# One of `Name: value, Name: "value, with a comma", ...`
# A name's length is bounded: matching would else take quadratic time on a long line without a colon.
_PAIR = re.compile(r'(\w[\w \-/]{1,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
# Parameters of the web UI that change no pixel, or that another field already holds.
_IDLE = {
    "model",
    "model hash",
    "vae",
    "vae hash",
    "version",
    "rng",
    "lora hashes",
    "ti hashes",
    "hashes",
    "user",
}
_EXIF, _COMMENT = 0x8769, 0x9286  # the EXIF block, and its UserComment
_JPEG_HOLDS = 2**16 - 3  # bytes of one block


# Writing


def parameters(record: GenerationRecord) -> str:
    """Return the text that AUTOMATIC1111's web UI writes and reads. Noise is drawn as it does with "RNG: CPU"."""
    height, width = record.size or (0, 0)
    denoises = record.task in ("image_to_image", "inpaint") and record.strength is not None
    loras = {Path(path).stem: weight for path, weight in record.loras.items()}
    known = {
        "Steps": record.num_steps,
        "Sampler": SAMPLERS[record.sampler],
        "Schedule type": SCHEDULES.get(record.schedule or ""),
        "CFG scale": f"{1.0 if record.guidance_scale is None else record.guidance_scale:g}",
        "Seed": record.seed,
        "Size": f"{width}x{height}",
        "Model hash": record.model_hash or None,
        "Model": Path(record.model).stem if record.model else None,
        "Denoising strength": f"{record.strength:g}" if denoises else None,
        "RNG": "CPU",
        "Tiling": "True" if record.tiling else None,
        "Token merging ratio": f"{record.merge_tokens:g}" if record.merge_tokens else None,
        "Lora hashes": ", ".join(f"{name}: {_lora_hash(record, name)}" for name in loras) or None,
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


def read(image: ImageInput) -> GenerationRecord:
    """Return the record in an image's file: the stored one, else one parsed from AUTOMATIC1111's text.

    Args:
        image: a path, the bytes of a file, or a PIL image with its `info`.

    Raises:
        DataError: there is no such file, it is no image, or it has no metadata.
    """
    name, texts = name_of(image), dict(_texts(image))
    if isinstance(image, Image.Image) and (values := _record_in(image.info)):
        return from_json(GenerationRecord, values)
    if JSON in texts:
        try:
            return from_json(GenerationRecord, json.loads(texts[JSON]))
        except (
            ValueError,
            RecursionError,
        ) as problem:  # also a TriptychError, for a record of another version or an edited one
            log.warning("%s: its JSON cannot be read (%s); reading the text instead", name, problem)
    if not texts.get(PARAMETERS, "").strip():
        other = "; it holds a ComfyUI workflow, which cannot be read" if "workflow" in texts else ""
        raise DataError(
            f"{name} has no generation metadata{other}; give an image written by `triptych generate`"
        )
    return parse_parameters(texts[PARAMETERS], name)


def parse_parameters(text: str, name: str = "the text") -> GenerationRecord:
    """Return the record of AUTOMATIC1111's text; parameters that are not understood are logged in one line.

    The last line holds parameters if it has at least three; the negative prompt follows its heading.

    Args:
        name: name of the text in the log.
    """
    *lines, last = text.replace("\r\n", "\n").strip().split("\n")
    pairs = _PAIR.findall(last)
    if len(pairs) < 3:
        lines, pairs = [*lines, last], []
    prompts: dict[bool, list[str]] = {False: [], True: []}
    negative = False
    for line in lines:
        line = line.strip()
        if line.startswith("Negative prompt:"):
            negative, line = True, line.removeprefix("Negative prompt:").strip()
        prompts[negative].append(line)
    values = {key.strip().lower(): _unquoted(value.strip()) for key, value in pairs}
    record: dict[str, Any] = {
        "prompt": "\n".join(prompts[False]),
        "negative_prompt": "\n".join(prompts[True]),
    }
    ignored = [f"{key}: {value}" for key, value in values.items() if key not in _READ and key not in _IDLE]
    for key, convert in _READ.items():
        if key in values:
            try:
                record |= convert(values[key])
            except (ValueError, OverflowError):
                ignored.append(f"{key}: {values[key]}")
    if ignored:
        listed = ", ".join(ignored)
        log.warning("%s: ignored: %s", name, listed if len(listed) < 300 else listed[:297] + "...")
    return GenerationRecord(**record)


def _texts(image: ImageInput) -> Mapping[str, str]:
    """Return the text chunks of an image's file, by name."""
    name = name_of(image)
    if not isinstance(image, Image.Image | str | os.PathLike | bytes):
        raise DataError("an array has no generation metadata; give an image file")
    with image_errors(name):
        opened = image if isinstance(image, Image.Image) else open_image(image, name)
        texts = {str(key): value for key, value in opened.info.items() if isinstance(value, str)}
        if PARAMETERS not in texts and opened.format != "PNG":
            comment = opened.getexif().get_ifd(_EXIF).get(_COMMENT)
            if comment:
                texts[PARAMETERS] = _comment(comment)
    return texts


def _comment(comment: bytes | str) -> str:
    """Decode EXIF's UserComment: eight bytes that name the encoding, then the text."""
    if isinstance(comment, str):
        return comment
    encoding, text = comment[:8], comment[8:]
    if encoding == b"UNICODE\0":
        # The standard asks for the file's byte order; most write big-endian. The wrong one gives Chinese.
        both = [text.decode(f"utf-16-{order}", "replace") for order in ("be", "le")]
        return max(both, key=lambda decoded: sum(letter < "\u0250" for letter in decoded))
    known = encoding in (b"ASCII\0\0\0", b"\0" * 8)
    return (text if known else comment).decode("utf-8", "replace").strip("\0")


def _record_in(info: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the fields of a `GenerationRecord` in an image's info; an empty dict if any is missing."""
    names = [field.name for field in fields(GenerationRecord)]
    return {name: info[name] for name in names} if all(name in info for name in names) else {}


def _sampler(text: str) -> dict[str, Any]:
    """ "DPM++ 2M Karras" -> the sampler, and the schedule that older versions append to its name."""
    title, schedule = text.strip().lower(), {}
    for name in ("karras", "exponential"):
        if title.endswith(" " + name):
            title, schedule = title.removesuffix(name).strip(), {"schedule": name}
    names = (
        {title.lower(): name for name, title in SAMPLERS.items()}
        | {name: name for name in SAMPLERS}
        | ALIASES
    )
    if title not in names:
        log.warning("the sampler %r is unknown here; using %s", text, GenerationRecord().sampler)
        return schedule
    return {"sampler": names[title]} | schedule


def _schedule(text: str) -> dict[str, Any]:
    if text.lower() == "automatic":
        return {}
    names = {title.lower(): name for name, title in SCHEDULES.items()}
    if text.lower() not in names:
        raise ValueError(text)
    return {"schedule": names[text.lower()]}


def _size(text: str) -> dict[str, Any]:
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    if not match or not int(match[1]) or not int(match[2]):
        raise ValueError(text)
    return {"height": int(match[2]), "width": int(match[1])}


def _number(name: str, low: float, high: float, type: type = float) -> Callable[[str], dict[str, Any]]:
    def convert(text: str) -> dict[str, Any]:
        value = type(text)
        if not math.isfinite(value) or not low <= value <= high:
            raise ValueError(text)
        return {name: value}

    return convert


def _tiling(text: str) -> dict[str, Any]:
    return {"tiling": "xy" if text.lower() == "true" else ""}


# In this order: a schedule's own parameter comes after one in the sampler's name.
_READ: dict[str, Callable[[str], dict[str, Any]]] = {
    "steps": _number("num_steps", 1, 10**6, int),
    "sampler": _sampler,
    "schedule type": _schedule,
    "cfg scale": _number("guidance_scale", -1e6, 1e6),
    "seed": _number("seed", 0, NUM_SEEDS - 1, int),
    "size": _size,
    "denoising strength": _number("strength", 0, 1),
    "tiling": _tiling,
    "token merging ratio": _number("merge_tokens", 0, 0.75),
}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,\n:]", text) else text


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text))
        except ValueError:
            return text
    return text


def _slug(image: Image.Image) -> str:
    """A file's name: the first words of the prompt or the class, and the seed."""
    text = str(image.info.get(PARAMETERS, "")).split("\nSteps:")[0]
    text = re.sub(r"<lora:[^<>]*>", "", text.split("\nNegative prompt:")[0])
    plain = re.sub(r"[^\w]+", "-", text.lower()).strip("-")[:40].strip("-")
    return f"{plain or 'image'}-{image.info.get('seed', 0)}"
