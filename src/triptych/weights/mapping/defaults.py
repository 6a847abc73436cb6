"""What a file does not say and its publishers mean: heads, preprocessing, class names. Each is named."""

import math
from functools import cache
from gzip import decompress
from importlib.resources import files
from typing import Any

from triptych.errors import UserError
from triptych.model_card import IMAGENET_MEAN, IMAGENET_STD, Interpolation, Preprocess

HALF = (0.5, 0.5, 0.5)

# Widths whose heads are not 64 channels wide, as published: ViT-H, g, G, e and So400m have 16 heads.
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16}


def heads_of(width: int) -> tuple[int, str]:
    """Number of heads of a published ViT of this width, and the words that say where it came from."""
    if width in HEADS:
        return HEADS[width], f"convention: ViTs of width {width} have {HEADS[width]} heads"
    if width % 64:
        raise UserError(
            f"heads of a network of width {width} cannot be guessed (no multiple of 64); add its config.json"
        )
    return width // 64, "convention: heads of 64 channels"


def square_grid(count: int, what: str) -> tuple[int, int]:
    """Rows and columns of so many patches, if they form a square."""
    side = math.isqrt(count)
    if side * side != count:
        raise UserError(
            f"{what} has positions for {count} patches, which form no square; say image_size=(height, width)"
        )
    return side, side


def pair(value: Any) -> tuple[int, int] | None:
    """A size out of JSON, one number or two (or channels, height, width), as (height, width)."""
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
def _imagenet() -> list[tuple[str, list[str]]]:
    """Each class of any list, sorted by synset, with the lists that it is on."""
    packed = files("triptych").joinpath("assets", "imagenet.txt.gz").read_bytes()
    lines = [line.split("\t") for line in decompress(packed).decode().splitlines()]
    return [(name, lists.split()) for name, lists in lines]


@cache
def imagenet_names(count: int) -> tuple[str, ...] | None:
    """Names of ImageNet's classes in the order of checkpoints that have so many; none for other counts."""
    if count not in _LISTS:
        return None
    return tuple(name for name, lists in _imagenet() if _LISTS[count] in lists)


def imagenet_1k_in_22k() -> list[int]:
    """For each class of ImageNet-1k its place among the 21,841 of ImageNet-22k. The teddy bear, which is not there,
    stands for the teddy that is, a garment, as in Swin's own list."""
    places, place = [], 0
    for _, lists in _imagenet():
        here = _LISTS[21841] in lists
        if _LISTS[1000] in lists:
            places.append(place if here else 5564)
        place += here
    return places


def class_names(count: int, given: tuple[str, ...] | None, where: str) -> tuple[tuple[str, ...] | None, str]:
    """Names for a head's classes: those that came with the file, else ImageNet's if there are as many."""
    if count == 0:
        return None, "no head"
    if given is not None and len(given) == count:
        return given, where
    names = imagenet_names(count)
    return names, _TITLES[count] if names else "unknown"


# -------------------------------------------------------------------------------------- transformers' JSON


def from_id2label(settings: dict[str, Any]) -> tuple[str, ...] | None:
    """Class names out of transformers' config.json."""
    found = settings.get("id2label")
    if not isinstance(found, dict):
        return None
    try:
        labels = tuple(str(found[key]) for key in sorted(found, key=int))
    except ValueError:
        return None
    # transformers fills in LABEL_0, LABEL_1, ... where nobody gave names.
    return None if all(label == f"LABEL_{i}" for i, label in enumerate(labels)) else labels


def to_id2label(classes: tuple[str, ...] | None, count: int) -> dict[str, Any]:
    """Class names as transformers' config.json has them; nothing without a head."""
    if not count:
        return {}
    names = classes or tuple(f"LABEL_{i}" for i in range(count))
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


_PIL = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box"}


def from_processor(settings: dict[str, Any], fallback: Preprocess) -> tuple[Preprocess, str]:
    """transformers' preprocessor_config.json as ours; the fallback where it is missing."""
    found = settings.get("preprocessor_config")
    if found is None:
        return fallback, f"convention: {describe(fallback)}"
    size, cut = _sides(found.get("size")), _sides(found.get("crop_size"))
    crops = bool(
        found.get(
            "do_center_crop", found.get("crop_size") is not None and "height" not in (found.get("size") or {})
        )
    )
    target = cut if crops and cut else size
    target = target if target is not None and found.get("do_resize", True) else (cut or fallback.size)
    interpolation = _PIL.get(found.get("resample", 2), fallback.interpolation)
    plain = not found.get("do_normalize", True)
    return Preprocess(
        size=target,
        crop=_share(found, target[0] / size[0]) if crops and size else 1.0,
        mode="crop" if crops or not _both_sides(found.get("size")) else "squash",
        interpolation=interpolation,  # type: ignore[arg-type]
        mean=(0.0, 0.0, 0.0) if plain else _triple(found.get("image_mean"), fallback.mean),
        std=(1.0, 1.0, 1.0) if plain else _triple(found.get("image_std"), fallback.std),
    ), "preprocessor_config.json"


def _share(found: dict[str, Any], otherwise: float) -> float:
    """The crop's share; `crop_pct` is ours beside theirs, which round it to a whole number of pixels."""
    exact = found.get("crop_pct")
    return exact if isinstance(exact, float) and abs(exact - otherwise) < 0.1 else min(otherwise, 1.0)


def _both_sides(size: Any) -> bool:
    return isinstance(size, int) or (isinstance(size, dict) and "height" in size)


def _sides(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    if isinstance(size, dict) and "height" in size and "width" in size:
        return int(size["height"]), int(size["width"])
    return None


def _triple(values: Any, otherwise: tuple[float, float, float]) -> tuple[float, float, float]:
    if (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(isinstance(v, int | float) for v in values)
    ):
        return float(values[0]), float(values[1]), float(values[2])
    return otherwise


def to_processor(preprocess: Preprocess) -> dict[str, Any]:
    """Ours as transformers' preprocessor_config.json.

    Raises:
        UserError: padding, which no classification processor of transformers does.
    """
    if preprocess.mode == "pad":
        raise UserError(
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
    if preprocess.mode == "squash":
        return {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": height, "width": width},
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


def from_pretrained_cfg(found: dict[str, Any], fallback: Preprocess) -> tuple[Preprocess, str]:
    """timm's pretrained_cfg as ours; the fallback where it is missing."""
    if not found:
        return fallback, f"convention: {describe(fallback)}"
    sides = found.get("input_size", (3, *fallback.size))
    interpolation = found.get("interpolation", fallback.interpolation)
    known = Interpolation.__args__  # type: ignore[attr-defined]
    return Preprocess(
        size=(int(sides[-2]), int(sides[-1])),
        crop=float(found.get("crop_pct") or fallback.crop),
        mode=_TIMM_MODES.get(found.get("crop_mode", "center"), "crop"),  # type: ignore[arg-type]
        interpolation=interpolation if interpolation in known else "bicubic",
        mean=_triple(found.get("mean"), fallback.mean),
        std=_triple(found.get("std"), fallback.std),
    ), "pretrained_cfg in config.json"


def from_label_names(settings: dict[str, Any], cfg: dict[str, Any]) -> tuple[str, ...] | None:
    """Class names out of timm's config.json: descriptions where there are any."""
    found = settings.get("label_names") or cfg.get("label_names")
    if not isinstance(found, list):
        return None
    descriptions = settings.get("label_descriptions") or cfg.get("label_descriptions") or {}
    return tuple(str(descriptions.get(name, name)) for name in found)


def to_pretrained_cfg(preprocess: Preprocess) -> dict[str, Any]:
    """Ours as the preprocessing part of timm's pretrained_cfg."""
    return {
        "input_size": [3, *preprocess.size],
        "crop_pct": preprocess.crop,
        "crop_mode": {ours: theirs for theirs, ours in _TIMM_MODES.items()}[preprocess.mode],
        "interpolation": preprocess.interpolation,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
    }


def describe(preprocess: Preprocess) -> str:
    """Preprocessing in a few words."""
    stats = {HALF: "mean and std 0.5", IMAGENET_MEAN: "ImageNet's mean and std"}.get(
        preprocess.mean, f"mean {preprocess.mean}"
    )
    height, width = preprocess.size
    how = f"centre crop {preprocess.crop:g}" if preprocess.mode == "crop" else preprocess.mode
    return f"{height}x{width}, {how}, {preprocess.interpolation}, {stats}"


def imagenet_style(size: tuple[int, int], crop: float, interpolation: Interpolation) -> Preprocess:
    """ImageNet's mean and std, short side resized, centre cropped: torchvision, DeiT, DINO."""
    return Preprocess(size=size, crop=crop, interpolation=interpolation, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def half_style(size: tuple[int, int], **how: Any) -> Preprocess:
    """Pixels from -1 to 1: Google's checkpoints."""
    return Preprocess(size=size, mean=HALF, std=HALF, **how)
