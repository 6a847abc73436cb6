"""`triptych info`"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from triptych.cli.output import count, facts, print_json, shortened


@dataclass(frozen=True, kw_only=True)
class Info:
    """Say what a checkpoint is, without loading it: format, network, preprocessing, classes, and how each is
    known.

    Reads .safetensors, .bin, .pth, .pt and .npz, folders of them, training runs and hub ids. Nothing in a
    file is ever executed.
    """

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A model's file, folder, hub id or name, or a RUN folder."""
    json: bool = False
    """Print everything as JSON, every class name included."""

    def run(self) -> int:
        from triptych.weights import inspect

        found = inspect(self.file)
        if self.json:
            print_json(found, indent=1)
        else:
            facts(found["path"], described(found))
        return 0


def described(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The lines of `triptych info`: what, and in words. An empty pair is a gap."""
    yield (
        "file",
        f"{found['container']}, {found['tensors']} tensors, {count(found['bytes'])}B, {found['dtype']}",
    )
    for note in found["notes"]:
        yield "", note
    if found["format"] is None:
        yield "format", f"unknown; looks like {found['looks_like']}"
        return
    config, source = found["config"], found["facts"]
    yield "format", found["format"]
    yield "network", network(found["family"], config)
    yield "parameters", f"{found['parameters']:,}"
    if macs := multiply_accumulates(found["family"], config):
        yield "MACs", f"{count(macs)} an image of {'x'.join(map(str, config['image_size']))}"
    yield "fits", "yes, every tensor" if found["fits"] is None else found["fits"]
    yield "", ""
    p = found["preprocess"]
    how = f"centre crop of {p['crop']:.3g}" if p["mode"] == "crop" else p["mode"]
    yield "image", f"{p['size'][0]}x{p['size'][1]} (height x width), {how}, {p['interpolation']}"
    yield "mean, std", f"{_numbers(p['mean'])}   {_numbers(p['std'])}"
    names = found["classes"]["names"]
    some = (
        f": {', '.join(map(shortened, names[:4]))}{', ...' if len(names) > 4 else ''}"
        if names
        else ", without names"
    )
    yield "classes", f"{found['classes']['number']}{some}"
    for name, value in (found.get("figures") or {}).items():
        yield name, f"{value:.4g}"
    for name in ("license", "notes_of_card"):
        if found.get(name):
            yield name.split("_")[0], str(found[name])
    yield "", ""
    for fact, origin in source.items():
        yield f"{fact} from", origin


def network(family: str, c: dict[str, Any]) -> str:
    """A config in a line; what is not plain is said."""
    stride = f"patches of {c['patch_size']}" + (f" after a {c['stem']} stem" if c["stem"] != "patch" else "")
    words = [f"{stride}, width {c['embed_dim']}, {c['depth']} blocks, {c['num_heads']} heads"]
    words += [f"{c['registers']} registers"] if c["registers"] else []
    words += ["distilled"] if c["distill_token"] else []
    words += [f"{c['position']} positions"] if c["position"] != "learned" else []
    words += [f"{c['pool']} pooling"] if c["pool"] != "token" else []
    words += [f"{c['mlp']} MLP"] if c["mlp"] != "gelu" else []
    words += [f"{c['head']} head"] if c["num_classes"] and c["head"] != "linear" else []
    words += ["no head"] if not c["num_classes"] else []
    return f"{family}: {', '.join(words)}"


def multiply_accumulates(family: str, config: dict[str, Any]) -> int | None:
    from triptych.config import from_json
    from triptych.models.vit_config import ViTConfig, macs

    return macs(from_json(ViTConfig, config)) if family == "vit" else None


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)
