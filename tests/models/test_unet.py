"""The UNet against diffusers' at tiny random sizes, at any size of latents, with prompts projected once."""

import re
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of deprecations when it is imported
    from diffusers import UNet2DConditionModel, UNet2DModel

from triptych.errors import ConfigError
from triptych.kernels.dispatch import onednn_allowed
from triptych.layers.capture import capture
from triptych.layers.resnet import Conv, packed, seamless
from triptych.models import unet as unet_module
from triptych.models.configs.unet import UNetConfig
from triptych.models.unet import UNet

TINY = UNetConfig(
    latent_size=(16, 16),
    base_channels=16,
    channel_multipliers=(1, 2, 3),
    attention_downsample_factors=(1, 2),
    num_heads=2,
    context_dim=12,
    norm_groups=8,
)
CROSS = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
TEXT = {
    "block_out_channels": (16, 32, 48),
    "down_block_types": CROSS,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
PIXELS = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32, 48),
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
LDM = replace(
    TINY,
    in_channels=3,
    out_channels=3,
    attention_downsample_factors=(2, 4),
    num_heads=0,
    head_dim=8,
    context_dim=0,
)
# Ours, diffusers' class, its arguments.
CASES = {
    "sd1": (TINY, UNet2DConditionModel, TEXT),
    "sd1 inpaint": (replace(TINY, in_channels=9), UNet2DConditionModel, TEXT | {"in_channels": 9}),
    "sd2": (
        replace(TINY, num_heads=0, head_dim=8, projection="linear"),
        UNet2DConditionModel,
        TEXT | {"attention_head_dim": (2, 4, 6), "use_linear_projection": True},
    ),
    "unclip": (
        replace(TINY, vector_dim=10),
        UNet2DConditionModel,
        TEXT | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 10},
    ),
    "x4 upscaler": (
        replace(TINY, in_channels=7, cross_only_downsample_factors=(1,), projection="linear", num_classes=20),
        UNet2DConditionModel,
        TEXT
        | {
            "in_channels": 7,
            "only_cross_attention": (True, False, False),
            "num_class_embeds": 20,
            "use_linear_projection": True,
        },
    ),
    "layout": (
        replace(TINY, transformer_depth=2),
        UNet2DConditionModel,
        TEXT | {"transformer_layers_per_block": 2},
    ),
    "depth by level": (
        replace(TINY, transformer_depth=(1, 2, 3), num_res_blocks=1),
        UNet2DConditionModel,
        TEXT | {"transformer_layers_per_block": (1, 2, 3), "layers_per_block": 1},
    ),
    "unconditional": (LDM, UNet2DModel, PIXELS),
    "resampled by blocks": (
        replace(LDM, resample="resnet", scale_shift=True),
        UNet2DModel,
        PIXELS
        | {
            "resnet_time_scale_shift": "scale_shift",
            "attn_norm_num_groups": 8,
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        },
    ),
}
# From our names to diffusers'; {q,k,v} are concatenated.
NAMES = [
    (r"^time\.fc(\d)", r"time_embedding.linear_\1"),
    (r"^vector\.fc(\d)", r"class_embedding.linear_\1"),
    (r"^label\b", "class_embedding"),
    (r"^input\b", "conv_in"),
    (r"^norm\b", "conv_norm_out"),
    (r"^out\b", "conv_out"),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.res\b", r"\1_blocks.\2.resnets.\3"),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.(transformer|attention)\b", r"\1_blocks.\2.attentions.\3"),
    (r"^(down|up)\.(\d+)\.((?:down|up)sample)\b", r"\1_blocks.\2.\3rs.0"),
    (r"^middle\.res\b", "mid_block.resnets.0"),
    (r"^middle\.res2\b", "mid_block.resnets.1"),
    (r"^middle\.(transformer|attention)\b", "mid_block.attentions.0"),
    (r"(resnets\.\d+|samplers\.0)\.time\b", r"\1.time_emb_proj"),
    (r"(resnets\.\d+)\.skip\b", r"\1.conv_shortcut"),
    (r"attentions\.(\d+)\.blocks\b", r"attentions.\1.transformer_blocks"),
    (r"(transformer_blocks\.\d+)\.attn\b", r"\1.attn1"),
    (r"(transformer_blocks\.\d+)\.cross\b", r"\1.attn2"),
    (r"(transformer_blocks\.\d+)\.mlp\.fc1\b", r"\1.ff.net.0.proj"),
    (r"(transformer_blocks\.\d+)\.mlp\.fc2\b", r"\1.ff.net.2"),
    (r"(attn\d)\.proj\b", r"\1.to_out.0"),
    (r"(attn\d)\.q\b", r"\1.to_q"),
    (r"(attentions\.\d+)\.attn\.proj\b", r"\1.to_out.0"),
    (r"(attentions\.\d+)\.attn\.qkv\b", r"\1.qkv"),
]


def theirs_for(name: str) -> list[str]:
    """Return diffusers' names for one of our parameters."""
    for ours, theirs in NAMES:
        name = re.sub(ours, theirs, name)
    for fused, parts in (("qkv", "qkv"), ("kv", "kv")):
        if f".{fused}." in name:
            return [name.replace(f".{fused}.", f".to_{part}.") for part in parts]
    return [name]


def filled(config: UNetConfig, theirs: nn.Module) -> UNet:
    """Our network with diffusers' weights, each of which is used once."""
    net, state, filled_state = UNet(config), theirs.state_dict(), {}
    plain = isinstance(theirs, UNet2DModel)
    for name, parameter in net.named_parameters():
        keys = theirs_for(name)
        if plain:
            keys = [re.sub(r"(attentions\.\d+)\.norm\b", r"\1.group_norm", key) for key in keys]
        filled_state[name] = torch.cat([state.pop(key) for key in keys]).view(parameter.shape)
    assert not state
    net.load_state_dict(filled_state)
    return net.eval()


def scrambled(net: nn.Module) -> nn.Module:
    """The network in eval mode with random parameters, so that no path is hidden behind a zero."""
    for part in net.modules():
        for parameter in part.parameters(recurse=False):
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
        if isinstance(part, nn.LayerNorm | nn.GroupNorm):
            nn.init.normal_(part.weight, mean=1.0, std=0.1)
    return net.eval()


def inputs(config: UNetConfig, size=(16, 16), count: int = 2) -> dict[str, torch.Tensor]:
    tensors = {"x": torch.randn(count, config.in_channels, *size), "t": torch.tensor([7.25, 981.0])[:count]}
    if config.context_dim:
        tensors["context"] = torch.randn(count, 5, config.context_dim)
    if config.num_classes:
        tensors["labels"] = torch.randint(config.num_classes, (count,))
    if config.vector_dim:
        tensors["labels"] = torch.randn(count, config.vector_dim)
    return tensors


def answer(theirs, tensors):
    more = {"class_labels": tensors["labels"]} if "labels" in tensors else {}
    if "context" in tensors:
        more["encoder_hidden_states"] = tensors["context"]
    return theirs(tensors["x"], tensors["t"], **more).sample


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_parity_with_diffusers(case):
    config, cls, sizes = CASES[case]
    theirs = scrambled(cls(**sizes))
    net, tensors = filled(config, theirs), inputs(config)
    expected = answer(theirs, tensors)
    assert expected.std() > 0.1
    torch.testing.assert_close(net(**tensors), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["sd1", "unconditional"])
@pytest.mark.parametrize("size", [(8, 24), (9, 13), (5, 2), (1, 1)])
@torch.no_grad()
def test_parity_at_any_size(case, size):
    config, cls, sizes = CASES[case]
    theirs = scrambled(cls(**sizes))
    net, tensors = filled(config, theirs), inputs(config, size)
    if case == "unconditional" and any(side % 4 for side in size):
        assert net(**tensors).shape == tensors["x"].shape  # diffusers' network fails here
    else:
        torch.testing.assert_close(net(**tensors), answer(theirs, tensors), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["sd1", "x4 upscaler", "depth by level"])
@torch.no_grad()
def test_a_prompt_projected_once(case):
    net = scrambled(UNet(CASES[case][0]))
    tensors = inputs(net.config)
    once = net.project_context(tensors["context"])
    assert torch.equal(net(**tensors | {"context": once}), net(**tensors))
    assert len(once.keys) == len(once.values) == sum(name.endswith(".kv.weight") for name in net.state_dict())


@torch.no_grad()
def test_samples_of_a_batch_are_independent():
    net, tensors = scrambled(UNet(TINY)), inputs(TINY)
    together = net(**tensors)
    for i in range(2):
        alone = net(**{name: value[i : i + 1] for name, value in tensors.items()})
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["x4 upscaler", "unclip", "resampled by blocks"])
def test_gradients_reach_everything(case):
    net = scrambled(UNet(replace(CASES[case][0], dropout=0.1))).train()
    tensors = inputs(net.config)
    for value in tensors.values():
        if value.is_floating_point():
            value.requires_grad_()
    net(**tensors).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        if not re.search(r"(conv1|skip|input)\.bias", name):  # a norm may remove a constant
            assert parameter.grad.abs().sum() > 0, name
    assert tensors["x"].grad.abs().sum() > 0
    assert "context" not in tensors or tensors["context"].grad.abs().sum() > 0


@torch.no_grad()
def test_a_new_network_is_finite_and_outputs_zero():
    net = UNet(replace(TINY, num_classes=3))
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    out = net(**inputs(net.config))
    assert torch.equal(out, torch.zeros_like(out))


@torch.no_grad()
def test_captured_attention_maps():
    net, tensors = scrambled(UNet(TINY)), inputs(TINY)
    expected = net(**tensors)
    with capture(net) as maps:
        got = net(**tensors)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert maps["down.0.blocks.0.transformer.blocks.0.cross"].shape == (2, 2, 256, 5)
    assert maps["up.1.blocks.2.transformer.blocks.0.attn"].shape == (2, 2, 64, 64)
    assert "middle.transformer.blocks.0.cross" in maps
    for probabilities in maps.values():
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]))


@pytest.mark.parametrize("x", [True, False])
@pytest.mark.parametrize("y", [True, False])
@torch.no_grad()
def test_seamless_moves_with_its_input(x, y):
    """Rolling the latents along a seamless side rolls the output; along another side it does not."""
    net, tensors = scrambled(UNet(TINY)), inputs(TINY)
    rolled = [tensors | {"x": tensors["x"].roll(8, axis)} for axis in (-1, -2)]
    with seamless(net, x=x, y=y):
        out = net(**tensors)
        for axis, joined, moved in zip((-1, -2), (x, y), rolled, strict=True):
            assert torch.allclose(net(**moved), out.roll(8, axis), atol=1e-4) == joined


def test_packed_weights():
    net, tensors = scrambled(UNet(TINY)), inputs(TINY)
    small = inputs(TINY, (7, 5), 1)
    with torch.no_grad():
        expected, of_small = net(**tensors), net(**small)
        with packed(net):
            for _ in range(2):
                torch.testing.assert_close(net(**tensors), expected, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(net(**small), of_small, atol=1e-5, rtol=1e-5)
            count = sum(len(part.packed) for part in net.modules() if isinstance(part, Conv))
            assert count > 10 or not onednn_allowed(tensors["x"], net.out.weight)
    with packed(net):
        net(**tensors).sum().backward()  # with gradients the weights are not packed
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert all(part.packed is None for part in net.modules() if isinstance(part, Conv))


@torch.no_grad()
def test_the_memory_format_changes_nothing(monkeypatch):
    """bf16 in channels-last format, as with AMX, against bf16 in the contiguous one."""
    net, tensors = scrambled(UNet(TINY)).bfloat16(), inputs(TINY)
    tensors = {name: value if name == "t" else value.bfloat16() for name, value in tensors.items()}
    outs = []
    for order in (torch.contiguous_format, torch.channels_last):
        monkeypatch.setattr(
            unet_module, "preferred_format", lambda x, _, order=order: x.contiguous(memory_format=order)
        )
        outs.append(net(**tensors))
        assert outs[-1].is_contiguous()
    assert (outs[0] - outs[1]).float().norm() < 0.02 * outs[0].float().norm()


@torch.no_grad()
def test_bf16_is_close_to_fp32():
    net, tensors = scrambled(UNet(TINY)), inputs(TINY)
    exact = net(**tensors)
    halves = {name: value if name == "t" else value.bfloat16() for name, value in tensors.items()}
    out = net.bfloat16()(**halves)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() < 0.05 * exact.norm()


def test_blocks_in_the_order_in_which_they_run():
    net, seen = UNet(TINY), []
    for block in net.blocks():
        block.register_forward_hook(lambda block, *_: seen.append(block))
    net(**inputs(TINY))
    assert seen == net.blocks()
    assert len(seen) == 3 * 2 + 1 + 3 * 3


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (TINY, {"x": torch.zeros(2, 9, 8, 8)}, "9 channels, the network takes 4"),
        (TINY, {"context": None}, "takes a prompt"),
        (TINY, {"context": torch.zeros(2, 5, 16)}, "16 wide, the network takes 12"),
        (TINY, {"labels": torch.zeros(2, dtype=torch.long)}, "takes no labels"),
        (LDM, {"context": torch.zeros(2, 5, 12)}, "takes no prompt"),
        (replace(TINY, num_classes=20), {"labels": None}, "one of 20 classes"),
        (replace(TINY, num_classes=20), {"labels": torch.zeros(2, 3)}, "labels are (2, 3)"),
        (replace(TINY, vector_dim=6), {"labels": torch.zeros(2, 3)}, "labels are (2, 3)"),
    ],
)
def test_mistakes_are_reported(config, changes, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        UNet(config)(**inputs(config, (8, 8)) | changes)
    assert "\n" not in str(caught.value)
