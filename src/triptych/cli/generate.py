"""`triptych generate`"""

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Suppress

from triptych.cli.generate_output import GenerationReporter, StepRecorder
from triptych.cli.output import SHIPPED_GENERATOR
from triptych.cli.parsing import flag, height_width, logged_to_stderr, parse
from triptych.errors import ConfigError, StorageError
from triptych.pipelines.diffusion.options import GenerationRecord, SamplingOptions, Tiling

if TYPE_CHECKING:
    from triptych.pipelines.diffusion.pipeline import DiffusionPipeline

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(SamplingOptions):
    """`SamplingOptions` as flags. Those that are hidden have a shorter notation in `Generate`."""

    prompt: Suppress[str] = ""
    negative_prompt: Annotated[str, flag("TEXT")] = ""
    guidance_scale: Annotated[float | None, flag("FLOAT")] = None
    height: Annotated[int | None, flag("PIXELS")] = None
    width: Annotated[int | None, flag("PIXELS")] = None
    sampler: Annotated[str, flag("NAME", "dpm++2m")] = "dpm++2m"
    schedule: Annotated[str | None, flag("NAME")] = None
    init_image: Annotated[str, flag("IMAGE")] = ""
    strength: Annotated[float | None, flag("FLOAT")] = None
    mask_image: Annotated[str, flag("IMAGE")] = ""
    depth_map: Annotated[str, flag("IMAGE")] = ""
    class_map: Annotated[str, flag("IMAGE")] = ""
    boxes: Suppress[tuple[tuple[int, float, float, float, float], ...]] = ()
    clip_skip: Annotated[int | None, flag("N")] = None
    rng: Annotated[Literal["cpu", "cuda"], flag("cpu|cuda")] = "cpu"
    hires_steps: Annotated[int | None, flag("INT")] = None
    hires_upscaler: Annotated[str, flag("NAME", "latent")] = "latent"
    guidance_interval: Annotated[tuple[float, float] | None, flag("LOW HIGH", "all")] = None
    apg: Suppress[dict[str, float] | None] = None
    decoder: Annotated[str, flag("FILE")] = ""
    tiling: Annotated[Tiling, flag("x|y|xy")] = ""
    tiled_decode: Annotated[bool | Literal["auto"], flag("True|False|auto", "auto")] = "auto"
    loras: Suppress[dict[str, float | tuple[float, float]]] = field(default_factory=dict)
    embeddings: Suppress[dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Generate images with a latent diffusion model.

    --init-image changes an image, with --mask-image only where the mask is white; an upscaling model enlarges it.
    Image files store all settings: --from FILE generates the same pixels again, and other flags override its settings.
    Images are written as they finish; Ctrl-C stops after the current step and writes the images so far.
    """

    prompt: Annotated[str | None, tyro.conf.Positional, flag("[PROMPT]")] = None
    """Text to generate from; `(word:1.3)` changes a word's weight. Text-conditioned models only."""
    prompts: Annotated[Path | None, flag("FILE")] = None
    """Text file with one prompt per line: --num-images images of each, each with its own seed."""
    class_: Annotated[str | None, flag("NAME-or-NUMBER", name="class")] = None
    """Class to generate. Class-conditional models only."""
    box: tyro.conf.UseAppendAction[Annotated[tuple[str, ...], flag("CLASS:LEFT,TOP,RIGHT,BOTTOM")]] = ()
    """Bounding box of an object, coordinates from 0 to 1; repeat for more. Layout-conditioned models only."""
    model: Annotated[str, flag("STR", f"{SHIPPED_GENERATOR}, or that of --from")] = ""
    """A latent diffusion model's file, folder, hub id or name, or a RUN folder."""
    num_images: int = 1
    """Number of images."""
    size: Annotated[str, flag("WxH")] = ""
    """Width and height in pixels, in place of --width and --height."""
    from_: Annotated[Path | None, flag("PNG", name="from")] = None
    """Image to generate again, by Triptych, AUTOMATIC1111's web UI, ComfyUI and others; its settings become the
    defaults."""
    lora: tyro.conf.UseAppendAction[Annotated[tuple[str, ...], flag("FILE[:WEIGHT[:UNET]]")]] = ()
    """LoRA file, RUN, or name in --lora-dir; repeat for more. <lora:NAME:WEIGHT> in the prompt does the same. A second
    number is the weight of the UNet, the first then that of the text encoder."""
    lora_dir: Annotated[Path | None, flag("DIR", "the model's folder")] = None
    """Folder in which LoRAs are looked up by name."""
    embedding: tyro.conf.UseAppendAction[Annotated[tuple[str, ...], flag("FILE[:WORD]")]] = ()
    """Textual inversion file or RUN whose word the prompt may use; repeat for more. WORD renames it."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE-or-DIR")] = Path("generated")
    """A .png, .jpg or .webp file, or a folder, whose files are numbered consecutively."""
    skip_existing: bool = False
    """Skip images that --out already has with the same settings, to resume a run that was stopped."""
    strip: Annotated[Path | None, flag("PNG")] = None
    """Also plot the denoising steps of the first image."""
    preview: Annotated[Path | None, flag("PNG")] = None
    """Preview image, updated while sampling, at most once a second."""
    batch_size: int = 1
    """Images per forward pass; above 1 a pixel may differ by 1 of 255."""
    prediction: Annotated[Literal["eps", "v"] | None, flag("eps|v")] = None
    """What the UNet predicts, if the model's file does not store it (Stable Diffusion 2)."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision; auto is bf16 if the hardware multiplies it natively, else fp32; with --from, that of the image."""
    compile: bool = False
    """Compile the network's blocks: slow to start, faster for many images of one size."""
    json: bool = False
    """Print the settings and files of the images as JSON."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = SamplingFlags()

    def run(self, source: GenerationRecord, typed: SamplingOptions) -> int:
        """Generate the images.

        Args:
            source: the record of --from, or the default one.
            typed: the flags' values over the program's defaults instead of those of --from.
        """
        record = self._record(source, typed)
        self._check(record, typed)
        from triptych import DiffusionPipeline
        from triptych.pipelines.diffusion.existing_images import already_generated, existing_images
        from triptych.pipelines.diffusion.records import batchable_groups, with_seeds

        dtype = (record.dtype or None) if self.dtype == "auto" else self.dtype
        pipe = DiffusionPipeline(
            self._model(record),
            None,
            dtype,
            lora_dir=self.lora_dir,
            prediction=self.prediction,
            compile=self.compile,
        )
        record = self._task(record, pipe)
        records = with_seeds(
            [replace(record, prompt=text) for text in self._prompts(record)], self.num_images
        )
        existing = existing_images(self.out) if self.skip_existing else frozenset()
        recorder = StepRecorder(self.strip, self.preview)
        reporter = GenerationReporter(self.json, self.strip is not None)

        def write(image: Any) -> None:
            reporter.add(pipe.save([image], self._place(image.info["seed"], len(records)))[0], image)

        started = time.perf_counter()
        try:
            with interruptible() as interrupted:
                for group in batchable_groups(pipe.net, records, self.batch_size):
                    pipe.generate(
                        group,
                        batch_size=self.batch_size,
                        preview=recorder if self.strip or self.preview else None,
                        cancel=interrupted,
                        on_image=write,
                        should_generate=lambda record: not already_generated(record, existing),
                        return_images=False,
                    )
                    if interrupted():
                        break
            seconds = time.perf_counter() - started
        finally:  # also after an error, the images that were written are reported
            reporter.end()
        if reporter.first is not None:
            recorder.draw(reporter.first)
        total = len(records)
        if existing and reporter.count < total and not interrupted():
            print(f"{total - reporter.count} of {total} already exist", file=sys.stderr)
        if not self.json:
            print(f"{seconds:.1f} s", file=sys.stderr)
        if interrupted():
            at = f" at step {reporter.stopped_at}" if reporter.stopped_at else ""
            print(f"stopped{at}, {reporter.count} of {total}", file=sys.stderr)
        return 130 if interrupted() else 0

    def _prompts(self, record: GenerationRecord) -> list[str]:
        """The prompts of the file, or the one."""
        if self.prompts is None:
            return [record.prompt]
        try:
            lines = [line.strip() for line in self.prompts.read_text("utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as problem:
            why = getattr(problem, "strerror", None) or "not UTF-8 text"
            raise ConfigError(f"--prompts {self.prompts} cannot be read ({why}); name a text file") from None
        if not any(lines):
            raise ConfigError(f"--prompts {self.prompts} contains no prompt; write one per line")
        return [line for line in lines if line]

    def _record(self, source: GenerationRecord, typed: SamplingOptions) -> GenerationRecord:
        """The record of --from with what the flags replace."""
        values = {f.name: getattr(self.sampling, f.name) for f in dataclasses.fields(SamplingOptions)}
        if self.prompt is not None:
            values["prompt"] = self.prompt
        if self.size:
            values["height"], values["width"] = height_width(self.size)
        if self.box:
            values["boxes"] = tuple(map(parse_box, self.box))
        if self.lora:
            values["loras"] = dict(map(lora_weight, self.lora))
        if self.embedding:
            values["embeddings"] = {
                w: file for text in self.embedding for w, file in word_files(text).items()
            }
        if values["sampler"] != source.sampler and typed.schedule is None:
            values["schedule"] = None  # the usual one of this sampler, not that of the file's
        if typed.init_image or typed.mask_image:
            inpaints = typed.mask_image or source.task == "inpaint"
            values["task"] = "inpaint" if inpaints else "image_to_image"
            if typed.strength is None and source.task != values["task"]:
                values["strength"] = None
        return replace(source, stopped_at=None, **values)

    def _check(self, record: GenerationRecord, typed: SamplingOptions) -> None:
        """Raise what is wrong without the model, which takes a while to load."""
        if typed.mask_image and not record.init_image:
            raise ConfigError("--mask-image needs an image to change; add --init-image IMAGE")
        if typed.strength is not None and not typed.init_image and self.from_ is None:
            raise ConfigError("--strength needs an image to change; add --init-image IMAGE")
        if self.prompts is not None and (self.prompt is not None or self.class_ is not None):
            raise ConfigError("--prompts cannot be combined with a prompt or --class; give one of them")
        if self.prompts is not None:
            self._prompts(record)
        if self.class_ is not None and self.prompt is not None:
            raise ConfigError("a prompt and --class are both given; give the one that the model takes")
        if self.num_images < 1 or self.batch_size < 1:
            raise ConfigError(
                f"num_images {self.num_images} and batch_size {self.batch_size} must be at least 1"
            )
        if self.out.suffix and not self.out.is_dir() and self.out.suffix.lower() not in _SUFFIXES:
            raise ConfigError(
                f"--out {self.out}: images are written as {', '.join(_SUFFIXES)}, or into a folder"
            )
        for name, place in (("--strip", self.strip), ("--preview", self.preview)):
            if place is not None and place.suffix.lower() != ".png":
                raise ConfigError(f"{name} {place} must be a PNG; name a .png file")
        for place in (self.out, self.strip, self.preview):
            if place is not None:
                require_writable(place)
        if typed.init_image:
            from triptych.pipelines.diffusion.canvas import make_canvas

            make_canvas(record.init_image, 1, mask=record.mask_image or None)

    def _place(self, seed: int, total: int) -> Path:
        """Where the image of a seed is written; each of several has its own file."""
        out = self.out
        as_named = total == 1 or not out.suffix or out.is_dir()
        return out if as_named else out.with_name(f"{out.stem}-{seed}{out.suffix}")

    def _model(self, record: GenerationRecord) -> str:
        if self.model:
            return self.model
        if not record.model:
            return SHIPPED_GENERATOR
        if record.model == SHIPPED_GENERATOR or Path(record.model).exists():
            return record.model
        raise ConfigError(
            f"the model of this image, {record.model}, does not exist; name a model with --model FILE"
        )

    def _task(self, record: GenerationRecord, pipe: "DiffusionPipeline") -> GenerationRecord:
        """The record with the task that flags and model amount to."""
        from triptych.pipelines.diffusion.records import with_class

        config = pipe.config
        if self.class_ is not None:
            if config.classes is None:
                raise ConfigError(f"{pipe.source} is not conditioned on classes; leave --class out")
            return with_class(replace(record, task="class_conditional"), self.class_, config, pipe.card)
        if "layout" in config.tasks or record.boxes:
            return replace(record, task="layout")
        if "semantic" in config.tasks or record.class_map:
            return replace(record, task="semantic")
        if "upscale" in config.tasks:
            return replace(record, task="upscale")
        if record.init_image or self.from_ or self.prompts or self.prompt is not None:
            return record
        if config.condition == "text":
            raise ConfigError(f"{pipe.source} needs a prompt, and none was given: triptych generate PROMPT")
        if config.condition == "class":
            raise ConfigError(f"{pipe.source} needs a class, and none was given; add --class NAME-or-NUMBER")
        return replace(record, task="unconditional")


def generate(args: Sequence[str]) -> int:
    """The verb. With --from, the image's settings are the flags' defaults."""
    prog = "triptych generate"
    typed = parse(Generate, args, prog)
    with logged_to_stderr():
        if typed.from_ is None:
            return typed.run(GenerationRecord(), typed.sampling)
        from triptych.pipelines.diffusion import image_metadata

        settings = image_metadata.read_settings(typed.from_)
        settings.log_notes(str(typed.from_))
        source = settings.record
        if settings.model and not typed.model and not settings.model.startswith(SHIPPED_GENERATOR):
            raise ConfigError(
                f"{typed.from_} was made with the model {settings.model}; name its file with --model FILE"
            )
        values = {f.name: getattr(source, f.name) for f in dataclasses.fields(SamplingOptions)}
        command = parse(Generate, args, prog, default=Generate(sampling=SamplingFlags(**values)))
        return command.run(source, typed.sampling)


def parse_box(text: str) -> tuple[int, float, float, float, float]:
    """ "3:0.1,0.2,0.5,0.9" -> class 3, left, top, right, bottom."""
    label, _, corners = text.partition(":")
    try:
        left, top, right, bottom = map(float, corners.split(","))
        return int(label), left, top, right, bottom
    except ValueError:
        raise ConfigError(
            f"--box is {text!r}, which must be CLASS:LEFT,TOP,RIGHT,BOTTOM, for example 3:0.1,0.2,0.5,0.9"
        ) from None


def lora_weight(text: str) -> tuple[str, float | tuple[float, float]]:
    """ "style.safetensors:0.8" -> the file, or a name, and the weight; ":0.8:0.5" -> both weights."""
    if Path(text).exists():
        return adapter_file(text, "lora"), 1.0
    for count in (2, 1):
        name, *weights = text.rsplit(":", count)
        try:
            numbers = [float(weight) for weight in weights]
        except ValueError:
            if count == 1 and name and Path(name).exists():
                raise ConfigError(
                    f"--lora {text}: the weight is {weights[0]!r}, which must be a number such as 0.8"
                ) from None
            continue
        if name and len(numbers) == count:
            return adapter_file(name, "lora"), numbers[0] if count == 1 else (numbers[0], numbers[1])
    return text, 1.0


def word_files(text: str) -> dict[str, str]:
    """ "cat.pt:<my-cat>" -> the word, by default the file's own or all of its words, and the file."""
    from triptych.weights.diffusion.textual_inversion import read_embeddings

    file, _, word = text.rpartition(":")
    if file and not Path(text).exists() and Path(file).exists():
        if not word.strip():
            raise ConfigError(f"--embedding {text}: there is no word after the colon; write FILE:WORD")
        return {word.strip(): adapter_file(file, "word")}
    file = adapter_file(text, "word")
    return dict.fromkeys(read_embeddings(file), file)


def adapter_file(place: str, name: str) -> str:
    """The file that a RUN trained, NAME.safetensors; a place that is no RUN is returned as it is."""
    file = Path(place) / f"{name}.safetensors"
    return str(file) if file.is_file() else place


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield whether Ctrl-C was pressed; the second press raises KeyboardInterrupt."""
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        print("stopping after this step; press again to stop at once", file=sys.stderr)

    try:
        before = signal.signal(signal.SIGINT, press)
    except ValueError:  # not in the main thread, where signals cannot be handled
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def require_writable(place: Path) -> None:
    """Raise a `StorageError` now rather than after minutes if a file or folder cannot be written."""
    folder = place if place.is_dir() else place.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise StorageError(f"cannot write {place}: {folder} is not a writable folder; choose another one")
