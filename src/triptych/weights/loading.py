"""`load`: from a checkpoint of any known format to a network."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace

from triptych.diffusion.config import Prediction
from triptych.errors import ConfigError
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig, replaced_size
from triptych.network import Network, on_meta_device
from triptych.weights.files.opening import open_checkpoint
from triptych.weights.filling import fill_network, rules_for
from triptych.weights.hub import locate
from triptych.weights.mapping import families
from triptych.weights.mapping.format import Hints, WeightsChoice
from triptych.weights.recognition import plan_loading
from triptych.weights.resize import (
    adapt_in_channels,
    fine_tuning_head,
    resize_positions,
    resize_windows,
    windows_in,
)

log = logging.getLogger(__name__)


def load(
    source: str | os.PathLike[str],
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    window_size: int | tuple[int, int] | Sequence[tuple[int, int]] | None = None,
    prediction: Prediction | None = None,
    weights: WeightsChoice | None = None,
    in_channels: int | None = None,
) -> Network:
    """Load a network from a checkpoint, in evaluation mode, with its `config` and `card`.

    Format, architecture and sizes are inferred from the keys and shapes of the tensors. What these cannot determine
    comes from the config next to the file, else from the defaults of the format's publisher; `inspect` lists the
    origin of each value.

    ```python
    net = tp.load("vit_base_patch16_224.safetensors", num_classes=10)
    ldm = tp.load("sd-v1-5.safetensors")
    ```

    Args:
        source: a file (.safetensors, .bin, .pth, .pt, .ckpt, .npz), a folder that holds one (as one file or in
            shards; a RUN folder, too), the name of a shipped model such as "vit-emoji", or a hub id.
        num_classes: replace the head by one of so many classes that starts at zero (`fine_tuning_head`).
        image_size: pixels, one number or (height, width). Learned positions are resampled (`resize_positions`).
        window_size: window size of a Swin in patches: one number, (height, width), or one of these for each stage
            (`resize_windows`). If neither tensors nor config store the windows, as in a SwinV2 file of timm or
            transformers without its config, this tells what they are.
        prediction: what a latent diffusion model predicts, "eps" or "v". Single files of Stable Diffusion 2 do not
            store it. It overrides the file.
        weights: of a file that holds two sets of weights, "ema" takes the exponential moving average or the teacher,
            "raw" those that training left. By default the average. In a CompVis file (model_ema.*) it is that
            unless the YAML next to the file has `use_ema: false`, and the raw ones without a YAML, as web UIs do.
        in_channels: number of channels of the input of a ViT or Swin, for gray or multi-band images; the weights of
            the first layer are summed or repeated (`adapt_in_channels`).

    Raises:
        CheckpointError: no such source; a damaged file; an unknown format; or tensors that do not match the network
            exactly, all of which are listed.
        ConfigError: an argument that does not apply to the network.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    checkpoint = open_checkpoint(locate(source))
    checkpoint, plan, format_name, dtype = plan_loading(
        checkpoint, Hints(size, window_size, prediction=prediction, weights=weights)
    )
    title = families.TITLES[plan.family]
    if prediction is not None:
        if not isinstance(plan.config, LatentDiffusionConfig):
            raise ConfigError(f"{checkpoint.path} is {title}, which predicts no noise; leave prediction out")
        plan.config = replace(plan.config, process=replace(plan.config.process, prediction=prediction))
    if window_size is not None and windows_in(plan.config) is None:
        raise ConfigError(f"{checkpoint.path} is {title}, which has no windows; leave window_size out")
    with on_meta_device():
        net = families.build(plan.config)
    fill_network(net, checkpoint, rules_for(net, plan), f"{checkpoint.path} read as {format_name}", dtype)
    if plan.finish is not None:
        plan.finish(net)
    origin = f"{format_name}; preprocessing: {plan.facts['preprocess']}; class names: {plan.facts['classes']}"
    for note in (*checkpoint.notes, *plan.notes):
        if "left out" in note or "another network" in note:
            log.warning("%s: %s", checkpoint.path, note)
    for name, where in plan.facts.items():
        if where.startswith("guess: "):
            log.warning("%s: %s is a %s", checkpoint.path, name, where)
    net.card = plan.card if format_name == "triptych" else replace(plan.card, source=origin)
    if isinstance(plan.config, LatentDiffusionConfig):
        if size is not None:
            net.config = replaced_size(plan.config, size)
    elif size is not None and size != plan.config.image_size:
        resize_positions(net, size)
    if window_size is not None:
        resize_windows(net, window_size)
    if num_classes is not None and num_classes != getattr(plan.config, "num_classes", None):
        fine_tuning_head(net, num_classes)
    if in_channels is not None:
        adapt_in_channels(net, in_channels)
    return net.eval()
