"""Segmentation and masked pre-training: their losses, their runs, and what they leave behind."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tests.training.interrupted_runs import interrupt_after, last_checkpoint

import triptych as tp
from triptych.data.config import AugmentConfig, DataConfig
from triptych.data.loading.test_time_views import ViewOptions
from triptych.errors import TriptychError
from triptych.heads.config import HeadConfig, SegmenterConfig
from triptych.heads.segmenter import Segmenter
from triptych.metrics.segmentation import SegmentationMetrics
from triptych.model_card import ModelCard, Preprocess
from triptych.models.swin import Swin
from triptych.recipes import recipe
from triptych.training import dry_run, evaluate, run
from triptych.training.configs.base import (
    ClassifyConfig,
    LoopConfig,
    LossConfig,
    OptimConfig,
    PretrainConfig,
    SegmentConfig,
)
from triptych.training.optim import layers_of
from triptych.training.tasks.masked_image import random_squares
from triptych.training.tasks.segmentation import build_network, pixel_loss

SMALL = (
    "embed_dim=16",
    "depths=[1,2]",
    "num_heads=[1,2]",
    "window_size=4",
    "stem_widths=[8]",
    "patch_size=2",
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Bright squares on dark ground, with the squares as masks; a void border."""
    folder = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for i in range(20):
        mask = np.zeros((32, 32), np.uint8)
        y, x = rng.integers(2, 16, 2)
        mask[y : y + 12, x : x + 12] = 1
        pixels = np.where(mask[..., None] > 0, (230, 200, 40), (20, 40, 90)) + rng.normal(0, 20, (32, 32, 3))
        mask[0] = 255
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{i}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    (folder / "classes.txt").write_text("ground\nsquare\n")
    return folder


@pytest.fixture
def config(shapes):
    return SegmentConfig(
        data=str(shapes),
        model="swin-emoji",
        model_args=SMALL,
        image_size=(32, 32),
        head=HeadConfig(type="unet", channels=16, image_branch_channels=8, aux_channels=8),
        loss=LossConfig(dice=0.5),
        loading=DataConfig(batch_size=8, workers=0, eval_fraction=0.2),
        augment=AugmentConfig(crop_scale=(0.7, 1.0), brightness=0.1),
        optim=OptimConfig(lr=5e-3, warmup=0.1),
        loop=LoopConfig(epochs=3, ema=0.9, precision="fp32", device="cpu"),
    )


def test_cross_entropy_is_torchs_and_void_pixels_count_nowhere():
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 5, 6, 7), torch.randint(0, 5, (2, 6, 7))
    masks[0, :3] = 255
    for smooth in (0.0, 0.1):
        ours = pixel_loss(logits, masks, LossConfig(label_smoothing=smooth))
        theirs = F.cross_entropy(logits, masks, ignore_index=255, label_smoothing=smooth)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    loss = LossConfig(cross_entropy=1.0, dice=1.0, focal=1.0)
    other = logits.clone()
    other[0, :, :3] = 100 * torch.randn(5, 3, 7)
    assert torch.equal(pixel_loss(logits, masks, loss), pixel_loss(other, masks, loss))
    assert pixel_loss(logits, torch.full_like(masks, 255), loss).item() == 0.0


def test_focal_and_dice_follow_their_definitions():
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randint(0, 3, (2, 4, 4))
    p = logits.softmax(1)
    focal = dice = 0.0
    for b in range(2):
        for y in range(4):
            for x in range(4):
                right = p[b, masks[b, y, x], y, x]
                focal -= ((1 - right) ** 2 * right.log() / 32).item()
    for k in range(3):
        truth = (masks == k).double()
        both, either = (p[:, k] * truth).sum(), (p[:, k] + truth).sum()
        dice += (1 - (2 * both + 1) / (either + 1)).item() / 3
    only = {"cross_entropy": 0.0}
    assert pixel_loss(logits, masks, LossConfig(focal=1.0, **only)).item() == pytest.approx(focal, rel=1e-12)
    assert pixel_loss(logits, masks, LossConfig(dice=1.0, **only)).item() == pytest.approx(dice, rel=1e-12)
    # Without focus it is cross entropy.
    flat = pixel_loss(logits, masks, LossConfig(focal=1.0, focal_gamma=0.0, **only))
    assert flat.item() == pytest.approx(F.cross_entropy(logits, masks).item(), rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0, 2.0])
def test_focal_has_a_finite_slope_where_the_network_is_sure(gamma):
    """Below 1 the power of 1 - p is steep without end at p = 1, which saturated pixels and the void reach exactly."""
    torch.manual_seed(0)
    logits, masks = torch.randn(1, 3, 4, 5, dtype=torch.float64), torch.randint(0, 3, (1, 4, 5))
    logits[0, :, 0] = torch.tensor([0.0, 800.0, -800.0], dtype=torch.float64)[:, None]
    masks[0, 0], masks[0, 1, 0] = 1, 255
    logits[0, :, 1, 0] = torch.tensor([800.0, 0.0, 0.0])
    logits[0, :, 2, 0] = torch.tensor([12.0, 0.0, 0.0])  # nearly sure
    masks[0, 2, 0] = 0
    config = LossConfig(cross_entropy=0.0, focal=1.0, focal_gamma=gamma)
    logits.requires_grad_()
    (slope,) = torch.autograd.grad(pixel_loss(logits, masks, config), logits)
    assert slope.isfinite().all()
    assert torch.autograd.gradcheck(lambda x: pixel_loss(x, masks, config), logits, eps=1e-6, atol=1e-8)
    single = logits.detach().float().requires_grad_()
    pixel_loss(single, masks, config).backward()
    torch.testing.assert_close(single.grad.double(), slope, rtol=1e-4, atol=1e-7)


def test_dice_is_the_sum_over_maps_of_each_class():
    """The plain form, which holds a map of zeros and ones for every class."""
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 7, 9, 6, dtype=torch.float64), torch.randint(0, 5, (2, 9, 6))
    masks[0, :3] = 255
    slow, fast = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    known = masks != 255
    truth = F.one_hot(masks.masked_fill(~known, 0), 7).movedim(-1, 1) * known[:, None]
    shares = slow.softmax(1) * known[:, None]
    dice = (2 * (shares * truth).sum((0, 2, 3)) + 1) / ((shares + truth).sum((0, 2, 3)) + 1)
    expected = (1 - dice)[truth.sum((0, 2, 3)) > 0].mean()
    result = pixel_loss(fast, masks, LossConfig(cross_entropy=0.0, dice=1.0))
    assert result.item() == pytest.approx(expected.item(), rel=1e-12)
    expected.backward()
    result.backward()
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("count", [255, 256, 300])
def test_losses_and_figures_of_more_than_255_classes_count_class_255(count):
    torch.manual_seed(0)
    void = 255 if count == 255 else 65_535
    logits, masks = torch.randn(2, count, 5, 4), torch.randint(0, count, (2, 5, 4))
    masks[0, 0], masks[1, 0] = min(255, count - 1), void
    loss = pixel_loss(logits, masks, LossConfig())
    assert loss.item() == pytest.approx(F.cross_entropy(logits, masks, ignore_index=void).item(), rel=1e-6)
    metrics = SegmentationMetrics(count)
    metrics.update(logits, masks)
    figures = metrics.compute()
    assert figures["count"] == 36
    assert figures["per_class_count"][min(255, count - 1)] >= 4


def test_it_learns_and_leaves_a_segmenter_that_loads(config, tmp_path):
    outcome = run(replace(config, loop=replace(config.loop, epochs=12)), tmp_path / "r")
    assert outcome.headline == "miou"
    assert outcome.best["miou"] > 0.85
    net = tp.load(tmp_path / "r")
    assert isinstance(net, Segmenter)
    assert net.card.classes == ("ground", "square")
    assert net.card.figures["miou"] == outcome.best["miou"]
    result = evaluate(tmp_path / "r", dtype="fp32")
    assert result.task == "segmentation"
    assert result.miou == pytest.approx(outcome.best["miou"], abs=1e-6)


def segmenter(classes: tuple[str, ...], **options) -> Segmenter:
    """Small and random."""
    torch.manual_seed(0)
    swin = tp.create(
        "swin-t", embed_dim=8, depths=(1, 1), num_heads=(1, 1), window_size=4, num_classes=0, map_norms=True
    )
    head = HeadConfig(type="fpn", channels=8, num_classes=len(classes))
    net = Segmenter(SegmenterConfig(backbone=swin.config, head=head), swin)
    net.card = ModelCard(preprocess=Preprocess(**{"size": (32, 32), "crop": 1.0, **options}), classes=classes)
    return net.eval()


def test_a_model_of_more_classes_than_a_byte_counts(shapes):
    """The data's numbers become the model's, which go beyond 255."""
    names = (*(f"other {i}" for i in range(297)), "square", "more", "ground")
    result = evaluate(segmenter(names), str(shapes), workers=0, dtype="fp32")
    assert result.per_class_count.nonzero()[0].tolist() == [297, 299]
    assert result.count == 20 * 31 * 32
    few = evaluate(segmenter(("square", "ground")), str(shapes), workers=0, dtype="fp32")
    assert result.per_class_count[[297, 299]].tolist() == few.per_class_count.tolist()


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_evaluation_counts_every_pixel_at_the_masks_own_size(tmp_path, mode):
    """The metrics are those of the label maps of the pipeline, which have the size of each image."""
    rng = np.random.default_rng(1)
    names, sizes = ("class 0", "class 1", "class 2"), ((40, 64), (33, 21), (40, 64), (70, 30))
    for i, size in enumerate(sizes):
        for folder, shape, high in (("images", (*size, 3), 256), ("masks", size, 3)):
            (tmp_path / folder).mkdir(exist_ok=True)
            pixels = rng.integers(0, high, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
    net = segmenter(names, mode=mode, crop=0.875)
    pipe = tp.SegmentationPipeline(net, device="cpu", dtype="fp32")
    for words in ({}, {"scales": (1.0, 1.5), "flip": True}, {"window": (24, 16)}):
        passes = ViewOptions(**words) if words else None
        result = evaluate(net, str(tmp_path), workers=0, dtype="fp32", passes=passes, batch_size=3)
        assert result.count == sum(h * w for h, w in sizes)
        expected = np.zeros((3, 3), int)
        for i in range(len(sizes)):
            truth = np.asarray(Image.open(tmp_path / "masks" / f"{i}.png"))
            np.add.at(expected, (truth, pipe(tmp_path / "images" / f"{i}.png", **words).labels), 1)
        assert (
            np.abs(result.confusion - expected).sum() <= 4
        )  # products of other shapes may round a tie otherwise


def test_evaluation_runs_a_copy_in_evaluation_mode_and_fp32(shapes):
    net = segmenter(("ground", "square"))
    wanted = evaluate(net, str(shapes), workers=0, dtype="fp32").confusion
    before = {name: value.clone() for name, value in net.train().state_dict().items()}
    assert (evaluate(net, str(shapes), workers=0, dtype="fp32").confusion == wanted).all()
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    halves = evaluate(net.half(), str(shapes), workers=0, dtype="fp32").confusion
    assert halves.sum() == wanted.sum()
    assert next(net.parameters()).dtype == torch.float16


def test_evaluation_of_nothing_that_can_be_read(tmp_path):
    for folder, size in (("images", (9, 9)), ("masks", (5, 4))):
        (tmp_path / folder).mkdir()
        for i in range(3):
            Image.new("L", size).save(tmp_path / folder / f"{i}.png")
    with pytest.raises(
        TriptychError, match=r"none of the 3 images could be evaluated; the first: images/0\.png is 9 x 9"
    ):
        evaluate(segmenter(("class 0",)), str(tmp_path), workers=0)


def test_evaluation_takes_ignored_mask_values(shapes):
    net = segmenter(("class 0",))
    data = str(shapes)
    (shapes / "classes.txt").rename(shapes / "names.txt")
    try:
        result = evaluate(net, data, workers=0, reduce_zero_label=True)
        assert result.count == 20 * 12 * 12
        assert result.classes == ("class 0",)
        assert evaluate(net, data, workers=0, ignore_index=1).count == 20 * (31 * 32 - 12 * 12)
    finally:
        (shapes / "names.txt").rename(shapes / "classes.txt")


def test_a_run_cut_off_and_repeated_is_the_unbroken_run_bit_for_bit(config, tmp_path, monkeypatch):
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert not run(config, tmp_path / "cut").finished
    assert run(config, tmp_path / "cut").finished
    (one, _), (other, _) = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "cut")
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_pre_training_guesses_and_its_backbone_starts_a_segmenter_and_a_classifier(config, tmp_path):
    pretraining = PretrainConfig(
        data=config.data,
        model=config.model,
        model_args=SMALL,
        image_size=(32, 32),
        mask_patch=8,
        loading=DataConfig(batch_size=8, workers=0, eval_fraction=0.2),
        optim=OptimConfig(lr=5e-3),
        loop=LoopConfig(epochs=10, eval_every=9.0, precision="fp32", device="cpu"),
    )
    outcome = run(pretraining, tmp_path / "pre")
    assert outcome.headline == "loss"
    assert outcome.best["loss"] < 0.9  # the mean absolute value of normalized pixels here is above 1
    net = tp.load(tmp_path / "pre")
    assert isinstance(net, Swin)
    assert net.config.num_classes == 0
    again = replace(config, init=str(tmp_path / "pre"), loop=replace(config.loop, epochs=1))
    run(again, tmp_path / "seg")
    assert isinstance(tp.load(tmp_path / "seg"), Segmenter)
    classifier = tp.load(tmp_path / "pre", num_classes=3)
    assert classifier(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_a_vit_is_pre_trained_and_parses_too(config, tmp_path):
    vit = ("depth=4", "embed_dim=24", "num_heads=2", "mlp_ratio=2.0", "patch_size=8")
    small = replace(config, model="vit-ti16", model_args=vit, loop=replace(config.loop, epochs=1))
    run(replace(small, head=HeadConfig(type="upernet", channels=16)), tmp_path / "seg")
    net = tp.load(tmp_path / "seg")
    assert net.blocks_read == (0, 1, 2, 3)
    pretraining = PretrainConfig(
        data=config.data, model="vit-ti16", model_args=vit, image_size=(32, 32), mask_patch=8,
        loading=config.loading, loop=replace(config.loop, epochs=1),
    )  # fmt: skip
    assert run(pretraining, tmp_path / "pre").finished


def test_the_head_of_a_segmenter_stays_or_is_refused(config, tmp_path):
    tp.save(segmenter(("ground", "square")), tmp_path / "fpn.safetensors")
    tp.save(segmenter(("a", "b", "c")), tmp_path / "three.safetensors")
    again = replace(config, init=str(tmp_path / "fpn.safetensors"), loop=replace(config.loop, epochs=1))
    with pytest.raises(
        TriptychError, match=r"--head\.type fpn --head\.channels 8 --head\.aux-channels 0"
    ) as caught:
        run(again, tmp_path / "r")
    assert "\n" not in str(caught.value)
    own = HeadConfig(type="fpn", channels=8, dropout=0.3)
    for wrong in ({"channels": 16}, {"aux_channels": 8}, {"type": "upernet"}):
        with pytest.raises(TriptychError, match="is a segmenter with another head than --head"):
            run(replace(again, head=replace(own, **wrong)), tmp_path / "r")
    assert run(replace(again, head=own), tmp_path / "r").finished
    assert tp.load(tmp_path / "r").config.head == replace(own, num_classes=2)
    assert run(
        replace(again, init=str(tmp_path / "three.safetensors"), head=own), tmp_path / "other"
    ).finished


def test_the_recipe_that_trains_the_shipped_parser_on_asks_for_its_head():
    build_network(recipe("swin")(), ("a", "b"))


@pytest.mark.parametrize("family", ["swin", "vit"])
def test_a_segmenters_backbone_starts_a_classifier_and_masked_pre_training(
    family, config, image_folder, tmp_path
):
    if family == "swin":
        net = segmenter(("ground", "square"))
    else:
        vit = tp.create(
            "vit-ti16",
            depth=4,
            embed_dim=16,
            num_heads=2,
            mlp_ratio=1.0,
            num_classes=0,
            patch_size=4,
            image_size=32,
        )
        head = HeadConfig(type="fpn", channels=8)
        net = Segmenter(SegmenterConfig(backbone=vit.config, head=head), vit)
        net.card = ModelCard(preprocess=Preprocess(size=(32, 32)), classes=("ground", "square"))
    tp.save(net, tmp_path / "net.safetensors")
    loop = replace(config.loop, epochs=1, ema=0.0)
    same = {"init": str(tmp_path / "net.safetensors"), "loading": config.loading, "loop": loop}
    slow = OptimConfig(lr=1e-9)
    assert run(ClassifyConfig(data=str(image_folder), optim=slow, **same), tmp_path / "classes").finished
    classifier = tp.load(tmp_path / "classes")
    assert type(classifier) is type(net.backbone)
    assert classifier.card.classes == ("blue", "green", "red")
    backbone_parameters = dict(net.backbone.named_parameters())
    shared = {name: p for name, p in classifier.named_parameters() if name in backbone_parameters}
    assert (
        len(shared) >= len(backbone_parameters) - 4
    )  # all but the norms of a Swin's maps, of which the last becomes its norm
    for name, p in shared.items():
        torch.testing.assert_close(p, backbone_parameters[name], rtol=1e-5, atol=1e-6)
    pretraining = PretrainConfig(data=str(image_folder), mask_patch=8, **same)
    assert run(pretraining, tmp_path / "masked").finished


def test_a_segmenters_plain_encoder_cannot_classify(config, image_folder, tmp_path):
    maps = tp.create("convnet-unet", image_size=32)
    net = Segmenter(SegmenterConfig(backbone=maps.config, head=HeadConfig(type="unet", channels=16)), maps)
    tp.save(net, tmp_path / "net.safetensors")
    same = {"data": str(image_folder), "init": str(tmp_path / "net.safetensors"), "loading": config.loading}
    with pytest.raises(TriptychError, match="has no classifier; use it with a dense head"):
        run(ClassifyConfig(**same), tmp_path / "r")
    with pytest.raises(TriptychError, match="ConvNet has no patches to mask"):
        run(PretrainConfig(**same), tmp_path / "r")


def test_squares_are_whole_as_many_in_each_image_and_a_function_of_the_seed():
    images = torch.zeros(4, 3, 64, 48)
    mask = random_squares(images, 16, 0.6, (3, 7))
    assert torch.equal(mask, random_squares(images, 16, 0.6, (3, 7)))
    assert not torch.equal(mask, random_squares(images, 16, 0.6, (3, 8)))
    blocks = mask.view(4, 4, 16, 3, 16).float().mean((2, 4))
    assert set(blocks.unique().tolist()) == {0.0, 1.0}
    assert blocks.sum((1, 2)).tolist() == [8.0] * 4  # ceil(0.6 * 12)


def test_patch_merging_is_of_the_later_layer():
    layers = layers_of(tp.create("swin-t", embed_dim=8, depths=(1, 2), num_heads=(1, 1), window_size=2))
    assert layers["patch.proj.weight"] == 0
    assert layers["stages.0.blocks.0.norm1.weight"] == 1
    assert layers["stages.1.merge.norm.weight"] == 2
    assert layers["stages.1.blocks.1.norm1.weight"] == 3
    assert layers["norm.weight"] == layers["head.weight"] == 4


def test_a_batch_of_one_trains_with_pyramid_pooling(config, tmp_path):
    small = replace(config, head=HeadConfig(type="upernet", channels=16, aux_channels=8))
    small = replace(
        small, loading=replace(config.loading, batch_size=1), loop=replace(config.loop, epochs=0.2)
    )
    assert run(small, tmp_path / "r").finished


def test_a_dry_run_writes_nothing(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = dry_run(config, steps=1)
    assert report["classes"] == 2
    assert report["images"] == {"train": 16, "evaluation": 4}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": "emoji"}, "emoji has no masks"),
        ({"loading": DataConfig(batch_size=8, mask_column="nothing")}, "nothing"),
        ({"augment": AugmentConfig(mixup=0.2)}, "mixup is 0.2, which does not work with masks"),
        (
            {"model": "convnet-unet", "model_args": (), "drop_path_rate": 0.1},
            "drop_path_rate is 0.1, and ConvNet has no stochastic depth",
        ),
        ({"frozen_blocks": 9}, "frozen_blocks is 9, and the network has 3 blocks"),
    ],
)
def test_mistakes_are_one_line(config, tmp_path, change, words):
    with pytest.raises(TriptychError, match=words):
        run(replace(config, **change), tmp_path / "r")


def test_bad_configs_are_refused_at_birth():
    with pytest.raises(TriptychError, match="cross_entropy"):
        LossConfig(cross_entropy=0.0)
    with pytest.raises(TriptychError, match="mask_ratio"):
        PretrainConfig(mask_ratio=1.0)
    with pytest.raises(TriptychError, match="image_branch_channels"):
        HeadConfig(type="fpn", image_branch_channels=8)
