"""A Swin's attention on its map and its rollout, against loops over cells and closed forms."""

import json
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

import triptych as tp
from triptych.heads.config import HeadConfig, SegmenterConfig
from triptych.heads.segmenter import Segmenter
from triptych.layers.capture import capture
from triptych.model_card import Preprocess
from triptych.models.configs.swin import windows_of
from triptych.pipelines.explain.result import map_point
from triptych.pipelines.explain.swin import colors
from triptych.pipelines.explain.swin_windows import (
    attention_at,
    before_block,
    block_windows,
    rollout,
    window_attention_at,
)
from triptych.pipelines.explain.vit import explain


def small(seed=0, windows=3, **changes):
    torch.manual_seed(seed)
    sizes = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "window_size": windows_of(windows, 2)}
    net = tp.create("swin-t", **(sizes | {"image_size": (28, 20), "num_classes": 5} | changes)).eval()
    for p in net.parameters():  # else attention is all but even
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=0.4)
    return net


def segmenter(**changes):
    backbone = small(**({"num_classes": 0, "map_norms": True} | changes))
    head = HeadConfig(type="fpn", num_classes=3, channels=8)
    net = Segmenter(SegmenterConfig(backbone=backbone.config, head=head), backbone).eval()
    net.card = replace(
        net.card,
        preprocess=Preprocess(size=(28, 20), mode="squash", crop=1.0),
        classes=("sky", "cat", "tree"),
    )
    return net


def make_image(height=28, width=20):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def captured_maps(net, *size):
    x = torch.randn(1, 3, *size)
    with torch.no_grad(), capture(net) as maps:
        net(x)
    return maps


# The slow twin: every pair of cells of the map, one by one, from the block's own q and k


def region(block, y, x):
    """Return the region of a cell: its window, on a grid that starts before the first cell if it is shifted."""
    return tuple(
        (at - shift) // window if shift else at // window
        for at, shift, window in zip((y, x), block.shift, block.window, strict=True)
    )


def slow_matrix(attn, z, block):
    """Return the mean of the heads, (cells, cells): softmax over a cell's region, from which padding is then dropped.
    `z` is the normalized map, (H, W, D)."""
    (H, W), (h, w) = block.size, attn.window
    rows, columns = -(-H // h) * h, -(-W // w) * w
    D, heads = z.shape[-1], attn.heads
    d = D // heads
    padded = np.zeros((rows, columns, D))
    padded[:H, :W] = z
    weight, bias = (p.detach().double().numpy() for p in (attn.qkv.weight, attn.qkv.bias))
    table = attn.bias_table.detach().double().numpy().reshape(2 * h - 1, 2 * w - 1, heads)
    A = np.zeros((H * W, H * W))
    for y, x in product(range(H), range(W)):
        q = weight[:D] @ padded[y, x] + bias[:D]
        near = [
            (b, a) for b in range(rows) for a in range(columns) if region(block, b, a) == region(block, y, x)
        ]
        for head in range(heads):
            own, logits = slice(head * d, (head + 1) * d), []
            for b, a in near:
                k = weight[D : 2 * D] @ padded[b, a] + bias[D : 2 * D]
                logits.append(q[own] @ k[own] / math.sqrt(d) + table[y - b + h - 1, x - a + w - 1, head])
            seen = np.exp(np.array(logits) - max(logits))
            seen = [0 if b >= H or a >= W else s for (b, a), s in zip(near, seen, strict=True)]
            for (b, a), s in zip(near, seen, strict=True):
                if s:
                    A[y * W + x, b * W + a] += s / sum(seen) / heads
    return A


def slow_rollout(net, x, blocks):
    """Return the rollout of all cells of the last map: full matrices, multiplied from the first block on."""
    inputs = {}
    hooks = [
        block.register_forward_hook(lambda m, i, o, n=n: inputs.__setitem__(n, m.norm1(i[0])[0]))
        for n, block in enumerate(net.blocks())
    ]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    cells = blocks[0].size[0] * blocks[0].size[1]
    rolled, size = np.eye(cells), blocks[0].size
    matrices = []
    for n, (block, module) in enumerate(zip(blocks, net.blocks(), strict=True)):
        if block.size != size:
            merge = np.zeros((block.size[0] * block.size[1], size[0] * size[1]))
            for y, c in product(range(size[0]), range(size[1])):
                merge[y // 2 * block.size[1] + c // 2, y * size[1] + c] = 1
            rolled, size = merge / merge.sum(1, keepdims=True) @ rolled, block.size
        matrices.append(slow_matrix(module.attn, inputs[n].double().numpy(), block))
        rolled = (0.5 * matrices[-1] + 0.5 * np.eye(len(matrices[-1]))) @ rolled
    return rolled, matrices


@pytest.mark.parametrize("size", [(28, 20), (36, 24), (9, 50)], ids=str)
def test_rollout_and_attention_against_loops(size):
    net = small()
    x = torch.randn(1, 3, *size)
    blocks = block_windows(net, size)
    with torch.no_grad(), capture(net) as maps:
        net(x)
    attention = [maps[block.name][0] for block in blocks]
    wanted, matrices = slow_rollout(net, x, blocks)
    last = blocks[-1].size
    identity = torch.eye(last[0] * last[1]).unflatten(1, last)
    result = rollout(attention, blocks, identity)
    assert result.shape[1:] == blocks[0].size
    np.testing.assert_allclose(result.flatten(1), wanted, atol=1e-5)
    np.testing.assert_allclose(result.sum((1, 2)), 1, rtol=1e-5)
    pooled = rollout(attention, blocks, torch.full((1, *last), 1 / len(identity)))
    np.testing.assert_allclose(pooled[0].flatten(), wanted.mean(0), atol=1e-6)
    for n, (block, A) in enumerate(zip(blocks, matrices, strict=True)):
        own = torch.eye(len(A)).unflatten(1, block.size)
        step = before_block(own, attention[n], block).flatten(1) * 2 - torch.eye(len(A))
        np.testing.assert_allclose(step, A, atol=1e-5)
        assert ((step.numpy() == 0) | (A > 0)).all()  # exactly nothing between regions
        for y, c in product(range(block.size[0]), range(block.size[1])):
            point = (min(c * block.stride + 1.5, size[1] - 1), min(y * block.stride, size[0] - 1))
            at = window_attention_at(maps, net, size, n, point)
            np.testing.assert_allclose(at.ravel(), A[y * block.size[1] + c], atol=1e-5)


def test_even_attention_in_one_window_has_a_closed_form():
    """Each block keeps half of a cell's share and spreads the rest evenly; merging spreads a cell over four."""
    net = small(windows=8, depths=(3, 2), image_size=(32, 32))
    for block in net.blocks():
        for part in (block.attn.qkv.weight, block.attn.qkv.bias, block.attn.bias_table):
            torch.nn.init.zeros_(part)
    blocks = block_windows(net, (32, 32))
    maps = captured_maps(net, 32, 32)
    row = torch.zeros(1, 4, 4)
    row[0, 1, 2] = 1
    result = rollout([maps[b.name][0] for b in blocks], blocks, row)[0]
    wanted = torch.full((8, 8), (1 - 0.5**5) / 64)
    wanted[2:4, 4:6] += 0.5**5 / 4
    torch.testing.assert_close(result, wanted)


def test_even_attention_in_shifted_windows():
    """With zero weights a cell attends to its region evenly; the corners of the rolled map are separate regions."""
    net = small(windows=4, depths=(2, 1), image_size=(32, 32))
    for block in net.blocks():
        for part in (block.attn.qkv.weight, block.attn.qkv.bias, block.attn.bias_table):
            torch.nn.init.zeros_(part)
    maps = captured_maps(net, 32, 32)
    for point, y, x in (((0, 0), (0, 2), (0, 2)), ((9, 31), (6, 8), (2, 6)), ((12, 12), (2, 6), (2, 6))):
        wanted = np.zeros((8, 8))
        wanted[slice(*y), slice(*x)] = 1 / ((y[1] - y[0]) * (x[1] - x[0]))
        np.testing.assert_allclose(window_attention_at(maps, net, (32, 32), 1, point), wanted, rtol=1e-6)
    assert block_windows(net, (32, 32))[1].borders() == ([8, 24], [8, 24])
    assert block_windows(net, (32, 32))[0].borders() == ([16], [16])


def test_padding_is_left_out_and_reported():
    net = small(windows=4)
    for block in net.blocks():
        for part in (block.attn.qkv.weight, block.attn.qkv.bias, block.attn.bias_table):
            torch.nn.init.zeros_(part)
    maps = captured_maps(net, 28, 20)  # a map of 7 x 5 in windows of 4 x 4
    block = block_windows(net, (28, 20))[0]
    seen, padding = attention_at(maps[block.name][0], block, (19, 27))
    torch.testing.assert_close(padding, torch.full((2,), 13 / 16))  # 3 x 1 cells are the image's
    torch.testing.assert_close(seen[:, 4:, 4], torch.full((2, 3), 1 / 3))
    assert seen.sum() == pytest.approx(2)


def test_explanation_of_a_classifier(tmp_path):
    net = small()
    result = explain(net, make_image(), point=(10, 3))
    assert [a.shape for a in result.attention] == [(2, 2, 7, 5), (2, 4, 4, 3)]
    for maps in result.attention:
        np.testing.assert_allclose(maps.sum((2, 3)), 1, rtol=1e-5)
    assert result.rollout.shape == (7, 5)
    assert result.rollout.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(result.point_rollout.sum((1, 2)), 1, rtol=1e-5)
    assert result.point_rollout.shape == (2, 7, 5)
    assert result.windows.tolist() == [[12, 12]] * 2 + [[24, 24]] * 2
    assert result.shifts.tolist() == [[0, 0], [4, 4], [0, 0], [8, 0]]  # one window covers the 3 columns
    assert result.image.shape == (28, 20, 3)
    assert [c.shape for c in result.colors] == [(7, 5, 3), (4, 3, 3)]
    assert [n.shape for n in result.norms] == [(7, 5), (4, 3)]
    before = tp.ClassificationPipeline(net, dtype="fp32", device="cpu")(make_image())
    assert [guess.index for guess in result.classification] == [guess.index for guess in before]
    result.save(tmp_path)
    report = json.loads((tmp_path / "explanation.json").read_text())
    assert report["top"][0]["name"] == before.name
    assert np.sum(report["rollout"]) == pytest.approx(1, abs=1e-4)
    with np.load(tmp_path / "explanation.npz") as arrays:
        assert set(arrays) == set(result.arrays())
        for name, array in result.arrays().items():
            np.testing.assert_array_equal(arrays[name], array)


def test_a_segmenter_is_explained_at_a_pixel():
    net = segmenter()
    result = explain(net, make_image(56, 40), point=(39, 2))  # twice the size in the model card, squashed
    x = torch.from_numpy(result.image.copy()).permute(2, 0, 1).float()[None] / 255
    preprocess = net.card.preprocess
    x = (x - torch.tensor(preprocess.mean)[:, None, None]) / torch.tensor(preprocess.std)[:, None, None]
    with torch.no_grad():
        probabilities = net(x)[0, :, 1, 19].softmax(0)
    assert result.point == (19.5, 1)
    assert (
        np.ptp(result.norms[0]) > 0.1 * result.norms[0].mean()
    )  # not of the normalized maps that the head reads
    assert result.classification.probability == pytest.approx(float(probabilities.max()), abs=1e-5)
    assert result.classification.name == net.card.classes[int(probabilities.argmax())]
    assert explain(net, make_image()).point == (10, 14)  # the middle


def test_the_default_device_does_not_matter():
    net = segmenter()
    wanted = explain(net, make_image(), point=(3, 4)).arrays()
    pipe = tp.ClassificationPipeline(small(), device="cpu", dtype="fp32")
    named = pipe(make_image())
    with torch.device("meta"):
        arrays = explain(net, make_image(), point=(3, 4)).arrays()
        assert [guess.name for guess in pipe(make_image())] == [guess.name for guess in named]
    for name, array in wanted.items():
        np.testing.assert_array_equal(arrays[name], array)


def test_a_segmenter_is_not_cropped():
    net = segmenter()
    net.card = replace(net.card, preprocess=Preprocess(size=(20, 20), mode="crop", crop=1.0))
    arrays = explain(net, make_image(40, 120), point=(119, 39))
    assert arrays.image.shape == (20, 60, 3)
    assert arrays.point == (59.5, 19.5)
    assert explain(net, make_image(40, 120), size=(24, 28)).image.shape == (24, 28, 3)


def test_a_segmenter_whose_backbone_has_no_windows():
    vit = tp.create(
        "vit-ti16", depth=4, embed_dim=24, num_heads=3, mlp_ratio=1.0, num_classes=0, image_size=32
    )
    net = Segmenter(SegmenterConfig(backbone=vit.config, head=HeadConfig(type="fpn", channels=8)), vit)
    with pytest.raises(tp.ConfigError, match="has no windows"):
        block_windows(net, (32, 32))
    maps = tp.create("convnet-unet", image_size=32)
    net = Segmenter(SegmenterConfig(backbone=maps.config, head=HeadConfig(type="unet", channels=16)), maps)
    with pytest.raises(tp.ConfigError, match="segmenters on them; this is a Segmenter on a ConvNet"):
        explain(net, make_image())


@pytest.mark.parametrize("map_norms", [False, True])
def test_a_backbone_without_a_head_predicts_nothing_and_shows_the_rest(map_norms):
    net = small()
    with_head = explain(net, make_image(), point=(3, 17))
    headless = small(num_classes=0, map_norms=map_norms)
    headless.load_state_dict(net.state_dict(), strict=False)
    result = explain(headless, make_image(), point=(3, 17))
    assert len(with_head.classification) == 5
    assert list(result.classification) == result.to_json()["top"] == []
    arrays = result.arrays()
    for name, array in with_head.arrays().items():
        np.testing.assert_allclose(arrays[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


def test_swinv2_stems_and_maps_of_one_cell():
    v2 = small(version=2, qkv_bias="qv", depths=(1, 1, 1), num_heads=(2, 2, 2), window_size=windows_of(3, 3))
    v2.card = replace(v2.card, preprocess=replace(v2.card.preprocess, size=(4, 4)))
    result = explain(v2, make_image())
    assert [a.shape for a in result.attention] == [(1, 2, 1, 1)] * 3
    assert result.rollout.tolist() == [[1]]
    stem = explain(small(stem_widths=(4,), patch_size=2), make_image(), size=(30, 30), point=(16, 17))
    assert stem.rollout.shape == (8, 8)
    assert stem.filters.shape[1:] == (3, 3, 3)


@pytest.mark.parametrize(
    ("mode", "crop"), [("crop", 1.0), ("crop", 0.8), ("squash", 1.0), ("squash", 0.8), ("pad", 1.0)]
)
def test_a_point_is_mapped_as_preprocessing_maps_the_image(mode, crop):
    from triptych.pipelines.image_input import fitted

    image = np.full((300, 200, 3), 255, np.uint8)
    image[160:170, 90:100] = 0
    preprocess = Preprocess(size=(96, 128), mode=mode, crop=crop, interpolation="bilinear")
    dark = 255.0 - fitted(image, preprocess)[..., 0]
    y, x = np.indices(dark.shape)
    where = ((x + 0.5) * dark).sum() / dark.sum(), ((y + 0.5) * dark).sum() / dark.sum()
    assert map_point((95, 165), (300, 200), preprocess) == pytest.approx(where, abs=0.6)


def test_points_outside_the_input():
    with pytest.raises(tp.ConfigError, match=r"x = 20, y = 3 is outside the image of 20 x 28 pixels"):
        explain(small(), make_image(), point=(20, 3))
    with pytest.raises(tp.ConfigError, match=r"x = -1, y = 3 is outside"):
        explain(segmenter(), make_image(), point=(-1, 3))
    with pytest.raises(
        tp.ConfigError, match="cropped away: the network's input has x from 2 to 18 and y from 188 to 212"
    ):
        explain(small(), make_image(400, 20), point=(3, 5))
    maps = captured_maps(small(), 28, 20)
    with pytest.raises(tp.ConfigError, match="block is 4; the network has 4"):
        window_attention_at(maps, small(), (28, 20), 4, (0, 0))


def test_colors_are_the_principal_components():
    torch.manual_seed(0)
    z = torch.randn(5, 6, 12) * torch.linspace(3, 0.1, 12)
    rgb, share = colors(z)
    cells = torch.nn.functional.normalize(z.flatten(0, 1).double(), dim=1).numpy()
    cells = cells - cells.mean(0)
    variance, axes = np.linalg.eigh(cells.T @ cells)
    np.testing.assert_allclose(share, (variance / variance.sum())[::-1][:3], rtol=1e-4)
    for i in range(3):
        shown = rgb[..., i].ravel()
        inside = (shown > 0) & (shown < 1)
        assert abs(np.corrcoef(shown[inside], (cells @ axes[:, -1 - i])[inside])[0, 1]) > 0.999999
    flat, none = colors(torch.ones(2, 3, 4))
    assert (flat == 0.5).all()
    assert (none < 1e-6).all()
    assert colors(torch.randn(1, 1, 4))[0].shape == (1, 1, 3)
