"""Google's .npz against a slow network written from the names alone, in NumPy and in float64."""

import json
import math

import numpy as np
import pytest
import torch

from triptych.errors import CheckpointError
from triptych.weights import export, inspect, load

pytestmark = pytest.mark.proves("Checkpoints", "ViT: Google's and big_vision's .npz", by="names", writes=True)

D, HEADS, HIDDEN, DEPTH, P, CLASSES = 32, 4, 48, 3, 8, 5
RNG = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return RNG.normal(0, 0.3, shape).astype(np.float32)


def block_names(attention: str, norm2: str, mlp: str) -> dict[str, tuple[int, ...]]:
    """A block's names and shapes as published."""
    names: dict[str, tuple[int, ...]] = {}
    for norm in ("LayerNorm_0", norm2):
        names |= {f"{norm}/scale": (D,), f"{norm}/bias": (D,)}
    for part in ("query", "key", "value"):
        names |= {
            f"{attention}/{part}/kernel": (D, HEADS, D // HEADS),
            f"{attention}/{part}/bias": (HEADS, D // HEADS),
        }
    names |= {f"{attention}/out/kernel": (HEADS, D // HEADS, D), f"{attention}/out/bias": (D,)}
    names |= {f"{mlp}/Dense_0/kernel": (D, HIDDEN), f"{mlp}/Dense_0/bias": (HIDDEN,)}
    return names | {f"{mlp}/Dense_1/kernel": (HIDDEN, D), f"{mlp}/Dense_1/bias": (D,)}


PAPER_BLOCK = ("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
BIG_BLOCK = ("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")


def encoder(parts, stacked: bool = False) -> dict[str, tuple[int, ...]]:
    names = {"Transformer/encoder_norm/scale": (D,), "Transformer/encoder_norm/bias": (D,)}
    for name, shape in block_names(*parts).items():
        if stacked:
            names[f"Transformer/encoderblock/{name}"] = (DEPTH, *shape)
        else:
            names |= {f"Transformer/encoderblock_{i}/{name}": shape for i in range(DEPTH)}
    return names


def head(rep: int | None = None) -> dict[str, tuple[int, ...]]:
    names = {"head/kernel": (rep or D, CLASSES), "head/bias": (CLASSES,)}
    return names | ({"pre_logits/kernel": (D, rep), "pre_logits/bias": (rep,)} if rep else {})


def paper(rep: int | None = None, tokens: int = 17) -> dict[str, np.ndarray]:
    names = {
        "cls": (1, 1, D),
        "embedding/kernel": (P, P, 3, D),
        "embedding/bias": (D,),
        "Transformer/posembed_input/pos_embedding": (1, tokens, D),
        **encoder(PAPER_BLOCK),
        **head(rep),
    }
    return {name: random(*shape) for name, shape in names.items()}


def big_vision(
    pool: str, posemb: str, stacked: bool = False, rep: int | None = None
) -> dict[str, np.ndarray]:
    names = {
        "embedding/kernel": (P, P, 3, D),
        "embedding/bias": (D,),
        **encoder(BIG_BLOCK, stacked),
        **head(rep),
    }
    if posemb == "learn":
        names["pos_embedding"] = (1, 16, D)
    if pool == "tok":
        names["cls"] = (1, 1, D)
    if pool == "map":
        inner = block_names(*BIG_BLOCK)
        inner = {k.replace("LayerNorm_1", "LayerNorm_0"): v for k, v in inner.items()}
        names |= {f"MAPHead_0/{name}": shape for name, shape in inner.items()} | {
            "MAPHead_0/probe": (1, 1, D)
        }
    return {f"params/{name}": random(*shape) for name, shape in names.items()}


# ------------------------------------------------------------------------------------- the slow network


def layer_norm(x, w, name):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * w[f"{name}/scale"] + w[f"{name}/bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attend(query, x, w, name):
    def project(t, part):
        return np.einsum("bnd,dhk->bnhk", t, w[f"{name}/{part}/kernel"]) + w[f"{name}/{part}/bias"]

    q, k, v = project(query, "query"), project(x, "key"), project(x, "value")
    logits = np.einsum("bqhk,bmhk->bhqm", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bhqm,bmhk->bqhk", weights, v)
    return np.einsum("bqhk,hkd->bqd", mixed, w[f"{name}/out/kernel"]) + w[f"{name}/out/bias"]


def mlp(x, w, name):
    x = gelu(x @ w[f"{name}/Dense_0/kernel"] + w[f"{name}/Dense_0/bias"])
    return x @ w[f"{name}/Dense_1/kernel"] + w[f"{name}/Dense_1/bias"]


def sincos(h, w, width):
    y, x = np.mgrid[:h, :w]
    omega = 1.0 / 10_000 ** (np.arange(width // 4) / (width // 4 - 1))
    y, x = np.outer(y.flatten(), omega), np.outer(x.flatten(), omega)
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)[None]


def conv_same(x, kernel, stride):
    """NHWC, TensorFlow's SAME padding, one output at a time."""
    kh, kw, _, out = kernel.shape
    rows, columns = (-(-side // stride) for side in x.shape[1:3])
    pads = [
        max((n - 1) * stride + k - side, 0)
        for n, k, side in ((rows, kh, x.shape[1]), (columns, kw, x.shape[2]))
    ]
    x = np.pad(x, [(0, 0), *((p // 2, p - p // 2) for p in pads), (0, 0)])
    y = np.zeros((x.shape[0], rows, columns, out))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * stride : i * stride + kh, j * stride : j * stride + kw]
            y[:, i, j] = np.einsum("bhwc,hwco->bo", window, kernel)
    return y


def std_conv(x, kernel, stride=1):
    kernel = kernel - kernel.mean((0, 1, 2))
    return conv_same(x, kernel / (kernel.std((0, 1, 2)) + 1e-5), stride)


def group_norm(x, w, name):
    b, h, wd, c = x.shape
    y = x.reshape(b, h, wd, 32, c // 32)
    y = (y - y.mean((1, 2, 4), keepdims=True)) / np.sqrt(y.var((1, 2, 4), keepdims=True) + 1e-6)
    return y.reshape(x.shape) * w[f"{name}/scale"].flatten() + w[f"{name}/bias"].flatten()


def resnet(x, w):
    x = np.maximum(group_norm(std_conv(x, w["conv_root/kernel"], 2), w, "gn_root"), 0)
    h, wd = x.shape[1:3]
    padded = np.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)], constant_values=-np.inf)
    x = np.max([padded[:, i : i + h : 2, j : j + wd : 2] for i in range(3) for j in range(3)], axis=0)
    stage = 1
    while f"block{stage}/unit1/conv1/kernel" in w:
        unit = 1
        while f"block{stage}/unit{unit}/conv1/kernel" in w:
            name, stride = f"block{stage}/unit{unit}/", 2 if stage > 1 and unit == 1 else 1
            skip = x
            if f"{name}conv_proj/kernel" in w:
                skip = group_norm(std_conv(x, w[f"{name}conv_proj/kernel"], stride), w, f"{name}gn_proj")
            y = np.maximum(group_norm(std_conv(x, w[f"{name}conv1/kernel"]), w, f"{name}gn1"), 0)
            y = np.maximum(group_norm(std_conv(y, w[f"{name}conv2/kernel"], stride), w, f"{name}gn2"), 0)
            x = np.maximum(skip + group_norm(std_conv(y, w[f"{name}conv3/kernel"]), w, f"{name}gn3"), 0)
            unit += 1
        stage += 1
    return x


def forward(w: dict[str, np.ndarray], images: torch.Tensor) -> np.ndarray:
    """Logits of NCHW images, as the two repositories compute them."""
    w = {name.removeprefix("params/"): array.astype(np.float64) for name, array in w.items()}
    x = images.permute(0, 2, 3, 1).double().numpy()
    if "conv_root/kernel" in w:
        x = resnet(x, w)
    kernel = w["embedding/kernel"]
    p = kernel.shape[0]
    b, h, wd, c = x.shape
    x = x.reshape(b, h // p, p, wd // p, p, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * c)
    x = x @ kernel.reshape(p * p * c, -1) + w["embedding/bias"]
    old = any("MlpBlock_3" in name for name in w)
    cls = np.tile(w["cls"], (b, 1, 1)) if "cls" in w else None
    if old:
        x = x if cls is None else np.concatenate([cls, x], axis=1)
        x = x + w["Transformer/posembed_input/pos_embedding"]
    else:
        x = x + w.get("pos_embedding", sincos(h // p, wd // p, x.shape[-1]))
        x = x if cls is None else np.concatenate([cls, x], axis=1)
    attention, norm2, block_mlp = PAPER_BLOCK if old else BIG_BLOCK
    for i in range(DEPTH):
        if any(name.startswith("Transformer/encoderblock/") for name in w):
            layer = {k.split("encoderblock/")[1]: v[i] for k, v in w.items() if "encoderblock/" in k}
        else:
            layer = {k.split(f"_{i}/", 1)[1]: v for k, v in w.items() if f"encoderblock_{i}/" in k}
        y = layer_norm(x, layer, "LayerNorm_0")
        x = x + attend(y, y, layer, attention)
        x = x + mlp(layer_norm(x, layer, norm2), layer, block_mlp)
    x = layer_norm(x, w, "Transformer/encoder_norm")
    if "MAPHead_0/probe" in w:
        y = attend(np.tile(w["MAPHead_0/probe"], (b, 1, 1)), x, w, "MAPHead_0/MultiHeadDotProductAttention_0")
        x = (y + mlp(layer_norm(y, w, "MAPHead_0/LayerNorm_0"), w, "MAPHead_0/MlpBlock_0"))[:, 0]
    else:
        x = x.mean(1) if cls is None else x[:, 0]
    if "pre_logits/kernel" in w:
        x = np.tanh(x @ w["pre_logits/kernel"] + w["pre_logits/bias"])
    return x @ w["head/kernel"] + w["head/bias"]


def hybrid(squeezed: bool = True) -> dict[str, np.ndarray]:
    """A ResNet of a root of 32 channels and stages of 2 and 1 units."""
    w = paper()
    norm = (lambda c: (c,)) if squeezed else (lambda c: (1, 1, 1, c))
    names = {"conv_root/kernel": (7, 7, 3, 32), "gn_root/scale": norm(32), "gn_root/bias": norm(32)}
    channels = 32
    for stage, (units, width) in enumerate(((2, 32), (1, 64)), 1):
        for unit in range(1, units + 1):
            b = f"block{stage}/unit{unit}/"
            parts = [("1", 1, channels, width), ("2", 3, width, width), ("3", 1, width, 4 * width)]
            if unit == 1:
                parts.append(("_proj", 1, channels, 4 * width))
            for part, k, inputs, outputs in parts:
                names[f"{b}conv{part}/kernel"] = (k, k, inputs, outputs)
                names |= {f"{b}gn{part}/{variant}": norm(outputs) for variant in ("scale", "bias")}
            channels = 4 * width
    w |= {name: random(*shape) for name, shape in names.items()}
    return w | {"embedding/kernel": random(1, 1, channels, D)}


CASES = {
    "paper": paper(),
    "paper, tanh head": paper(rep=24),
    "big_vision gap learned": big_vision("gap", "learn"),
    "big_vision gap sincos tanh head": big_vision("gap", "sincos", rep=D),
    "big_vision map": big_vision("map", "learn"),
    "big_vision tok": big_vision("tok", "learn"),
    "big_vision scan gap": big_vision("gap", "sincos", stacked=True),
    "big_vision scan map": big_vision("map", "learn", stacked=True, rep=24),
    "hybrid": hybrid(),
    "hybrid, unsqueezed norms": hybrid(squeezed=False),
}


@pytest.mark.parametrize("case", CASES)
def test_parity_with_the_slow_network(tmp_path, case):
    np.savez(tmp_path / "net.npz", **CASES[case])
    net, images = load(tmp_path / "net.npz"), torch.randn(2, 3, 32, 32)
    if "sincos" not in case and "scan gap" not in case:  # nothing stored tells those of a size
        assert net.config.image_size == (32, 32)
    with torch.no_grad():
        got = net(images).double().numpy()
    np.testing.assert_allclose(got, forward(CASES[case], images), atol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if "scan" not in case and "unsqueezed" not in case])
def test_written_back_every_array_is_the_same(tmp_path, case):
    np.savez(tmp_path / "net.npz", **CASES[case])
    form = "big_vision" if case.startswith("big") else "google"
    export(load(tmp_path / "net.npz"), tmp_path / "back.npz", form)
    back = dict(np.load(tmp_path / "back.npz"))
    expected = {name.removeprefix("params/"): array for name, array in CASES[case].items()}
    assert set(back) == set(expected)
    for name, array in expected.items():
        assert np.array_equal(back[name], array), name


def test_a_scan_stack_is_the_loop_it_stands_for(tmp_path, same_state):
    stacked = big_vision("gap", "learn", stacked=True)
    prefix = "params/Transformer/encoderblock/"
    loop = {name: array for name, array in stacked.items() if not name.startswith(prefix)}
    for name, array in stacked.items():
        if name.startswith(prefix):
            for i in range(DEPTH):
                loop[f"params/Transformer/encoderblock_{i}/{name.removeprefix(prefix)}"] = array[i]
    np.savez(tmp_path / "stacked.npz", **stacked)
    np.savez(tmp_path / "loop.npz", **loop)
    same_state(load(tmp_path / "stacked.npz"), load(tmp_path / "loop.npz"))


def test_the_optimizers_state_is_left_out_and_said(tmp_path):
    w = {f"opt/target/{name}": array for name, array in paper().items()}
    np.savez(tmp_path / "net.npz", **w, **{"opt/state/step": np.int32(3), "extra/rng": np.zeros(2)})
    message = inspect(tmp_path / "net.npz")
    assert message["format"] == "google"
    assert message["fits"] is None
    assert message["notes"] == ["weights taken from 'opt/target', leaving out extra, opt"]


@pytest.mark.parametrize("nest", ["img/", "params/img/"])
def test_the_image_tower_of_lit(tmp_path, same_state, nest):
    """Files of two towers hold the image's in `img`, as LiT's, or in `params/img`, as SigLIP's."""
    w = paper()
    np.savez(tmp_path / "alone.npz", **w)
    other = nest.replace("img", "txt")
    words = {f"{other}Embed_0/embedding": np.zeros((9, 4), np.float32), nest.replace("img/", "t"): np.ones(1)}
    np.savez(tmp_path / "lit.npz", **{nest + name: array for name, array in w.items()}, **words)
    same_state(load(tmp_path / "lit.npz"), load(tmp_path / "alone.npz"))
    assert any("leaving out" in note for note in inspect(tmp_path / "lit.npz")["notes"])


def test_bfloat16_arrays(tmp_path):
    w = paper()
    short = {name: (array.view(np.uint32) >> 16).astype(np.uint16).view("V2") for name, array in w.items()}
    np.savez(tmp_path / "net.npz", **short)
    net = load(tmp_path / "net.npz")
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    export(net, tmp_path / "back.npz", "google")
    back = np.load(tmp_path / "back.npz")
    assert all(
        np.array_equal(back[name].view(np.uint16), array.view(np.uint16)) for name, array in short.items()
    )


def test_a_rectangular_grid_needs_to_be_said(tmp_path):
    np.savez(tmp_path / "net.npz", **paper(tokens=16))  # 15 patches and the class token
    with pytest.raises(CheckpointError, match="15 patches, which form no square; give image_size"):
        load(tmp_path / "net.npz")
    net = load(tmp_path / "net.npz", image_size=(24, 40))
    assert net.config.grid == (3, 5)
    assert torch.equal(
        net.positions.detach(),
        torch.from_numpy(np.load(tmp_path / "net.npz")["Transformer/posembed_input/pos_embedding"]),
    )


def test_what_it_says(tmp_path):
    np.savez(tmp_path / "net.npz", **paper(rep=24))
    message = inspect(tmp_path / "net.npz")
    assert message["config"]["mlp"] == "gelu_tanh"
    assert message["config"]["head"] == "mlp"
    assert message["facts"]["num_heads"] == "shape of the query kernel"
    assert "squash, bilinear, mean and std 0.5" in message["facts"]["preprocess"]


@pytest.mark.parametrize("form", ["google", "big_vision"])
@pytest.mark.parametrize(
    ("changes", "aside"),
    [
        ({"mlp": "gelu_tanh"}, None),
        ({}, {"mlp": "gelu"}),
        ({"norm_eps": 1e-5}, {"mlp": "gelu", "norm_eps": 1e-5}),
        ({"mlp": "gelu_tanh", "image_size": (24, 56)}, {"image_size": [24, 56]}),
    ],
)
def test_what_npz_leaves_to_conventions_lies_beside_it(
    tmp_path, tiny, same_state, caplog, form, changes, aside
):
    """The tensors are the format's; the form of GELU, epsilon and a grid that is not square are in a JSON of ours."""
    net = tiny(**changes)
    (tmp_path / "x.npz.json").write_text("left by an earlier export")
    export(net, tmp_path / "x.npz", form)
    back = load(tmp_path / "x.npz")
    same_state(net, back)
    for name in ("mlp", "norm_eps", "image_size"):
        assert getattr(back.config, name) == getattr(net.config, name)
    lies = tmp_path / "x.npz.json"
    assert (json.loads(lies.read_text())["triptych"] if lies.exists() else None) == aside
    assert ("which other programs do not read" in caplog.text) == (aside is not None)


@pytest.mark.parametrize(
    ("changes", "form", "part"),
    [
        ({"mlp": "gelu_tanh", "layer_scale": 0.1}, "google", "scale1"),
        ({"mlp": "gelu_tanh", "num_registers": 2}, "big_vision", "registers"),
    ],
)
def test_what_google_cannot_say_is_refused(tmp_path, tiny, changes, form, part):
    with pytest.raises(CheckpointError, match=part):
        export(tiny(**changes), tmp_path / "x.npz", form)
    assert not list(tmp_path.iterdir())
