"""timm's and Facebook's names against slow networks written from the names alone."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from triptych.errors import CheckpointError
from triptych.weights import export, inspect, load

pytestmark = pytest.mark.proves(
    "Checkpoints",
    "ViT: DeiT, DeiT III, DINO, DINOv2, DINOv3 and MAE, the authors' files",
    by="names",
    writes=True,
)

D, HIDDEN, DEPTH, P, CLASSES = 64, 96, 2, 8, 5
HEADS = 1  # the convention for a width of 64


def fill(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}


def linear(name: str, out: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}


def norm(name: str, width: int = D) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def blocks(
    scale: str = "", mlp: str = "fc", bias: str = "qkv", qk_norm: bool = False
) -> dict[str, tuple[int, ...]]:
    names: dict[str, tuple[int, ...]] = {}
    for i in range(DEPTH):
        b = f"blocks.{i}."
        names |= norm(b + "norm1") | norm(b + "norm2") | linear(b + "attn.proj", D, D)
        names[b + "attn.qkv.weight"] = (3 * D, D)
        if bias in ("qkv", "masked"):
            names[b + "attn.qkv.bias"] = (3 * D,)
        if bias == "qv":
            names |= {b + "attn.q_bias": (D,), b + "attn.v_bias": (D,)}
        if qk_norm:
            names |= norm(b + "attn.q_norm", D // HEADS) | norm(b + "attn.k_norm", D // HEADS)
        names |= {b + scale.format(n): (D,) for n in (1, 2)} if scale else {}
        if mlp == "fc":
            names |= linear(b + "mlp.fc1", HIDDEN, D) | linear(b + "mlp.fc2", D, HIDDEN)
        elif mlp in ("packed", "w12"):
            both, down = ("fc1", "fc2") if mlp == "packed" else ("w12", "w3")
            names |= linear(f"{b}mlp.{both}", 2 * HIDDEN, D) | linear(f"{b}mlp.{down}", D, HIDDEN)
        else:
            gate, up, down = ("fc1_g", "fc1_x", "fc2") if mlp == "split" else ("w1", "w2", "w3")
            names |= linear(f"{b}mlp.{gate}", HIDDEN, D) | linear(f"{b}mlp.{up}", HIDDEN, D)
            names |= linear(f"{b}mlp.{down}", D, HIDDEN)
    return names


def base(positions: int | None, **options) -> dict[str, tuple[int, ...]]:
    names: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (D, 3, P, P),
        "patch_embed.proj.bias": (D,),
    }
    if positions:
        names["pos_embed"] = (1, positions, D)
    return names | blocks(**options)


CLS: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, D)}
HEAD = linear("head", CLASSES, D)
POOL = (
    {"attn_pool.latent": (1, 1, D)}
    | linear("attn_pool.q", D, D)
    | linear("attn_pool.kv", 2 * D, D)
    | linear("attn_pool.proj", D, D)
    | norm("attn_pool.norm")
    | linear("attn_pool.mlp.fc1", HIDDEN, D)
    | linear("attn_pool.mlp.fc2", D, HIDDEN)
)
V3 = {"scale": "ls{}.gamma", "bias": "masked"}
#      name: (the format it is detected as, names and shapes of the published layout, GELU of its blocks)
LAYOUTS = {
    "timm vit": ("timm", base(17) | CLS | norm("norm") | HEAD),
    "timm headless (MAE, DINO)": ("timm", base(17) | CLS | norm("norm")),
    "timm gap with fc_norm": ("timm", base(16) | norm("fc_norm") | HEAD),
    "timm gap with registers": (
        "timm",
        base(16, scale="ls{}.gamma") | {"reg_token": (1, 4, D)} | norm("fc_norm") | HEAD,
    ),
    "timm gap, norm before pooling": ("timm", base(16) | norm("norm") | HEAD),
    "timm siglip": ("timm", base(16) | norm("norm") | POOL),
    "timm clip (pre-norm, no patch bias)": (
        "timm",
        {k: v for k, v in base(17).items() if k != "patch_embed.proj.bias"}
        | CLS
        | norm("norm_pre")
        | norm("norm")
        | HEAD,
    ),
    "timm qk-norm": ("timm", base(17, qk_norm=True) | CLS | norm("norm") | HEAD),
    "timm dinov2 giant with registers": (
        "timm",
        base(16, scale="ls{}.gamma", mlp="packed") | CLS | {"reg_token": (1, 4, D)} | norm("norm"),
    ),
    "timm dinov3": (
        "timm",
        base(None, scale="gamma_{}", bias="none") | CLS | {"reg_token": (1, 4, D)} | norm("norm"),
    ),
    "timm dinov3 huge, q and v biases": (
        "timm",
        base(None, scale="gamma_{}", bias="qv", mlp="split") | CLS | {"reg_token": (1, 4, D)} | norm("norm"),
    ),
    "deit": ("timm", base(17) | CLS | norm("norm") | HEAD),
    "deit distilled": (
        "timm",
        base(18) | CLS | {"dist_token": (1, 1, D)} | norm("norm") | HEAD | linear("head_dist", CLASSES, D),
    ),
    "deit-iii": ("deit", base(16, scale="gamma_{}") | CLS | norm("norm") | HEAD),
    "deit-iii in timm": ("timm", base(16, scale="ls{}.gamma") | CLS | norm("norm") | HEAD),
    "dinov2": ("dinov2", base(17, scale="ls{}.gamma") | CLS | {"mask_token": (1, D)} | norm("norm")),
    "dinov2 giant with registers": (
        "dinov2",
        base(17, scale="ls{}.gamma", mlp="w12")
        | CLS
        | {"mask_token": (1, D), "register_tokens": (1, 4, D)}
        | norm("norm"),
    ),
    "dinov3": (
        "dinov3",
        base(None, **V3) | CLS | {"mask_token": (1, D), "storage_tokens": (1, 4, D)} | norm("norm"),
    ),
    "dinov3 huge": (
        "dinov3",
        base(None, mlp="w123", **V3)
        | CLS
        | {"mask_token": (1, D), "storage_tokens": (1, 4, D)}
        | norm("norm"),
    ),
}


def tensors(layout: str) -> dict[str, torch.Tensor]:
    w = fill(LAYOUTS[layout][1])
    if layout.startswith("dinov3"):
        w["rope_embed.periods"] = torch.rand(D // 4)
        for i in range(DEPTH):
            w[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([torch.ones(D), torch.zeros(D), torch.ones(D)])
            # The keys' third is whatever training left there; the mask takes it out.
    return w


# ----------------------------------------------------------------------------------- the slow network


def rotate(x, rows, columns, prefix):
    """DINOv3's rotary positions, one token and one pair of channels at a time."""
    x = x.clone()
    d = x.shape[-1]
    for token in range(rows * columns):
        center = (2 * (token // columns + 0.5) / rows - 1, 2 * (token % columns + 0.5) / columns - 1)
        for c in range(d // 2):
            axis, number = divmod(c, d // 4)
            angle = 2 * math.pi * center[axis] / 100 ** (number * 4 / d)
            a, b = x[..., prefix + token, c].clone(), x[..., prefix + token, c + d // 2].clone()
            x[..., prefix + token, c] = a * math.cos(angle) - b * math.sin(angle)
            x[..., prefix + token, c + d // 2] = b * math.cos(angle) + a * math.sin(angle)
    return x


def attend(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1) @ v


def ln(x, w, name, eps):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def dense(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def feed(x, w, b):
    if f"{b}fc1_g.weight" in w or f"{b}w1.weight" in w:
        gate, up, down = ("fc1_g", "fc1_x", "fc2") if f"{b}fc2.weight" in w else ("w1", "w2", "w3")
        return dense(F.silu(dense(x, w, b + gate)) * dense(x, w, b + up), w, b + down)
    both, down = ("w12", "w3") if f"{b}w12.weight" in w else ("fc1", "fc2")
    y = dense(x, w, b + both)
    if y.shape[-1] == 2 * w[f"{b}{down}.weight"].shape[1]:
        gate, up = y.chunk(2, dim=-1)
        return dense(F.silu(gate) * up, w, b + down)
    return dense(F.gelu(y), w, b + down)


def forward(w: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    w = {name: t.double() for name, t in w.items()}
    x = F.conv2d(images.double(), w["patch_embed.proj.weight"], w.get("patch_embed.proj.bias"), stride=P)
    rows, columns = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2)
    lead = [w[name].expand(len(x), -1, -1) for name in ("cls_token", "dist_token") if name in w]
    if "pos_embed" in w and w["pos_embed"].shape[1] == rows * columns:
        x = x + w["pos_embed"]
        x = torch.cat([*lead, x], dim=1)
    else:
        x = torch.cat([*lead, x], dim=1)
        x = x + w["pos_embed"] if "pos_embed" in w else x
    extra = next((w[n] for n in ("reg_token", "register_tokens", "storage_tokens") if n in w), None)
    if extra is not None:
        x = torch.cat([x[:, : len(lead)], extra.expand(len(x), -1, -1), x[:, len(lead) :]], dim=1)
    prefix = x.shape[1] - rows * columns
    rotary, eps = "pos_embed" not in w, 1e-6
    if rotary or "norm_pre.weight" in w:
        eps = 1e-5
    if "norm_pre.weight" in w:
        x = ln(x, w, "norm_pre", eps)
    for i in range(DEPTH):
        b = f"blocks.{i}."
        y = ln(x, w, b + "norm1", eps) @ w[b + "attn.qkv.weight"].T
        if b + "attn.qkv.bias_mask" in w:
            y = y + w[b + "attn.qkv.bias"] * w[b + "attn.qkv.bias_mask"]
        elif b + "attn.qkv.bias" in w:
            y = y + w[b + "attn.qkv.bias"]
        q, k, v = y.chunk(3, dim=-1)
        if b + "attn.q_bias" in w:
            q, v = q + w[b + "attn.q_bias"], v + w[b + "attn.v_bias"]
        if b + "attn.q_norm.weight" in w:
            q, k = ln(q, w, b + "attn.q_norm", eps), ln(k, w, b + "attn.k_norm", eps)
        if rotary:
            q, k = rotate(q, rows, columns, prefix), rotate(k, rows, columns, prefix)
        gains = [next((w[n] for n in (f"{b}ls{j}.gamma", f"{b}gamma_{j}") if n in w), 1.0) for j in (1, 2)]
        x = x + gains[0] * dense(attend(q, k, v), w, b + "attn.proj")
        x = x + gains[1] * feed(ln(x, w, b + "norm2", eps), w, b + "mlp.")
    if "norm.weight" in w:
        x = ln(x, w, "norm", eps)
    if "attn_pool.latent" in w:
        k, v = dense(x, w, "attn_pool.kv").chunk(2, dim=-1)
        y = dense(attend(dense(w["attn_pool.latent"], w, "attn_pool.q"), k, v), w, "attn_pool.proj")
        y = (y + feed(ln(y, w, "attn_pool.norm", eps), w, "attn_pool.mlp."))[:, 0]
    elif "dist_token" in w:
        return (dense(x[:, 0], w, "head") + dense(x[:, 1], w, "head_dist")) / 2
    else:
        timms_dinov3 = "pos_embed" not in w and "reg_token" in w  # timm pools it by the mean
        y = x[:, 0] if "cls_token" in w and not timms_dinov3 else x[:, prefix:].mean(1)
    if "fc_norm.weight" in w:
        y = ln(y, w, "fc_norm", eps)
    return dense(y, w, "head") if "head.weight" in w else y


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_with_the_slow_network(tmp_path, layout):
    w = tensors(layout)
    torch.save(w, tmp_path / "net.pth")
    assert inspect(tmp_path / "net.pth")["format"] == LAYOUTS[layout][0]
    size = (16, 40) if layout.startswith("dinov3") else (32, 32)
    net, images = load(tmp_path / "net.pth"), torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(net(images).double(), forward(w, images), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("layout", "resampling"),
    [
        ("timm headless (MAE, DINO)", "dino"),
        ("dinov2", "dino"),
        ("dinov2 giant with registers", "antialiased"),
        ("deit-iii", "bicubic"),
    ],
)
@pytest.mark.parametrize("size", [(24, 40), (64, 48)])
def test_positions_are_resampled_as_by_the_authors(tmp_path, layout, resampling, size):
    """DINO and DINOv2 by a scale of (new + 0.1) / old, with registers antialiased; DeiT III by size."""
    w = tensors(layout)
    torch.save(w, tmp_path / "net.pth")
    rows, columns = size[0] // P, size[1] // P
    grid = w["pos_embed"][:, -16:].reshape(1, 4, 4, D).permute(0, 3, 1, 2)
    if resampling == "dino":
        scale = ((rows + 0.1) / 4, (columns + 0.1) / 4)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    else:
        grid = F.interpolate(
            grid, size=(rows, columns), mode="bicubic", antialias=resampling == "antialiased"
        )
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2)
    state = w | {"pos_embed": torch.cat([w["pos_embed"][:, :-16], grid], dim=1)}
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        result = load(tmp_path / "net.pth")(images).double()
        torch.testing.assert_close(result, forward(state, images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("wrapper", [None, "model"])
def test_a_linear_probe_of_mae(tmp_path, wrapper):
    """Its head is nn.Sequential(BatchNorm1d(affine=False, eps=1e-6), Linear), as in main_linprobe.py."""
    w = fill(base(17) | CLS | norm("norm"))
    head = torch.nn.Sequential(torch.nn.BatchNorm1d(D, affine=False, eps=1e-6), torch.nn.Linear(D, CLASSES))
    head[0].running_mean.normal_()
    head[0].running_var.uniform_(1e-6, 2)
    state = w | {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "net.pth")
    net, images = load(tmp_path / "net.pth"), torch.randn(2, 3, 32, 32)
    assert net.config.num_classes == CLASSES
    with torch.no_grad():
        expected = head.double().eval()(forward(w, images))
        torch.testing.assert_close(net(images).double(), expected, atol=1e-4, rtol=1e-4)


def test_a_dinov3_of_satellite_images_is_normalized_by_theirs(tmp_path):
    """As timm's pretrained_cfg of the same weights says."""
    timm = pytest.importorskip("timm")
    published = timm.get_pretrained_cfg("vit_large_patch16_dinov3.sat493m")
    torch.save(tensors("dinov3"), tmp_path / "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth")
    card = load(tmp_path / "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth").card
    assert (card.preprocess.mean, card.preprocess.std) == (published.mean, published.std)
    torch.save(tensors("dinov3"), tmp_path / "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth")
    card = load(tmp_path / "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth").card
    assert card.preprocess.mean == timm.get_pretrained_cfg("vit_large_patch16_dinov3.lvd1689m").mean


def test_a_dinov3_without_storage_tokens_is_written(tmp_path, tiny, same_state):
    options = {"position": "rotary", "qkv_bias": "qv", "layer_scale": 1e-5, "norm_eps": 1e-5}
    net = tiny(**options, num_classes=0, num_registers=0)
    export(net, tmp_path / "net.pth", "dinov3")
    assert "storage_tokens" not in torch.load(tmp_path / "net.pth", weights_only=True)
    same_state(net, load(tmp_path / "net.pth"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_back_every_tensor_is_the_same(tmp_path, layout):
    w = tensors(layout)
    torch.save(w, tmp_path / "net.pth")
    export(load(tmp_path / "net.pth"), tmp_path / "back.pth", LAYOUTS[layout][0])
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    back = back.get("model", back)
    for name in back:
        if name == "mask_token":  # not kept; written as zeros
            w[name] = torch.zeros_like(w[name])
        if name.endswith("qkv.bias") and layout.startswith("dinov3"):
            w[name][D : 2 * D] = 0  # under the mask
    w.pop("rope_embed.periods", None)
    back.pop("rope_embed.periods", None)  # see test_dinov3_is_written_with_its_periods
    assert set(back) == set(w)
    for name, tensor in w.items():
        assert torch.equal(back[name], tensor), name


def test_deit_publishes_under_model(tmp_path, tiny):
    export(tiny(layer_scale=0.1, prefix_positions=False), tmp_path / "net.pth", "deit")
    assert list(torch.load(tmp_path / "net.pth", weights_only=True)) == ["model"]
    message = inspect(tmp_path / "net.pth")
    assert message["notes"] == ["weights taken from 'model'"]
    assert "ImageNet's mean and std" in message["facts"]["preprocess"]


# -------------------------------------------------------------------------------------------------- timm's JSON


def timm_folder(folder, w, **config):
    torch.save(w, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_timms_config_is_heeded(tmp_path):
    cfg = {
        "input_size": [3, 32, 32],
        "crop_pct": 0.95,
        "crop_mode": "squash",
        "interpolation": "bilinear",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "license": "apache-2.0",
    }
    timm_folder(
        tmp_path,
        tensors("timm vit"),
        architecture="vit_base_patch16_224",
        pretrained_cfg=cfg,
        global_pool="avg",
        model_args={"num_heads": 4, "fc_norm": False},
        label_names=["a", "b", "c", "d", "e"],
        label_descriptions={"a": "an apple"},
    )
    net = load(tmp_path)
    assert (net.config.num_heads, net.config.pool) == (4, "mean")
    preprocess = net.card.preprocess
    assert (preprocess.crop, preprocess.mode, preprocess.interpolation) == (0.95, "squash", "bilinear")
    assert (preprocess.mean, preprocess.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert net.card.classes == ("an apple", "b", "c", "d", "e")
    assert net.card.license == "apache-2.0"


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"architecture": "vit_base_patch16_rpn_224"}, "norms after the branches"),
        ({"architecture": "x", "model_args": {"act_layer": "relu"}}, "act_layer 'relu'"),
        ({"architecture": "x", "global_pool": "avgmax"}, "global_pool 'avgmax'"),
        ({"architecture": "x", "model_args": {"img_size": 64}}, "does not have the"),
        ({"architecture": "x", "model_args": 3}, "config.json is damaged"),
        ({"architecture": "x", "pretrained_cfg": {"input_size": "big"}}, "config.json is damaged"),
    ],
)
def test_timm_configs_that_do_not_fit(tmp_path, config, part):
    with pytest.raises(CheckpointError, match=part):
        load(timm_folder(tmp_path, tensors("timm vit"), **config))


def test_siglips_activation_follows_the_architecture(tmp_path):
    w = tensors("timm siglip")
    assert load(timm_folder(tmp_path, w, architecture="vit_base_patch16_siglip_224")).config.mlp == "gelu"
    assert (
        load(timm_folder(tmp_path, w, architecture="vit_so400m_patch16_siglip_256")).config.mlp == "gelu_tanh"
    )


def test_a_rectangular_timm_network(tmp_path, tiny, same_state):
    net = tiny(image_size=(24, 40))
    export(net, tmp_path, "timm")
    back = load(tmp_path)
    same_state(net, back)
    assert back.config == net.config


def test_registers_beside_a_placed_class_token_are_refused_by_timm(tmp_path, tiny):
    with pytest.raises(CheckpointError, match="timm cannot store registers beside a class token"):
        export(tiny(num_registers=4, layer_scale=0.1), tmp_path / "x", "timm")


def test_dinov3_is_written_with_its_periods(tmp_path, tiny):
    """As its authors' RopePositionEmbedding computes them, in facebookresearch/dinov3."""
    options = {
        "position": "rotary",
        "num_registers": 4,
        "qkv_bias": "qv",
        "layer_scale": 1e-5,
        "norm_eps": 1e-5,
    }
    export(tiny(**options, num_classes=0), tmp_path / "net.pth", "dinov3")
    state = torch.load(tmp_path / "net.pth", weights_only=True)
    exponents = [2 * i / 32 for i in range(16)]  # heads of 64 channels
    torch.testing.assert_close(state["rope_embed.periods"], torch.tensor([100.0**e for e in exponents]))
    assert state["rope_embed.periods"].dtype == torch.float32


def test_dinos_bare_backbone_has_imagenets_preprocessing(tmp_path, tiny):
    export(tiny(num_classes=0), tmp_path / "timm.pth", "timm")
    preprocess = load(tmp_path / "timm.pth").card.preprocess
    assert (preprocess.mean[0], preprocess.crop) == (0.485, 0.875)
