"""The DiT's files, the authors' and diffusers', both directions; and run beside diffusers' at a tiny random size."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import triptych as tp
from triptych.errors import CheckpointError
from triptych.layers.position import sincos_positions
from triptych.models.configs.dit import DiTConfig
from triptych.models.dit import DiT
from triptych.weights import load
from triptych.weights.diffusion.dit import authors_table, read_authors
from triptych.weights.mapping.format import Draft, Hints, draft_keys
from triptych.weights.mapping.rules import export_tensors
from triptych.weights.recognition import recognize

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what importing it deprecates is its own affair
    from diffusers import DiTTransformer2DModel

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.proves("Checkpoints", "DiT: diffusers folder", by="diffusers", writes=True),
    pytest.mark.proves("Checkpoints", "DiT: the authors' files", by="names", writes=True),
]


TINY = DiTConfig(
    latent_size=(8, 8),
    patch_size=2,
    embed_dim=32,
    depth=3,
    num_heads=4,
    num_classes=7,
    learn_sigma=True,
    time_frequencies="closed",
)
THEIRS = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 3,
    "out_channels": 8,
    "sample_size": 8,
    "num_embeds_ada_norm": 7,
    "norm_eps": 1e-6,
}


@pytest.fixture
def net(scramble) -> DiT:
    torch.manual_seed(0)
    return scramble(DiT(TINY))


def inputs(size=8):
    return torch.randn(3, 4, size, size), torch.tensor([1, 500, 999]), torch.tensor([0, 6, 7])


@torch.no_grad()
@pytest.mark.parametrize("size", [8, 12])
def test_beside_diffusers(net, size, same_state, tmp_path):
    """At its own size, and at one that it was not made for."""
    tp.export(net, tmp_path / "ours", "diffusers")
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "ours").eval()
    x, t, labels = inputs(size)
    expected = theirs(x, t, class_labels=labels).sample[:, :4]
    torch.testing.assert_close(net(x, t, labels=labels), expected, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        back = load(tmp_path / folder)
        same_state(net, back)
        assert back.config == net.config


@torch.no_grad()
def test_read_from_diffusers(tmp_path):
    """Weights that are diffusers' own; the embeddings of its blocks are made copies, as in what is published."""
    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(**THEIRS).eval()
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    theirs.save_pretrained(tmp_path)
    x, t, labels = inputs()
    result = load(tmp_path)
    expected = theirs(x, t, class_labels=labels).sample[:, :4]
    torch.testing.assert_close(result(x, t, labels=labels), expected, atol=1e-5, rtol=1e-5)


def test_embeddings_of_their_own_are_refused(tmp_path):
    DiTTransformer2DModel(**THEIRS).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="one embedding for all") as reported:
        load(tmp_path)
    assert "\n" not in str(reported.value)


def by_hand(w, x, t, labels, heads):
    """The authors' network in fp64 out of their names, block by block."""
    w = {name: tensor.double() for name, tensor in w.items()}
    dense = lambda z, name: z @ w[f"{name}.weight"].T + w[f"{name}.bias"]  # noqa: E731
    silu, norm = torch.nn.functional.silu, lambda z: torch.nn.functional.layer_norm(z, z.shape[-1:], eps=1e-6)
    angles = t[:, None].double() * 10_000 ** -(torch.arange(128, dtype=torch.float64) / 128)
    c = dense(silu(dense(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    c = c + w["y_embedder.embedding_table.weight"][labels]
    z = torch.nn.functional.conv2d(
        x.double(), w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2
    )
    side = z.shape[-1]
    z = z.flatten(2).transpose(1, 2) + w["pos_embed"]
    i = 0
    while f"blocks.{i}.attn.qkv.weight" in w:
        name = f"blocks.{i}"
        output = dense(silu(c), f"{name}.adaLN_modulation.1")[:, None].chunk(6, dim=-1)
        q, k, v = dense(norm(z) * (1 + output[1]) + output[0], f"{name}.attn.qkv").chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        seen = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        z = z + output[2] * dense(seen.transpose(1, 2).flatten(2), f"{name}.attn.proj")
        hidden = dense(norm(z) * (1 + output[4]) + output[3], f"{name}.mlp.fc1")
        z = z + output[5] * dense(torch.nn.functional.gelu(hidden, approximate="tanh"), f"{name}.mlp.fc2")
        i += 1
    shift, scale = dense(silu(c), "final_layer.adaLN_modulation.1")[:, None].chunk(2, dim=-1)
    z = dense(norm(z) * (1 + scale) + shift, "final_layer.linear")
    z = z.unflatten(1, (side, side)).unflatten(-1, (2, 2, -1))  # b h w p q c
    return z.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


@torch.no_grad()
def test_the_authors_file(net, same_state, tmp_path):
    opened = DiT(replace(TINY, time_frequencies="open")).eval()
    opened.load_state_dict(net.state_dict())
    path = tp.export(opened, tmp_path / "DiT.pt", "dit")
    raw = torch.load(path, weights_only=True)
    x, t, labels = inputs()
    expected = by_hand(raw, x, t, labels, 4)[:, :4]
    torch.testing.assert_close(opened(x, t, labels=labels).double(), expected, atol=1e-4, rtol=1e-4)
    back = load(path)
    same_state(opened, back)
    assert back.config == opened.config
    assert torch.equal(raw["pos_embed"], sincos_positions((4, 4), 32, closed=False))
    assert set(json.loads((tmp_path / "DiT.pt.json").read_text())["triptych"]) == {
        "num_heads"
    }  # 32 wide: one is usual


def test_a_training_run_of_the_authors(net, same_state, tmp_path):
    """Their train.py saves the model, its average and the optimizer; the average is read."""
    raw = torch.load(tp.export(net, tmp_path / "bare.pt", "dit"), weights_only=True)
    torch.save(
        {"model": {n: t + 1 for n, t in raw.items()}, "ema": raw, "opt": {"state": {}}},
        tmp_path / "0050000.pt",
    )
    (tmp_path / "bare.pt.json").rename(tmp_path / "0050000.pt.json")
    back = load(tmp_path / "0050000.pt")
    same_state(net, back)
    assert back.config == net.config


def test_another_table_of_positions_is_refused(net, tmp_path):
    raw = torch.load(tp.export(net, tmp_path / "it.pt", "dit"), weights_only=True)
    torch.save(raw | {"pos_embed": raw["pos_embed"] + 1}, tmp_path / "it.pt")
    with pytest.raises(CheckpointError, match="not the fixed table"):
        load(tmp_path / "it.pt")


@pytest.mark.parametrize(
    ("changes", "format", "words"),
    [
        ({"context_dim": 12}, "dit", "without a key there"),
        ({"modulation": "single"}, "dit", "one modulation for all"),
        ({"qk_norm": True}, "dit", "without a key there"),
        ({"bias": False}, "diffusers", "parameters missing"),
        ({"null_class": False}, "dit", "null_class"),
        ({"num_classes": 0}, "diffusers", "a class"),
        ({"latent_size": (8, 12)}, "dit", "no square"),
        ({"latent_size": (8, 12)}, "diffusers", "square latents"),
        ({"time_frequencies": "open"}, "diffusers", "this has open ones"),
        ({"mlp_ratio": 2.0}, "diffusers", "4 x 32, not 64"),
        ({"position": "counted"}, "diffusers", "counted ones"),
    ],
)
def test_what_they_cannot_say_is_refused(changes, format, words, tmp_path):
    with pytest.raises(CheckpointError, match=words) as reported:
        tp.export(DiT(replace(TINY, **changes)), tmp_path / ("it.pt" if format == "dit" else "it"), format)
    assert list(tmp_path.iterdir()) == []
    assert "\n" not in str(reported.value)


def test_published_files_are_known_by_their_shapes():
    """DiT-XL/2 as it can be fetched: heads of 72 channels."""
    with torch.device("meta"):
        net = tp.create("dit-xl2")
    tensors = export_tensors(authors_table(net.config), net.state_dict(), "DiT-XL-2-256x256.pt")
    names = draft_keys(Draft(tensors), Path("DiT-XL-2-256x256.pt"), "pickle")
    assert recognize(names).name == "dit"
    assert read_authors(names, Hints()).config == net.config
    assert sum(t.numel() for t in tensors.values()) == 675_129_632
