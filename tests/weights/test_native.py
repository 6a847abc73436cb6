"""Our own format: bit for bit, whole or not at all."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import triptych as tp
from triptych.errors import TriptychError
from triptych.model_card import ModelCard, Preprocess
from triptych.weights import inspect, load, save

CONFIGS = [
    {},
    {"image_size": (24, 40), "num_heads": 2, "pool": "mean", "class_token": False, "norm_after_pool": True},
    {"stem": "conv", "stem_widths": (8, 16), "patch_size": 2, "head": "cosine", "position": "sincos"},
    {"stem": "resnet", "stem_widths": (32,), "stem_depths": (1, 2), "patch_size": 1, "head": "mlp"},
    {"distill_token": True, "mlp": "swiglu", "layer_scale": 0.1},
    {"position": "rotary", "num_registers": 3, "qkv_bias": "qv", "num_classes": 0, "qk_norm": True},
    {"pool": "attention", "class_token": False, "position": "none", "pre_norm": True},
]


@pytest.mark.parametrize("changes", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_saved_network_comes_back_bit_for_bit(tiny, same_state, tmp_path, changes, dtype):
    net = tiny(**changes).to(dtype)
    net.card = ModelCard(
        preprocess=Preprocess(size=net.config.image_size), classes=("a",) * 5, figures={"top1": 0.5}
    )
    tp.save(net, tmp_path / "net.safetensors")
    back = tp.load(tmp_path / "net.safetensors")
    same_state(net, back)
    assert back.config == net.config
    assert back.card == net.card
    assert not back.training


def test_the_file_is_an_ordinary_safetensors_file(tiny, tmp_path):
    net = tiny()
    save(net, tmp_path / "net.safetensors")
    read = load_file(tmp_path / "net.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in net.state_dict().items())
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        message = json.loads(file.metadata()["triptych"])
    assert (message["version"], message["family"], message["config"]["embed_dim"]) == (1, "vit", 64)


def test_stored_small_loads_in_the_networks_own_type(tiny, tmp_path):
    net = tiny()
    save(net, tmp_path / "small.safetensors", dtype=torch.float16)
    save(net, tmp_path / "whole.safetensors")
    back = load(tmp_path / "small.safetensors")
    assert all(p.dtype == torch.float32 for p in back.parameters())
    for name, tensor in net.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor.half().float())
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("small", "whole")]
    assert sizes[0] < 0.6 * sizes[1]


def test_a_mapped_network_can_be_trained_and_saved_over_its_own_file(tiny, same_state, tmp_path):
    path = tmp_path / "net.safetensors"
    save(tiny(), path)
    before = path.read_bytes()
    net = load(path).train()
    loss = net(torch.randn(2, 3, 32, 32)).square().mean()
    loss.backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert path.read_bytes() == before
    save(net, path)
    same_state(net, load(path))


def test_a_run_folder_stands_for_its_weights(tiny, same_state, tmp_path):
    net = tiny()
    save(net, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"recipe": "vit", "steps": 3}')
    same_state(net, load(tmp_path))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"version": 99}, "upgrade"),
        ({"family": "octopus"}, "family 'octopus'"),
        ({"config": {"patch_size": 8}}, "lacks the field"),
        ({"config": 3}, "must be an object"),
        ({"dtype": "load"}, "family"),
        ({"dtype": "nonsense"}, "damaged triptych metadata"),
    ],
)
def test_damaged_metadata_is_one_line(tiny, tmp_path, change, part):
    path = tmp_path / "net.safetensors"
    save(tiny(), path)
    with safe_open(path, "pt") as file:
        message = json.loads(file.metadata()["triptych"])
    save_file(load_file(path), path, {"triptych": json.dumps(message | change)})
    with pytest.raises(TriptychError, match=part) as caught:
        load(path)
    assert "net.safetensors" in str(caught.value)


def test_metadata_that_is_no_json(tiny, tmp_path):
    path = tmp_path / "net.safetensors"
    save(tiny(), path)
    save_file(load_file(path), path, {"triptych": "]"})
    with pytest.raises(TriptychError, match="damaged triptych metadata"):
        load(path)


def test_a_missing_and_a_foreign_tensor_are_both_named(tiny, tmp_path):
    path = tmp_path / "net.safetensors"
    save(tiny(), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["stranger"] = tensors.pop("norm.weight")
    save_file(tensors, path, metadata)
    with pytest.raises(TriptychError, match=r"1 missing \(norm.weight\).*no rule knows \(stranger\)"):
        load(path)


def test_nothing_is_left_behind_when_the_disk_is_full(tiny, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TriptychError, match="No space left"):
        save(tiny(), tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_inspect_says_what_it_is(tiny, tmp_path):
    net = tiny()
    save(net, tmp_path / "net.safetensors")
    message = inspect(tmp_path / "net.safetensors")
    assert message["format"] == "triptych"
    assert message["family"] == "vit"
    assert message["parameters"] == sum(p.numel() for p in net.parameters())
    assert message["fits"] is None
    json.dumps(message)


def test_only_our_networks_are_saved(tmp_path):
    with pytest.raises(TriptychError, match="Linear is no network of this package"):
        save(torch.nn.Linear(2, 2), tmp_path / "x.safetensors")


def test_shards_hold_no_more_than_asked_and_come_back_bit_for_bit(tiny, same_state, tmp_path):
    net = tiny()
    largest = max(t.nbytes for t in net.state_dict().values())
    save(net, tmp_path / "model.safetensors")  # an earlier, whole one, which readers would take first
    save(net, tmp_path / "model.safetensors", max_shard_size=largest)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    for shard in shards:
        assert sum(t.nbytes for t in load_file(shard).values()) <= largest
    for place in (tmp_path, tmp_path / "model.safetensors.index.json"):
        again = load(place)
        assert again.config == net.config
        same_state(again, net)


def test_a_small_network_asked_to_be_in_shards_is_one_file(tiny, same_state, tmp_path):
    net = tiny()
    save(net, tmp_path / "model.safetensors", max_shard_size=10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    same_state(load(tmp_path), net)
