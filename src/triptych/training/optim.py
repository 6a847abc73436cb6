"""Parameter groups, optimizer, learning rate schedule, and gradient clipping."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from triptych.kernels.foreach import norms
from triptych.network import Network
from triptych.training.configs.base import OptimConfig

# Suffixes of the names of parameters with two or more axes that have no weight decay: those that are added to features
# and multiply nothing; and the entries of a codebook, of which unused ones would all decay to zero.
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
    """Return AdamW over the trained parameters of `net`, with a group for each (layer, decayed or not). Each group has
    the "scale" of its learning rate: layer decay to the power of the layers above."""
    depth, layers, suffixes = len(net.blocks()), layers_of(net), tuple(f".{name}" for name in NO_DECAY)
    groups: dict[tuple[int, bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and not f".{name}".endswith(suffixes)
            sharded = hasattr(parameter, "full_tensor")  # a fused step takes no others in the same group
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
    """Return the layer of each parameter by name: 0 before the blocks, i + 1 in block i, depth + 1 after them. A part
    between two blocks, such as the patch merging of a Swin, belongs to the later one."""
    depth = len(net.blocks())
    block_layer = {id(p): i + 1 for i, block in enumerate(net.blocks()) for p in block.parameters()}
    named = list(net.named_parameters())
    layers, later = {}, depth + 1
    for name, parameter in reversed(named):
        later = layers[name] = block_layer.get(id(parameter), later)
    for name, parameter in named:
        if id(parameter) in block_layer:
            break
        layers[name] = 0
    return {name: layers[name] for name, _ in named}


def lr_at(progress: float, config: OptimConfig) -> float:
    """Return the learning rate at a fraction of the run: linear over `warmup`, then a half cosine to `final_lr`."""
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    fraction = (progress - config.warmup) / (1 - config.warmup)
    low = config.lr * config.final_lr
    return low + (config.lr - low) * (1 + math.cos(math.pi * min(fraction, 1.0))) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each group to `lr` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def update(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """Do a step of a fused optimizer, unless it is to be skipped.

    Args:
        skipped: fp32, on the optimizer's device; 1 leaves weights, moments and step counts as they are. The host does
            not wait for it. `torch.amp.GradScaler` uses the same attribute of the optimizer.
    """
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()


def clip(net: nn.Module, max_norm: float) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """Clip the gradients of a network, sharded or not, to a total norm.

    It is `torch.nn.utils.clip_grad_norm_`, which does not return the norms of single gradients.

    Returns:
        The total norm before, and the norm of each gradient with its parameter's name; of a sharded one, the norm of
        this process's shard.
    """
    sharded: list[tuple[str, nn.Parameter]] = []
    unsharded: list[tuple[str, nn.Parameter]] = []
    for name, p in net.named_parameters():
        if p.grad is not None:
            (sharded if hasattr(p, "full_tensor") else unsharded).append((name, p))
    totals: list[Any] = []
    named_norms: list[tuple[str, Any]] = []
    for part in filter(None, (sharded, unsharded)):  # no operation takes both
        part_norms = norms([p.grad for _, p in part])  # type: ignore[misc]
        totals.append(torch.linalg.vector_norm(torch.stack(part_norms)))
        named_norms += [(name, norm) for (name, _), norm in zip(part, part_norms, strict=True)]
    total = totals[0]
    if sharded:
        total = torch.linalg.vector_norm(torch.stack([totals[0].full_tensor(), *totals[1:]]))
        named_norms = [(name, n.to_local() if hasattr(n, "to_local") else n) for name, n in named_norms]
    for part in filter(None, (sharded, unsharded)):
        torch.nn.utils.clip_grads_with_norm_([p for _, p in part], max_norm, total)
    return total, named_norms
