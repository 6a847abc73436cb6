"""The updates in an adapter's file: of which rows of which parameter, by which formula, at which scale."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from triptych.errors import CheckpointError
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.weights.diffusion.adapters import numbered
from triptych.weights.diffusion.adapters.formulas import FULL, SAVED, Formula, Shape, fits, normalized_like
from triptych.weights.diffusion.adapters.layers import Place, flat_name, places_of
from triptych.weights.diffusion.adapters.peft_config import ConfigScale, config_scale
from triptych.weights.diffusion.adapters.tensors import BIASES, LayerTensors, by_layer, foreign, unnested
from triptych.weights.files.checkpoint import CheckpointFile
from triptych.weights.files.opening import open_checkpoint
from triptych.weights.files.sanitize import printable

BUNDLED = "bundle_emb."
# Parts of layers' names -> the family of models that has them.
MODELS_BY_LAYER = (
    ("lora_te2_", "Stable Diffusion XL"),
    ("text_encoder_2", "Stable Diffusion XL"),
    ("input_blocks_8_1_transformer_blocks_9", "Stable Diffusion XL"),
    ("joint_blocks", "Stable Diffusion 3"),
    ("joint_transformer_blocks", "Stable Diffusion 3"),
    ("double_blocks", "FLUX"),
    ("single_transformer_blocks", "FLUX"),
)
METHODS = "LoRA, LoHa, LoKr, DoRA, GLoRA, (IA)^3 and differences of weights"


@dataclass(frozen=True)
class Update:
    """The change of one layer's weight or bias; its tensors are read when needed."""

    place: Place
    checkpoint: CheckpointFile = field(repr=False)
    formula: Formula
    tensors: Mapping[str, str]
    """Role -> name."""
    scale: float
    magnitude: str | None = None
    """The tensor of DoRA's norms."""
    by_input: bool = False
    """Whether those are norms of inputs."""

    def delta(self, weight: Tensor) -> Tensor:
        """Return the change of a layer's weight, at weight 1, in the weight's dtype and shape.

        Raises:
            CheckpointError: values that shapes do not show, such as a flag, do not fit.
        """

        def read(name: str) -> Tensor:
            return self.checkpoint.read(name).to(weight.dtype)

        tensors = {role: read(name) for role, name in self.tensors.items()}
        try:
            change = self.scale * self.formula.delta(tensors, weight).reshape(weight.shape)
        except RuntimeError as problem:
            raise CheckpointError(
                f"{self.checkpoint.path} is a {self.formula.title} of another family: {printable(problem)}"
            ) from problem
        if self.magnitude is None:
            return change
        return normalized_like(weight + change, read(self.magnitude), self.by_input) - weight


@dataclass
class Adapter:
    """An adapter's file, all of whose tensors are understood."""

    updates: list[Update]
    embeddings: dict[str, Tensor]
    """Words that it brings, with their vectors (n, D)."""


class AdapterReader:
    """Reads adapters for one network.

    Args:
        net: what the adapters are for.
    """

    def __init__(self, net: LatentDiffusion):
        self.config, self.places = net.config, places_of(net)
        self.shapes: dict[str, Shape] = {name: tuple(p.shape) for name, p in net.named_parameters()}

    def read(self, file: Path) -> Adapter:
        """Return the updates of a file, after checking that every one of its tensors is used.

        Raises:
            CheckpointError: it is no adapter; a name that the network has no layer for, a part that is missing, or
                another family's shapes.
        """
        checkpoint = unnested(open_checkpoint(file))
        shapes = dict(checkpoint.shapes)
        embeddings, used = _embeddings(file, checkpoint)
        names = [name for name in shapes if name not in used]
        if numbered.is_numbered(shapes):
            layers = numbered.numbered_layers(file, shapes, self.config, self._layer_shape)
            in_layers = {name for layer in layers for name in layer.roles.values()}
            left = [name for name in names if name not in in_layers]
        else:
            layers, left = by_layer(names)
        config = config_scale(file, checkpoint)
        if not layers or not any(layer.of_weight or layer.roles.keys() & {"bias"} for layer in layers):
            raise CheckpointError(
                f"{file} is no LoRA: {_other_method(names)}; give a LoRA's file (merged are {METHODS})"
            )
        updates: list[Update] = []
        unknown: list[str] = []
        for layer in layers:
            result = self._updates(file, checkpoint, layer, config)
            if result is None:
                unknown.append(layer.base)
            else:
                updates += result[0]
                left += result[1]
        _refuse_strangers(file, unknown, left)
        return Adapter(updates, embeddings)

    def _layer_shape(self, name: str) -> Shape | None:
        place = self.places.get(flat_name(name))
        return None if place is None else (place.rows, *self.shapes[place.parameter][1:])

    def _updates(
        self, file: Path, checkpoint: CheckpointFile, layer: LayerTensors, config: ConfigScale
    ) -> tuple[list[Update], list[str]] | None:
        """Return a layer's updates and the tensors that nothing reads; None if the network has no such layer."""
        flat = flat_name(layer.base)
        place, bias_place = self.places.get(flat), self.places.get(f"{flat}.bias")
        formula, roles = layer.formula, layer.roles
        if formula is None and (started := layer.started) is not None:
            first = next(iter(layer.of_weight.values()))
            raise CheckpointError(
                f"{file} has {printable(first)} and not the other half of that {started.title}; fetch it again"
            )
        if formula is None and not roles.keys() & (BIASES - {"up_bias"}):
            return [], list(roles.values())
        if place is None:
            return None
        updates, scale, used = [], 1.0, set[str]()
        if formula is not None:
            tensors = layer.of_weight
            needed = (place.rows, *self.shapes[place.parameter][1:])
            shapes = {role: tuple(checkpoint.shapes[name]) for role, name in tensors.items()}
            if not fits(formula.shape(shapes, needed), needed):
                raise CheckpointError(_misfit(file, formula, layer.base, shapes, needed))
            scale = self._scale(checkpoint, layer, formula, config)
            magnitude, by_input = self._magnitude(file, checkpoint, layer, needed)
            updates.append(Update(place, checkpoint, formula, tensors, scale, magnitude, by_input))
            used = {*tensors.values(), *(n for n in (roles.get("alpha"), magnitude) if n)}
        for role in BIASES & roles.keys():
            name = roles[role]
            if bias_place is None or checkpoint.shapes[name] != (bias_place.rows,):
                shown = list(checkpoint.shapes[name])
                raise CheckpointError(
                    f"{file} is a LoRA of another family: {printable(name)} is {shown}, "
                    f"the bias here is {[bias_place.rows] if bias_place else 'missing'}"
                )
            method, part = (SAVED, "saved") if role == "saved_bias" else (FULL, "diff")
            bias_scale = scale if role == "up_bias" else 1.0
            updates.append(Update(bias_place, checkpoint, method, {part: name}, bias_scale))
            used.add(name)
        return updates, [name for name in roles.values() if name not in used]

    def _scale(
        self, checkpoint: CheckpointFile, layer: LayerTensors, formula: Formula, config: ConfigScale
    ) -> float:
        rank = formula.rank({role: checkpoint.shapes[name] for role, name in layer.of_weight.items()})
        if (alpha := layer.roles.get("alpha")) is None:
            return config(layer.base, formula, rank)
        value = checkpoint.read(alpha).float().reshape(-1)
        if value.numel() != 1 or not value.isfinite().all():
            raise CheckpointError(
                f"{checkpoint.path} has {printable(alpha)} that is no number; fetch it again"
            )
        return 1.0 if rank is None else float(value[0]) / rank

    def _magnitude(
        self, file: Path, checkpoint: CheckpointFile, layer: LayerTensors, needed: Shape
    ) -> tuple[str | None, bool]:
        """Return the tensor of DoRA's norms and whether they are of inputs: then LyCORIS writes (1, i, ...)."""
        name = layer.roles.get("magnitude", layer.roles.get("dora_scale"))
        if name is None:
            return None, False
        shape = tuple(checkpoint.shapes[name])
        by_input = "magnitude" not in layer.roles and len(shape) > 1 and shape[0] == 1 < needed[0]
        if len(needed) < 2 or math.prod(shape) != needed[int(by_input)]:
            raise CheckpointError(
                f"{file} is a DoRA of another family: {printable(name)} is {list(shape)}, the layer here is "
                f"{list(needed)}"
            )
        return name, by_input


def _misfit(file: Path, formula: Formula, base: str, shapes: Mapping[str, Shape], needed: Shape) -> str:
    shown = " x ".join(str(list(shape)) for role, shape in sorted(shapes.items(), reverse=True))
    return (
        f"{file} is a {formula.title} of another family: {printable(base)} is {shown}, the layer here is "
        f"{list(needed)}"
    )


def _other_method(names: list[str]) -> str:
    method = foreign(names)
    return f"it is {method}" if method else "no name ends in .lora_down.weight, .lora_A.weight or the like"


def _refuse_strangers(file: Path, unknown: list[str], left: list[str]) -> None:
    if not unknown and not left:
        return
    names = sorted(unknown or left)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    method = foreign(left) if not unknown else None
    family = next(
        (title for part, title in MODELS_BY_LAYER if any(part in name for name in unknown)),
        "another family or kind",
    )
    problem = (
        f"of {family}: this network has no layer"
        if unknown
        else f"with {method or 'more than this triptych merges'}: nothing reads"
    )
    shown = ", ".join(map(printable, names[:3]))
    raise CheckpointError(f"{file} is a LoRA {problem} {shown}{more}; give one made for this model")


def _embeddings(file: Path, checkpoint: CheckpointFile) -> tuple[dict[str, Tensor], set[str]]:
    """Return the words that a file brings, and the names of their tensors.

    They are bundled as `bundle_emb.WORD.string_to_param.*`, or by cloneofsimo under the word, as the header says.
    """
    words: dict[str, str] = {}
    for name in checkpoint.entries:
        if checkpoint.metadata.get(name) == "<embed>":
            words[name] = name
        elif name.startswith(BUNDLED):
            word, _, rest = name.removeprefix(BUNDLED).partition(".")
            if rest.partition(".")[0] in ("string_to_param", "emb_params"):
                words[word] = name
    vectors = {}
    for word, name in words.items():
        tensor = checkpoint.read(name).to(torch.float32)
        if tensor.ndim not in (1, 2) or not tensor.numel():
            raise CheckpointError(
                f"{file}: the embedding {printable(name)} is {list(tensor.shape)}; fetch it again"
            )
        vectors[word] = tensor[None] if tensor.ndim == 1 else tensor
    return vectors, set(words.values())
