"""What lies in and beside CompVis files: averaged weights, and the YAML that says what shapes do not."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import triptych as tp
from triptych.diffusion.config import ProcessConfig
from triptych.errors import CheckpointError
from triptych.models.configs.latent_diffusion import SIZES
from triptych.models.registry import build
from triptych.weights import inspect, load
from triptych.weights.diffusion.compvis import averaged_name

pytestmark = pytest.mark.proves("Checkpoints", "YAML next to a file of CompVis or Stability AI", by="names")

YAML = """
model:
  base_learning_rate: 1.0e-04
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "v"
    linear_start: 1e-3
    linear_end: 0.015
    timesteps: 500
    image_size: 24
    scale_factor: 0.25
    use_ema: False
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params: {num_head_channels: 4, image_size: 32}
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder
      params: {freeze: true, layer: "penultimate"}
"""


@pytest.fixture
def bare(tiny_ldm, tmp_path):
    """A small Stable Diffusion 2 in a file that has weights alone, its averaged ones too, and nothing beside it."""
    net = tiny_ldm("sd2")
    path = tmp_path / "sd2.ckpt.safetensors"
    tp.export(net, path, "compvis-ema")
    path.with_name(path.name + ".json").unlink()
    tensors = load_file(path)
    ema = {n: t + 1 if t.is_floating_point() else t for n, t in tensors.items() if n.startswith("model_ema.")}
    save_file({n: t for n, t in (tensors | ema).items() if "." in n}, path)
    return net, path


def test_the_yaml_says_what_shapes_do_not(bare, same_state, tmp_path):
    net, path = bare
    with pytest.raises(CheckpointError, match='prediction="v"'):
        load(path)
    path.with_suffix(".yaml").write_text(YAML)
    back = load(path)
    same_state(net.network, back.network)
    config = back.config
    assert config.process == ProcessConfig(
        beta_start=0.001, beta_end=0.015, num_timesteps=500, prediction="v"
    )
    assert config.autoencoder.scale == 0.25
    assert (config.network.num_heads, config.network.head_dim, config.network.latent_size) == (0, 4, (24, 24))
    assert config.text_encoder.skip_last_blocks == 1
    assert inspect(path)["facts"]["prediction"] == "sd2.ckpt.yaml"
    assert load(path, prediction="eps").config.process.prediction == "eps"
    other = YAML.replace("timesteps", "beta_schedule: cosine\n    timesteps").replace('"v"', "eps")
    path.with_suffix(".yaml").write_text(other.replace("num_head_channels: 4", "num_heads: 2"))
    config = load(path).config
    assert (config.process.schedule, config.process.prediction) == ("cosine", "eps")
    assert (config.network.num_heads, config.network.head_dim) == (2, 0)


def test_which_yaml_is_a_files(bare, tmp_path):
    """Its own; else config.yaml or the only one, where there is no other checkpoint that it may belong to."""
    _, path = bare
    (tmp_path / "v2-inference-v.yaml").write_text(YAML)
    assert load(path).config.process.prediction == "v"
    assert load(tmp_path).config.process.prediction == "v"
    (tmp_path / "config.yaml").write_text(YAML.replace('"v"', "eps"))
    assert load(path).config.process.prediction == "eps"
    path.with_name("other.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match='prediction="v"'):
        load(path)
    path.with_suffix(".yaml").write_text(YAML)
    assert load(path).config.process.prediction == "v"


def test_numbers_in_the_file_hold_above_the_yaml(tiny_ldm, tmp_path):
    net = tiny_ldm("sd1")
    tp.export(net, tmp_path / "sd1.safetensors", "compvis")
    message = YAML.replace("num_head_channels: 4, ", "").replace('"v"', "eps").replace("1e-3", "0.003")
    (tmp_path / "sd1.yaml").write_text(message)
    process = load(tmp_path / "sd1.safetensors").config.process
    assert process == SIZES["sd1"].process


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "is no YAML of plain values"),
        ("model: !!python/object/apply:os.system ['touch harmed']", "is no YAML of plain values"),
        ("model: {params: {parameterization: w}}", "parameterization 'w'; known are eps, v, x0"),
        ("model: {params: {parameterization: eps, linear_start: [1]}}", "linear_start.*must be a number"),
        ("model: {params: {parameterization: eps, linear_start: 2}}", "must lie between 0 and 1"),
        ("model: {params: {parameterization: eps, timesteps: .nan}}", "timesteps"),
        (
            "model: {params: {parameterization: eps, beta_schedule: odd}}",
            "beta_schedule 'odd'; known are linear",
        ),
        ("model: {params: {parameterization: eps, unet_config: 3}}", "must hold values"),
        ("model: {params: {parameterization: eps, scale_factor: '${x}'}}", "scale_factor"),
        ("[" * 5000, "is no YAML"),
        ("a: " + "x" * 2**21, "too many for a config"),
    ],
)
def test_a_bad_yaml_is_one_line(bare, text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, path = bare
    path.with_suffix(".yaml").write_text(text)
    with pytest.raises(CheckpointError, match=words) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert "sd2.ckpt.yaml" in str(caught.value)
    assert not (tmp_path / "harmed").exists()


def test_a_yaml_bomb_does_not_unfold(bare):
    _, path = bare
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    path.with_suffix(".yaml").write_text(
        "\n".join([*lines, "model: {params: {parameterization: v, x: *a39}}"])
    )
    assert load(path).config.process.prediction == "v"


def test_raw_and_averaged(bare, same_state, tmp_path):
    net, path = bare
    raw, ema = (load(path, prediction="v", weights=which) for which in ("raw", "ema"))
    same_state(net.network, raw.network)
    same_state(net.text_encoder, ema.text_encoder)
    for (_, a), (_, b) in zip(net.network.named_parameters(), ema.network.named_parameters(), strict=True):
        assert torch.equal(a + 1, b)
    same_state(load(path, prediction="v").network, raw.network)
    # A YAML that does not say `use_ema: false` means the averages, as in CompVis' scripts.
    for message, expected in (("", raw), ("use_ema: true", ema), ("x: 1", ema), ("use_ema: false", raw)):
        path.with_suffix(".yaml").write_text(
            f"model: {{params: {{parameterization: v, {message}}}}}" if message else ""
        )
        same_state(load(path, prediction="v").network, expected.network)
    assert load(path, weights="raw") is not None
    tensors = load_file(path)
    unet = {n: t for n, t in tensors.items() if n.startswith(("model.", "model_ema."))}
    save_file(unet, tmp_path / "unet.safetensors")
    same_state(load(tmp_path / "unet.safetensors", weights="ema"), ema.network)


def test_averaged_weights_are_strict(bare, tmp_path):
    _, path = bare
    tensors = load_file(path)
    name = averaged_name("model.diffusion_model.input_blocks.0.0.weight")
    assert name == "model_ema.diffusion_modelinput_blocks00weight"
    lacking = {n: t for n, t in tensors.items() if n != name}
    save_file(lacking, tmp_path / "a.safetensors")
    save_file(tensors | {"model_ema.stranger": torch.ones(1)}, tmp_path / "b.safetensors")
    for file, words in (("a", f"1 missing .*{name}"), ("b", "no rule knows .*stranger")):
        load(tmp_path / f"{file}.safetensors", prediction="v", weights="raw")
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path / f"{file}.safetensors", prediction="v", weights="ema")
    plain = {n: t for n, t in tensors.items() if not n.startswith("model_ema.")}
    save_file(plain, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="no averaged weights"):
        load(tmp_path / "c.safetensors", prediction="v", weights="ema")
    tp.save(load(path, prediction="v"), tmp_path / "ours.safetensors")
    with pytest.raises(CheckpointError, match="no averaged weights"):
        load(tmp_path / "ours.safetensors", weights="ema")


@pytest.mark.parametrize("name", ["sd1", "ldm-churches", "ldm-cin256-v2"])
def test_averaged_keys_are_distinguished(name):
    """No two weights of a published UNet lose themselves in one name without dots."""
    from triptych.weights.diffusion import unet

    with torch.device("meta"):
        net = build(SIZES[name].network)
    layout = unet.CompVis(len(net.config.channel_multipliers), net.config.num_res_blocks)
    names = [theirs for one in unet.table(net.config, layout) for theirs in one.theirs]
    assert len(set(map(averaged_name, names))) == len(names) > 100


def test_exported_with_averages(tiny_ldm, same_state, tmp_path):
    net = tiny_ldm("ldm-celeba")
    tp.export(net, tmp_path / "it.ckpt", "compvis-ema")
    held = torch.load(tmp_path / "it.ckpt")["state_dict"]
    raw = [n for n in held if n.startswith("model.diffusion_model.")]
    assert all(torch.equal(held[n], held[averaged_name(n)]) for n in raw)
    assert len([n for n in held if n.startswith("model_ema.")]) == len(raw) + 2
    for which in ("raw", "ema"):
        same_state(net, load(tmp_path / "it.ckpt", weights=which))
    assert replace(load(tmp_path / "it.ckpt").config) == net.config
