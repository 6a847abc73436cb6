"""Tensors of an adapter's file by layer and role, whichever program wrote it.

lora_unet_mid_block_attentions_0_proj_in.lora_down.weight        kohya, LyCORIS, AUTOMATIC1111
unet.mid_block.attentions.0.proj_in.lora.down.weight             diffusers
    mid_block.attentions.0.transformer_blocks.0.attn1.(...).to_q_lora.down.weight          diffusers before 0.17
base_model.model.mid_block.attentions.0.proj_in.lora_A.weight    PEFT
diffusion_model.middle_block.1.proj_in.lora_up.weight            ComfyUI
"""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from triptych.weights.diffusion.adapters.formulas import FORMULAS, Formula
from triptych.weights.files.checkpoint import CheckpointFile
from triptych.weights.files.sanitize import printable

_LOW_RANK = {"A": "down", "B": "up"}
_ADAPTER = r"(?:\.[\w-]+)?"  # PEFT's name of an adapter, "default"
# Ends of names -> roles; {} is what the group matched.
_ENDINGS = (
    (rf"\.lora_(down|up|mid){_ADAPTER}\.weight", "{}"),
    (rf"\.lora_([AB]){_ADAPTER}\.weight", "{}"),
    (rf"\.lora_B{_ADAPTER}\.bias", "up_bias"),
    (r"[._]lora(?:_linear_layer)?\.(down|up)\.weight", "{}"),
    (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", "magnitude"),
    (r"\.dora_scale", "dora_scale"),
    (rf"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|ia3_l){_ADAPTER}", "{}"),
    (r"\.([ab][12]|bm)\.weight", "{}"),
    (r"\.(?:diff|w_norm)", "diff"),
    (r"\.(?:diff_b|b_norm)", "bias"),
    (r"(?:[._]lora(?:_linear_layer)?)?\.alpha", "alpha"),
    (r"\.on_input", "on_input"),
    (r"\.weight", "saved"),
    (r"\.bias", "saved_bias"),
)
_NAMES = tuple((re.compile(rf"(?P<base>.+?){ending}", re.DOTALL), role) for ending, role in _ENDINGS)
MODIFIERS = frozenset({"alpha", "dora_scale", "magnitude"})
"""Roles that change the update of a weight, and BIASES those that update a bias."""
BIASES = frozenset({"bias", "up_bias", "saved_bias"})
PEFT = "base_model.model."
# Parts of names -> methods that are not merged.
FOREIGN = {
    "oft_": "an OFT",
    "boft_": "a BOFT",
    "lora_E": "an AdaLoRA",
    "lambda_layer": "a T-LoRA",
    "lora_embedding_": "a LoRA of an embedding table",
    "vera_": "a VeRA",
    "hypernet": "a hypernetwork",
    "_custom_diffusion": "a Custom Diffusion",
    "bias_indices": "an extracted LoRA with sparse residuals",
    "ip_adapter": "an IP-Adapter",
}


@dataclass
class LayerTensors:
    """The tensors of one layer."""

    base: str
    """The layer as the file names it."""
    roles: dict[str, str] = field(default_factory=dict)
    """Role -> name of the tensor."""

    @property
    def of_weight(self) -> dict[str, str]:
        """The tensors that a formula reads."""
        return {role: name for role, name in self.roles.items() if role not in MODIFIERS | BIASES}

    @property
    def formula(self) -> Formula | None:
        """The formula of the weight's update; None if no formula has these tensors."""
        return next((formula for formula in FORMULAS if formula.matches(self.of_weight.keys())), None)

    @property
    def started(self) -> Formula | None:
        """A formula that has all of these tensors and needs more."""
        roles = self.of_weight.keys()
        return next((f for f in FORMULAS if roles and roles <= f.roles and self.formula is None), None)


def split_name(name: str) -> tuple[str, str] | None:
    """Return the layer and the role of a tensor; None if its name is of no known kind."""
    for pattern, role in _NAMES:
        if match := pattern.fullmatch(name):
            base, known = match["base"], [group for group in match.groups()[1:] if group is not None]
            role = role.format(_LOW_RANK.get(known[0], known[0])) if known else role
            return None if role == "saved_bias" and not base.startswith(PEFT) else (base, role)
    return None


def unnested(checkpoint: CheckpointFile) -> CheckpointFile:
    """Return the adapter alone if it is in a dict of a larger file, as {"lora": tensors, "step": 500}."""
    names = list(checkpoint.entries)
    if not any("/" in name for name in names) or any("/" not in name and split_name(name) for name in names):
        return checkpoint
    for nest in dict.fromkeys(name.rpartition("/")[0] + "/" for name in names if "/" in name):
        part = {name[len(nest) :]: e for name, e in checkpoint.entries.items() if name.startswith(nest)}
        if methods({name: entry.shape for name, entry in part.items()}):
            result = copy.copy(checkpoint)
            result.entries = part
            result.notes = [*checkpoint.notes, f"adapter taken from {printable(nest.rstrip('/'), 40)!r}"]
            return result
    return checkpoint


def by_layer(names: Iterable[str]) -> tuple[list[LayerTensors], list[str]]:
    """Return the tensors of each layer, and the names that are of no known kind."""
    layers: dict[str, LayerTensors] = {}
    unknown, names = [], set(names)
    for name in sorted(names):
        # PEFT with bias="all" repeats the biases of saved modules, and adds those of before.
        if ".original_module." in name or name.replace(".modules_to_save.", ".") in names - {name}:
            continue
        if (parts := split_name(name)) is None:
            unknown.append(name)
            continue
        base, role = parts
        layers.setdefault(base, LayerTensors(base)).roles[role] = name
    for base, layer in layers.items():
        if "on_input" in layer.roles and "saved" in layer.roles:  # LyCORIS' (IA)^3
            layer.roles["factor"] = layer.roles.pop("saved")
        elif "saved" in layer.roles and not base.startswith(PEFT):
            unknown.append(layer.roles.pop("saved"))
    return [layer for layer in layers.values() if layer.roles], unknown


def methods(names: Iterable[str]) -> dict[str, int]:
    """Return the methods of an adapter's file and the number of layers of each; empty if it is none.

    Saved weights alone make no adapter.
    """
    counts: dict[str, int] = {}
    for layer in by_layer(names)[0]:
        if (formula := layer.formula) is not None:
            title = "DoRA" if layer.roles.keys() & {"dora_scale", "magnitude"} else formula.title
            counts[title] = counts.get(title, 0) + 1
    return counts if set(counts) - {"saved weight"} else {}


def foreign(names: Iterable[str]) -> str | None:
    """Return the method of names that no formula here has; None if it is not recognized."""
    names = list(names)
    return next((title for part, title in FOREIGN.items() if any(part in name for name in names)), None)
