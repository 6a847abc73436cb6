"""Parameter groups, the optimiser, its schedule, and the norms of gradients."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from triptych.kernels.foreach import norms
from triptych.network import Network
from triptych.train.configs.base import OptimConfig

# Ends of the names of parameters of two or more axes that decay does no good: they add to the stream, they multiply
# nothing; and a codebook's entries, of which those that nobody uses would all be drawn to zero.
NO_DECAY = (
    "class_token",
    "distill_token",
    "registers",
    "positions",
    "probe",
    "mask_token",
    "vectors",
    "bias_table",
    "scale",
    "codebook.weight",
)


def make_optimizer(net: Network, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over what learns in `net`, a group for each (layer, decayed or not); each group has its `scale`."""
    depth, layers, ends = len(net.blocks()), layers_of(net), tuple(f".{end}" for end in NO_DECAY)
    groups: dict[tuple[int, bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and not f".{name}".endswith(ends)
            sharded = hasattr(parameter, "full_tensor")  # a fused step takes no others beside
            groups.setdefault((layers[name], decayed, sharded), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if decayed else 0.0,
                "scale": config.layer_decay ** (depth + 1 - layer),
            }
            for (layer, decayed, _), parameters in sorted(groups.items())
        ],
        lr=config.lr,
        betas=config.betas,
        fused=True,
    )


def layers_of(net: Network) -> dict[str, int]:
    """The layer of each parameter: 0 before the blocks, i + 1 in block i, depth + 1 after them. What stands between two
    blocks, such as Swin's patch merging, goes with the later one."""
    depth = len(net.blocks())
    owner = {id(p): i + 1 for i, block in enumerate(net.blocks()) for p in block.parameters()}
    named = list(net.named_parameters())
    layers, later = {}, depth + 1
    for name, parameter in reversed(named):
        later = layers[name] = owner.get(id(parameter), later)
    for name, parameter in named:
        if id(parameter) in owner:
            break
        layers[name] = 0
    return {name: layers[name] for name, _ in named}


def lr_at(progress: float, config: OptimConfig) -> float:
    """Learning rate at a share of the run: a line up over `warmup`, then half a cosine down to `final_lr`."""
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    way = (progress - config.warmup) / (1 - config.warmup)
    low = config.lr * config.final_lr
    return low + (config.lr - low) * (1 + math.cos(math.pi * min(way, 1.0))) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group its share of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def update(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """A step of the optimiser, which leaves everything as it is where `skipped` (fp32, on its device) is 1: weights,
    moments, and counts of steps. It is what `torch.amp.GradScaler` does to those that can be told so, and fused ones
    can; nobody waits for the device to say which it was."""
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()


def clip(net: nn.Module, most: float) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """The norm of all gradients together, sharded or not, which are then no longer than `most`; and that of each, with
    its parameter's name: of a sharded one that of this process's part.

    It is `torch.nn.utils.clip_grad_norm_`, which does not give the norm of each.
    """
    sharded: list[tuple[str, nn.Parameter]] = []
    whole: list[tuple[str, nn.Parameter]] = []
    for name, p in net.named_parameters():
        if p.grad is not None:
            (sharded if hasattr(p, "full_tensor") else whole).append((name, p))
    totals: list[Any] = []
    each: list[tuple[str, Any]] = []
    for part in filter(None, (sharded, whole)):  # no operation takes both
        found = norms([p.grad for _, p in part])  # type: ignore[misc]
        totals.append(torch.linalg.vector_norm(torch.stack(found)))
        each += [(name, norm) for (name, _), norm in zip(part, found, strict=True)]
    norm = totals[0]
    if sharded:
        norm = torch.linalg.vector_norm(torch.stack([totals[0].full_tensor(), *totals[1:]]))
        each = [(name, n.to_local() if hasattr(n, "to_local") else n) for name, n in each]
    for part in filter(None, (sharded, whole)):
        torch.nn.utils.clip_grads_with_norm_([p for _, p in part], most, norm)
    return norm, each
