"""What `info` says of files that hold no network of this package, and of halves and float8 weights."""

import pytest
import torch
from safetensors.torch import save_file

from triptych.errors import CheckpointError
from triptych.models.configs.autoencoder import TinyAutoencoderConfig
from triptych.models.registry import build
from triptych.weights import export, inspect, load

FILES = {
    "an embedding of A1111": ({"string_to_param/*": (3, 768)}, "textual inversion of 3 vectors of width 768"),
    "an embedding of diffusers": ({"<cat>": (1, 1024)}, "textual inversion of 1 vectors of width 1024"),
    "an embedding for SDXL": ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "textual inversion of 2 vectors"),
    "the heads of LPIPS": (
        {f"lin{i}.model.1.weight": (1, 64, 1, 1) for i in range(5)},
        "linear heads of LPIPS",
    ),
    "SDXL": (
        {
            "conditioner.embedders.0.transformer.text_model.x": (2,),
            "model.diffusion_model.input_blocks.0.0.weight": (2,),
        },
        "a Stable Diffusion XL; not supported",
    ),
    "SDXL's UNet": (
        {"input_blocks.0.0.weight": (8, 4, 3, 3), "label_emb.0.0.weight": (8, 2816)},
        "a Stable Diffusion XL UNet; not supported",
    ),
    "SDXL's UNet in diffusers": (
        {"add_embedding.linear_1.weight": (8, 8)},
        "a Stable Diffusion XL UNet; not supported",
    ),
    "SD3": ({"joint_blocks.0.x_block.attn.qkv.weight": (8, 8)}, "a Stable Diffusion 3; not supported"),
    "FLUX": ({"double_blocks.0.img_attn.qkv.weight": (8, 8)}, "a FLUX.1; not supported"),
    "a ControlNet": ({"controlnet_cond_embedding.conv_in.weight": (8, 3)}, "a ControlNet; not supported"),
    "a LoRA": (
        {"lora_unet_a_to_q.lora_up.weight": (8, 4), "lora_unet_a_to_q.lora_down.weight": (4, 8)},
        None,
    ),
}


@pytest.mark.parametrize(("shapes", "message"), FILES.values(), ids=list(FILES))
def test_files_that_are_no_network(shapes, message, tmp_path):
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "it.safetensors")
    described = inspect(tmp_path / "it.safetensors")
    assert described["format"] is None
    assert ("adapter" in described) if message is None else (message in described["looks_like"])
    with pytest.raises(CheckpointError):
        load(tmp_path / "it.safetensors")


# By its author's numbers: the form of each layer of the two files.
BLOCK = {
    f"conv.{i}.{leaf}": shape
    for i in (0, 2, 4)
    for leaf, shape in (("weight", (64, 64, 3, 3)), ("bias", (64,)))
}
CONV, STEP = {"weight": (64, 64, 3, 3), "bias": (64,)}, {"weight": (64, 64, 3, 3)}
ENCODER = {0: {"weight": (64, 3, 3, 3), "bias": (64,)}, 14: {"weight": (4, 64, 3, 3), "bias": (4,)}}
ENCODER |= {1: BLOCK} | dict.fromkeys((2, 6, 10), STEP) | dict.fromkeys((3, 4, 5, 7, 8, 9, 11, 12, 13), BLOCK)
DECODER = {1: {"weight": (64, 4, 3, 3), "bias": (64,)}, 19: {"weight": (3, 64, 3, 3), "bias": (3,)}}
DECODER |= dict.fromkeys((7, 12, 17), STEP) | dict.fromkeys((3, 4, 5, 8, 9, 10, 13, 14, 15, 18), BLOCK)


def half(layers):
    return {
        f"{i}.{leaf}": torch.randn(shape) * 0.1
        for i, leaves in layers.items()
        for leaf, shape in leaves.items()
    }


@pytest.fixture
def halves(tmp_path):
    tensors = half(ENCODER), half(DECODER)
    for name, state in zip(("taesd_encoder.pth", "taesd_decoder.pth"), tensors, strict=True):
        torch.save(state, tmp_path / name)
    return tmp_path, tensors


def test_taesd_in_its_authors_two_files(halves):
    folder, (encoder, decoder) = halves
    nets = [load(folder / "taesd_encoder.pth"), load(folder / "taesd_decoder.pth"), load(folder)]
    for net in nets:
        assert net.config == TinyAutoencoderConfig(image_size=net.config.image_size)
        assert torch.equal(net.encoder[14].weight, encoder["14.weight"])
        assert torch.equal(net.decoder[18].weight, decoder["19.weight"])
    described = inspect(folder / "taesd_decoder.pth")
    assert (described["family"], described["fits"]) == ("tiny-autoencoder", None)


def test_half_of_a_taesd_asks_for_the_other(halves):
    folder, _ = halves
    (folder / "taesd_encoder.pth").unlink()
    assert (
        "the decoder of a TAESD; put the file of its encoder"
        in inspect(folder / "taesd_decoder.pth")["looks_like"]
    )
    with pytest.raises(CheckpointError, match="put the file of its encoder next to it"):
        load(folder / "taesd_decoder.pth")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("mixed", [False, True])
def test_float8_weights_are_widened(dtype, mixed, tiny, tmp_path):
    net = tiny()
    export(net, tmp_path / "net.safetensors", "torchvision")
    from safetensors.torch import load_file

    state = {
        key: tensor.to(torch.float16 if mixed and tensor.ndim == 1 else dtype)
        for key, tensor in load_file(tmp_path / "net.safetensors").items()
    }
    save_file(state, tmp_path / "small.safetensors")
    described, small = inspect(tmp_path / "small.safetensors"), load(tmp_path / "small.safetensors")
    assert described["fits"] is None
    assert "float8 weights are loaded as float16" in described["notes"]
    assert next(small.parameters()).dtype == torch.float16
    expected = state["encoder.layers.encoder_layer_0.mlp.0.weight"].float()
    assert torch.equal(small.encoder[0].mlp.fc1.weight.float(), expected)
    with torch.no_grad():
        assert small.float()(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_a_tiny_autoencoder_of_ours_is_built(tmp_path):
    assert build(TinyAutoencoderConfig()).config.num_levels == 4
