"""Dense heads: published counts, any size, any backbone."""

import pytest
import torch

from triptych.errors import ConfigError
from triptych.heads.blocks import ConvNorm, Pyramid, resize_map
from triptych.heads.config import HeadConfig, SegmenterConfig
from triptych.heads.segmenter import Segmenter, quarters
from triptych.metrics.cost import count_macs
from triptych.models.registry import build, config_for

SMALL = {
    "embed_dim": 8,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 1, 1),
    "window_size": 2,
    "num_classes": 0,
}


def segmenter(head: HeadConfig, name: str = "swin-t", **changes) -> Segmenter:
    backbone = config_for(name, **changes)
    return Segmenter(SegmenterConfig(backbone=backbone, head=head), build(backbone)).eval()


def test_upernet_with_swin_t_has_the_published_size_and_cost():
    """60 M parameters and 945 G multiply-accumulates at 512 x 2048 (Liu et al. 2021, Table 3)."""
    with torch.device("meta"):
        head = HeadConfig(num_classes=150, channels=512, aux_channels=256)
        net = segmenter(head, num_classes=0, map_norms=True)
        assert round(sum(p.numel() for p in net.parameters()) / 1e6) == 60
    macs = count_macs(net, (1, 3, 512, 2048))
    aux = 9 * 384 * 256 * 32 * 128 + 256 * 150 * 32 * 128  # evaluation leaves it out
    assert round((macs + aux) / 1e9) in range(935, 956)


@pytest.mark.parametrize("head_type", ["fpn", "unet", "upernet"])
@pytest.mark.parametrize("size", [(32, 32), (50, 77), (4, 9)])
def test_logits_have_the_images_size(head_type, size):
    net = segmenter(HeadConfig(type=head_type, num_classes=3, channels=16), map_norms=True, **SMALL)
    with torch.no_grad():
        logits = net(torch.randn(2, 3, *size))
    assert logits.shape == (2, 3, *size)
    assert logits.isfinite().all()


def test_a_vits_blocks_make_a_pyramid():
    vit = {"depth": 8, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2.0, "patch_size": 16, "num_classes": 0}
    net = segmenter(HeadConfig(num_classes=3, channels=16), "vit-ti16", **vit)
    assert net.blocks_read == (1, 3, 5, 7)
    with torch.no_grad():
        maps = net.maps(torch.randn(1, 3, 64, 96))
        assert [tuple(x.shape[2:]) for x in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
        assert net(torch.randn(1, 3, 64, 96)).shape == (1, 3, 64, 96)
    chosen = segmenter(HeadConfig(num_classes=3, channels=16, blocks=(2, 7)), "vit-ti16", **vit)
    assert chosen.blocks_read == (2, 7)


ONE = {
    "vit": ("vit-ti16", {"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2.0}, {"blocks": (1,)}),
    "swin": (
        "swin-t",
        {"embed_dim": 8, "depths": (2,), "num_heads": (1,), "window_size": 2, "map_norms": True},
        {},
    ),
    "convnet": ("convnet-unet", {"widths": (4,)}, {}),
}


@pytest.mark.parametrize("head_type", ["fpn", "unet", "upernet"])
@pytest.mark.parametrize("backbone", ONE)
def test_one_map_is_enough(backbone, head_type):
    name, changes, chosen = ONE[backbone]
    net = segmenter(
        HeadConfig(type=head_type, num_classes=3, channels=16, **chosen), name, num_classes=0, **changes
    )
    images = torch.randn(2, 3, 32, 48)
    assert len(net.maps(images)) == 1
    logits, aux = net.train().with_aux(images)
    assert aux is None
    assert logits.shape == (2, 3, 32, 48)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in net.decoder.parameters())


@pytest.mark.parametrize("backbone", ONE)
def test_an_auxiliary_head_needs_a_map_before_the_last(backbone):
    name, changes, chosen = ONE[backbone]
    head = HeadConfig(num_classes=3, channels=16, aux_channels=8, **chosen)
    with pytest.raises(
        ConfigError, match=r"head.aux_channels is 8, and .* there is one, so leave it at 0"
    ) as caught:
        segmenter(head, name, num_classes=0, **changes)
    assert "\n" not in str(caught.value)


def test_only_a_vit_has_blocks_to_choose():
    with pytest.raises(
        ConfigError, match=r"head.blocks is \(1, 2\), but Swin has a map per stage; leave it out"
    ):
        segmenter(HeadConfig(num_classes=3, channels=16, blocks=(1, 2)), map_norms=True, **SMALL)


@pytest.mark.parametrize("head_type", ["fpn", "unet", "upernet"])
@pytest.mark.parametrize("name", ["swin-t", "convnet-unet"])
def test_one_image_of_one_cell_trains(name, head_type):
    """Pooling to 1 x 1, or a coarsest map of 1 x 1, leaves one value per channel."""
    changes = {**SMALL, "map_norms": True} if name == "swin-t" else {"widths": (4,) * 6}
    net = segmenter(
        HeadConfig(type=head_type, num_classes=3, channels=16, aux_channels=8), name, **changes
    ).train()
    logits, aux = net.with_aux(torch.randn(1, 3, 32, 32))
    (logits.square().sum() + aux.square().sum()).backward()
    missing = [n for n, p in net.decoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


def test_a_single_value_is_normalized_by_running_statistics():
    part = ConvNorm(2, 3, 1)
    torch.nn.init.uniform_(part.norm.running_mean)
    torch.nn.init.uniform_(part.norm.running_var, 0.5, 2.0)
    x = torch.randn(1, 2, 1, 1)
    state = {name: value.clone() for name, value in part.state_dict().items()}
    torch.testing.assert_close(part.train()(x), part.eval()(x))
    assert all(torch.equal(value, state[name]) for name, value in part.state_dict().items())
    two = torch.randn(2, 2, 1, 1)  # two values have a variance
    assert not torch.allclose(part.train()(two), part.eval()(two))


def test_quarters():
    assert quarters(12) == (2, 5, 8, 11)
    assert quarters(24) == (5, 11, 17, 23)
    assert quarters(2) == (0, 1)


def test_the_auxiliary_head_is_for_training_alone():
    net = segmenter(HeadConfig(num_classes=3, channels=16, aux_channels=8), map_norms=True, **SMALL)
    images = torch.randn(1, 3, 32, 32)
    logits, aux = net.with_aux(images)
    assert torch.equal(logits, net(images))
    assert aux is not None
    assert aux.shape == logits.shape
    aux.sum().backward()
    assert net.classifier.weight.grad is None


def test_replacing_the_head_keeps_the_decoder():
    net = segmenter(HeadConfig(num_classes=3, channels=16, aux_channels=8), map_norms=True, **SMALL)
    before = net.decoder.join.conv.weight.clone()
    net.replace_head(5)
    assert torch.equal(net.decoder.join.conv.weight, before)
    assert net(torch.randn(1, 3, 32, 32)).shape[1] == 5
    assert net.config.num_classes == 5


def test_resize_keeps_a_map_of_the_size_and_a_constant():
    x = torch.randn(1, 2, 5, 7)
    assert resize_map(x, (5, 7)) is x
    assert torch.allclose(resize_map(torch.full((1, 2, 5, 7), 3.0), (11, 4)), torch.tensor(3.0))


def test_a_pyramid_of_two_levels_is_of_strides_4_and_8():
    pyramid = Pyramid([6, 6], [16, 16], 4).eval()
    with torch.no_grad():
        maps = pyramid([torch.randn(1, 6, 3, 5)] * 2)
    assert [tuple(x.shape) for x in maps] == [(1, 4, 12, 20), (1, 4, 6, 10)]
