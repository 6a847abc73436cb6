"""Augmentation of whole batches on the device: uint8 in, normalised images and soft targets out.

First everything is drawn, by numpy, from the seed: a few numbers a sample. Then pixels are touched, by torch,
with no chance left. So the result is a function of (batch, config, seed) alone, and the global random streams
are neither read nor moved. Only RandAugment, whose operations do not compose, is left to kornia.

Measured in processor time on one core, 256 RGBA images of 64x64 with affine, flip, color, background, erasing,
mixup and cutmix: kornia's RandomAffine and RandomHorizontalFlip take 30 ms, ColorJitter 93 ms, RandomErasing
7 ms, and backgrounds and mixing are still to come; the whole of it here takes 48 ms, or 5,300 images/s. What
pays: one warp with a composed matrix, one matrix product for color, and pieces of the batch that stay in the
processor's cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Integer, UInt8
from torch import Tensor

from triptych import distributed
from triptych.data.augment.alpha_background import composite_over, draw_background, render_background
from triptych.data.augment.color import color_jitter, draw_color
from triptych.data.augment.geometry import draw_geometry, warp, warp_mask
from triptych.data.augment.mixing import draw_erasing, draw_mixing, erase, mix_images
from triptych.data.config import IMAGENET_MEAN, IMAGENET_STD, RGB, AugmentConfig
from triptych.data.masks import NUM_MASK_VALUES, VOID
from triptych.device import copy_to_device
from triptych.errors import UserError

# Float pixels worked on at a time on a CPU: 2 and 4 MB were alike, the whole batch took twice as long.
PIECE_BYTES = 2 << 20


@dataclass(frozen=True)
class AugmentDraws:
    """All that chance decides about a batch; the first axis of each is the sample."""

    matrices: Float[Tensor, "B 2 3"]  # output to input, for `warp`; a mask follows its image with the same
    color: Float[Tensor, "B 4"]
    background_colors: Float[Tensor, "B 2 3"]
    background_field: Float[Tensor, "B k k"]
    erase_boxes: Float[Tensor, "B 4"]
    erase_colors: Float[Tensor, "B 3"]
    mix_share: Float[Tensor, " B"]
    cut_boxes: Float[Tensor, "B 4"]
    partner: Int64[Tensor, " B"]

    def __getitem__(self, rows: slice) -> "AugmentDraws":
        return AugmentDraws(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def draw_augmentation(
    count: int,
    config: AugmentConfig,
    seed: int | Sequence[int],
    aspect: Sequence[float] | Tensor | None = None,
    device: torch.device | str = "cpu",
) -> AugmentDraws:
    """The numbers behind `augment` with the same arguments. The device has no part in them."""
    # A stream for each idea: turning one off leaves the others' draws as they were.
    place, color, background, erasing, blend = np.random.default_rng(_entropy(seed)).spawn(5)
    device = torch.device(device)
    ratios = None if aspect is None else np.asarray(torch.as_tensor(aspect).cpu(), dtype=float)
    share = distributed.current_shard()
    rows = slice(0, count) if share is None else slice(share.start, share.start + count)
    full_count = count if share is None else share.total
    if ratios is not None and share is not None:  # those of other processes' pictures have no part in ours
        ratios = np.pad(ratios, (rows.start, full_count - rows.stop), constant_values=1.0)
    drawn = (
        draw_geometry(full_count, config, place, ratios),
        draw_color(full_count, config, color),
        *draw_background(full_count, config, background),
        *draw_erasing(full_count, config, erasing),
        *draw_mixing(full_count, config, blend),
    )
    drawn_params = AugmentDraws(*(_tensor(values, device) for values in drawn))[rows]
    if share is None:
        return drawn_params
    # Pictures are mixed with others of the same process: the shift to the partner is drawn, and taken within its rows.
    at = torch.arange(count, device=device)
    shift = (drawn_params.partner - at - rows.start - 1) % full_count % max(1, count - 1) + 1
    return replace(drawn_params, partner=(at + shift) % count)


@torch.no_grad()
def augment(
    images: UInt8[Tensor, "B C H W"],
    labels: Int64[Tensor, " B"] | None,
    config: AugmentConfig,
    seed: int | Sequence[int],
    num_classes: int | None = None,
    aspect: Sequence[float] | Tensor | None = None,
) -> tuple[Float[Tensor, "B 3 h w"], Float[Tensor, "B K"] | None]:
    """A training batch as the network sees it.

    Args:
        images: uint8 RGB or RGBA of any one size, on any device.
        labels: class indices, or None where there are none (then nothing is mixed).
        config: what may happen, and `image_size`.
        seed: one number, or several such as (run's seed, step).
        num_classes: width of the targets; needed with labels.
        aspect: width over height of each picture before it was squashed to the batch's size (the loader's
            "aspect"), so that crops have the asked-for ratio on the picture itself.

    Returns:
        Normalised float32 images on the same device, and targets whose rows sum to 1 (None without labels).
    """
    if labels is not None and num_classes is None:
        raise UserError("augment got labels but no num_classes; give the number of classes")
    count, device = len(images), images.device
    draws = draw_augmentation(count, config, seed, aspect, device)
    x = torch.empty(count, 3, *config.image_size, device=device)
    for rows in _pieces(images, config.image_size):
        x[rows] = _change_pixels(images[rows], draws[rows], config)
    if config.rand_augment:
        x = rand_augment(x, config, seed)
    for rows in _pieces(x, config.image_size):
        piece = normalize(x[rows], config.mean, config.std)
        x[rows] = erase(piece, draws.erase_boxes[rows], draws.erase_colors[rows]) if config.erasing else piece
    if labels is None:
        return x, None

    targets = F.one_hot(labels, num_classes or 0).to(torch.float32)
    targets = targets * (1 - config.label_smoothing) + config.label_smoothing / targets.shape[1]
    if count < 2 or not (config.mixup or config.cutmix):
        return x, targets
    mixed, kept_fraction = torch.empty_like(x), torch.empty(count, device=device)
    for rows in _pieces(x, config.image_size):
        piece = draws[rows]
        mixed[rows], kept_fraction[rows] = mix_images(
            x, piece.mix_share, piece.cut_boxes, piece.partner, rows
        )
    return mixed, torch.lerp(targets[draws.partner], targets, kept_fraction[:, None])


@torch.no_grad()
def augment_with_masks(
    images: UInt8[Tensor, "B C H W"],
    masks: Integer[Tensor, "B H W"],
    config: AugmentConfig,
    seed: int | Sequence[int],
    aspect: Sequence[float] | Tensor | None = None,
) -> tuple[Float[Tensor, "B 3 h w"], Integer[Tensor, "B h w"]]:
    """A training batch of images and the class of each pixel, both moved alike.

    What is drawn is what `augment` draws. Crop, flip, zoom, rotation, shear and shift reach image and mask, by the
    same matrices; the mask takes its nearest pixel, and the void, which is ignored, where there is no picture.
    Everything else reaches the image alone. Erasing leaves the mask: what is hidden is to be guessed.

    Args:
        images, config, seed, aspect: as in `augment`. Nothing is mixed.
        masks: class indices of the images' size: uint8, 255 where unknown, or int32, 65,535 where unknown.

    Returns:
        Normalised float32 images, and masks of the same type, on the same device.

    Raises:
        UserError: masks of another size or type; a config that mixes or smooths, or RandAugment, which moves
            pixels where masks cannot follow.
    """
    if masks.dtype not in (torch.uint8, torch.int32) or masks.shape != images.shape[:1] + images.shape[2:]:
        raise UserError(
            f"masks are {masks.dtype} of shape {tuple(masks.shape)}, which must be torch.uint8 or torch.int32 of shape "
            f"{(len(images), *images.shape[2:])}, as the images"
        )
    for name in ("mixup", "cutmix", "rand_augment", "label_smoothing"):
        if getattr(config, name):
            raise UserError(f"{name} is {getattr(config, name)}, and masks do not go with it; set it to 0")
    x, _ = augment(images, None, config, seed, aspect=aspect)
    matrices = draw_augmentation(len(images), config, seed, aspect, images.device).matrices
    outside = VOID if masks.dtype == torch.uint8 else NUM_MASK_VALUES - 1
    out = torch.empty(len(images), *config.image_size, dtype=masks.dtype, device=images.device)
    for rows in _pieces(images, config.image_size):
        out[rows] = warp_mask(masks[rows], matrices[rows], config.image_size, outside)
    return x, out


def _change_pixels(
    images: UInt8[Tensor, "b C H W"], draws: AugmentDraws, config: AugmentConfig
) -> Float[Tensor, "b 3 h w"]:
    """One piece of the batch, up to where images are RGB from 0 to 1."""
    x = to_float(images)
    has_alpha = x.shape[1] == 4
    x = warp(x, draws.matrices, config.image_size, padding="zeros" if has_alpha else "reflection")
    if config.brightness or config.contrast or config.saturation or config.hue or config.grayscale:
        x = color_jitter(x, draws.color)
    if not has_alpha:
        return x
    background = render_background(draws.background_colors, draws.background_field, config.image_size)
    return composite_over(x, background)


@torch.no_grad()
def preprocess_batch(
    images: UInt8[Tensor, "B C H W"],
    mean: RGB = IMAGENET_MEAN,
    std: RGB = IMAGENET_STD,
    background: RGB = (255.0, 255.0, 255.0),
) -> Float[Tensor, "B 3 H W"]:
    """Evaluation: alpha over the background, normalised. The size stays; the loader has seen to it."""
    x = to_float(images)
    if x.shape[1] == 4:
        x = composite_over(x, _channel_column(background, x.device) / 255)
    return normalize(x, mean, std)


def normalize(x: Float[Tensor, "B 3 H W"], mean: RGB, std: RGB) -> Float[Tensor, "B 3 H W"]:
    """(x - mean) / std in place, with x from 0 to 1."""
    return x.sub_(_channel_column(mean, x.device)).div_(_channel_column(std, x.device))


def to_float(images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """From 0 to 1; with alpha, color times alpha (premultiplied), which may be interpolated and summed."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (3, 4):
        got = f"{images.dtype} of shape {tuple(images.shape)}"
        raise UserError(f"augmentation got {got}; it needs torch.uint8 of shape (batch, 3|4, height, width)")
    x = images.to(torch.float32).mul_(1 / 255)
    if x.shape[1] == 4:
        x[:, :3] *= x[:, 3:]
    return x


def rand_augment(
    x: Float[Tensor, "B 3 H W"], config: AugmentConfig, seed: int | Sequence[int]
) -> Float[Tensor, "B 3 H W"]:
    """RandAugment (Cubuk et al. 2019) on images from 0 to 1.

    kornia draws one set of operations a call, so the batch is split at random in up to 16 groups, each with
    its own; the signs of their strengths differ within a group.
    """
    from kornia.augmentation.auto import RandAugment

    policy = RandAugment(n=config.rand_augment, m=config.rand_augment_magnitude)  # type: ignore[arg-type]
    share = distributed.current_shard()
    rng = np.random.default_rng([*_entropy(seed), 1, *([] if share is None else [share.start])])
    order = copy_to_device(torch.from_numpy(rng.permutation(len(x))), x.device)
    out = torch.empty_like(x)
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        # Not torch.manual_seed: that reaches the devices which fork_rng was not told to keep.
        torch.default_generator.manual_seed(int(rng.integers(2**62)))
        if x.device.type == "cuda":
            torch.cuda.manual_seed(int(rng.integers(2**62)))
        for group in order.chunk(16):
            out[group] = policy(x[group]).clamp(0, 1)
    return out


def _pieces(images: Tensor, size: tuple[int, int]) -> list[slice]:
    """Rows of the batch that fit in a processor's cache; all of them at once on a GPU."""
    count, channels = images.shape[:2]
    if images.device.type != "cpu":
        return [slice(0, count)]
    pixels = max(size[0] * size[1], images.shape[-2] * images.shape[-1])
    step = max(1, PIECE_BYTES // (4 * channels * pixels))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _entropy(seed: int | Sequence[int]) -> list[int]:
    """Any integers for numpy's SeedSequence, to which (1,) and (1, 0), or 2**32 and (0, 1), are alike."""
    numbers = [int(number) % 2**64 for number in (seed if isinstance(seed, Sequence) else [seed])]
    return [len(numbers), *(word for number in numbers for word in divmod(number, 2**32))]


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    dtype = torch.int64 if values.dtype.kind == "i" else torch.float32
    return copy_to_device(torch.from_numpy(np.ascontiguousarray(values)).to(dtype), device)


def _channel_column(values: RGB, device: torch.device) -> Float[Tensor, "3 1 1"]:
    return copy_to_device(torch.tensor(values), device).view(3, 1, 1)
