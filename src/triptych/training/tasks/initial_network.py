"""Load, change and freeze the network that a run starts from; shared by the tasks."""

import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from triptych import weights
from triptych.data.bands import is_multiband
from triptych.data.config import DataConfig
from triptych.errors import ConfigError
from triptych.heads.segmenter import Segmenter
from triptych.layers.residual import DropPath
from triptych.model_card import Preprocess
from triptych.models.swin import Swin
from triptych.network import Network
from triptych.training.optim import layers_of

log = logging.getLogger(__name__)


def load_backbone(init: str, image_size: tuple[int, int] | None, in_channels: int | None = None) -> Network:
    """Load a network in fp32, for a task with a head of its own; of a segmenter, return the backbone."""
    net = weights.load(init, image_size=image_size, in_channels=in_channels).float()
    if not isinstance(net, Segmenter):
        return net
    backbone = net.backbone
    if isinstance(backbone, Swin):
        backbone.prepare_classes()
    backbone.card = replace(backbone.card, preprocess=net.card.preprocess)
    return backbone


def describe_origin(config: Any) -> dict[str, str]:
    """Return the fields of the model card about the network's origin."""
    if config.init is None:
        return {"source": "trained here", "notes": f"trained on {Path(config.data).name} from random weights"}
    start = Path(config.init).name
    return {
        "source": f"trained here, started from {start}",
        "notes": f"fine-tuned on {Path(config.data).name}",
    }


def freeze(net: Network, blocks: int) -> None:
    """Freeze the first `blocks` blocks of a network, and all parameters before them.

    Raises:
        ConfigError: the network has fewer blocks.
    """
    depth = len(net.blocks())
    if blocks > depth:
        raise ConfigError(
            f"frozen_blocks is {blocks}, and the network has {depth} blocks; give at most {depth}"
        )
    layers = layers_of(net)
    for name, parameter in net.named_parameters():
        if layers[name] <= blocks:
            parameter.requires_grad_(False)


def set_drop_path(net: Network, rate: float) -> None:
    """Set stochastic depth rates that rise linearly from 0 to `rate` at the last block.

    Args:
        net: the network with the blocks, which is the backbone of a segmenter.

    Raises:
        ConfigError: the network has no stochastic depth.
    """
    if not hasattr(net.config, "drop_path_rate"):
        raise ConfigError(
            f"drop_path_rate is {rate}, and {type(net).__name__} has no stochastic depth; leave drop_path_rate out"
        )
    paths = [[part for part in block.modules() if isinstance(part, DropPath)] for block in net.blocks()]
    for i, parts in enumerate(paths):
        for part in parts:
            part.rate = rate * i / max(len(paths) - 1, 1)
    net.config = replace(net.config, drop_path_rate=rate)


def parse_model_args(changes: tuple[str, ...]) -> dict[str, Any]:
    """Parse changes to a named architecture: ("depth=8",) gives {"depth": 8}. Values that are not JSON are strings.

    Raises:
        ConfigError: a change has no equals sign.
    """
    values: dict[str, Any] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"model_args has {change!r}, which must be name=value, such as depth=8")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
        if isinstance(values[name], list):
            values[name] = tuple(values[name])
    return values


def read_as(preprocess: Preprocess, loading: DataConfig, in_channels: int) -> Preprocess:
    """Return the preprocessing with the bands and the range of values that a run's images are read with, and one mean
    for a network of gray images, the luma of that for colors.

    Of another number of channels than 1 and 3, all are bands, by default the first ones; means and deviations are
    repeated over them, as `adapt_in_channels` repeats the weights.

    Raises:
        ConfigError: the network takes another number of channels than there are bands.
    """
    changes: dict[str, Any] = {"bands": loading.bands, "value_range": loading.value_range}
    preprocess = replace(preprocess, **{name: value for name, value in changes.items() if value is not None})
    if in_channels not in (1, 3):
        preprocess = replace(preprocess, bands=preprocess.bands or tuple(range(in_channels)))
    if is_multiband(preprocess.bands) or in_channels not in (1, 3):
        bands = preprocess.bands or ()
        if len(bands) != in_channels:
            raise ConfigError(
                f"the network takes images of {in_channels} channels, and {len(bands)} bands are chosen; give "
                "--in-channels and --loading.bands the same number"
            )
        if len(preprocess.mean) != in_channels:
            mean, std = (
                tuple(itertools.islice(itertools.cycle(values), in_channels))
                for values in (preprocess.mean, preprocess.std)
            )
            preprocess = replace(preprocess, mean=mean, std=std)
        log.info("images have %d bands; augmentations of color are left out", in_channels)
    if in_channels == 1 and len(preprocess.mean) == 3:
        (red, green, blue), deviation = preprocess.mean, sum(preprocess.std) / 3
        preprocess = replace(preprocess, mean=(0.299 * red + 0.587 * green + 0.114 * blue,), std=(deviation,))
    return preprocess
