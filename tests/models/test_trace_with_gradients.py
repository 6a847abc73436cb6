"""torch.jit.trace and the dynamo-based ONNX exporter for networks whose parameters require gradients, as they are after
`tp.load` and `tp.create`. In a process without the shape checks, which cannot be traced."""

import subprocess
import sys

import pytest

BEGIN = """
import warnings
import torch
from torch import nn
from triptych.heads.config import HeadConfig, SegmenterConfig
from triptych.heads.segmenter import Segmenter
from triptych.models.registry import create

warnings.simplefilter("ignore")  # a trace is for one height and width, and warns about it
torch.set_num_threads(1)
images, latents = torch.randn(2, 3, 32, 48), torch.randn(2, 4, 8, 8)

class Method(nn.Module):
    def __init__(self, net, name):
        super().__init__()
        self.net, self.name = net, name

    def forward(self, *inputs):
        return getattr(self.net, self.name)(*inputs)

def swin(version):
    qkv = "qv" if version == 2 else "qkv"
    return create("swin-t", version=version, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=3,
                  qkv_bias=qkv)

def segmenter(version, head):
    backbone = swin(version)
    backbone.prepare_maps()
    return Segmenter(SegmenterConfig(backbone=backbone.config, head=HeadConfig(type=head, num_classes=3, channels=8)),
                     backbone)

def autoencoder(name):
    return create(name, base_channels=8, norm_groups=4, channel_multipliers=(1, 2), num_res_blocks=1,
                  attention_downsample_factors=(2,))

def unet(**changes):
    from triptych.models.configs.unet import UNetConfig
    from triptych.models.unet import UNet
    return UNet(UNetConfig(in_channels=4, out_channels=4, base_channels=8, channel_multipliers=(1, 2),
                           attention_downsample_factors=(1, 2), num_res_blocks=1, num_heads=2, norm_groups=4,
                           **changes))

t, context = torch.tensor([3, 500]), torch.randn(2, 5, 12)
tiny = {"embed_dim": 16, "num_heads": 2, "depth": 2}
NETWORKS = {
    "vit": lambda: (create("vit-ti16", image_size=(32, 48), num_classes=3, **tiny), (images,)),
    "vit with rotary positions": lambda: (create("dinov3-s16", image_size=(32, 48), **tiny), (images,)),
    "swin": lambda: (swin(1), (images,)),
    "swinv2": lambda: (swin(2), (images,)),
    "fpn on swin": lambda: (segmenter(1, "fpn"), (images,)),
    "unet decoder on swinv2": lambda: (segmenter(2, "unet"), (images,)),
    "upernet on swin": lambda: (segmenter(1, "upernet"), (images,)),
    "kl autoencoder": lambda: (autoencoder("kl-f8"), (images,)),
    "vq autoencoder": lambda: (autoencoder("vq-f8"), (images,)),
    "unet": lambda: (unet(context_dim=12), (latents, t, context)),
    "unconditional unet": lambda: (unet(), (latents, t)),
    "dit": lambda: (create("dit-s2", **tiny), (latents, t.float(), None, torch.tensor([1, 2]))),
    "text encoder": lambda: (Method(create("clip-l", **tiny), "encode_tokens"), (torch.randint(0, 50, (2, 9)),)),
}

def noisy(net):
    torch.manual_seed(0)
    for parameter in net.parameters():  # with what starts at zero, so that an error shows
        nn.init.normal_(parameter, std=0.2)
    assert all(p.requires_grad for p in net.parameters()) and torch.is_grad_enabled()
    return net.eval()
"""

TRACE = """
for name, make in NETWORKS.items():
    net, inputs = make()
    noisy(net)
    if None not in inputs:  # jit.trace takes tensors only
        traced = torch.jit.trace(net, inputs)
        torch.testing.assert_close(traced(*inputs), net(*inputs), msg=lambda text: f"{name}: {text}")
"""

ONNX = """
import onnxruntime
net, inputs = NETWORKS[NAME]()
noisy(net)
model = torch.onnx.export(net, inputs, dynamo=True, verbose=False).model_proto.SerializeToString()
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
names = [value.name for value in session.get_inputs()]
feed = dict(zip(names, (x.numpy() for x in inputs if x is not None), strict=True))
torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), net(*inputs).detach(), atol=1e-4, rtol=1e-4)
"""


def run(script, **names):
    assignments = "\n".join(f"{name} = {value!r}" for name, value in names.items())
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([assignments, BEGIN, script])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_trace():
    """The trace checks itself by a second one without gradients, which must give the same graph."""
    run(TRACE)


@pytest.mark.parametrize("name", ["swin"])
def test_onnx(name):
    run(ONNX, NAME=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("vit", "vit with rotary positions", "swinv2", "fpn on swin", "unet decoder on swinv2"),
        *(
            "upernet on swin",
            "kl autoencoder",
            "vq autoencoder",
            "unet",
            "unconditional unet",
            "dit",
            "text encoder",
        ),
    ],
)
def test_onnx_of_other_networks(name):
    run(ONNX, NAME=name)
