"""Augmentation: it depends on (batch, seed) alone, is exact when turned off, and correct when turned on."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.config import from_json, to_json
from triptych.data.augment import batch as module
from triptych.data.augment.batch import augment, augment_with_masks, draw_augmentation, preprocess_batch
from triptych.data.augment.color import LUMA, color_jitter
from triptych.data.augment.geometry import draw_geometry, warp, warp_mask
from triptych.data.augment.mixing import inside_boxes
from triptych.data.config import AugmentConfig, DataConfig
from triptych.errors import ConfigError

OFF = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
EVERYTHING = {
    "degrees": 20.0,
    "translate": (0.1, 0.1),
    "zoom": (0.7, 1.3),
    "shear": 8.0,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "grayscale": 0.2,
    "erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
}


def random_images(
    count: int, channels: int = 3, size: tuple[int, int] = (12, 10), seed: int = 0
) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, channels, *size), dtype=np.uint8))


@given(
    channels=st.sampled_from([3, 4]),
    count=st.integers(1, 5),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    out=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(-(2**70), 2**70),
)
@settings(max_examples=40, deadline=None)
def test_the_result_depends_only_on_batch_and_seed(channels, count, size, out, seed):
    x, labels = random_images(count, channels, size), torch.arange(count) % 3
    config = AugmentConfig(image_size=out, **EVERYTHING)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first, targets = augment(x, labels, config, seed, 3)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    torch.rand(7)
    again, targets_again = augment(x.clone(), labels, config, [seed], 3)
    assert torch.equal(first, again)
    assert torch.equal(targets, targets_again)

    assert first.shape == (count, 3, *out)
    assert first.dtype == torch.float32
    assert first.isfinite().all()
    assert targets.shape == (count, 3)
    assert torch.allclose(targets.sum(1), torch.ones(count), atol=1e-6)
    assert (targets >= 0).all()


def test_other_seeds_give_other_images():
    x, config = random_images(4), AugmentConfig(image_size=(12, 10), **EVERYTHING)
    results = [augment(x, None, config, seed)[0] for seed in (0, 1, (0, 1), (1, 0), 2**32)]
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_the_batch_is_not_modified():
    for channels in (3, 4):
        x = random_images(3, channels)
        original = x.clone()
        augment(x, torch.zeros(3).long(), AugmentConfig(image_size=(8, 8), **EVERYTHING), 0, 2)
        preprocess_batch(x)
        assert torch.equal(x, original)


@given(channels=st.sampled_from([3, 4]), size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
@settings(max_examples=25, deadline=None)
def test_turned_off_it_keeps_the_pixels(channels, size):
    x = random_images(3, channels, size)
    config = AugmentConfig(image_size=size, random_background=0.0, background=(10, 200, 30), **OFF)
    got, targets = augment(x, torch.tensor([2, 0, 1]), config, 5, 3)
    assert torch.allclose(got, preprocess_batch(x, background=(10, 200, 30)), atol=2e-5, rtol=0)
    assert torch.equal(targets, torch.eye(3)[[2, 0, 1]])


def test_turned_off_it_resizes_to_another_size():
    x = random_images(2, 3, (10, 14))
    config = AugmentConfig(image_size=(16, 20), **OFF, **PLAIN)
    expected = F.interpolate(x.float() / 255, size=(16, 20), mode="bilinear", align_corners=False)
    assert torch.allclose(augment(x, None, config, 0)[0], expected, atol=1e-5)


def test_a_flip_is_exact():
    x = random_images(6)
    config = AugmentConfig(image_size=(12, 10), **{**OFF, "flip": 1.0}, **PLAIN)
    assert torch.allclose(augment(x, None, config, 3)[0], x.flip(-1) / 255, atol=1e-5)
    config = AugmentConfig(image_size=(12, 10), **{**OFF, "flip": 0.5}, **PLAIN)
    flipped = draw_augmentation(6, config, 3).matrices[:, 0, 0] < 0
    assert flipped.any()
    assert not flipped.all()
    expected = torch.where(flipped[:, None, None, None], x.flip(-1), x) / 255
    assert torch.allclose(augment(x, None, config, 3)[0], expected, atol=1e-5)


def test_preprocess_batch_composites_over_the_background_and_normalizes():
    x = torch.zeros(1, 4, 1, 3, dtype=torch.uint8)
    x[0, :3] = torch.tensor([200, 100, 50])[:, None, None]
    x[0, 3, 0] = torch.tensor([0, 255, 51])
    got = preprocess_batch(x, (0.1, 0.2, 0.3), (0.5, 0.25, 1.0), (255, 0, 128))
    color, background = np.array([200, 100, 50]) / 255, np.array([255, 0, 128]) / 255
    for column, alpha in enumerate((0, 1, 0.2)):
        expected = (color * alpha + background * (1 - alpha) - [0.1, 0.2, 0.3]) / [0.5, 0.25, 1.0]
        assert np.allclose(got[0, :, 0, column], expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------ geometry


def test_the_matrices_also_warp_masks():
    """A mask that is warped by the matrices of the batch covers the object in its image."""
    mask = torch.zeros(8, 1, 64, 64)
    mask[:, :, 16:44, 20:52] = 1
    image = mask.mul(255).byte().expand(-1, 3, -1, -1)
    config = AugmentConfig(
        image_size=(64, 64), degrees=25, zoom=(0.8, 1.2), translate=(0.1, 0.1), shear=10, **PLAIN
    )
    shown, _ = augment(image, None, config, 11)
    followed = warp(mask, draw_augmentation(8, config, 11).matrices, (64, 64), "nearest")
    assert ((shown[:, :1] > 0.5).float() - followed).abs().mean() < 0.01


@given(
    low=st.floats(0.05, 1.0),
    ratio=st.floats(1.0, 3.0),
    aspect=st.floats(0.1, 10.0),
    size=st.tuples(st.integers(8, 64), st.integers(8, 64)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_crops_lie_inside_and_have_the_requested_area_and_ratio(low, ratio, aspect, size, seed):
    config = AugmentConfig(image_size=size, crop_scale=(low, 1.0), crop_ratio=(1 / ratio, ratio), flip=0.0)
    matrices = draw_geometry(16, config, np.random.default_rng(seed), np.full(16, aspect))
    width, height = matrices[:, 0, 0], matrices[:, 1, 1]  # fractions of the image
    assert (np.abs(matrices[:, 0, 2]) + width <= 1 + 1e-6).all()
    assert (np.abs(matrices[:, 1, 2]) + height <= 1 + 1e-6).all()
    shape = width * aspect / height / (size[1] / size[0])
    inside_range = (shape >= 1 / ratio * (1 - 1e-6)) & (shape <= ratio * (1 + 1e-6))
    assert inside_range.all()
    # If no draw fits, the largest box of an allowed ratio is used, which may be smaller than requested.
    largest = np.maximum(width, height) >= 1 - 1e-6
    assert ((width * height >= low * (1 - 1e-6)) | largest).all()


def test_a_rotation_turns_squares_into_squares_on_a_wide_image():
    x = torch.zeros(1, 1, 40, 80)
    x[..., 10:30, 30:50] = 1
    angle = np.pi / 2
    matrix = torch.tensor([[[np.cos(angle), np.sin(angle) / 2, 0], [-np.sin(angle) * 2, np.cos(angle), 0]]])
    turned = warp(x, matrix.float(), (40, 80), padding="zeros")
    assert torch.allclose(turned, x, atol=1e-4)
    config = AugmentConfig(image_size=(40, 80), degrees=90, **OFF)
    for theta in draw_geometry(20, config, np.random.default_rng(0)):
        square = np.diag([2.0, 1.0]) @ theta[:, :2] @ np.diag([0.5, 1.0])
        assert np.allclose(square @ square.T, np.eye(2), atol=1e-9)


def test_zoom_and_translate():
    config = AugmentConfig(image_size=(8, 8), zoom=(2.0, 2.0), **OFF)
    assert np.allclose(draw_geometry(1, config, np.random.default_rng(0))[0], [[0.5, 0, 0], [0, 0.5, 0]])
    config = AugmentConfig(image_size=(8, 8), translate=(0.25, 0.0), **OFF)
    shift = draw_geometry(200, config, np.random.default_rng(0))[:, :, 2]
    assert 0.45 < np.abs(shift[:, 0]).max() <= 0.5  # a quarter of the range from -1 to 1
    assert (shift[:, 1] == 0).all()


# --------------------------------------------------------------------------------------------------- masks


def regions(count: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Return masks (B, H, W) of overlapping boxes of the classes 0 to 5."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, *size), np.uint8)
    for mask in masks:
        for label in rng.permutation(6):
            y, x = rng.integers(0, size[0] - 6), rng.integers(0, size[1] - 6)
            mask[y : y + rng.integers(5, size[0]), x : x + rng.integers(5, size[1])] = label
    return torch.from_numpy(masks)


@given(
    size=st.tuples(st.integers(12, 50), st.integers(12, 50)),
    out=st.tuples(st.integers(24, 60), st.integers(24, 60)),
    aspect=st.floats(0.4, 2.5),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=40, deadline=None)
def test_image_and_mask_stay_together(size, out, aspect, seed):
    """If the pixels of an image encode the classes of its mask, they still do after both were warped, except where the
    image is interpolated."""
    masks = regions(3, size, seed)
    images = (masks * 40)[:, None].expand(-1, 3, -1, -1)
    config = AugmentConfig(
        image_size=out,
        crop_scale=(0.3, 1.0),
        degrees=30,
        zoom=(0.6, 1.5),
        translate=(0.2, 0.2),
        shear=10,
        **PLAIN,
    )
    shown, moved = augment_with_masks(images, masks, config, seed, torch.full((3,), aspect))
    assert moved.dtype == torch.uint8
    assert moved.shape == (3, *out)
    inside_frame = moved != 255
    distance = (shown[:, 0] * 255 / 40 - moved.float()).abs()
    # Within half an input pixel of an edge the image is a mixture of two classes; elsewhere it is exact.
    assert ((distance < 1e-3) | ~inside_frame | _near_edges(masks, config, seed, aspect)).all()
    assert set(moved.unique().tolist()) <= {*masks.unique().tolist(), 255}


def _near_edges(masks, config, seed, aspect) -> torch.Tensor:
    """Return where bilinear interpolation may mix two classes, warped by the matrices of the masks."""
    x = masks[:, None].float()
    spread = F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(-x, 3, 1, 1)
    return (
        warp_mask(
            (spread[:, 0] > 0).byte(),
            draw_augmentation(3, config, seed, torch.full((3,), aspect)).matrices,
            config.image_size,
        )
        > 0
    )


def test_images_with_masks_are_augmented_like_images_without():
    x, masks = random_images(4, 3, (20, 24)), regions(4, (20, 24))
    config = AugmentConfig(image_size=(16, 16), degrees=20, brightness=0.3, hue=0.1, erasing=1.0)
    shown, moved = augment_with_masks(x, masks, config, (3, 1))
    assert torch.equal(shown, augment(x, None, config, (3, 1))[0])
    plain = AugmentConfig(image_size=(16, 16), degrees=20)
    assert torch.equal(
        moved, augment_with_masks(x, masks, plain, (3, 1))[1]
    )  # color and erasing change the image only
    assert torch.equal(augment_with_masks(x, masks, AugmentConfig(image_size=(20, 24), **OFF), 0)[1], masks)


def test_masks_are_void_outside_of_the_image():
    config = AugmentConfig(image_size=(8, 8), zoom=(0.5, 0.5), **OFF)
    _, moved = augment_with_masks(
        random_images(1, 3, (8, 8)), torch.zeros(1, 8, 8, dtype=torch.uint8), config, 0
    )
    expected = torch.full((8, 8), 255)
    expected[2:6, 2:6] = 0
    assert torch.equal(moved[0].long(), expected)
    unknown = torch.full((1, 8, 8), 255, dtype=torch.uint8)
    assert torch.equal(augment_with_masks(random_images(1, 3, (8, 8)), unknown, config, 0)[1], unknown)


def test_transparent_images_with_masks_in_chunks(monkeypatch):
    x, masks = random_images(5, 4), regions(5, (12, 10))
    config = AugmentConfig(image_size=(9, 9), degrees=20)
    at_once = augment_with_masks(x, masks, config, 6)
    monkeypatch.setattr(module, "PIECE_BYTES", 1)
    in_chunks = augment_with_masks(x, masks, config, 6)
    assert torch.allclose(at_once[0], in_chunks[0], atol=1e-5)
    assert torch.equal(at_once[1], in_chunks[1])


@pytest.mark.parametrize("name", ["mixup", "cutmix", "rand_augment", "label_smoothing"])
def test_augmentations_that_do_not_work_with_masks_are_refused(name):
    config = AugmentConfig(image_size=(12, 10), **{name: 1})
    with pytest.raises(ConfigError, match=name):
        augment_with_masks(random_images(2), regions(2, (12, 10)), config, 0)


def test_masks_of_many_classes_are_warped_like_those_of_few():
    config = AugmentConfig(image_size=(9, 11), degrees=40.0, translate=(0.3, 0.3), crop_scale=(0.5, 1.0))
    images, few = torch.zeros(4, 3, 12, 10, dtype=torch.uint8), regions(4, (12, 10))
    _, moved = augment_with_masks(images, few, config, 3)
    _, many = augment_with_masks(images, few.to(torch.int32) + 65_000, config, 3)
    assert many.dtype == torch.int32
    assert (moved == 255).any()
    assert torch.equal(many, torch.where(moved == 255, 65_535, moved.to(torch.int32) + 65_000))


def test_wrong_masks_are_refused():
    config = AugmentConfig(image_size=(4, 4))
    for masks in (regions(2, (12, 12)), regions(3, (12, 10)), regions(2, (12, 10)).long()):
        with pytest.raises(ConfigError, match=r"must be torch.uint8 or torch.int32 of shape \(2, 12, 10\)"):
            augment_with_masks(random_images(2), masks, config, 0)


# ---------------------------------------------------------------------------------------- color, backgrounds


def colors(brightness=1.0, contrast=1.0, saturation=1.0, angle=0.0) -> torch.Tensor:
    return torch.tensor([[brightness, contrast, saturation, angle]])


def test_color_equals_torchvision_without_clipping():
    x = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.3
    luma = torch.tensor(LUMA)[None, :, None, None]
    assert torch.allclose(color_jitter(x, colors()), x, atol=1e-6)
    assert torch.allclose(color_jitter(x, colors(brightness=1.2)), x * 1.2, atol=1e-6)
    gray = (x * luma).sum(1, keepdim=True)
    assert torch.allclose(color_jitter(x, colors(contrast=0.6)), 0.6 * x + 0.4 * gray.mean(), atol=1e-6)
    assert torch.allclose(color_jitter(x, colors(saturation=0.0)), gray.expand(-1, 3, -1, -1), atol=1e-6)
    turned = color_jitter(x, colors(angle=2.0))
    assert torch.allclose((turned * luma).sum(1, keepdim=True), gray, atol=1e-3)
    assert torch.allclose(color_jitter(turned, colors(angle=-2.0)), x, atol=1e-5)
    both = color_jitter(color_jitter(x, colors(brightness=1.1)), colors(contrast=0.7))
    assert torch.allclose(color_jitter(x, colors(1.1, 0.7)), both, atol=1e-6)


def test_color_of_premultiplied_pixels():
    rgb = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    opaque = torch.cat([rgb, torch.ones(1, 1, 6, 6)], 1)
    change = colors(1.3, 0.8, 1.5, 0.4)
    assert torch.allclose(color_jitter(opaque, change)[:, :3], color_jitter(rgb, change), atol=1e-6)
    half = torch.cat([rgb * 0.5, torch.full((1, 1, 6, 6), 0.5)], 1)
    assert torch.allclose(color_jitter(half, change)[:, :3], color_jitter(rgb, change) * 0.5, atol=1e-6)
    clear = torch.zeros(1, 4, 6, 6)
    assert torch.equal(color_jitter(clear, change), clear)


def test_transparent_images_get_random_backgrounds_of_each_type():
    x = torch.zeros(64, 4, 16, 16, dtype=torch.uint8)
    config = AugmentConfig(
        image_size=(16, 16), random_background=0.75, background=(255, 0, 0), **OFF, **PLAIN
    )
    shown, _ = augment(x, None, config, 0)
    assert (shown >= 0).all()
    assert (shown <= 1).all()
    plain = (shown == torch.tensor([1.0, 0, 0])[:, None, None]).all((1, 2, 3))
    assert 5 <= plain.sum() <= 28
    flat = shown.flatten(2).std(-1).amax(1) < 1e-5
    assert (flat & ~plain).any()
    assert (~flat).any()
    without = AugmentConfig(
        image_size=(16, 16), random_background=0.0, background=(255, 0, 0), **OFF, **PLAIN
    )
    assert (augment(x, None, without, 0)[0] == torch.tensor([1.0, 0, 0])[:, None, None]).all()


def test_opaque_rgba_is_rgb():
    rgb = random_images(5, 3)
    rgba = torch.cat([rgb, torch.full((5, 1, 12, 10), 255, dtype=torch.uint8)], 1)
    config = AugmentConfig(image_size=(12, 10), brightness=0.4, hue=0.1, erasing=0.5)
    a, b = augment(rgb, None, config, 4)[0], augment(rgba, None, config, 4)[0]
    assert torch.allclose(a[:, :, 2:-2, 2:-2], b[:, :, 2:-2, 2:-2], atol=1e-4)


# ------------------------------------------------------------------------------------------- erasing, mixing


def test_erasing_fills_one_rectangle():
    x = torch.full((40, 3, 32, 32), 128, dtype=torch.uint8)
    config = AugmentConfig(image_size=(32, 32), erasing=1.0, **OFF)
    got, _ = augment(x, None, config, 0)
    hit = (got - preprocess_batch(x)).abs().amax(1) > 1e-4
    for mask in hit:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None, :])
        assert 0.01 < mask.float().mean() < 0.4
    off = AugmentConfig(image_size=(32, 32), erasing=0.0, **OFF)
    assert torch.allclose(augment(x, None, off, 0)[0], preprocess_batch(x), atol=1e-5)


def test_mixup_mixes_images_and_targets_alike():
    x = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 6, 6) * 30
    config = AugmentConfig(image_size=(6, 6), mixup=1.0, **OFF, **PLAIN)
    got, targets = augment(x, torch.arange(8), config, 1, 8)
    expected = targets @ (torch.arange(8.0) * 30 / 255)
    assert torch.allclose(got, expected[:, None, None, None].expand_as(got), atol=1e-5)
    assert ((targets > 0).sum(1) == 2).all()


def test_cutmix_targets_are_fractions_of_pixels():
    x = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 16, 16) * 30
    config = AugmentConfig(image_size=(16, 16), cutmix=1.0, **OFF, **PLAIN)
    got, targets = augment(x, torch.arange(8), config, 2, 8)
    owner = (got[:, 0] * 255 / 30).round().long()
    assert torch.allclose(F.one_hot(owner, 8).float().mean((1, 2)), targets, atol=1e-6)


def test_mixing_can_be_turned_off_and_needs_two_images():
    config = AugmentConfig(image_size=(12, 10), mixup=0.8, cutmix=1.0, mix_probability=0.0, **OFF)
    x = random_images(4)
    got, targets = augment(x, torch.arange(4), config, 0, 4)
    assert torch.equal(targets, torch.eye(4))
    assert torch.allclose(got, preprocess_batch(x), atol=1e-5)
    always = AugmentConfig(image_size=(12, 10), mixup=0.8, **OFF)
    assert torch.equal(augment(x[:1], torch.tensor([3]), always, 0, 4)[1], torch.eye(4)[3:])


def test_label_smoothing_spreads_evenly():
    config = AugmentConfig(image_size=(4, 4), label_smoothing=0.2)
    _, targets = augment(random_images(1), torch.tensor([1]), config, 0, 4)
    assert torch.allclose(targets, torch.tensor([[0.05, 0.85, 0.05, 0.05]]))


def test_boxes_cover_their_fraction_of_the_image():
    box = torch.tensor([[0.25, 0.0, 0.75, 0.5]])
    mask = inside_boxes(box, (8, 8))[0, 0]
    assert mask.sum() == 16
    assert mask[:4, 2:6].all()


def test_rand_augment_does_not_use_the_global_rng():
    x = random_images(20, 3, (16, 16))
    config = AugmentConfig(image_size=(16, 16), rand_augment=2, **OFF, **PLAIN)
    state = torch.random.get_rng_state()
    first, _ = augment(x, None, config, 0)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(3)
    assert torch.equal(first, augment(x, None, config, 0)[0])
    assert not torch.equal(first, augment(x, None, config, 1)[0])
    assert first.min() >= 0
    assert first.max() <= 1
    assert not torch.allclose(first, x / 255, atol=1e-3)


def test_chunks_do_not_change_the_result(monkeypatch):
    x, config = random_images(9, 4), AugmentConfig(image_size=(8, 8), **EVERYTHING)
    at_once = augment(x, torch.arange(9), config, 6, 9)
    monkeypatch.setattr(module, "PIECE_BYTES", 1)
    for a, b in zip(at_once, augment(x, torch.arange(9), config, 6, 9), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


# ----------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "bad",
    [
        {"flip": 1.5},
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.9, 0.5)},
        {"crop_ratio": (2.0, 1.0)},
        {"zoom": (0.0, 1.0)},
        {"image_size": (0, 5)},
        {"hue": 0.6},
        {"mixup": -1.0},
        {"rand_augment": 20},
        {"rand_augment_magnitude": 30.0},
        {"std": (0.0, 1.0, 1.0)},
        {"background": (0.0, 0.0, 300.0)},
        {"shear": 90.0},
    ],
)
def test_a_bad_config_is_refused_on_creation(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        AugmentConfig(**bad)


@pytest.mark.parametrize(
    "bad", [{"batch_size": 0}, {"eval_batch_size": 0}, {"workers": -1}, {"load_size": (0, 1)}]
)
def test_a_bad_data_config_is_refused_on_creation(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        DataConfig(**bad)


def test_configs_survive_json():
    for config in (AugmentConfig(**EVERYTHING), DataConfig(load_size=(8, 9), label_column="x")):
        assert from_json(type(config), to_json(config)) == config


def test_wrong_batches_are_refused():
    config = AugmentConfig(image_size=(4, 4))
    with pytest.raises(ConfigError, match="float32"):
        augment(torch.rand(1, 3, 4, 4), None, config, 0)
    with pytest.raises(ConfigError, match="num_classes"):
        augment(random_images(1), torch.tensor([0]), config, 0)


def test_configs_do_not_import_torch():
    code = "import sys, triptych.data.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
