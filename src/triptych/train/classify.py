"""From a config to a trained network in a folder: builds the parts and hands them to the loop."""

import copy
import functools
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from triptych import weights
from triptych.card import Preprocess
from triptych.config import to_json
from triptych.data.loader import Loader, make_loader
from triptych.data.sources import train_and_eval
from triptych.errors import UserError
from triptych.hardware import choose_device, choose_dtype, flushed_denormals, say_dtype
from triptych.layers.low_rank import add_low_rank, merge_low_rank
from triptych.layers.residual import DropPath
from triptych.metrics.cost import count_macs, count_parameters
from triptych.models.registry import build, config_for
from triptych.network import Network
from triptych.train.config import ClassifyConfig
from triptych.train.identity import claim, identity_of
from triptych.train.loop import Outcome, endless, fit, peak_memory, training
from triptych.train.optim import layer_of, make_optimizer
from triptych.train.tasks import Classify


@dataclass
class Parts:
    """What a run is made of, built and placed."""

    config: ClassifyConfig
    net: Network
    task: Classify
    train: Loader
    evaluate: Loader
    device: torch.device
    dtype: torch.dtype
    """That products are computed in."""
    autocast: Any
    fingerprint: str
    images: tuple[int, int]
    """To train and to evaluate on."""


@flushed_denormals()
def run(config: ClassifyConfig, out: str | Path) -> Outcome:
    """Train as `config` says into the folder `out`; called again with the same arguments it goes on.

    The folder holds config.json, log.jsonl, checkpoints/, and model.safetensors: the best weights so far (the
    moving average's, if there is one), which `triptych.load(out)` reads.

    Raises:
        UserError: data, weights or config that do not fit together; a folder with another run in it.
    """
    out = Path(out)
    parts = prepare(config)
    said = {**to_json(config), "fingerprint": parts.fingerprint}
    claim(out, said)
    say_dtype(parts.dtype, parts.device)

    def keep_best(net: Network, figures: dict[str, float]) -> None:
        whole = copy.deepcopy(net)
        merge_low_rank(whole)
        whole.card = replace(parts.net.card, figures={name: float(value) for name, value in figures.items()})
        weights.save(whole, out / "model.safetensors")

    return fit(
        parts.net, parts.task, parts.train, parts.evaluate, config.loop, config.optim, config.loading.batch_size,
        out, identity_of(said), keep_best, parts.device, parts.autocast,
    )  # fmt: skip


def prepare(config: ClassifyConfig) -> Parts:
    """Open the data, build the network, and place it."""
    loading = config.loading
    columns = {name: getattr(loading, name) for name in ("image_column", "label_column", "caption_column")}
    source, held_out = train_and_eval(config.data, loading.eval_fraction, config.loop.seed, **columns)
    classes = tuple(source.classes or ())
    if not classes:
        raise UserError(
            f"{config.data} has no labels, and classification needs them; name --loading.label-column"
        )
    if len(classes) == 1:
        raise UserError(
            f"{config.data} has one class, {classes[0]!r}, and two are needed; add another folder of images"
        )
    device = choose_device(None if config.loop.device == "auto" else config.loop.device)
    net = build_network(config, classes, dict(source.groupings))
    net.to(device)
    how: Preprocess = net.card.preprocess
    augment = replace(
        config.augment,
        image_size=how.size,
        mean=how.mean,
        std=how.std,
        background=tuple(map(float, how.background)),
    )
    if config.loop.compile:
        for block in net.blocks():
            block.compile()
    dtype = choose_dtype(None if config.loop.precision == "auto" else config.loop.precision, device)
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    return Parts(
        config=config,
        net=net,
        task=Classify(augment, net.card, len(classes), config.loss),
        train=make_loader(source, loading, how, train=True, seed=config.loop.seed),
        evaluate=make_loader(held_out, loading, how, train=False),
        device=device,
        dtype=dtype,
        autocast=autocast,
        fingerprint=source.fingerprint,
        images=(len(source), len(held_out)),
    )


def build_network(
    config: ClassifyConfig, classes: tuple[str, ...], groupings: dict[str, tuple[str, ...]]
) -> Network:
    """The network to train: by name with random weights, or loaded; with a head for `classes`."""
    with torch.random.fork_rng():
        torch.manual_seed(config.loop.seed)
        if config.init is None:
            changes: dict[str, Any] = _parsed(config.model, config.model_args)
            changes["num_classes"] = len(classes)
            if config.image_size is not None:
                changes["image_size"] = config.image_size
            if config.head is not None:
                changes["head"] = config.head
            net = build(config_for(config.model, **changes))
        else:
            net = weights.load(config.init, image_size=config.image_size).float()
            if net.card.classes != classes or config.head is not None:
                net.replace_head(len(classes), config.head or "linear")
        if config.drop_path is not None:
            set_drop_path(net, config.drop_path)
        if config.train == "lora":
            add_low_rank(net, config.lora_rank)
    how = replace(net.card.preprocess, size=net.config.image_size)
    if config.eval_crop is not None:
        how = replace(how, crop=config.eval_crop)
    net.card = replace(
        net.card, preprocess=how, classes=classes, groupings=groupings, figures={}, **_origin(config)
    )
    if config.train != "all":
        if config.train == "head":
            net.requires_grad_(False)
        for name in ("head", "head_distill"):
            if hasattr(net, name):
                getattr(net, name).requires_grad_(True)
    elif config.frozen_blocks:
        freeze(net, config.frozen_blocks)
    return net


def _origin(config: ClassifyConfig) -> dict[str, str]:
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
    for name, parameter in net.named_parameters():
        if layer_of(net, name) <= blocks:
            parameter.requires_grad_(False)


def set_drop_path(net: Network, rate: float) -> None:
    """Stochastic depth that rises linearly to `rate` at the last block."""
    paths = [[part for part in block.modules() if isinstance(part, DropPath)] for block in net.blocks()]
    for i, parts in enumerate(paths):
        for part in parts:
            part.rate = rate * i / max(len(paths) - 1, 1)
    net.config = replace(net.config, drop_path=rate)


@flushed_denormals()
def dry_run(config: ClassifyConfig, steps: int = 3) -> dict[str, Any]:
    """What the run would be: sizes, cost, and time and memory estimated from `steps` real steps. Writes nothing."""
    parts = prepare(config)
    height, width = parts.net.card.preprocess.size
    optimizer = make_optimizer(parts.net, config.optim)
    training(parts.net)
    times = []
    batch = next(endless(parts.train))
    for step in range(steps):
        start = time.monotonic()
        batch = {**batch, "seed": (config.loop.seed, step, 0)}
        batch = {k: v.to(parts.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with parts.autocast():
            loss, _ = parts.task.loss(parts.net, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        times.append(time.monotonic() - start)
    whole = copy.deepcopy(parts.net)
    merge_low_rank(whole)
    macs = count_macs(whole, (1, 3, height, width))
    total = config.loop.epochs * len(parts.train)
    return {
        "config": to_json(replace(config, augment=parts.task.config)),
        "network": to_json(parts.net.config),
        "images": {
            "train": parts.images[0],
            "evaluation": parts.images[1],
        },
        "classes": parts.task.num_classes,
        "parameters": count_parameters(whole),
        "parameters_trained": count_parameters(parts.net, trainable=True),
        "flops_per_image": 2 * macs,
        "steps": round(total / config.loop.accumulate),
        "seconds_per_step": sorted(times)[len(times) // 2] * config.loop.accumulate,
        "hours": sorted(times)[len(times) // 2] * total / 3600,
        "peak_memory_bytes": peak_memory(parts.device),
        "device": str(parts.device),
    }


def _parsed(model: str, changes: tuple[str, ...]) -> dict[str, Any]:
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
