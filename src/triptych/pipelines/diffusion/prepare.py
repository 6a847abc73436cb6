"""Preparation of records, prompts and images for the sampling loop: everything in which tasks differ."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from triptych.diffusion.config import usual_spacing
from triptych.diffusion.schedule import Levels, from_strength, spaced_levels
from triptych.errors import ConfigError, DataError
from triptych.models.configs.dit import DiTConfig
from triptych.models.configs.latent_diffusion import (
    ConcatConditioning,
    Condition,
    GenerationTask,
    LatentDiffusionConfig,
)
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.spatial_conditions import box_tokens
from triptych.pipelines.diffusion.canvas import Canvas
from triptych.pipelines.diffusion.hires import hires_levels, require_plain_noise
from triptych.pipelines.diffusion.input_tensors import InputTensors
from triptych.pipelines.diffusion.loaded_model import LoadedModel
from triptych.pipelines.diffusion.options import IMAGE_ROLES, GenerationRecord
from triptych.pipelines.diffusion.prompt_contexts import PromptContexts, prompt_contexts
from triptych.pipelines.image_input import ImageInput, name_of

SPATIAL: dict[ConcatConditioning, str] = {
    "none": "takes no spatial condition",
    "mask+masked_image": "is made to inpaint",
    "masked_image+mask": "is made to inpaint",
    "depth": "takes a depth map",
    "image": "is made to upscale",
    "semantic_map": "takes a map of classes",
}
# Condition -> what the model takes, and how to pass it.
CONDITION_USAGE: dict[Condition, str] = {
    "text": "reads prompts: give one to text_to_image, or PROMPT on the command line ('' is allowed)",
    "class": "takes a class, not a prompt: use class_conditional, or --class NAME-or-NUMBER",
    "boxes": "takes boxes, not a prompt: use layout, or --box CLASS:LEFT,TOP,RIGHT,BOTTOM",
    "image": "is conditioned on images, for which there is no task: use the context of "
    "ldm.text_encoder(images), ldm.denoiser(context) and a sampler",
    "nothing": "takes neither prompt nor class: use unconditional, or leave PROMPT and --class out",
}
CONDITION_OF_TASK: dict[GenerationTask, Condition] = {
    "text_to_image": "text",
    "class_conditional": "class",
    "layout": "boxes",
    "unconditional": "nothing",
}
GUIDANCE_SCALE: dict[Condition, float] = {"text": 7.5, "class": 1.5}
UPSCALING_GUIDANCE_SCALE = 9.0
STRENGTH: dict[GenerationTask, float] = {"image_to_image": 0.6, "inpaint": 1.0}


@dataclass(frozen=True, kw_only=True)
class SamplingJob:
    """Images that differ only in seed, class or prompt, ready for the sampling loop."""

    records: Sequence[GenerationRecord]
    """One record per image, complete."""
    levels: Levels
    hires_levels: Levels | None = None
    """Noise levels of a second pass at a larger size, if there is one."""
    shape: tuple[int, int, int]
    """Shape of an image's latents: channels, height, width."""
    context: Float[Tensor, "n l d"] | None = None
    """Context of the one prompt, or of each image's class or prompt."""
    negative_context: Float[Tensor, "1 l d"] | None = None
    """Of the negative prompt or the null class; None turns guidance off."""
    prompts: PromptContexts | None = None
    """In place of both, contexts of prompts, which may change from step to step."""
    canvas: Canvas | None = None
    init_latents: Float[Tensor, "1 c h w"] | None = None
    """Latents to start from, or to keep outside the mask."""
    latent_mask: Float[Tensor, "1 1 h w"] | None = None
    """1 where to generate, for a network without mask channels."""
    concat: Callable[[Sequence[int]], Tensor] | None = None
    """Conditioning channels concatenated to the latents, from the images' seeds."""
    labels: Sequence[int] | None = None
    """The network's label: one for all images, or each image's class."""
    null_label: int | None = None
    """Label of the null class; None turns guidance off."""
    initial_noise: Float[Tensor, "n c h w"] | None = None
    """The caller's noise to start from, instead of the seeds'."""

    @property
    def from_noise(self) -> bool:
        """Whether sampling starts from pure noise."""
        record = self.records[0]
        return self.init_latents is None or (record.task == "inpaint" and record.strength == 1)


def check_task(config: LatentDiffusionConfig, record: GenerationRecord, name: str) -> None:
    """Check that a model can do a record's task.

    Args:
        name: of the model, for messages.

    Raises:
        ConfigError: the model is not made for the task, or a prompt is given to a model that reads none.
    """
    task, condition = record.task, config.condition
    prompted = bool(record.prompt or record.negative_prompt)
    if task == "layout" and condition != "boxes":
        raise ConfigError(f"{name} takes no boxes; leave them out")
    other = CONDITION_OF_TASK.get(task, condition) != condition
    if other or condition == "image" or (prompted and condition != "text"):
        raise ConfigError(f"{name} {CONDITION_USAGE[condition]}")
    if record.tiling and isinstance(config.network, DiTConfig):
        raise ConfigError(f"{name} has a DiT, which cannot wrap around as a UNet can; leave tiling out")
    if task not in config.tasks:
        raise ConfigError(
            f"{name} {SPATIAL[config.concat]}: it does {', '.join(config.tasks) or 'no task here'}, not {task}"
        )


def prepare(
    model: LoadedModel,
    records: Sequence[GenerationRecord],
    images: Mapping[str, ImageInput | None],
    latents: Tensor | None,
) -> SamplingJob:
    """Prepare images that differ only in seed, class or prompt.

    Different prompts must have the same number of chunks (`TextEncoder.chunks`): the contexts of shorter ones would be
    padded, and an image would depend on the other prompts of its batch.

    Args:
        images: role (`IMAGE_ROLES`) -> image; roles that are missing are read from the record's files.
        latents: noise to start from, (1 or images, c, h, w).

    Raises:
        ConfigError: records and model do not fit together, or an image is missing or not used by the task.
        DataError: an image cannot be read.
    """
    net, record = model.net, records[0]
    if "latents" in record.hashes and latents is None:
        raise ConfigError(
            "the image was made from latents that were passed in, which its file does not hold; pass them again"
        )
    roles = _roles(net.config, record.task)
    for role in IMAGE_ROLES:
        if role not in roles and (images.get(role) is not None or getattr(record, role)):
            raise ConfigError(f"{record.task} of this model does not use {role}; leave {_flag(role)} out")
    inputs = {role: _input_image(role, record, images) for role in roles}
    schedule = record.schedule or usual_spacing(record.sampler, net.config.process)
    levels = spaced_levels(net.process, record.num_steps, schedule)
    strength = record.strength
    if record.task in STRENGTH:
        strength = STRENGTH[record.task] if strength is None else strength
        levels = from_strength(levels, strength)
    record = replace(record, strength=strength, schedule=schedule)
    second_pass = None
    if record.hires_scale > 1:
        plain = not roles and net.config.concat == "none"
        require_plain_noise(record, plain, isinstance(net.config.network, DiTConfig))
        second_pass = hires_levels(net.process, record, schedule)
    guidance_scale = _guidance_scale(net, record)
    contexts = _contexts(model, records, guidance_scale)
    tensors, hashes = InputTensors(model, record, inputs, latents).read()
    factor = model.codec.factor
    height, width = (cells * factor for cells in tensors["shape"][1:])
    resolved: dict[str, Any] = {
        "guidance_scale": guidance_scale,
        "schedule": schedule,
        "strength": strength,
        "height": height,
        "width": width,
        "hashes": hashes,
        **{
            role: name_of(image) if isinstance(image, str | os.PathLike) else ""
            for role, image in inputs.items()
        },
    }
    return SamplingJob(
        records=[replace(one, **resolved) for one in records],
        levels=levels,
        hires_levels=second_pass,
        **contexts,
        **tensors,
    )


def _flag(role: str) -> str:
    """Return an argument with its flag, for messages."""
    return f"{role} (--{role.replace('_', '-')})"


def _guidance_scale(net: LatentDiffusion, record: GenerationRecord) -> float:
    condition, guidable = net.config.condition, net.config.guidable
    if record.guidance_scale is None:
        if not guidable:
            return 1.0
        if record.task == "upscale":
            return UPSCALING_GUIDANCE_SCALE
        return net.card.guidance_scale or GUIDANCE_SCALE[condition]
    if record.guidance_scale != 1 and not guidable:
        reasons = {"class": "has no null class", "boxes": "has no empty layout"}
        raise ConfigError(
            f"guidance_scale is {record.guidance_scale:g}, but this model "
            f"{reasons.get(condition, 'takes neither prompt nor class')}, so there is nothing to guide away from; "
            "leave guidance_scale out"
        )
    return record.guidance_scale


def _contexts(
    model: LoadedModel, records: Sequence[GenerationRecord], guidance_scale: float
) -> dict[str, Any]:
    """Return the `SamplingJob`'s contexts, or its labels and null label."""
    net, record = model.net, records[0]
    condition, encoder = net.config.condition, net.text_encoder
    guided = guidance_scale != 1
    if record.clip_skip is not None and condition != "text":
        raise ConfigError("clip_skip is for models that read prompts; leave it out")
    if condition == "nothing":
        return {}
    if condition == "class":
        labels = [one.label for one in records if one.label is not None]
        if len(labels) < len(records):
            raise ConfigError("this model takes a class; name one")
        if encoder is None:
            return {"labels": labels, "null_label": net.config.network.num_classes if guided else None}
        return {
            "context": encoder(labels),
            "negative_context": encoder([encoder.null]) if guided else None,
        }
    if condition == "boxes":
        tokens = box_tokens(net.config.text_encoder, record.boxes)
        return {"context": encoder.encode_tokens(tokens.to(encoder.positions.device))}
    return {"prompts": prompt_contexts(model, [one.prompt for one in records], record, guided)}


# Images that a task reads


def _roles(config: LatentDiffusionConfig, task: GenerationTask) -> list[str]:
    """Return the roles of the images that a task needs."""
    roles = ["init_image"] if task in ("image_to_image", "inpaint", "upscale") else []
    roles += ["mask_image"] if task == "inpaint" else []
    roles += ["depth_map"] if config.concat == "depth" else []
    return roles + (["class_map"] if config.concat == "semantic_map" else [])


def _input_image(role: str, record: GenerationRecord, images: Mapping[str, ImageInput | None]) -> ImageInput:
    image = images.get(role)
    if image is not None:
        return image
    path = getattr(record, role)
    if not path:
        raise ConfigError(f"{record.task} needs {_flag(role)}; give an image")
    if role in record.hashes and not Path(path).is_file():
        raise DataError(f"the {role} that it was made from, {path}, does not exist; give {_flag(role)}")
    return path
