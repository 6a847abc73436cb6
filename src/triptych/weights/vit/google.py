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
from triptych.weights.mapping.defaults import class_names, describe_preprocess, half_preprocess, square_grid
from triptych.weights.mapping.format import Draft, Format, Hints, LoadPlan, StateDictKeys, cpu_state_dict
from triptych.weights.mapping.round_trip import verify_round_trip
from triptych.weights.mapping.rules import (
    FUSE_QKV,
    HWIO,
    TRANSPOSE,
    Operation,
    Rule,
    compose,
    convert,
    expand,
    export_tensors,
    per_tensor,
    rename,
)


@dataclass(frozen=True)
class Layout:
    """Names that differ between the two codebases."""

    attention: str = "MultiHeadDotProductAttention_1"
    norm2: str = "LayerNorm_2"
    mlp: str = "MlpBlock_3"
    positions: str = "Transformer/posembed_input/pos_embedding"
    stacked: bool = False
    """Whether blocks are slices of stacked arrays."""
    flat_norms: bool = True
    """Whether GroupNorm's parameters are (C,); the oldest hybrids store (1, 1, 1, C)."""


PAPER = Layout()
BIG_VISION = Layout("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0", "pos_embedding")
POSITIONS = (PAPER.positions, "Transformer/pos_embedding", "pos_embedding")


def from_heads(heads: int) -> Operation:
    """Return: kernels of queries, keys and values (D, heads, D/heads) <-> a linear weight (D, D)."""
    return per_tensor(lambda t: t.flatten(1).T, lambda t: t.T.unflatten(1, (heads, -1)))


def to_model(heads: int) -> Operation:
    """Return: the output's kernel (heads, D/heads, D) <-> (D, D)."""
    return per_tensor(lambda t: t.flatten(0, 1).T, lambda t: t.T.unflatten(0, (heads, -1)))


def bias_of_heads(heads: int) -> Operation:
    """Return: biases (heads, D/heads) <-> (D,)."""
    return per_tensor(lambda t: t.flatten(), lambda t: t.unflatten(0, (heads, -1)))


SQUEEZE = per_tensor(lambda t: t.flatten(), lambda t: t.reshape(1, 1, 1, -1))


def table(config: ViTConfig, layout: Layout) -> list[Rule]:
    """Return the rules, in the order in which the network runs."""
    h = config.num_heads
    block = "Transformer/encoderblock" + ("/" if layout.stacked else "_{i}/")
    slab = "[{i}]" if layout.stacked else ""
    attention = f"{block}{layout.attention}/"

    def three(leaf: str) -> tuple[str, ...]:
        return tuple(f"{attention}{name}/{leaf}{slab}" for name in ("query", "key", "value"))

    rules = [
        *stem(config, layout),
        convert("embedding/kernel", "patch.proj.weight", HWIO),
        rename("embedding/bias", "patch.proj.bias"),
        rename(f"{block}LayerNorm_0/{{scale,bias}}{slab}", "encoder.{i}.norm1.{weight,bias}"),
        convert(three("kernel"), "encoder.{i}.attn.qkv.weight", compose(from_heads(h), FUSE_QKV)),
        convert(three("bias"), "encoder.{i}.attn.qkv.bias", compose(bias_of_heads(h), FUSE_QKV)),
        convert(f"{attention}out/kernel{slab}", "encoder.{i}.attn.proj.weight", to_model(h)),
        rename(f"{attention}out/bias{slab}", "encoder.{i}.attn.proj.bias"),
        rename(f"{block}{layout.norm2}/{{scale,bias}}{slab}", "encoder.{i}.norm2.{weight,bias}"),
        convert(
            f"{block}{layout.mlp}/Dense_{{0,1}}/kernel{slab}", "encoder.{i}.mlp.{fc1,fc2}.weight", TRANSPOSE
        ),
        rename(f"{block}{layout.mlp}/Dense_{{0,1}}/bias{slab}", "encoder.{i}.mlp.{fc1,fc2}.bias"),
        rename("Transformer/encoder_norm/{scale,bias}", "norm.{weight,bias}"),
    ]
    if config.class_token:
        rules.append(rename("cls", "class_token"))
    if config.position == "learned":
        rules.append(rename(layout.positions, "positions"))
    if config.pool == "attention":
        rules += map_head(h)
    if config.head == "mlp":
        rules += [
            convert("pre_logits/kernel", "head.hidden.weight", TRANSPOSE),
            rename("pre_logits/bias", "head.hidden.bias"),
        ]
    if config.num_classes:
        head = "head.out" if config.head == "mlp" else "head"
        rules += [convert("head/kernel", f"{head}.weight", TRANSPOSE), rename("head/bias", f"{head}.bias")]
    return expand(rules, config.depth)


def map_head(heads: int) -> list[Rule]:
    """Return the rules of big_vision's attention pooling (MAP head)."""
    a = "MAPHead_0/MultiHeadDotProductAttention_0/"
    pair = Operation(FUSE_QKV.forward, lambda fused: fused[0].chunk(2))
    return [
        rename("MAPHead_0/probe", "pool.probe"),
        convert(f"{a}query/kernel", "pool.q.weight", from_heads(heads)),
        convert(f"{a}query/bias", "pool.q.bias", bias_of_heads(heads)),
        convert((f"{a}key/kernel", f"{a}value/kernel"), "pool.kv.weight", compose(from_heads(heads), pair)),
        convert((f"{a}key/bias", f"{a}value/bias"), "pool.kv.bias", compose(bias_of_heads(heads), pair)),
        convert(f"{a}out/kernel", "pool.proj.weight", to_model(heads)),
        rename(f"{a}out/bias", "pool.proj.bias"),
        rename("MAPHead_0/LayerNorm_0/{scale,bias}", "pool.norm.{weight,bias}"),
        convert("MAPHead_0/MlpBlock_0/Dense_{0,1}/kernel", "pool.mlp.{fc1,fc2}.weight", TRANSPOSE),
        rename("MAPHead_0/MlpBlock_0/Dense_{0,1}/bias", "pool.mlp.{fc1,fc2}.bias"),
    ]


def stem(config: ViTConfig, layout: Layout) -> list[Rule]:
    """Return the rules of the ResNet in front of hybrid models."""
    if config.stem != "resnet":
        return []

    def norm(theirs: str, ours: str) -> Rule:
        names = f"{theirs}/{{scale,bias}}", f"{ours}.{{weight,bias}}"
        return rename(*names) if layout.flat_norms else convert(*names, SQUEEZE)

    rules = [convert("conv_root/kernel", "stem.root.weight", HWIO), norm("gn_root", "stem.root_norm")]
    for stage, depth in enumerate(config.stem_depths):
        for unit in range(depth):
            theirs, ours = f"block{stage + 1}/unit{unit + 1}/", f"stem.stages.{stage}.{unit}."
            parts = [("conv1", "gn1"), ("conv2", "gn2"), ("conv3", "gn3")]
            if unit == 0:
                parts.append(("conv_proj", "gn_proj"))
            for conv, gn in parts:
                rules += [
                    convert(f"{theirs}{conv}/kernel", f"{ours}{conv}.weight", HWIO),
                    norm(theirs + gn, ours + gn),
                ]
    return rules


def matches(keys: StateDictKeys) -> bool:
    return "embedding/kernel" in keys and keys.any_startswith("Transformer/encoderblock")


def read(keys: StateDictKeys, hints: Hints) -> LoadPlan:
    stacked = not keys.any_startswith("Transformer/encoderblock_0/")
    block = "Transformer/encoderblock/" if stacked else "Transformer/encoderblock_0/"
    paper = keys.any_startswith(f"{block}{PAPER.mlp}/")
    dialect = PAPER if paper else BIG_VISION
    query = keys.shape(f"{block}{dialect.attention}/query/kernel", 4 if stacked else 3)
    depth = query[0] if stacked else keys.count_blocks("Transformer/encoderblock_{i}/")
    patch, _, channels, width = keys.shape("embedding/kernel", 4)
    positions = next((name for name in POSITIONS if name in keys), "")
    layout = Layout(
        dialect.attention,
        dialect.norm2,
        dialect.mlp,
        positions or dialect.positions,
        stacked,
        len(keys.shapes.get("gn_root/scale", (1,))) == 1,
    )
    facts = {
        "mlp": "convention: Flax's GELU is the tanh form",
        "norm_eps": "convention: Flax's LayerNorm has 1e-6",
    }
    facts["num_heads"] = "shape of the query kernel"
    depths = _stem_depths(keys)
    root = "conv_root/kernel" in keys
    stem_stride = 4 * 2 ** max(len(depths) - 1, 0) if root else 1
    class_token = "cls" in keys
    image_size, prefix_positions = hints.image_size or (224, 224), True
    if positions:
        image_size, prefix_positions = _grid(keys, positions, class_token, patch * stem_stride, hints)
        facts["image_size"] = "the number of positions"
    else:
        facts["position"] = "none stored; convention: fixed sin-cos" if not paper else "none stored"
    hidden = keys.shape(f"{block}{layout.mlp}/Dense_0/kernel", 3 if stacked else 2)[-1]
    classes = keys.shape("head/kernel", 2)[1] if "head/kernel" in keys else 0
    mlp_head = "pre_logits/kernel" in keys
    config = ViTConfig(
        image_size=image_size,
        patch_size=patch,
        in_channels=keys.shape("conv_root/kernel", 4)[2] if root else channels,
        embed_dim=width,
        depth=depth,
        num_heads=query[-2],
        mlp_ratio=hidden / width,
        num_classes=classes,
        stem="resnet" if root else "patch",
        stem_widths=(keys.shape("conv_root/kernel", 4)[3],) if root else (),
        stem_depths=depths,
        class_token=class_token,
        position="learned" if positions else ("none" if paper else "sincos"),
        prefix_positions=prefix_positions,
        pool="token" if class_token else ("attention" if keys.any_startswith("MAPHead_0/") else "mean"),
        head="mlp" if mlp_head else "linear",
        head_dim=keys.shape("pre_logits/kernel", 2)[1] if mlp_head else 0,
        mlp="gelu_tanh",
        norm_eps=1e-6,
    )
    # The paper's networks and SigLIP, which pools by attention, squash images.
    options = {"mode": "squash", "crop": 1.0} if paper or config.pool == "attention" else {"crop": 0.875}
    preprocess = half_preprocess(image_size, interpolation="bilinear", **options)
    labels, where = class_names(classes, None, "")
    facts |= {"preprocess": f"convention: {describe_preprocess(preprocess)}", "classes": where}
    return LoadPlan(
        "vit", config, table(config, layout), ModelCard(preprocess=preprocess, classes=labels), facts
    )


def _stem_depths(keys: StateDictKeys) -> tuple[int, ...]:
    depths: list[int] = []
    while keys.any_startswith(f"block{len(depths) + 1}/unit1/"):
        units = 1
        while keys.any_startswith(f"block{len(depths) + 1}/unit{units + 1}/"):
            units += 1
        depths.append(units)
    return tuple(depths)


def _grid(
    keys: StateDictKeys, positions: str, class_token: bool, stride: int, hints: Hints
) -> tuple[tuple[int, int], bool]:
    """Return the image size, and whether the class token has a position.

    The paper's code adds positions after the class token, so it has one; big_vision adds them before. Older big_vision
    files follow the paper; their number of positions is one more than a square.
    """
    count = keys.shape(positions, 3)[1]
    square = math.isqrt(count) ** 2 == count
    placed = class_token and (positions == PAPER.positions or not square)
    size, cells = hints.image_size, count - placed
    if size is not None and math.prod(-(-side // stride) for side in size) == cells:
        return size, placed
    rows, columns = square_grid(cells, str(keys.path))
    return (rows * stride, columns * stride), placed


def _draft(net: ViT, layout: Layout, title: str) -> Draft:
    tensors = export_tensors(
        table(net.config, layout), cpu_state_dict(net), f"{title} has no key for all of this network"
    )
    return verify_round_trip(Draft(tensors), net, read, title, "npz")


PAPER_FORMAT = Format(
    name="google",
    family="vit",
    title="Google vision_transformer (.npz)",
    container="npz",
    matches=lambda keys: matches(keys) and keys.any_endswith("MlpBlock_3/Dense_0/kernel"),
    read=read,
    draft=lambda net: _draft(net, PAPER, "Google's vision_transformer"),
)
BIG_VISION_FORMAT = Format(
    name="big_vision",
    family="vit",
    title="Google big_vision (.npz)",
    container="npz",
    matches=matches,
    read=read,
    draft=lambda net: _draft(net, BIG_VISION, "big_vision"),
)
