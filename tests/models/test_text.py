"""Text encoders: sizes, parity with transformers, open_clip's layout and diffusers, prompts, added tokens, classes."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from triptych.config import from_json, to_json
from triptych.errors import TriptychError
from triptych.layers.capture import capture
from triptych.models.configs.text import CLASS_SIZES, SIZES, ClassTokenConfig, TextConfig, parameters
from triptych.models.text import ClassToken, TextEncoder, add_embedding, emphasize
from triptych.models.tokenization.prompt_syntax import pack, parse_prompt
from triptych.models.tokenization.tokenizer import clip_tokenizer, train_tokenizer

# Figures of the published checkpoints, counted in their files.
COUNTS = {
    "clip-l": 123_060_480, "openclip-h": 340_387_840, "openclip-h-whole": 352_984_064, "ldm-bert": 581_994_042,
    "ldm-bert-640": 186_154_682, "ldm-layout-text": 58_858_496,
}  # fmt: skip
TINY = {"embed_dim": 24, "depth": 3, "num_heads": 2, "mlp_ratio": 40 / 24}
FORMS = {
    "clip": TextConfig(type="clip", vocab_size=49408, activation="quick_gelu", pad_token=49407, **TINY),
    "openclip": TextConfig(type="openclip", vocab_size=49408, skip_last_blocks=1, **TINY),
    "ldm-bert": TextConfig(type="ldm-bert", vocab_size=300, max_length=20, head_dim=5, logits=True, **TINY),
}
SMALL = {name: replace(form, vocab_size=60, pad_token=0, max_length=9) for name, form in FORMS.items()}


def scrambled(config: TextConfig) -> TextEncoder:
    """An encoder in eval mode with random parameters, so that no path is hidden behind a zero."""
    net = TextEncoder(config)
    for part in net.modules():
        for parameter in part.parameters(recurse=False):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5)
        if isinstance(part, nn.LayerNorm):
            nn.init.normal_(part.weight, mean=1.0, std=0.1)
    return net.eval()


@pytest.fixture(params=FORMS)
def form(request) -> TextConfig:
    return FORMS[request.param]


@pytest.fixture(params=SMALL)
def small(request) -> TextConfig:
    return SMALL[request.param]


@pytest.fixture(scope="module")
def clip() -> TextEncoder:
    """A tiny encoder with CLIP's own vocabulary. Tests that change it copy it."""
    torch.manual_seed(1)
    return scrambled(FORMS["clip"]).requires_grad_(False)


# Configs and sizes


@pytest.mark.parametrize("name", SIZES)
def test_counts(name):
    with torch.device("meta"):
        net = TextEncoder(SIZES[name])
    assert sum(p.numel() for p in net.parameters()) == parameters(SIZES[name]) == COUNTS[name]
    assert from_json(TextConfig, to_json(SIZES[name])) == SIZES[name]


def test_every_parameter_is_filled_and_counts(small):
    net = TextEncoder(replace(small, num_added_tokens=2))
    assert [name for name, p in net.named_parameters() if not p.isfinite().all()] == []
    assert sum(p.numel() for p in net.parameters()) == parameters(net.config)
    net.encode_tokens(torch.randint(0, 62, (2, 9))).square().sum().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None]
    unread = [f"encoder.{i}." for i in range(small.depth - small.skip_last_blocks, small.depth)] + ["logits"]
    assert [name for name in idle if not name.startswith(tuple(unread))] == []
    assert net.blocks() == list(net.encoder)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_heads": 5}, "not a multiple of num_heads 5"),
        ({"skip_last_blocks": 3}, "from 0 to 2"),
        ({"pad_token": 60}, "from 0 to 59"),
        ({"max_length": 2}, "at least 3"),
        ({"embed_dim": 0}, "embed_dim is 0"),
        ({"num_added_tokens": -1}, "0 or more"),
    ],
)
def test_configs_that_cannot_be(wrong, message):
    with pytest.raises(TriptychError, match=message):
        replace(SMALL["clip"], **wrong)


# Parity


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_is_transformers_clip(activation, skip):
    from transformers import CLIPTextConfig, CLIPTextModel

    theirs = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=9, hidden_act=activation, bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = TextEncoder(replace(SMALL["clip"], activation=activation, skip_last_blocks=skip)).eval()
    source = theirs.state_dict()
    state = {
        "tokens.weight": source["embeddings.token_embedding.weight"],
        "positions": source["embeddings.position_embedding.weight"],
    }
    for leaf in ("weight", "bias"):
        state[f"norm.{leaf}"] = source[f"final_layer_norm.{leaf}"]
        for i in range(3):
            them, us = f"encoder.layers.{i}.", f"encoder.{i}."
            state[f"{us}attn.qkv.{leaf}"] = torch.cat(
                [source[f"{them}self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            )
            state[f"{us}attn.proj.{leaf}"] = source[f"{them}self_attn.out_proj.{leaf}"]
            for n in (1, 2):
                state[f"{us}norm{n}.{leaf}"] = source[f"{them}layer_norm{n}.{leaf}"]
                state[f"{us}mlp.fc{n}.{leaf}"] = source[f"{them}mlp.fc{n}.{leaf}"]
    ours.load_state_dict(state)
    ids = torch.randint(0, 60, (2, 9))
    with torch.no_grad():
        hidden = theirs(ids, output_hidden_states=True)
        wanted = theirs.final_layer_norm(hidden.hidden_states[-1 - skip])
        if skip == 0:
            torch.testing.assert_close(hidden.last_hidden_state, wanted)
        torch.testing.assert_close(ours.encode_tokens(ids), wanted, atol=1e-5, rtol=1e-5)
        last = theirs.final_layer_norm(hidden.hidden_states[-1])
        torch.testing.assert_close(ours.encode_tokens(ids, skip_last_blocks=0), last, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            ours.encode_tokens(ids[:, :4]), wanted[:, :4], atol=1e-5, rtol=1e-5
        )  # attention is causal


def test_openclip_is_its_formula():
    """open_clip's residual attention block: nn.MultiheadAttention with `in_proj_weight` and an additive mask."""
    ours = scrambled(SMALL["openclip"])
    ids = torch.randint(0, 60, (2, 9))
    with torch.no_grad():
        x = ours.tokens.weight[ids] + ours.positions
        mask = torch.full((9, 9), float("-inf")).triu(1)
        for block in ours.encoder[:-1]:  # the penultimate layer, then the final norm
            attn = nn.MultiheadAttention(24, 2, batch_first=True).eval()
            attn.load_state_dict(
                {
                    "in_proj_weight": block.attn.qkv.weight, "in_proj_bias": block.attn.qkv.bias,
                    "out_proj.weight": block.attn.proj.weight, "out_proj.bias": block.attn.proj.bias,
                }
            )  # fmt: skip
            y = block.norm1(x)
            x = x + attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            x = x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(x))))
        torch.testing.assert_close(ours.encode_tokens(ids), ours.norm(x), atol=1e-5, rtol=1e-5)


def test_ldm_bert_is_diffusers_ldm_bert():
    module = pytest.importorskip("diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion")
    theirs = module.LDMBertModel(
        module.LDMBertConfig(
            vocab_size=60, max_position_embeddings=9, encoder_layers=3, encoder_ffn_dim=40, encoder_attention_heads=2,
            head_dim=5, d_model=24,
        )
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = TextEncoder(SMALL["ldm-bert"]).eval()
    source, state = theirs.state_dict(), {}
    state["tokens.weight"], state["positions"] = (
        source["model.embed_tokens.weight"],
        source["model.embed_positions.weight"],
    )
    for i in range(3):
        them, us = f"model.layers.{i}.", f"encoder.{i}."
        state[f"{us}attn.qkv.weight"] = torch.cat([source[f"{them}self_attn.{x}_proj.weight"] for x in "qkv"])
        for leaf in ("weight", "bias"):
            state[f"{us}attn.proj.{leaf}"] = source[f"{them}self_attn.out_proj.{leaf}"]
            state[f"{us}norm1.{leaf}"] = source[f"{them}self_attn_layer_norm.{leaf}"]
            state[f"{us}norm2.{leaf}"] = source[f"{them}final_layer_norm.{leaf}"]
            state[f"{us}mlp.fc1.{leaf}"], state[f"{us}mlp.fc2.{leaf}"] = (
                source[f"{them}fc1.{leaf}"],
                source[f"{them}fc2.{leaf}"],
            )
    for leaf in ("weight", "bias"):
        state[f"norm.{leaf}"], state[f"logits.{leaf}"] = (
            source[f"model.layer_norm.{leaf}"],
            source[f"to_logits.{leaf}"],
        )
    ours.load_state_dict(state)
    ids = torch.randint(0, 60, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(
            ours.encode_tokens(ids), theirs(ids, return_dict=True)[0], atol=1e-5, rtol=1e-5
        )


def test_attention_maps(small):
    net, ids = scrambled(small), torch.randint(0, 60, (2, 9))
    with torch.no_grad(), capture(net) as maps:
        torch.testing.assert_close(net.encode_tokens(ids), copy.deepcopy(net).encode_tokens(ids))
    first = maps["encoder.0.attn"]
    assert first.shape == (2, 2, 9, 9)
    assert bool((first.triu(1) == 0).all()) == small.causal


def test_half_precision(clip):
    half = copy.deepcopy(clip).to(torch.bfloat16)
    z = half.encode_prompt("a (red:1.3) apple")
    assert z.dtype == torch.bfloat16
    torch.testing.assert_close(z.float(), clip.encode_prompt("a (red:1.3) apple"), atol=0.15, rtol=0.1)


# Strings


def test_strings(clip):
    texts = ["a red apple", "", "a CAT"]
    ids = clip.tokenize(texts)
    assert ids.shape == (3, 77)
    assert ids[0, :6].tolist() == [49406, 320, 736, 3055, 49407, 49407]
    assert torch.equal(clip(texts), clip.encode_tokens(ids))
    other = TextEncoder(FORMS["openclip"])
    assert other.tokenize(texts)[0, :6].tolist() == [49406, 320, 736, 3055, 49407, 0]


def test_a_long_text_is_cut_and_said(clip, caplog):
    with caplog.at_level(logging.WARNING):
        ids = clip.tokenize(["a red apple, " * 30])
    assert ids[0, -1] == 49407
    assert ids[0, 1:76].tolist() == clip.tokenizer.ids("a red apple, " * 30)[:75]
    assert "the text has 120 tokens and 75 are read; left out: , a red apple" in caplog.text


@pytest.mark.parametrize("texts", ["a red apple", []])
def test_no_list_of_strings(clip, texts):
    for call in (clip, clip.encode_prompts):
        with pytest.raises(TriptychError, match="must be a list of strings"):
            call(texts)


def test_too_many_tokens(small):
    with pytest.raises(TriptychError, match="10 tokens are given, but this text encoder has positions for 9"):
        TextEncoder(small).encode_tokens(torch.zeros(1, 10, dtype=torch.long))


def test_a_vocabulary_of_ones_own():
    net = scrambled(FORMS["ldm-bert"])
    with pytest.raises(TriptychError, match=r"no tokenizer; load a vocab\.txt"):
        net(["a red apple"])
    net.tokenizer = train_tokenizer(["a red apple", "a green apple"] * 3, 300)
    assert net(["a red apple", "日本" * 50]).shape == (2, 20, 24)
    assert (
        net.tokenize([""])[0].tolist() == [net.tokenizer.start, net.tokenizer.end] + [net.tokenizer.pad] * 18
    )
    with pytest.raises(TriptychError, match="has 49408 tokens and the text encoder 300 embeddings"):
        net.tokenizer = clip_tokenizer()
    with pytest.raises(TriptychError, match="tokenizer of the same model"):
        TextEncoder(replace(FORMS["clip"], vocab_size=49407, pad_token=0))([""])
    assert copy.deepcopy(net).tokenizer is net.tokenizer


# Prompts


def test_a_plain_prompt_is_its_text(clip):
    for prompt in ["a red apple", "", "日本, 🍎"]:
        assert torch.equal(clip.encode_prompt(prompt), clip([prompt]))


def test_weights_multiply_and_keep_the_mean(clip):
    z, plain = clip.encode_prompt("a (red:1.3) [apple]"), clip(["a red apple"])
    weights = torch.ones(77)
    weights[2], weights[3] = 1.3, 1 / 1.1
    wanted = plain * weights[:, None]
    torch.testing.assert_close(z, wanted * (plain.mean() / wanted.mean()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z.mean(), plain.mean())
    assert torch.equal(
        clip.encode_prompt("a ((red):1.0) apple")[:, 0], clip.encode_prompt("a (red) apple")[:, 0]
    )


def test_weights_that_leave_nothing():
    z = torch.randn(2, 4, 3)
    assert torch.equal(emphasize(z, torch.zeros(2, 4)), torch.zeros(2, 4, 3))
    assert torch.equal(emphasize(z, torch.ones(2, 4)), z)


def test_a_long_prompt_is_read_in_chunks(clip):
    prompt = " ".join(f"word{i}" for i in range(60))
    ids = clip.tokenizer.ids(prompt)
    assert 75 < len(ids) <= 150 + 75
    rows = [clip.tokenizer.framed(ids[at : at + 75], 77, 49407) for at in range(0, len(ids), 75)]
    wanted = clip.encode_tokens(torch.tensor(rows)).flatten(0, 1)[None]
    torch.testing.assert_close(clip.encode_prompt(prompt), wanted, atol=1e-5, rtol=1e-5)


def test_break_starts_a_chunk(clip):
    parts = torch.cat([clip(["a red apple"]), clip(["a cat"])], dim=1)
    torch.testing.assert_close(clip.encode_prompt("a red apple BREAK a cat"), parts)


def test_a_prompt_does_not_hear_its_neighbors(clip):
    """A prompt's encoding is bit for bit the same whatever other prompts are in the list."""
    long, short = "a (red:1.3) apple, " * 30, "ugly"
    alone = clip.encode_prompts([long])
    together = clip.encode_prompts([short, long, long, ""])
    assert together.shape == (4, alone.shape[1], 24)
    assert torch.equal(together[1:2], alone)
    assert torch.equal(together[2:3], alone)
    empty = clip([""])
    assert torch.equal(together[:1], torch.cat([clip([short]), *[empty] * (alone.shape[1] // 77 - 1)], dim=1))


def test_five_thousand_words(clip):
    words = ["a", "red", "old", "cat", "dog", "apple", "house", "tree", "in", "on", "the", "small", "lamp"]
    prompt = " ".join(f"({words[i % len(words)]}:1.1)" for i in range(5000))
    packed = pack(parse_prompt(prompt), clip.tokenizer.spans, 75)
    z = clip.encode_prompt(prompt)
    assert z.shape == (1, 77 * len(packed), 24) == (1, 77 * 67, 24)
    assert z.isfinite().all()


# Added tokens


def test_added_vectors_are_read(clip):
    net = copy.deepcopy(clip)
    vectors = torch.randn(2, 24)
    add_embedding(net, "<cat>", vectors)
    assert net.config.num_added_tokens == 2
    assert net.tokens.weight.shape == (49410, 24)
    assert torch.equal(net.tokens.weight[:49408], clip.tokens.weight)
    ids = net.tokenize(["a <cat> here"])
    assert ids[0, :6].tolist() == [49406, 320, 49408, 49409, 763, 49407]
    torch.testing.assert_close(net.tokens(ids)[0, 2:4], vectors)
    assert torch.equal(net(["a <cat> here"]), net.encode_prompt("a <CAT> here"))
    assert torch.equal(net(["a red apple"]), clip(["a red apple"]))
    assert clip.tokenizer.added == {}
    again = TextEncoder(net.config, net.tokenizer)  # as a stored model is built
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(["a <cat>"]), net(["a <cat>"]))


def test_vectors_of_one_word_stay_together(clip):
    net = copy.deepcopy(clip)
    add_embedding(net, "<cat>", torch.randn(4, 24))
    filler = "a " * 73
    z = net.encode_prompt(filler + "(<cat>:1.2) here")
    rows = torch.tensor(
        [
            net.tokenizer.framed([320] * 73, 77, 49407),
            net.tokenizer.framed([*range(49408, 49412), 763], 77, 49407),
        ]
    )
    weights = torch.ones(2, 77)
    weights[1, 1:5] = 1.2
    wanted = emphasize(net.encode_tokens(rows), weights).flatten(0, 1)[None]
    torch.testing.assert_close(z, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("token", "shape", "message"),
    [
        ("<cat>", (1, 7), "vectors of 7 numbers, this text encoder's have 24"),
        ("<cat>", (76, 24), "from 1 to 75"),
        ("<cat>", (0, 24), "from 1 to 75"),
        ("(cat)", (1, 24), "brackets"),
        ("", (1, 24), "is empty"),
        ("photo", (1, 24), "already"),
    ],
)
def test_words_that_cannot_be_added(clip, token, shape, message):
    with pytest.raises(TriptychError, match=message):
        add_embedding(clip, token, torch.zeros(shape))
    assert clip.config.num_added_tokens == 0
    assert len(clip.tokens.weight) == 49408


def test_added_words_learn_when_the_table_does(clip):
    net = copy.deepcopy(clip).requires_grad_(True)
    add_embedding(net, "<cat>", torch.randn(24))
    net(["<cat>"]).sum().backward()
    assert net.tokens.weight.grad[49408].abs().sum() > 0


# Classes


@pytest.mark.parametrize(("name", "rows"), [("cin256", 1000), ("cin256-v2", 1001)])
def test_a_class_is_a_prompt_of_one_token(name, rows):
    net = ClassToken(CLASS_SIZES[name])
    assert sum(p.numel() for p in net.parameters()) == parameters(CLASS_SIZES[name]) == rows * 512
    assert net.null == (1000 if rows == 1001 else None)
    z = net(torch.tensor([3, rows - 1]))
    assert z.shape == (2, 1, 512)
    assert torch.equal(z[:, 0], net.classes.weight[[3, rows - 1]])
    assert torch.equal(net([3, rows - 1]), z)
    with pytest.raises(TriptychError, match=f"class {rows} is not from 0 to {rows - 1}"):
        net([0, rows])
    with pytest.raises(TriptychError, match="at least 1"):
        ClassTokenConfig(num_classes=0)
