"""Other numbers of input channels: the first layer's weights are adapted as by timm's adapt_input_conv."""

import pytest
import torch

import triptych as tp
from triptych.errors import ConfigError
from triptych.models.registry import config_for
from triptych.weights.resize import adapt_in_channels

SMALL = {"image_size": 32, "embed_dim": 16, "num_classes": 5}
NETWORKS = {
    "vit": lambda: tp.create("vit-ti16", depth=1, num_heads=1, **SMALL),
    "swin": lambda: tp.create("swin-t", depths=(1, 1), num_heads=(1, 2), window_size=4, **SMALL),
}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 13])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_rule_is_that_of_timm(name, count):
    adapt = pytest.importorskip("timm.models").adapt_input_conv
    net = NETWORKS[name]()
    weight = net.patch.proj.weight.detach().clone()
    assert adapt_in_channels(net, count) is net
    torch.testing.assert_close(net.patch.proj.weight, adapt(count, weight), check_stride=False)
    assert net.config.in_channels == count
    assert net(torch.rand(2, count, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("name", NETWORKS)
def test_gray_images_keep_their_logits(name):
    net = NETWORKS[name]().eval()
    gray = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        before = net(gray.expand(-1, 3, -1, -1))
        torch.testing.assert_close(adapt_in_channels(net, 1)(gray), before, atol=1e-5, rtol=1e-5)


def test_loaded_and_saved_again(tmp_path):
    net = tp.load("vit-emoji", in_channels=6, num_classes=3)
    tp.save(net, tmp_path / "six.safetensors")
    again = tp.load(tmp_path / "six.safetensors")
    assert again.config.in_channels == 6
    x = torch.rand(1, 6, 64, 64)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), net.eval()(x))


def test_segmenters():
    net = tp.load("swin-scenes")
    assert adapt_in_channels(net, 4).config.in_channels == 4


@pytest.mark.parametrize("backbone", [config_for("convnet-unet", widths=(4, 8)), None])
def test_a_unets_image_branch_and_a_convnet_are_adapted_too(tiny_segmenter, tmp_path, backbone):
    changes = {"image_branch_channels": 4} if backbone is None else {"backbone": backbone}
    net = tiny_segmenter(type="unet", aux_channels=0, **changes).eval()
    gray = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        before = net(gray.expand(-1, 3, -1, -1))
        torch.testing.assert_close(adapt_in_channels(net, 1)(gray), before, atol=1e-5, rtol=1e-5)
        tp.save(net, tmp_path / "net.safetensors")
        assert torch.equal(tp.load(tmp_path / "net.safetensors")(gray), net(gray))


def test_what_cannot_be_adapted():
    with pytest.raises(ConfigError, match="Autoencoder is no classifier or segmenter"):
        adapt_in_channels(tp.create("kl-f8", base_channels=32), 1)
    with pytest.raises(ConfigError, match="in_channels is 0, which must be at least 1"):
        adapt_in_channels(NETWORKS["vit"](), 0)
