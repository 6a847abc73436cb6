"""Networks inside what training scripts save: nested, prefixed, next to other tensors, and next to each other."""

import logging
import re

import pytest
import torch
from safetensors.torch import load_file

from triptych.errors import CheckpointError
from triptych.weights import export, inspect, load

HEAD = {"head.mlp.0.weight": torch.randn(8, 64), "head.last_layer.weight_g": torch.randn(9, 1)}


@pytest.fixture
def state(tiny, tmp_path):
    """timm's keys of a small ViT; its class count makes it known again."""
    export(tiny(), tmp_path / "timm.pth", "timm")
    return torch.load(tmp_path / "timm.pth", weights_only=True)


def prefixed(state, prefix):
    return {prefix + key: tensor for key, tensor in state.items()}


def infix(state, name):
    return {
        re.sub(r"^(.*)blocks\.(\d)\.", rf"\1blocks.\2.{name}.", key): tensor for key, tensor in state.items()
    }


def nested(state):
    tree: dict = {}
    for key, tensor in state.items():
        *modules, leaf = key.split(".")
        place = tree
        for module in modules:
            place = place.setdefault(module, {})
        place[leaf] = tensor
    return tree


WRAPPED = {
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"lr": 0.1}, "epoch": 3},
    "weights": lambda s: {"weights": s},
    "network": lambda s: {"network": s, "step": torch.tensor(3)},
    "checkpoint/state_dict": lambda s: {"checkpoint": {"state_dict": s}, "config": {"a": 1}},
    "three dicts": lambda s: {"a": {"b": {"c": s}}},
    "five dicts": lambda s: {"a": {"b": {"c": {"d": {"e": s}}}}},
    "a dict for each module": lambda s: nested(s),
    "list with the optimizer": lambda s: [s, {"state": {}, "param_groups": []}],
    "tuple with the epoch": lambda s: (prefixed(s, "module."), 3),
    "nn.Sequential": lambda s: prefixed(s, "0."),
    "nn.Sequential after a normalization": lambda s: {
        **prefixed(s, "model.1."),
        "model.0.mean": torch.zeros(3),
    },
    "compiled model": lambda s: {"state_dict": prefixed(s, "model._orig_mod.")},
    "compiled in DDP": lambda s: prefixed(s, "module._orig_mod."),
    "DDP in compiled": lambda s: prefixed(s, "_orig_mod.module."),
    "model.module.": lambda s: {"model": prefixed(s, "model.module.")},
    "model.model.": lambda s: prefixed(s, "model.model."),
    "vit.": lambda s: prefixed(s, "vit."),
    "encoder.": lambda s: {"net": prefixed(s, "encoder.")},
    "student.vit.trunk.": lambda s: prefixed(s, "student.vit.trunk."),
    "FSDP": lambda s: infix(prefixed(s, "_fsdp_wrapped_module."), "_fsdp_wrapped_module"),
    "activation checkpointing": lambda s: {"model": infix(s, "_checkpoint_wrapped_module")},
    "blocks compiled one by one": lambda s: infix(s, "_orig_mod"),
    "averaged model": lambda s: {"model_ema": {"n_averaged": torch.tensor(3), **prefixed(s, "module.")}},
    "DINOv2's chunks": lambda s: {key.replace("blocks.", "blocks.0."): t for key, t in s.items()},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=list(WRAPPED))
def test_any_nesting(wrap, state, tiny, same_state, tmp_path):
    torch.save(wrap(state), tmp_path / "net.pth")
    same_state(load(tmp_path / "net.pth"), tiny())
    described = inspect(tmp_path / "net.pth")
    assert (described["family"], described["fits"]) == ("vit", None)


OTHERS = {
    "criterion": {"criterion.weight": torch.ones(5)},
    "metrics": {"train_acc.correct": torch.tensor(1), "val_acc.total": torch.tensor(1)},
    "counters": {"total_ops": torch.zeros(1), "blocks.0.attn.total_ops": torch.zeros(1)},
    "logit_scale": {"logit_scale": torch.tensor(1.0)},
    "projection": {"projection_head.0.weight": torch.randn(4, 64)},
    "MAE's decoder": {
        "mask_token": torch.zeros(1, 1, 64),
        "decoder_embed.weight": torch.randn(8, 64),
        "decoder_norm.bias": torch.zeros(8),
        "decoder_pos_embed": torch.zeros(1, 17, 8),
    },
}


@pytest.mark.parametrize("others", OTHERS.values(), ids=list(OTHERS))
def test_what_is_no_part_of_the_network_is_left_out_aloud(others, state, tiny, same_state, tmp_path, caplog):
    torch.save({"state_dict": prefixed(state | others, "model.")}, tmp_path / "net.pth")
    with caplog.at_level(logging.WARNING):
        same_state(load(tmp_path / "net.pth"), tiny())
    first = next(iter(others)).split(".")[0]
    assert first in caplog.text or first == "mask_token"
    assert any("left out" in note for note in inspect(tmp_path / "net.pth")["notes"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"blocks.0.attn.lambda_q1": torch.zeros(1)},
        {"norm_pre.weight": torch.zeros(64), "pos_drop.table": torch.zeros(3)},
        {"rope.freqs": torch.zeros(4)},
        {"blocks.0.norm1.weight": torch.zeros(63)},
        {"blocks.0.norm1.weight": None},
    ],
)
def test_what_belongs_to_the_network_stays_strict(wrong, state, tmp_path):
    tensors = {key: tensor for key, tensor in (state | wrong).items() if tensor is not None}
    torch.save({"state_dict": prefixed(tensors, "model.")}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError):
        load(tmp_path / "net.pth")


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("student/module.backbone.", "teacher/backbone."),
        ("state_dict/model.", "state_dict/ema_model.module."),
        ("model/", "swa/module."),
        ("ema/online_model.", "ema/ema_model."),  # ema_pytorch stores both
        ("state_dict/online_network.", "state_dict/target_network."),
    ],
)
def test_of_two_networks_the_average_is_taken(student, teacher, state, tiny, same_state, tmp_path, caplog):
    other = {key: tensor + 1 for key, tensor in state.items()}
    saved: dict = {}
    for place, tensors in ((student, other), (teacher, state)):
        nest, _, prefix = place.partition("/")
        heads = prefixed(HEAD, prefix.replace("backbone.", "heads.")) if "backbone" in prefix else {}
        saved.setdefault(nest, {}).update(prefixed(tensors, prefix) | heads)
    torch.save(saved, tmp_path / "net.pth")
    with caplog.at_level(logging.WARNING):
        net = load(tmp_path / "net.pth")
    same_state(net, tiny())
    assert "weights='raw'" in caplog.text
    assert student in caplog.text
    raw = load(tmp_path / "net.pth", weights="raw")
    assert torch.equal(raw.norm.weight, net.norm.weight + 1)
    same_state(load(tmp_path / "net.pth", weights="ema"), net)


def test_without_a_second_network_there_is_no_average(state, tmp_path):
    torch.save({"state_dict": prefixed(state, "model.")}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="no averaged weights"):
        load(tmp_path / "net.pth", weights="ema")
    load(tmp_path / "net.pth", weights="raw")


def test_of_an_ensemble_the_first_is_taken(state, tiny, same_state, tmp_path, caplog):
    other = {key: tensor + 1 for key, tensor in state.items()}
    torch.save(prefixed(state, "models.0.") | prefixed(other, "models.1."), tmp_path / "net.pth")
    with caplog.at_level(logging.WARNING):
        same_state(load(tmp_path / "net.pth"), tiny())
    assert "another network is at 'models.1.', save that part alone" in caplog.text
    with pytest.raises(CheckpointError, match="no averaged weights"):
        load(tmp_path / "net.pth", weights="ema")


def test_the_best_of_two_is_taken(state, tiny, same_state, tmp_path):
    torch.save(
        {"last": {key: tensor + 1 for key, tensor in state.items()}, "best": state}, tmp_path / "net.pth"
    )
    same_state(load(tmp_path / "net.pth"), tiny())


def test_the_body_of_a_network_is_no_other_network(tiny, same_state, tmp_path, caplog):
    export(tiny(), tmp_path / "hf", "hf")
    torch.save(prefixed(load_file(tmp_path / "hf" / "model.safetensors"), "model."), tmp_path / "net.pth")
    with caplog.at_level(logging.WARNING):
        same_state(load(tmp_path / "net.pth"), tiny())
    assert "another network" not in caplog.text
    assert "left out" not in caplog.text


HEADS = {
    "head.1.": "",  # nn.Sequential(nn.Dropout(), nn.Linear())
    "head.fc.": "",
    "classifier.": "",
    "fc.": "backbone.",
    "linear_head.": "module.encoder.",
}


@pytest.mark.parametrize(("head", "body"), HEADS.items())
def test_a_linear_head_under_another_name(head, body, state, tiny, same_state, tmp_path, caplog):
    outer = "module." if body.startswith("module.") else ""
    saved = {
        outer + head + key[5:] if key.startswith("head.") else body + key: tensor
        for key, tensor in state.items()
    }
    torch.save({"state_dict": saved}, tmp_path / "net.pth")
    with caplog.at_level(logging.WARNING):
        same_state(load(tmp_path / "net.pth"), tiny())
    assert f"head is a guess: {head}weight" in caplog.text
    assert inspect(tmp_path / "net.pth")["classes"]["number"] == 5


@pytest.mark.parametrize(
    "others",
    [
        {
            "head.0.weight": torch.randn(8, 64),
            "head.0.bias": torch.zeros(8),
            "head.2.weight": torch.randn(5, 8),
        },
        {"fc.weight": torch.randn(5, 128), "fc.bias": torch.zeros(5)},  # of twice the width
        {"fc.weight": torch.randn(5, 64)},
        {"arcface.weight": torch.randn(5, 64), "arcface.bias": torch.zeros(5)},
    ],
)
def test_other_heads_are_left_out_aloud(others, state, tmp_path, caplog):
    body = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    torch.save(prefixed(body | others, "module."), tmp_path / "net.pth")
    with caplog.at_level(logging.WARNING):
        net = load(tmp_path / "net.pth")
    assert net.config.num_classes == 0
    assert "left out" in caplog.text
