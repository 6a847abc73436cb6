"""Integer weights: what is touched, how far it is from the network, and that the network itself stays."""

import copy
import sys

import pytest
import torch
from torch import nn

import triptych as tp
from triptych.errors import TriptychError
from triptych.models.configs.unet import UNetConfig
from triptych.models.unet import UNet

SMALL = {"num_classes": 5, "image_size": 32}
NETS = {
    "vit": lambda: tp.create("vit-ti16", depth=2, embed_dim=64, num_heads=2, mlp_ratio=2.0, **SMALL),
    "swin": lambda: tp.create(
        "swin-t", embed_dim=32, depths=(1, 2), num_heads=(1, 2), window_size=4, **SMALL
    ),
    "unet": lambda: UNet(
        UNetConfig(
            base_channels=32,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            attention_downsample_factors=(2,),
            num_heads=2,
            context_dim=24,
        )
    ),
}


@pytest.fixture(params=NETS)
def net(request):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    net = NETS[request.param]().eval().requires_grad_(False)
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return net


def run(net, dtype=torch.float32):
    torch.manual_seed(1)
    if isinstance(net, UNet):
        x = (
            torch.randn(2, 4, 8, 8, dtype=dtype),
            torch.tensor([3.0, 500.0]),
            torch.randn(2, 5, 24, dtype=dtype),
        )
    else:
        x = (torch.randn(2, 3, 32, 32, dtype=dtype),)
    with torch.inference_mode():
        return net(*x)


@pytest.mark.parametrize("variant", ["int8", "int8-dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_and_the_network_stays(net, variant, dtype):
    net = net.to(dtype)
    before = copy.deepcopy(net.state_dict())
    expected = run(net, dtype)
    output = tp.quantize(net, variant)
    result = run(output, dtype)
    error = (result - expected).float().norm() / expected.float().norm()
    assert 0 < error < 0.06
    assert torch.equal(run(net, dtype), expected)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    layers = [part for block in output.blocks() for part in block.modules() if type(part) is nn.Linear]
    changed = {id(layer.weight) for layer in layers}
    assert changed
    own = dict(net.named_parameters())
    for name, parameter in output.named_parameters():
        assert (id(parameter) in changed) != (parameter is own[name])


def test_weights_are_rounded_to_a_127th_of_their_row(net):
    """The closed form: no weight moves by more than half a step of its row's scale."""
    output = tp.quantize(net, "int8")
    own = dict(net.named_modules())
    for name, part in output.named_modules():
        if type(part) is nn.Linear and part.weight is not own[name].weight:
            step = own[name].weight.abs().amax(dim=1, keepdim=True) / 127
            apart = (part.weight.dequantize() - own[name].weight).abs()
            assert (apart <= 0.51 * step).all()


def test_in_a_pipeline():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    net = NETS["vit"]()
    nn.init.normal_(net.head.weight)
    x = torch.randn(2, 3, 32, 32)
    output = tp.quantize(net)
    result = tp.ClassificationPipeline(output, dtype="fp32").logits(x)
    with torch.inference_mode():
        assert torch.equal(result, output(x))


def test_it_is_not_saved(tmp_path):
    pytest.importorskip("torchao")
    with pytest.raises(TriptychError, match="save the network that it was made from"):
        tp.save(tp.quantize(NETS["vit"]()), tmp_path / "x.safetensors")


def test_what_does_not_go_is_said(monkeypatch):
    net = NETS["vit"]()
    with pytest.raises(TriptychError, match="scheme is 'int4'"):
        tp.quantize(net, "int4")
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(TriptychError, match=r"pip install 'triptych\[int8\]'"):
        tp.quantize(net)


def test_torchao_says_nothing():
    pytest.importorskip("torchao")
    import subprocess

    code = "import triptych as tp; tp.quantize(tp.create('vit-ti16', depth=1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
