"""Segmentation at the image's own size: in one pass or in windows, at several scales, the same for any batch size."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import triptych as tp
from triptych.data.loading.test_time_views import ViewOptions, view_sizes
from triptych.heads.config import HeadConfig, SegmenterConfig
from triptych.heads.segmenter import Segmenter
from triptych.heads.sliding_window import InMemoryLogits, SlidingWindowLogits, resized_rows
from triptych.model_card import ModelCard, Preprocess
from triptych.pipelines.image_input import normalized
from triptych.pipelines.palette import CHOSEN_COLORS, GROUND, class_colors, far_apart, oklab
from triptych.pipelines.segmentation import SegmentationPipeline
from triptych.pipelines.segmentation_result import Segmentation, _boxes

NAMES = ("background", "cat", "dog")
rng = np.random.default_rng(0)


def make_image(height=40, width=56):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def card(size=(32, 32), mode="squash", crop=1.0, **more):
    return ModelCard(
        preprocess=Preprocess(size=size, mode=mode, crop=crop, interpolation="bilinear", **more),
        classes=NAMES,
    )


@pytest.fixture(scope="module")
def net():
    """A tiny Swin with an FPN, random, whose classes all occur."""
    torch.manual_seed(3)
    backbone = tp.create(
        "swin-t", embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, image_size=32, num_classes=0
    )
    backbone.prepare_maps()
    head = HeadConfig(type="fpn", channels=8, num_classes=3, dropout=0.0)
    segmenter = Segmenter(SegmenterConfig(backbone=backbone.config, head=head), backbone)
    nn.init.normal_(segmenter.classifier.weight, std=3)
    segmenter.card = card()
    segmenter.eval()
    with torch.no_grad():
        seen = segmenter(normalized(make_image(32, 32), segmenter.card.preprocess)[None])
        segmenter.classifier.bias -= seen.mean((0, 2, 3))
    return segmenter


@pytest.fixture(scope="module")
def pipe(net):
    return SegmentationPipeline(net, device="cpu", dtype="fp32")


class Pointwise(nn.Module):
    """Logits of a pixel from that pixel alone; `shift` adds another constant in each call, so that windows differ."""

    def __init__(self, classes=3, shift=0.0, **options):
        super().__init__()
        self.mix = nn.Conv2d(3, classes, 1)
        self.config, self.card = SimpleNamespace(num_classes=classes, in_channels=3), card(**options)
        self.shift, self.calls, self.most = shift, 0, 0

    def forward(self, images):
        self.calls, self.most = self.calls + 1, max(self.most, images.numel())
        jump = torch.tensor([(self.calls * 0.618 + i * 0.379) % 1 for i in range(len(images))])
        return self.mix(images) + self.shift * jump.view(-1, 1, 1, 1)


def test_the_result(pipe, tmp_path):
    pixels = make_image()
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    result = pipe(tmp_path / "cat.png", confidence=True)
    assert result.labels.shape == (40, 56)
    assert result.labels.dtype == np.uint8
    assert result.classes == NAMES
    assert result.source == str(tmp_path / "cat.png")
    assert (result.image == pixels).all()
    assert result.confidence.shape == (40, 56)
    assert 1 / 3 <= result.confidence.min() <= result.confidence.max() <= 1
    assert len(result.areas) > 1
    assert sum(area.pixels for area in result.areas) == 40 * 56
    assert list(result.shares.values()) == sorted(result.shares.values(), reverse=True)
    for area in result.areas:
        y, x = np.nonzero(result.labels == area.index)
        assert area.pixels == len(y) == result.mask(area.name).sum()
        assert area.share == pytest.approx(len(y) / (40 * 56))
        assert area.box == (x.min(), y.min(), x.max() + 1, y.max() + 1)
        assert area.name == NAMES[area.index]
    assert repr(result).startswith(f"<{tmp_path / 'cat.png'}: {result.areas[0].name} ")
    assert pipe(pixels).confidence is None


def test_one_pass_equals_its_steps_by_hand(net, pipe):
    """Pillow squashes the image, the network runs, its logits are enlarged, and the greatest wins."""
    pixels = make_image(50, 37)
    small = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR))
    with torch.inference_mode():
        logits = F.interpolate(net(normalized(small, net.card.preprocess)[None]), (50, 37), mode="bilinear")
    probabilities, labels = logits.softmax(1)[0].max(0)
    result = pipe(pixels, confidence=True)
    assert (
        result.labels == labels.numpy()
    ).mean() > 0.999  # the last bit may decide where two classes are alike
    np.testing.assert_allclose(result.confidence, probabilities.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "options", "passes", "inner", "outer"),
    [
        ((40, 80), {}, {}, (32, 32), (32, 32)),
        ((40, 80), {"crop": 0.8}, {}, (40, 40), (40, 40)),
        ((40, 80), {"mode": "crop"}, {}, (32, 64), (32, 64)),
        ((80, 40), {"mode": "crop", "crop": 0.8}, {}, (80, 40), (80, 40)),
        ((1, 9000), {"mode": "crop"}, {}, (32, 256), (32, 256)),
        ((40, 80), {"mode": "pad"}, {}, (16, 32), (32, 32)),
        ((1, 1000), {"mode": "pad"}, {}, (4, 32), (32, 32)),
        ((40, 80), {}, {"size": 20}, (20, 40), (20, 40)),
        ((40, 80), {"mode": "pad"}, {"size": (100, 100)}, (50, 100), (50, 100)),
        ((40, 80), {}, {"window": 16}, (40, 80), (40, 80)),
        ((40, 80), {}, {"window": 16, "size": 60}, (60, 120), (60, 120)),
        ((3, 2), {}, {"window": 16}, (4, 4), (4, 4)),
        ((1, 1), {}, {}, (32, 32), (32, 32)),
    ],
)
def test_the_size_of_the_network_input(shape, options, passes, inner, outer):
    preprocess = Preprocess(**{"size": (32, 32), "crop": 1.0, "mode": "squash", **options})
    assert view_sizes(shape, preprocess, ViewOptions(**passes), 1.0, 4) == (inner, outer)
    if min(inner) > 4:
        doubled = view_sizes(shape, preprocess, ViewOptions(**passes), 2.0, 4)
        assert doubled == (tuple(2 * n for n in inner), tuple(2 * n for n in outer))


def test_padding_has_no_share():
    """Where the model card asks for padding, its logits are cut off: every pixel keeps its own class."""
    net = Pointwise(mode="pad", size=(24, 24), background=(0, 0, 0))
    net.mix.weight.data[:] = torch.eye(3)[:, :, None, None]
    pixels = np.zeros((24, 12, 3), np.uint8)
    pixels[..., 0] = 255
    pixels[:, 6:] = (0, 255, 0)
    labels = SegmentationPipeline(net, dtype="fp32")(pixels).labels
    assert (labels[:, :6] == 0).all()
    assert (labels[:, 6:] == 1).all()


@pytest.mark.parametrize("window", [(40, 56), (64, 64), 100])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_a_window_that_covers_the_image_equals_one_pass(net, window, overlap):
    own = SegmentationPipeline(net, dtype="fp32")
    own.card = card(size=(40, 56))
    pixels = make_image()
    one, other = own(pixels, confidence=True), own(pixels, window=window, overlap=overlap, confidence=True)
    assert (one.labels == other.labels).all()
    np.testing.assert_allclose(one.confidence, other.confidence, atol=1e-6)


@pytest.mark.parametrize(
    ("window", "overlap"), [((16, 24), 0.5), ((7, 9), 0.0), ((39, 56), 0.9), ((1, 1), 0.5)]
)
def test_windows_of_a_pointwise_net_equal_one_pass(window, overlap):
    net = Pointwise(size=(40, 56))
    pipe, pixels = SegmentationPipeline(net, dtype="fp32", batch_size=3), make_image()
    full, slid = pipe(pixels, confidence=True), pipe(pixels, window=window, overlap=overlap, confidence=True)
    np.testing.assert_allclose(full.confidence, slid.confidence, atol=1e-6)
    assert (full.labels != slid.labels).mean() < 1e-3


def test_seams_vanish():
    """Windows whose logits differ by a constant meet in a ramp: no step between neighbors is larger than the constant
    over the width in which they are blended; and the classes, which the constant does not touch, are those of one pass.
    """
    net = Pointwise(shift=8.0)
    net.mix.weight.data.zero_()
    pixels = make_image(96, 80)
    pipe = SegmentationPipeline(net, dtype="fp32", batch_size=2)
    strip = SlidingWindowLogits(pipe._run, pixels, (32, 32), 0.5, 2)
    logits = torch.cat([strip.rows(y, y + 8).clone() for y in range(0, 96, 8)], dim=1)
    assert logits.max() - logits.min() > 3
    for axis in (1, 2):
        assert logits.diff(dim=axis).abs().max() < 8.0 / 8
    apart = SlidingWindowLogits(pipe._run, pixels, (16, 16), 0.0, 2).rows(0, 96)
    assert max(apart.diff(dim=axis).abs().max() for axis in (1, 2)) > 2


def test_bands_equal_one_pass_and_are_freed():
    """Rows equal those of one pass for any bands; memory holds at most the rows of two windows."""
    net = Pointwise(classes=4)
    pipe, pixels = SegmentationPipeline(replaced(net), dtype="fp32"), make_image(150, 30)
    full = pipe._run([pixels])[0]
    for sizes in ([1], [17], [64, 1, 5], [150]):
        strip, first, most = SlidingWindowLogits(pipe._run, pixels, (24, 16), 0.5, 4), 0, 0
        for step in range(1000):
            last = min(first + sizes[step % len(sizes)], 150)
            torch.testing.assert_close(strip.rows(first, last), full[:, first:last], atol=1e-5, rtol=0)
            most, first = max(most, strip.buffer.shape[1]), last
            if last == 150:
                break
        assert most <= 2 * 24 + max(sizes)
    skipping = SlidingWindowLogits(pipe._run, pixels, (24, 16), 0.5, 4)
    for first in range(0, 150, 60):  # as when the image is much smaller than what is fed
        torch.testing.assert_close(
            skipping.rows(first, first + 1), full[:, first : first + 1], atol=1e-5, rtol=0
        )


def replaced(net):
    net.card = replace(net.card, classes=None)
    return net


@pytest.mark.parametrize(
    ("size", "to"), [((9, 7), (31, 20)), ((30, 20), (11, 50)), ((5, 5), (5, 5)), ((1, 1), (6, 4))]
)
def test_rows_are_enlarged_as_the_whole(size, to):
    logits = torch.randn(3, *size)
    expected = F.interpolate(logits[None], to, mode="bilinear", align_corners=False)[0]
    for step in (1, 4, 100):
        bands = [
            resized_rows(InMemoryLogits(logits), to, y, min(y + step, to[0])) for y in range(0, to[0], step)
        ]
        torch.testing.assert_close(torch.cat(bands, dim=1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [None, (20, 20)])
def test_scales_and_flip_are_the_mean_of_each(net, pipe, window):
    """Against a slow twin: each scale and its mirror image in turn, probabilities averaged at the image's size."""
    pixels, scales = make_image(48, 40), (0.5, 1.0, 1.5)
    base = (32, 32) if window is None else (48, 40)
    total = torch.zeros(3, 48, 40)
    with torch.inference_mode():
        for scale in scales:
            size = [round(side * scale) for side in base]
            image = Image.fromarray(pixels)
            if image.size != (size[1], size[0]):
                image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
            for mirrored in (False, True):
                fed = np.asarray(image)[:, :: -1 if mirrored else 1]
                if window is None:
                    logits = net(normalized(fed, net.card.preprocess)[None])
                else:
                    logits = SlidingWindowLogits(pipe._run, fed, window, 0.5, 1).rows(0, size[0])[None]
                logits = logits.flip(-1) if mirrored else logits
                total += F.interpolate(logits, (48, 40), mode="bilinear").softmax(1)[0]
    best, labels = (total / 6).max(0)
    result = pipe(pixels, scales=scales, flip=True, confidence=True, window=window)
    np.testing.assert_allclose(result.confidence, best.numpy(), atol=1e-5)
    assert (result.labels == labels.numpy()).mean() > 0.999


def test_a_mirrored_image_has_mirrored_labels(pipe):
    pixels = make_image()
    one = pipe(pixels, flip=True, confidence=True)
    other = pipe(np.ascontiguousarray(pixels[:, ::-1]), flip=True, confidence=True)
    np.testing.assert_allclose(one.confidence, other.confidence[:, ::-1], atol=1e-5)


def test_lists_folders_and_batches_agree(net, pipe, tmp_path):
    for i, size in enumerate([(20, 30), (64, 40), (33, 33), (20, 30), (10, 99)]):
        Image.fromarray(make_image(*size)).save(tmp_path / f"{i}.png")
    files = sorted(tmp_path.iterdir())
    single = [pipe(file) for file in files]
    wide = SegmentationPipeline(net, dtype="fp32", batch_size=16, workers=2)
    for results in (
        pipe(files),
        list(pipe(tmp_path)),
        wide(files),
        list(wide(iter(files))),
        wide(files, flip=False),
    ):
        assert [one.source for one in results] == [str(file) for file in files]
        for one, other in zip(results, single, strict=True):
            assert one.labels.shape == other.labels.shape
            assert (one.labels == other.labels).mean() > 0.999


def test_every_type_of_image(pipe, tmp_path):
    rgb = make_image(20, 30)
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(rgb)))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = pipe(tmp_path / "turned.png")
    assert upright.labels.shape == (20, 30)
    assert (upright.image == rgb).all()
    assert (upright.labels == pipe(rgb).labels).all()
    clear = np.dstack([rgb, np.zeros((20, 30), np.uint8)])
    assert (pipe(clear).image == 255).all()
    gray = rgb[..., 0]
    sixteen = Image.fromarray(gray.astype(np.uint16) * 257)
    expected = pipe(np.repeat(gray[..., None], 3, axis=2)).labels
    for image in (gray, Image.fromarray(gray), sixteen):
        assert (pipe(image).labels == expected).all()
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.tif")
    assert pipe(tmp_path / "cmyk.tif").labels.shape == (20, 30)
    for size in ((1, 1), (2, 300)):
        assert pipe(make_image(*size)).labels.shape == size
        assert pipe(make_image(*size), window=16).labels.shape == size


def test_bf16_gives_nearly_the_same(net, pipe):
    pixels = make_image()
    half = SegmentationPipeline(net, device="cpu", dtype="bf16")(pixels, confidence=True)
    np.testing.assert_allclose(half.confidence, pipe(pixels, confidence=True).confidence, atol=0.06)


def test_more_than_256_classes():
    net = Pointwise(classes=300)
    net.card = replace(net.card, classes=None)
    result = SegmentationPipeline(net, dtype="fp32")(make_image(30, 30))
    assert result.labels.dtype == np.uint16
    assert result.label_image().mode == "I;16"
    assert (np.asarray(result.label_image()) == result.labels).all()
    assert result.classes[299] == "class 299"
    assert result.overlay().size == (30, 30)


def test_files(pipe, tmp_path):
    Image.fromarray(make_image()).save(tmp_path / "a cat.jpg")
    result = pipe(tmp_path / "a cat.jpg")
    written = result.save(tmp_path / "out")
    assert [path.name for path in written] == ["a cat.overlay.png", "a cat.labels.png", "a cat.json"]
    with Image.open(written[1]) as labels:
        assert labels.mode == "P"
        assert (np.asarray(labels) == result.labels).all()
        assert (np.asarray(labels.convert("RGB")) == result.colors[result.labels]).all()
    with Image.open(written[0]) as overlay:
        assert overlay.size == (56, 40)
    report = json.loads(written[2].read_text())
    assert report == result.to_json()
    assert report["areas"][0] == {
        **asdict(result.areas[0]),
        "box": list(result.areas[0].box),
        "color": result.colors[result.areas[0].index].tolist(),
    }
    assert result.save(tmp_path / "b.png") == [tmp_path / "b.png"]
    with Image.open(tmp_path / "b.png") as labels:
        assert (np.asarray(labels) == result.labels).all()
    result.save(tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text()) == report


def test_overlay_colors_all_but_the_background():
    labels = np.zeros((20, 20), np.uint8)
    labels[5:15, 5:15] = 1
    result = Segmentation(labels=labels, classes=NAMES, colors=class_colors(NAMES), image=make_image(20, 20))
    shown = np.asarray(result.overlay())
    assert (np.ptp(shown[labels == 0], axis=1) == 0).all()  # gray
    assert (np.ptp(shown[labels == 1], axis=1) > 0).all()
    assert (
        np.asarray(result.overlay(strength=0.0))
        == np.asarray(Image.fromarray(result.image).convert("L"))[..., None]
    ).sum() > 1000
    assert (np.asarray(result.overlay(strength=1.0))[7:13, 7:13] == result.colors[1]).all()
    assert result.areas[1].box == (5, 5, 15, 15)
    with pytest.raises(tp.TriptychError, match="strength is 2"):
        result.overlay(2)
    with pytest.raises(tp.TriptychError, match="no class is called 'horse'; there are background, cat"):
        result.mask("horse")


def test_colors_are_apart_and_only_added_to():
    many = far_apart(256)
    assert (many[: len(CHOSEN_COLORS)] == np.array(CHOSEN_COLORS)).all()
    assert (far_apart(40) == many[:40]).all()
    assert len(np.unique(many, axis=0)) == 256
    seen = oklab(many.astype(np.float64))
    between = np.linalg.norm(seen[:, None] - seen, axis=-1) + np.eye(256)
    assert between[:20, :20].min() > 0.08
    assert between.min() > 0.02
    assert len(far_apart(70_000)) == 70_000
    new_colors = class_colors(("background", "a", "b"))
    assert new_colors.tolist() == [list(GROUND), list(CHOSEN_COLORS[0]), list(CHOSEN_COLORS[1])]
    assert class_colors(NAMES, [(1, 2, 3), (4, 5, 6), (7, 8, 255)])[2].tolist() == [7, 8, 255]


def test_cityscapes_has_its_colors():
    from triptych.data.sources.label_maps import CITYSCAPES

    assert class_colors([name for _, name, _ in CITYSCAPES])[0].tolist() == [128, 64, 128]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is 0"),
        ({"window": (8, 8, 8)}, "window is"),
        ({"window": 2}, "window is 2, but must be at least one patch of 4 pixels"),
        ({"overlap": 1.0, "window": 8}, "overlap is 1.0"),
        ({"overlap": -0.1}, "overlap is -0.1"),
        ({"scales": ()}, "scales is"),
        ({"scales": 1.5}, r"scales is 1.5, but must be numbers .* such as \(0.5, 1.0, 1.5\)"),
        ({"scales": (0.0,)}, "scales is"),
        ({"scales": (99,)}, "scales is"),
        ({"size": -3}, "size is -3"),
        ({"size": 3.5}, "size is 3.5"),
    ],
)
def test_mistakes_are_named(pipe, options, message):
    with pytest.raises(tp.TriptychError, match=message) as caught:
        pipe(make_image(), **options)
    assert "\n" not in str(caught.value)


def test_the_wrong_kind_of_network(net, tmp_path):
    classifier = tp.create(
        "vit-ti16", depth=1, embed_dim=24, num_heads=3, mlp_ratio=1.0, image_size=32, num_classes=2
    )
    with pytest.raises(
        tp.TriptychError, match=r"is a classifier .*use ClassificationPipeline or `triptych classify`"
    ):
        SegmentationPipeline(classifier)
    with pytest.raises(
        tp.TriptychError, match=r"is a segmenter.*use SegmentationPipeline or `triptych segment`"
    ):
        tp.ClassificationPipeline(net)
    with pytest.raises(tp.TriptychError, match="no class per pixel"):
        SegmentationPipeline(tp.create("convnet-unet", widths=(4, 4)))
    with pytest.raises(tp.TriptychError, match=r"colors are of shape \(1, 3\)"):
        SegmentationPipeline(net, colors=[(1, 2, 3)])
    with pytest.raises(tp.TriptychError, match="batch_size 0"):
        SegmentationPipeline(net, batch_size=0)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(tp.TriptychError, match=r"notes\.txt"):
        SegmentationPipeline(net)(tmp_path / "notes.txt")
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(tp.TriptychError, match="contains no images"):
        SegmentationPipeline(net)(folder)


@pytest.mark.parametrize("size", [(1, 1), (13, 40), (5, 140_000), (3, 300_000)])
def test_boxes_are_those_of_each_class_by_itself(size):
    """In bands of many rows, of one, and where a row is longer than a band."""
    labels = np.random.default_rng(0).choice(
        np.array([0, 2, 3, 300], np.uint16), size, p=[0.01, 0.9, 0.08, 0.01]
    )
    labels[:, : size[1] // 3] = 2
    left, top, right, bottom = _boxes(labels, 301)
    for index in np.unique(labels):
        rows, columns = np.nonzero(labels == index)
        assert (top[index], bottom[index]) == (rows.min(), rows.max() + 1)
        assert (left[index], right[index]) == (columns.min(), columns.max() + 1)
