"""The DiT: initialization, any size of latents, conditions, prompts projected once, files and costs."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import triptych as tp
from triptych.config import from_json, to_json
from triptych.diffusion.guidance import guided
from triptych.errors import ConfigError
from triptych.layers.capture import capture
from triptych.layers.position import sincos_positions
from triptych.metrics.cost import count_parameters
from triptych.models.configs.autoencoder import AutoencoderConfig
from triptych.models.configs.dit import SIZES, DiTConfig, macs, parameters
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.configs.text import ClassTokenConfig, TextConfig
from triptych.models.dit import DiT
from triptych.models.latent_diffusion import LatentDiffusion

TINY = DiTConfig(latent_size=(8, 8), patch_size=2, embed_dim=24, depth=3, num_heads=2, mlp_ratio=40 / 24)
FORMS = {
    "plain": {},
    "classes": {"num_classes": 5},
    "classes alone": {"num_classes": 5, "null_class": False, "learn_sigma": True},
    "text": {"context_dim": 12, "patch_size": 1},
    "single": {"context_dim": 12, "modulation": "single", "mlp": "gelu", "bias": False},
    "everything": {
        "num_classes": 5,
        "context_dim": 12,
        "modulation": "single",
        "qk_norm": True,
        "in_channels": 9,
    },
    "counted": {"position": "counted", "time_frequencies": "closed", "patch_size": 3},
}


@pytest.fixture(params=FORMS)
def form(request) -> DiTConfig:
    return replace(TINY, **FORMS[request.param])


def scrambled(net: DiT) -> DiT:
    """The network in eval mode with random parameters, so that no path is hidden behind a zero."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.15)
    return net.eval()


def inputs(config: DiTConfig, size=None, count=2) -> dict:
    tensors = {
        "x": torch.randn(count, config.in_channels, *(size or config.latent_size)),
        "t": torch.rand(count) * 999,
    }
    if config.context_dim:
        tensors["context"] = torch.randn(count, 5, config.context_dim)
    if config.num_classes:
        tensors["labels"] = torch.arange(count) % config.num_classes
    return tensors


@torch.no_grad()
def test_a_new_network_outputs_zero_and_its_blocks_are_the_identity(form):
    net, tensors = DiT(form), inputs(form)
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    z = []
    for block in net.blocks():
        block.register_forward_hook(lambda _, args, out: z.extend([args[0], out]))
    out = net(**tensors)
    assert torch.equal(out, torch.zeros_like(tensors["x"][:, :4]))
    assert len(z) == 2 * form.depth
    assert all(torch.equal(tokens, z[0]) for tokens in z)
    assert z[0].std() > 0.1


def test_every_parameter_learns(form):
    net, tensors = scrambled(DiT(replace(form, dropout=0.1))).train(), inputs(form)
    net(**tensors).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_new_network_learns_behind_its_zeros():
    """Zeros at both ends of a path would block its gradient for ever: after a few steps every parameter has changed."""
    config = replace(TINY, context_dim=12, num_classes=5, modulation="single")
    net, tensors = DiT(config), inputs(config, count=5)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for _ in range(5):
        (net(**tensors) - tensors["x"]).square().mean().backward()
        for parameter in net.parameters():
            parameter.data -= 0.5 * parameter.grad
            parameter.grad = None
    for name, parameter in net.named_parameters():
        assert not torch.equal(parameter, before[name]), name


@torch.no_grad()
def test_any_size(form):
    net = scrambled(DiT(form))
    for size in ((8, 8), (4, 10), (7, 5), (1, 3)):
        tensors = inputs(form, size)
        out = net(**tensors)
        assert out.shape == (2, 4, *size)
        assert out.isfinite().all()
        alone = net(**{name: value[1:] for name, value in tensors.items()})  # one of a batch by itself
        torch.testing.assert_close(out[1:], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_patches_are_where_they_were():
    """Without attention, a cell of the output depends only on the patch in the same place."""
    net, tensors = scrambled(DiT(TINY)), inputs(TINY)
    for block in net.encoder:
        block.attn.proj.weight.zero_()
    out = net(**tensors)
    tensors["x"][:, :, 2:4, 4:6] += 1.0
    changed = (net(**tensors) - out).abs().amax((0, 1)) > 1e-4
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:4, 4:6] = True
    assert torch.equal(changed, expected)


@torch.no_grad()
def test_positions_at_other_sizes():
    stretched, counted = (DiT(replace(TINY, position=position)) for position in ("stretched", "counted"))
    known = sincos_positions((4, 4), 24, closed=False)
    for net in (stretched, counted):
        torch.testing.assert_close(net._positions((4, 4)), known)
    wide = counted._positions((4, 9)).view(4, 9, 24)  # a cell has the same position at any aspect ratio
    torch.testing.assert_close(wide[:, :4], known.view(4, 4, 24))
    twice = stretched._positions((8, 8)).view(
        8, 8, 24
    )  # at twice the size, every other position is one of the trained ones
    torch.testing.assert_close(twice[::2, ::2], known.view(4, 4, 24))


@torch.no_grad()
def test_a_prompt_projected_once():
    for form in ("text", "single", "everything"):
        net = scrambled(DiT(replace(TINY, **FORMS[form])))
        tensors = inputs(net.config)
        once = net.project_context(tensors["context"])
        assert len(once.keys) == net.config.depth
        torch.testing.assert_close(net(**tensors | {"context": once}), net(**tensors), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_every_condition_matters():
    net = scrambled(DiT(replace(TINY, num_classes=5, context_dim=12)))
    tensors = inputs(net.config)
    out = net(**tensors)
    for name, other in {
        "t": tensors["t"] + 50,
        "labels": torch.full((2,), 5),  # no class
        "context": tensors["context"].flip(1) * 2,
    }.items():
        assert (net(**tensors | {name: other}) - out).abs().max() > 1e-3, name


@torch.no_grad()
def test_captured_attention_maps():
    net = scrambled(DiT(replace(TINY, context_dim=12)))
    tensors = inputs(net.config)
    expected = net(**tensors)
    with capture(net) as maps:
        torch.testing.assert_close(net(**tensors), expected, atol=1e-5, rtol=1e-5)
    assert maps["encoder.0.attn"].shape == (2, 2, 16, 16)
    assert maps["encoder.2.cross"].shape == (2, 2, 16, 5)


@torch.no_grad()
def test_bf16_is_close_to_fp32(form):
    net, tensors = scrambled(DiT(form)), inputs(form)
    exact = net(**tensors)
    halves = {
        name: value.bfloat16() if name in ("x", "context") else value for name, value in tensors.items()
    }
    out = net.bfloat16()(**halves)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() < 0.1 * exact.norm()


# -------------------------------------------------------------------------------------- sizes and files

# Parameters of the authors' code without its fixed position table (n D numbers), and multiply-accumulates of the
# paper's Table 4, which calls them Gflops.
PUBLISHED = {
    "dit-s2": (32_963_360 - 256 * 384, 6.06),
    "dit-b2": (130_512_416 - 256 * 768, 23.01),
    "dit-l2": (458_102_816 - 256 * 1024, 80.71),
    "dit-xl2": (675_129_632 - 256 * 1152, 118.64),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_costs(name):
    with torch.device("meta"):
        net = DiT(SIZES[name])
    count, gigamacs = PUBLISHED[name]
    assert count_parameters(net) == parameters(SIZES[name]) == count
    assert macs(SIZES[name]) / 1e9 == pytest.approx(gigamacs, rel=2e-3)


def test_the_shipped_size_in_bf16_is_below_twelve_megabytes():
    assert 2 * parameters(SIZES["dit-emoji"]) < 12e6 - 1e5


def test_costs_in_closed_form(form):
    with torch.device("meta"):
        net = DiT(form)
        tensors = {name: value.to("meta") for name, value in inputs(form, (7, 10), 1).items()}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net.eval()(**tensors)
    assert count_parameters(net) == parameters(form)
    assert counter.get_total_flops() // 2 == macs(form, (7, 10), tokens=5)


@torch.no_grad()
def test_saved_and_loaded(form, tmp_path):
    net, tensors = scrambled(DiT(form)), inputs(form)
    tp.save(net, tmp_path / "dit.safetensors")
    back = tp.load(tmp_path / "dit.safetensors")
    assert back.config == form == from_json(DiTConfig, to_json(form))
    assert torch.equal(back.eval()(**tensors), net(**tensors))


@pytest.mark.parametrize("name", SIZES)
def test_every_size_by_name(name):
    assert name in tp.list_models("dit-*")
    with torch.device("meta"):
        assert tp.create(name, num_classes=3).config == replace(SIZES[name], num_classes=3)


# ---------------------------------------------------------------------------------- in a latent diffusion model

STAGE = AutoencoderConfig(
    regularization="kl",
    base_channels=8,
    channel_multipliers=(1, 1),
    num_res_blocks=1,
    latent_channels=4,
    norm_groups=4,
)
READERS = {
    "nothing": None,
    "class": ClassTokenConfig(num_classes=5, embed_dim=12),
    "text": TextConfig(
        type="clip", vocab_size=49408, embed_dim=12, depth=1, num_heads=1, mlp_ratio=16 / 12, max_length=9
    ),
}


@pytest.mark.parametrize("reader", READERS)
@torch.no_grad()
def test_as_the_denoiser_of_a_latent_diffusion_model(reader, tmp_path):
    text = READERS[reader]
    config = LatentDiffusionConfig(
        autoencoder=STAGE, network=replace(TINY, context_dim=0 if text is None else 12), text_encoder=text
    )
    ldm = LatentDiffusion(config)
    scrambled(ldm.network)
    assert config.image_size == (16, 16)
    assert ldm.blocks() == ldm.network.blocks()
    condition = {"nothing": None, "class": [2, 5], "text": ["a red apple", ""]}[reader]
    context = None if condition is None else ldm.text_encoder(condition)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    both = torch.cat([x, x])
    direct = ldm.process.to_x0(both, ldm.network(both, t.expand(2), context), t.expand(2))
    torch.testing.assert_close(ldm.denoiser(context)(both, t.expand(2)), direct, atol=1e-5, rtol=1e-5)
    if context is not None:
        expected = direct[1:] + 3.0 * (direct[:1] - direct[1:])
        torch.testing.assert_close(
            guided(ldm.denoiser(context), 3.0, process=ldm.process)(x, t), expected, atol=1e-4, rtol=1e-4
        )
    tp.save(ldm, tmp_path / "ldm.safetensors")
    back = tp.load(tmp_path / "ldm.safetensors")
    assert back.config == ldm.config
    assert isinstance(back.network, DiT)
    assert torch.equal(back.denoiser(context)(both, t.expand(2)), ldm.denoiser(context)(both, t.expand(2)))


# ----------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_size": 0}, "patch_size is 0"),
        ({"num_heads": 5}, "embed_dim 24 is not a multiple of num_heads 5"),
        ({"embed_dim": 26}, "multiple of 4"),
        ({"context_dim": -1}, "context_dim is -1"),
        ({"latent_size": (0, 8)}, "latent_size"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_configs_that_cannot_be(changes, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        replace(TINY, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("form", "changes", "words"),
    [
        ("plain", {"x": torch.zeros(2, 9, 8, 8)}, "9 channels, the network takes 4"),
        ("plain", {"labels": torch.zeros(2, dtype=torch.long)}, "takes no labels"),
        ("plain", {"context": torch.zeros(2, 5, 12)}, "takes no prompt"),
        ("text", {"context": None}, "takes a prompt"),
        ("text", {"context": torch.zeros(2, 5, 16)}, "16 wide, the network takes 12"),
        ("classes", {"labels": None}, "one of 5 classes"),
        ("classes", {"labels": torch.zeros(3, dtype=torch.long)}, "labels are (3,)"),
    ],
)
def test_inputs_that_cannot_be(form, changes, words):
    net = DiT(replace(TINY, **FORMS[form]))
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        net(**inputs(net.config) | changes)
    assert "\n" not in str(caught.value)
