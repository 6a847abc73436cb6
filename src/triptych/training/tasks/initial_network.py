"""What every kind of run does to the network that it trains."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from triptych import weights
from triptych.errors import UserError
from triptych.heads.segmenter import Segmenter
from triptych.layers.residual import DropPath
from triptych.models.swin import Swin
from triptych.network import Network
from triptych.training.optim import layers_of


def load_backbone(init: str, image_size: tuple[int, int] | None) -> Network:
    """The loaded network, in fp32, for a run that puts its own head on it: of a segmenter its backbone."""
    net = weights.load(init, image_size=image_size).float()
    if not isinstance(net, Segmenter):
        return net
    backbone = net.backbone
    if isinstance(backbone, Swin):
        backbone.prepare_classes()
    backbone.card = replace(backbone.card, preprocess=net.card.preprocess)
    return backbone


def origin(config: Any) -> dict[str, str]:
    """What the card says of where the network comes from."""
    if config.init is None:
        return {"source": "trained here", "notes": f"trained on {Path(config.data).name} from random weights"}
    start = Path(config.init).name
    return {
        "source": f"trained here, started from {start}",
        "notes": f"fine-tuned on {Path(config.data).name}",
    }


def freeze(net: Network, blocks: int) -> None:
    """Keep all that comes before the blocks, and the first `blocks` of them, as they are."""
    depth = len(net.blocks())
    if blocks > depth:
        raise UserError(
            f"frozen_blocks is {blocks}, and the network has {depth} blocks; give at most {depth}"
        )
    layers = layers_of(net)
    for name, parameter in net.named_parameters():
        if layers[name] <= blocks:
            parameter.requires_grad_(False)


def set_drop_path(net: Network, rate: float) -> None:
    """Stochastic depth that rises linearly to `rate` at the last block. `net` is the network of the blocks itself."""
    if not hasattr(net.config, "drop_path_rate"):
        raise UserError(
            f"drop_path_rate is {rate}, and {type(net).__name__} has no branches to drop; leave drop_path out"
        )
    paths = [[part for part in block.modules() if isinstance(part, DropPath)] for block in net.blocks()]
    for i, parts in enumerate(paths):
        for part in parts:
            part.rate = rate * i / max(len(paths) - 1, 1)
    net.config = replace(net.config, drop_path_rate=rate)


def parsed(changes: tuple[str, ...]) -> dict[str, Any]:
    """ "depth=8" as {"depth": 8}: values are JSON, else text."""
    found: dict[str, Any] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise UserError(f"model_args has {change!r}, which must be name=value, such as depth=8")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
        if isinstance(found[name], list):
            found[name] = tuple(found[name])
    return found
