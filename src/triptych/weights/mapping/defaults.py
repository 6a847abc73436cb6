"""Publishers' defaults for what a file does not store: heads, preprocessing, class names."""

import math
import re
from functools import cache
from gzip import decompress
from importlib.resources import files
from typing import Any

from triptych.errors import CheckpointError
from triptych.model_card import IMAGENET_MEAN, IMAGENET_STD, Interpolation, Preprocess

HALF = (0.5, 0.5, 0.5)

# Widths of published ViTs whose heads do not have 64 channels: ViT-H, g, G, e and So400m have 16 heads.
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16}


# Widths of published ViTs whose heads have 64 channels.
_PUBLISHED_WIDTHS = (192, 320, 384, 512, 576, 640, 768, 832, 896, 1024, 1536)


def default_num_heads(width: int) -> tuple[int, str]:
    """Return the number of heads of a published ViT of this width, and its origin in words."""
    if width in HEADS:
        return HEADS[width], f"convention: ViTs of width {width} have {HEADS[width]} heads"
    if width % 64:
        raise CheckpointError(
            f"the number of heads at width {width} is unknown (no multiple of 64); add its config.json"
        )
    if width not in _PUBLISHED_WIDTHS:
        return (
            width // 64,
            "guess: heads of 64 channels; a config.json next to the file would say",
        )
    return width // 64, "convention: heads of 64 channels"


def square_grid(count: int, what: str) -> tuple[int, int]:
    """Return rows and columns of `count` patches.

    Raises:
        CheckpointError: they do not form a square.
    """
    side = math.isqrt(count)
    if side * side != count:
        raise CheckpointError(
            f"{what} has positions for {count} patches, which form no square; give image_size=(height, width)"
        )
    return side, side


def parse_size(value: Any) -> tuple[int, int] | None:
    """Return a size in JSON as (height, width): one number, two, or channels, height, width. None if it is none of
    these."""
    if isinstance(value, int) and value > 0:
        return value, value
    if (
        isinstance(value, list | tuple)
        and len(value) in (1, 2, 3)
        and all(isinstance(n, int) and n > 0 for n in value)
    ):
        return (value[0], value[0]) if len(value) == 1 else (value[-2], value[-1])
    return None


# ------------------------------------------------------------------------------------------- class names

_LISTS = {1000: "imagenet1k", 21841: "imagenet22k", 21843: "imagenet21k"}
_TITLES = {
    1000: "ImageNet-1k, by the number of classes",
    21841: "ImageNet-22k (fall 2011, sorted by synset), by the number of classes",
    21843: "ImageNet-21k (Google's list), by the number of classes",
}


@cache
def _imagenet() -> list[tuple[str, str, list[str]]]:
    """Return the WordNet id and the name of each class of any list, sorted by id, with the lists that contain it."""
    packed = files("triptych").joinpath("assets", "imagenet.txt.gz").read_bytes()
    lines = [line.split("\t") for line in decompress(packed).decode().splitlines()]
    return [(synset, name, lists.split()) for synset, name, lists in lines]


@cache
def imagenet_names(count: int) -> tuple[str, ...] | None:
    """Return the names of ImageNet's classes in the order of checkpoints with `count`; None for other counts."""
    if count not in _LISTS:
        return None
    return tuple(name for _, name, lists in _imagenet() if _LISTS[count] in lists)


@cache
def imagenet_synsets(count: int) -> tuple[str, ...] | None:
    """Return the WordNet ids of ImageNet's classes, such as n01440764, in the order of `imagenet_names`."""
    if count not in _LISTS:
        return None
    return tuple(synset for synset, _, lists in _imagenet() if _LISTS[count] in lists)


def imagenet_1k_in_22k() -> list[int]:
    """Return for each class of ImageNet-1k its index among the 21,841 of ImageNet-22k.

    The teddy bear is not among them; it gets the index of the teddy, a garment, as in Swin's own list.
    """
    indices, index = [], 0
    for _, _, lists in _imagenet():
        in_22k = _LISTS[21841] in lists
        if _LISTS[1000] in lists:
            indices.append(index if in_22k else 5564)
        index += in_22k
    return indices


def class_names(count: int, stored: tuple[str, ...] | None, where: str) -> tuple[tuple[str, ...] | None, str]:
    """Return a head's class names and their origin: those in the file, else ImageNet's if their number agrees."""
    if count == 0:
        return None, "no head"
    if stored is not None and len(stored) == count:
        return stored, where
    names = imagenet_names(count)
    return names, _TITLES[count] if names else "unknown"


# -------------------------------------------------------------------------------------- transformers' JSON


def from_id2label(settings: dict[str, Any]) -> tuple[str, ...] | None:
    """Return the class names in transformers' config.json, or None."""
    id2label = settings.get("id2label")
    if not isinstance(id2label, dict):
        return None
    try:
        labels = tuple(str(id2label[key]) for key in sorted(id2label, key=int))
    except ValueError:
        return None
    # transformers writes LABEL_0, LABEL_1, ... where names are missing.
    return None if all(label == f"LABEL_{i}" for i, label in enumerate(labels)) else labels


def to_id2label(classes: tuple[str, ...] | None, count: int) -> dict[str, Any]:
    """Return class names in the form of transformers' config.json; empty without a head."""
    if not count:
        return {}
    names = classes or tuple(f"LABEL_{i}" for i in range(count))
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


_PIL = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box"}


_CLIP_STATS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_IMAGENET_STATS = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
_SQUARE = {
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "image_mean": list(HALF),
    "image_std": list(HALF),
}
_CROPPED = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "resample": 3,
    **_CLIP_STATS,
}
# transformers' image processors: values of keys that preprocessor_config.json lacks.
PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": _SQUARE,
    "DeiT": {
        **_SQUARE,
        "size": {"height": 256, "width": 256},
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "resample": 3,
    },
    "Bit": _CROPPED,
    "CLIP": _CROPPED,
    "Segformer": {**_SQUARE, "size": {"height": 512, "width": 512}, **_IMAGENET_STATS},
    "DINOv3ViT": {**_SQUARE, **_IMAGENET_STATS},
}
# model_type in config.json -> the image processor that transformers takes if preprocessor_config.json names none.
_PROCESSOR_OF = {
    "deit": "DeiT",
    "dinov2": "Bit",
    "dinov2_with_registers": "Bit",
    "dinov3_vit": "DINOv3ViT",
    "upernet": "Segformer",
}
# Where a size is one number, these resize the shorter edge to it.
_BY_SHORTEST_EDGE = ("Bit", "CLIP")


def from_processor(settings: dict[str, Any], fallback: Preprocess) -> tuple[Preprocess, str]:
    """Return the preprocessing of transformers' preprocessor_config.json and its origin; `fallback` if it is
    missing.

    Raises:
        CheckpointError: it does something that `Preprocess` does not describe.
    """
    stored = settings.get("preprocessor_config")
    if stored is None:
        return fallback, f"convention: {describe_preprocess(fallback)}"
    name = _processor_name(stored, settings.get("config") or {})
    processor = PROCESSORS.get(name, {}) | {key: value for key, value in stored.items() if value is not None}
    size, squash = processor.get("size"), False
    if isinstance(size, int):
        squash = name not in _BY_SHORTEST_EDGE
    elif isinstance(size, dict):
        squash = "height" in size
    sides, crop_size = _sides(size), _sides(processor.get("crop_size"))
    crops = crop_size is not None and bool(processor.get("do_center_crop", not squash))
    if not processor.get("do_resize", True) or sides is None:
        sides, squash = crop_size or fallback.size, False
    target = crop_size if crops and crop_size else sides
    mean, std = (
        _triple(processor.get("image_mean"), fallback.mean),
        _triple(processor.get("image_std"), fallback.std),
    )
    if not processor.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    # Ours are of pixels in [0, 1].
    scale = 255.0 * (processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0)
    if abs(scale - 1) > 1e-6:
        mean, std = _triple([m / scale for m in mean], mean), _triple([s / scale for s in std], std)
    return Preprocess(
        size=target,
        crop=_crop_fraction(processor, target[0] / sides[0]) if crops else 1.0,
        mode="squash" if squash else "crop",
        interpolation=_PIL.get(processor.get("resample", 2), fallback.interpolation),  # type: ignore[arg-type]
        mean=mean,
        std=std,
    ), "preprocessor_config.json"


def _processor_name(processor: dict[str, Any], config: dict[str, Any]) -> str:
    """Return the class of an image processor without what its versions end with: "ViT" of "ViTImageProcessorFast"."""
    stored = processor.get("image_processor_type") or processor.get("feature_extractor_type")
    if not isinstance(stored, str):
        return _PROCESSOR_OF.get(str(config.get("model_type")), "ViT")
    return re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", stored)


def _crop_fraction(processor: dict[str, Any], otherwise: float) -> float:
    """Return the fraction of the crop: `crop_pct`, which we add since theirs is rounded to pixels, else `otherwise`."""
    exact = processor.get("crop_pct")
    return exact if isinstance(exact, float) and abs(exact - otherwise) < 0.1 else min(otherwise, 1.0)


def _sides(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    if isinstance(size, dict) and "height" in size and "width" in size:
        return int(size["height"]), int(size["width"])
    return None


def _triple(values: Any, otherwise: tuple[float, ...]) -> tuple[float, ...]:
    if (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(isinstance(v, int | float) for v in values)
    ):
        return float(values[0]), float(values[1]), float(values[2])
    return otherwise


def to_processor(preprocess: Preprocess) -> dict[str, Any]:
    """Return preprocessing in the form of transformers' preprocessor_config.json.

    Raises:
        CheckpointError: the preprocessing pads, which transformers' image processors for classification cannot.
    """
    if preprocess.mode == "pad":
        raise CheckpointError(
            "transformers' image processors cannot pad; set the card's mode to 'crop' or 'squash'"
        )
    height, width = preprocess.size
    common = {
        "do_resize": True,
        "resample": {name: number for number, name in _PIL.items()}[preprocess.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
    if preprocess.mode == "squash" and preprocess.crop == 1:
        return {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": height, "width": width},
            **common,
        }
    if preprocess.mode == "squash":
        return {
            "image_processor_type": "DeiTImageProcessor",
            "size": {"height": round(height / preprocess.crop), "width": round(width / preprocess.crop)},
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            "crop_pct": preprocess.crop,
            **common,
        }
    return {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": round(min(height, width) / preprocess.crop)},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "crop_pct": preprocess.crop,
        **common,
    }


# ---------------------------------------------------------------------------------------------- timm's JSON

_TIMM_MODES = {"center": "crop", "squash": "squash", "border": "pad"}


def from_pretrained_cfg(cfg: dict[str, Any], fallback: Preprocess) -> tuple[Preprocess, str]:
    """Return the preprocessing of timm's pretrained_cfg, with timm's defaults for keys that it lacks, and its origin;
    `fallback` if there is none."""
    if not cfg:
        return fallback, f"convention: {describe_preprocess(fallback)}"
    sides = cfg.get("input_size") or (3, 224, 224)
    interpolation = cfg.get("interpolation") or "bicubic"
    known = Interpolation.__args__  # type: ignore[attr-defined]
    return Preprocess(
        size=(int(sides[-2]), int(sides[-1])),
        crop=float(cfg.get("crop_pct") or 0.875),
        mode=_TIMM_MODES.get(cfg.get("crop_mode") or "center", "crop"),  # type: ignore[arg-type]
        interpolation=interpolation if interpolation in known else "bicubic",
        mean=_triple(cfg.get("mean"), IMAGENET_MEAN),
        std=_triple(cfg.get("std"), IMAGENET_STD),
    ), "pretrained_cfg in config.json"


def from_label_names(settings: dict[str, Any], cfg: dict[str, Any]) -> tuple[str, ...] | None:
    """Return the class names in timm's config.json, as descriptions where it has them; or None."""
    names = settings.get("label_names") or cfg.get("label_names")
    if not isinstance(names, list):
        return None
    descriptions = settings.get("label_descriptions") or cfg.get("label_descriptions") or {}
    return tuple(str(descriptions.get(name, name)) for name in names)


def to_pretrained_cfg(preprocess: Preprocess) -> dict[str, Any]:
    """Return preprocessing in the form of timm's pretrained_cfg."""
    return {
        "input_size": [3, *preprocess.size],
        "crop_pct": preprocess.crop,
        "crop_mode": {ours: theirs for theirs, ours in _TIMM_MODES.items()}[preprocess.mode],
        "interpolation": preprocess.interpolation,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
    }


def describe_preprocess(preprocess: Preprocess) -> str:
    """Return preprocessing in a few words."""
    names: dict[tuple[float, ...], str] = {HALF: "mean and std 0.5", IMAGENET_MEAN: "ImageNet's mean and std"}
    stats = names.get(preprocess.mean, f"mean {preprocess.mean}")
    height, width = preprocess.size
    mode = f"center crop {preprocess.crop:g}" if preprocess.mode == "crop" else preprocess.mode
    return f"{height}x{width}, {mode}, {preprocess.interpolation}, {stats}"


def imagenet_preprocess(size: tuple[int, int], crop: float, interpolation: Interpolation) -> Preprocess:
    """Return ImageNet's mean and std, shorter side resized, center cropped: torchvision, DeiT, DINO."""
    return Preprocess(size=size, crop=crop, interpolation=interpolation, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def half_preprocess(size: tuple[int, int], **options: Any) -> Preprocess:
    """Return preprocessing to pixels in [-1, 1]: Google's checkpoints."""
    return Preprocess(size=size, mean=HALF, std=HALF, **options)
