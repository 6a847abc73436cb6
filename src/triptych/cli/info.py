"""`triptych info`"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from triptych.cli.output import count, facts, print_json, shortened


@dataclass(frozen=True, kw_only=True)
class Info:
    """Describe a checkpoint without loading it: format, network, preprocessing, classes, and the source of each fact.

    Reads .safetensors, .bin, .pth, .pt and .npz, folders of them, training runs and hub ids. Nothing in a
    file is ever executed.
    """

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A model's file, folder, hub id or name, or a RUN folder."""
    json: bool = False
    """Print everything as JSON, including all class names."""

    def run(self) -> int:
        from triptych.weights import inspect

        info = inspect(self.file)
        if self.json:
            print_json(info, indent=1)
        else:
            facts(info["path"], described(info))
        return 0


def described(info: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The lines of `triptych info`: what, and in words. An empty pair is a gap."""
    yield (
        "file",
        f"{info['container']}, {info['tensors']} tensors, {count(info['bytes'])}B, {info['dtype']}",
    )
    for note in info["notes"]:
        yield "", note
    if (adapter := info.get("adapter")) is not None:
        yield from adapter_lines(adapter)
        return
    if info["format"] is None:
        yield "format", f"unknown; looks like {info['looks_like']}"
        return
    from triptych.cli.model_summary import describe
    from triptych.weights.mapping.families import from_json

    config, source = from_json(info["family"], info["config"]), info["facts"]
    known = describe(config)
    yield "format", info["format"]
    yield "network", f"{known.family}: {known.form}"
    yield "parameters", f"{info['parameters']:,}"
    if macs := multiply_accumulates(config, known.macs):
        yield "MACs", f"{count(macs)} per image of {known.size}"
    yield "fits", "yes, every tensor" if info["fits"] is None else info["fits"]
    yield "", ""
    p = info["preprocess"]
    resize = f"center crop of {p['crop']:.3g}" if p["mode"] == "crop" else p["mode"]
    yield "image", f"{p['size'][0]}x{p['size'][1]} (height x width), {resize}, {p['interpolation']}"
    yield "mean, std", f"{_numbers(p['mean'])}   {_numbers(p['std'])}"
    names = info["classes"]["names"]
    some = (
        f": {', '.join(map(shortened, names[:4]))}{', ...' if len(names) > 4 else ''}"
        if names
        else ", without names"
    )
    yield "classes", f"{info['classes']['number']}{some}"
    for name, value in (info.get("figures") or {}).items():
        yield name, f"{value:.4g}"
    for name in ("license", "notes_of_card"):
        if info.get(name):
            yield name.split("_")[0], str(info[name])
    yield "", ""
    for fact, origin in source.items():
        yield f"{fact} from", origin


def adapter_lines(adapter: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The lines of a LoRA."""
    titles = {"unet": "of the UNet", "text": "of the text encoder", "other": "of another part"}
    yield (
        "format",
        "LoRA, low-rank updates of another model; use both: generate --model MODEL --lora FILE",
    )
    yield "methods", ", ".join(f"{method} ({count} layers)" for method, count in adapter["methods"].items())
    yield "rank", ", ".join(map(str, adapter["ranks"])) or "full"
    yield "alpha", ", ".join(f"{alpha:g}" for alpha in adapter["alphas"]) or "that of the rank"
    yield "changes", ", ".join(f"{n} layers {titles[part]}" for part, n in adapter["layers"].items() if n)
    if adapter["words"]:
        yield "words", ", ".join(adapter["words"])
    for key, value in adapter["metadata"].items():
        yield key, shortened(value)


def multiply_accumulates(config: Any, closed: int | None) -> int | None:
    """In closed form, or of a segmenter counted on tensors without numbers."""
    from triptych.heads.config import SegmenterConfig

    if closed is not None or not isinstance(config, SegmenterConfig):
        return closed
    from triptych.metrics.cost import count_macs
    from triptych.network import on_meta_device
    from triptych.weights.mapping.families import build

    with on_meta_device():
        net = build(config)
    return count_macs(net, (1, config.in_channels, *config.image_size))


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)
