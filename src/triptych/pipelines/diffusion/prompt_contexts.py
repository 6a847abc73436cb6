"""Encoded prompts of each step: switched, alternated and composed as `tokenization.prompt_schedule` says."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from triptych.errors import ConfigError
from triptych.models.tokenization.prompt_schedule import PromptSchedule, at_step, schedule, split_prompts
from triptych.models.tokenization.prompt_syntax import refuse_foreign_syntax
from triptych.pipelines.diffusion.loaded_model import LoadedModel
from triptych.pipelines.diffusion.options import GenerationRecord


@dataclass(frozen=True)
class StepContexts:
    """The contexts of a step, all equally long."""

    prompts: tuple[Float[Tensor, "n l d"], ...]
    """Of each prompt of a composition: of all images, or of each."""
    negative: Float[Tensor, "1 l d"] | None
    """None without guidance."""


@dataclass(frozen=True)
class PromptContexts:
    """The contexts of all steps."""

    weights: tuple[float, ...]
    """Of the composed prompts; one prompt has (1,)."""
    of_steps: tuple[int, ...]
    """Of each step, those of a second pass included, the number of its contexts."""
    contexts: tuple[StepContexts, ...]

    def number_at(self, step: int) -> int:
        """Return the number of a step's contexts; steps count from 0."""
        return self.of_steps[min(step, len(self.of_steps) - 1)]


def prompt_contexts(
    model: LoadedModel, prompts: Sequence[str], record: GenerationRecord, guided: bool
) -> PromptContexts:
    """Encode the prompts of images that share all other settings.

    Each step's prompts are encoded together with its negative prompt, as those of a call without changes are.

    Args:
        prompts: one for each image.
        record: its negative prompt and number of steps are used; of image to image, which runs fewer, the full number.
        guided: whether the negative prompt is needed; a composition needs it anyway.

    Raises:
        ConfigError: prompts of different compositions or lengths, or syntax that is unknown.
    """
    for prompt in {*prompts, record.negative_prompt}:
        refuse_foreign_syntax(prompt)
    distinct = prompts[:1] if len(set(prompts)) == 1 else prompts
    composed = [split_prompts(prompt) for prompt in distinct]
    weights = tuple(part.weight for part in composed[0])
    if any(tuple(part.weight for part in parts) != weights for parts in composed):
        raise ConfigError(
            "prompts that AND composes of different numbers or weights cannot share a batch; generate them one by one"
        )
    guided = guided or weights != (1.0,)
    passes = [(record.num_steps, 0)]
    if record.hires_scale > 1:
        passes.append((record.hires_steps or record.num_steps, record.num_steps))
    groups: list[tuple[str, ...]] = []
    for steps in passes:
        # Of each composed prompt, of each image.
        texts = [[schedule(parts[k].text, *steps) for parts in composed] for k in range(len(weights))]
        negative = schedule(record.negative_prompt, *steps) if guided else None
        groups += [_texts_at(step, texts, negative) for step in range(steps[0])]
    distinct_groups = list(dict.fromkeys(groups))
    for group in distinct_groups:
        _require_equal_lengths(model, group, len(distinct))
    rows = len(distinct)
    contexts = [
        StepContexts(
            tuple(encoded[k * rows : (k + 1) * rows] for k in range(len(weights))),
            encoded[-1:] if guided else None,
        )
        for encoded in model.encode(distinct_groups, record.clip_skip)
    ]
    numbers = {group: number for number, group in enumerate(distinct_groups)}
    return PromptContexts(weights, tuple(numbers[group] for group in groups), tuple(contexts))


def _texts_at(
    step: int, texts: Sequence[Sequence[PromptSchedule]], negative: PromptSchedule | None
) -> tuple[str, ...]:
    """Return the texts of a step: of each composed prompt those of all images, then the negative one."""
    positive = [at_step(of_image, step) for of_prompt in texts for of_image in of_prompt]
    return (*positive, *([at_step(negative, step)] if negative is not None else []))


def _require_equal_lengths(model: LoadedModel, group: Sequence[str], rows: int) -> None:
    """Require that images of a batch have prompts of as many chunks: others would be padded, and an image would
    depend on its batch."""
    encoder = model.net.text_encoder
    if rows == 1 or encoder is None:
        return
    for first in range(0, len(group) - len(group) % rows, rows):
        if len({encoder.chunks(text) for text in group[first : first + rows]}) > 1:
            raise ConfigError(
                "prompts with different numbers of chunks cannot share a batch; generate them one by one"
            )
