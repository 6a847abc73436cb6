"""timm's VisionTransformer, and the originals that share its names: DeiT, MAE, DINO, DINOv2 and DINOv3.

`patch_embed`, `blocks.0.attn.qkv`, `mlp.fc1`: most of what was trained in PyTorch is named like this. The
dialects differ in the names of distillation token, registers, layer scale and SwiGLU, which the layout
below lists.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.models.configs.vit import ViTConfig
from triptych.weights.mapping.format import zeros
from triptych.weights.mapping.rules import WITHOUT_KEYS, Operation, Rule, drop, expand, make, rule, same


@dataclass(frozen=True)
class Layout:
    """Names that differ between the dialects."""

    registers: str = "reg_token"
    distill_head: str = "head_dist"
    scale: str = "ls{1,2}.gamma"
    swiglu: str = "packed"
    """packed: gate and up in fc1; w12: the same in w12, w3; split: fc1_g, fc1_x, fc2; w123: w1, w2, w3."""
    masked_bias: bool = False
    """DINOv3's: a whole qkv bias beside a mask that takes the keys' third out."""
    patch_bias: bool = True
    mask_token: int = 0
    """Number of axes of the mask token, 0 for none."""


UNUSED = (
    drop("rope_embed.*", "rotary angles are computed from the config"),
    drop("rope.*", "rotary angles are computed from the config"),
    drop("local_cls_norm.*", "only training on local crops reads it"),
)

PACKED = Operation(lambda t: t[0].chunk(2), lambda t: (torch.cat(t),))


def _bias_mask(width: int) -> Tensor:
    return torch.cat([torch.ones(width), torch.zeros(width), torch.ones(width)])


def table(config: ViTConfig, layout: Layout) -> list[Rule]:
    """Theirs <-> ours, top to bottom as the network runs."""
    width, b, ours = config.embed_dim, "blocks.{i}.", "encoder.{i}."
    rules = [*stem(config), same("patch_embed.proj.weight", "patch.proj.weight")]
    if layout.patch_bias:
        rules.append(same("patch_embed.proj.bias", "patch.proj.bias"))
    else:
        rules.append(
            make("patch.proj.bias", "before a LayerNorm on the tokens timm has no bias", zeros(width))
        )
    rules += tokens(config, layout)
    if config.pre_norm:
        rules.append(same("norm_pre.{weight,bias}", "input_norm.{weight,bias}"))
    rules += [
        same(b + "norm1.{weight,bias}", ours + "norm1.{weight,bias}"),
        same(b + "attn.qkv.weight", ours + "attn.qkv.weight"),
    ]
    if config.qkv_bias == "qkv":
        rules.append(same(b + "attn.qkv.bias", ours + "attn.qkv.bias"))
    if config.qkv_bias == "qv" and layout.masked_bias:
        rules.append(rule(b + "attn.qkv.bias", (ours + "attn.q_bias", ours + "attn.v_bias"), WITHOUT_KEYS))
        rules.append(drop(b + "attn.qkv.bias_mask", "keys have no bias here", lambda: _bias_mask(width)))
    elif config.qkv_bias == "qv":
        rules.append(same(b + "attn.{q_bias,v_bias}", ours + "attn.{q_bias,v_bias}"))
    if config.qk_norm:
        rules += [
            same(f"{b}attn.{n}.{{weight,bias}}", f"{ours}attn.{n}.{{weight,bias}}")
            for n in ("q_norm", "k_norm")
        ]
    rules += [
        same(b + "attn.proj.{weight,bias}", ours + "attn.proj.{weight,bias}"),
        same(b + "norm2.{weight,bias}", ours + "norm2.{weight,bias}"),
        *mlp(config, layout, b + "mlp.", ours + "mlp."),
    ]
    if config.layer_scale is not None:
        rules.append(same(b + layout.scale, ours + "{scale1,scale2}.gamma"))
    rules.append(
        same(("fc_norm" if config.norm_after_pool else "norm") + ".{weight,bias}", "norm.{weight,bias}")
    )
    if config.pool == "attention":
        rules += attention_pool()
    return expand(rules + heads(config, layout), config.depth)


def tokens(config: ViTConfig, layout: Layout) -> list[Rule]:
    """Class, distillation and mask token, registers, positions."""
    rules = []
    if config.class_token:
        rules.append(same("cls_token", "class_token"))
    if config.distill_token:
        rules.append(same("dist_token", "distill_token"))
    if config.num_registers:
        rules.append(same(layout.registers, "registers"))
    if layout.mask_token:
        shape = (1,) * (layout.mask_token - 1) + (config.embed_dim,)
        rules.append(drop("mask_token", "only masked pre-training reads it", zeros(*shape)))
    if config.position == "learned":
        rules.append(same("pos_embed", "positions"))
    return rules


def mlp(config: ViTConfig, layout: Layout, theirs: str, ours: str) -> list[Rule]:
    """The feed-forward block in the four ways it is written."""
    if config.mlp != "swiglu":
        return [
            same(theirs + "fc1.{weight,bias}", ours + "fc1.{weight,bias}"),
            same(theirs + "fc2.{weight,bias}", ours + "fc2.{weight,bias}"),
        ]
    if layout.swiglu in ("split", "w123"):
        gate, up, down = ("fc1_g", "fc1_x", "fc2") if layout.swiglu == "split" else ("w1", "w2", "w3")
        names = ((gate, "gate"), (up, "up"), (down, "down"))
        return [same(f"{theirs}{a}.{{weight,bias}}", f"{ours}{b}.{{weight,bias}}") for a, b in names]
    both, down = ("fc1", "fc2") if layout.swiglu == "packed" else ("w12", "w3")
    return [
        rule(
            f"{theirs}{both}.{{weight,bias}}",
            (f"{ours}gate.{{weight,bias}}", f"{ours}up.{{weight,bias}}"),
            PACKED,
        ),
        same(f"{theirs}{down}.{{weight,bias}}", f"{ours}down.{{weight,bias}}"),
    ]


def attention_pool() -> list[Rule]:
    """SigLIP's head: a learned latent looks at every token."""
    parts = ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2")
    return [
        same("attn_pool.latent", "pool.probe"),
        *(same(f"attn_pool.{part}.{{weight,bias}}", f"pool.{part}.{{weight,bias}}") for part in parts),
    ]


def heads(config: ViTConfig, layout: Layout) -> list[Rule]:
    """One linear layer a token that is read."""
    if config.num_classes == 0:
        return []
    rules = [same("head.{weight,bias}", "head.{weight,bias}")]
    if config.distill_token:
        rules.append(same(layout.distill_head + ".{weight,bias}", "head_distill.{weight,bias}"))
    return rules


def stem(config: ViTConfig) -> list[Rule]:
    """The hybrids' ResNet; where it is the root alone timm leaves a level of names out."""
    if config.stem != "resnet":
        return []
    root = "patch_embed.backbone." + ("stem." if config.stem_depths else "")
    rules = [
        same(f"{root}conv.weight", "stem.root.weight"),
        same(f"{root}norm.{{weight,bias}}", "stem.root_norm.{weight,bias}"),
    ]
    for stage, depth in enumerate(config.stem_depths):
        for unit in range(depth):
            theirs, ours = (
                f"patch_embed.backbone.stages.{stage}.blocks.{unit}.",
                f"stem.stages.{stage}.{unit}.",
            )
            parts = [(f"conv{n}", f"norm{n}", f"conv{n}", f"gn{n}") for n in (1, 2, 3)]
            if unit == 0:
                parts.append(("downsample.conv", "downsample.norm", "conv_proj", "gn_proj"))
            for conv, norm, our_conv, our_norm in parts:
                rules.append(same(f"{theirs}{conv}.weight", f"{ours}{our_conv}.weight"))
                rules.append(same(f"{theirs}{norm}.{{weight,bias}}", f"{ours}{our_norm}.{{weight,bias}}"))
    return rules
