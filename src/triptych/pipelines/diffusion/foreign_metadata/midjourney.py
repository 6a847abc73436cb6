"""Midjourney: the prompt with its options in `Description`, and the number of the job.

a red fox in snow --ar 3:2 --no dog --v 5.2 Job ID: 1b2c3d4e-aaaa-bbbb-cccc-1234567890ab
"""

import re
from collections.abc import Mapping

from triptych.pipelines.diffusion.foreign_metadata.settings import ForeignSettings

_JOB = re.compile(r"\s*Job ID:\s*([0-9a-f]{8}-[0-9a-f-]{20,30})\s*$")
_OPTION = re.compile(r"(?:^|\s)--([a-z]+)(?:\s+((?:(?!\s--)[^\n]){1,200}))?")


def recognizes(texts: Mapping[str, str]) -> bool:
    return any(_JOB.search(texts.get(key, "")) for key in ("Description", "ImageDescription"))


def read(texts: Mapping[str, str]) -> ForeignSettings:
    settings = ForeignSettings("Midjourney")
    text = next(texts[key] for key in ("Description", "ImageDescription") if _JOB.search(texts.get(key, "")))
    text = _JOB.sub("", text)
    options = list(_OPTION.finditer(text))
    prompt = text[: options[0].start()] if options else text
    negative = next(((option[2] or "").strip() for option in options if option[1] == "no"), "")
    settings.set_texts(prompt.strip(), negative)
    settings.note("made by Midjourney, whose model has no file: only the prompt is read")
    for option in options:
        if option[1] == "seed":
            settings.set_seed((option[2] or "").strip())
        elif option[1] != "no":
            settings.leave_out(f"--{option[1]}", (option[2] or "").strip())
    return settings
