"""Damaged and hostile files for the readers of latent diffusion: one line that names the file, and nothing runs."""

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import triptych as tp
from triptych.errors import CheckpointError
from triptych.models.configs.latent_diffusion import SIZES
from triptych.weights import inspect, load
from triptych.weights.diffusion.lora import load_lora
from triptych.weights.diffusion.textual_inversion import read_embeddings


class Command:
    def __init__(self, words):
        self.words = words

    def __reduce__(self):
        return os.system, (self.words,)


def one_line(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def said_of(call: Callable[..., object], *arguments: object) -> str:
    """What a CheckpointError says; nothing where none is raised. Another error is a failure."""
    try:
        call(*arguments)
    except CheckpointError as problem:
        return str(problem)
    return ""


@pytest.fixture(scope="module")
def remaining(tmp_path_factory, build_tiny):
    """A folder of diffusers and a single file, to be copied and harmed."""
    folder = tmp_path_factory.mktemp("kept")
    tp.export(build_tiny("ldm-celeba"), folder / "pipeline", "diffusers")
    tp.export(build_tiny("sd1"), folder / "sd1.safetensors", "compvis")
    return folder


@pytest.fixture
def pipeline(remaining, tmp_path):
    return Path(shutil.copytree(remaining / "pipeline", tmp_path / "pipeline"))


def test_a_pickle_with_code_does_not_run(remaining, tmp_path):
    """As a checkpoint beside its weights, as a LoRA, and as a word."""
    marker, path = tmp_path / "harmed", tmp_path / "it.ckpt"
    weights = load_file(remaining / "sd1.safetensors")
    command = Command(f"touch {marker}")
    torch.save({"state_dict": weights, "callbacks": command}, path)
    shutil.copy(remaining / "sd1.safetensors.json", tmp_path / "it.ckpt.json")
    net = load(path)  # what it would call is passed over
    torch.save({"state_dict": weights | {"model.diffusion_model.x": command}}, path)
    load(path)
    for value in (command, {"lora_unet_x.lora_down.weight": command}):
        torch.save(value, path)
        assert "it.ckpt" in one_line(load, path)
        assert "it.ckpt" in one_line(load_lora, net, path)
        assert "it.ckpt" in one_line(read_embeddings, path)
    path.write_bytes(pickle.dumps(command))
    for call in (load, inspect, read_embeddings):
        assert "it.ckpt" in one_line(call, path)
    assert not marker.exists()


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.9999])
def test_truncated(remaining, pipeline, tmp_path, share):
    for source, name in (
        (remaining / "sd1.safetensors", "sd1.safetensors"),
        (remaining / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors", "unet"),
    ):
        content = source.read_bytes()
        path = tmp_path / "sd1.safetensors" if name != "unet" else pipeline / "unet" / source.name
        path.write_bytes(content[: int(len(content) * share)])
        assert path.name in one_line(load, tmp_path / "sd1.safetensors" if name != "unet" else pipeline)


def test_a_header_of_exabytes(remaining, pipeline, tmp_path):
    content = (remaining / "sd1.safetensors").read_bytes()
    for length in (2**63, 2**40, len(content), 0):
        (tmp_path / "sd1.safetensors").write_bytes(length.to_bytes(8, "little") + content[8:])
        assert "sd1.safetensors" in one_line(load, tmp_path / "sd1.safetensors")


def test_a_zip_that_unpacks_to_gigabytes(tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b" " * 2**28 + b".")
        archive.writestr("archive/version", "3\n")
    path = tmp_path / "bomb.ckpt"
    path.write_bytes(out.getvalue())
    assert path.stat().st_size < 2**20
    for call in (load, read_embeddings):
        assert "bomb.ckpt" in one_line(call, path)


def test_missing_shards(pipeline):
    full = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(full)
    full.unlink()
    places = dict.fromkeys(tensors, "a.safetensors") | dict.fromkeys(list(tensors)[::2], "b.safetensors")
    index = pipeline / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    save_file(
        {n: t for n, t in tensors.items() if places[n] == "a.safetensors"},
        pipeline / "unet" / "a.safetensors",
    )
    assert "lacks 1 of 2 shards" in one_line(load, pipeline)
    index.write_text(json.dumps({"weight_map": places | {"x": "../../secret.safetensors"}}))
    assert "outside its folder" in one_line(load, pipeline)


WRONG = [None, True, -1, 0, 1e400, 2**70, "x" * 3000, [], {}, [[[]]], {"a": 1}, [None], ["x"] * 3]
FIELDS = {
    "unet/config": (
        "attention_head_dim",
        "sample_size",
        "norm_num_groups",
        "_class_name",
        "block_out_channels",
    ),
    "vqvae/config": ("scaling_factor", "norm_num_groups", "sample_size"),
    "scheduler/scheduler_config": (
        "beta_start",
        "beta_end",
        "num_train_timesteps",
        "beta_schedule",
        "prediction_type",
    ),
}


@pytest.mark.parametrize("file", FIELDS)
def test_values_of_wrong_types(pipeline, file):
    """Each field with each wrong value: read as ever or one line, never another error, and at once."""
    path = pipeline / f"{file}.json"
    message = json.loads(path.read_text())
    for name in FIELDS[file]:
        for value in WRONG:
            path.write_text(json.dumps(message | {name: value}))
            assert "\n" not in said_of(inspect, pipeline)
    for text in ("", "[", "[]", "null", '"x"', "[" * 10**5, "\0", "{" + '"a":{' * 5000):
        path.write_text(text)
        assert "\n" not in said_of(inspect, pipeline)


def test_a_model_index_of_wrong_types(pipeline):
    for value in ("[]", "null", "3", '{"unet": 3}', '{"unet": {"x": []}}'):
        (pipeline / "model_index.json").write_text(value)
        assert "\n" not in said_of(inspect, pipeline)
    shutil.rmtree(pipeline / "unet")
    assert "pipeline" in one_line(load, pipeline)


def test_a_damaged_tokenizer(build_tiny, tmp_path):
    text = replace(
        SIZES["sd1"].text_encoder,
        embed_dim=24,
        depth=1,
        num_heads=2,
        mlp_ratio=1.0,
        vocab_size=49408,
        max_length=77,
        pad_token=49407,
    )
    net = build_tiny("sd1", text_encoder=text)
    tp.export(net, tmp_path / "it", "diffusers")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        path = tmp_path / "it" / "tokenizer" / name
        content = path.read_bytes()
        for harmed in (b"", b"[", b"\xff\xfe\x00", b"[1, 2]", content[: len(content) // 2]):
            path.write_bytes(harmed)
            assert "\n" not in said_of(load, tmp_path / "it")
        path.write_bytes(content)
    load(tmp_path / "it")


def test_damaged_loras_and_words(remaining, tmp_path):
    net = load(remaining / "sd1.safetensors")
    path = tmp_path / "it.safetensors"
    at = "lora_unet_mid_block_attentions_0_proj_in"
    good = {f"{at}.lora_down.weight": torch.ones(2, 64), f"{at}.lora_up.weight": torch.ones(64, 2)}
    save_file(good, path, {"lora_adapter_metadata": "[" * 10**4})
    assert "it.safetensors" in one_line(load_lora, net, path)
    for value in ("[]", '{"unet.lora_alpha": {}}', '{"unet.alpha_pattern": 3}', "3"):
        save_file(good, path, {"lora_adapter_metadata": value})
        assert "it.safetensors" in one_line(load_lora, net, path)
    for harmed in (
        {f"{at}.alpha": torch.ones(3)},
        {f"{at}.lora_down.weight": torch.ones(2, 2, 64)},
        {f"{at}.lora_up.weight": torch.tensor(1.0)},
        {f"{at}.lora_mid.weight": torch.ones(1)},
        {f"{at}.lora_down.weight": torch.ones(0, 64), f"{at}.lora_up.weight": torch.ones(64, 0)},
    ):
        save_file(good | harmed, path)
        assert "it.safetensors" in one_line(load_lora, net, path)
    for harmed in (
        {"a": torch.ones(2, 2, 2)},
        {"": torch.ones(1, 24)},
        {"(a)": torch.ones(1, 24)},
        {"a": torch.ones(0, 24)},
    ):
        save_file(harmed, path)
        assert "it.safetensors" in one_line(tp.load_embedding, net, path)
    path.write_bytes(b"")
    assert "it.safetensors is empty" in one_line(load_lora, net, path)
