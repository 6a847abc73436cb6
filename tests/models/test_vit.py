"""The Vision Transformer in every form: shapes, initialization, heads, features, and independence of past inputs."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from triptych.errors import ConfigError
from triptych.layers.capture import capture
from triptych.layers.residual import DropPath
from triptych.model_card import ModelCard
from triptych.models.vit import Block, CosineHead, MlpHead, ViT


def test_every_parameter_is_filled(form):
    for name, parameter in ViT(form).named_parameters():
        assert parameter.isfinite().all(), name


def test_every_parameter_counts(form, scrambled, images):
    net = scrambled(form)
    net(images(form)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_logits_of_every_form(form, scrambled, images):
    net = scrambled(form)
    wide = {"headless": form.embed_dim, "hidden": form.head_dim or form.embed_dim}
    width = form.num_classes or wide["hidden" if form.head == "mlp" else "headless"]
    logits = net(images(form))
    assert logits.shape == (2, width)
    assert logits.isfinite().all()


def test_the_zero_linear_head_says_nothing_yet(form, images):
    logits = ViT(form).eval()(images(form))
    if form.head == "linear" and form.num_classes:
        assert logits.eq(0).all()
    else:
        assert logits.abs().max() > 0


def test_images_are_answered_one_by_one(form, scrambled, images):
    net, batch = scrambled(form), images(form, 3)
    with torch.no_grad():
        torch.testing.assert_close(net(batch)[1:2], net(batch[1:2]), atol=1e-4, rtol=1e-4)


def test_the_seed_decides_the_start(form):
    torch.manual_seed(5)
    first = ViT(form).state_dict()
    torch.manual_seed(5)
    assert all(torch.equal(value, first[name]) for name, value in ViT(form).state_dict().items())


def test_a_block_is_equations_2_and_3(small, scrambled):
    block, z = scrambled(small()).encoder[0], torch.randn(2, 7, 24)
    z_prime = block.attn(block.norm1(z)) + z
    torch.testing.assert_close(block(z), block.mlp(block.norm2(z_prime)) + z_prime)


def test_the_forward_pass_is_figure_1(small, scrambled, images):
    net, x = scrambled(small()), images(small())
    z = net.patch.proj(x).flatten(2).transpose(1, 2)
    z = torch.cat([net.class_token.expand(2, 1, 24), z], dim=1) + net.positions
    for block in net.blocks():
        z = block(z)
    torch.testing.assert_close(net(x), net.head(net.norm(z)[:, 0]), atol=1e-4, rtol=1e-4)


def test_registers_are_read_by_attention_only(small, scrambled, images):
    config = small(num_registers=2)
    net, x = scrambled(config), images(config)
    z, grid = net.embed(x)
    assert z.shape == (2, 1 + 2 + 24, 24)
    assert grid == (4, 6)
    # Registers have no position: the same two vectors for every image, after the class token.
    assert torch.equal(z[0, 1:3], net.registers[0])
    assert net.features(x)[0].shape == (2, 24, 4, 6)


def test_layer_scale_near_zero_is_near_the_identity(small, images):
    config = small(layer_scale=1e-6)
    net, x = ViT(config), images(config)
    z, _ = net.embed(x)
    torch.testing.assert_close(net.encode(x)[0], z, atol=1e-4, rtol=0)


def test_drop_path_rises_with_depth(small):
    net = ViT(small(drop_path_rate=0.3, depth=4))
    rates = [part.rate for part in net.modules() if isinstance(part, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert ViT(small(drop_path_rate=0.3, depth=1)).encoder[0].drop_path.rate == 0


def test_eval_is_the_same_every_time_and_training_is_not(small, scrambled, images):
    config = small(drop_path_rate=0.5, dropout=0.2)
    net, x = scrambled(config), images(config)
    assert torch.equal(net(x), net(x))
    net.train()
    assert not torch.equal(net(x), net(x))


def test_both_deit_tokens_speak(small, scrambled, images):
    config = small(distill_token=True)
    net, x = scrambled(config), images(config)
    z = net.norm(net.encode(x)[0])
    torch.testing.assert_close(net(x), (net.head(z[:, 0]) + net.head_distill(z[:, 1])) / 2)


# Heads


def test_the_mlp_head_has_one_hidden_tanh_layer(small, scrambled, images):
    config = small(head="mlp", head_dim=7)
    net, x = scrambled(config), images(config)
    y = net.pooled(net.encode(x)[0])
    hidden = torch.tanh(y @ net.head.hidden.weight.T + net.head.hidden.bias)
    torch.testing.assert_close(net(x), hidden @ net.head.out.weight.T + net.head.out.bias)


def test_from_pre_training_to_fine_tuning_in_one_call(small, images):
    config = small(head="mlp")
    net = ViT(config)
    net.card = ModelCard(classes=tuple("abcde"), groupings={"kind": tuple("xxyyy")}, figures={"top1": 0.5})
    body = {name: p for name, p in net.named_parameters() if not name.startswith("head")}
    net.replace_head(3)
    assert isinstance(net.head, nn.Linear)
    assert net.config == replace(config, num_classes=3, head="linear")
    assert net(images(config)).eq(0).all()
    assert net.card.classes is None
    assert net.card.groupings == {}
    assert net.card.figures == {}
    after = dict(net.named_parameters())
    assert all(after[name] is p for name, p in body.items())


@pytest.mark.parametrize(("head", "cls"), [("linear", nn.Linear), ("mlp", MlpHead), ("cosine", CosineHead)])
def test_any_head_for_any_other(form, head, cls, images):
    if form.distill_token and head != "linear":
        with pytest.raises(ConfigError, match="distill_token"):
            ViT(form).replace_head(4, head)
        return
    net = ViT(form).eval()
    net.replace_head(4, head)
    assert isinstance(net.head, cls)
    assert net(images(form)).shape == (2, 4)
    assert net(images(form)).isfinite().all()
    assert ViT(net.config).state_dict().keys() == net.state_dict().keys()


def test_a_head_off_leaves_the_pooled_token(form, scrambled, images):
    net = scrambled(form)
    net.replace_head(0)
    if form.distill_token:
        return
    x = images(form)
    torch.testing.assert_close(net(x), net.pooled(net.encode(x)[0]))


def test_a_new_head_has_the_networks_dtype_and_learns(small):
    net = ViT(small()).to(torch.float64)
    net.requires_grad_(False)
    net.replace_head(2)
    assert net.head.weight.dtype == torch.float64
    assert net.head.weight.requires_grad
    with pytest.raises(ConfigError, match="num_classes -1"):
        net.replace_head(-1)
    assert net.head.out_features == 2


def test_a_cosine_head_does_not_hear_loudness():
    head = CosineHead(6, 4)
    nn.init.normal_(head.weight)
    x = torch.randn(3, 6)
    torch.testing.assert_close(head(x), head(10 * x))
    assert head(x).abs().max() <= 16
    wanted = 16 * (x[0] @ head.weight[2]) / (x[0].norm() * head.weight[2].norm())
    torch.testing.assert_close(head(x)[0, 2], wanted)


# Features


def test_features_of_every_form(form, scrambled, images):
    net, x = scrambled(form), images(form)
    maps = net.features(x)
    assert [m.shape for m in maps] == [(2, net.channels[0], *form.grid)]
    assert net.strides == [form.stride]
    assert net.channels == [form.embed_dim]


def test_features_are_the_patches_in_their_places(small, scrambled, images):
    config = small(num_registers=2)
    net, x = scrambled(config), images(config)
    z = net.norm(net.encode(x)[0])
    features = net.features(x)[0]
    for row, column in [(0, 0), (0, 5), (3, 0), (2, 4)]:
        assert torch.equal(features[:, :, row, column], z[:, 3 + 6 * row + column])


def test_blocks_are_taken_in_the_order_asked(small, scrambled, images):
    net, x = scrambled(small()), images(small())
    first, second, third = (net.features(x, [i])[0] for i in range(3))
    assert not torch.equal(first, second)
    assert torch.equal(net.features(x)[0], third)
    for blocks, wanted in {
        (-1,): [third], (0, 2): [first, third], (2, 0): [third, first], (-3, 1, -1): [first, second, third],
        (1, 1): [second, second], (1, -2): [second, second], (): [],
    }.items():  # fmt: skip
        got = net.features(x, list(blocks))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), blocks


@pytest.mark.parametrize("blocks", [[3], [-4], [0, 99]])
def test_blocks_that_are_not_there(small, images, blocks):
    with pytest.raises(ConfigError, match="which must be from -3 to 2"):
        ViT(small()).features(images(small()), blocks)


def test_blocks_are_listed_in_order(small):
    net = ViT(small())
    assert net.blocks() == list(net.encoder)
    assert all(isinstance(block, Block) for block in net.blocks())


# Maps


def test_capture_of_every_form(form, scrambled, images):
    net, x = scrambled(form), images(form)
    plain = net(x)
    with capture(net) as maps:
        torch.testing.assert_close(net(x), plain, atol=1e-5, rtol=1e-5)
    tokens = math.prod(form.grid) + form.prefix
    wanted = {f"encoder.{i}.attn": (2, form.num_heads, tokens, tokens) for i in range(form.depth)}
    if form.pool == "attention":
        wanted["pool"] = (2, form.num_heads, 1, tokens)
    assert {name: tuple(weights.shape) for name, weights in maps.items()} == wanted
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-5, rtol=0)


def test_taps_are_off_after_an_exception(small):
    net = ViT(small())
    with pytest.raises(ConfigError, match="4 channels"), capture(net):
        net(torch.zeros(1, 4, 32, 48))
    assert all(block.attn.tap is None for block in net.blocks())


def test_images_of_other_channels(form, images):
    with pytest.raises(ConfigError, match=f"images have 5 channels, the network takes {form.in_channels}"):
        ViT(form)(torch.zeros(1, 5, 32, 48))
