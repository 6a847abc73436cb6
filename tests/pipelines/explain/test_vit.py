"""Rollout, distances, positions and filters against slow or closed forms, for every type of ViT."""

import json

import numpy as np
import pytest
import torch

import triptych as tp
from triptych.heads.config import HeadConfig, SegmenterConfig
from triptych.heads.segmenter import Segmenter
from triptych.model_card import ModelCard, Preprocess
from triptych.pipelines.explain.filters import first_filters, position_similarity
from triptych.pipelines.explain.vit import attention_distance, attention_rollout, explain

SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3, "mlp_ratio": 1.0, "num_classes": 5}

READOUTS = {
    "class token": {},
    "class and distillation tokens": {"distill_token": True},
    "mean of patches": {"class_token": False, "pool": "mean"},
    "class token and mean of patches": {"pool": "token+mean", "num_registers": 2},
    "attention pooling": {"class_token": False, "pool": "attention", "position": "sincos"},
}


def small(seed=0, **changes):
    torch.manual_seed(seed)
    net = tp.create("vit-ti16", **(SMALL | {"image_size": (64, 96)} | changes))
    for p in net.parameters():  # else attention is all but even
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.3)
    return net


def make_image(height=64, width=96):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("readout", READOUTS)
def test_every_readout(readout):
    net = small(**READOUTS[readout])
    result = explain(net, make_image())
    pooled = readout == "attention pooling"
    assert result.readout == readout
    assert result.heads.shape == (3 + pooled, 3, 4, 6)
    assert result.rollout.shape == (4, 6)
    assert result.rollout.sum() == pytest.approx(1)
    assert result.distances.shape == (3, 3)
    assert result.positions.shape == (4, 6, 4, 6)
    assert result.image.shape == (64, 96, 3)
    assert (result.heads >= 0).all()
    assert (result.heads.sum((2, 3)) <= 1 + 1e-5).all()
    assert len(result.classification) == 5


@pytest.mark.parametrize("readout", READOUTS)
def test_without_a_head_everything_else_is_the_same(readout):
    net, headless = small(**READOUTS[readout]), small(**READOUTS[readout])
    headless.replace_head(0)
    expected, result = explain(net, make_image()), explain(headless, make_image())
    assert len(result.classification) == 0
    assert result.to_json()["top"] == []
    assert result.readout == readout
    for name, array in expected.arrays().items():
        assert np.array_equal(result.arrays()[name], array), name


def test_a_segmenter_is_explained_at_a_point():
    """The attention is the backbone's without its head; the class is the segmenter's at that pixel."""
    backbone = small(num_classes=0)
    head = HeadConfig(type="fpn", num_classes=4, channels=8)
    net = Segmenter(SegmenterConfig(backbone=backbone.config, head=head), backbone).eval()
    net.card = ModelCard(
        preprocess=Preprocess(size=(64, 96), crop=0.5), classes=("sky", "sea", "sand", "tree")
    )
    alone = small(num_classes=0)
    alone.card = ModelCard(
        preprocess=Preprocess(size=(128, 192), mode="squash", crop=1.0)
    )  # a segmenter's input is not cropped
    for point in (None, (90, 3)):
        result, expected = (
            explain(net, make_image(), point=point),
            explain(alone, make_image(), point=point or (48, 32)),
        )
        assert result.point == expected.point
        for name, array in expected.arrays().items():
            assert np.array_equal(result.arrays()[name], array), name
    segmentation = tp.SegmentationPipeline(net, device="cpu", dtype="fp32")(make_image(), confidence=True)
    assert result.classification.label == segmentation.labels[3, 90]


def test_sdpa_stays_on_and_logits_are_the_same():
    """The logits are those of the fused kernel, and the network stays in training mode."""
    net = small()
    before = tp.ClassificationPipeline(net, dtype="fp32", device="cpu")(make_image())
    result = explain(net, make_image())
    for one, other in zip(before, result.classification, strict=True):
        assert one.index == other.index
        assert one.probability == pytest.approx(other.probability, abs=1e-5)
    assert net.training
    assert all(block.attn.tap is None for block in net.blocks())


def test_rollout_is_the_product_of_matrices():
    """Equation 1 with full matrices."""
    torch.manual_seed(0)
    attention = [torch.rand(3, 7, 7).softmax(-1) for _ in range(4)]
    rolled = torch.eye(7)
    for W in attention:
        rolled = (0.5 * W.mean(0) + 0.5 * torch.eye(7)) @ rolled
    read = torch.eye(7)[0]
    torch.testing.assert_close(attention_rollout(attention, read), rolled[0])
    torch.testing.assert_close(attention_rollout(attention, torch.full((7,), 1 / 7)), rolled.mean(0))


def test_distance_of_known_attention():
    grid, stride, prefix = (3, 4), 16, 2
    N = 12 + prefix
    itself, right, even = torch.eye(N), torch.eye(N), torch.full((N, N), 1 / N)
    for y in range(3):
        for x in range(4):
            row = torch.zeros(N)
            row[prefix + y * 4 + (x + 1 if x < 3 else x - 1)] = 0.5
            row[0] = 0.5  # the class token has no position and does not count
            right[prefix + y * 4 + x] = row
    distances = attention_distance(torch.stack([itself, right, even]), grid, stride, prefix)
    assert distances[0] == 0
    assert distances[1] == pytest.approx(16)
    places = [(y, x) for y in range(3) for x in range(4)]
    mean = np.mean([[np.hypot(a - c, b - d) for c, d in places] for a, b in places]) * 16
    assert distances[2] == pytest.approx(mean, rel=1e-5)


def test_a_network_that_attends_to_one_patch():
    """Every query matches the key of one patch: rollout and heads point at it on a rectangular grid."""
    net = small(class_token=False, pool="mean", position="none", depth=1, num_heads=1)
    with torch.no_grad():
        net.patch.proj.weight.zero_()
        net.patch.proj.weight[0, 0] = 1.0  # channel 0 of a token: how red its patch is
        net.patch.proj.bias.copy_(torch.linspace(-0.1, 0.1, 48))
        attn = net.encoder[0].attn
        attn.qkv.weight.zero_()
        attn.qkv.bias.zero_()
        attn.qkv.bias[0] = 50.0  # query: a constant
        attn.qkv.weight[48, 0] = 50.0  # key: redness
    image = np.zeros((64, 96, 3), np.uint8)
    image[16:32, 64:80, 0] = 255  # row 1, column 4
    result = explain(net, image)
    assert np.unravel_index(result.rollout.argmax(), result.rollout.shape) == (1, 4)
    assert np.unravel_index(result.heads[0, 0].argmax(), (4, 6)) == (1, 4)
    assert result.heads[0, 0, 1, 4] > 0.9


def test_another_size():
    result = explain(small(), make_image(200, 100), size=(48, 80))
    assert result.rollout.shape == (3, 5)
    assert result.image.shape == (48, 80, 3)
    assert result.positions.shape == (4, 6, 4, 6)


def test_stem_registers_and_rotary():
    conv = {"stem": "conv", "stem_widths": (8, 16), "patch_size": 4, "position": "rotary", "num_registers": 3}
    result = explain(small(**conv), make_image())
    assert result.rollout.shape == (4, 6)
    assert result.filters.shape == (8, 3, 3, 3)
    own = np.array([[result.positions[y, x, y, x] for x in range(6)] for y in range(4)])
    np.testing.assert_allclose(own, 1, atol=1e-6)


def test_no_positions():
    assert explain(small(position="none"), make_image()).positions is None


def test_position_similarity_of_a_known_table():
    net = small(class_token=False, pool="mean")
    with torch.no_grad():
        net.positions.zero_()
        net.positions[0, :, 0] = 1
        net.positions[0, 7, 0] = -1
    similarity = position_similarity(net)
    assert similarity[1, 1, 0, 0] == -1  # entry 7 of a grid with 6 columns
    assert similarity[0, 0, 3, 5] == 1


@pytest.mark.parametrize("dim", [12, 800])
def test_filters_are_the_principal_components(dim):
    """Against numpy's SVD, for both ways of taking eigenvectors."""
    net = small(embed_dim=dim, num_heads=1, depth=1, patch_size=16)
    components, share = first_filters(net)
    W = net.patch.proj.weight.detach().double().flatten(1).numpy()
    _, S, V = np.linalg.svd(W - W.mean(0), full_matrices=False)
    n = min(dim - 1, 10)
    ours = components[:n].transpose(0, 3, 1, 2).reshape(n, -1)
    np.testing.assert_allclose(np.abs((ours * V[:n]).sum(1)), 1, atol=1e-4)
    np.testing.assert_allclose(share[:n], (S**2 / (S**2).sum())[:n], rtol=1e-4)
    assert all(component.max() >= -component.min() for component in components[:n])


def test_saved_files(tmp_path):
    result = explain(small(), make_image())
    result.save(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert report["top"][0]["name"] == result.classification.name
    assert np.sum(report["rollout"]) == pytest.approx(1, abs=1e-4)
    with np.load(tmp_path / "out" / "explanation.npz") as arrays:
        for name, array in result.arrays().items():
            np.testing.assert_array_equal(arrays[name], array)


def test_not_a_vit():
    net = torch.nn.Linear(2, 2)
    net.config, net.card = type("Config", (), {"num_classes": 2, "in_channels": 3}), small().card
    with pytest.raises(tp.ConfigError, match="Linear"):
        explain(net, make_image())
