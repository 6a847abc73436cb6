"""cloneofsimo's LoRAs, whose layers have numbers in place of names: a list of tensors, or "unet:0:up".

They are counted in the order of PyTorch's `modules()`, in diffusers' networks of that time.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from triptych.errors import CheckpointError
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.configs.text import TextConfig
from triptych.models.configs.unet import UNetConfig, levels
from triptych.weights.diffusion.adapters.formulas import LORA_FORMULA, Shape, fits
from triptych.weights.diffusion.adapters.layers import unet_of
from triptych.weights.diffusion.adapters.tensors import LayerTensors

_NAMED = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_CLIP_ATTENTION = ("k_proj", "v_proj", "q_proj", "out_proj")


def is_numbered(names: Mapping[str, Shape]) -> bool:
    """Return whether tensors have numbers for names."""
    return bool(names) and (_is_list(names) or any(_NAMED.fullmatch(name) for name in names))


def numbered_layers(
    file: Path,
    shapes: Mapping[str, Shape],
    config: LatentDiffusionConfig,
    layer_shape: Callable[[str], Shape | None],
) -> list[LayerTensors]:
    """Return the layers of numbered tensors: those of the first order in which all shapes fit.

    Args:
        shapes: shapes of all tensors; some that belong to no layer may be among them.
        layer_shape: the shape of a layer's weight, by diffusers' name; None if there is none.

    Raises:
        CheckpointError: no order fits.
    """
    pairs: dict[str, dict[int, dict[str, str]]] = {}
    if _is_list(shapes):
        for name in shapes:
            role = "down" if int(name) % 2 else "up"
            pairs.setdefault("", {}).setdefault(int(name) // 2, {})[role] = name
    else:
        for name in shapes:
            if match := _NAMED.fullmatch(name):
                pairs.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = name
    layers = []
    for part, by_number in pairs.items():
        orders = [order for order in _orders(config) if order[0].startswith(part)]
        names = next((order for order in orders if _order_fits(by_number, shapes, order, layer_shape)), None)
        if names is None:
            counts = ", ".join(str(len(order)) for order in orders) or "none"
            raise CheckpointError(
                f"{file} is a LoRA of another family: it has {len(by_number)} layers without names, which fit none of "
                f"this network's orders (of {counts}); give one made for this model"
            )
        layers += [LayerTensors(name, by_number[k]) for k, name in enumerate(names)]
    return layers


def _is_list(names: Mapping[str, Shape]) -> bool:
    return len(names) % 2 == 0 and set(names) == set(map(str, range(len(names))))


def _order_fits(
    by_number: Mapping[int, Mapping[str, str]],
    shapes: Mapping[str, Shape],
    order: list[str],
    layer_shape: Callable[[str], Shape | None],
) -> bool:
    if set(by_number) != set(range(len(order))) or any(len(pair) < 2 for pair in by_number.values()):
        return False
    for number, name in enumerate(order):
        by_role, layer = {role: shapes[n] for role, n in by_number[number].items()}, layer_shape(name)
        if layer is None or not fits(LORA_FORMULA.shape(by_role, layer), layer):
            return False
    return True


def _orders(config: LatentDiffusionConfig) -> Iterator[list[str]]:
    """Yield the orders in which layers may be counted: UNet, UNet with residual blocks, text encoder."""
    unet = unet_of(config)
    for resnets in (False, True):
        for late_mlp in (False, True):  # diffusers before 0.12 registered the MLP before the cross-attention
            yield list(_unet_order(unet, resnets, late_mlp))
    if isinstance(config.text_encoder, TextConfig):
        blocks = [f"text_encoder.text_model.encoder.layers.{i}" for i in range(config.text_encoder.depth)]
        yield [f"{block}.self_attn.{part}" for block in blocks for part in _CLIP_ATTENTION]


def _unet_order(config: UNetConfig, resnets: bool, late_mlp: bool) -> Iterator[str]:
    """Yield the layers of attention and GEGLU, with `resnets` also those of residual blocks; the middle comes last."""
    down, middle, up = levels(config)
    places = [(f"down_blocks.{i}", level, len(level.blocks)) for i, level in enumerate(down)]
    places += [(f"up_blocks.{i}", level, len(level.blocks)) for i, level in enumerate(up)]
    for place, level, count in [*places, ("mid_block", middle, 1)]:
        if level.attention and config.context_dim:
            for j in range(count):
                for k in range(level.attention):
                    yield from _transformer(f"unet.{place}.attentions.{j}.transformer_blocks.{k}", late_mlp)
        if resnets:
            for j, in_channels in enumerate(level.blocks):
                skip = ["conv_shortcut"] if in_channels != level.channels else []
                for part in ("conv1", "time_emb_proj", "conv2", *skip):
                    yield f"unet.{place}.resnets.{j}.{part}"


def _transformer(block: str, late_mlp: bool) -> Iterator[str]:
    attentions = [[f"{block}.{name}.{part}" for part in _ATTENTION] for name in ("attn1", "attn2")]
    mlp = [f"{block}.ff.net.0.proj"]
    yield from [*attentions[0], *attentions[1], *mlp] if late_mlp else [*attentions[0], *mlp, *attentions[1]]
