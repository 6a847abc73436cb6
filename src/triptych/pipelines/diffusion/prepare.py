"""From settings, prompts and pictures to what the loop over a sampler needs: all that the tasks differ in."""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from triptych.diffusion.config import usual_spacing
from triptych.diffusion.noise import seeded_noise
from triptych.diffusion.process import Process
from triptych.diffusion.schedule import Levels, from_strength, spaced_levels
from triptych.errors import UserError
from triptych.models.configs.dit import DiTConfig
from triptych.models.configs.image_tokens import ImageTokensConfig
from triptych.models.configs.latent_diffusion import Beside, LatentDiffusionConfig
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.spatial_conditions import box_tokens
from triptych.pipelines.diffusion.canvas import Canvas, canvas, class_map, depth_map, digest, grey
from triptych.pipelines.diffusion.latent_codec import Rendering
from triptych.pipelines.diffusion.settings import Settings, Task
from triptych.pipelines.image_input import Picture, name_of

log = logging.getLogger(__name__)

# What a model is shown beside its latents -> what that makes it, and its tasks.
KINDS: dict[Beside, tuple[str, tuple[Task, ...]]] = {
    "nothing": (
        "shown nothing beside its latents",
        ("text_to_image", "image_to_image", "inpaint", "unconditional", "class_conditional", "layout"),
    ),
    "mask+masked": ("made to inpaint", ("inpaint",)),
    "masked+mask": ("made to inpaint", ("inpaint",)),
    "depth": ("shown a depth map", ("text_to_image", "image_to_image")),
    "image": ("made to upscale", ("upscale",)),
    "map": ("shown a map of classes", ("semantic",)),
}
GUIDANCE = {"prompts": 7.5, "classes": 1.5, "boxes": 1.0, "nothing": 1.0}
UPSCALING = 9.0
FLAGS = {"image": "--init", "mask": "--mask", "depth": "--depth", "map": "--map"}
LARGE = 6  # times the area that a model was trained on, from which one is told


@dataclass(frozen=True, kw_only=True)
class Job:
    """Pictures that differ in seed, and in class or prompt, alone."""

    each: Sequence[Settings]
    """Complete."""
    levels: Levels
    shape: tuple[int, int, int]
    """Of a picture's latents."""
    positive: Float[Tensor, "n l d"] | None = None
    """The context of the one prompt, or of each picture's class or prompt."""
    negative: Float[Tensor, "1 l d"] | None = None
    """What to be guided away from; none is no guidance."""
    canvas: Canvas | None = None
    known: Float[Tensor, "1 c h w"] | None = None
    """Latents to start from, or to keep."""
    cells: Float[Tensor, "1 1 h w"] | None = None
    """1 where to paint, for a network that cannot be shown it."""
    beside: Callable[[Sequence[int]], Tensor] | None = None
    """What is laid beside the latents, by the pictures' seeds."""
    labels: Sequence[int] | None = None
    """The network's label: one for all, or each picture's class."""
    no_label: int | None = None
    """The label of no class, to be guided away from; none is no guidance."""
    start: Float[Tensor, "n c h w"] | None = None
    """The noise to start from, if it was given."""

    @property
    def fresh(self) -> bool:
        """Whether sampling starts from noise alone."""
        settings = self.each[0]
        return self.known is None or (settings.task == "inpaint" and settings.strength == 1)


def reads(config: LatentDiffusionConfig) -> Literal["prompts", "classes", "boxes", "pictures", "nothing"]:
    """What tells a model what to paint."""
    if config.classes is not None:
        return "classes"
    if config.text is None:
        return "nothing"
    if isinstance(config.text, ImageTokensConfig):
        return "pictures"
    return "boxes" if getattr(config.text, "boxes", False) else "prompts"


def check_task(config: LatentDiffusionConfig, settings: Settings, name: str) -> None:
    """Raises a `UserError` if the model called `name` is not made for the task, or a prompt is given to one that
    reads none."""
    task, kind = settings.task, reads(config)
    if kind == "pictures":
        raise UserError(
            f"{name} is shown a picture to be like, for which there is no task here: take the context of "
            "ldm.text(images), ldm.denoiser(context) and a sampler"
        )
    if kind == "prompts" and task in ("unconditional", "class_conditional"):
        raise UserError(
            f"{name} reads prompts: give one to text_to_image, or PROMPT on the command line ('' is allowed)"
        )
    if kind == "classes" and (task != "class_conditional" or settings.prompt):
        raise UserError(
            f"{name} takes a class, not a prompt: use class_conditional, or --class NAME-or-NUMBER"
        )
    if kind == "boxes" and (task != "layout" or settings.prompt or settings.negative):
        raise UserError(f"{name} takes boxes, not a prompt: use layout, or --box CLASS:LEFT,TOP,RIGHT,BOTTOM")
    if task == "layout" and kind != "boxes":
        raise UserError(f"{name} takes no boxes; leave them out")
    prompted = settings.prompt or settings.negative or task in ("text_to_image", "class_conditional")
    if kind == "nothing" and prompted:
        raise UserError(
            f"{name} takes neither prompt nor class: use unconditional, or leave PROMPT and --class out"
        )
    if settings.tiling and isinstance(config.unet, DiTConfig):
        raise UserError(f"{name} has a DiT, whose edges cannot be joined as a UNet's can; leave tiling out")
    what, tasks = KINDS[config.beside]
    if task not in tasks:
        raise UserError(f"{name} is {what}: it does {', '.join(tasks)}, and not {task}")


def prepare(
    net: LatentDiffusion,
    rendering: Rendering,
    encode: Callable[[tuple[str, ...]], Tensor],
    each: Sequence[Settings],
    given: Mapping[str, Picture | None],
    latents: Tensor | None,
) -> Job:
    """The job of settings that differ in seed, and in class or prompt, alone.

    Prompts that differ have the same number of chunks (`TextEncoder.chunks`): the contexts of shorter ones would be
    filled up, and a picture depend on what is painted beside it.

    Args:
        net, rendering: on one device.
        encode: prompts to their contexts (prompts, l, d).
        given: "image", "mask", "depth", "map"; what is missing is read from where the settings say.
        latents: the noise to start from, (1 or pictures, c, h, w).

    Raises:
        UserError: settings and model do not go together, or a picture is missing, cannot be read or is one that the
            task does not look at.
    """
    config, first = net.config, each[0]
    if "latents" in first.hashes and latents is None:
        raise UserError(
            "it was made from latents that were given, which are not in its file; give them again"
        )
    roles = _roles(config, first.task)
    if unread := [role for role, one in given.items() if one is not None and role not in roles]:
        role = unread[0]
        raise UserError(f"{first.task} of this model looks at no {role}; leave {role} ({FLAGS[role]}) out")
    spacing = first.spacing or usual_spacing(first.sampler, config.process)
    levels = spaced_levels(net.process, first.steps, spacing)
    if first.task in ("image_to_image", "inpaint"):
        levels = from_strength(levels, first.strength)
    guidance = _guidance(net, first)
    contexts = _contexts(net, encode, each, guidance)
    pictures = {role: _picture(role, first, given) for role in roles}
    shown = _shown(net, rendering, first, pictures, latents)
    rows, columns = shown["shape"][1:]
    inputs = {role: name_of(one) for role, one in pictures.items() if isinstance(one, str | os.PathLike)}
    facts: dict[str, Any] = {
        "guidance": guidance,
        "spacing": spacing,
        "size": (rows * rendering.factor, columns * rendering.factor),
        "inputs": inputs,
        "hashes": shown.pop("hashes"),
    }
    return Job(each=[replace(one, **facts) for one in each], levels=levels, **contexts, **shown)


def _guidance(net: LatentDiffusion, settings: Settings) -> float:
    kind = reads(net.config)
    free = kind == "prompts" or (kind == "classes" and net.config.classes.null_class)  # type: ignore[union-attr]
    if settings.guidance is None:
        usual = UPSCALING if settings.task == "upscale" else net.card.guidance or GUIDANCE[kind]
        return usual if free else 1.0
    if settings.guidance != 1 and not free:
        what = "has no class that stands for none" if kind == "classes" else "takes neither prompt nor class"
        what = "knows no empty layout" if kind == "boxes" else what
        raise UserError(
            f"guidance is {settings.guidance:g}, but this model {what}, so there is nothing to be guided away "
            "from; leave guidance out"
        )
    return settings.guidance


def _contexts(
    net: LatentDiffusion,
    encode: Callable[[tuple[str, ...]], Tensor],
    each: Sequence[Settings],
    guidance: float,
) -> dict[str, Any]:
    """The `Job`'s positive and negative, or its labels and what stands for none."""
    kind, text, settings = reads(net.config), net.text, each[0]
    if kind == "nothing":
        return {}
    if kind == "classes":
        classes: Any = text
        labels = [one.label for one in each if one.label is not None]
        if len(labels) < len(each):
            raise UserError("this model takes a class; name one")
        if text is None:
            return {"labels": labels, "no_label": net.config.unet.num_classes if guidance != 1 else None}
        positive = classes(labels)
        return {"positive": positive, "negative": classes([classes.null]) if guidance != 1 else None}
    if kind == "boxes":
        tokens = box_tokens(net.config.text, settings.boxes)  # type: ignore[arg-type]
        return {"positive": text.encode_tokens(tokens.to(text.positions.device))}  # type: ignore[union-attr]
    prompts = tuple(one.prompt for one in each)
    if len(set(prompts)) == 1:
        prompts = prompts[:1]
    elif len({text.chunks(prompt) for prompt in prompts}) > 1:  # type: ignore[union-attr]
        raise UserError(
            "prompts of unequal numbers of chunks cannot be painted at once; make them one by one"
        )
    if guidance == 1:
        return {"positive": encode(prompts)}
    both = encode((*prompts, settings.negative))
    return {"positive": both[:-1], "negative": both[-1:]}


# What the network is shown, and where it starts


def _roles(config: LatentDiffusionConfig, task: Task) -> list[str]:
    """The pictures that a task needs."""
    roles = ["image"] if task in ("image_to_image", "inpaint", "upscale") else []
    return (
        roles + ["mask"] * (task == "inpaint") + [role for role in ("depth", "map") if config.beside == role]
    )


def _picture(role: str, settings: Settings, given: Mapping[str, Picture | None]) -> Picture:
    one = given.get(role)
    if one is not None:
        return one
    if role not in settings.inputs:
        raise UserError(f"{settings.task} needs {role}: give a picture, with {FLAGS[role]} FILE")
    path = settings.inputs[role]
    if not Path(path).is_file():
        raise UserError(f"the {role} that it was made from, {path}, is not there; give {role}")
    return path


def _shown(
    net: LatentDiffusion,
    rendering: Rendering,
    settings: Settings,
    pictures: Mapping[str, Picture],
    latents: Tensor | None,
) -> dict[str, Any]:
    """The `Job`'s shape, canvas, known, cells, beside, labels and start; and the hashes of all that was given."""
    config, f = net.config, rendering.factor
    c = config.autoencoder.latent_channels
    made: dict[str, Any] = {"hashes": {}}
    surface: Canvas | None = None
    if settings.task == "upscale":
        low = canvas(pictures["image"], 1)
        made["hashes"]["image"] = digest(low.given)
        made |= _beside_image(net, low, settings.noise_level)
        rows, columns = low.size
    elif "image" in pictures:
        _check_size(settings.size, f)
        mask = pictures.get("mask")
        surface = canvas(pictures["image"], f, settings.size, mask, settings.feather)
        made["hashes"]["image"] = digest(surface.given)
        if surface.mask is not None:
            made["hashes"]["mask"] = digest(surface.mask)
        made |= _from_canvas(net, rendering, settings, surface)
        rows, columns = surface.size[0] // f, surface.size[1] // f
        if settings.size is None and rows * columns > LARGE * math.prod(config.unet.latent_size):
            height, width = config.image_size
            log.warning(
                "the picture is painted at its own %dx%d pixels, of which the model has seen %dx%d at once: it takes "
                "long and tends to repeat itself; size makes it smaller",
                *(surface.size[1], surface.size[0], width, height),
            )
    elif "map" in pictures:
        classes = class_map(pictures["map"], net.config.map.num_classes, settings.size)  # type: ignore[union-attr]
        _check_size(classes.shape, f, "the map")
        made["hashes"]["map"] = digest(classes)
        weight = net.map.mix.weight  # type: ignore[union-attr]
        shown = net.map(torch.from_numpy(classes)[None].to(weight.device), f)  # type: ignore[misc]
        made["beside"] = lambda seeds: shown
        rows, columns = classes.shape[0] // f, classes.shape[1] // f
    else:
        size = settings.size or config.image_size
        if latents is not None and settings.size is None:
            size = (latents.shape[-2] * f, latents.shape[-1] * f)
        _check_size(size, f)
        rows, columns = size[0] // f, size[1] // f
    if "depth" in pictures:
        pixels = grey(pictures["depth"])
        made["hashes"]["depth"] = digest(pixels)
        map_ = depth_map(pixels, (rows, columns))
        made["beside"] = lambda seeds: map_
    made["shape"] = (c, rows, columns)
    if latents is not None:
        made["hashes"]["latents"] = digest(latents.detach().float().cpu().numpy())
        made["start"] = latents
    return made


def _from_canvas(
    net: LatentDiffusion, rendering: Rendering, settings: Settings, surface: Canvas
) -> dict[str, Any]:
    config = net.config
    made: dict[str, Any] = {"canvas": surface}

    def latents(images: Tensor) -> Tensor:
        return rendering.latents(images, settings.tiled_decode, settings.tiling)

    images = surface.images(config.autoencoder.in_channels)
    if settings.task == "image_to_image" or config.beside == "nothing" or settings.strength < 1:
        made["known"] = latents(images)
    if settings.task == "image_to_image":
        return made
    cells, holes = surface.cells(rendering.factor), surface.holes()
    if config.beside == "nothing":
        made["cells"] = cells
        return made
    if config.beside == "mask+masked":  # Stable Diffusion's: the hole is grey, the mask 0 and 1
        left = latents(images * (1 - holes))
        extra = torch.cat([cells.to(left), left], dim=1)
    else:  # the paper's, as CompVis trained it: the hole is black, the mask -1 and 1
        left = latents((images + 1) * (1 - holes) - 1)
        extra = torch.cat([left, 2 * cells.to(left) - 1], dim=1)
    made["beside"] = lambda seeds: extra
    return made


def _beside_image(net: LatentDiffusion, low: Canvas, noise_level: int) -> dict[str, Any]:
    """The small picture, with noise of its own for each picture where the model was trained with it."""
    small, config = low.images(), net.config.low_process
    if config is None:
        return {"beside": lambda seeds: small}
    most = min(net.config.unet.num_classes, config.steps) - 1
    if noise_level > most:
        raise UserError(f"noise_level is {noise_level}, which must be from 0 to {most}")
    level = Process(config).level(noise_level)

    def noised(seeds: Sequence[int]) -> Tensor:
        return level.noised(small, seeded_noise(seeds, small.shape[1:], "condition"))

    return {"beside": noised, "labels": [noise_level]}


def _check_size(size: tuple[int, ...] | None, factor: int, what: str = "size") -> None:
    if size is None:
        return
    height, width = size
    if height % factor or width % factor:
        near = [max(1, round(side / factor)) * factor for side in (width, height)]
        raise UserError(
            f"{what} is {width}x{height} (width x height), which must be multiples of {factor}, such as "
            f"{near[0]}x{near[1]}"
        )
