"""torchvision's SwinTransformer, of both versions: all steps are numbered in `features`, a stage's blocks at the odd
ones. Version 2's bias of keys is there, and made zero whenever the network runs; it is dropped here."""

from triptych.errors import UserError
from triptych.model_card import ModelCard
from triptych.models.configs.swin import SwinConfig
from triptych.models.swin import Swin
from triptych.weights.mapping.defaults import class_names, describe, imagenet_style
from triptych.weights.mapping.format import Draft, Format, Hints, Names, Reading, state
from triptych.weights.mapping.round_trip import checked
from triptych.weights.mapping.rules import to_theirs
from triptych.weights.swin.infer_config import Said, read_sizes
from triptych.weights.swin.key_layout import Layout, classifier, table

TITLE = "torchvision"
TORCHVISION = Layout(
    embed="features.0.0",
    embed_norm="features.0.2",
    block=lambda stage: f"features.{2 * stage + 1}.{{i}}.",
    merge=lambda stage: f"features.{2 * stage}",
    scale="attn.v2_logit_scale",
    fc1="mlp.0",
    fc2="mlp.3",
    whole_bias=True,
    saved=("index", "coordinates"),
    flat_index=True,
)

# (version, width, blocks of stage 3) -> what the short side is resized to before the crop.
RESIZE = {
    (1, 96, 6): 232,
    (1, 96, 18): 246,
    (1, 128, 18): 238,
    (2, 96, 6): 260,
    (2, 96, 18): 260,
    (2, 128, 18): 272,
}


def recognises(names: Names) -> bool:
    return "features.0.0.weight" in names and "features.1.0.attn.qkv.weight" in names


def read(names: Names, hints: Hints) -> Reading:
    config, facts = read_sizes(names, TORCHVISION, hints, Said())
    facts["qkv_bias"] = "names" + ("; the keys' third counts for nothing" if config.version == 2 else "")
    preprocess = imagenet_style(config.image_size, _crop(config), "bicubic")
    facts["preprocess"] = f"convention: {describe(preprocess)}"
    labels, facts["classes"] = class_names(config.num_classes, None, "")
    rules = [*table(config, TORCHVISION), *classifier(config)]
    return Reading("swin", config, rules, ModelCard(preprocess=preprocess, classes=labels), facts)


def _crop(config: SwinConfig) -> float:
    blocks = config.depths[2] if len(config.depths) > 2 else 0
    side = RESIZE.get((config.version, config.embed_dim, blocks))
    fits = side is not None and min(config.image_size) <= side
    return min(config.image_size) / side if fits else 0.875  # type: ignore[operator]


def draft(net: Swin) -> Draft:
    config = net.config
    if len(set(config.window_size)) > 1 or config.qkv_bias == "none":
        raise UserError(
            f"{TITLE} cannot say windows {config.window_size} and qkv_bias {config.qkv_bias!r}: it has one window for "
            "all stages, and biases; choose another format"
        )
    tensors = to_theirs(
        [*table(config, TORCHVISION), *classifier(config)],
        state(net),
        f"{TITLE} has no place for all of this network",
    )
    return checked(Draft(tensors), net, read, TITLE)


FORMAT = Format("torchvision", "swin", "torchvision Swin (.pth)", "torch", recognises, read, draft)
