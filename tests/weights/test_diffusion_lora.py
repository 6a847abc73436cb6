"""LoRA and textual inversion: three dialects, merged and taken out again; strangers are named."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from triptych.errors import UserError
from triptych.models.latent_diffusion_config import SIZES
from triptych.weights.diffusion.embeddings import load_embedding, read_embedding, save_embedding
from triptych.weights.diffusion.lora import apply, save_kohya

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
    made = halves()
    save_kohya(net, tmp_path / "kohya.safetensors", made)
    scaled = {
        name: (down, up * 0.5) for name, (down, up, _) in made.items()
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
        applied = apply(net, {tmp_path / f"{file}.safetensors": 0.7})
        answers.append({name: t.clone() for name, t in net.state_dict().items()})
        applied.undo()
        assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    for answer in answers[1:]:
        for name, t in answer.items():
            torch.testing.assert_close(t, answers[0][name], atol=1e-6, rtol=1e-6)
    key = "unet.down.0.blocks.0.transformer.blocks.0.attn.qkv.weight"
    down, up, _ = made["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"]
    expected = before[key].clone()
    expected[16:32] += 0.7 * 0.5 * up @ down
    torch.testing.assert_close(answers[0][key], expected)
    changed = [name for name, t in answers[0].items() if not torch.equal(t, before[name])]
    assert len(changed) == len(LAYERS)


def test_several_are_summed_and_convolutions_count(net, tmp_path):
    made = halves()
    save_kohya(net, tmp_path / "a.safetensors", made)
    flat = "lora_" + CONV.replace(".", "_")
    down, up = torch.randn(4, 16, 3, 3), torch.randn(32, 4, 1, 1)
    save_file({f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}, tmp_path / "b.safetensors")
    key = "unet.down.1.blocks.0.res.conv1.weight"
    before = net.state_dict()[key].clone()
    applied = apply(net, {tmp_path / "a.safetensors": 1.0, tmp_path / "b.safetensors": -0.5})
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
        ({"weight": torch.ones(2)}, "is no LoRA"),
    ):
        save_file(tensors, path)
        with pytest.raises(UserError, match=words) as caught:
            apply(net, path)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_words_of_all_kinds_of_files(tiny_ldm, tmp_path):
    vectors = torch.randn(2, 24)
    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "x"}, tmp_path / "cat.pt"
    )
    torch.save({"<dog>": vectors[0]}, tmp_path / "learned.bin")
    save_file({"emb_params": vectors}, tmp_path / "hat.safetensors")
    assert [read_embedding(tmp_path / n)[0] for n in ("cat.pt", "learned.bin", "hat.safetensors")] == [
        "cat",
        "<dog>",
        "hat",
    ]
    net = tiny_ldm("sd1", text=replace(SIZES["sd1"].text, width=24, depth=1, heads=2, mlp_dim=24))
    for name, word, count in (("cat.pt", "<my-cat>", 2), ("learned.bin", None, 1)):
        added = load_embedding(net, tmp_path / name, word)
        rows = list(net.text.tokenizer.added[added])
        assert torch.equal(net.text.tokens.weight[rows], vectors[:count])
    save_embedding(net, "<my-cat>", tmp_path / "again.safetensors")
    word, back = read_embedding(tmp_path / "again.safetensors")
    assert word == "<my-cat>"
    assert torch.equal(back, vectors)
    save_file({"emb_params": torch.randn(1, 30)}, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match="vectors of 30 numbers"):
        load_embedding(net, tmp_path / "wide.safetensors")
    save_file({"a": torch.ones(1, 2), "b": torch.ones(1, 2)}, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match="holds 2 tensors"):
        load_embedding(net, tmp_path / "two.safetensors")
