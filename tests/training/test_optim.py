import math

import pytest
import torch

import triptych as tp
from triptych.training.configs.base import OptimConfig
from triptych.training.ema import Ema
from triptych.training.optim import clip, layers_of, lr_at, make_optimizer, set_lr, update
from triptych.training.state import collect_tensors


def tiny(**changes):
    return tp.create(
        "vit-ti16",
        depth=3,
        embed_dim=24,
        mlp_ratio=2.0,
        image_size=32,
        num_classes=5,
        layer_scale=0.1,
        **changes,
    )


def test_norms_biases_positions_tokens_and_gains_are_not_decayed():
    net = tiny(num_registers=2)
    optimizer = make_optimizer(net, OptimConfig(weight_decay=0.3))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in net.named_parameters() if id(p) in decayed}
    weights = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")
    assert names == {
        f"encoder.{i}.{part}"
        for i in range(3)
        for part in ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    } | {"patch.proj.weight", "head.weight"}
    assert all(name.endswith(weights) or name == "head.weight" for name in names)


def test_a_codebook_is_not_decayed():
    net = tp.create("vq-f4", base_channels=8, norm_groups=4, codebook_size=16)
    optimizer = make_optimizer(net, OptimConfig(weight_decay=0.3))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert net.codebook.weight.ndim == 2
    assert id(net.codebook.weight) not in decayed
    assert decayed == {id(p) for p in net.parameters() if p.ndim > 1 and p is not net.codebook.weight}


def test_every_parameter_is_in_one_group():
    net = tiny(pool="attention", class_token=False)
    groups = make_optimizer(net, OptimConfig(layer_decay=0.5)).param_groups
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in net.parameters())


def test_layer_decay_is_a_power_of_the_distance_from_the_head():
    net = tiny()
    optimizer = make_optimizer(net, OptimConfig(lr=1.0, layer_decay=0.5))
    set_lr(optimizer, 0.8)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in net.named_parameters():
        assert rate[id(parameter)] == pytest.approx(0.8 * 0.5 ** (4 - layers_of(net)[name])), name
    assert [layers_of(net)[n] for n in ("positions", "patch.proj.bias", "encoder.0.norm1.bias", "norm.bias")] == [
        0, 0, 1, 4,
    ]  # fmt: skip


def test_schedule_is_its_closed_form():
    config = OptimConfig(lr=2.0, warmup=0.25, final_lr=0.1)
    assert lr_at(0.0, config) == 0.0
    assert lr_at(0.125, config) == pytest.approx(1.0)
    assert lr_at(0.25, config) == pytest.approx(2.0)
    assert lr_at(0.625, config) == pytest.approx((2.0 + 0.2) / 2)
    assert lr_at(1.0, config) == pytest.approx(0.2)
    for progress in (0.3, 0.5, 0.9):
        way = (progress - 0.25) / 0.75
        assert lr_at(progress, config) == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * way)))


def test_the_optimiser_is_adamw_by_its_equations():
    """One parameter, three steps, against Algorithm 2 of Loshchilov and Hutter in fp64."""
    net = tp.create(
        "vit-ti16", depth=1, embed_dim=12, num_heads=3, mlp_ratio=1.0, image_size=16, num_classes=2
    )
    config = OptimConfig(lr=0.01, weight_decay=0.1, betas=(0.8, 0.95))
    optimizer = make_optimizer(net, config)
    weight = net.encoder[0].mlp.fc1.weight
    w, m, v = weight.detach().double().clone(), 0.0, 0.0
    for t in range(1, 4):
        gradient = torch.randn_like(weight)
        optimizer.zero_grad()
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        weight.grad = gradient.clone()
        set_lr(optimizer, 0.01 * t)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient.double(), 0.95 * v + 0.05 * gradient.double() ** 2
        w = w - 0.01 * t * (0.1 * w + (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8))
    torch.testing.assert_close(weight.double(), w, atol=1e-6, rtol=1e-5)


def test_ema_is_its_recursion():
    net = tiny()
    ema = Ema(net, 0.9)
    expected = net.head.bias.detach().clone()
    for step in range(1, 40):
        with torch.no_grad():
            net.head.bias.copy_(torch.randn(5))
        ema.update(net, step, torch.zeros(()))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net.head.bias.detach()
    torch.testing.assert_close(ema.net.head.bias, expected)
    assert not any(p.requires_grad for p in ema.net.parameters())


@pytest.mark.parametrize("begun", [0, 3])
def test_a_step_that_is_skipped_leaves_everything_as_it_is(begun):
    """To the bit: weights, moments, counts of steps, averages and their buffers, also where nothing is a number."""
    net = tp.create(
        "vit-ti16", depth=1, embed_dim=24, mlp_ratio=2.0, image_size=16, stem="conv", stem_widths=(8,), patch_size=4,
        num_classes=5,
    )  # fmt: skip
    optimizer, ema, no = make_optimizer(net, OptimConfig()), Ema(net, 0.9), torch.zeros(())
    images = torch.randn(4, 3, 16, 16)

    def step(skipped, number, factor=1.0):
        (net(images).logsumexp(1).mean() * factor).backward()
        clip(net, 1.0)
        update(optimizer, skipped)
        optimizer.zero_grad()
        ema.update(net, number, skipped)

    def state():
        return {
            name: tensor.clone()
            for name, tensor in collect_tensors(net, ema, optimizer).items()
            if not (name.startswith("net.") and "running" in name)
            and "tracked" not in name  # the forward pass's
        } | {f"average of {name}": buffer.clone() for name, buffer in ema.net.named_buffers()}

    for number in range(begun):
        step(no, number)
    before = state()
    step(torch.ones(()), begun, math.nan)
    after = state()
    assert before.keys() <= after.keys()
    for name, tensor in after.items():
        expected = before[name] if name in before else torch.zeros_like(tensor)
        assert tensor.numpy().tobytes() == expected.numpy().tobytes(), name
    step(no, begun + 1)
    changed = state()
    assert not torch.equal(changed["net.head.weight"], before["net.head.weight"])
    assert changed["optimizer.head.weight.step"] == begun + 1


@pytest.mark.parametrize("most", [math.inf, 0.01, 1e3])
def test_clipping_is_pytorch_s_and_says_whose_gradient_is_how_long(most):
    net, twin = tiny(), tiny()
    twin.load_state_dict(net.state_dict())
    frozen = "head.bias"
    for one in (net, twin):
        one.get_parameter(frozen).requires_grad_(False)
        one(torch.ones(2, 3, *one.config.image_size)).square().sum().backward()
    expected = {name: p.grad.norm() for name, p in net.named_parameters() if p.grad is not None}
    norm, each = clip(net, most)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(twin.parameters(), most))
    for mine, its in zip(net.parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (its.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, its.grad)
    assert frozen not in dict(each)
    assert dict(each) == {name: pytest.approx(float(length), rel=1e-5) for name, length in expected.items()}
