"""LoRA files for latent diffusion (Hu et al. 2021) and their relatives, merged into the weights.

```python
style = tp.load_lora(ldm, {"style.safetensors": 0.8, "detail.safetensors": 0.5})
style.undo()                            # restores every weight bit for bit
```

LoRA, LoHa, LoKr, DoRA, GLoRA, (IA)^3 and differences of weights, under the names of kohya, LyCORIS, diffusers, PEFT,
ComfyUI and cloneofsimo; see `triptych.weights.diffusion.adapters`.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triptych.errors import CheckpointError, TriptychError, near_names_hint
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.text import TextEncoder, add_embedding
from triptych.weights.diffusion.adapters.layers import flat_name, layer_names, places_of
from triptych.weights.diffusion.adapters.numbered import is_numbered
from triptych.weights.diffusion.adapters.tensors import by_layer, methods, unnested
from triptych.weights.diffusion.adapters.updates import AdapterReader, Update
from triptych.weights.files.checkpoint import CheckpointFile
from triptych.weights.files.folder import SUFFIXES
from triptych.weights.files.write import write_safetensors

__all__ = [
    "Applied", "LoraWeight", "find_lora", "layer_names", "load_lora", "lora_facts", "lora_hash", "save_kohya",
]  # fmt: skip

Source = str | os.PathLike[str]
LoraWeight = float | tuple[float, float]
"""Weight of a file; or of its changes to the text encoder, and to the UNet."""
LARGEST = 1e4  # a larger weight is a typing error


@dataclass
class Applied:
    """LoRAs merged into a network; `undo` removes them."""

    net: LatentDiffusion
    originals: dict[str, nn.Parameter] = field(default_factory=dict, repr=False)
    merged: dict[str, nn.Parameter] = field(default_factory=dict, repr=False)
    words: tuple[str, ...] = ()
    """Words that the files brought, which prompts can use until `undo`."""
    _vocabulary: tuple[Any, Any, Any] | None = field(default=None, repr=False)

    def undo(self) -> None:
        """Restore every weight bit for bit. A second call does nothing.

        Raises:
            CheckpointError: LoRAs that were merged later have not been undone.
        """
        if any(self.net.get_parameter(name) is not put for name, put in self.merged.items()):
            raise CheckpointError("another LoRA was merged after this one; undo that one first")
        for name, parameter in self.originals.items():
            _put(self.net, name, parameter)
        if self._vocabulary is not None:
            encoder: Any = self.net.text_encoder
            encoder.tokens, encoder.config, encoder.tokenizer = self._vocabulary
        self.originals, self.merged, self.words, self._vocabulary = {}, {}, (), None

    def add_words(self, embeddings: Mapping[str, Tensor]) -> None:
        """Add words to the text encoder.

        Raises:
            CheckpointError: there is no text encoder, or a word does not fit it. Nothing is changed then.
        """
        encoder = self.net.text_encoder
        if not embeddings:
            return
        if not isinstance(encoder, TextEncoder):
            raise CheckpointError(
                f"the LoRA brings the word {next(iter(embeddings))!r}; this network reads no text"
            )
        before = encoder.tokens, encoder.config, encoder.tokenizer
        try:
            for word, vectors in embeddings.items():
                add_embedding(encoder, word, vectors)
        except TriptychError as problem:
            encoder.tokens, encoder.config, encoder.tokenizer = before
            raise CheckpointError(f"an embedding that the LoRA brings does not fit: {problem}") from problem
        self._vocabulary, self.words = before, tuple(embeddings)


def load_lora(net: LatentDiffusion, files: Source | Mapping[Any, LoraWeight]) -> Applied:
    """Merge LoRAs into a network: W + the sum of weight * change of W, in fp32 or better.

    The change is alpha / rank * up @ down for a LoRA, and what its method says for others; a DoRA's norms are those of
    the network without other files. Changed layers get new parameters; the old ones are stored for `undo`. The order of
    several files does not matter. Words that a file brings are added to the text encoder.

    Args:
        net: its UNet and text encoder are changed.
        files: one file, or several with a weight each; a negative one takes the style away. A pair of weights is for
            the text encoder and for the UNet.

    Raises:
        CheckpointError: it is no latent diffusion model; a name that the network has no layer for, a half that is
            missing, or another family's shapes. Nothing is changed then.
    """
    if not isinstance(net, LatentDiffusion):
        raise CheckpointError(f"a LoRA changes a latent diffusion model, not a {type(net).__name__}")
    weights: Mapping[Any, LoraWeight] = files if isinstance(files, Mapping) else {files: 1.0}
    reader = AdapterReader(net)
    updates: dict[str, list[tuple[float, Update]]] = {}
    embeddings: dict[str, Tensor] = {}
    for file, weight in sorted(weights.items(), key=lambda one: (Path(one[0]).name, str(one[0]))):
        of_text, of_unet = weight if isinstance(weight, tuple | list) else (weight, weight)
        if not all(abs(number) <= LARGEST for number in (of_text, of_unet)):
            raise CheckpointError(f"{file} has the weight {weight}, which must be a number such as 0.8")
        adapter = reader.read(Path(file))
        for update in adapter.updates:
            name = update.place.parameter
            part = of_text if name.startswith("text_encoder.") else of_unet
            updates.setdefault(name, []).append((float(part), update))
        embeddings |= adapter.embeddings
    applied = Applied(net)
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        for name, of_it in updates.items():
            applied.originals[name] = parameters[name]
            applied.merged[name] = _merged(parameters[name], of_it)
    applied.add_words(embeddings)
    for name, parameter in applied.merged.items():
        _put(net, name, parameter)
    return applied


def _merged(old: nn.Parameter, updates: list[tuple[float, Update]]) -> nn.Parameter:
    """Return a parameter with its updates, summed on the CPU in fp32, or in fp64 if it is."""
    exact = old.detach().to("cpu", torch.promote_types(old.dtype, torch.float32))
    total = torch.zeros_like(exact)
    for weight, update in updates:
        rows = slice(update.place.first, update.place.first + update.place.rows)
        total[rows] += weight * update.delta(exact[rows])
    merged = (old.to(total.dtype) + total.to(old.device)).to(old.dtype)
    return nn.Parameter(merged, requires_grad=old.requires_grad)


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


def lora_facts(checkpoint: CheckpointFile) -> dict[str, Any] | None:
    """Describe a LoRA of any method in plain values, for `triptych info`; None if the file is none.

    Returns:
        methods (of each the number of layers), ranks and alphas (all different values), layers (their number in unet,
        text and other), words (that it brings), metadata (the ss_* entries of the header).
    """
    checkpoint = unnested(checkpoint)
    shapes = checkpoint.shapes
    if is_numbered(shapes) and all(len(shape) in (2, 4) for shape in shapes.values()):
        count = sum(1 for name in shapes if name.endswith(":up")) or len(shapes) // 2
        ranks = {min(shape[:2]) for shape in shapes.values()}
        return _facts(checkpoint, {"LoRA": count}, ranks, {"other": count})
    if not (counts_by_method := methods(shapes)):
        return None
    counts: dict[str, int] = {"unet": 0, "text": 0, "other": 0}
    ranks = set()
    for layer in by_layer(shapes)[0]:
        if (formula := layer.formula) is None:
            continue
        text = re.match(r"(lora_te\d?|text_encoder(_2|s\.clip_\w)?|te\d?)[._]", layer.base)
        unet = re.match(r"(lora_)?unet[._]|(model\.)?diffusion_model\.", layer.base)
        counts["text" if text else "unet" if unet else "other"] += 1
        ranks.add(formula.rank({role: shapes[name] for role, name in layer.of_weight.items()}))
    return _facts(checkpoint, counts_by_method, ranks - {None}, counts)


def _facts(
    checkpoint: CheckpointFile, by_method: dict[str, int], ranks: set[Any], layers: dict[str, int]
) -> dict[str, Any]:
    alphas = [checkpoint.read(name) for name in checkpoint.entries if name.endswith(".alpha")]
    words = {name.split(".")[1] for name in checkpoint.entries if name.startswith("bundle_emb.")}
    return {
        "kind": "lora",
        "methods": by_method,
        "ranks": sorted(ranks),
        "alphas": sorted({float(alpha.float().reshape(-1)[0]) for alpha in alphas if alpha.numel()}),
        "layers": dict.fromkeys(("unet", "text", "other"), 0) | layers,
        "words": sorted(words),
        "metadata": {
            key: value for key, value in sorted(checkpoint.metadata.items()) if key.startswith("ss_")
        },
    }


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
    places, tensors = places_of(net), {}
    for name, (down, up, alpha) in layers.items():
        if flat_name(name) not in places:
            raise CheckpointError(
                f"this network has no layer {name}; needed are diffusers' names, unet.* and text_encoder.*"
            )
        flat = re.sub("^text_encoder_", "lora_te_", re.sub("^unet_", "lora_unet_", flat_name(name)))
        tensors[f"{flat}.lora_down.weight"] = down
        tensors[f"{flat}.lora_up.weight"] = up
        tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    write_safetensors(path, tensors, {"ss_network_module": "networks.lora", **(metadata or {})})
