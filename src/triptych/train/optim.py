"""Parameter groups, the optimiser and its schedule."""

import math

import torch

from triptych.network import Network
from triptych.train.config import OptimConfig

# Parameters of two or more axes that decay does no good: they add to the stream, they multiply nothing.
NO_DECAY = ("class_token", "distill_token", "registers", "positions", "probe")


def make_optimizer(net: Network, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over what learns in `net`, a group for each (layer, decayed or not); each group has its `scale`."""
    depth = len(net.blocks())
    groups: dict[tuple[int, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and name.split(".")[-1] not in NO_DECAY
            groups.setdefault((layer_of(net, name), decayed), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if decayed else 0.0,
                "scale": config.layer_decay ** (depth + 1 - layer),
            }
            for (layer, decayed), parameters in sorted(groups.items())
        ],
        lr=config.lr,
        betas=config.betas,
        fused=True,
    )


def layer_of(net: Network, name: str) -> int:
    """0 for what comes before the blocks, i + 1 for block i, depth + 1 for what comes after."""
    blocks = net.blocks()
    owner = {id(p): i + 1 for i, block in enumerate(blocks) for p in block.parameters()}
    at = owner.get(id(net.get_parameter(name)))
    if at is not None:
        return at
    return len(blocks) + 1 if name.split(".")[0] in ("norm", "pool", "head", "head_distill") else 0


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
