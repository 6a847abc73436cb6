"""`triptych generate`"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from triptych.cli.generate_output import Shown, Watch
from triptych.cli.output import SHIPPED_PAINTER
from triptych.cli.parsing import height_width
from triptych.errors import UserError

if TYPE_CHECKING:
    from triptych.pipelines.diffusion.pipeline import DiffusionPipeline
    from triptych.pipelines.diffusion.settings import Settings

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def said(metavar: str, default: str = "", name: str | None = None) -> Any:
    """How help shows a flag whose default is found out later."""
    hint = f"(default: {default})" if default else ""
    return tyro.conf.arg(name=name, metavar=metavar, help_behavior_hint=hint)


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Paint pictures with a latent diffusion model.

    With --init a picture is painted over, with --mask only where the mask is white; a model made to upscale enlarges
    the --init. Files hold all that made them: --from FILE makes the same pixels again, and flags beside it change
    what they name. Each is written once it is there; Ctrl-C stops at the next step and writes what is there.
    """

    prompt: Annotated[str | None, tyro.conf.Positional, said("[PROMPT]")] = None
    """What to paint; (word:1.3) weighs. Not for models that take a class or nothing."""
    prompts: Annotated[Path | None, said("FILE")] = None
    """A file with a prompt a line instead; --count pictures of each, all with seeds of their own."""
    model: Annotated[str, said("STR", f"{SHIPPED_PAINTER}, or that of --from")] = ""
    """A latent diffusion model's file, folder, hub id or name, or a RUN folder."""
    negative: Annotated[str | None, said("TEXT", "none")] = None
    """What to keep away from."""
    seed: Annotated[int | None, said("INT", "0")] = None
    """Of the first picture; each further one has one more."""
    steps: Annotated[int | None, said("INT", "30")] = None
    """Of the sampler."""
    guidance: Annotated[float | None, said("FLOAT", "the model's own, mostly 7.5, of classes 1.5")] = None
    """How closely to follow the prompt or the class; 1 is the prompt alone."""
    count: int = 1
    """How many pictures."""
    size: Annotated[str, said("WxH", "the model's own")] = ""
    """Width and height in pixels, multiples of 8 for most models."""
    sampler: Annotated[str | None, said("NAME", "dpm++2m")] = None
    """ddpm, ddim, plms, euler, euler-ancestral, heun, dpm++2m, dpm++2m-sde, unipc or lcm."""
    spacing: Annotated[str | None, said("NAME", "the sampler's usual")] = None
    """Which levels of noise it visits, such as karras."""
    rescale: Annotated[float | None, said("FLOAT", "0")] = None
    """How much of the contrast that guidance adds to take back, 0 to 1."""
    merge_tokens: Annotated[float | None, said("FLOAT", "0")] = None
    """Share of the finest attention's tokens to merge, up to 0.75: faster on large maps, and another picture."""
    deep_cache: Annotated[int | None, said("INT", "1")] = None
    """Compute the deep part of the UNet at each n-th step only: faster, and another picture."""
    decoder: Annotated[str | None, said("FILE", "the model's own")] = None
    """A small autoencoder on the same latents (TAESD) to decode with: faster, and softer."""
    class_: Annotated[str | None, said("NAME-or-NUMBER", name="class")] = None
    """The class to paint, of a model that takes one."""
    init: Annotated[Path | None, said("IMAGE")] = None
    """A picture to start from."""
    strength: Annotated[float | None, said("FLOAT", "0.6, with --mask 1")] = None
    """How much of it to make new, 0 to 1."""
    mask: Annotated[Path | None, said("IMAGE")] = None
    """White where to paint, as large as --init; the rest of it stays as it is."""
    depth: Annotated[Path | None, said("IMAGE")] = None
    """A grey depth map, near is bright, of a model that takes one."""
    map: Annotated[Path | None, said("IMAGE")] = None
    """A map with the number of a class in each pixel, of a model that paints one."""
    box: tyro.conf.UseAppendAction[Annotated[tuple[str, ...], said("CLASS:LEFT,TOP,RIGHT,BOTTOM")]] = ()
    """Where something is to be, from 0 to 1, of a model that takes boxes; once for each."""
    noise_level: Annotated[int | None, said("INT", "20")] = None
    """Of a model made to upscale: how much noise the small picture gets."""
    tiling: Annotated[str | None, said("x|y|xy", "none")] = None
    """Join left to right (x), top to bottom (y), or both."""
    from_: Annotated[Path | None, said("PNG", name="from")] = None
    """A picture of this program or of AUTOMATIC1111's web UI, to make again."""
    lora: tyro.conf.UseAppendAction[Annotated[tuple[str, ...], said("FILE[:WEIGHT]")]] = ()
    """A LoRA's file or RUN, or its name in --lora-dir; once for each. <lora:NAME:WEIGHT> in the prompt is the same."""
    lora_dir: Annotated[Path | None, said("DIR", "beside the model")] = None
    """Where LoRAs are found by name."""
    embedding: tyro.conf.UseAppendAction[Annotated[tuple[str, ...], said("FILE[:WORD]")]] = ()
    """A word of textual inversion that the prompt may use, or the RUN that learned it; once for each. Its own name if
    none is given."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE-or-DIR")] = Path("generated")
    """A .png, .jpg or .webp file, or a folder, in which files are numbered on."""
    skip_existing: bool = False
    """Leave out pictures that are in --out, made in just this way: so a run goes on where it was stopped."""
    strip: Annotated[Path | None, said("PNG")] = None
    """Also draw what the network saw in the first picture, step after step."""
    preview: Annotated[Path | None, said("PNG")] = None
    """A file to look at meanwhile, written anew after a step, at most once a second."""
    batch_size: int = 1
    """Pictures in one pass of the network; above 1 a pixel may differ by 1 of 255."""
    prediction: Annotated[Literal["eps", "v"] | None, said("eps|v")] = None
    """What the UNet predicts, where the model's file does not say (Stable Diffusion 2)."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision; auto takes bf16 where the hardware multiplies it natively, and with --from that of the file."""
    compile: bool = False
    """Compile the network's blocks: a wait at the start, which pays for many pictures of one size."""
    json: bool = False
    """Print all that made the pictures, and their files, as JSON."""

    def run(self) -> int:
        settings = self._settings()
        self._check(settings)
        from triptych import DiffusionPipeline
        from triptych.pipelines.diffusion.existing_images import among, made_in
        from triptych.pipelines.diffusion.pipeline import seeded

        dtype = (settings.dtype or None) if self.dtype == "auto" else self.dtype
        pipe = DiffusionPipeline(
            self._model(settings),
            None,
            dtype,
            lora_dir=self.lora_dir,
            prediction=self.prediction,
            compile=self.compile,
        )
        settings = self._task(settings, pipe)
        every = seeded([replace(settings, prompt=words) for words in self._prompts(settings)], self.count)
        known = made_in(self.out) if self.skip_existing else frozenset()
        watch, shown = Watch(self.strip, self.preview), Shown(self.json, self.strip is not None)

        def keep(one: Any) -> None:
            shown.add(pipe.save([one], self._place(one.info["seed"], len(every)))[0], one)

        started = time.perf_counter()
        try:
            with stopping() as stopped:
                for some in pipe.alike(every, self.batch_size):
                    pipe.make(
                        some,
                        image=None if self.init is None else str(self.init),
                        mask=None if self.mask is None else str(self.mask),
                        depth=None if self.depth is None else str(self.depth),
                        map=None if self.map is None else str(self.map),
                        batch_size=self.batch_size,
                        preview=watch if self.strip or self.preview else None,
                        cancel=stopped,
                        finished=keep,
                        wanted=lambda one: not among(one, known),
                        keep=False,
                    )
                    if stopped():
                        break
            seconds = time.perf_counter() - started
        finally:  # what was kept is said of a run that fails as well
            shown.end()
        if shown.first is not None:
            watch.draw(shown.first)
        if known and shown.count < len(every) and not stopped():
            print(f"{len(every) - shown.count} of {len(every)} are there already", file=sys.stderr)
        if not self.json:
            print(f"{seconds:.1f} s", file=sys.stderr)
        if stopped():
            at = shown.stopped_at
            print(f"stopped{f' at step {at}' if at else ''}, {shown.count} of {len(every)}", file=sys.stderr)
        return 130 if stopped() else 0

    def _prompts(self, settings: "Settings") -> list[str]:
        """Those of the file, or the one."""
        if self.prompts is None:
            return [settings.prompt]
        try:
            lines = [line.strip() for line in self.prompts.read_text("utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as problem:
            why = getattr(problem, "strerror", None) or "no UTF-8 text"
            raise UserError(f"--prompts {self.prompts} cannot be read ({why}); name a text file") from None
        if not any(lines):
            raise UserError(f"--prompts {self.prompts} holds no prompt; write one a line")
        return [line for line in lines if line]

    def _settings(self) -> "Settings":
        """Those of --from, with what the flags say."""
        from triptych.pipelines.diffusion.settings import Settings, tiling_of

        settings = Settings()
        if self.from_ is not None:
            from triptych.pipelines.diffusion import image_metadata

            settings = image_metadata.read(self.from_)
        flags: dict[str, Any] = {
            "prompt": self.prompt,
            "negative": self.negative,
            "seed": self.seed,
            "steps": self.steps,
            "guidance": self.guidance,
            "sampler": self.sampler,
            "spacing": self.spacing,
            "rescale": self.rescale,
            "merge_tokens": self.merge_tokens,
            "deep_cache": self.deep_cache,
            "decoder": self.decoder,
            "strength": self.strength,
            "noise_level": self.noise_level,
            "size": height_width(self.size) if self.size else None,
            "tiling": None if self.tiling is None else tiling_of(self.tiling),
            "boxes": tuple(one_box(words) for words in self.box) or None,
            "loras": dict(map(lora_weight, self.lora)) or None,
            "embeddings": dict(map(word_file, self.embedding)) or None,
        }
        flags = {name: value for name, value in flags.items() if value is not None}
        if self.sampler is not None and self.spacing is None:
            flags["spacing"] = None  # the usual one of this sampler, not that of the file's
        if self.init is not None or self.mask is not None:
            inpaints = self.mask is not None or settings.task == "inpaint"
            flags["task"] = "inpaint" if inpaints else "image_to_image"
            if self.strength is None and settings.task != flags["task"]:
                flags["strength"] = 1.0 if inpaints else 0.6
        return replace(settings, stopped_at=None, **flags)

    def _check(self, settings: "Settings") -> None:
        """What can be wrong without the model: nobody should wait for that to load first."""
        if self.mask is not None and self.init is None and "image" not in settings.inputs:
            raise UserError("--mask says where to paint on a picture; name that with --init IMAGE")
        if self.strength is not None and self.init is None and self.from_ is None:
            raise UserError("--strength is of a picture to start from; name that with --init IMAGE")
        if self.prompts is not None and (self.prompt is not None or self.class_ is not None):
            raise UserError("--prompts is given beside a prompt or --class; give one of them")
        if self.prompts is not None:
            self._prompts(settings)
        if self.class_ is not None and self.prompt is not None:
            raise UserError("a prompt and --class are both given; a model takes one or the other")
        if self.count < 1 or self.batch_size < 1:
            raise UserError(f"count {self.count} and batch_size {self.batch_size} must be at least 1")
        if self.out.suffix and not self.out.is_dir() and self.out.suffix.lower() not in SUFFIXES:
            raise UserError(
                f"--out {self.out}: pictures are written as {', '.join(SUFFIXES)}, or into a folder"
            )
        for flag, place in (("--strip", self.strip), ("--preview", self.preview)):
            if place is not None and place.suffix.lower() != ".png":
                raise UserError(f"{flag} {place}: it is written as a PNG; name a .png file")
        for place in (self.out, self.strip, self.preview):
            if place is not None:
                writable(place)
        if self.init is not None:
            from triptych.pipelines.diffusion.canvas import canvas

            canvas(str(self.init), 1, mask=None if self.mask is None else str(self.mask))

    def _place(self, seed: int, count: int) -> Path:
        """Where the picture of a seed goes: of several each has a file of its own."""
        out = self.out
        alone = count == 1 or not out.suffix or out.is_dir()
        return out if alone else out.with_name(f"{out.stem}-{seed}{out.suffix}")

    def _model(self, settings: "Settings") -> str:
        if self.model:
            return self.model
        if not settings.model:
            return SHIPPED_PAINTER
        if settings.model == SHIPPED_PAINTER or Path(settings.model).exists():
            return settings.model
        raise UserError(f"the model that made it, {settings.model}, is not there; name one with --model FILE")

    def _task(self, settings: "Settings", pipe: "DiffusionPipeline") -> "Settings":
        """The task that flags and model come to."""
        from triptych.pipelines.diffusion.prepare import reads

        kind = reads(pipe.config)
        if pipe.config.beside == "image":
            settings = replace(settings, task="upscale")
        if self.class_ is not None:
            if kind != "classes":
                raise UserError(f"{pipe.source} takes no class; leave --class out")
            return pipe.of_class(replace(settings, task="class_conditional"), self.class_)
        if kind == "boxes" or settings.boxes:
            return replace(settings, task="layout")
        if pipe.config.beside == "map" or self.map is not None:
            return replace(settings, task="semantic")
        asked = any(one is not None for one in (self.prompt, self.prompts, self.init, self.from_))
        if asked or settings.task == "upscale":
            return settings
        if kind == "prompts":
            raise UserError(f"{pipe.source} reads prompts, and none was given: triptych generate PROMPT")
        if kind == "classes":
            raise UserError(f"{pipe.source} takes a class, and none was named: --class NAME-or-NUMBER")
        return replace(settings, task="unconditional")


def one_box(words: str) -> tuple[int, float, float, float, float]:
    """ "3:0.1,0.2,0.5,0.9" -> class 3, left, top, right, bottom."""
    label, _, corners = words.partition(":")
    try:
        left, top, right, bottom = map(float, corners.split(","))
        return int(label), left, top, right, bottom
    except ValueError:
        raise UserError(
            f"--box is {words!r}, which must be CLASS:LEFT,TOP,RIGHT,BOTTOM, for example 3:0.1,0.2,0.5,0.9"
        ) from None


def lora_weight(words: str) -> tuple[str, float]:
    """ "style.safetensors:0.8" -> the file, or a name, and the weight."""
    name, _, weight = words.rpartition(":")
    if not name or Path(words).exists():
        return learned_in(words, "lora"), 1.0
    try:
        return learned_in(name, "lora"), float(weight)
    except ValueError:
        if Path(name).exists():
            raise UserError(
                f"--lora {words}: the weight is {weight!r}, which must be a number such as 0.8"
            ) from None
        return words, 1.0


def word_file(words: str) -> tuple[str, str]:
    """ "cat.pt:<my-cat>" -> the word, by default the file's own, and the file."""
    from triptych.weights.diffusion.textual_inversion import read_embedding

    file, _, word = words.rpartition(":")
    if file and not Path(words).exists() and Path(file).exists():
        if not word.strip():
            raise UserError(f"--embedding {words}: no word stands behind the colon; write FILE:WORD")
        return word.strip(), learned_in(file, "word")
    file = learned_in(words, "word")
    return read_embedding(file)[0], file


def learned_in(place: str, what: str) -> str:
    """The file in a RUN that learned a LoRA or a word; anything else is taken as it is."""
    file = Path(place) / f"{what}.safetensors"
    return str(file) if file.is_file() else place


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; pressed again, it interrupts as ever."""
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        print("stopping at this step; once more to leave at once", file=sys.stderr)

    try:
        before = signal.signal(signal.SIGINT, press)
    except ValueError:  # not the main thread: then it is not ours to hear
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def writable(place: Path) -> None:
    """Raises a `UserError` now rather than after minutes if nothing can be written there."""
    there = place if place.is_dir() else place.parent
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"cannot write {place}: {there} is no folder that can be written to; choose another place"
        )
