"""Fine-tuning of Stable Diffusion: all weights, a LoRA, a word. What changes and what does not, exact resume, the files
as other programs read them, invalid input."""

import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tests.training.interrupted_runs import interrupt_after, last_checkpoint

import triptych as tp
from triptych.data.config import DataConfig
from triptych.diffusion.config import NoiseConfig, ProcessConfig
from triptych.errors import ConfigError, TriptychError
from triptych.models.configs.autoencoder import AutoencoderConfig
from triptych.models.configs.dit import DiTConfig
from triptych.models.configs.latent_diffusion import SIZES, LatentDiffusionConfig
from triptych.models.configs.text import TextConfig
from triptych.models.configs.unet import UNetConfig
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.text import TextEncoder
from triptych.training import dry_run, run
from triptych.training.configs.base import LoopConfig, OptimConfig
from triptych.training.configs.second_stage import (
    FLIP_ONLY,
    CaptionConfig,
    LoraConfig,
    SamplesConfig,
    SecondStageConfig,
    WordConfig,
)
from triptych.training.runner import prepare
from triptych.weights.diffusion.lora import layer_names

SD = LatentDiffusionConfig(
    autoencoder=AutoencoderConfig(
        regularization="kl",
        base_channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        latent_channels=4,
        norm_groups=4,
        image_size=(16, 16),
        scale=0.5,
    ),
    network=UNetConfig(
        latent_size=(8, 8),
        base_channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_downsample_factors=(2,),
        num_heads=2,
        context_dim=8,
        norm_groups=4,
    ),
    text_encoder=TextConfig(
        type="clip",
        vocab_size=49408,
        embed_dim=8,
        depth=1,
        num_heads=2,
        mlp_ratio=2.0,
        max_length=12,
        pad_token=49407,
    ),
    process=ProcessConfig(prediction="v"),
)
TUNED = {
    "all": {},
    "lora": {"lora": LoraConfig(rank=2, alpha=4.0)},
    "words": {"word": WordConfig(name="<toy>", like="toy", vectors=2), "drop_condition": 0.0},
}


def filled(config):
    """Return a network with random weights, with the weights of norms near 1."""
    net = LatentDiffusion(config)
    for part in net.modules():
        for parameter in part.parameters(recurse=False):
            fan = parameter[0].numel() if parameter.ndim > 1 else 100
            torch.nn.init.normal_(parameter, std=fan**-0.5)
        if isinstance(part, torch.nn.LayerNorm | torch.nn.GroupNorm) and part.weight is not None:
            torch.nn.init.normal_(part.weight, mean=1.0, std=0.1)
    return net.eval()


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    """A tiny Stable Diffusion model in our format, which loads faster than a folder with its vocabulary."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sd") / "tiny.safetensors"
    tp.save(filled(SD), path)
    return path


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """Ten images; five have captions, two of which contain a <toy>."""
    folder = tmp_path_factory.mktemp("toys")
    rng = np.random.default_rng(0)
    for i in range(10):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        if i < 5:
            (folder / f"{i}.txt").write_text("a <Toy> on a table" if i < 2 else "a table")
    return folder


@pytest.fixture
def config(sd, toys):
    def make(train, **changes):
        return SecondStageConfig(
            **{
                "data": str(toys),
                "init": str(sd),
                "train": train,
                "noise": NoiseConfig(min_snr=5.0, offset=0.1),
                "samples": SamplesConfig(num_images=2, num_steps=2, guidance_scale=2.0),
                "augment": replace(FLIP_ONLY, flip=0.0),
                "loading": DataConfig(batch_size=4, workers=0, eval_fraction=0.2),
                "optim": OptimConfig(lr=1e-2, weight_decay=0.0),
                "loop": LoopConfig(epochs=2, precision="fp32", device="cpu"),
                **TUNED[train],
                **changes,
            }
        )

    return make


@pytest.mark.parametrize(
    ("train", "use", "ema"),
    [("all", "on", 0.9), ("lora", "on", 0.9), ("lora", "off", 0.0), ("words", "on", 0.0)],
)
def test_a_run_cut_off_and_repeated_is_the_unbroken_run_bit_for_bit(
    config, tmp_path, monkeypatch, train, use, ema
):
    one = config(train)
    one = replace(one, cache=replace(one.cache, use=use), loop=replace(one.loop, ema=ema))
    run(one, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert not run(one, tmp_path / "cut").finished
    assert run(one, tmp_path / "cut").finished
    name = {"all": "model", "lora": "lora", "words": "word"}[train]
    (left, _), (right, _) = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "cut")
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []
    files = [(tmp_path / folder / f"{name}.safetensors").read_bytes() for folder in ("whole", "cut")]
    assert files[0] == files[1]


def test_only_the_denoiser_is_trained(config, sd, tmp_path):
    """The denoiser changes; autoencoder, text encoder, process and size are those of the original model."""
    one = config("all", optim=OptimConfig(lr=1e-3), loop=LoopConfig(epochs=1, precision="fp32", device="cpu"))
    run(one, tmp_path)
    before, after = tp.load(sd), tp.load(tmp_path)
    assert after.config == before.config
    unchanged = {
        name.split(".")[0]
        for name, tensor in before.state_dict().items()
        if torch.equal(tensor, after.state_dict()[name])
    }
    assert unchanged == {"autoencoder", "text_encoder"}
    assert {name.split(".")[1] for name in last_checkpoint(tmp_path)[0] if name.startswith("net.")} == {
        "network"
    }
    assert after.autoencoder.config.scale == 0.5
    assert after.text_encoder.tokenizer.ids("a red apple") == before.text_encoder.tokenizer.ids("a red apple")


def test_a_clip_encoder_is_trained_only_if_requested(config, sd):
    parts = prepare(config("all", text=CaptionConfig(train="on")))
    names = {name.split(".")[0] for name, _ in parts.net.named_parameters()}
    assert names == {"network", "text_encoder"}
    assert all(p.requires_grad for p in parts.net.parameters())
    batch = {**next(iter(parts.train_loader)), "seed": (0, 1, 0)}
    parts.task.loss(parts.net, batch)[0].backward()
    assert parts.net.text_encoder.encoder[0].attn.qkv.weight.grad.any()
    assert {name.split(".")[0] for name, _ in prepare(config("all")).net.named_parameters()} == {"network"}


def test_the_process_is_that_of_init_except_for_zero_terminal_snr(config, sd, tmp_path):
    own = prepare(
        config("lora", process=ProcessConfig(schedule="flow", prediction="flow"))
    ).task.process.config
    assert own == SD.process
    changed = prepare(
        config("lora", process=ProcessConfig(zero_terminal_snr=True, prediction="v"))
    ).task.process.config
    assert changed == replace(SD.process, zero_terminal_snr=True)
    net = tp.load(sd)
    tp.export(net, tmp_path / "sd.safetensors", "compvis")
    for prediction in ("eps", "v"):
        one = config("lora", init=str(tmp_path / "sd.safetensors"), prediction=prediction)
        assert prepare(one).task.process.config.prediction == prediction


def weights_of(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def test_a_lora_file_has_all_trained_parameters_and_no_others(config, sd, tmp_path):
    """The trained model is equal to the original model with the file loaded, and to scale * up @ down."""
    one = config(
        "lora", text=CaptionConfig(train="on"), lora=LoraConfig(rank=2, alpha=4.0, feed_forward=True)
    )
    parts = prepare(one)
    assert all(p.numel() < 500 for p in parts.net.parameters())
    run(one, tmp_path)
    tensors, _ = last_checkpoint(tmp_path)
    assert all(
        "/" in name for name in tensors if name.startswith("net.")
    )  # updates, and no weight of the model
    with torch.no_grad():
        for name, parameter in parts.net.named_parameters():
            parameter.copy_(tensors[f"net.{name}"])
    trained = weights_of(parts.task.product(parts.net))
    original = tp.load(sd)
    before = weights_of(original)
    assert all(
        torch.equal(t, before[n]) for n, t in weights_of(parts.task.base).items()
    )  # all weights are restored
    tp.load_lora(original, tmp_path / "lora.safetensors")
    for name, tensor in weights_of(original).items():
        torch.testing.assert_close(tensor, trained[name], atol=1e-6, rtol=1e-6)
    changed = {name for name, tensor in trained.items() if not torch.equal(tensor, before[name])}
    assert changed == set(parts.net.names)
    suffixes = {re.sub(r".*\.(attn|cross|mlp)\.", "", name) for name in changed}
    assert suffixes == {"qkv.weight", "proj.weight", "q.weight", "kv.weight", "fc1.weight", "fc2.weight"}
    assert {name.split(".")[0] for name in changed} == {"network", "text_encoder"}
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"
        down, up, alpha = (
            file.get_tensor(f"{layer}.{end}") for end in ("lora_down.weight", "lora_up.weight", "alpha")
        )
        metadata = file.metadata()
    assert (down.shape, up.shape, alpha) == ((2, 16), (16, 2), 4.0)
    name = "network.middle.transformer.blocks.0.attn.qkv.weight"
    torch.testing.assert_close(
        trained[name][16:32], before[name][16:32] + 2.0 * up @ down, atol=1e-6, rtol=1e-6
    )
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "4.0")
    assert (metadata["ss_sd_model_name"], metadata["ss_resolution"]) == ("tiny.safetensors", "(16, 16)")
    assert "ss_v2" not in metadata  # Stable Diffusion 1 and 2 have other widths


def test_a_new_lora_changes_nothing_and_all_of_it_gets_a_gradient(config):
    """The second factors are 0 at first. If they are not, both factors of all updates have gradients."""
    parts = prepare(config("lora"))
    batch = {**next(iter(parts.train_loader)), "seed": (0, 1, 0)}
    plain = super(type(parts.task), parts.task).error
    parts.task.error = lambda model, *rest: plain(parts.task.base, *rest)
    original = parts.task.loss(parts.net, batch)[0].detach()
    del parts.task.error
    assert torch.equal(parts.task.loss(parts.net, batch)[0].detach(), original)
    for update in parts.net.updates.values():
        torch.nn.init.normal_(update.b)
    parts.task.loss(parts.net, batch)[0].backward()
    assert [name for name, p in parts.net.named_parameters() if p.grad is None or not p.grad.any()] == []
    parts.task.product(parts.net)
    assert not any(p.requires_grad or p.grad is not None for p in parts.task.base.parameters())


def test_recomputed_blocks_have_the_same_updates(config):
    """Recomputed activations give the same gradient, since the model still has its changed weights in the backward
    pass."""
    grads = []
    for recompute in (False, True):
        loop = LoopConfig(precision="fp32", device="cpu", recompute=recompute)
        parts = prepare(config("lora", loop=loop))
        torch.manual_seed(3)
        for update in parts.net.updates.values():
            torch.nn.init.normal_(update.b)
        parts.task.loss(parts.net, {**next(iter(parts.train_loader)), "seed": (0, 1, 0)})[0].backward()
        grads.append([p.grad for p in parts.net.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_the_unet_of_diffusers_with_the_file_is_equal_to_ours(config, sd, tmp_path):
    """diffusers reads the file with its own conversion of kohya's names, into its own UNet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import UNet2DConditionModel
        from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
        from diffusers.utils import convert_unet_state_dict_to_peft

        tp.export(tp.load(sd), tmp_path / "sd", "diffusers")
        theirs = UNet2DConditionModel.from_pretrained(tmp_path / "sd" / "unet", local_files_only=True)
    lora = LoraConfig(rank=2, alpha=4.0, feed_forward=True)
    run(config("lora", init=str(tmp_path / "sd"), lora=lora), tmp_path / "r")
    with safe_open(tmp_path / "r" / "lora.safetensors", "pt") as file:
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    named, alphas = _convert_non_diffusers_lora_to_diffusers(dict(read))
    assert len(named) == 2 * len(alphas) == 2 * len(read) // 3 == 80
    assert set(alphas.values()) == {4.0}
    halves = convert_unet_state_dict_to_peft({name.removeprefix("unet."): t for name, t in named.items()})
    ours = tp.load(sd)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), torch.randn(2, 12, 8)
    with torch.no_grad():
        original = ours.network(x, t, context)
        torch.testing.assert_close(theirs(x, t, context).sample, original, atol=1e-5, rtol=1e-5)
        for name, down in halves.items():
            if name.endswith(".lora_A.weight"):
                update = 4.0 / 2 * halves[name.replace("lora_A", "lora_B")] @ down
                theirs.get_submodule(name.removesuffix(".lora_A.weight")).weight += update
        tp.load_lora(ours, tmp_path / "r" / "lora.safetensors")
        changed = ours.network(x, t, context)
        assert (changed - original).abs().max() > 1e-3
        torch.testing.assert_close(theirs(x, t, context).sample, changed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_names_are_kohyas_over_the_whole_published_unet(name):
    """kohya's scripts name a layer by its path in the network of diffusers, with underscores: all linear layers and 1x1
    convolutions in each Transformer2DModel, and those in CLIPAttention and CLIPMLP of the text encoder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import UNet2DConditionModel

        sizes = SIZES[name].network
        heads = sizes.num_heads or tuple(
            sizes.base_channels * m // sizes.head_dim for m in sizes.channel_multipliers
        )
        with torch.device("meta"):
            theirs = UNet2DConditionModel(
                cross_attention_dim=sizes.context_dim,
                attention_head_dim=heads,
                use_linear_projection=sizes.projection == "linear",
            )
    expected = {
        f"unet.{path}.{child}": tuple(layer.weight.shape[:2])
        for path, part in theirs.named_modules()
        if type(part).__name__ == "Transformer2DModel"
        for child, layer in part.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    }
    with torch.device("meta"):
        net = LatentDiffusion(SIZES[name])
    shapes = {key: tuple(p.shape) for key, p in net.named_parameters()}
    named = {}
    for ours, layers in layer_names(SIZES[name]).items():
        if len(shapes[ours]) == 2 and ".transformer." in ours:
            named |= {layer: (shapes[ours][0] // len(layers), shapes[ours][1]) for layer in layers}
    assert named == expected
    text = {layer for layers in layer_names(SIZES[name]).values() for layer in layers if "self_attn" in layer}
    depth = SIZES[name].text_encoder.depth
    ends = ("q_proj", "k_proj", "v_proj", "out_proj")
    assert text == {
        f"text_encoder.text_model.encoder.layers.{i}.self_attn.{end}" for i in range(depth) for end in ends
    }


def test_only_the_rows_of_the_word_change(config, sd, tmp_path):
    one = config("words")
    parts = prepare(one)
    start = parts.net.vectors.detach().clone()
    (like,) = tp.load(sd).text_encoder.tokenizer.ids("toy")
    before = tp.load(sd)
    assert torch.equal(start, before.text_encoder.tokens.weight[[like, like]])
    run(one, tmp_path)
    tensors, _ = last_checkpoint(tmp_path)
    assert {name for name in tensors if name.startswith("net.")} == {"net.vectors"}
    assert (tmp_path / "word.safetensors").stat().st_size < 500
    with torch.no_grad():
        parts.net.vectors.copy_(tensors["net.vectors"])
    trained = weights_of(parts.task.product(parts.net))
    table = trained.pop("text_encoder.tokens.weight")
    unchanged = weights_of(before)
    assert torch.equal(table[:-2], unchanged.pop("text_encoder.tokens.weight"))
    assert torch.equal(table[-2:], tensors["net.vectors"])
    assert (table[-2:] - start).abs().min() > 0
    assert all(torch.equal(tensor, unchanged[name]) for name, tensor in trained.items())
    tp.load_embedding(before, tmp_path / "word.safetensors")
    assert torch.equal(before.text_encoder.tokens.weight[-2:], table[-2:])
    assert before.text_encoder.tokenizer.ids("a <TOY>")[-2:] == [49408, 49409]


def test_images_get_captions_with_the_word_else_templates(config):
    parts = prepare(config("words"))
    condition = parts.task.condition
    rows = {
        row: {condition.texts[k] for k in condition.numbers[condition.first[row] :][: condition.count[row]]}
        for row in range(8)
    }
    source = parts.train_loader.dataset.source
    for row, texts in rows.items():
        own = {text for text in source.captions[row] if "<Toy>" in text}
        assert texts == own or (not own and "a photo of a <toy>" in texts and len(texts) == 10)
    assert any(texts == {"a <Toy> on a table"} for texts in rows.values())
    style = prepare(
        config("words", word=WordConfig(name="<ink>", like="ink", templates=("in the style of {}",)))
    )
    assert set(style.task.condition.texts) == {"", "in the style of <ink>"}


def test_dry_run_counts_trained_parameters(config):
    report = dry_run(config("words"))
    assert report["parameters_trained"] == 16
    assert report["parameters"] > 400_000
    assert json.dumps(report)


def test_bad_input_is_one_line(config, sd, first_stages, tmp_path):
    def refused(words, train="lora", **changes):
        with pytest.raises(TriptychError, match=words) as caught:
            prepare(config(train, **changes))
        assert "\n" not in str(caught.value)

    stage, inpainting, dit = first_stages
    refused(
        r"is a Autoencoder; give a latent diffusion model to start from|is an? Autoencoder", init=str(stage)
    )
    refused(r"also needs mask\+masked_image as condition", train="all", init=str(inpainting))
    refused(r"train=lora writes updates of a UNet, and init .* has a DiT; give --train all", init=str(dit))
    with pytest.raises(ConfigError, match=r"rank is 0, which must be at least 1|rank"):
        LoraConfig(rank=0)
    with pytest.raises(ConfigError, match=r"templates"):
        WordConfig(templates=("a photo",))
    refused(r"train=lora changes an existing model; name it with init", init=None)
    refused(r"train=words needs captions, and condition is 'none'", train="words", condition="none")
    refused(r"prediction is that of a model to start from", train="all", init=None, prediction="v")
    refused(
        r"text.train is off, and a text encoder with random weights",
        "all",
        init=None,
        text=CaptionConfig(train="off"),
    )
    refused(r"add --word.name '<toy>'", train="words", word=WordConfig(like="toy"))
    refused(r"add --word.like toy", train="words", word=WordConfig(name="<toy>"))
    refused(
        r"'toy' is in the vocabulary already; choose", train="words", word=WordConfig(name="toy", like="cat")
    )
    refused(r"has brackets or backslashes", train="words", word=WordConfig(name="(toy)", like="toy"))
    refused(
        r"has 11 vectors, which must be from 1 to 10",
        "words",
        word=WordConfig(name="<a>", like="a", vectors=11),
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(empty / f"{i}.png")
    refused(r"has no captions, and --condition text needs them", data=str(empty))


@pytest.fixture(scope="session")
def first_stages(tmp_path_factory):
    """Files of other models: an autoencoder, an inpainting model, and one with a DiT."""
    folder = tmp_path_factory.mktemp("others")
    torch.manual_seed(0)
    dit = DiTConfig(
        latent_size=(8, 8), patch_size=2, embed_dim=8, depth=1, num_heads=2, mlp_ratio=2.0, context_dim=8
    )
    configs = {
        "inpainting": replace(SD, network=replace(SD.network, in_channels=9), concat="mask+masked_image"),
        "dit": replace(SD, network=dit),
    }
    net = filled(SD)
    tp.save(net.autoencoder, folder / "stage.safetensors")
    for name, config in configs.items():
        tp.save(filled(config), folder / f"{name}.safetensors")
    return [folder / f"{name}.safetensors" for name in ("stage", *configs)]


COLORS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 50, 220)}


def squares(folder, colors, caption):
    """Six noisy squares of each color, with captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in colors:
        for i in range(6):
            pixels = np.clip(np.array(COLORS[name]) + rng.normal(0, 8, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{i}.png")
            (folder / f"{name}{i}.txt").write_text(caption.format(name))
    return str(folder)


@pytest.mark.slow
def test_a_word_and_a_lora_generate_what_they_were_trained_on(tmp_path):
    """A model is trained on three colors with their names. Fine-tuned on red images, a word initialized from blue gives
    red, and with a LoRA so does blue; without it, blue is blue."""
    torch.manual_seed(0)
    stage = filled(SD).autoencoder
    colors = torch.tensor(list(COLORS.values())).div(127.5).sub(1)[:, :, None, None]
    images = (colors.repeat_interleave(8, 0) + 0.06 * torch.randn(24, 3, 16, 16)).clamp(-1, 1)
    optimizer = torch.optim.Adam(stage.parameters(), lr=3e-3)
    for _ in range(150):
        mean, logvar = stage.posterior(images)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        loss = (stage.render(z) - images).abs().mean() + 1e-4 * (mean**2 + logvar.exp() - logvar).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        mean = stage.posterior(images)[0]
    stage.config = replace(stage.config, scale=1 / mean.std().item(), shift=mean.mean().item())
    tp.save(stage, tmp_path / "stage.safetensors")
    encoder = TextEncoder(replace(SD.text_encoder, embed_dim=32))
    torch.nn.init.normal_(encoder.tokens.weight, std=0.2)  # embeddings that are far apart
    tp.save(encoder, tmp_path / "clip.safetensors")
    common = {
        "samples": SamplesConfig(num_images=0),
        "drop_condition": 0.0,
        "augment": replace(FLIP_ONLY, flip=0.0),
        "loading": DataConfig(batch_size=16, workers=0, eval_fraction=0.1),
    }
    learning = LoopConfig(epochs=300, eval_every=300, precision="fp32", device="cpu")
    base = SecondStageConfig(
        data=squares(tmp_path / "all", COLORS, "a {} square"),
        first_stage=str(tmp_path / "stage.safetensors"),
        model="unet-emoji",
        model_args=(
            "base_channels=16",
            "channel_multipliers=[1,2]",
            "num_res_blocks=1",
            "attention_downsample_factors=[1,2]",
            "norm_groups=8",
            "head_dim=8",
        ),
        text=CaptionConfig(encoder=str(tmp_path / "clip.safetensors")),
        process=ProcessConfig(schedule="flow", prediction="flow"),
        optim=OptimConfig(lr=3e-3),
        loop=replace(learning, epochs=400, eval_every=400, ema=0.98),
        **common,
    )
    run(base, tmp_path / "base")
    tuned = SecondStageConfig(
        data=squares(tmp_path / "red", ["red"], "a blue square"),
        init=str(tmp_path / "base"),
        train="lora",
        lora=LoraConfig(rank=4, alpha=4.0),
        optim=OptimConfig(lr=1e-2, weight_decay=0.0),
        loop=replace(learning, epochs=200, eval_every=200),
        **{**common, "loading": replace(common["loading"], batch_size=5)},
    )
    run(tuned, tmp_path / "lora")
    word = WordConfig(name="<mine>", like="blue", templates=("a {} square",))
    run(replace(tuned, train="words", word=word), tmp_path / "word")
    pipe = tp.DiffusionPipeline(tmp_path / "base", dtype="fp32")

    def nearest_colors(prompt, **options):
        """Return the color that each of three images is nearest to."""
        images_of_prompt = pipe.text_to_image(
            prompt, num_steps=10, guidance_scale=1.0, num_images=3, progress=False, **options
        )
        means = [np.asarray(image).reshape(-1, 3).mean(0) for image in images_of_prompt]
        return [min(COLORS, key=lambda name: np.abs(mean - COLORS[name]).sum()) for mean in means]

    for name in COLORS:
        assert nearest_colors(f"a {name} square") == [name] * 3
    assert nearest_colors("a blue square", loras={tmp_path / "lora" / "lora.safetensors": 1.0}) == ["red"] * 3
    assert (
        nearest_colors("a <mine> square", embeddings={"<mine>": tmp_path / "word" / "word.safetensors"})
        == ["red"] * 3
    )
