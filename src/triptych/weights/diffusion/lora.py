"""LoRA files for latent diffusion (Hu et al. 2021): kohya's, diffusers' and PEFT's names, merged into the weights.

```python
style = tp.load_lora(ldm, {"style.safetensors": 0.8, "detail.safetensors": 0.5})
style.undo()                            # restores every weight bit for bit
```

A LoRA names layers as diffusers (or, in some of kohya's, CompVis) does; the table of that publisher says which of our
parameters, or which third of one, each is.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triptych.errors import CheckpointError, near_names_hint
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.configs.text import TextConfig
from triptych.models.configs.unet import UNetConfig
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.weights.diffusion import text, unet
from triptych.weights.files.checkpoint import CheckpointFile
from triptych.weights.files.folder import SUFFIXES
from triptych.weights.files.opening import open_checkpoint
from triptych.weights.files.sanitize import printable
from triptych.weights.files.write import write_safetensors
from triptych.weights.mapping.rules import Rule, add_prefixes

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
LARGEST = 1e4  # a larger weight is a typing error


@dataclass(frozen=True)
class Place:
    """The location of a layer's weight in ours: rows of a parameter."""

    parameter: str
    first: int
    rows: int


@dataclass(frozen=True)
class Piece:
    """The update of one layer; its tensors are read when needed."""

    place: Place
    checkpoint: CheckpointFile = field(repr=False)
    down: str
    up: str
    mid: str | None
    scale: float

    def delta(self) -> Tensor:
        """Return scale * up @ down, in fp32."""
        down, up = self.checkpoint.read(self.down).float(), self.checkpoint.read(self.up).float()
        mid = None if self.mid is None else self.checkpoint.read(self.mid).float()
        if mid is not None:
            return self.scale * torch.einsum("or,rskl,si->oikl", up.flatten(1), mid, down.flatten(1))
        return self.scale * (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])


@dataclass
class Applied:
    """LoRAs merged into a network; `undo` removes them."""

    net: LatentDiffusion
    originals: dict[str, nn.Parameter] = field(default_factory=dict, repr=False)
    merged: dict[str, nn.Parameter] = field(default_factory=dict, repr=False)

    def undo(self) -> None:
        """Restore every weight bit for bit. A second call does nothing.

        Raises:
            CheckpointError: LoRAs that were merged later have not been undone.
        """
        if any(self.net.get_parameter(name) is not put for name, put in self.merged.items()):
            raise CheckpointError("another LoRA was merged after this one; undo that one first")
        for name, parameter in self.originals.items():
            _put(self.net, name, parameter)
        self.originals, self.merged = {}, {}


def load_lora(net: LatentDiffusion, files: Source | Mapping[Any, float]) -> Applied:
    """Merge LoRAs into a network: W + weight * alpha / rank * up @ down, summed in fp32.

    Changed layers get new parameters; the old ones are stored for `undo`. The order of several files does not matter.

    Args:
        net: its UNet and text encoder are changed.
        files: one file, or several with a weight each; a negative one takes the style away.

    Raises:
        CheckpointError: it is no latent diffusion model; a name that the network has no layer for, a half that is
            missing, or another family's shapes. Nothing is changed then.
    """
    if not isinstance(net, LatentDiffusion):
        raise CheckpointError(f"a LoRA changes a latent diffusion model, not a {type(net).__name__}")
    weights: Mapping[Any, float] = files if isinstance(files, Mapping) else {files: 1.0}
    places = _places(net)
    parameters = dict(net.named_parameters())
    pieces: dict[str, list[tuple[float, Piece]]] = {}
    for file, weight in sorted(weights.items(), key=lambda one: (Path(one[0]).name, str(one[0]))):
        if not abs(weight) <= LARGEST:
            raise CheckpointError(f"{file} has the weight {weight}, which must be a number such as 0.8")
        for piece in _pieces(Path(file), places, parameters):
            pieces.setdefault(piece.place.parameter, []).append((float(weight), piece))
    applied = Applied(net)
    with torch.no_grad():
        for name, of_it in pieces.items():
            old = parameters[name]
            total = torch.zeros(old.shape, dtype=torch.float32)
            for weight, piece in of_it:
                rows = total[piece.place.first : piece.place.first + piece.place.rows]
                rows += weight * piece.delta().view(rows.shape)
            merged = (old.float() + total.to(old.device)).to(old.dtype)
            applied.originals[name] = old
            applied.merged[name] = nn.Parameter(merged, requires_grad=old.requires_grad)
    for name, parameter in applied.merged.items():
        _put(net, name, parameter)
    return applied


def _put(net: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(owner), leaf, parameter)


def find_lora(name: str, folder: Source) -> Path:
    """Return the LoRA file called `name` (without suffix, case-insensitive) in a folder.

    Raises:
        CheckpointError: there is none; the message lists similar names.
    """
    here = Path(folder)
    if not here.is_dir():
        raise CheckpointError(
            f"no folder {here} to look for the LoRA {name!r} in; name one with --lora-dir (lora_dir=)"
        )
    files = {path.stem: path for path in sorted(here.iterdir(), reverse=True) if path.suffix in SUFFIXES}
    lower = {stem.lower(): path for stem, path in files.items()}
    if (path := files.get(name) or lower.get(name.lower())) is not None:
        return path
    contents = f"it holds {', '.join(list(files)[::-1][:6]) or 'none'}"
    hint = near_names_hint(name, files, otherwise=contents)
    raise CheckpointError(
        f"no LoRA is called {name!r} in {here}; {hint}; --lora-dir (lora_dir=) names another folder"
    )


def lora_hash(path: Source) -> str:
    """Return the hash by which AUTOMATIC1111's web UI identifies a LoRA: 12 digits of the SHA-256 of its tensors."""
    with Path(path).open("rb") as file:
        head = file.read(9)
        begin = int.from_bytes(head[:8], "little") + 8 if head[8:] == b"{" else 0
        file.seek(begin)
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def layer_names(config: LatentDiffusionConfig) -> dict[str, tuple[str, ...]]:
    """Return each of our weights, such as "network.middle.transformer.blocks.0.attn.qkv.weight", and its layers.

    The layers are stacked along the first axis, under the names that `save_kohya` takes.

    Raises:
        CheckpointError: the model has a DiT.
    """
    denoiser = _unet_of(config)
    layout = unet.Diffusers(len(denoiser.channel_multipliers), denoiser.num_res_blocks)
    rules = add_prefixes(unet.table(denoiser, layout), "unet.", "network.")
    if isinstance(config.text_encoder, TextConfig) and config.text_encoder.causal:
        rules += add_prefixes(
            text.table(config.text_encoder, text.HF), "text_encoder.text_model.", "text_encoder."
        )
    return {
        one.ours[0]: tuple(name.removesuffix(".weight") for name in one.theirs)
        for one in rules
        if one.ours and one.ours[0].endswith(".weight")
    }


def _unet_of(config: LatentDiffusionConfig) -> UNetConfig:
    if not isinstance(config.network, UNetConfig):
        raise CheckpointError("these LoRAs are changes to a UNet, and this model has a DiT")
    return config.network


def _places(net: LatentDiffusion) -> dict[str, Place]:
    """Return the location of each layer that a LoRA may name, with all separators as underscores."""
    config = net.config
    denoiser = _unet_of(config)
    count, depth = len(denoiser.channel_multipliers), denoiser.num_res_blocks
    tables: list[tuple[str, list[Rule], str]] = []
    for layout in (unet.CompVis(count, depth), unet.Diffusers(count, depth)):
        rules = unet.table(denoiser, layout)
        tables += [(prefix, rules, "network.") for prefix in ("lora_unet_", "unet_", "base_model_model_")]
    if (
        net.text_encoder is not None
        and isinstance(config.text_encoder, TextConfig)
        and config.text_encoder.causal
    ):
        for inner in ("text_model.", ""):
            rules = add_prefixes(text.table(config.text_encoder, text.HF), inner)
            tables += [
                (prefix, rules, "text_encoder.")
                for prefix in ("lora_te_", "text_encoder_", "base_model_model_")
            ]
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    places: dict[str, Place] = {}
    for prefix, rules, part in tables:
        for one in rules:
            if not one.ours or not one.ours[0].endswith("weight"):
                continue
            name = part + one.ours[0]
            rows = shapes[name][0] // len(one.theirs)
            if len(shapes[name]) < 2:
                continue
            for k, theirs in enumerate(one.theirs):
                places[_flat(prefix + theirs.removesuffix(".weight"))] = Place(name, k * rows, rows)
    return places


def _flat(name: str) -> str:
    """Return a layer's name in a form common to all dialects."""
    name = re.sub(r"\.processor(?=$|\.)", "", name).replace(".", "_")
    return re.sub(r"_to_out(?!_0)(?=$)", "_to_out_0", name)


def _pieces(file: Path, places: Mapping[str, Place], parameters: Mapping[str, Tensor]) -> list[Piece]:
    """Return the updates of a LoRA, layer by layer, after checking that every tensor of the file is used."""
    checkpoint = open_checkpoint(file)
    shapes, left = checkpoint.shapes, set(checkpoint.entries)
    alpha_scale = _alphas(file, checkpoint)
    layers = layers_in(shapes)
    if not layers:
        raise CheckpointError(f"{file} is no LoRA: no name ends in {', '.join(DOWN[:2])}; give a LoRA's file")
    pieces, unknown = [], []
    for down, base in layers.items():
        up = next((base + e for e in UP if base + e in left), None)
        if up is None:
            raise CheckpointError(f"{file} has {printable(down)} and not the other half; fetch it again")
        mid = base + MID if base + MID in left else None
        alpha = next((n for n in (f"{base}.alpha", f"{base}_lora.alpha") if n in left), None)
        left -= {down, up, mid, alpha}
        place = places.get(_flat(base))
        if place is None:
            unknown.append(base)
            continue
        needed = (place.rows, *parameters[place.parameter].shape[1:])
        shape = _product(shapes[down], shapes[up], None if mid is None else shapes[mid])
        if shape is None or shape[:2] != needed[:2] or math.prod(shape) != math.prod(needed):
            shown = f"{list(shapes[up])} x {list(shapes[down])}"
            raise CheckpointError(
                f"{file} is a LoRA of another family: {printable(base)} is {shown}, the layer here is {list(needed)}"
            )
        rank = shapes[down][0]
        scale = _scale(checkpoint, alpha, rank) if alpha else alpha_scale(base, rank)
        pieces.append(Piece(place, checkpoint, down, up, mid, scale))
    if unknown or left:
        names = sorted(unknown or left)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        problem = (
            "of another family or kind: this network has no layer"
            if unknown
            else "with more than this triptych merges: nothing reads"
        )
        raise CheckpointError(
            f"{file} is a LoRA {problem} {', '.join(map(printable, names[:3]))}{more}; give one made for this model"
        )
    return pieces


def layers_in(names: Iterable[str]) -> dict[str, str]:
    """Return the down projections among a LoRA's tensors, and the layers that they change."""
    ending = {name: next((e for e in DOWN if name.endswith(e)), None) for name in names}
    return {name: name.removesuffix(end) for name, end in ending.items() if end is not None}


def lora_facts(checkpoint: CheckpointFile) -> dict[str, Any] | None:
    """Describe a LoRA in plain values, for `triptych info`; None if the file is none.

    Returns:
        ranks and alphas (all different values), layers (their number in unet, text and other), metadata (the
        ss_* entries of the header).
    """
    layers, shapes = layers_in(checkpoint.entries), checkpoint.shapes
    if not layers or not all(any(base + e in shapes for e in UP) for base in layers.values()):
        return None
    counts = dict.fromkeys(("unet", "text", "other"), 0)
    for base in layers.values():
        text = re.match(r"(lora_te\d?|text_encoder(_2)?|te\d?)[._]", base)
        counts["text" if text else "unet" if re.match(r"(lora_)?unet[._]", base) else "other"] += 1
    alphas = [checkpoint.read(name) for name in checkpoint.entries if name.endswith(".alpha")]
    return {
        "kind": "lora",
        "ranks": sorted({shapes[down][0] for down in layers if shapes[down]}),
        "alphas": sorted({float(alpha.float().reshape(-1)[0]) for alpha in alphas if alpha.numel()}),
        "layers": counts,
        "metadata": {
            key: value for key, value in sorted(checkpoint.metadata.items()) if key.startswith("ss_")
        },
    }


def _scale(checkpoint: CheckpointFile, alpha: str, rank: int) -> float:
    value = checkpoint.read(alpha).float().reshape(-1)
    if value.numel() != 1 or not value.isfinite().all():
        raise CheckpointError(f"{checkpoint.path} has {printable(alpha)} that is no number; fetch it again")
    return float(value[0]) / rank


def _alphas(file: Path, checkpoint: CheckpointFile) -> Any:
    """Return a function (layer, rank) -> alpha / rank of PEFT's config, in the header or adapter_config.json; else
    1."""
    configs: list[tuple[str, Any]] = []
    try:
        adapter = json.loads(checkpoint.metadata.get("lora_adapter_metadata", "{}"))
        for part in ("unet", "text_encoder"):
            of_it = {k.removeprefix(f"{part}."): v for k, v in adapter.items() if k.startswith(f"{part}.")}
            configs.append((f"{part}.", of_it))
        folder = file if file.is_dir() else file.parent
        adapter_config = folder / "adapter_config.json"
        if adapter_config.is_file() and adapter_config.stat().st_size < 2**20:
            configs.append(("base_model.model.", json.loads(adapter_config.read_text())))
        known = [(prefix, _peft(config)) for prefix, config in configs]
    except (ValueError, TypeError, AttributeError, RecursionError) as problem:
        raise CheckpointError(
            f"{file}: the config of its adapter is damaged ({printable(problem)}); fetch it again"
        ) from problem

    def scale(base: str, rank: int) -> float:
        for prefix, (alpha, patterns, root) in known:
            if base.startswith(prefix) and (alpha is not None or patterns):
                inner = base.removeprefix(prefix)
                one = next((v for k, v in patterns.items() if inner.endswith(k.removeprefix("^"))), alpha)
                return 1.0 if one is None else one / (math.sqrt(rank) if root else rank)
        return 1.0

    return scale


def _peft(config: Any) -> tuple[float | None, dict[str, float], bool]:
    """Return lora_alpha, its exceptions by layer, and whether it is divided by the root of the rank (rsLoRA)."""
    alpha = config.get("lora_alpha")
    patterns = {str(name): float(value) for name, value in (config.get("alpha_pattern") or {}).items()}
    return None if alpha is None else float(alpha), patterns, bool(config.get("use_rslora"))


def _product(down: Sequence[int], up: Sequence[int], mid: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the shape of up x down; None if they do not match or are empty.

    For convolutions down has the kernel, or a third tensor between them."""
    if len(down) not in (2, 4) or len(up) not in (2, 4) or not all((*down, *up)):
        return None
    if mid is not None:
        fit = len(mid) == 4 and mid[0] == up[1] and mid[1] == down[0]
        pointwise = all(size == 1 for size in (*up[2:], *down[2:]))
        return (up[0], down[1], *mid[2:]) if fit and pointwise else None
    return (up[0], *down[1:]) if up[1] == down[0] and all(size == 1 for size in up[2:]) else None


def save_kohya(
    net: LatentDiffusion,
    path: Source,
    layers: Mapping[str, tuple[Tensor, Tensor, float]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA with kohya's keys.

    Args:
        net: the network that it is for.
        path: the .safetensors file to create or replace.
        layers: diffusers' name of a layer ("unet.mid_block.attentions.0.proj_in", "text_encoder.text_model...") ->
            down (r, i), up (o, r) and alpha.
        metadata: more of what kohya's scripts say of a file, by their keys (ss_*).

    Raises:
        CheckpointError: the network has no such layer.
    """
    places, tensors = _places(net), {}
    for name, (down, up, alpha) in layers.items():
        if _flat(name) not in places:
            raise CheckpointError(
                f"this network has no layer {name}; needed are diffusers' names, unet.* and text_encoder.*"
            )
        flat = re.sub("^text_encoder_", "lora_te_", re.sub("^unet_", "lora_unet_", _flat(name)))
        tensors[f"{flat}.lora_down.weight"] = down
        tensors[f"{flat}.lora_up.weight"] = up
        tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    write_safetensors(path, tensors, {"ss_network_module": "networks.lora", **(metadata or {})})
