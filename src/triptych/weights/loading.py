"""`load` and `inspect`: find out by looking what a checkpoint is, then fill a network with it."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triptych.config import to_json
from triptych.diffusion.config import Prediction
from triptych.errors import UserError
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig, replaced_size
from triptych.network import Network, on_meta_device
from triptych.weights import native
from triptych.weights.files.checkpoint import CheckpointFile
from triptych.weights.files.opening import open_checkpoint
from triptych.weights.files.sanitize import printable
from triptych.weights.hub import locate
from triptych.weights.mapping import families
from triptych.weights.mapping.format import Format, Hints, Names, Reading, Weights, shapes_of
from triptych.weights.mapping.registry import all_formats
from triptych.weights.mapping.round_trip import Said, aside, hints_in, told
from triptych.weights.mapping.rules import Rule, plan, same, slab
from triptych.weights.resize import fine_tuning_head, resize_positions, resize_windows, windows_in

Source = str | os.PathLike[str]

# What a file that no reader takes looks like, by names that only it has.
_FAMILIAR = (
    ("pixel_level_module.", "a MaskFormer or Mask2Former"),
    ("decode_head.", "a segmentation network of another backbone or head"),
    ("attn.meta_mlp.", "timm's own SwinV2 (swinv2_cr)"),
    ("spatial_mlp", "a SwinMLP"),
    ("relative_position_bias_table", "a Swin Transformer (or BEiT)"),
    ("logit_scale", "a CLIP, or a Swin Transformer v2"),
    ("model.diffusion_model.", "a latent diffusion model"),
    ("first_stage_model.", "a latent diffusion model"),
    ("down_blocks.0.", "a diffusion UNet or autoencoder"),
    ("decoder_embed.", "a masked autoencoder with its decoder"),
    ("vision_model.", "a CLIP or SigLIP"),
    ("visual.", "a CLIP"),
    ("word_embeddings", "a language model"),
    ("layer1.0.conv1.", "a ResNet"),
    ("downsample_layers.", "a ConvNeXt"),
    ("stages.0.blocks.0.", "a ConvNeXt or another staged network"),
)


def load(
    source: Source,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    window_size: int | tuple[int, int] | Sequence[tuple[int, int]] | None = None,
    prediction: Prediction | None = None,
    weights: Weights | None = None,
) -> Network:
    """A network with the weights of a checkpoint, in evaluation mode, its `config` and `card` set.

    Format, family and sizes are found by looking at names and shapes; what these cannot tell comes from the
    config beside the file, else from the format's published conventions, which `inspect` lists.

    Args:
        source: a file (.safetensors, .bin, .pth, .pt, .npz), a folder that holds one (whole or in shards; a
            training run too), the name of a shipped model, or a hub id.
        num_classes: another number of classes: the head is replaced by `fine_tuning_head`, zero at the start.
        image_size: pixels, one number or (height, width): learned positions are moved by `resize_positions`.
        window_size: in cells, one number, (height, width), or one of these for each stage of a Swin, which is moved to
            them by `resize_windows`. Where neither tensors nor a config tell the windows (a bare SwinV2 of timm
            or transformers), it says what they are.
        prediction: what a latent diffusion model's UNet predicts, "eps" or "v": a single file of Stable Diffusion 2
            does not tell. It holds above what a file says.
        weights: of a CompVis file that holds the UNet twice, "ema" takes the running average (model_ema.*), "raw" what
            training left. None takes the average where the YAML beside the file does not say `use_ema: false`, and
            without a YAML the raw ones, as web UIs do.

    Raises:
        UserError: nothing there, damaged, of an unknown kind, or not exactly fitting; all offenders named.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    checkpoint = open_checkpoint(locate(source))
    reading, chosen, dtype = read(
        checkpoint, Hints(size, window_size, prediction=prediction, weights=weights)
    )
    if prediction is not None:
        if not isinstance(reading.config, LatentDiffusionConfig):
            kind = families.TITLES[reading.family]
            raise UserError(f"{checkpoint.path} is {kind}, which predicts no noise; leave prediction out")
        reading.config = predicting(reading.config, prediction)
    if window_size is not None and windows_in(reading.config) is None:
        kind = families.TITLES[reading.family]
        raise UserError(f"{checkpoint.path} is {kind}, which has no windows; leave window_size out")
    with on_meta_device():
        net = families.build(reading.config)
    fill(net, checkpoint, rules_for(net, reading), f"{checkpoint.path} read as {chosen}", dtype)
    if reading.finish is not None:
        reading.finish(net)
    origin = (
        f"{chosen}; preprocessing: {reading.facts['preprocess']}; class names: {reading.facts['classes']}"
    )
    net.card = reading.card if chosen == "triptych" else replace(reading.card, source=origin)
    if isinstance(reading.config, LatentDiffusionConfig):
        if size is not None:
            net.config = replaced_size(reading.config, size)
    elif size is not None and size != reading.config.image_size:
        resize_positions(net, size)
    if window_size is not None:
        resize_windows(net, window_size)
    if num_classes is not None and num_classes != getattr(reading.config, "num_classes", None):
        fine_tuning_head(net, num_classes)
    return net.eval()


def predicting(config: LatentDiffusionConfig, prediction: Prediction) -> LatentDiffusionConfig:
    """The config of a model whose UNet predicts something else."""
    return replace(config, process=replace(config.process, prediction=prediction))


def read(checkpoint: CheckpointFile, hints: Hints) -> tuple[Reading, str, torch.dtype | None]:
    """What a checkpoint is, its format's name, and the type its numbers are loaded in, if not their own."""
    if native.is_ours(checkpoint) and hints.weights != "ema":
        reading, dtype = native.read(checkpoint)
        return reading, "triptych", dtype
    names = Names(checkpoint)
    found = None if native.is_ours(checkpoint) else recognise(names)
    if hints.weights == "ema" and (found is None or found.name != "compvis"):
        raise UserError(f"{checkpoint.path} holds no averaged weights beside its own; leave weights out")
    if found is None:
        raise UserError(
            f"{checkpoint.path} is no network of a known format: it looks like {looks_like(names)}; "
            f"known are {', '.join(f.title for f in all_formats())}"
        )
    weights, said = _said_aside(checkpoint)
    try:
        if said:
            hints = replace(hints_in(said), weights=hints.weights)
        reading = found.read(names, hints)
        if said:
            reading.config = told(reading.config, said)
            reading.facts |= {name.split(".")[-1]: aside(weights).name for name in said}
        return reading, found.name, None
    except UserError as problem:
        line = str(problem)
        raise UserError(line if str(checkpoint.path) in line else f"{checkpoint.path}: {line}") from problem
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as problem:
        # Only the JSON beside the file is free-form enough to break a reader.
        raise UserError(
            f"{checkpoint.path} read as {found.title}: its config.json is damaged "
            f"({printable(problem)}); fetch it again"
        ) from problem


def _said_aside(checkpoint: CheckpointFile) -> tuple[Path, Said]:
    """The file of the weights, and what `export` put beside it; nothing where there is no such JSON."""
    files = {entry.path for entry in checkpoint.entries.values()}
    weights = files.pop() if len(files) == 1 else checkpoint.path
    path = aside(weights)
    if not path.is_file() or path.stat().st_size > 2**20:
        return weights, {}
    try:
        said = json.loads(path.read_text())["triptych"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return weights, {}  # somebody else's JSON
    return weights, said if isinstance(said, dict) else {}


def recognise(names: Names) -> Format | None:
    """The first format whose names these are."""
    return next((format for format in all_formats() if format.recognises(names)), None)


def looks_like(names: Names) -> str:
    """A guess at a foreign checkpoint, in words."""
    from triptych.weights.diffusion.lora import UP, layers_in  # with all tables of diffusion

    if layers_in(names.shapes) and any(map(names.any, UP)):
        return "a LoRA, which changes another model: give that one, and this with --lora"
    for part, what in _FAMILIAR:
        if any(part in name for name in names.shapes):
            return what
    return f"{len(names.shapes)} tensors such as {', '.join(printable(name, 80) for name in list(names.shapes)[:3])}"


def rules_for(net: nn.Module, reading: Reading) -> Sequence[Rule]:
    """How the tensors of a checkpoint become those of the network of its config."""
    return [same(name, name) for name in shapes_of(net)] if reading.rules is None else reading.rules


def fill(
    net: nn.Module,
    checkpoint: CheckpointFile,
    rules: Sequence[Rule],
    what: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Give every parameter of a network built on the meta device its tensor, one at a time.

    A tensor that needs no change stays mapped to the file; of one that does the pages are given back as soon
    as it is copied. So the peak is the weights and one tensor.

    Raises:
        UserError: see `plan`; or numbers that are not floating where a parameter needs them.
    """
    steps = plan(rules, checkpoint.shapes, shapes_of(net), what)
    parameters = dict(net.named_parameters())
    widest = dtype or _widest(checkpoint, steps, parameters)
    for step in steps:
        if step.restore is not None:
            made: tuple[Tensor, ...] = (step.restore(),)
        else:
            made = step.operation.forward(checkpoint.borrow([slab(name) for name in step.theirs]))
        for name, tensor in zip(step.ours, made, strict=True):
            owner, _, leaf = name.rpartition(".")
            module = net.get_submodule(owner)
            if name not in parameters:
                kind = widest if tensor.is_floating_point() else tensor.dtype
                setattr(module, leaf, tensor.to(kind, copy=True))
                continue
            if not tensor.is_floating_point():
                raise UserError(
                    f"{what}: {', '.join(step.theirs)} holds {tensor.dtype}; needed are floating numbers"
                )
            setattr(module, leaf, nn.Parameter(_own(tensor.to(widest), checkpoint.borrowed_from_file)))
    left = [name for name, t in (*net.named_parameters(), *net.named_buffers()) if t.is_meta]
    if left:
        raise RuntimeError(f"{type(net).__name__} keeps {left} outside its state; build them at forward")


def _own(tensor: Tensor, pages: bool) -> Tensor:
    """A tensor that lies row by row in memory no other tensor uses: pages of the file, or a storage of its own."""
    tensor = tensor.contiguous()
    return tensor if pages or tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _widest(checkpoint: CheckpointFile, steps: Sequence[Rule], parameters: dict[str, Any]) -> torch.dtype:
    """The one type that all parameters get: their own, or where a file mixes several the widest."""
    kinds = {
        checkpoint.entries[slab(name)[0]].dtype
        for step in steps
        if any(name in parameters for name in step.ours)
        for name in step.theirs
    }
    widest = torch.float32 if not kinds else kinds.pop()
    for kind in kinds:
        widest = torch.promote_types(widest, kind)
    return widest


def inspect(source: Source) -> dict[str, Any]:
    """What a checkpoint is, without loading it: plain values, for `triptych info`.

    Returns:
        path, container, tensors, bytes, dtype, notes; and where it is a network we know: format, family,
        config, parameters, classes (number and names), preprocess, facts (where each came from), fits
        (None, or why not); else format None and looks_like, or for a LoRA adapter: ranks, alphas, how many layers of
        what it changes, and what its file says of itself.

    Raises:
        UserError: nothing there, or no checkpoint.
    """
    checkpoint = open_checkpoint(locate(source))
    kinds: dict[str, int] = {}
    for entry in checkpoint.entries.values():
        kind = str(entry.dtype).removeprefix("torch.")
        kinds[kind] = kinds.get(kind, 0) + entry.numel
    found: dict[str, Any] = {
        "path": str(checkpoint.path),
        "container": checkpoint.container,
        "tensors": len(checkpoint.entries),
        "bytes": sum(entry.nbytes for entry in checkpoint.entries.values()),
        "dtype": max(kinds, key=lambda kind: kinds[kind]),
        "notes": list(checkpoint.notes),
        "format": None,
    }
    names = Names(checkpoint)
    if not native.is_ours(checkpoint) and recognise(names) is None:
        from triptych.weights.diffusion.lora import lora_facts

        adapter = lora_facts(checkpoint)
        return found | ({"adapter": adapter} if adapter else {"looks_like": looks_like(names)})
    reading, chosen, _ = read(checkpoint, Hints())
    with on_meta_device():
        net = families.build(reading.config)
    try:
        plan(rules_for(net, reading), checkpoint.shapes, shapes_of(net), str(checkpoint.path))
        misfit = None
    except UserError as problem:
        misfit = str(problem)
    return found | {
        "format": chosen,
        "family": reading.family,
        "config": families.to_json(reading.config),
        "parameters": sum(p.numel() for p in net.parameters()),
        "classes": {
            "number": getattr(reading.config, "num_classes", 0),
            "names": list(reading.card.classes or ()),
        },
        "preprocess": to_json(reading.card.preprocess),
        "license": reading.card.license,
        "figures": dict(reading.card.figures),
        "notes_of_card": reading.card.notes,
        "facts": dict(reading.facts),
        "fits": misfit,
    }
