"""LoRA and textual inversion: three dialects, merged and taken out again; strangers are named."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import triptych as tp
from triptych.errors import CheckpointError
from triptych.models.configs.latent_diffusion import SIZES
from triptych.models.registry import build
from triptych.weights.diffusion.lora import find_lora, load_lora, lora_hash, save_kohya
from triptych.weights.diffusion.textual_inversion import load_embedding, read_embeddings, save_embedding

pytestmark = [
    pytest.mark.proves("LoRA and embeddings", "LoRA of kohya's scripts", by="names", writes=True),
    pytest.mark.proves(
        "LoRA and embeddings", "textual inversion of A1111 and diffusers", by="names", writes=True
    ),
]

LAYERS = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k": (16, 16),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v": (16, 24),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": (64, 64),
    "unet.up_blocks.1.attentions.0.proj_in": (64, 64),
    "text_encoder.text_model.encoder.layers.1.self_attn.v_proj": (24, 24),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": (24, 24),
}
CONV = "unet.down_blocks.1.resnets.0.conv1"


@pytest.fixture
def net(tiny_ldm):
    return tiny_ldm("sd1")


def halves():
    return {name: (torch.randn(4, i), torch.randn(o, 4), 2.0) for name, (o, i) in LAYERS.items()}


def test_kohya_diffusers_and_peft_say_the_same(net, tmp_path):
    output = halves()
    save_kohya(net, tmp_path / "kohya.safetensors", output)
    scaled = {
        name: (down, up * 0.5) for name, (down, up, _) in output.items()
    }  # without alpha, 2 / 4 in the numbers
    diffusers, peft = {}, {}
    for name, (down, up) in scaled.items():
        diffusers |= {f"{name}.lora.down.weight": down, f"{name}.lora.up.weight": up}
        peft |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(diffusers, tmp_path / "diffusers.safetensors")
    save_file(peft, tmp_path / "peft.safetensors")
    before = {name: t.clone() for name, t in net.state_dict().items()}
    answers = []
    for file in ("kohya", "diffusers", "peft"):
        applied = load_lora(net, {tmp_path / f"{file}.safetensors": 0.7})
        answers.append({name: t.clone() for name, t in net.state_dict().items()})
        applied.undo()
        assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    for answer in answers[1:]:
        for name, t in answer.items():
            torch.testing.assert_close(t, answers[0][name], atol=1e-6, rtol=1e-6)
    key = "network.down.0.blocks.0.transformer.blocks.0.attn.qkv.weight"
    down, up, _ = output["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"]
    expected = before[key].clone()
    expected[16:32] += 0.7 * 0.5 * up @ down
    torch.testing.assert_close(answers[0][key], expected)
    changed = [name for name, t in answers[0].items() if not torch.equal(t, before[name])]
    assert len(changed) == len(LAYERS)


def test_several_are_summed_and_convolutions_count(net, tmp_path):
    output = halves()
    save_kohya(net, tmp_path / "a.safetensors", output)
    flat = "lora_" + CONV.replace(".", "_")
    down, up = torch.randn(4, 16, 3, 3), torch.randn(32, 4, 1, 1)
    save_file({f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}, tmp_path / "b.safetensors")
    key = "network.down.1.blocks.0.res.conv1.weight"
    before = net.state_dict()[key].clone()
    applied = load_lora(net, {tmp_path / "a.safetensors": 1.0, tmp_path / "b.safetensors": -0.5})
    delta = torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    torch.testing.assert_close(net.state_dict()[key], before - 0.5 * delta)
    assert len(applied.originals) == len(LAYERS) + 1
    applied.undo()
    assert torch.equal(net.state_dict()[key], before)


def test_strangers_and_other_families_are_named(net, tmp_path):
    path, flat = tmp_path / "x.safetensors", "lora_unet_mid_block_attentions_0_proj_in"
    before = {name: t.clone() for name, t in net.state_dict().items()}
    pair = {f"{flat}.lora_down.weight": torch.randn(4, 64), f"{flat}.lora_up.weight": torch.randn(64, 4)}
    wide = {f"{flat}.lora_down.weight": torch.randn(4, 65), f"{flat}.lora_up.weight": torch.randn(64, 4)}
    odd = {n.replace("mid_block", "joint_block"): t.clone() for n, t in pair.items()}
    for tensors, words in (
        (pair | odd, "no layer lora_unet_joint_block"),
        (pair | {"lora_unet_what.dora_scale": torch.ones(1)}, r"nothing reads lora_unet_what\.dora_scale"),
        (wide, "another family: lora_unet_mid_block_attentions_0_proj_in"),
        ({f"{flat}.lora_down.weight": torch.randn(4, 64)}, "not the other half"),
        (pair | {f"{flat}.alpha": torch.tensor(torch.nan)}, "alpha that is no number"),
        (pair | {f"{flat}.lora_down.weight": torch.zeros(0, 64)}, "another family"),
        ({"weight": torch.ones(2)}, "is no LoRA"),
    ):
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=words) as caught:
            load_lora(net, path)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_merging_later_and_undoing_earlier_is_refused(net, tmp_path):
    save_kohya(net, tmp_path / "a.safetensors", halves())
    before = dict(net.named_parameters())
    first = load_lora(net, tmp_path / "a.safetensors")
    second = load_lora(net, {tmp_path / "a.safetensors": -1.0})
    with pytest.raises(CheckpointError, match="undo that one first"):
        first.undo()
    second.undo()
    first.undo()
    first.undo()
    assert all(p is before[name] for name, p in net.named_parameters())
    with pytest.raises(CheckpointError, match="weight nan"):
        load_lora(net, {tmp_path / "a.safetensors": float("nan")})
    with pytest.raises(CheckpointError, match="not a UNet"):
        load_lora(net.network, tmp_path / "a.safetensors")


def test_a_dit_has_no_loras(tmp_path):
    from triptych.models.configs.dit import SIZES as DITS

    config = SIZES["ldm-celeba"]
    unet = replace(next(iter(DITS.values())), in_channels=3, out_channels=3)
    with torch.device("meta"):
        net = build(replace(config, network=unet, text_encoder=None))
    save_file(
        {"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(2, 1)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(CheckpointError, match="this model has a DiT"):
        load_lora(net, tmp_path / "a.safetensors")
    for form, path in (("compvis", tmp_path / "it.ckpt"), ("diffusers", tmp_path / "it")):
        with pytest.raises(CheckpointError, match="DiT"):
            tp.export(net, path, form)


@pytest.mark.parametrize("form", ["compvis", "diffusers"])
def test_image_tokens_cannot_be_exported(form, tmp_path):
    from triptych.models.configs.image_tokens import ImageTokensConfig
    from triptych.models.configs.vit import SIZES as VITS

    seen = ImageTokensConfig(backbone=replace(VITS["vit-ti16"], num_classes=0), embed_dim=768)
    with torch.device("meta"):
        net = build(replace(SIZES["sd1"], text_encoder=seen))
    with pytest.raises(CheckpointError, match="image encoder"):
        tp.export(net, tmp_path / "it", form)
    assert not list(tmp_path.iterdir())


def test_the_order_of_files_does_not_matter(net, tmp_path):
    for name in "abc":
        save_kohya(net, tmp_path / f"{name}.safetensors", halves())
    answers = []
    for order in ("abc", "cab"):
        applied = load_lora(net, {tmp_path / f"{name}.safetensors": 0.3 + ord(name) / 100 for name in order})
        answers.append({name: t.clone() for name, t in net.state_dict().items()})
        applied.undo()
    assert all(torch.equal(t, answers[1][name]) for name, t in answers[0].items())


def test_pefts_own_files_are_scaled_as_their_config_says(net, tmp_path):
    """An adapter's folder (base_model.model. and adapter_config.json), and diffusers' header."""
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    key, down, up = (
        "network.middle.transformer.blocks.0.attn.qkv.weight",
        torch.randn(4, 64),
        torch.randn(64, 4),
    )
    before = net.state_dict()[key].clone()

    def moved(file) -> torch.Tensor:
        applied = load_lora(net, file)
        result = net.state_dict()[key][:64] - before[:64]
        applied.undo()
        return result

    folder = tmp_path / "adapter"
    folder.mkdir()
    base = f"base_model.model.{name}"
    save_file(
        {f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": up}, folder / "adapter_model.safetensors"
    )
    torch.testing.assert_close(moved(folder), up @ down, atol=1e-5, rtol=1e-5)
    for config, scale in (
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 1}}, 0.25),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config))
        torch.testing.assert_close(moved(folder), scale * up @ down, atol=1e-5, rtol=1e-5)
    (folder / "adapter_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="config of its adapter is damaged"):
        load_lora(net, folder)
    base, header = f"unet.{name}", json.dumps({"unet.r": 4, "unet.lora_alpha": 2})
    tensors = {f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": up}
    save_file(tensors, tmp_path / "it.safetensors", {"lora_adapter_metadata": header})
    torch.testing.assert_close(moved(tmp_path / "it.safetensors"), 0.5 * up @ down, atol=1e-5, rtol=1e-5)


def test_found_by_name(tmp_path):
    for name in ("Watercolor", "detail"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"x")
    assert find_lora("Watercolor", tmp_path).name == "Watercolor.safetensors"
    assert find_lora("watercolor", tmp_path).name == "Watercolor.safetensors"
    with pytest.raises(CheckpointError, match="near names: Watercolor;"):
        find_lora("watercolors", tmp_path)
    with pytest.raises(CheckpointError, match="it holds Watercolor, detail;"):
        find_lora("zzz", tmp_path)
    with pytest.raises(CheckpointError, match="no folder"):
        find_lora("zzz", tmp_path / "none")


def test_a_files_hash_is_that_of_its_numbers(tmp_path):
    """As the web UI has it: other metadata, the same hash."""
    tensors = {"a": torch.arange(6.0)}
    for name, metadata in (("a", None), ("b", {"name": "x"})):
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata)
    expected = hashlib.sha256(torch.arange(6.0).numpy().tobytes()).hexdigest()[:12]
    assert lora_hash(tmp_path / "a.safetensors") == lora_hash(tmp_path / "b.safetensors") == expected


def test_words_of_all_kinds_of_files(tiny_ldm, tmp_path):
    vectors = torch.randn(2, 24)
    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "x"}, tmp_path / "cat.pt"
    )
    torch.save({"<dog>": vectors[0]}, tmp_path / "learned.bin")
    save_file({"emb_params": vectors}, tmp_path / "hat.safetensors")
    assert [list(read_embeddings(tmp_path / n)) for n in ("cat.pt", "learned.bin", "hat.safetensors")] == [
        ["cat"],
        ["<dog>"],
        ["hat"],
    ]
    net = tiny_ldm(
        "sd1",
        text_encoder=replace(SIZES["sd1"].text_encoder, embed_dim=24, depth=1, num_heads=2, mlp_ratio=1.0),
    )
    for name, word, count in (("cat.pt", "<my-cat>", 2), ("learned.bin", None, 1)):
        added = load_embedding(net, tmp_path / name, word)
        rows = list(net.text_encoder.tokenizer.added[added])
        assert torch.equal(net.text_encoder.tokens.weight[rows], vectors[:count])
    save_embedding(net, "<my-cat>", tmp_path / "again.safetensors")
    assert torch.equal(read_embeddings(tmp_path / "again.safetensors")["<my-cat>"], vectors)
    save_file({"emb_params": torch.randn(1, 30)}, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match="vectors of 30 numbers"):
        load_embedding(net, tmp_path / "wide.safetensors")
    save_file({"a": torch.ones(1, 2), "b": torch.ones(1, 2)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match="vectors of 2 numbers"):
        load_embedding(net, tmp_path / "two.safetensors")
    torch.save({"<owl>": vectors, "<hen>": vectors[:1]}, tmp_path / "birds.bin")
    assert load_embedding(net, tmp_path / "birds.bin") == "<owl> <hen>"
    for word, count in (("<owl>", 2), ("<hen>", 1)):
        rows = list(net.text_encoder.tokenizer.added[word])
        assert torch.equal(net.text_encoder.tokens.weight[rows], vectors[:count])
    torch.save({"<fox>": vectors, "<owl>": vectors}, tmp_path / "more.bin")
    with pytest.raises(CheckpointError, match="<owl>"):  # exists; then the other is not added either
        load_embedding(net, tmp_path / "more.bin")
    assert "<fox>" not in net.text_encoder.tokenizer.added
    with pytest.raises(CheckpointError, match="has the words <fox>, <owl>, not <cat>"):
        load_embedding(net, tmp_path / "more.bin", "<cat>")
    assert load_embedding(net, tmp_path / "more.bin", "<fox>") == "<fox>"
    save_file({"clip_l": torch.ones(1, 24), "clip_g": torch.ones(1, 30)}, tmp_path / "xl.safetensors")
    with pytest.raises(CheckpointError, match="Stable Diffusion XL"):
        load_embedding(net, tmp_path / "xl.safetensors")
