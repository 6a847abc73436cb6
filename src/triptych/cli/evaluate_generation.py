"""`triptych evaluate` of what paints: latent diffusion models, and folders of pictures that anything made."""

import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.cli.output import SHIPPED, plain, print_json, table, waiting
from triptych.cli.parsing import height_width
from triptych.errors import UserError

if TYPE_CHECKING:
    from triptych.cli.evaluate import Evaluate
    from triptych.data.config import DataConfig
    from triptych.data.source import Source
    from triptych.evaluation.generation import Asked
    from triptych.pipelines.diffusion.pipeline import DiffusionPipeline

FOLDER = "a folder of pictures"
FAMILIES = ("latent-diffusion", FOLDER)
SAMPLES, BATCH = 1000, 64
PIXELS = BATCH * 64 * 64  # of the pictures that are painted in one pass, if nobody says how many
WORDS = {
    "frechet": "Fréchet distance",
    "frechet_floor": "  of perfect ones, at this count",
    "kernel": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "inception_score": "Inception score",
    "psnr": "PSNR",
    "ssim": "SSIM",
}


def family(args: "Evaluate") -> str | None:
    """What is to be measured.

    Raises:
        UserError: nothing is named, or nothing there.
    """
    if args.samples and not args.samples.isdecimal():
        if args.model:
            raise UserError(
                f"--samples {args.samples} is a folder, and {args.model} would paint pictures; give one of the two"
            )
        return FOLDER
    if not args.model:
        raise UserError(
            "triptych evaluate needs MODEL-or-RUN, or --samples DIR; see triptych evaluate --help"
        )
    from triptych.weights import inspect

    return inspect(args.model).get("family")


def run(args: "Evaluate", what: str) -> int:
    """Measure, write metrics.json where --out or a RUN folder says, and print."""
    started = time.perf_counter()
    figures = {FOLDER: of_folder, "latent-diffusion": of_model}[what](args)
    figures["left_out"] = figures.pop("bad")
    figures |= {"data": args.data, "split": args.split, "seconds": time.perf_counter() - started}
    out = args.out or (
        Path(args.model) if args.model and (Path(args.model) / "log.jsonl").is_file() else None
    )
    if out is not None:
        from triptych.atomic_write import write_text_atomically

        text = json.dumps(plain(figures), indent=1, ensure_ascii=False) + "\n"
        write_text_atomically(out / "metrics.json", text)
    if args.json:
        print_json(figures, indent=1)
    else:
        show(figures)
        print(f"{out}: metrics.json" if out else "--out FOLDER writes it down, --json prints all of it")
    return 0


def of_model(args: "Evaluate") -> dict[str, Any]:
    """Pictures that the model paints from the data's captions or classes, beside the data."""
    from triptych.evaluation.feature_extractor import open_extractor
    from triptych.evaluation.generation import ask, evaluate_generation
    from triptych.pipelines.diffusion.pipeline import DiffusionPipeline

    count = int(args.samples or SAMPLES)
    source, loading = opened(args)
    pipe = DiffusionPipeline(
        args.model, None, None if args.dtype == "auto" else args.dtype, compile=args.compile
    )
    size = height_width(args.size) if args.size else None
    extractor = open_extractor(args.extractor or SHIPPED, picture=size or pipe.config.image_size)
    asked = ask(pipe.config, pipe.card, source, count, args.seed)
    look = {"steps": args.steps, "guidance": args.guidance, "sampler": args.sampler, "size": size}
    height, width = size or pipe.config.image_size
    at_once = args.batch_size or max(1, min(BATCH, PIXELS // (height * width)))
    pictures = painted(pipe, asked, at_once, look)
    first = next(pictures)  # what is wrong with the settings shows before the real pictures are looked at
    found = evaluate_generation(
        waiting(itertools.chain([first], pictures), count, "painting"),
        extractor,
        source,
        asked=asked,
        reference_file=args.reference,
        classifier=classifier_of(args, source, asked),
        name=args.data,
        loading=loading,
        progress=reading,
    )
    return found | {"model": args.model, "weights": pipe.weights, "seed": args.seed, **look}


def of_folder(args: "Evaluate") -> dict[str, Any]:
    """Pictures that are there, beside others."""
    from triptych.evaluation.feature_extractor import open_extractor
    from triptych.evaluation.generation import evaluate_generation
    from triptych.pipelines.image_input import images_below

    if not Path(args.samples).is_dir():
        raise UserError(f"--samples {args.samples} is neither a number nor a folder of pictures")
    files = list(images_below(args.samples))
    if len(files) < 2:
        raise UserError(
            f"--samples {args.samples} has {len(files)} pictures below it; a distance needs 2 at least"
        )
    if args.classifier not in ("", "none"):
        raise UserError("nobody knows what pictures of a folder were to show; leave --classifier out")
    source, loading = opened(args)
    picture = height_width(args.size) if args.size else sizes(files)
    extractor = open_extractor(args.extractor or SHIPPED, picture=picture)
    found = evaluate_generation(
        waiting(files, len(files), "looking at samples"),
        extractor,
        source,
        reference_file=args.reference,
        name=args.data,
        loading=loading,
        progress=reading,
    )
    return found | {"samples": args.samples}


def painted(
    pipe: "DiffusionPipeline", asked: Sequence["Asked"], batch_size: int, look: dict[str, Any]
) -> Iterator[Any]:
    """The pictures in order, each from its own seed. Captions are taken as they are, not as the grammar of prompts; in
    one pass are those whose contexts are equally long, so that none depends on what is painted beside it."""
    from triptych.models.tokenization.prompt_syntax import literal
    from triptych.pipelines.diffusion.prepare import reads
    from triptych.pipelines.diffusion.settings import Settings

    kind = reads(pipe.config)
    task = {"prompts": "text_to_image", "classes": "class_conditional", "nothing": "unconditional"}[kind]
    each = [
        Settings(task=task, prompt=literal(one.prompt), label=one.label, seed=one.seed, **look)  # type: ignore[arg-type]
        for one in asked
    ]
    long = [pipe.net.text.chunks(one.prompt) if kind == "prompts" else 1 for one in each]
    first = 0
    for at in range(1, len(each) + 1):
        if at == len(each) or at - first == batch_size or long[at] != long[first]:
            yield from pipe.make(each[first:at], batch_size=at - first, progress=False)
            first = at


def opened(args: "Evaluate") -> "tuple[Source | None, DataConfig]":
    """The real pictures, if any are named, and how they are loaded: all of them, or the split that is trained on, which
    is what a generator is to be like."""
    from triptych.data.config import DataConfig
    from triptych.data.open import open_source

    loading = DataConfig(
        eval_batch_size=args.batch_size or BATCH,
        workers=args.workers,
        on_bad_image=args.on_bad_image,
        image_column=args.image_column,
        label_column=args.label_column,
        caption_column=args.caption_column,
    )
    data = args.data or data_of_run(args.model)
    if not data and args.reference is None:
        raise UserError("no data was named; give --data, a folder of real pictures, or a --reference file")
    return (open_source(data, args.split or None, **loading.columns) if data else None), loading


def data_of_run(model: str) -> str:
    """What a RUN folder was trained on; nothing of anything else."""
    path = Path(model) / "config.json"
    if not model or not path.is_file():
        return ""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return ""
    return str(said.get("data", "")) if isinstance(said, dict) and "loading" in said else ""


def classifier_of(args: "Evaluate", source: "Source | None", asked: Sequence["Asked"]) -> Any:
    """The one that is named; the shipped one where it knows the data's classes and pictures were to show them."""
    if args.classifier == "none":
        return None
    from triptych.weights import load

    if args.classifier:
        return load(args.classifier)
    if source is None or source.labels is None or any(one.row is None for one in asked):
        return None
    shipped = load(SHIPPED)
    return shipped if set(source.classes or ()) <= set(shipped.card.classes or ()) else None


def sizes(files: Sequence[Path]) -> tuple[int, int] | None:
    """The height and width that all pictures have; None where they differ."""
    from triptych.data.images import image_errors as reading_file
    from triptych.data.images import open_image

    found = set()
    for file in files:
        with reading_file(str(file)):
            image = open_image(file, str(file))
            found.add((image.height, image.width))
        if len(found) > 1:
            return None
    return found.pop()


def reading(batches: Any, total: int) -> Any:
    return waiting(batches, total, "looking at real pictures")


def show(figures: dict[str, Any]) -> None:
    """The figures, how they were measured, and what cannot be seen from them."""
    rows = []
    for name, words in WORDS.items():
        if name in figures:
            spread = figures.get(f"{name}_std")
            rows.append((words, f"{figures[name]:.4g}" + (f" ± {spread:.2g}" if spread is not None else "")))
    rows.append(("pictures", f"{figures['count']:,}"))
    rows.append(("real ones", f"{figures['real_count']:,}"))
    table("", {"figure": "left", "": "right"}, rows)
    if "faithfulness" in figures:
        generated, real = (figures["faithfulness"][side] for side in ("generated", "real"))
        names = {name: "class" if name == "top1" else name for name in generated}
        shares = ((names[n], f"{generated[n]:.1%}", f"{real[n]:.1%}") for n in generated)
        table("what it was to show is found", {"": "left", "generated": "right", "real": "right"}, shares)
    how = figures["identity"]
    print(
        f"features of {figures['extractor']} ({how['extractor']['layer']}, {figures['dimensions']} numbers); protocol "
        f"{figures['protocol']}: compare with figures of the same one"
    )
    for name, why in figures["left_out"].items():
        print(f"left out: {name}: {why}", file=sys.stderr)
