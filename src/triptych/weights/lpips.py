"""LPIPS from published files: VGG16's convolutions (torchvision's, timm's or the lpips package's names) and its
linear heads."""

import re

import torch

from triptych.errors import UserError
from triptych.models.lpips import LEVELS, Lpips
from triptych.weights.files.opening import open_checkpoint
from triptych.weights.hub import locate
from triptych.weights.loading import fill
from triptych.weights.mapping.rules import Rule, drop, each, rule, same

# 1x1 convolutions to one channel, without bias <-> a weight for each channel.
HEAD = each(lambda t: t.reshape(-1), lambda t: t[None, :, None, None])
ONLY_CLASSES = "only classification reads it"


def load_lpips(vgg: str, heads: str | None = None) -> Lpips:
    """LPIPS with the weights of two files, frozen, in evaluation mode.

    Args:
        vgg: a file, folder or hub id with VGG16's convolutions, as torchvision, timm or a whole LPIPS has them.
        heads: one with the published linear heads ("lin0.model.1.weight", ...); none where `vgg` is a whole LPIPS.

    Raises:
        UserError: nothing there, or not exactly these; all offenders are named.
    """
    net = Lpips()
    whole = open_checkpoint(locate(vgg))
    inside = any(name.startswith("lin0.") for name in whole.shapes)
    if heads is None and not inside:
        raise UserError(f"{whole.path} has no linear heads of LPIPS; name the file that has, beside it")
    numbered = any(re.match(r"net\.slice1\.", name) for name in whole.shapes)
    prefix = "net.slice{level}." if numbered else "features."
    rules = convolutions(prefix)
    for name in ("classifier.*", "pre_logits.*", "head.*"):
        rules.append(drop(name, ONLY_CLASSES))
    if inside:
        known = linear_heads() if heads is None else [drop("lin*", "the other file's stand in its place")]
        rules += [*known, drop("lins.*", "the same again"), drop("scaling_layer.*", "constants")]
    fill(
        net.vgg if heads else net,
        whole,
        _within_vgg(rules) if heads else rules,
        f"{whole.path} read as VGG16",
    )
    if heads is not None:
        linear = open_checkpoint(locate(heads))
        part = torch.nn.Module()
        part.heads = net.heads
        fill(part, linear, linear_heads(), f"{linear.path} read as LPIPS's linear heads")
    return net.eval().requires_grad_(False)


def convolutions(prefix: str) -> list[Rule]:
    """The numbered layers of VGG16: a convolution and its ReLU, and a maximum between two levels."""
    rules, number = [], 0
    for level, widths in enumerate(LEVELS):
        for i in range(len(widths)):
            theirs = prefix.format(level=level + 1) + str(number)
            rules += [
                same(f"{theirs}.{part}", f"vgg.levels.{level}.{i}.{part}") for part in ("weight", "bias")
            ]
            number += 2
        number += 1
    return rules


def linear_heads() -> list[Rule]:
    return [rule(f"lin{i}.model.1.weight", f"heads.{i}", HEAD) for i in range(len(LEVELS))]


def _within_vgg(rules: list[Rule]) -> list[Rule]:
    """The same rules for the VGG16 alone."""
    from dataclasses import replace

    return [replace(one, ours=tuple(name.removeprefix("vgg.") for name in one.ours)) for one in rules]
