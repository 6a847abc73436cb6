"""LPIPS read from files as they are published, beside the formula written out on a VGG16 in torchvision's layout."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from triptych.errors import CheckpointError
from triptych.weights.lpips import load_lpips

pytestmark = pytest.mark.proves("Checkpoints", "LPIPS", by="formula")

LAYOUT = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
TAPS = (3, 8, 15, 22, 29)  # the last ReLU of each level


@pytest.fixture(scope="module")
def vgg() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    inputs = 3
    for width in LAYOUT:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(inputs, int(width), 3, padding=1), nn.ReLU()]
            inputs = int(width)
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def heads() -> dict[str, torch.Tensor]:
    widths = (64, 128, 256, 512, 512)
    return {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}


@torch.no_grad()
def by_hand(vgg, heads, images, others):
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    total = 0
    x, y = (images - shift) / scale, (others - shift) / scale
    for i, layer in enumerate(vgg):
        x, y = layer(x), layer(y)
        if i in TAPS:
            one, other = (z / (z.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y))
            weight = heads[f"lin{TAPS.index(i)}.model.1.weight"]
            total = total + nn.functional.conv2d((one - other) ** 2, weight).mean((1, 2, 3))
    return total


def of(vgg, name="features.{}"):
    return {name.format(key): value.clone() for key, value in vgg.state_dict().items()}


def test_it_is_the_published_formula_from_two_files(vgg, heads, tmp_path):
    classes = {"classifier.0.weight": torch.zeros(2, 2), "classifier.0.bias": torch.zeros(2)}
    torch.save(of(vgg) | classes, tmp_path / "vgg16.pth")
    torch.save(heads, tmp_path / "vgg.pth")
    net = load_lpips(str(tmp_path / "vgg16.pth"), str(tmp_path / "vgg.pth"))
    assert sum(p.numel() for p in net.vgg.parameters()) == 14_714_688
    images, others = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(net(images, others), by_hand(vgg, heads, images, others))
    assert not any(p.requires_grad for p in net.parameters())
    images.requires_grad_()
    net(images, others).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_a_whole_lpips_is_one_file(vgg, heads, tmp_path):
    """As the lpips package saves it: VGG16 in slices, the heads twice, constants."""
    slices = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}
    level = {number: at for at, numbers in slices.items() for number in numbers}
    full = {f"net.slice{level[int(k.split('.')[0])]}.{k}": v for k, v in of(vgg, "{}").items()}
    full |= heads | {name.replace("lin", "lins.", 1): tensor.clone() for name, tensor in heads.items()}
    full |= {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    save_file(full, tmp_path / "lpips.safetensors")
    net = load_lpips(str(tmp_path / "lpips.safetensors"))
    images, others = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(net(images, others), by_hand(vgg, heads, images, others))


def test_what_does_not_fit_is_named(vgg, heads, tmp_path):
    save_file(of(vgg), tmp_path / "vgg.safetensors")
    with pytest.raises(CheckpointError, match="has no linear heads of LPIPS; also name the file"):
        load_lpips(str(tmp_path / "vgg.safetensors"))
    short = {name: tensor for name, tensor in heads.items() if not name.startswith("lin3")}
    save_file(short, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match=r"linear heads: 1 missing \(lin3.model.1.weight\)"):
        load_lpips(str(tmp_path / "vgg.safetensors"), str(tmp_path / "short.safetensors"))
    save_file(of(vgg) | {"features.31.weight": torch.zeros(2)}, tmp_path / "long.safetensors")
    save_file(heads, tmp_path / "heads.safetensors")
    with pytest.raises(CheckpointError, match=r"1 that no rule knows \(features.31.weight\)"):
        load_lpips(str(tmp_path / "long.safetensors"), str(tmp_path / "heads.safetensors"))
