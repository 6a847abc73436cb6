"""Generation metadata of other programs, each in its own dialect.

A dialect is a module with two functions of an image's texts by name: `recognizes` and `read`, which returns
`ForeignSettings`. The first that recognizes the texts reads them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from triptych.pipelines.diffusion.foreign_metadata import (
    a1111,
    civitai,
    comfyui,
    draw_things,
    easy_diffusion,
    fooocus,
    invokeai,
    midjourney,
    novelai,
    plain_json,
    swarmui,
)
from triptych.pipelines.diffusion.foreign_metadata.settings import ForeignSettings, json_object

Texts = Mapping[str, str]


@dataclass(frozen=True)
class Dialect:
    """How one program writes its settings."""

    name: str
    recognizes: Callable[[Texts], bool]
    read: Callable[[Texts], ForeignSettings]


# The more specific first: many programs also write the web UI's text or hold a graph of ComfyUI.
DIALECTS = (
    Dialect("SwarmUI", swarmui.recognizes, swarmui.read),
    Dialect("Fooocus", fooocus.recognizes, fooocus.read),
    Dialect("Civitai", civitai.recognizes, civitai.read),
    Dialect("InvokeAI", invokeai.recognizes, invokeai.read),
    Dialect("NovelAI", novelai.recognizes, novelai.read),
    Dialect("Draw Things", draw_things.recognizes, draw_things.read),
    Dialect("Easy Diffusion", easy_diffusion.recognizes, easy_diffusion.read),
    Dialect("Midjourney", midjourney.recognizes, midjourney.read),
    Dialect("AUTOMATIC1111's web UI", a1111.recognizes, a1111.read),
    Dialect("ComfyUI", comfyui.recognizes, comfyui.read),
)


def read_foreign_settings(texts: Texts) -> ForeignSettings | None:
    """Return the settings in an image's texts; None if no dialect recognizes them.

    A text called `parameters` that is no JSON is a prompt.
    """
    for dialect in DIALECTS:
        if dialect.recognizes(texts):
            return dialect.read(texts)
    for text in texts.values():  # other programs' names for the web UI's text: Comment, Description
        if a1111.recognizes({"parameters": text}):
            return a1111.read({"parameters": text})
    if plain_json.recognizes(texts):
        return plain_json.read(texts)
    text = texts.get("parameters", "").strip()
    return a1111.read(texts) if text and json_object(text) is None and text[0] not in "{[" else None
