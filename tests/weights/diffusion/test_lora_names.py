"""Names of layers in adapters' files, and what else they hold: every dialect changes the same weights.

By names only: kohya's and ComfyUI's programs and the early diffusers cannot be installed. The order of cloneofsimo's
lists is that of `modules()` in diffusers and transformers.
"""

import re
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import triptych as tp
from triptych.errors import TriptychError
from triptych.weights import inspect, load
from triptych.weights.diffusion.lora import load_lora

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what importing them deprecates is their own affair
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.proves(
        "LoRA and embeddings",
        "layer names of kohya, ComfyUI, LyCORIS, cloneofsimo and early diffusers",
        by="names",
    ),
]


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = {
    f"{BLOCK}.attn1.to_q": (16, 16),
    f"{BLOCK}.attn2.to_k": (16, 24),
    f"{BLOCK}.attn2.to_out.0": (16, 16),
    f"{BLOCK}.ff.net.0.proj": (128, 16),
}
TEXT = {
    "text_model.encoder.layers.0.self_attn.q_proj": (24, 24),
    "text_model.encoder.layers.1.self_attn.out_proj": (24, 24),
}
COMPVIS = "input_blocks.1.1.transformer_blocks.0"


@pytest.fixture(scope="module")
def net(build_tiny):
    config = build_tiny("sd1").config.text_encoder
    return build_tiny("sd1", text_encoder=replace(config, vocab_size=49408, max_length=77, pad_token=49407))


def factors(layers):
    torch.manual_seed(3)
    return {name: (torch.randn(2, i), torch.randn(o, 2)) for name, (o, i) in layers.items()}


def change(net, files):
    """What merging files changes: the new minus the old weights."""
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    applied = load_lora(net, files)
    changed = {n: t - before[n] for n, t in net.state_dict().items() if not torch.equal(t, before[n])}
    applied.undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    return changed


def kohya(layers, prefix):
    out = {}
    for name, (down, up) in factors(layers).items():
        base = prefix + name.replace(".", "_")
        out |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}
    return out


def renamed(layers, base_of, down="lora_down.weight", up="lora_up.weight"):
    out = {}
    for name, pair in factors(layers).items():
        out |= {f"{base_of(name)}{end}": tensor for end, tensor in zip((down, up), pair, strict=True)}
    return out


def old_unet(name):
    """diffusers before 0.17: layers were in the attention's own module, `to_out` without its number."""
    return re.sub(r"(attn\d)\.(to_\w+)(\.0)?$", "\\1.pro" + "cessor.\\2_lora", name)


def old_text(name):
    return re.sub(r"\.q_proj$", ".to_q_lora", re.sub(r"\.out_proj$", ".to_out_lora", name))


ATTENTION = {name: size for name, size in UNET.items() if ".attn" in name}
DIALECTS = {
    "LyCORIS": (kohya(UNET, "lycoris_"), UNET),
    "diffusers": (renamed(UNET, lambda n: f"unet.{n}", ".lora.down.weight", ".lora.up.weight"), UNET),
    "diffusers without unet.": (renamed(UNET, str, ".lora.down.weight", ".lora.up.weight"), UNET),
    "diffusers 0.14": (renamed(ATTENTION, old_unet, ".down.weight", ".up.weight"), ATTENTION),
    "diffusers 0.15": (
        renamed(ATTENTION, lambda n: f"unet.{old_unet(n)}", ".down.weight", ".up.weight"),
        ATTENTION,
    ),
    "PEFT": (renamed(UNET, lambda n: f"base_model.model.{n}", ".lora_A.weight", ".lora_B.weight"), UNET),
    "PEFT, named adapter": (
        renamed(UNET, lambda n: f"base_model.model.{n}", ".lora_A.style-1.weight", ".lora_B.style-1.weight"),
        UNET,
    ),
    "ComfyUI": (
        renamed(
            UNET,
            lambda n: "diffusion_model." + n.replace(BLOCK, COMPVIS),
            ".lora_down.weight",
            ".lora_up.weight",
        ),
        UNET,
    ),
    "CompVis": (
        {
            n.replace(BLOCK.replace(".", "_"), COMPVIS.replace(".", "_")): t
            for n, t in kohya(UNET, "lora_unet_").items()
        },
        UNET,
    ),
    "te1": (kohya(TEXT, "lora_te1_"), TEXT),
    "ComfyUI's text encoder": (
        renamed(
            TEXT, lambda n: f"text_encoders.clip_l.transformer.{n}", ".lora_down.weight", ".lora_up.weight"
        ),
        TEXT,
    ),
    "diffusers' text encoder": (
        renamed(
            TEXT,
            lambda n: f"text_encoder.{n}",
            ".lora_linear_layer.down.weight",
            ".lora_linear_layer.up.weight",
        ),
        TEXT,
    ),
    "diffusers' text encoder, 0.15": (
        renamed(TEXT, lambda n: f"text_encoder.{old_text(n)}", ".down.weight", ".up.weight"),
        TEXT,
    ),
    "PEFT's text encoder": (
        renamed(TEXT, lambda n: f"base_model.model.{n}", ".lora_A.weight", ".lora_B.weight"),
        TEXT,
    ),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_means_the_same_layers(name, net, tmp_path):
    tensors, layers = DIALECTS[name]
    save_file(tensors, tmp_path / "it.safetensors")
    save_file(kohya(layers, "lora_te_" if layers is TEXT else "lora_unet_"), tmp_path / "kohya.safetensors")
    ours, expected = change(net, tmp_path / "it.safetensors"), change(net, tmp_path / "kohya.safetensors")
    assert len(ours) == len(layers)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)
    facts = inspect(tmp_path / "it.safetensors")["adapter"]
    assert facts["methods"] == {"LoRA": len(layers)}
    assert facts["ranks"] == [2]


def traversed(model, classes, leaves):
    """The layers of a network in cloneofsimo's order: of each module of these classes, its leaves."""
    names, seen = [], set()
    for outer, module in model.named_modules():
        if type(module).__name__ in classes:
            for inner, leaf in module.named_modules():
                if type(leaf).__name__ in leaves and id(leaf) not in seen:
                    seen.add(id(leaf))
                    names.append(f"{outer}.{inner}")
    return names


@pytest.mark.parametrize("part", ["unet", "unet with residual blocks", "text_encoder"])
def test_cloneofsimos_lists(part, net, tmp_path):
    tp.export(net, tmp_path / "pipeline", "diffusers")
    if part == "text_encoder":
        model = CLIPTextModel.from_pretrained(tmp_path / "pipeline" / "text_encoder")
        names = [
            name
            for name, leaf in model.named_modules()
            if type(leaf).__name__ == "Linear" and "self_attn" in name
        ]
    else:
        model = UNet2DConditionModel.from_pretrained(tmp_path / "pipeline" / "unet")
        classes = {"Attention", "GEGLU"} | ({"ResnetBlock2D"} if "residual" in part else set())
        leaves = {"Linear"} | ({"Conv2d"} if "residual" in part else set())
        names = traversed(model, classes, leaves)
    weights = dict(model.named_modules())
    torch.manual_seed(1)
    tensors, named = [], {}
    for name in names:
        out, inputs, *kernel = weights[name].weight.shape
        up, down = torch.randn(out, 2, *[1] * len(kernel)), torch.randn(2, inputs, *kernel)
        tensors += [up, down]
        prefix = "lora_te_" if part == "text_encoder" else "lora_unet_"
        base = prefix + ("" if "unet" in part or name.startswith("text_model") else "text_model.")
        base = (base + name).replace(".", "_")
        named |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}
    torch.save(tensors, tmp_path / "list.pt")
    save_file(named, tmp_path / "kohya.safetensors")
    expected = change(net, tmp_path / "kohya.safetensors")
    ours = change(net, tmp_path / "list.pt")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)
    key = part.split()[0]
    numbers = {f"{key}:{k // 2}:{('up', 'down')[k % 2]}": tensor for k, tensor in enumerate(tensors)}
    save_file(numbers, tmp_path / "numbers.safetensors")
    again = change(net, tmp_path / "numbers.safetensors")
    assert all(torch.equal(again[key], expected[key]) for key in expected)
    assert inspect(tmp_path / "list.pt")["adapter"]["layers"]["other"] == len(names)
    torch.save(tensors[:-2], tmp_path / "list.pt")
    with pytest.raises(TriptychError, match="layers without names, which fit none of"):
        load_lora(net, tmp_path / "list.pt")
    with pytest.raises(TriptychError, match="list of tensors without names"):
        load(tmp_path / "list.pt")


def test_the_older_order_of_a_block(net, tmp_path):
    """Before diffusers 0.12 the MLP of a block came before its cross-attention, which shapes show."""
    tp.export(net, tmp_path / "pipeline", "diffusers")
    model = UNet2DConditionModel.from_pretrained(tmp_path / "pipeline" / "unet")
    names = traversed(model, {"Attention", "GEGLU"}, {"Linear"})
    for at in [k for k, name in enumerate(names) if ".ff." in name]:
        names.insert(at - 4, names.pop(at))
    weights, tensors, named = dict(model.named_modules()), [], {}
    for name in names:
        up, down = torch.randn(weights[name].out_features, 2), torch.randn(2, weights[name].in_features)
        tensors += [up, down]
        named |= {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up}
    torch.save(tensors, tmp_path / "list.pt")
    save_file(named, tmp_path / "named.safetensors")
    ours, expected = change(net, tmp_path / "list.pt"), change(net, tmp_path / "named.safetensors")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)


def test_words_that_a_file_brings(net, tmp_path):
    vectors = torch.randn(2, 24)
    tensors = kohya(UNET, "lora_unet_")
    save_file(tensors | {"bundle_emb.<style>.string_to_param.*": vectors}, tmp_path / "it.safetensors")
    before, table = net.text_encoder.encode_prompts(["a <style>"]), net.text_encoder.tokens
    applied = load_lora(net, tmp_path / "it.safetensors")
    assert applied.words == ("<style>",)
    rows = list(net.text_encoder.tokenizer.added["<style>"])
    assert torch.equal(net.text_encoder.tokens.weight[rows], vectors)
    applied.undo()
    assert net.text_encoder.tokens is table
    assert net.text_encoder.tokenizer.added == {}
    assert net.config.text_encoder.num_added_tokens == 0
    assert torch.equal(net.text_encoder.encode_prompts(["a <style>"]), before)
    assert inspect(tmp_path / "it.safetensors")["adapter"]["words"] == ["<style>"]
    save_file(
        tensors | {"bundle_emb.<style>.string_to_param.*": torch.randn(2, 30)}, tmp_path / "it.safetensors"
    )
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(TriptychError, match="vectors of 30 numbers"):
        load_lora(net, tmp_path / "it.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())


def test_text_encoder_and_unet_have_their_own_weights(net, tmp_path):
    save_file(kohya(UNET, "lora_unet_") | kohya(TEXT, "lora_te_"), tmp_path / "it.safetensors")
    together = change(net, tmp_path / "it.safetensors")
    split = change(net, {tmp_path / "it.safetensors": (0.25, 0.5)})
    assert split.keys() == together.keys()
    for name, delta in together.items():
        factor = 0.25 if name.startswith("text_encoder") else 0.5
        torch.testing.assert_close(split[name], factor * delta, atol=1e-5, rtol=1e-4)
    with pytest.raises(TriptychError, match="which must be a number"):
        load_lora(net, {tmp_path / "it.safetensors": (0.25, float("nan"))})


def test_a_dora_between_off_and_on(net, tmp_path):
    """Liu et al. 2024, Equation 5, written out; with a weight the together change is scaled, as the web UI does."""
    name = "lora_unet_" + f"{BLOCK}.attn1.to_q".replace(".", "_")
    tensors = {f"{name}.lora_down.weight": torch.randn(2, 16), f"{name}.lora_up.weight": torch.randn(16, 2)}
    norms = torch.rand(16, 1) + 0.5
    save_file(
        tensors | {f"{name}.dora_scale": norms, f"{name}.alpha": torch.tensor(1.0)},
        tmp_path / "it.safetensors",
    )
    key = "network.down.0.blocks.0.transformer.blocks.0.attn.qkv.weight"
    weight = net.state_dict()[key][:16]
    merged = weight + 0.5 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    merged = norms * merged / merged.square().sum(1, keepdim=True).sqrt()
    for strength in (1.0, 0.3, -1.0):
        ours = change(net, {tmp_path / "it.safetensors": strength})[key][:16]
        torch.testing.assert_close(ours, strength * (merged - weight), atol=1e-5, rtol=1e-5)


LAYER = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{LAYER}.oft_blocks": (2, 4, 4)}, "is no LoRA: it is an OFT"),
        ({f"{LAYER}.hada_w1_a": (64, 4), f"{LAYER}.hada_w1_b": (4, 64)}, "not the other half of that LoHa"),
        ({f"{LAYER}.lokr_w1": (8, 8), f"{LAYER}.lokr_w2": (8, 9)}, "is a LoKr of another family"),
        ({f"{LAYER}.lokr_w1": (300, 300), f"{LAYER}.lokr_w2": (300, 300)}, "is a LoKr of another family"),
        ({f"{LAYER}.diff": (64, 63)}, "is a full of another family"),
        ({f"{LAYER}.diff": (64, 64), f"{LAYER}.diff_b": (63,)}, "the bias here is \\[64\\]"),
        ({f"{LAYER}.diff": (64, 64), f"{LAYER}.dora_scale": (63, 1)}, "is a DoRA of another family"),
        ({f"{LAYER}.weight": (63,), f"{LAYER}.on_input": ()}, "of another family"),
        ({"unet.conv_in.weight": (16, 4, 3, 3)}, "is no LoRA"),
        ({f"{LAYER}.{part}.weight": () for part in ("a1", "a2", "b1", "b2")}, "is a GLoRA of another family"),
        ({f"{LAYER}.lokr_w1": (), f"{LAYER}.lokr_w2": (0, 3)}, "is a LoKr of another family"),
        ({"lora_unet_mid_block_resnets_0_norm1.ia3_l": (64, 1)}, "of another family"),
        (
            {f"lora_te2_x.{half}.weight": (2, 2) for half in ("lora_down", "lora_up")},
            "of Stable Diffusion XL: ",
        ),
        ({f"double_blocks_0.{half}.weight": (2, 2) for half in ("lora_down", "lora_up")}, "of FLUX: "),
        ({f"{LAYER}.lora_E": (2, 1), f"{LAYER}.diff": (64, 64)}, "with an AdaLoRA: nothing reads"),
    ],
)
def test_what_does_not_fit_is_named(tensors, words, net, tmp_path):
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "it.safetensors")
    weights = dict(net.named_parameters())
    with pytest.raises(TriptychError, match=words) as caught:
        load_lora(net, tmp_path / "it.safetensors")
    assert "\n" not in str(caught.value)
    assert all(parameter is weights[name] for name, parameter in net.named_parameters())
