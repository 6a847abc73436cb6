"""Google's JAX checkpoints, .npz: the paper's repository (vision_transformer) and its successor big_vision.

Both name alike; they differ in the numbers Flax gives to a block's parts, in where positions lie, and
big_vision may stack all blocks in one array (scan). GELU is Flax's default, the tanh form; LayerNorm's
epsilon is 1e-6.
"""

import math
from dataclasses import dataclass

from triptych.model_card import ModelCard
from triptych.models.configs.vit import ViTConfig
from triptych.models.vit import ViT
from triptych.weights.mapping.defaults import class_names, describe, half_style, square_grid
from triptych.weights.mapping.format import Draft, Format, Hints, Names, Reading, state
from triptych.weights.mapping.round_trip import checked
from triptych.weights.mapping.rules import (
    CONCATENATE,
    HWIO,
    TRANSPOSE,
    Operation,
    Rule,
    each,
    expand,
    rule,
    same,
    then,
    to_theirs,
)


@dataclass(frozen=True)
class Layout:
    """What tells the two dialects apart."""

    attention: str = "MultiHeadDotProductAttention_1"
    norm2: str = "LayerNorm_2"
    mlp: str = "MlpBlock_3"
    positions: str = "Transformer/posembed_input/pos_embedding"
    stacked: bool = False
    """Whether the blocks are slabs of one array."""
    flat_norms: bool = True
    """Whether GroupNorm's parameters are (C,); the oldest hybrids store (1, 1, 1, C)."""


PAPER = Layout()
BIG_VISION = Layout("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0", "pos_embedding")
POSITIONS = (PAPER.positions, "Transformer/pos_embedding", "pos_embedding")


def from_heads(heads: int) -> Operation:
    """Queries', keys' and values' kernels (D, heads, D/heads) <-> a linear layer's (D, D)."""
    return each(lambda t: t.flatten(1).T, lambda t: t.T.unflatten(1, (heads, -1)))


def to_model(heads: int) -> Operation:
    """The output's kernel (heads, D/heads, D) <-> (D, D)."""
    return each(lambda t: t.flatten(0, 1).T, lambda t: t.T.unflatten(0, (heads, -1)))


def bias_of_heads(heads: int) -> Operation:
    """Biases (heads, D/heads) <-> (D,)."""
    return each(lambda t: t.flatten(), lambda t: t.unflatten(0, (heads, -1)))


SQUEEZE = each(lambda t: t.flatten(), lambda t: t.reshape(1, 1, 1, -1))


def table(config: ViTConfig, layout: Layout) -> list[Rule]:
    """Theirs <-> ours, top to bottom as the network runs."""
    h = config.num_heads
    block = "Transformer/encoderblock" + ("/" if layout.stacked else "_{i}/")
    slab = "[{i}]" if layout.stacked else ""
    attention = f"{block}{layout.attention}/"

    def three(kind: str) -> tuple[str, ...]:
        return tuple(f"{attention}{name}/{kind}{slab}" for name in ("query", "key", "value"))

    rules = [
        *stem(config, layout),
        rule("embedding/kernel", "patch.proj.weight", HWIO),
        same("embedding/bias", "patch.proj.bias"),
        same(f"{block}LayerNorm_0/{{scale,bias}}{slab}", "encoder.{i}.norm1.{weight,bias}"),
        rule(three("kernel"), "encoder.{i}.attn.qkv.weight", then(from_heads(h), CONCATENATE)),
        rule(three("bias"), "encoder.{i}.attn.qkv.bias", then(bias_of_heads(h), CONCATENATE)),
        rule(f"{attention}out/kernel{slab}", "encoder.{i}.attn.proj.weight", to_model(h)),
        same(f"{attention}out/bias{slab}", "encoder.{i}.attn.proj.bias"),
        same(f"{block}{layout.norm2}/{{scale,bias}}{slab}", "encoder.{i}.norm2.{weight,bias}"),
        rule(
            f"{block}{layout.mlp}/Dense_{{0,1}}/kernel{slab}", "encoder.{i}.mlp.{fc1,fc2}.weight", TRANSPOSE
        ),
        same(f"{block}{layout.mlp}/Dense_{{0,1}}/bias{slab}", "encoder.{i}.mlp.{fc1,fc2}.bias"),
        same("Transformer/encoder_norm/{scale,bias}", "norm.{weight,bias}"),
    ]
    if config.class_token:
        rules.append(same("cls", "class_token"))
    if config.position == "learned":
        rules.append(same(layout.positions, "positions"))
    if config.pool == "attention":
        rules += map_head(h)
    if config.head == "mlp":
        rules += [
            rule("pre_logits/kernel", "head.hidden.weight", TRANSPOSE),
            same("pre_logits/bias", "head.hidden.bias"),
        ]
    if config.num_classes:
        head = "head.out" if config.head == "mlp" else "head"
        rules += [rule("head/kernel", f"{head}.weight", TRANSPOSE), same("head/bias", f"{head}.bias")]
    return expand(rules, config.depth)


def map_head(heads: int) -> list[Rule]:
    """big_vision's attention pooling."""
    a = "MAPHead_0/MultiHeadDotProductAttention_0/"
    pair = Operation(CONCATENATE.forward, lambda whole: whole[0].chunk(2))
    return [
        same("MAPHead_0/probe", "pool.probe"),
        rule(f"{a}query/kernel", "pool.q.weight", from_heads(heads)),
        rule(f"{a}query/bias", "pool.q.bias", bias_of_heads(heads)),
        rule((f"{a}key/kernel", f"{a}value/kernel"), "pool.kv.weight", then(from_heads(heads), pair)),
        rule((f"{a}key/bias", f"{a}value/bias"), "pool.kv.bias", then(bias_of_heads(heads), pair)),
        rule(f"{a}out/kernel", "pool.proj.weight", to_model(heads)),
        same(f"{a}out/bias", "pool.proj.bias"),
        same("MAPHead_0/LayerNorm_0/{scale,bias}", "pool.norm.{weight,bias}"),
        rule("MAPHead_0/MlpBlock_0/Dense_{0,1}/kernel", "pool.mlp.{fc1,fc2}.weight", TRANSPOSE),
        same("MAPHead_0/MlpBlock_0/Dense_{0,1}/bias", "pool.mlp.{fc1,fc2}.bias"),
    ]


def stem(config: ViTConfig, layout: Layout) -> list[Rule]:
    """The hybrids' ResNet."""
    if config.stem != "resnet":
        return []

    def norm(theirs: str, ours: str) -> Rule:
        names = f"{theirs}/{{scale,bias}}", f"{ours}.{{weight,bias}}"
        return same(*names) if layout.flat_norms else rule(*names, SQUEEZE)

    rules = [rule("conv_root/kernel", "stem.root.weight", HWIO), norm("gn_root", "stem.root_norm")]
    for stage, depth in enumerate(config.stem_depths):
        for unit in range(depth):
            theirs, ours = f"block{stage + 1}/unit{unit + 1}/", f"stem.stages.{stage}.{unit}."
            parts = [("conv1", "gn1"), ("conv2", "gn2"), ("conv3", "gn3")]
            if unit == 0:
                parts.append(("conv_proj", "gn_proj"))
            for conv, gn in parts:
                rules += [
                    rule(f"{theirs}{conv}/kernel", f"{ours}{conv}.weight", HWIO),
                    norm(theirs + gn, ours + gn),
                ]
    return rules


def recognises(names: Names) -> bool:
    return "embedding/kernel" in names and names.starts("Transformer/encoderblock")


def read(names: Names, hints: Hints) -> Reading:
    stacked = not names.starts("Transformer/encoderblock_0/")
    block = "Transformer/encoderblock/" if stacked else "Transformer/encoderblock_0/"
    paper = names.starts(f"{block}{PAPER.mlp}/")
    dialect = PAPER if paper else BIG_VISION
    query = names.shape(f"{block}{dialect.attention}/query/kernel", 4 if stacked else 3)
    depth = query[0] if stacked else names.count("Transformer/encoderblock_{i}/")
    patch, _, channels, width = names.shape("embedding/kernel", 4)
    positions = next((name for name in POSITIONS if name in names), "")
    layout = Layout(
        dialect.attention,
        dialect.norm2,
        dialect.mlp,
        positions or dialect.positions,
        stacked,
        len(names.shapes.get("gn_root/scale", (1,))) == 1,
    )
    facts = {
        "mlp": "convention: Flax's GELU is the tanh form",
        "norm_eps": "convention: Flax's LayerNorm has 1e-6",
    }
    facts["num_heads"] = "shape of the query kernel"
    depths = _stem_depths(names)
    root = "conv_root/kernel" in names
    stem_stride = 4 * 2 ** max(len(depths) - 1, 0) if root else 1
    class_token = "cls" in names
    image_size, prefix_positions = hints.image_size or (224, 224), True
    if positions:
        image_size, prefix_positions = _grid(names, positions, class_token, patch * stem_stride, hints)
        facts["image_size"] = "the number of positions"
    else:
        facts["position"] = "none stored; convention: fixed sin-cos" if not paper else "none stored"
    hidden = names.shape(f"{block}{layout.mlp}/Dense_0/kernel", 3 if stacked else 2)[-1]
    classes = names.shape("head/kernel", 2)[1] if "head/kernel" in names else 0
    mlp_head = "pre_logits/kernel" in names
    config = ViTConfig(
        image_size=image_size,
        patch_size=patch,
        in_channels=names.shape("conv_root/kernel", 4)[2] if root else channels,
        embed_dim=width,
        depth=depth,
        num_heads=query[-2],
        mlp_ratio=hidden / width,
        num_classes=classes,
        stem="resnet" if root else "patch",
        stem_widths=(names.shape("conv_root/kernel", 4)[3],) if root else (),
        stem_depths=depths,
        class_token=class_token,
        position="learned" if positions else ("none" if paper else "sincos"),
        prefix_positions=prefix_positions,
        pool="token" if class_token else ("attention" if names.starts("MAPHead_0/") else "mean"),
        head="mlp" if mlp_head else "linear",
        head_dim=names.shape("pre_logits/kernel", 2)[1] if mlp_head else 0,
        mlp="gelu_tanh",
        norm_eps=1e-6,
    )
    how = {"mode": "squash"} if paper else {"crop": 0.875}
    preprocess = half_style(image_size, interpolation="bilinear", **how)
    labels, where = class_names(classes, None, "")
    facts |= {"preprocess": f"convention: {describe(preprocess)}", "classes": where}
    return Reading(
        "vit", config, table(config, layout), ModelCard(preprocess=preprocess, classes=labels), facts
    )


def _stem_depths(names: Names) -> tuple[int, ...]:
    depths: list[int] = []
    while names.starts(f"block{len(depths) + 1}/unit1/"):
        units = 1
        while names.starts(f"block{len(depths) + 1}/unit{units + 1}/"):
            units += 1
        depths.append(units)
    return tuple(depths)


def _grid(
    names: Names, positions: str, class_token: bool, stride: int, hints: Hints
) -> tuple[tuple[int, int], bool]:
    """Image size, and whether the class token has a position.

    The paper's code adds positions after the class token, so it has one; big_vision adds them before. Older
    big_vision files did as the paper, which a count of one more than a square tells.
    """
    count = names.shape(positions, 3)[1]
    square = math.isqrt(count) ** 2 == count
    placed = class_token and (positions == PAPER.positions or not square)
    size, cells = hints.image_size, count - placed
    if size is not None and math.prod(-(-side // stride) for side in size) == cells:
        return size, placed
    rows, columns = square_grid(cells, str(names.path))
    return (rows * stride, columns * stride), placed


def _draft(net: ViT, layout: Layout, title: str) -> Draft:
    tensors = to_theirs(
        table(net.config, layout), state(net), f"{title} has no place for all of this network"
    )
    return checked(Draft(tensors), net, read, title, "npz")


PAPER_FORMAT = Format(
    name="google",
    family="vit",
    title="Google vision_transformer (.npz)",
    container="npz",
    recognises=lambda names: recognises(names) and names.any("MlpBlock_3/Dense_0/kernel"),
    read=read,
    draft=lambda net: _draft(net, PAPER, "Google's vision_transformer"),
)
BIG_VISION_FORMAT = Format(
    name="big_vision",
    family="vit",
    title="Google big_vision (.npz)",
    container="npz",
    recognises=recognises,
    read=read,
    draft=lambda net: _draft(net, BIG_VISION, "big_vision"),
)
