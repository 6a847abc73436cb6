"""The first stages against diffusers' at tiny random sizes; scale, posterior, codebook, gradients."""

import math
import re
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of deprecations when it is imported
    from diffusers import AutoencoderKL, AutoencoderTiny, VQModel

from triptych.errors import ConfigError
from triptych.layers.capture import capture
from triptych.layers.cross_attention import SpatialAttention
from triptych.layers.resnet import ResnetBlock, seamless
from triptych.models.autoencoder import Autoencoder, FirstStage
from triptych.models.configs.autoencoder import AutoencoderConfig, TinyAutoencoderConfig
from triptych.models.tiny_autoencoder import TinyAutoencoder

KL = AutoencoderConfig(
    regularization="kl",
    base_channels=8,
    channel_multipliers=(1, 2, 3),
    num_res_blocks=1,
    latent_channels=4,
    norm_groups=4,
)
VQ = replace(KL, regularization="vq", codebook_size=20, latent_channels=3)
TINY = TinyAutoencoderConfig(base_channels=8, num_levels=3, num_res_blocks=2)
DOWN, UP = ["DownEncoderBlock2D"] * 3, ["UpDecoderBlock2D"] * 3
THEIRS = {
    "block_out_channels": (8, 16, 24),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": DOWN,
    "up_block_types": UP,
}
ATTENDING = {
    "down_block_types": [DOWN[0], *["AttnDownEncoderBlock2D"] * 2],
    "up_block_types": [*["AttnUpDecoderBlock2D"] * 2, UP[0]],
}
VQ_THEIRS = THEIRS | {"num_vq_embeddings": 20, "latent_channels": 3}
BARE = {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 5}
# Ours, diffusers' class, its arguments.
CASES = {
    "kl": (KL, AutoencoderKL, THEIRS | {"latent_channels": 4}),
    "kl with attention": (
        replace(KL, attention_downsample_factors=(2, 4), num_res_blocks=2),
        AutoencoderKL,
        THEIRS | ATTENDING | {"layers_per_block": 2},
    ),
    "sd3": (replace(KL, quant_convs=False, latent_channels=5), AutoencoderKL, THEIRS | BARE),
    "vq": (VQ, VQModel, VQ_THEIRS),
    "vq without attention": (
        replace(VQ, middle_attention=False),
        VQModel,
        VQ_THEIRS | {"mid_block_add_attention": False},
    ),
    "vq with other entries": (
        replace(VQ, bottleneck_channels=6, latent_channels=4),
        VQModel,
        VQ_THEIRS | {"latent_channels": 6, "vq_embed_dim": 4},
    ),
}
# Our names, diffusers' names.
NAMES = [
    (r"^(en|de)coder\.(down|up)\.(\d+)\.", r"\1coder.\2_blocks.\3."),
    (r"down_blocks\.(\d+)\.resample", r"down_blocks.\1.downsamplers.0"),
    (r"up_blocks\.(\d+)\.resample", r"up_blocks.\1.upsamplers.0"),
    (r"\.blocks\.", ".resnets."),
    (r"\.middle\.block1\.", ".mid_block.resnets.0."),
    (r"\.middle\.block2\.", ".mid_block.resnets.1."),
    (r"\.middle\.attention\.", ".mid_block.attentions.0."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"\.attn\.proj\.", ".to_out.0."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"coder\.norm\.", "coder.conv_norm_out."),
    (r"^quant\.", "quant_conv."),
    (r"^post_quant\.", "post_quant_conv."),
    (r"^codebook\.", "quantize.embedding."),
]


def scrambled(config) -> FirstStage:
    """A network in eval mode with random parameters, so that no path is hidden behind a zero."""
    net = Autoencoder(config) if isinstance(config, AutoencoderConfig) else TinyAutoencoder(config)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    for part in net.modules():
        if isinstance(part, nn.GroupNorm):
            nn.init.normal_(part.weight, mean=1.0, std=0.1)
    return net.eval()


def as_theirs(net: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters under diffusers' names."""
    theirs = {}
    for name, value in net.state_dict().items():
        for ours, other in NAMES:
            name = re.sub(ours, other, name)
        if ".attn.qkv." in name:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                theirs[name.replace("attn.qkv", f"to_{part}")] = third
        else:
            theirs[name] = value
    return theirs


@pytest.fixture
def images():
    return torch.rand(2, 3, 24, 16) * 2 - 1


@pytest.mark.parametrize("case", CASES)
def test_like_diffusers(case, images):
    config, their_class, arguments = CASES[case]
    ours, theirs = scrambled(config), their_class(**arguments).eval()
    theirs.load_state_dict(as_theirs(ours))
    with torch.no_grad():
        latents = ours.encode(images)
        if config.regularization == "kl":
            distribution = theirs.encode(images).latent_dist
            torch.testing.assert_close(latents, distribution.mean, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(ours.posterior(images)[1], distribution.logvar, atol=1e-5, rtol=1e-5)
        else:
            torch.testing.assert_close(latents, theirs.encode(images).latents, atol=1e-5, rtol=1e-5)
        assert latents.shape == (2, config.latent_channels, 6, 4)
        torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).sample, atol=1e-5, rtol=1e-5)


def test_tiny_like_diffusers(images):
    ours = scrambled(TINY)
    theirs = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
    ).eval()
    names = {
        name: re.sub(r"conv(\d)\.", lambda m: f"conv.{2 * int(m[1]) - 2}.", name).replace(
            "coder.", "coder.layers."
        )
        for name in ours.state_dict()
    }
    theirs.load_state_dict({names[name]: value for name, value in ours.state_dict().items()})
    with torch.no_grad():
        latents = ours.encode(images)
        torch.testing.assert_close(latents, theirs.encode(images).latents, atol=1e-5, rtol=1e-5)
        for far in (1, 10):
            torch.testing.assert_close(
                ours.decode(far * latents), theirs.decode(far * latents).sample, atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("config", [KL, replace(KL, attention_downsample_factors=(4,)), VQ, TINY])
def test_every_parameter_is_filled_and_counts(config, images):
    net = Autoencoder(config) if isinstance(config, AutoencoderConfig) else TinyAutoencoder(config)
    for name, parameter in net.named_parameters():
        assert parameter.isfinite().all(), name
    if config == VQ:
        latents = net.encode(images)
        loss = (net.quantize(latents)[0] - latents).square().sum() + net(images).square().sum()
    elif config == TINY:
        loss = net(images).square().sum()
    else:
        mean, logvar = net.posterior(images)
        loss = net(images).square().sum() + (mean.square() + logvar.exp() - logvar).sum()
    loss.backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []


def test_a_fresh_network_starts_with_signals_of_unit_size():
    net = Autoencoder(replace(KL, base_channels=32, norm_groups=32))
    with torch.no_grad():
        mean, logvar = net.posterior(torch.rand(2, 3, 32, 32) * 2 - 1)
        assert 0.05 < mean.std() < 2
        assert logvar.abs().mean() < 2
        assert 0.05 < net.decode(torch.randn(2, 4, 8, 8)).std() < 2


@pytest.mark.parametrize(("scale", "shift"), [(0.5, 0.25), ((0.5, 1.0, 2.0, 4.0), (0.0, 1.0, -1.0, 2.0))])
def test_scale_and_shift_belong_to_the_network(scale, shift, images):
    plain = scrambled(KL)
    net = Autoencoder(replace(KL, scale=scale, shift=shift)).eval()
    net.load_state_dict(plain.state_dict())
    with torch.no_grad():
        z, latents = plain.encode(images), net.encode(images)
        by_channel = [torch.as_tensor(value).expand(4)[:, None, None] for value in (scale, shift)]
        torch.testing.assert_close(latents, (z - by_channel[1]) * by_channel[0])
        torch.testing.assert_close(net.unscaled(latents), z)
        torch.testing.assert_close(net.scaled(net.unscaled(latents)), latents)
        torch.testing.assert_close(net.decode(latents), plain.decode(z), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net.posterior(images)[0], z)


def test_draws_come_from_the_posterior(images):
    net = scrambled(replace(KL, scale=2.0, shift=0.5))
    with torch.no_grad():
        mean, logvar = net.posterior(images)
        noise = torch.randn_like(mean)
        expected = (mean + (logvar / 2).exp() * noise - 0.5) * 2
        torch.testing.assert_close(net.encode(images, noise=noise), expected)
        torch.testing.assert_close(net.encode_tiled(images, 3, 1, noise=0 * noise).shape, mean.shape)
        first, again = (
            net.encode(images, sample=True, generator=torch.Generator().manual_seed(3)) for _ in range(2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, net.encode(images, sample=True))
        assert torch.equal(net.encode(images), net.encode(images, noise=0 * noise))


def test_log_variance_is_clamped(images):
    net = scrambled(KL)
    with torch.no_grad():
        net.quant.bias[4:] = torch.tensor([-100.0, 100.0, 0.0, 0.0])
        _, logvar = net.posterior(images)
    assert logvar[:, 0].eq(-30).all()
    assert logvar[:, 1].eq(20).all()


def test_the_nearest_entry_stands_for_a_latent(images):
    net = scrambled(replace(VQ, scale=3.0, shift=0.1))
    with torch.no_grad():
        nn.init.normal_(net.codebook.weight)
        latents = net.encode(images)
        entries, indices = net.quantize(latents)
        z, codebook = net.unscaled(latents), net.codebook.weight
        far = (z[:, None] - codebook[None, :, :, None, None]).square().sum(2)
        assert torch.equal(indices, far.argmin(1))
        torch.testing.assert_close(net.unscaled(entries), codebook[indices].permute(0, 3, 1, 2))
        assert torch.equal(net.quantize(entries)[1], indices)
        torch.testing.assert_close(
            net.decode(latents), net.decode(entries, quantized=True), atol=1e-5, rtol=1e-5
        )


def test_codes_are_found_in_chunks(images, monkeypatch):
    net = scrambled(VQ)
    with torch.no_grad():
        latents = torch.randn(2, 3, 5, 7)
        _, expected = net.quantize(latents)
        monkeypatch.setattr("triptych.models.autoencoder._DISTANCES", 100)
        assert torch.equal(net.quantize(latents)[1], expected)


def test_halves_find_the_codes_that_fp32_finds():
    net = scrambled(replace(VQ, codebook_size=512)).bfloat16()
    latents = torch.randn(1, 3, 16, 16).bfloat16()
    _, indices = net.quantize(latents)
    assert torch.equal(indices, net.float().quantize(latents.float())[1])


def test_gradients_pass_straight_through_the_codebook():
    net = scrambled(VQ)
    latents = torch.randn(1, 3, 4, 4, requires_grad=True)
    net.decode(latents).square().sum().backward()
    through = latents.grad.clone()
    entries = net.quantize(latents)[0].detach().requires_grad_()
    net.decode(entries, quantized=True).square().sum().backward()
    torch.testing.assert_close(through, entries.grad, atol=1e-4, rtol=1e-4)
    assert net.codebook.weight.grad is None  # only a codebook loss moves it


@pytest.mark.parametrize("config", [KL, VQ, TINY])
def test_images_are_answered_one_by_one(config, images):
    net = scrambled(config)
    with torch.no_grad():
        latents = net.encode(images)
        torch.testing.assert_close(net.encode(images[1:]), latents[1:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net.decode(latents[1:]), net.decode(latents)[1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [KL, TINY])
def test_other_channels_may_come_out_than_go_in(config):
    net = scrambled(replace(config, in_channels=4, out_channels=2))
    assert net(torch.zeros(1, 4, 8, 12)).shape == (1, 2, 8, 12)


def test_blocks_are_in_order():
    net = Autoencoder(replace(KL, attention_downsample_factors=(4,)))
    blocks = net.blocks()
    seen = []
    for block in blocks:
        block.register_forward_hook(lambda part, *_: seen.append(part))
    net(torch.zeros(1, 3, 8, 8))
    assert seen == blocks
    assert {type(block) for block in blocks} == {ResnetBlock, SpatialAttention}
    assert TinyAutoencoder(TINY).blocks()


def test_attention_can_be_looked_at():
    net = scrambled(KL)
    with torch.no_grad(), capture(net) as maps:
        net(torch.zeros(1, 3, 8, 12))
    assert set(maps) == {"encoder.middle.attention.attn", "decoder.middle.attention.attn"}
    assert maps["decoder.middle.attention.attn"].shape == (1, 1, 6, 6)


@pytest.mark.parametrize("config", [KL, VQ, TINY])
@pytest.mark.parametrize(("x", "y"), [(True, True), (True, False), (False, True)])
def test_seamless_images_can_be_rolled(config, x, y):
    """Along a direction that wraps, rolling the input rolls the output, in encoder and decoder."""
    net = scrambled(config)
    roll = (y * 2, x * 3)
    pixels = tuple(by * net.config.downsample_factor for by in roll)
    images, latents = torch.randn(1, 3, 24, 20), torch.randn(1, config.latent_channels, 6, 5)
    with torch.no_grad():
        plain = net.decode(latents)
        with seamless(net, x, y):
            decoded = net.decode(latents)
            torch.testing.assert_close(
                net.decode(latents.roll(roll, (2, 3))), decoded.roll(pixels, (2, 3)), atol=1e-4, rtol=1e-4
            )
            torch.testing.assert_close(
                net.encode(images.roll(pixels, (2, 3))),
                net.encode(images).roll(roll, (2, 3)),
                atol=1e-4,
                rtol=1e-4,
            )
        assert not torch.allclose(plain, decoded, atol=1e-3)
        assert torch.equal(net.decode(latents), plain)


@pytest.mark.parametrize("config", [KL, VQ, TINY])
def test_mistakes_are_named(config):
    net = scrambled(config)
    with pytest.raises(ConfigError, match=r"images are 13 x 16, .* multiples of 4; .* 16 x 16$"):
        net.encode(torch.zeros(1, 3, 13, 16))
    with pytest.raises(ConfigError, match="images have 4 channels, the autoencoder takes 3"):
        net.encode_tiled(torch.zeros(1, 4, 16, 16))
    with pytest.raises(ConfigError, match="latents have 9 channels"):
        net.decode(torch.zeros(1, 9, 4, 4))
    with pytest.raises(ConfigError, match="no head"):
        net.replace_head(3)


def test_what_the_other_kind_has_is_named(images):
    with pytest.raises(ConfigError, match="no posterior"):
        scrambled(VQ).posterior(images)
    with pytest.raises(ConfigError, match="no codebook"):
        scrambled(KL).quantize(torch.zeros(1, 4, 2, 2))


def test_the_card_says_what_images_look_like():
    preprocess = Autoencoder(KL).card.preprocess
    assert (preprocess.size, preprocess.mean, preprocess.std) == ((256, 256), (0.5,) * 3, (0.5,) * 3)


def test_no_math_needed_for_a_scale_of_one():
    latents = torch.full((1, 4, 2, 2), math.pi)
    assert scrambled(KL).scaled(latents) is latents
