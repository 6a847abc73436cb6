"""What another program's metadata say of an image: fields of a record, and notes of what they cannot carry over."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PureWindowsPath
from typing import Any, Literal

from triptych.diffusion.config import NUM_SEEDS
from triptych.pipelines.diffusion.options import GenerationRecord
from triptych.pipelines.diffusion.sampler_names import DISCARDED, find_schedule, split_sampler

STOCHASTIC = ("ancestral", "sde", "ddpm", "lcm", "restart")
LONGEST_NOTE = 240
MOST_NOTES = 40

Generator = Literal["cpu", "gpu"]


@dataclass
class ForeignSettings:
    """Settings that were read from the metadata of a program; values that make no sense become notes."""

    source: str
    """Program, with its version if the metadata name it."""
    values: dict[str, Any] = field(default_factory=dict)
    """Fields of a `GenerationRecord`."""
    notes: list[str] = field(default_factory=list)
    """What cannot be reproduced, a line each."""
    model: str = ""
    """Name of the checkpoint, and its hash if the metadata have it."""

    def record(self) -> GenerationRecord:
        return GenerationRecord(**self.values)

    def note(self, line: str) -> None:
        """Add a line, cut to a readable length, unless it is there; there are at most `MOST_NOTES`."""
        line = " ".join(line[: 2 * LONGEST_NOTE].split())
        line = line if len(line) <= LONGEST_NOTE else line[: LONGEST_NOTE - 3] + "..."
        if line not in self.notes and len(self.notes) < MOST_NOTES:
            self.notes.append(line)

    def leave_out(self, name: str, value: Any) -> None:
        """Note a setting that is not reproduced."""
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        self.note(f"{name}: {text} is not reproduced")

    def set_texts(self, prompt: Any, negative_prompt: Any) -> None:
        """Set the prompts; None or another type is no text."""
        for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if isinstance(value, str):
                # Lone surrogates come from JSON escapes that were cut in half.
                self.values[name] = value.encode("utf-8", "replace").decode()
            elif value is not None:
                self.leave_out(name, value)

    def set_number(
        self,
        name: str,
        value: Any,
        low: float,
        high: float,
        number_type: type[int] | type[float] = float,
        *,
        called: str = "",
    ) -> None:
        """Set a field to a number, or to the number that a text is; None is no value.

        Args:
            called: the setting's name in that program, for the note.
        """
        if value is None:
            return
        number = as_number(value, number_type)
        if number is None or not low <= number <= high:
            self.leave_out(called or name, value)
        else:
            self.values[name] = number

    def set_size(self, width: Any, height: Any) -> None:
        """Set width and height, both or neither."""
        if width is None and height is None:
            return
        sides = [as_number(side, int) for side in (width, height)]
        if any(side is None or not 1 <= side <= 10**6 for side in sides):
            self.leave_out("size", f"{width}x{height}")
        else:
            self.values["width"], self.values["height"] = sides

    def set_seed(self, value: Any, generator: Generator = "cpu") -> None:
        """Set the seed. torch's generator on the CPU reads the low 32 bits of a longer one, so that they give the same
        noise; on the GPU it reads 64."""
        if value is None:
            return
        seed = as_number(value, int)
        if seed is None or not 0 <= seed < 2**64:
            self.leave_out("seed", value)
            return
        self.values["seed"] = int(seed) % NUM_SEEDS
        if seed >= NUM_SEEDS:
            effect = (
                "which give the same noise on the CPU" if generator == "cpu" else "which give other noise"
            )
            self.note(
                f"seed {seed} has more than 32 bits; its low ones are used ({seed % NUM_SEEDS}), {effect}"
            )

    def set_sampler(
        self,
        sampler: Any,
        schedule: Any = None,
        *,
        usual: str | Mapping[str, str] | None = None,
        discards: tuple[str, ...] = (),
        variants: Mapping[str, str] | None = None,
    ) -> None:
        """Set sampler and noise levels from that program's names.

        Args:
            sampler: its name, to which some programs append that of the levels.
            schedule: name of the noise levels.
            usual: our schedule where it names none, for every sampler or by sampler; None is ours.
            discards: samplers for which the program computes a level more and leaves out the last but one.
            variants: our schedule -> the one that the program means by its name.
        """
        name, appended = split_sampler(sampler) if isinstance(sampler, str) else (None, None)
        if name is not None:
            self.values["sampler"] = name
        elif sampler is not None:
            self.note(
                f"the sampler {sampler!r} is unknown here; {GenerationRecord().sampler} is used instead"
            )
        title = schedule if isinstance(schedule, str) and schedule.strip() else appended
        levels = find_schedule(title) if title else None
        if title and levels is None:
            self.note(
                f"the noise levels {title!r} are unknown here; the sampler's usual ones are used instead"
            )
        elif not levels:  # not named, or left to the program
            levels = usual.get(name or "") if isinstance(usual, Mapping) else usual
        if levels and variants:
            levels = variants.get(levels, levels)
        if levels and name in discards:
            if levels not in DISCARDED.keys() | DISCARDED.values():
                self.note(f"the last but one noise level of {sampler!r} is kept here, where it was left out")
            levels = DISCARDED.get(levels, levels)
        if levels and name is not None:
            self.values["schedule"] = levels

    def set_loras(self, loras: Mapping[str, Any]) -> None:
        """Set LoRAs by name, each with its weight, or with that in the text encoder and that in the UNet."""
        weights: dict[str, float | tuple[float, float]] = {}
        for name, value in loras.items():
            numbers = [
                as_number(weight, float) for weight in (value if isinstance(value, tuple) else (value,))
            ]
            if None in numbers:
                self.leave_out(f"LoRA {name}", value)
            elif name and any(numbers):
                first, last = numbers[0], numbers[-1]
                weights[name] = first if first == last else (first, last)
        if weights:
            self.values["loras"] = {**self.values.get("loras", {}), **weights}

    def note_model(self, model: Any, digest: Any = None) -> None:
        """Note the checkpoint that the image was made with, which the file does not contain."""
        name = model if isinstance(model, str) and model else None
        if name or digest:
            self.model = f"{name} ({digest})" if name and digest else str(name or digest)
            self.note(f"made with the model {self.model}; give its file as the model")

    def note_noise(self, unknown: str = "", *, sequential: bool = False) -> None:
        """Note noise that is drawn in another way than here.

        Args:
            unknown: how that program draws, where it cannot be drawn so here, such as "on a GPU".
            sequential: whether it draws the noise of the steps with the generator of the first noise, in turn.
        """
        sampler = self.values.get("sampler", "")
        # Brownian motion, of the samplers called SDE, is drawn otherwise in any case.
        equal = sequential and self.values.get("rng") == "cuda" and "sde" not in sampler
        if unknown:
            self.note(
                f"noise was drawn {unknown}; it is drawn on the CPU here, so the image will be another one"
            )
        elif not equal and any(word in sampler for word in STOCHASTIC):
            self.note(
                f"{sampler} adds noise at each step, which is drawn otherwise here: details will differ"
            )


def model_name(file: str) -> str:
    """Return a model file's name without folders, of any system, and without its suffix."""
    return re.sub(
        r"\.(safetensors|ckpt|pth?|bin|sft|gguf)$", "", PureWindowsPath(file).name, flags=re.IGNORECASE
    )


def as_number(value: Any, number_type: type[int] | type[float]) -> Any:
    """Return a finite number of that type, from a number or the text of one; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = number_type(value)
    except (ValueError, OverflowError):
        return None
    if number_type is int and isinstance(value, float) and value != number:
        return None
    return number if math.isfinite(number) else None


def json_object(text: Any) -> dict[str, Any] | None:
    """Return the JSON object that a text is, also one encoded twice; None if it is none."""
    for _ in range(2):
        if not isinstance(text, str) or not text.lstrip("\ufeff \t\r\n").startswith(("{", '"')):
            break
        try:
            text = json.loads(text.lstrip("\ufeff"), strict=False)
        except (ValueError, RecursionError):
            return None
    return text if isinstance(text, dict) else None
