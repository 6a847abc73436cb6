"""Small ViTs in every form the config can name."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from triptych.models.configs.vit import ViTConfig
from triptych.models.vit import ViT

SMALL = ViTConfig(
    image_size=(32, 48), patch_size=8, embed_dim=24, depth=3, num_heads=2, mlp_ratio=40 / 24, num_classes=5
)

FORMS = {
    "plain": {},
    "headless": {"num_classes": 0},
    "mlp head": {"head": "mlp", "head_dim": 7},
    "hidden layer alone": {"head": "mlp", "num_classes": 0},
    "cosine head": {"head": "cosine"},
    "mean": {"class_token": False, "pool": "mean"},
    "mean, with a class token": {"pool": "mean", "norm_after_pool": True},
    "attention pool": {"class_token": False, "pool": "attention"},
    "attention pool of swiglu": {"pool": "attention", "mlp": "swiglu"},
    "token and mean": {"pool": "token+mean", "num_registers": 2},
    "distilled": {"distill_token": True},
    "distilled with registers": {"distill_token": True, "num_registers": 3},
    "deit 3": {"layer_scale": 1e-6, "prefix_positions": False},
    "dinov2": {"layer_scale": 1e-5, "num_registers": 4, "mlp": "swiglu"},
    "dinov3": {"layer_scale": 1e-5, "num_registers": 4, "position": "rotary", "qkv_bias": "qv"},
    "sincos": {"position": "sincos", "mlp": "gelu_tanh"},
    "no positions": {"position": "none", "class_token": False, "pool": "mean"},
    "qk-norm": {"qk_norm": True, "qkv_bias": "none"},
    "clip": {"pre_norm": True},
    "gray": {"in_channels": 1},
    "conv stem": {"stem": "conv", "stem_widths": (8, 12), "patch_size": 2},
    "resnet root": {"stem": "resnet", "stem_widths": (64,), "patch_size": 2},
    "resnet": {"stem": "resnet", "stem_widths": (64,), "stem_depths": (1, 1), "patch_size": 1},
    "dropped": {"drop_path_rate": 0.5, "dropout": 0.2},
}


@pytest.fixture(scope="session")
def small():
    """The config of a small ViT with some fields changed."""
    return lambda **changes: replace(SMALL, **changes)


@pytest.fixture(params=FORMS, ids=lambda name: name.replace(" ", "-"))
def form(request) -> ViTConfig:
    """Each form in turn."""
    return replace(SMALL, **FORMS[request.param])


@pytest.fixture(scope="session")
def scrambled():
    """A network in eval mode with random parameters, so that no path is hidden behind a zero."""

    def make(config: ViTConfig) -> ViT:
        net = ViT(config)
        for part in net.modules():
            for parameter in part.parameters(recurse=False):
                fan = parameter[0].numel() if parameter.ndim > 1 else 4
                nn.init.normal_(parameter, std=fan**-0.5)
            if isinstance(part, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d):
                nn.init.normal_(part.weight, mean=1.0, std=0.1)
        return net.eval()

    return make


@pytest.fixture
def images():
    """Random images (B, C, H, W) for a config, by default of its own size."""

    def make(config: ViTConfig, count: int = 2, size: tuple[int, int] | None = None) -> torch.Tensor:
        return torch.randn(count, config.in_channels, *(size or config.image_size))

    return make
