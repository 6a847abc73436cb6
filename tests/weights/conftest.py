"""What the tests of checkpoints share: small networks with random weights everywhere, biases and norms too."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from triptych.heads.config import HeadConfig, SegmenterConfig
from triptych.models.configs import latent_diffusion as latent_diffusion_config
from triptych.models.configs.dit import DiTConfig
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.configs.swin import SwinConfig, windows_of
from triptych.models.configs.text import ClassTokenConfig
from triptych.models.configs.vit import ViTConfig
from triptych.models.registry import build
from triptych.weights.mapping import families


@pytest.fixture
def tiny():
    """Makes a small ViT from changes to a small config."""

    def make(**changes) -> nn.Module:
        torch.manual_seed(0)
        small = {"image_size": (32, 32), "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
        config = ViTConfig(**{**small, "mlp_ratio": 1.5, "num_classes": 5, **changes})
        return randomize(build(config))

    return make


def small_swin(**changes) -> SwinConfig:
    """Maps of 16, 8 and 4 cells, so that the last is one window, as in the published networks."""
    small = {"image_size": (64, 64), "embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 4, 4)}
    small = {**small, "window_size": 4, "num_classes": 5, **changes}
    if small.get("version") == 2:
        small = {"qkv_bias": "qv", **small}
    small["window_size"] = windows_of(small["window_size"], len(small["depths"]))
    return SwinConfig(**small)


@pytest.fixture
def tiny_swin():
    """Makes a small Swin from changes to a small config; `window` may be one number."""

    def make(**changes) -> nn.Module:
        torch.manual_seed(0)
        return randomize(build(small_swin(**changes)))

    return make


@pytest.fixture
def tiny_segmenter():
    """Makes a small segmenter from changes to its head, on a small Swin."""

    def make(backbone=None, **changes) -> nn.Module:
        torch.manual_seed(0)
        sizes = {"image_size": (128, 128), "depths": (2, 2, 1, 1), "num_heads": (2, 4, 4, 4)}
        backbone = backbone or small_swin(num_classes=0, map_norms=True, **sizes)
        head = HeadConfig(**{"num_classes": 5, "channels": 8, "aux_channels": 6, **changes})
        return randomize(families.build(SegmenterConfig(backbone=backbone, head=head)))

    return make


@pytest.fixture
def scramble():
    """Gives every parameter of a network random numbers, and batch norms random statistics."""
    return randomize


def randomize(net: nn.Module) -> nn.Module:
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(std=0.2)
            part.running_var.uniform_(0.5, 2.0)
            part.num_batches_tracked.fill_(7)
    return net.eval()


@pytest.fixture
def same_state():
    """Asserts that two networks hold the same tensors under the same names, bit for bit."""

    def check(a: nn.Module, b: nn.Module) -> None:
        left, right = a.state_dict(), b.state_dict()
        assert list(left) == list(right)
        for name in left:
            assert left[name].dtype == right[name].dtype
            assert torch.equal(left[name], right[name]), name

    return check


@pytest.fixture
def hollow_file():
    """Writes a safetensors file of a network's names and shapes, all zeros, that takes no space on disk."""

    def write(net: nn.Module, path) -> None:
        header, offset = {}, 0
        for name, tensor in net.state_dict().items():
            floating = tensor.is_floating_point()
            size = tensor.numel() * (4 if floating else 8)
            header[name] = {
                "dtype": "F32" if floating else "I64",
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)

    return write


# ------------------------------------------------------------------------------------ Swin, window by window, slowly


@pytest.fixture
def slow_swin():
    """Swin in fp64 from tensors under its own code's names: logits, the pooled map, or normed maps (`norm0`, ...)."""
    return forward


def forward(w, images, windows, before=None, unfold=False, single=False):
    """
    Args:
        windows: side of each stage's.
        before: sides in pre-training, for the scale of version 2's coordinates.
        unfold: whether patches are merged by F.unfold.
        single: whether a map that is one window is shifted, too.
    """
    w = {name: t.double() for name, t in w.items()}
    patch = w["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(images.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)
    x, maps = norm(x.permute(0, 2, 3, 1), w, "patch_embed.norm"), []
    for stage, side in enumerate(windows):
        index = 0
        while f"layers.{stage}.blocks.{index}.norm1.weight" in w:
            x = block(
                x, w, f"layers.{stage}.blocks.{index}.", side, index % 2, (before or windows)[stage], single
            )
            index += 1
        maps.append(norm(x, w, f"norm{stage}").permute(0, 3, 1, 2) if f"norm{stage}.weight" in w else x)
        if f"layers.{stage}.downsample.reduction.weight" in w:
            x = merge(x, w, f"layers.{stage}.downsample", unfold)
    if "norm.weight" not in w:
        return maps
    y = norm(x, w, "norm").mean((1, 2))
    return y @ w["head.weight"].T + w["head.bias"] if "head.weight" in w else y


def norm(x, w, name):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def merge(x, w, name, unfold):
    if unfold:
        x = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).unflatten(2, (x.shape[1] // 2, x.shape[2] // 2))
        x = x.permute(0, 2, 3, 1)
    else:
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
    first = w[f"{name}.norm.weight"].shape[0] == x.shape[-1]
    x = norm(x, w, f"{name}.norm") if first else x
    x = x @ w[f"{name}.reduction.weight"].T
    return x if first else norm(x, w, f"{name}.norm")


def block(x, w, b, side, odd, before, single):
    dense = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]  # noqa: E731
    mlp = lambda x: dense(F.gelu(dense(x, b + "mlp.fc1")), b + "mlp.fc2")  # noqa: E731
    if b + "attn.logit_scale" not in w:
        x = x + attend(norm(x, w, b + "norm1"), w, b + "attn.", side, odd, before, single)
        return x + mlp(norm(x, w, b + "norm2"))
    x = x + norm(attend(x, w, b + "attn.", side, odd, before, single), w, b + "norm1")
    return x + norm(mlp(x), w, b + "norm2")


def attend(x, w, a, side, odd, before, single):
    height, width = x.shape[1], x.shape[2]
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    rows, columns = x.shape[1] // side, x.shape[2] // side
    shift = [side // 2 if odd and (n > 1 or single) else 0 for n in (rows, columns)]
    x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
    out = torch.empty_like(x)
    for row in range(rows):
        for column in range(columns):
            at = (
                slice(None),
                slice(row * side, row * side + side),
                slice(column * side, column * side + side),
            )
            # A cell came round if it was rolled over the edge: such see each other only.
            y = torch.arange(side).add(row * side) >= x.shape[1] - shift[0]
            z = torch.arange(side).add(column * side) >= x.shape[2] - shift[1]
            region = (2 * y[:, None] + z[None]).flatten()
            cells = one_window(x[at].flatten(1, 2), w, a, side, before, region[:, None] == region[None])
            out[at] = cells.unflatten(1, (side, side))
    return torch.roll(out, shift, (1, 2))[:, :height, :width]


def one_window(x, w, a, side, before, seen):
    qkv = x @ w[a + "qkv.weight"].T
    if a + "qkv.bias" in w:
        qkv = qkv + w[a + "qkv.bias"]
    q, k, v = qkv.chunk(3, dim=-1)
    if a + "q_bias" in w:
        q, v = q + w[a + "q_bias"], v + w[a + "v_bias"]
    cosine = a + "logit_scale" in w
    heads = w[a + "logit_scale"].shape[0] if cosine else w[a + "relative_position_bias_table"].shape[1]
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    y, z = (c.flatten() for c in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    dy, dx = y[:, None] - y[None], z[:, None] - z[None]
    if cosine:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scores = q @ k.transpose(-1, -2) * w[a + "logit_scale"].clamp(max=math.log(100)).exp()
        d = torch.stack([dy, dx], -1).double() * 8 / max(before - 1, 1)
        d = d.sign() * (d.abs() + 1).log2() / 3
        hidden = F.relu(d @ w[a + "cpb_mlp.0.weight"].T + w[a + "cpb_mlp.0.bias"])
        bias = 16 * torch.sigmoid(hidden @ w[a + "cpb_mlp.2.weight"].T)
    else:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        bias = w[a + "relative_position_bias_table"][(dy + side - 1) * (2 * side - 1) + dx + side - 1]
    scores = (scores + bias.permute(2, 0, 1)).masked_fill(~seen, -math.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return y @ w[a + "proj.weight"].T + w[a + "proj.bias"]


# ------------------------------------------------------------------------------------------- latent diffusion


def small_ldm(name: str) -> LatentDiffusionConfig:
    """A published latent diffusion model's twin: its form, at sizes of a few thousand parameters a layer."""
    config = latent_diffusion_config.SIZES[name]
    unet, stage, text = config.network, config.autoencoder, config.text_encoder
    width = 0 if text is None else 24
    sizes = {
        "context_dim": width,
        "num_classes": min(unet.num_classes, 20),
        "latent_size": (16, 16),
    }
    if isinstance(unet, DiTConfig):
        unet = replace(unet, embed_dim=24, depth=1, num_heads=2, **sizes)
    else:
        unet = replace(
            unet,
            base_channels=16,
            num_res_blocks=1,
            norm_groups=16,
            head_dim=8 if unet.head_dim else 0,
            **sizes,
        )
    codes = min(stage.codebook_size, 20)
    stage = replace(
        stage,
        base_channels=16,
        norm_groups=16,
        num_res_blocks=1,
        codebook_size=codes,
        image_size=(16 * stage.downsample_factor,) * 2,
    )
    if isinstance(text, ClassTokenConfig):
        text = replace(text, num_classes=6, embed_dim=width)
    elif text is not None:
        pad = min(text.pad_token, 59)
        text = replace(
            text,
            embed_dim=width,
            depth=2,
            num_heads=2,
            vocab_size=60,
            mlp_ratio=1.0,
            max_length=9,
            pad_token=pad,
        )
    return replace(config, network=unet, autoencoder=stage, text_encoder=text)


@pytest.fixture
def tiny_ldm(build_tiny):
    """As `build_tiny`, which a fixture of a wider scope can use."""
    return build_tiny


@pytest.fixture(scope="session")
def build_tiny():
    """Makes the small twin of a published latent diffusion model, with random weights everywhere."""

    def make(name: str, **changes) -> nn.Module:
        torch.manual_seed(0)
        with torch.device("meta"):
            net = families.build(replace(small_ldm(name), **changes))
        return randomize(net.to_empty(device="cpu"))

    return make
