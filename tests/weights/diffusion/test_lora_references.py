"""Adapters written by peft, diffusers and LyCORIS themselves: merged, our network computes what theirs does."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import triptych as tp
from triptych.errors import TriptychError
from triptych.weights.diffusion.lora import load_lora

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what importing them deprecates is their own affair
    import lycoris
    import peft
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.proves("LoRA and embeddings", "LoRA, LoHa, LoKr, DoRA and (IA)^3 of PEFT", by="peft"),
    pytest.mark.proves("LoRA and embeddings", "LoRA files of diffusers", by="diffusers"),
    pytest.mark.proves(
        "LoRA and embeddings",
        "LoCon, LoHa, LoKr, DoRA, GLoRA, (IA)^3, full differences and norms of LyCORIS",
        by="lycoris-lora",
    ),
]


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj"]
CONVOLUTIONS = ["conv1", "conv_in", "conv_shortcut", "time_emb_proj"]
TEXT = ["q_proj", "v_proj", "out_proj", "fc1"]


@pytest.fixture(scope="module")
def models(build_tiny, tmp_path_factory):
    """Our small Stable Diffusion in fp64, and diffusers' UNet and transformers' text encoder of the same weights."""
    config = build_tiny("sd1").config
    net = build_tiny(
        "sd1", text_encoder=replace(config.text_encoder, vocab_size=49408, max_length=77, pad_token=49407)
    )
    folder = tmp_path_factory.mktemp("sd1")
    tp.export(net, folder / "pipeline", "diffusers")
    unet = UNet2DConditionModel.from_pretrained(folder / "pipeline" / "unet").double()
    text = CLIPTextModel.from_pretrained(folder / "pipeline" / "text_encoder").double()
    return net.double(), unet, text


def loud(module: nn.Module) -> None:
    """Give what is trained of an adapter random numbers; norms of a DoRA stay positive."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                new = torch.randn(parameter.shape, dtype=parameter.dtype)
                parameter.copy_(parameter * (1 + 0.3 * new.sigmoid()) if "magnitude" in name else 0.3 * new)


@torch.no_grad()
def same_noise(net, unet) -> None:
    torch.manual_seed(1)
    x, context = torch.randn(2, 4, 16, 16).double(), torch.randn(2, 5, 24).double()
    t = torch.tensor([10, 700])
    expected = unet(x, t, encoder_hidden_states=context).sample
    torch.testing.assert_close(net.network(x, t, context), expected, atol=1e-9, rtol=1e-9)


def merged_like(net, file, weight, theirs, same) -> None:
    """Merge a file, compare, and undo it bit for bit."""
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    applied = load_lora(net, {file: weight})
    try:
        assert any(not torch.equal(t, before[n]) for n, t in net.state_dict().items())
        same(net, theirs)
    finally:
        applied.undo()
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


PEFT = {
    "LoRA": peft.LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION + CONVOLUTIONS),
    "rsLoRA": peft.LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION, use_rslora=True),
    "DoRA": peft.LoraConfig(r=3, lora_alpha=6, target_modules=ATTENTION + CONVOLUTIONS, use_dora=True),
    "patterns": peft.LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=ATTENTION,
        alpha_pattern={r"attn\d\.to_q": 7, r"^down_blocks\.0\..*to_k": 5, "to_v": 3, "o_v": 11},
        rank_pattern={r"down_blocks\.\d+\.attentions.*to_(k|v)": 2},
    ),
    "LoHa": peft.LoHaConfig(r=4, alpha=6, target_modules=ATTENTION + CONVOLUTIONS),
    "LoHa, Tucker": peft.LoHaConfig(
        r=3, alpha=5, target_modules=["conv1", "to_q"], use_effective_conv2d=True, alpha_pattern={"to_q": 2}
    ),
    "LoKr": peft.LoKrConfig(r=3, alpha=5, target_modules=ATTENTION + CONVOLUTIONS),
    "LoKr, both": peft.LoKrConfig(
        r=1,
        alpha=3,
        target_modules=[*ATTENTION, "conv1"],
        decompose_both=True,
        use_effective_conv2d=True,
        rank_pattern={"to_k": 2},
    ),
    "bias of B": peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_out.0", "time_emb_proj"], lora_bias=True
    ),
    "biases": peft.LoraConfig(
        r=4, target_modules=["to_out.0", "conv1"], bias="all", modules_to_save=["conv_out"]
    ),
    "(IA)^3": peft.IA3Config(target_modules=["to_k", "ff.net.2"], feedforward_modules=["ff.net.2"]),
}


@pytest.mark.parametrize("name", PEFT)
def test_peft_on_the_unet(name, models, tmp_path):
    net, unet, _ = models
    model = peft.get_peft_model(copy.deepcopy(unet), copy.deepcopy(PEFT[name])).double()
    loud(model)
    model.save_pretrained(tmp_path)
    merged_like(net, tmp_path, 1.0, model.base_model.model.eval(), same_noise)


FORMS = {
    "in a dict": lambda state: {"lora": state, "step": 500},
    "in two": lambda state: {"model": {"adapter": state}, "config": {"r": 4}},
    "with the UNet's name": lambda state: {f"unet.{name}": tensor for name, tensor in state.items()},
    "of another module": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_peft_saved_by_other_scripts(form, models, tmp_path):
    net, unet, _ = models
    model = peft.get_peft_model(
        copy.deepcopy(unet), peft.LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION)
    )
    loud(model.double())
    torch.save(FORMS[form](peft.get_peft_model_state_dict(model)), tmp_path / "lora.pt")
    merged_like(net, tmp_path / "lora.pt", 1.0, model.base_model.model.eval(), same_noise)


@pytest.mark.parametrize(
    "config",
    [
        peft.OFTConfig(r=0, oft_block_size=4, target_modules=["to_q"]),
        peft.HRAConfig(r=4, target_modules=["to_q"]),
        peft.LNTuningConfig(target_modules=["norm1"]),
    ],
)
def test_other_methods_of_peft_are_refused_by_name(config, models, tmp_path):
    net, unet, _ = models
    peft.get_peft_model(copy.deepcopy(unet), copy.deepcopy(config)).save_pretrained(tmp_path)
    with pytest.raises(TriptychError, match=f"no LoRA: it is PEFT's {config.peft_type.value}"):
        load_lora(net, tmp_path)


def test_peft_on_the_text_encoder(models, tmp_path):
    net, _, text = models
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=TEXT, use_dora=True)
    model = peft.get_peft_model(copy.deepcopy(text), config).double()
    loud(model)
    model.save_pretrained(tmp_path)

    @torch.no_grad()
    def same(net, theirs):
        ids = net.text_encoder.tokenize(["a red apple on a table"])
        torch.testing.assert_close(net.text_encoder.encode_tokens(ids), theirs(ids)[0], atol=1e-9, rtol=1e-9)

    merged_like(net, tmp_path, 1.0, model.base_model.model.eval(), same)


def test_weights_scale_a_lora_as_peft_does(models, tmp_path):
    net, unet, _ = models
    model = peft.get_peft_model(copy.deepcopy(unet), copy.deepcopy(PEFT["LoRA"])).double()
    loud(model)
    model.save_pretrained(tmp_path)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scale_layer(0.3)
    merged_like(net, tmp_path, 0.3, model.base_model.model.eval(), same_noise)


def test_a_changed_base_and_bad_patterns_are_refused(models, tmp_path):
    net, unet, _ = models
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="pissa_niter_2")
    peft.get_peft_model(copy.deepcopy(unet).float(), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    plain = json.loads(path.read_text()) | {"init_lora_weights": True}
    with pytest.raises(TriptychError, match="changes the base model as well"):
        load_lora(net, tmp_path)
    for field, pattern, value, words in (
        ("alpha_pattern", r"(\w+)+!", 3, "too many repetitions"),
        ("alpha_pattern", "(to_q", 3, "no regular expression"),
        ("rank_pattern", "to_q", 0, "config of its adapter is damaged"),
    ):
        path.write_text(json.dumps(plain | {field: {pattern: value}}))
        with pytest.raises(TriptychError, match=words):
            load_lora(net, tmp_path)


@pytest.mark.parametrize("prefixed", [True, False])
def test_diffusers_own_files(prefixed, models, tmp_path):
    """`save_lora_weights` of a pipeline, and `save_lora_adapter` of a UNet, which leaves the prefix out."""
    net, unet, _ = models
    theirs = copy.deepcopy(unet)
    theirs.add_adapter(copy.deepcopy(PEFT["LoRA"]))
    theirs.double()
    loud(theirs)
    if prefixed:
        layers = peft.get_peft_model_state_dict(theirs)
        metadata = theirs.peft_config["default"].to_dict()
        metadata["target_modules"] = sorted(metadata["target_modules"])
        StableDiffusionPipeline.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=metadata)
    else:
        theirs.save_lora_adapter(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    merged_like(net, file, 1.0, theirs.eval(), same_noise)


# Options, and the end of a name that its file must have.
LYCORIS = {
    "LoCon": ({"algo": "locon"}, "conv1.lora_down.weight"),
    "LoCon, Tucker": ({"algo": "locon", "use_tucker": True}, "lora_mid.weight"),
    "LoCon, rs_lora": ({"algo": "locon", "rs_lora": True}, "alpha"),
    "LoHa": ({"algo": "loha"}, "hada_w1_a"),
    "LoHa, Tucker": ({"algo": "loha", "use_tucker": True}, "hada_t1"),
    "LoKr": ({"algo": "lokr", "factor": 4}, "lokr_w2_a"),
    "LoKr, both": (
        {"algo": "lokr", "linear_dim": 1, "conv_dim": 1, "decompose_both": True, "use_tucker": True},
        "lokr_t2",
    ),
    "LoKr, full": ({"algo": "lokr", "full_matrix": True}, "lokr_w2"),
    "LoKr, other order": ({"algo": "lokr", "factor": 2, "unbalanced_factorization": True}, "lokr_w1"),
    "DoRA": ({"algo": "locon", "dora_wd": True}, "dora_scale"),
    "DoRA of inputs": ({"algo": "locon", "dora_wd": True, "wd_on_output": False}, "dora_scale"),
    "DoRA of LoHa": ({"algo": "loha", "dora_wd": True}, "dora_scale"),
    "DoRA of LoKr": ({"algo": "lokr", "dora_wd": True}, "dora_scale"),
    "GLoRA": ({"algo": "glora"}, "a1.weight"),
    "full": ({"algo": "full"}, "diff_b"),
    "(IA)^3": ({"algo": "ia3"}, "on_input"),
    "norms": ({"algo": "locon", "train_norm": True}, "w_norm"),
}


@pytest.mark.parametrize("name", LYCORIS)
def test_lycoris_on_the_unet(name, models, tmp_path):
    net, unet, _ = models
    theirs = copy.deepcopy(unet).requires_grad_(False)
    options, ending = LYCORIS[name]
    lycoris.LycorisNetwork.apply_preset({"lora_prefix": "lora_unet"})
    sizes = {"linear_dim": 4, "linear_alpha": 2, "conv_dim": 4, "conv_alpha": 2}
    adapter = lycoris.create_lycoris(theirs, 1.0, **(sizes | options)).double()
    adapter.apply_to()
    adapter.double()
    with torch.no_grad():
        for key, parameter in adapter.named_parameters():
            new = 0.2 * torch.randn(parameter.shape, dtype=parameter.dtype)
            parameter.copy_(parameter * (1 + new.sigmoid()) if "dora" in key else parameter + new)
    adapter.save_weights(str(tmp_path / "it.safetensors"), torch.float64, {})
    assert any(key.endswith(ending) for key in load_file(tmp_path / "it.safetensors"))
    merged_like(net, tmp_path / "it.safetensors", 1.0, theirs.eval(), same_noise)
