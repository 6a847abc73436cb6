"""LPIPS from published files: VGG16's convolutions (keys of torchvision, timm or the lpips package), linear heads."""

import re

import torch

from triptych.errors import CheckpointError
from triptych.models.lpips import LEVELS, Lpips
from triptych.weights.files.opening import open_checkpoint
from triptych.weights.filling import fill_network
from triptych.weights.hub import locate
from triptych.weights.mapping.rules import Rule, convert, drop, per_tensor, rename

# 1x1 convolutions to one channel, without bias <-> one weight for each channel.
HEAD = per_tensor(lambda t: t.reshape(-1), lambda t: t[None, :, None, None])
ONLY_CLASSES = "only classification uses it"


def load_lpips(vgg: str, heads: str | None = None) -> Lpips:
    """Load LPIPS (Zhang et al. 2018), frozen and in evaluation mode.

    Args:
        vgg: a file, folder or hub id with VGG16's convolutions, of torchvision, timm or a complete LPIPS.
        heads: a source with the published linear heads ("lin0.model.1.weight", ...); None if `vgg` is a complete LPIPS.

    Raises:
        CheckpointError: no such source, or tensors that do not match exactly, all of which are listed.
    """
    net = Lpips()
    vgg_file = open_checkpoint(locate(vgg))
    has_heads = any(name.startswith("lin0.") for name in vgg_file.shapes)
    if heads is None and not has_heads:
        raise CheckpointError(
            f"{vgg_file.path} has no linear heads of LPIPS; also name the file that has them"
        )
    numbered = any(re.match(r"net\.slice1\.", name) for name in vgg_file.shapes)
    prefix = "net.slice{level}." if numbered else "features."
    rules = convolutions(prefix)
    for name in ("classifier.*", "pre_logits.*", "head.*"):
        rules.append(drop(name, ONLY_CLASSES))
    if has_heads:
        head_rules = linear_heads() if heads is None else [drop("lin*", "the other file has them")]
        rules += [*head_rules, drop("lins.*", "duplicates"), drop("scaling_layer.*", "constants")]
    fill_network(
        net.vgg if heads else net,
        vgg_file,
        _within_vgg(rules) if heads else rules,
        f"{vgg_file.path} read as VGG16",
    )
    if heads is not None:
        linear = open_checkpoint(locate(heads))
        part = torch.nn.Module()
        part.heads = net.heads
        fill_network(part, linear, linear_heads(), f"{linear.path} read as LPIPS's linear heads")
    return net.eval().requires_grad_(False)


def convolutions(prefix: str) -> list[Rule]:
    """Return the rules for VGG16's numbered layers: convolutions with their ReLUs, max pooling between levels."""
    rules, number = [], 0
    for level, widths in enumerate(LEVELS):
        for i in range(len(widths)):
            theirs = prefix.format(level=level + 1) + str(number)
            rules += [
                rename(f"{theirs}.{part}", f"vgg.levels.{level}.{i}.{part}") for part in ("weight", "bias")
            ]
            number += 2
        number += 1
    return rules


def linear_heads() -> list[Rule]:
    return [convert(f"lin{i}.model.1.weight", f"heads.{i}", HEAD) for i in range(len(LEVELS))]


def _within_vgg(rules: list[Rule]) -> list[Rule]:
    """Return the rules for the VGG16 alone."""
    from dataclasses import replace

    return [replace(one, ours=tuple(name.removeprefix("vgg.") for name in one.ours)) for one in rules]
