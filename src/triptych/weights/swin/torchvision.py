"""torchvision's SwinTransformer, of both versions.

All steps are numbered in `features`, the blocks of a stage at odd numbers. Version 2 stores a bias of keys and sets
it to zero in forward; it is dropped here."""

from triptych.errors import CheckpointError
from triptych.model_card import ModelCard
from triptych.models.configs.swin import SwinConfig
from triptych.models.swin import Swin
from triptych.weights.mapping.defaults import class_names, describe_preprocess, imagenet_preprocess
from triptych.weights.mapping.format import Draft, Format, Hints, LoadPlan, StateDictKeys, cpu_state_dict
from triptych.weights.mapping.round_trip import verify_round_trip
from triptych.weights.mapping.rules import export_tensors
from triptych.weights.swin.infer_config import SwinFileConfig, read_sizes
from triptych.weights.swin.key_layout import Layout, classifier, table

TITLE = "torchvision"
TORCHVISION = Layout(
    embed="features.0.0",
    embed_norm="features.0.2",
    block=lambda stage: f"features.{2 * stage + 1}.{{i}}.",
    merge=lambda stage: f"features.{2 * stage}",
    fc1="mlp.0",
    fc2="mlp.3",
    fused_qkv_bias=True,
    saved=("index", "coordinates"),
    flat_index=True,
)

# (version, width, blocks of stage 3) -> size that the shorter side is resized to before the crop.
RESIZE = {
    (1, 96, 6): 232,
    (1, 96, 18): 246,
    (1, 128, 18): 238,
    (2, 96, 6): 260,
    (2, 96, 18): 260,
    (2, 128, 18): 272,
}


def matches(keys: StateDictKeys) -> bool:
    return "features.0.0.weight" in keys and "features.1.0.attn.qkv.weight" in keys


def read(keys: StateDictKeys, hints: Hints) -> LoadPlan:
    config, facts = read_sizes(keys, TORCHVISION, hints, SwinFileConfig())
    facts["qkv_bias"] = "keys" + ("; the keys' third counts for nothing" if config.version == 2 else "")
    preprocess = imagenet_preprocess(config.image_size, _crop(config), "bicubic")
    facts["preprocess"] = f"convention: {describe_preprocess(preprocess)}"
    labels, facts["classes"] = class_names(config.num_classes, None, "")
    rules = [*table(config, TORCHVISION), *classifier(config)]
    return LoadPlan("swin", config, rules, ModelCard(preprocess=preprocess, classes=labels), facts)


def _crop(config: SwinConfig) -> float:
    blocks = config.depths[2] if len(config.depths) > 2 else 0
    side = RESIZE.get((config.version, config.embed_dim, blocks))
    fits = side is not None and min(config.image_size) <= side
    return min(config.image_size) / side if fits else 0.875  # type: ignore[operator]


def draft(net: Swin) -> Draft:
    config = net.config
    if len(set(config.window_size)) > 1 or config.qkv_bias == "none":
        raise CheckpointError(
            f"{TITLE} cannot store windows {config.window_size} and qkv_bias {config.qkv_bias!r}: "
            "it has one window for all stages, and biases; choose another format"
        )
    tensors = export_tensors(
        [*table(config, TORCHVISION), *classifier(config)],
        cpu_state_dict(net),
        f"{TITLE} has no key for all of this network",
    )
    return verify_round_trip(Draft(tensors), net, read, TITLE)


FORMAT = Format("torchvision", "swin", "torchvision Swin (.pth)", "torch", matches, read, draft)
