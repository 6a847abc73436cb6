"""What made a picture, inside its file: AUTOMATIC1111's `parameters` text for other programs, JSON for this one.

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
from triptych.errors import UserError
from triptych.pipelines.diffusion.settings import SEEDS, Settings
from triptych.pipelines.image_input import Picture, name_of

log = logging.getLogger(__name__)

PARAMETERS, JSON = "parameters", "triptych"  # names of the chunks

# Our samplers and spacings -> the web UI's. Its schedules go by sigma / alpha; those named here are the same levels but
# for rounding.
SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "plms": "PLMS",
    "euler": "Euler",
    "euler-ancestral": "Euler a",
    "heun": "Heun",
    "dpm++2m": "DPM++ 2M",
    "dpm++2m-sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}
SCHEDULES = {
    "uniform": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "multistep": "SGM Uniform",
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
# A name's length is bounded: on a long line without a colon each letter would else be looked at from each before it.
_PAIR = re.compile(r'(\w[\w \-/]{1,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
# Parameters of the web UI that change no pixel, or that stand in another place already.
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


def parameters(settings: Settings) -> str:
    """The text that AUTOMATIC1111's web UI writes and reads. Noise is drawn as it does with "RNG: CPU"."""
    height, width = settings.size or (0, 0)
    start_from_picture = settings.task in ("image_to_image", "inpaint")
    loras = {Path(path).stem: weight for path, weight in settings.loras.items()}
    known = {
        "Steps": settings.steps,
        "Sampler": SAMPLERS[settings.sampler],
        "Schedule type": SCHEDULES.get(settings.spacing or ""),
        "CFG scale": f"{1.0 if settings.guidance is None else settings.guidance:g}",
        "Seed": settings.seed,
        "Size": f"{width}x{height}",
        "Model hash": settings.model_hash or None,
        "Model": Path(settings.model).stem if settings.model else None,
        "Denoising strength": f"{settings.strength:g}" if start_from_picture else None,
        "RNG": "CPU",
        "Tiling": "True" if settings.tiling else None,
        "Token merging ratio": f"{settings.merge_tokens:g}" if settings.merge_tokens else None,
        "Lora hashes": ", ".join(f"{name}: {_lora_hash(settings, name)}" for name in loras) or None,
        "Version": settings.made_by or None,
    }
    pairs = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in known.items() if value is not None)
    prompt = settings.prompt if settings.label is None else settings.class_name or f"class {settings.label}"
    prompt = " ".join([prompt, *(f"<lora:{name}:{weight:g}>" for name, weight in loras.items())]).strip()
    negative = f"\nNegative prompt: {settings.negative}" if settings.negative else ""
    return f"{prompt}{negative}\n{pairs}".strip()


def _lora_hash(settings: Settings, name: str) -> str:
    return settings.hashes.get(f"LoRA {name}", "")


def save(images: Sequence[Image.Image], out: str | os.PathLike[str]) -> list[Path]:
    """Write pictures, each whole or not at all, with what made it inside.

    PNG holds both chunks; JPEG and WebP the text alone, in EXIF's UserComment. What is too long for a JPEG (some
    32,000 letters) is left out of it, and a warning says so.

    Args:
        images: of a `DiffusionPipeline`.
        out: a file (.png, .jpg, .webp), to which the seeds are added if there are several pictures; or a folder, whose
            files are numbered on from those that are there.

    Raises:
        UserError: another suffix, or a place that cannot be written.
    """
    out = Path(out)
    if not out.suffix or out.is_dir():
        last = [int(m[1]) for path in out.glob("*") if (m := re.match(r"(\d{4,9})-", path.name))]
        start = max(last, default=0) + 1
        paths = [out / f"{start + i:04d}-{_slug(one)}.png" for i, one in enumerate(images)]
    elif len(images) == 1:
        paths = [out]
    else:
        seeds = [one.info.get("seed", i) for i, one in enumerate(images)]
        names = seeds if len(set(seeds)) == len(seeds) else range(len(images))
        paths = [out.with_name(f"{out.stem}-{name}{out.suffix}") for name in names]
    for image, path in zip(images, paths, strict=True):
        content = encoded(image, path.suffix)
        write_atomically(path, lambda file, content=content: file.write(content))
    return paths


def encoded(image: Image.Image, suffix: str = ".png") -> bytes:
    """The bytes of a picture's file.

    Raises:
        UserError: a suffix of no format that keeps text.
    """
    text = image.info.get(PARAMETERS, "")
    more: dict[str, Any] = {}
    plain = Image.fromarray(np.asarray(image))  # without `info`, some of which Pillow would take for its own
    if suffix.lower() == ".png":
        chunks = PngImagePlugin.PngInfo()
        if text:
            chunks.add_text(
                PARAMETERS, text
            )  # tEXt where the letters are Latin, else iTXt, as the web UI does
        if known := _settings_in(image.info):
            chunks.add_text(JSON, json.dumps(known, sort_keys=True))
        kind, more = "PNG", {"pnginfo": chunks}
    elif suffix.lower() in (".jpg", ".jpeg", ".webp"):
        exif = Image.Exif()
        exif.get_ifd(_EXIF)[_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be", "surrogatepass")
        kind, block = "WEBP" if suffix.lower() == ".webp" else "JPEG", exif.tobytes()
        if kind == "JPEG" and len(block) > _JPEG_HOLDS:
            log.warning(
                "the text of what made it is longer than a JPEG can hold and is left out; .png keeps it"
            )
            block = b""
        more = {"exif": block, "quality": 95}
    else:
        raise UserError(
            f"pictures are written as .png, .jpg or .webp, not as {suffix or 'a file without suffix'}"
        )
    file = io.BytesIO()
    plain.save(file, format=kind, **more)
    return file.getvalue()


def model_hash(source: str) -> str:
    """The web UI's name of a checkpoint's file: the start of its SHA-256 (10 digits) for a file below 256 MB; for a
    larger one, which would take seconds, the older hash of 64 KB in it (8 digits). "" for what is no file."""
    path = Path(source)
    if not source or not path.is_file():
        return ""
    with path.open("rb") as file:
        if path.stat().st_size < 2**28:
            return hashlib.file_digest(file, "sha256").hexdigest()[:10]
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


# Reading


def read(image: Picture) -> Settings:
    """The settings in a picture's file: ours if there are any, else those of AUTOMATIC1111's text.

    Args:
        image: a path, the bytes of a file, or a PIL image with its `info`.

    Raises:
        UserError: no such file, no picture, or it says nothing of how it was made.
    """
    name, found = name_of(image), dict(_texts(image))
    if isinstance(image, Image.Image) and (known := _settings_in(image.info)):
        return from_json(Settings, known)
    if JSON in found:
        try:
            return from_json(Settings, json.loads(found[JSON]))
        except (ValueError, RecursionError) as problem:  # a UserError too: of a later version, or edited
            log.warning("%s: its settings cannot be read (%s); taking the text beside them", name, problem)
    if not found.get(PARAMETERS, "").strip():
        other = "; it holds a ComfyUI workflow, which is another thing" if "workflow" in found else ""
        raise UserError(
            f"{name} says nothing of how it was made{other}; give a picture written by `triptych generate`"
        )
    return parse(found[PARAMETERS], name)


def parse(text: str, name: str = "the text") -> Settings:
    """Settings of AUTOMATIC1111's text, as far as they are understood; what is left out is logged in a line.

    The last line is parameters if it has three at least; the negative prompt is what follows its heading.
    """
    *lines, last = text.replace("\r\n", "\n").strip().split("\n")
    pairs = _PAIR.findall(last)
    if len(pairs) < 3:
        lines, pairs = [*lines, last], []
    parts: dict[bool, list[str]] = {False: [], True: []}
    negative = False
    for line in lines:
        line = line.strip()
        if line.startswith("Negative prompt:"):
            negative, line = True, line.removeprefix("Negative prompt:").strip()
        parts[negative].append(line)
    given = {key.strip().lower(): _unquoted(value.strip()) for key, value in pairs}
    known: dict[str, Any] = {"prompt": "\n".join(parts[False]), "negative": "\n".join(parts[True])}
    left = [f"{key}: {value}" for key, value in given.items() if key not in _READ and key not in _IDLE]
    for key, understand in _READ.items():
        if key in given:
            try:
                known |= understand(given[key])
            except (ValueError, OverflowError):
                left.append(f"{key}: {given[key]}")
    if left:
        shown = ", ".join(left)
        log.warning("%s: left out: %s", name, shown if len(shown) < 300 else shown[:297] + "...")
    return Settings(**known)


def _texts(image: Picture) -> Mapping[str, str]:
    """The words in a picture's file, by name."""
    name = name_of(image)
    if not isinstance(image, Image.Image | str | os.PathLike | bytes):
        raise UserError("an array says nothing of how it was made; give a picture's file")
    with image_errors(name):
        opened = image if isinstance(image, Image.Image) else open_image(image, name)
        words = {str(key): value for key, value in opened.info.items() if isinstance(value, str)}
        if PARAMETERS not in words and opened.format != "PNG":
            comment = opened.getexif().get_ifd(_EXIF).get(_COMMENT)
            if comment:
                words[PARAMETERS] = _comment(comment)
    return words


def _comment(comment: bytes | str) -> str:
    """EXIF's UserComment: eight bytes that name the letters, then the letters."""
    if isinstance(comment, str):
        return comment
    kind, letters = comment[:8], comment[8:]
    if kind == b"UNICODE\0":
        # In the file's own byte order, says the norm; most write big-endian. The wrong one gives Chinese.
        both = [letters.decode(f"utf-16-{order}", "replace") for order in ("be", "le")]
        return max(both, key=lambda words: sum(letter < "\u0250" for letter in words))
    return (
        (letters if kind in (b"ASCII\0\0\0", b"\0" * 8) else comment).decode("utf-8", "replace").strip("\0")
    )


def _settings_in(info: Mapping[Any, Any]) -> dict[str, Any]:
    """Of a picture's info what is `Settings`; nothing if they are not all there."""
    names = [field.name for field in fields(Settings)]
    return {name: info[name] for name in names} if all(name in info for name in names) else {}


def _sampler(words: str) -> dict[str, Any]:
    """ "DPM++ 2M Karras" -> the sampler, and older versions' schedule behind its name."""
    plain, more = words.strip().lower(), {}
    for spacing in ("karras", "exponential"):
        if plain.endswith(" " + spacing):
            plain, more = plain.removesuffix(spacing).strip(), {"spacing": spacing}
    names = (
        {title.lower(): name for name, title in SAMPLERS.items()}
        | {name: name for name in SAMPLERS}
        | ALIASES
    )
    if plain not in names:
        log.warning("the sampler %r is unknown here; %s stands in", words, Settings().sampler)
        return more
    return {"sampler": names[plain]} | more


def _schedule(words: str) -> dict[str, Any]:
    if words.lower() == "automatic":
        return {}
    names = {title.lower(): spacing for spacing, title in SCHEDULES.items()}
    if words.lower() not in names:
        raise ValueError(words)
    return {"spacing": names[words.lower()]}


def _size(words: str) -> dict[str, Any]:
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", words)
    if not found or not int(found[1]) or not int(found[2]):
        raise ValueError(words)
    return {"size": (int(found[2]), int(found[1]))}


def _number(name: str, low: float, high: float, kind: type = float) -> Callable[[str], dict[str, Any]]:
    def understand(words: str) -> dict[str, Any]:
        value = kind(words)
        if not math.isfinite(value) or not low <= value <= high:
            raise ValueError(words)
        return {name: value}

    return understand


def _tiling(words: str) -> dict[str, Any]:
    return {"tiling": "xy" if words.lower() == "true" else ""}


# The order counts: a schedule by its own name is later than one behind the sampler's.
_READ: dict[str, Callable[[str], dict[str, Any]]] = {
    "steps": _number("steps", 1, 10**6, int),
    "sampler": _sampler,
    "schedule type": _schedule,
    "cfg scale": _number("guidance", -1e6, 1e6),
    "seed": _number("seed", 0, SEEDS - 1, int),
    "size": _size,
    "denoising strength": _number("strength", 0, 1),
    "tiling": _tiling,
    "token merging ratio": _number("merge_tokens", 0, 0.75),
}


def _quoted(words: str) -> str:
    return json.dumps(words, ensure_ascii=False) if re.search(r"[,\n:]", words) else words


def _unquoted(words: str) -> str:
    if len(words) > 1 and words[0] == words[-1] == '"':
        try:
            return str(json.loads(words))
        except ValueError:
            return words
    return words


def _slug(image: Image.Image) -> str:
    """A file's name: the first words of the prompt or the class, and the seed."""
    words = str(image.info.get(PARAMETERS, "")).split("\nSteps:")[0]
    words = re.sub(r"<lora:[^<>]*>", "", words.split("\nNegative prompt:")[0])
    plain = re.sub(r"[^\w]+", "-", words.lower()).strip("-")[:40].strip("-")
    return f"{plain or 'picture'}-{image.info.get('seed', 0)}"
