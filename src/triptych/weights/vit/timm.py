"""timm's VisionTransformer, and the originals that share its keys: DeiT, MAE, DINO, DINOv2 and DINOv3.

Most ViTs trained in PyTorch have these keys: `patch_embed`, `blocks.0.attn.qkv`, `mlp.fc1`. The variants differ in the
names of distillation token, registers, layer scale and SwiGLU, which `Layout` lists.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.models.configs.vit import ViTConfig
from triptych.weights.mapping.format import zeros_factory
from triptych.weights.mapping.rules import (
    DROP_KEY_BIAS,
    Operation,
    Rule,
    constant,
    convert,
    drop,
    expand,
    rename,
)


@dataclass(frozen=True)
class Layout:
    """Keys that differ between the variants."""

    registers: str = "reg_token"
    distill_head: str = "head_dist"
    scale: str = "ls{1,2}.gamma"
    swiglu: str = "packed"
    """packed: gate and up in fc1; w12: the same in w12, w3; split: fc1_g, fc1_x, fc2; w123: w1, w2, w3."""
    masked_bias: bool = False
    """Whether there is a fused qkv bias with a mask that disables the keys' third, as in DINOv3."""
    patch_bias: bool = True
    registers_placed: bool = False
    """Whether the table of positions has rows for the registers; these are added to them once and for all."""
    mask_token: int = 0
    """Number of axes of the mask token, 0 for none."""
    probe_eps: float | None = None
    """Epsilon of the batch norm in front of the classifier, as MAE's linear probe has one; None without."""


UNUSED = (
    drop("rope_embed.*", "rotary angles are computed from the config"),
    drop("rope.*", "rotary angles are computed from the config"),
    drop("local_cls_norm.*", "only training on local crops uses it"),
)

PACKED = Operation(lambda t: t[0].chunk(2), lambda t: (torch.cat(t),))


def _bias_mask(width: int) -> Tensor:
    return torch.cat([torch.ones(width), torch.zeros(width), torch.ones(width)])


def table(config: ViTConfig, layout: Layout) -> list[Rule]:
    """Return the rules, in the order in which the network runs."""
    width, b, ours = config.embed_dim, "blocks.{i}.", "encoder.{i}."
    rules = [*stem(config), rename("patch_embed.proj.weight", "patch.proj.weight")]
    if layout.patch_bias:
        rules.append(rename("patch_embed.proj.bias", "patch.proj.bias"))
    else:
        rules.append(
            constant(
                "patch.proj.bias", "before a LayerNorm on the tokens timm has no bias", zeros_factory(width)
            )
        )
    rules += tokens(config, layout)
    if config.pre_norm:
        rules.append(rename("norm_pre.{weight,bias}", "input_norm.{weight,bias}"))
    rules += [
        rename(b + "norm1.{weight,bias}", ours + "norm1.{weight,bias}"),
        rename(b + "attn.qkv.weight", ours + "attn.qkv.weight"),
    ]
    if config.qkv_bias == "qkv":
        rules.append(rename(b + "attn.qkv.bias", ours + "attn.qkv.bias"))
    if config.qkv_bias == "qv" and layout.masked_bias:
        rules.append(
            convert(b + "attn.qkv.bias", (ours + "attn.q_bias", ours + "attn.v_bias"), DROP_KEY_BIAS)
        )
        rules.append(drop(b + "attn.qkv.bias_mask", "keys have no bias here", lambda: _bias_mask(width)))
    elif config.qkv_bias == "qv":
        rules.append(rename(b + "attn.{q_bias,v_bias}", ours + "attn.{q_bias,v_bias}"))
    if config.qk_norm:
        rules += [
            rename(f"{b}attn.{n}.{{weight,bias}}", f"{ours}attn.{n}.{{weight,bias}}")
            for n in ("q_norm", "k_norm")
        ]
    rules += [
        rename(b + "attn.proj.{weight,bias}", ours + "attn.proj.{weight,bias}"),
        rename(b + "norm2.{weight,bias}", ours + "norm2.{weight,bias}"),
        *mlp(config, layout, b + "mlp.", ours + "mlp."),
    ]
    if config.layer_scale is not None:
        rules.append(rename(b + layout.scale, ours + "{scale1,scale2}.gamma"))
    rules.append(
        rename(("fc_norm" if config.norm_after_pool else "norm") + ".{weight,bias}", "norm.{weight,bias}")
    )
    if config.pool == "attention":
        rules += attention_pool()
    return expand(rules + heads(config, layout), config.depth)


def tokens(config: ViTConfig, layout: Layout) -> list[Rule]:
    """Return the rules of class, distillation and mask tokens, registers and positions."""
    rules = []
    if config.class_token:
        rules.append(rename("cls_token", "class_token"))
    if config.distill_token:
        rules.append(rename("dist_token", "distill_token"))
    if layout.registers_placed:
        first = len(rules)  # the registers follow the other tokens
        last = first + config.num_registers
        fold = Operation(
            lambda t: (t[0] + t[1][:, first:last], torch.cat([t[1][:, :first], t[1][:, last:]], 1)),
            _only_read,
        )
        return [*rules, convert((layout.registers, "pos_embed"), ("registers", "positions"), fold)]
    if config.num_registers:
        rules.append(rename(layout.registers, "registers"))
    if layout.mask_token:
        shape = (1,) * (layout.mask_token - 1) + (config.embed_dim,)
        rules.append(drop("mask_token", "only masked pre-training uses it", zeros_factory(*shape)))
    if config.position == "learned":
        rules.append(rename("pos_embed", "positions"))
    return rules


def _only_read(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    raise NotImplementedError("files are written in the usual form")


def mlp(config: ViTConfig, layout: Layout, theirs: str, ours: str) -> list[Rule]:
    """Return the rules of the MLP, in any of its four forms."""
    if config.mlp != "swiglu":
        return [
            rename(theirs + "fc1.{weight,bias}", ours + "fc1.{weight,bias}"),
            rename(theirs + "fc2.{weight,bias}", ours + "fc2.{weight,bias}"),
        ]
    if layout.swiglu in ("split", "w123"):
        gate, up, down = ("fc1_g", "fc1_x", "fc2") if layout.swiglu == "split" else ("w1", "w2", "w3")
        names = ((gate, "gate"), (up, "up"), (down, "down"))
        return [rename(f"{theirs}{a}.{{weight,bias}}", f"{ours}{b}.{{weight,bias}}") for a, b in names]
    both, down = ("fc1", "fc2") if layout.swiglu == "packed" else ("w12", "w3")
    return [
        convert(
            f"{theirs}{both}.{{weight,bias}}",
            (f"{ours}gate.{{weight,bias}}", f"{ours}up.{{weight,bias}}"),
            PACKED,
        ),
        rename(f"{theirs}{down}.{{weight,bias}}", f"{ours}down.{{weight,bias}}"),
    ]


def attention_pool() -> list[Rule]:
    """Return the rules of SigLIP's head: a learned latent attends to all tokens."""
    parts = ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2")
    return [
        rename("attn_pool.latent", "pool.probe"),
        *(rename(f"attn_pool.{part}.{{weight,bias}}", f"pool.{part}.{{weight,bias}}") for part in parts),
    ]


def heads(config: ViTConfig, layout: Layout) -> list[Rule]:
    """Return the rules of the classifiers: one linear layer for each token that is read out."""
    if config.num_classes == 0:
        return []
    if layout.probe_eps is not None:
        return linear_probe(layout.probe_eps)
    rules = [rename("head.{weight,bias}", "head.{weight,bias}")]
    if config.distill_token:
        rules.append(rename(layout.distill_head + ".{weight,bias}", "head_distill.{weight,bias}"))
    return rules


def linear_probe(eps: float) -> list[Rule]:
    """Return the rules of MAE's linear probe, `nn.Sequential(BatchNorm1d(affine=False), Linear)`: in evaluation the
    statistics are a part of the linear layer."""

    def fold(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        mean, variance, weight, bias = (t.double() for t in tensors)
        weight = weight / (variance + eps).sqrt()
        return weight.to(tensors[2].dtype), (bias - weight @ mean).to(tensors[3].dtype)

    theirs = ("head.0.running_mean", "head.0.running_var", "head.1.weight", "head.1.bias")
    return [
        convert(theirs, ("head.weight", "head.bias"), Operation(fold, _only_read)),
        drop("head.0.num_batches_tracked", "only training uses it"),
    ]


def stem(config: ViTConfig) -> list[Rule]:
    """Return the rules of the hybrids' ResNet. If it is the root alone, timm omits one level of names."""
    if config.stem != "resnet":
        return []
    root = "patch_embed.backbone." + ("stem." if config.stem_depths else "")
    rules = [
        rename(f"{root}conv.weight", "stem.root.weight"),
        rename(f"{root}norm.{{weight,bias}}", "stem.root_norm.{weight,bias}"),
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
                rules.append(rename(f"{theirs}{conv}.weight", f"{ours}{our_conv}.weight"))
                rules.append(rename(f"{theirs}{norm}.{{weight,bias}}", f"{ours}{our_norm}.{{weight,bias}}"))
    return rules
