"""torchvision's names against its network, written again from them."""

import pytest
import torch
from torch import nn

from triptych.weights import export, load

D, HIDDEN, DEPTH, P, CLASSES = 64, 96, 2, 8, 5
HEADS = 1  # the convention for a width of 64


class VisionTransformer(nn.Module):
    """torchvision's, written from its names: only the modules that hold tensors have its names."""

    def __init__(self, heads: int, rep: int | None):
        super().__init__()
        self.conv_proj = nn.Conv2d(3, D, P, P)
        self.class_token = nn.Parameter(torch.zeros(1, 1, D))
        self.encoder = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.zeros(1, 17, D))
        self.encoder.layers = nn.Module()
        for i in range(DEPTH):
            layer = nn.Module()
            layer.ln_1, layer.ln_2 = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
            layer.self_attention = nn.MultiheadAttention(D, heads, batch_first=True)
            layer.mlp = nn.Sequential(
                nn.Linear(D, HIDDEN), nn.GELU(), nn.Dropout(0.0), nn.Linear(HIDDEN, D), nn.Dropout(0.0)
            )
            setattr(self.encoder.layers, f"encoder_layer_{i}", layer)
        self.encoder.ln = nn.LayerNorm(D, eps=1e-6)
        self.heads = nn.Sequential()
        if rep:
            self.heads.add_module("pre_logits", nn.Linear(D, rep))
            self.heads.add_module("act", nn.Tanh())
        self.heads.add_module("head", nn.Linear(rep or D, CLASSES))

    def forward(self, images):
        x = self.conv_proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.encoder.pos_embedding
        for i in range(DEPTH):
            layer = getattr(self.encoder.layers, f"encoder_layer_{i}")
            y = layer.ln_1(x)
            x = x + layer.self_attention(y, y, y, need_weights=False)[0]
            x = x + layer.mlp(layer.ln_2(x))
        return self.heads(self.encoder.ln(x)[:, 0])


@pytest.mark.parametrize("rep", [None, 24])
@pytest.mark.parametrize("old", [False, True])
def test_torchvision_parity(tmp_path, scramble, rep, old):
    theirs = scramble(VisionTransformer(HEADS, rep))
    state = theirs.state_dict()
    if old:
        state = {
            k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v
            for k, v in state.items()
        }
    torch.save(state, tmp_path / "net.pth")
    ours, images = load(tmp_path / "net.pth"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)
    export(ours, tmp_path / "back.pth", "torchvision")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert sorted(back) == sorted(theirs.state_dict())
    theirs.load_state_dict(back)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [224, 384])
def test_torchvisions_conventions_depend_on_the_size(tmp_path, tiny, size):
    export(tiny(image_size=(size, size), patch_size=32), tmp_path / "x.safetensors", "torchvision")
    preprocess = load(tmp_path / "x.safetensors").card.preprocess
    assert (preprocess.crop, preprocess.interpolation) == (
        (0.875, "bilinear") if size == 224 else (1.0, "bicubic")
    )
