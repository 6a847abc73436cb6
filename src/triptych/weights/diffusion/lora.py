"""LoRA files for latent diffusion (Hu et al. 2021): kohya's, diffusers' and PEFT's names, merged into the weights.

```python
with_style = apply(ldm, {"style.safetensors": 0.8, "detail.safetensors": 0.5})
with_style.undo()                       # every weight is again what it was, bit for bit
```

A LoRA names layers as diffusers (or, in some of kohya's, CompVis) does; the table of that publisher says which of our
parameters, or which third of one, each is.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.errors import UserError
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.text_config import TextConfig
from triptych.weights.diffusion import text, unet
from triptych.weights.diffusion.tables import inside
from triptych.weights.files import open_checkpoint
from triptych.weights.legible import legible
from triptych.weights.rules import Rule
from triptych.weights.writers import write_safetensors

Source = str | os.PathLike[str]

DOWN = (
    ".lora_down.weight",
    ".lora_A.weight",
    ".lora_A.default.weight",
    ".lora.down.weight",
    "_lora.down.weight",
)
UP = (".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight", "_lora.up.weight")
MID = ".lora_mid.weight"


@dataclass(frozen=True)
class Place:
    """Where a layer's weight lies in ours: rows of a parameter."""

    parameter: str
    first: int
    rows: int


@dataclass
class Applied:
    """LoRAs merged into a network; `undo` takes them out again."""

    net: LatentDiffusion
    originals: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def undo(self) -> None:
        """Every weight as it was before, bit for bit. A second call changes nothing."""
        parameters = dict(self.net.named_parameters())
        for name, tensor in self.originals.items():
            parameters[name].copy_(tensor)
        self.originals = {}


@torch.no_grad()
def apply(net: LatentDiffusion, files: Source | Mapping[Any, float]) -> Applied:
    """Merge LoRAs into a network, in place: W + weight * alpha / rank * up @ down, summed in fp32.

    Args:
        net: its UNet and text encoder are changed.
        files: one file, or several with a weight each; a negative one takes the style away.

    Raises:
        UserError: a name that the network has no layer for, a half that is missing, or another family's shapes.
            Nothing is changed then.
    """
    weights: Mapping[Any, float] = files if isinstance(files, Mapping) else {files: 1.0}
    places = _places(net)
    parameters = dict(net.named_parameters())
    sums: dict[str, Tensor] = {}
    for file, weight in weights.items():
        for place, delta in _deltas(Path(file), places, parameters):
            whole = sums.setdefault(
                place.parameter, torch.zeros_like(parameters[place.parameter], dtype=torch.float32)
            )
            rows = whole[place.first : place.first + place.rows]
            rows += weight * delta.view(rows.shape).to(rows.device)
    applied = Applied(net)
    for name, delta in sums.items():
        applied.originals[name] = parameters[name].detach().clone()
        parameters[name].copy_(parameters[name].float() + delta)
    return applied


def _places(net: LatentDiffusion) -> dict[str, Place]:
    """A LoRA's name of a layer, with every separator an underscore -> where its weight lies."""
    config = net.config
    count, depth = len(config.unet.multipliers), config.unet.depth
    tables: list[tuple[str, list[Rule], str]] = []
    for layout in (unet.CompVis(count, depth), unet.Diffusers(count, depth)):
        tables += [(prefix, unet.table(config.unet, layout), "unet.") for prefix in ("lora_unet_", "unet_")]
    if isinstance(config.text, TextConfig) and config.text.causal:
        for inner in ("text_model.", ""):
            rules = inside(text.table(config.text, text.HF), inner)
            tables += [(prefix, rules, "text.") for prefix in ("lora_te_", "text_encoder_")]
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    found: dict[str, Place] = {}
    for prefix, rules, part in tables:
        for one in rules:
            if not one.ours or not one.ours[0].endswith("weight"):
                continue
            name = part + one.ours[0]
            rows = shapes[name][0] // len(one.theirs)
            if len(shapes[name]) < 2:
                continue
            for k, theirs in enumerate(one.theirs):
                found[_flat(prefix + theirs.removesuffix(".weight"))] = Place(name, k * rows, rows)
    return found


def _flat(name: str) -> str:
    """A layer's name in any of the dialects, alike."""
    name = re.sub(r"\.processor(?=$|\.)", "", name).replace(".", "_")
    return re.sub(r"_to_out(?!_0)(?=$)", "_to_out_0", name)


def _deltas(
    file: Path, places: Mapping[str, Place], parameters: Mapping[str, Tensor]
) -> list[tuple[Place, Tensor]]:
    """What a LoRA adds, layer by layer; every tensor of the file is used."""
    checkpoint = open_checkpoint(file)
    left = set(checkpoint.entries)
    layers: dict[str, str] = {}
    for name in checkpoint.entries:
        ending = next((e for e in DOWN if name.endswith(e)), None)
        if ending is not None:
            layers[name] = name.removesuffix(ending)
    if not layers:
        raise UserError(f"{file} is no LoRA: no name ends in {', '.join(DOWN[:2])}; give a LoRA's file")
    found, strangers = [], []
    for down, base in layers.items():
        up = next((base + e for e in UP if base + e in left), None)
        if up is None:
            raise UserError(f"{file} has {legible(down)} and not the other half; fetch it again")
        mid, alpha = base + MID, next((n for n in (f"{base}.alpha", f"{base}_lora.alpha") if n in left), None)
        left -= {down, up, mid, alpha or down}
        place = places.get(_flat(base))
        if place is None:
            strangers.append(base)
            continue
        a, b = checkpoint.read(down).float(), checkpoint.read(up).float()
        whole = tuple(parameters[place.parameter].shape)
        needed = (place.rows, *whole[1:])
        rank = a.shape[0] if a.ndim else 0
        scale = float(checkpoint.read(alpha).float().reshape(-1)[0]) / max(rank, 1) if alpha else 1.0
        delta = _product(a, b, checkpoint.read(mid).float() if mid in checkpoint.entries else None)
        if delta is None or delta.numel() != torch.Size(needed).numel() or delta.shape[:2] != needed[:2]:
            shown = f"{list(b.shape)} x {list(a.shape)}"
            raise UserError(
                f"{file} is a LoRA of another family: {legible(base)} is {shown}, the layer here is {list(needed)}"
            )
        found.append((place, scale * delta))
    if strangers or left:
        names = sorted(strangers or left)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        kind = (
            "of another family or kind: this network has no layer" if strangers else "damaged: nothing reads"
        )
        raise UserError(
            f"{file} is a LoRA {kind} {', '.join(map(legible, names[:3]))}{more}; give one made for this model"
        )
    return found


def _product(a: Tensor, b: Tensor, mid: Tensor | None) -> Tensor | None:
    """up x down; of convolutions down has the kernel, or a third tensor between them. None if they do not fit."""
    if (
        a.ndim not in (2, 4)
        or b.ndim not in (2, 4)
        or b.shape[1] != (a.shape[0] if mid is None else mid.shape[0])
    ):
        return None
    if mid is not None:
        return torch.einsum("or,rskl,si->oikl", b.flatten(1), mid, a.flatten(1)) if mid.ndim == 4 else None
    return (b.flatten(1) @ a.flatten(1)).view(b.shape[0], *a.shape[1:])


def save_kohya(
    net: LatentDiffusion, path: Source, layers: Mapping[str, tuple[Tensor, Tensor, float]]
) -> None:
    """Write a LoRA in kohya's names.

    Args:
        net: the network that it is for.
        path: the .safetensors to make or replace.
        layers: diffusers' name of a layer ("unet.mid_block.attentions.0.proj_in", "text_encoder.text_model...") ->
            down (r, i), up (o, r) and alpha.

    Raises:
        UserError: the network has no such layer.
    """
    places, tensors = _places(net), {}
    for name, (down, up, alpha) in layers.items():
        if _flat(name) not in places:
            raise UserError(
                f"this network has no layer {name}; needed are diffusers' names, unet.* and text_encoder.*"
            )
        flat = re.sub("^text_encoder_", "lora_te_", re.sub("^unet_", "lora_unet_", _flat(name)))
        tensors[f"{flat}.lora_down.weight"] = down
        tensors[f"{flat}.lora_up.weight"] = up
        tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    write_safetensors(path, tensors, {"ss_network_module": "networks.lora"})
