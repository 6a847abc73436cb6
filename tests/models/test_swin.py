"""The Swin Transformer in every form: start, equations, hierarchy, heads, and what may not change its answers."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from triptych.errors import ConfigError
from triptych.layers.capture import capture
from triptych.layers.residual import DropPath
from triptych.layers.window import WindowAttention, attend
from triptych.metrics.cost import count_macs, count_parameters
from triptych.model_card import ModelCard
from triptych.models.configs.swin import SwinConfig, macs, maps_at, parameters, windows_of
from triptych.models.registry import create
from triptych.models.swin import PatchMerging, Stage, Swin

SMALL = SwinConfig(
    image_size=(24, 36),
    patch_size=2,
    embed_dim=8,
    depths=(2, 2),
    num_heads=(2, 4),
    window_size=((4, 4), (3, 3)),
    num_classes=5,
)
V2 = {"version": 2, "qkv_bias": "qv"}
FORMS = {
    "v1": {},
    "v2": V2,
    "v2 of torchvision": {"version": 2},
    "v2 with larger windows": {
        **V2,
        "window_size": ((6, 6), (6, 6)),
        "pretrained_window_size": ((4, 4), (3, 3)),
    },
    "rectangular": {"window_size": ((3, 5), (6, 2))},
    "no bias": {"qkv_bias": "none"},
    "three stages": {"depths": (1, 2, 1), "num_heads": (1, 2, 4), "window_size": ((3, 3),) * 3},
    "headless": {"num_classes": 0},
    "maps": {"num_classes": 0, "map_norms": True},
    "gray": {"in_channels": 1},
    "conv stem": {"stem_widths": (6,), "patch_size": 1},
    "patches of 3": {"patch_size": 3, "image_size": (36, 54)},
    "dropped": {"drop_path_rate": 0.5, "dropout": 0.2},
}
# One cell, one row, less than a window, whole windows, none whole, odd maps to merge, no whole patches.
SIZES = [(3, 3), (3, 40), (4, 7), (24, 36), (31, 45), (18, 26), (25, 33)]


@pytest.fixture(params=FORMS, ids=lambda name: name.replace(" ", "-"))
def form(request):
    """The config of each form in turn."""
    return replace(SMALL, **FORMS[request.param])


def scrambled(config):
    """A network in eval mode with random parameters, so that no path is hidden behind a zero."""
    net = Swin(config)
    for part in net.modules():
        for parameter in part.parameters(recurse=False):
            fan = parameter[0].numel() if parameter.ndim > 1 else 4
            nn.init.normal_(parameter, std=fan**-0.5)
        if isinstance(part, nn.LayerNorm | nn.BatchNorm2d):
            nn.init.normal_(part.weight, mean=1.0, std=0.1)
    return net.eval()


def answers(net, images):
    """Return the logits, or the maps of a network without a head."""
    return net.features(images)[-1] if net.config.map_norms else net(images)


def images(config, count=2, size=None):
    return torch.randn(count, config.in_channels, *(size or config.image_size))


def test_every_parameter_is_filled(form):
    for name, parameter in Swin(form).named_parameters():
        assert parameter.isfinite().all(), name


def test_every_parameter_counts(form):
    net = scrambled(form)
    maps = net.features(images(form))
    loss = sum(m.square().sum() for m in maps) if form.map_norms else net(images(form)).square().sum()
    loss.backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_the_seed_decides_the_start(form):
    torch.manual_seed(5)
    first = Swin(form).state_dict()
    torch.manual_seed(5)
    assert all(torch.equal(value, first[name]) for name, value in Swin(form).state_dict().items())


def test_the_start(form):
    """A new head outputs zeros, and SwinV2's new blocks are the identity."""
    net, x = Swin(form).eval(), images(form)
    if form.num_classes:
        assert net(x).eq(0).all()
    if form.version == 2:
        z = net.embed(x)
        assert torch.equal(net.stages[0](z), z)
        for block in net.blocks():
            assert block.attn.scale.exp().flatten().tolist() == pytest.approx([10.0] * block.attn.heads)


def test_counts_of_every_form(form):
    with torch.device("meta"):
        net = Swin(form)
    assert count_parameters(net) == parameters(form)
    if form.map_norms:
        return
    assert count_macs(net, (1, form.in_channels, 33, 21)) == macs(form, (33, 21))


# The paper's equations and figures


@pytest.mark.parametrize("shifted", [False, True])
def test_two_blocks_are_equation_3(shifted):
    block, z = scrambled(SMALL).stages[0].blocks[shifted], torch.randn(2, 9, 10, 8)
    z_hat = attend(block.norm1(z), block.attn, shifted) + z
    torch.testing.assert_close(block(z), block.mlp(block.norm2(z_hat)) + z_hat)


def test_norms_after_the_branches_in_version_2():
    block, z = scrambled(replace(SMALL, **V2)).stages[0].blocks[1], torch.randn(2, 9, 10, 8)
    z_hat = block.norm1(attend(z, block.attn, True)) + z
    torch.testing.assert_close(block(z), block.norm2(block.mlp(z_hat)) + z_hat)


@pytest.mark.parametrize("norm_first", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1), (1, 4)])
def test_merging_concatenates_each_2_by_2_neighbors(size, norm_first):
    part, x = PatchMerging(3, norm_first, 1e-5), torch.randn(1, *size, 3)
    nn.init.normal_(part.norm.weight)
    got = part(x)
    assert got.shape == (1, -(-size[0] // 2), -(-size[1] // 2), 6)
    for i, j in itertools.product(range(got.shape[1]), range(got.shape[2])):
        # Microsoft's order: down the first column, then down the second; zeros where the map has ended.
        around = [
            x[0, y, x_] if y < size[0] and x_ < size[1] else torch.zeros(3)
            for x_ in (2 * j, 2 * j + 1)
            for y in (2 * i, 2 * i + 1)
        ]
        merged = torch.cat(around)
        wanted = part.reduction(part.norm(merged)) if norm_first else part.norm(part.reduction(merged))
        torch.testing.assert_close(got[0, i, j], wanted, atol=1e-5, rtol=1e-5)


def test_the_forward_pass_is_figure_3(form):
    net, x = scrambled(form), images(form)
    z = net.patch_norm(net.patch.proj(net.stem(x)).movedim(1, -1))
    for i, stage in enumerate(net.stages):
        assert (stage.merge is None) == (i == 0)
        if i:
            z = stage.merge(z)
        for j, block in enumerate(stage.blocks):
            assert block.shifted == (j % 2 == 1)
            z = block(z)
        assert z.shape == (2, *maps_at(form, form.image_size)[i], form.widths[i])
    if form.map_norms:
        torch.testing.assert_close(net.features(x)[-1].movedim(1, -1), net.norms[-1](z))
    else:
        torch.testing.assert_close(net(x), net.head(net.norm(z).mean((1, 2))), atol=1e-5, rtol=1e-5)


def test_blocks_are_listed_in_order():
    net = Swin(replace(SMALL, **FORMS["three stages"]))
    assert net.blocks() == [net.stages[0].blocks[0], *net.stages[1].blocks, net.stages[2].blocks[0]]


def test_drop_path_rises_with_depth():
    net = Swin(replace(SMALL, drop_path_rate=0.3))
    rates = [part.rate for part in net.modules() if isinstance(part, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_eval_is_the_same_every_time_and_training_is_not():
    net, x = scrambled(replace(SMALL, drop_path_rate=0.5, dropout=0.2)), images(SMALL)
    assert torch.equal(net(x), net(x))
    net.train()
    assert not torch.equal(net(x), net(x))


# Any size, in any order


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size_in_any_form(form, size):
    net, x = scrambled(form), images(form, 1, size)
    with torch.no_grad():
        maps = net.features(x)
        assert [m.shape[2:] for m in maps] == maps_at(form, size)
        assert all(m.isfinite().all() for m in maps)
        if not form.map_norms:
            assert net(x).shape == (1, form.num_classes or form.widths[-1])


@pytest.mark.parametrize("changes", [{}, V2], ids=["v1", "v2"])
def test_sizes_leave_no_trace(changes):
    """The output is bit for bit the same whatever inputs came before; transformers' network changes or fails."""
    net = scrambled(replace(SMALL, **changes))
    inputs = [images(SMALL, 1, size) for size in SIZES]
    with torch.no_grad():
        first = [copy.deepcopy(net)(x) for x in inputs]  # each by a network that has seen nothing else
        for order in (range(7), reversed(range(7)), [3, 0, 3, 1, 3, 6, 2, 3]):
            for i in order:
                assert torch.equal(net(inputs[i]), first[i])
    state = {name: value.clone() for name, value in net.state_dict().items()}
    net(inputs[4]).sum().backward()
    with torch.inference_mode():
        assert torch.equal(net(inputs[3]), first[3])
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_the_papers_size_after_a_small_one():
    """A network shaped as Swin-T at several sizes in turn: maps smaller than a window, and of several windows."""
    net = create("swin-t", embed_dim=12, depths=(1, 1, 2, 2), num_heads=(1, 2, 3, 4), num_classes=3).eval()
    nn.init.normal_(net.head.weight)
    inputs = [torch.randn(1, 3, side, side) for side in (224, 96, 256, 32)]
    with torch.no_grad():
        first = [net(x) for x in inputs]
        assert all(torch.equal(net(inputs[i]), first[i]) for i in (1, 0, 2, 0, 3, 0))


def test_images_are_answered_one_by_one(form):
    net, batch = scrambled(form), images(form, 3, (31, 45))
    with torch.no_grad():
        torch.testing.assert_close(answers(net, batch)[1:2], answers(net, batch[1:2]), atol=1e-5, rtol=1e-5)


def test_what_is_missing_to_a_whole_patch_is_zero():
    net, x = scrambled(replace(SMALL, patch_size=4)), torch.randn(1, 3, 13, 26)
    padded = nn.functional.pad(x, (0, 2, 0, 3))
    with torch.no_grad():
        torch.testing.assert_close(net(x), net(padded))


@pytest.mark.parametrize("changes", [{}, V2], ids=["v1", "v2"])
@pytest.mark.parametrize(("size", "window"), [((16, 16), 7), ((9, 6), 4)], ids=str)
def test_two_blocks_pass_on_what_their_regions_join(size, window, changes):
    """After a W-MSA and a SW-MSA block a cell depends on the windows of all cells in its shifted region and no other.
    The Jacobian elsewhere is exactly zero; timm's is not at 256 px."""
    config = replace(
        SMALL, embed_dim=4, depths=(2,), num_heads=(2,), window_size=windows_of(window, 1), **changes
    )
    stage = scrambled(config).stages[0]
    assert isinstance(stage, Stage)
    # One copy of the map for each output cell, so that one backward pass gives the full Jacobian.
    z = torch.randn(1, *size, 4).repeat(size[0] * size[1], 1, 1, 1).requires_grad_()
    (stage(z) @ torch.randn(4)).flatten(1).diagonal().sum().backward()
    plain, shifted = (same_region(size, window, s) for s in (0, window // 2))
    assert torch.equal(z.grad.ne(0).any(-1).flatten(1), shifted.float() @ plain.float() > 0)


def same_region(size, window, shift):
    """Return which cells share a region: windows cut at `shift`, `shift` + M, ... on both axes."""
    y, x = ((torch.arange(side) - shift).div(window, rounding_mode="floor") for side in size)
    region = (y[:, None] * 1000 + x[None, :]).flatten()
    return region[:, None] == region[None, :]


@pytest.mark.parametrize("changes", [{}, V2], ids=["v1", "v2"])
def test_training_between_evaluations(changes):
    """Evaluate, train with the trainer's fused optimizer, evaluate again: the new weights are used."""
    net, x = scrambled(replace(SMALL, **changes)), images(SMALL)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        with torch.inference_mode():
            net(x)
        net.train()
        net(x).square().sum().backward()
        optimizer.step()
        net.eval()
        with torch.no_grad():
            assert torch.equal(net(x), copy.deepcopy(net)(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("changes", [{}, V2], ids=["v1", "v2"])
def test_dtypes(dtype, changes):
    net, x = scrambled(replace(SMALL, **changes)), images(SMALL)
    with torch.no_grad():
        wanted = net(x)
        got = net.to(dtype)(x.to(dtype))
        assert got.dtype == dtype
        error = (got - wanted).norm() / wanted.norm()
        assert error < (0.05 if dtype == torch.bfloat16 else 1e-5)
        assert torch.equal(net.float()(x), wanted) or dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(24, 36), (31, 45)], ids=str)
def test_empty_batches(form, size):
    net, x = scrambled(form), images(form, 0, size)
    for maps in (net.features(x), torch.no_grad()(net.features)(x)):
        assert [m.shape for m in maps] == [
            (0, width, *side) for width, side in zip(form.widths, maps_at(form, size), strict=True)
        ]


# Heads and maps


def test_features_of_every_form(form):
    net, x = scrambled(form), images(form)
    maps = net.features(x)
    assert net.channels == list(form.widths)
    assert net.strides == [form.stride * 2**i for i in range(len(form.depths))]
    for channels, stride, m in zip(net.channels, net.strides, maps, strict=True):
        assert m.shape == (2, channels, *(-(-side // stride) for side in form.image_size))
    if form.num_classes:
        torch.testing.assert_close(net(x), net.head(net.norm(maps[-1].movedim(1, -1)).mean((1, 2))))


def test_a_backbone_for_dense_heads():
    net, x = scrambled(SMALL).double(), images(SMALL).double()
    net.card = ModelCard(classes=tuple("abcde"))
    plain = net.features(x)
    net.prepare_maps()
    assert net.config == replace(SMALL, num_classes=0, map_norms=True)
    assert Swin(net.config).state_dict().keys() == net.state_dict().keys()
    assert net.card.classes is None
    for before, after, norm in zip(plain, net.features(x), net.norms, strict=True):
        torch.testing.assert_close(after.movedim(1, -1), norm(before.movedim(1, -1)))
    net.prepare_maps()
    with pytest.raises(ConfigError, match="has maps for a dense head"):
        net(x)
    with pytest.raises(ConfigError, match="not in a classifier; call prepare_classes"):
        net.replace_head(3)


def test_a_new_head():
    net, x = scrambled(SMALL).double(), images(SMALL).double()
    net.card = ModelCard(classes=tuple("abcde"), groupings={"kind": tuple("xxyyy")}, figures={"top1": 0.5})
    net.requires_grad_(False)
    net.replace_head(3)
    assert net.head.weight.requires_grad
    assert net.config == replace(SMALL, num_classes=3)
    assert net(x).eq(0).all()
    assert net(x).shape == (2, 3)
    assert (net.card.classes, net.card.groupings, net.card.figures) == (None, {}, {})
    net.replace_head(0)
    torch.testing.assert_close(net(x), net.norm(net.features(x)[-1].movedim(1, -1)).mean((1, 2)))
    with pytest.raises(ConfigError, match="has a linear head, not 'mlp'"):
        net.replace_head(3, "mlp")


def test_capture_of_every_form(form):
    net, x = scrambled(form), images(form)
    plain = answers(net, x)
    with capture(net) as maps:
        torch.testing.assert_close(answers(net, x), plain, atol=1e-5, rtol=1e-5)
    wanted = {}
    for i, ((h, w), (wh, ww)) in enumerate(
        zip(maps_at(form, form.image_size), form.window_size, strict=True)
    ):
        for j in range(form.depths[i]):
            windows = -(-h // wh) * -(-w // ww)
            wanted[f"stages.{i}.blocks.{j}.attn"] = (2, windows, form.num_heads[i], wh * ww, wh * ww)
    assert {name: tuple(weights.shape) for name, weights in maps.items()} == wanted


# Windows chosen at creation


@pytest.mark.parametrize(
    ("name", "window", "wanted"),
    [
        ("swin-t", 12, (*((12, 12),) * 3, (7, 7))),  # the last map is 7 x 7
        ("swin-t", (7, 9), (*((7, 9),) * 3, (7, 7))),
        ("swin-t", (14, 14, 7, (3, 5)), ((14, 14), (14, 14), (7, 7), (3, 5))),
        ("swinv2-t", 16, (*((16, 16),) * 3, (8, 8))),
        ("swinv2-t", [24, (12, 24), 12, 6], ((24, 24), (12, 24), (12, 12), (6, 6))),
    ],
)
def test_windows_at_creation(name, window, wanted):
    changes = {"embed_dim": 8, "num_heads": (1, 2, 2, 2), "depths": (2, 1, 1, 1), "num_classes": 2}
    net = create(name, window_size=window, **changes).eval()
    assert net.config.window_size == wanted
    parts = [stage.blocks[0].attn for stage in net.stages]
    assert all(isinstance(part, WindowAttention) for part in parts)
    assert tuple(part.window for part in parts) == wanted
    with torch.no_grad():
        assert net(torch.randn(1, 3, 70, 50)).shape == (1, 2)  # every window is larger than the last map
    assert count_parameters(net) == parameters(net.config)


# Mistakes


@pytest.mark.parametrize("size", [(1, 8), (8, 1), (0, 8)])
def test_images_smaller_than_a_patch(size):
    with pytest.raises(
        ConfigError, match=f"images are {size[0]} x {size[1]} pixels, smaller than a patch of 2"
    ):
        Swin(SMALL)(torch.zeros(1, 3, *size))


def test_images_of_other_channels(form):
    with pytest.raises(ConfigError, match=f"images have 5 channels, the network takes {form.in_channels}"):
        Swin(form).features(torch.zeros(1, 5, 24, 36))
