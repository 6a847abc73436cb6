"""The readers against the libraries that wrote the files."""

import argparse
import json
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from triptych.errors import CheckpointError
from triptych.weights.files.opening import open_checkpoint

pytestmark = [
    pytest.mark.proves(
        "Checkpoints", "PyTorch files, zip archives and the format before PyTorch 1.6", by="torch"
    ),
    pytest.mark.proves("Checkpoints", "safetensors", by="safetensors"),
]

TENSORS = {
    "matrix": torch.arange(12.0).view(3, 4),
    "turned": torch.arange(12.0).view(3, 4).T,
    "strided": torch.arange(20)[3:9:2],
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 3),
    "brain": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "half": torch.tensor([[1.0], [2.0]], dtype=torch.float16),
    "double": torch.tensor([1e-300]),
    "flags": torch.tensor([True, False]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "long": torch.tensor([2**40, -1]),
}


def check(checkpoint, expected):
    assert set(checkpoint.entries) == set(expected)
    for name, tensor in expected.items():
        assert checkpoint.shapes[name] == tuple(tensor.shape)
        for read in (checkpoint.read(name), checkpoint.mapped(name)):
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor), name


@pytest.mark.parametrize("modern", [True, False])
def test_what_torch_saves(tmp_path, modern):
    torch.save(TENSORS, tmp_path / "a.pth", _use_new_zipfile_serialization=modern)
    check(open_checkpoint(tmp_path / "a.pth"), TENSORS)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("modern", [True, False])
def test_every_pickle_protocol(tmp_path, protocol, modern):
    torch.save(TENSORS, tmp_path / "a.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=modern)
    check(open_checkpoint(tmp_path / "a.pth"), TENSORS)


@pytest.mark.parametrize("modern", [True, False])
def test_parameters_shared_storages_and_state_dicts(tmp_path, modern):
    base = torch.arange(10.0)
    state = OrderedDict(a=nn.Parameter(base[:4]), b=base[4:], c=base)
    torch.save(state, tmp_path / "a.bin", _use_new_zipfile_serialization=modern)
    check(open_checkpoint(tmp_path / "a.bin"), {name: t.detach() for name, t in state.items()})


class CfgNode(dict):
    """As yacs has it: a dict with a state."""

    def __getstate__(self):
        return {"_frozen": True}


class Callback:
    def __init__(self):
        self.best = np.float64(0.9)
        self.history = [np.arange(3), {1, 2}, frozenset({3}), b"raw", 1 << 80, ("x",)]

    def __reduce__(self):
        return Callback, (), self.__dict__


@pytest.mark.parametrize("modern", [True, False])
def test_foreign_objects_are_passed_over(tmp_path, modern):
    weights = {"w": torch.ones(2, 2)}
    saved = {
        "model": weights,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(9, dtype=torch.float64)}}},
        "args": argparse.Namespace(model="deit", lr=0.1, path=None),
        "config": CfgNode(A=1),
        "callbacks": {Callback: Callback()},
        "epoch": 3,
        "arch": "vit",
    }
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=modern)
    checkpoint = open_checkpoint(tmp_path / "a.pth")
    check(checkpoint, weights)
    assert checkpoint.notes == ["weights taken from 'model'"]
    inside = checkpoint.settings["inside"]
    assert inside["args"] == {"model": "deit", "lr": 0.1}
    assert inside["config"] == {"A": 1, "_frozen": True}
    assert (inside["epoch"], inside["arch"]) == (3, "vit")
    assert "config" not in checkpoint.settings  # what a pickle calls config is not the config.json beside it


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_a_whole_pickled_network_gives_its_state(tmp_path, modern):
    net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3)))
    torch.save({"model": net}, tmp_path / "a.pth", _use_new_zipfile_serialization=modern)
    check(open_checkpoint(tmp_path / "a.pth"), net.state_dict())


def test_averaged_weights_come_first_and_it_is_said(tmp_path):
    torch.save({"model": {"w": torch.zeros(1)}, "model_ema": {"w": torch.ones(1)}}, tmp_path / "a.pth")
    checkpoint = open_checkpoint(tmp_path / "a.pth")
    check(checkpoint, {"w": torch.ones(1)})
    assert checkpoint.notes == [
        "weights taken from 'model_ema', leaving out model; weights=\"raw\" takes other weights"
    ]


def test_a_shared_prefix_is_taken_off(tmp_path):
    torch.save({"state_dict": {"module.a": torch.ones(1), "module.b": torch.ones(2)}}, tmp_path / "a.pth")
    checkpoint = open_checkpoint(tmp_path / "a.pth")
    check(checkpoint, {"a": torch.ones(1), "b": torch.ones(2)})
    assert checkpoint.notes[-1] == "prefix 'module.' removed from every key"


def test_safetensors(tmp_path):
    full = {name: t.contiguous() for name, t in TENSORS.items()}
    save_file(full, tmp_path / "a.safetensors", {"note": "x"})
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    check(checkpoint, full)
    assert checkpoint.metadata == {"note": "x"}


def test_a_mapped_tensor_can_be_written_without_touching_the_file(tmp_path):
    save_file({"w": torch.ones(1000)}, tmp_path / "a.safetensors")
    tensor = open_checkpoint(tmp_path / "a.safetensors").mapped("w")
    tensor.zero_()
    assert torch.equal(open_checkpoint(tmp_path / "a.safetensors").read("w"), torch.ones(1000))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    arrays = {
        "params/a/kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "params/b": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "params/brain": np.array([0x3FC0, 0xC000], np.uint16).view("V2"),
        "opt/step": np.int64(3),
    }
    save(tmp_path / "a.npz", **arrays)
    checkpoint = open_checkpoint(tmp_path / "a.npz")
    expected = {
        "a/kernel": torch.from_numpy(arrays["params/a/kernel"]),
        "b": torch.from_numpy(np.ascontiguousarray(arrays["params/b"])),
        "brain": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    }
    check(checkpoint, expected)
    assert torch.equal(checkpoint.read("a/kernel", 1), expected["a/kernel"][1])
    assert checkpoint.notes == ["weights taken from 'params', leaving out opt"]


def test_arrays_of_objects_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", w=np.array([{"a": 1}, None]), allow_pickle=True)
    with pytest.raises(CheckpointError, match="Python objects"):
        open_checkpoint(tmp_path / "a.npz")


@pytest.mark.parametrize("variant", ["safetensors", "bin"])
def test_shards(tmp_path, variant):
    parts = [{"a": torch.ones(2)}, {"b": torch.zeros(3, 3), "c": torch.ones(1)}]
    stem = "model" if variant == "safetensors" else "pytorch_model"
    places = {}
    for i, part in enumerate(parts):
        name = f"{stem}-0000{i + 1}-of-00002.{variant}"
        save_file(part, tmp_path / name) if variant == "safetensors" else torch.save(part, tmp_path / name)
        places |= dict.fromkeys(part, name)
    (tmp_path / f"{stem}.{variant}.index.json").write_text(json.dumps({"weight_map": places}))
    check(open_checkpoint(tmp_path), parts[0] | parts[1])
    (tmp_path / places["c"]).unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 2 shards"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "part"),
    [
        ("{", "not an index"),
        ('{"weight_map": []}', "not an index"),
        ('{"weight_map": {"a": "../../secret.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"a": 3}}', "outside its folder"),
        ('{"weight_map": {"other": "s.safetensors"}}', "does not hold"),
    ],
)
def test_bad_indexes(tmp_path, index, part):
    save_file({"a": torch.ones(1)}, tmp_path / "s.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=part):
        open_checkpoint(tmp_path)


def test_folders(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    check(open_checkpoint(tmp_path), {"a": torch.ones(1)})
    save_file({"a": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match="holds 2 checkpoints"):
        open_checkpoint(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    check(open_checkpoint(tmp_path), {"a": torch.zeros(1)})


def test_the_ending_does_not_matter_the_content_does(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "weights.bin")
    check(open_checkpoint(tmp_path / "weights.bin"), {"a": torch.ones(1)})
    torch.save({"a": torch.ones(1)}, tmp_path / "weights.safetensors")
    check(open_checkpoint(tmp_path / "weights.safetensors"), {"a": torch.ones(1)})


def test_a_torchscript_archive_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/constants.pkl", b"\x80\x02).")
    with pytest.raises(CheckpointError, match="TorchScript"):
        open_checkpoint(tmp_path / "a.pt")


def test_settings_beside_the_file(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert open_checkpoint(tmp_path).settings["config"] == {"model_type": "vit"}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        open_checkpoint(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_files_of_other_kinds_say_what_to_do(tmp_path):
    """Programs and pickled NumPy arrays are no damaged downloads: fetching them again would not help."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 2))
    torch.jit.trace(net, torch.ones(1, 3)).save(str(tmp_path / "script.pt"))
    torch.export.save(torch.export.export(net, (torch.ones(1, 3),)), tmp_path / "program.pt2")
    torch.save({"state": {"weight": torch.ones(2).numpy()}}, tmp_path / "arrays.pth")
    for name, what in (
        ("script.pt", "TorchScript"),
        ("program.pt2", "torch.export"),
        ("arrays.pth", "NumPy"),
    ):
        with pytest.raises(CheckpointError, match=what) as reported:
            open_checkpoint(tmp_path / name)
        assert "fetch it again" not in str(reported.value)


def test_a_folder_of_folders_names_those_that_hold_checkpoints(tmp_path):
    for step in (500, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
        torch.save({"w": torch.ones(2)}, tmp_path / f"checkpoint-{step}" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"its folders do \(checkpoint-500, checkpoint-1000\)"):
        open_checkpoint(tmp_path)
