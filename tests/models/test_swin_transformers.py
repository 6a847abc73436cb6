"""Equal to transformers' Swin and SwinV2 at the sizes where those are right, with random weights copied over."""

import pytest
import torch
from torch import nn
from transformers import SwinBackbone, SwinConfig, Swinv2Config
from transformers import SwinForImageClassification as HFSwin
from transformers import Swinv2ForImageClassification as HFSwinv2

from triptych.models.configs.swin import SwinConfig as Config
from triptych.models.configs.swin import windows_of
from triptych.models.swin import Swin

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
STAGES = ((2, 2, 1), (2, 4, 4))  # depths and heads


def config_of(version, image_size, window, **changes):
    """Our config, with transformers' values in the fields that both have."""
    depths, heads = STAGES
    more = {"version": 2, "qkv_bias": "qv"} if version == 2 else {}
    sizes = {
        "embed_dim": 16,
        "depths": depths,
        "num_heads": heads,
        "image_size": image_size,
        "num_classes": 4,
    }
    return Config(**sizes, **more, window_size=windows_of(window, len(depths)), **changes)


def theirs(config, network_class, **changes):
    """Their network for our config, with random parameters; their config has one window for all stages."""
    cls = Swinv2Config if config.version == 2 else SwinConfig
    net = network_class(
        cls(
            image_size=config.image_size[0],
            patch_size=config.patch_size,
            embed_dim=config.embed_dim,
            depths=list(config.depths),
            num_heads=list(config.num_heads),
            window_size=config.window_size[0][0],
            num_labels=config.num_classes,
            layer_norm_eps=config.norm_eps,
            **changes,
        )
    )
    for name, parameter in net.named_parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
        if "norm" in name and name.endswith("weight"):
            nn.init.normal_(parameter, mean=1.0, std=0.1)
        if name.endswith("bias_table"):
            nn.init.normal_(parameter)
    return net.eval()


def renamed(state, version):
    """Their state under our names, q, k and v stacked."""
    state, out = dict(state), {}

    def take(mine, *its):
        for leaf in ("weight", "bias"):
            parts = [state.pop(f"{name}.{leaf}") for name in its if f"{name}.{leaf}" in state]
            if parts:
                out[f"{mine}.{leaf}"] = torch.cat(parts)

    root = "swin." if version == 1 else "swinv2."
    state = {name.removeprefix(root): value for name, value in state.items()}
    take("patch.proj", "embeddings.patch_embeddings.projection")
    take("patch_norm", "embeddings.norm")
    for s, depth in enumerate(STAGES[0]):
        for part in ("norm", "reduction"):
            take(f"stages.{s + 1}.merge.{part}", f"encoder.layers.{s}.downsample.{part}")
        for b in range(depth):
            mine, its = f"stages.{s}.blocks.{b}.", f"encoder.layers.{s}.blocks.{b}."
            take(mine + "norm1", its + "layernorm_before")
            take(mine + "norm2", its + "layernorm_after")
            if version == 1:
                take(mine + "attn.qkv", *(f"{its}attention.{x}_proj" for x in "qkv"))
                take(mine + "attn.proj", its + "attention.o_proj")
                table = "attention.relative_position_bias.relative_position_bias_table"
                out[mine + "attn.bias_table"] = state.pop(its + table)
                take(mine + "mlp.fc1", its + "mlp.fc1")
                take(mine + "mlp.fc2", its + "mlp.fc2")
                continue
            own = its + "attention.self."
            out[mine + "attn.q_bias"] = state.pop(own + "query.bias")
            out[mine + "attn.v_bias"] = state.pop(own + "value.bias")
            take(mine + "attn.qkv", own + "query", own + "key", own + "value")
            out[mine + "attn.scale"] = state.pop(own + "logit_scale")
            take(mine + "attn.bias_mlp.fc1", own + "continuous_position_bias_mlp.0")
            take(mine + "attn.bias_mlp.fc2", own + "continuous_position_bias_mlp.2")
            take(mine + "attn.proj", its + "attention.output.dense")
            take(mine + "mlp.fc1", its + "intermediate.dense")
            take(mine + "mlp.fc2", its + "output.dense")
        take(f"norms.{s}", f"hidden_states_norms.stage{s + 1}")
    take("norm", "layernorm")
    take("head", "classifier")
    assert not state, list(state)
    return out


def pair(config, network_class, **changes):
    other = theirs(config, network_class, **changes)
    net = Swin(config).eval()
    net.load_state_dict(renamed(other.state_dict(), config.version))
    return net, other


@pytest.mark.parametrize(("size", "window"), [((112, 112), 7), ((64, 64), 4), ((112, 168), 7)], ids=str)
@torch.no_grad()
def test_version_1_where_windows_fill_the_maps(size, window):
    net, other = pair(config_of(1, size, window), HFSwin)
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(net(x), other(x).logits, **CLOSE)


@pytest.mark.parametrize("shape", [(2, 3, 128, 128), (1, 3, 133, 150), (1, 3, 256, 140)], ids=str)
@torch.no_grad()
def test_version_2_at_any_size_above_its_own(shape):
    net, other = pair(config_of(2, (128, 128), 8), HFSwinv2)
    x = torch.randn(shape)
    torch.testing.assert_close(net(x), other(x).logits, **CLOSE)


@torch.no_grad()
def test_version_2_with_larger_windows_than_it_was_trained_with():
    """Theirs shrinks a window to the map for good, so ours has (4, 4) in the last stage."""
    windows = {"window": ((8, 8), (8, 8), (4, 4)), "pretrained_window_size": ((6, 6), (6, 6), (3, 3))}
    net, other = pair(config_of(2, (64, 64), **windows), HFSwinv2, pretrained_window_sizes=[6, 6, 3])
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(net(x), other(x).logits, **CLOSE)


@pytest.mark.parametrize("size", [(112, 112), (100, 131), (75, 61), (61, 129)], ids=str)
@torch.no_grad()
def test_maps_of_version_1_where_they_need_padding(size):
    """Their backbone pads before it rolls, as we do. It also shifts a map of one window, so the last stage has one
    block, which is not shifted."""
    config = config_of(1, (112, 112), 7)
    other = theirs(config, SwinBackbone, out_features=["stage1", "stage2", "stage3"])
    net = Swin(config)
    net.prepare_maps()
    state = renamed(other.state_dict(), 1)
    net.eval().load_state_dict({name: value for name, value in state.items() if name.split(".")[0] != "norm"})
    x = torch.randn(1, 3, *size)
    for mine, its in zip(net.features(x), other(x).feature_maps, strict=True):
        torch.testing.assert_close(mine, its, **CLOSE)
