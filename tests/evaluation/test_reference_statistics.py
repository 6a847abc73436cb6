"""Reference statistics: features and preparation, the file, resuming, and files of another identity."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import triptych as tp
from triptych.data.builtin.emoji import emoji
from triptych.data.config import DataConfig
from triptych.data.open import open_source
from triptych.data.resizing import resize_crop
from triptych.data.source import Subset
from triptych.errors import CheckpointError, ConfigError, DataError, TriptychError
from triptych.evaluation import reference_statistics
from triptych.evaluation.feature_extractor import Preparation, open_extractor, weights_hash
from triptych.evaluation.reference_statistics import (
    load_or_measure_reference,
    partial_path,
    prepared_loader,
    read_reference,
    require_same_identity,
)
from triptych.metrics.frechet_distance import Moments
from triptych.model_card import Preprocess

LOADING = DataConfig(workers=0, eval_batch_size=5)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = tp.create(
        "vit-ti16",
        depth=1,
        embed_dim=12,
        num_heads=3,
        mlp_ratio=1.0,
        num_classes=4,
        image_size=16,
        patch_size=8,
    )
    torch.nn.init.normal_(net.head.weight)
    net.card = replace(net.card, preprocess=Preprocess(size=(16, 16), crop=0.5, mode="pad"))
    return net


@pytest.fixture
def extractor(network):
    return open_extractor(network, device="cpu")


@pytest.fixture
def source(color_images):
    return Subset(open_source(str(color_images)), np.arange(23))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Features


def test_features_are_the_class_token_of_the_last_norm(network, extractor):
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None].unbind(0)
    x = (images / 255 - mean) / std
    output = extractor(images)
    with torch.no_grad():
        z, _, _ = network.encode(x)
        torch.testing.assert_close(output.features, network.norm(z)[:, 0])
        torch.testing.assert_close(output.logits, network(x))
    assert "class token" in extractor.layer


def test_features_of_networks_without_a_class_token():
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shipped = open_extractor("vit-emoji", device="cpu")
    assert shipped(images).features.shape == (2, 192)
    assert shipped(images).logits.shape == (2, 1032)
    torch.manual_seed(0)
    swin = tp.create(
        "swin-t", embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, image_size=64, num_classes=3
    )
    torch.nn.init.normal_(swin.head.weight)
    head_inputs = []
    swin.head.register_forward_pre_hook(lambda _, inputs: head_inputs.append(inputs[0]))
    output = open_extractor(swin, device="cpu")(images)
    with torch.no_grad():
        logits = swin((images / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None])
                      / torch.tensor([0.229, 0.224, 0.225])[:, None, None])  # fmt: skip
    torch.testing.assert_close(output.features, head_inputs[-1])
    torch.testing.assert_close(output.logits, logits)


def test_bf16_is_near_fp32_and_another_extractor(network, extractor):
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    other = open_extractor(network, device="cpu", dtype="bf16")
    torch.testing.assert_close(other(images).features, extractor(images).features, atol=0.1, rtol=0.1)
    assert other.identity != extractor.identity


def test_networks_without_image_features_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="a ViT or Swin classifier"):
        open_extractor(tp.create("kl-f4", base_channels=32))
    with pytest.raises(ConfigError, match="pip install torch-fidelity"):
        open_extractor("inception")
    with pytest.raises(CheckpointError, match="takes images of 1 channels"):
        open_extractor(tp.create("vit-ti16", depth=1, in_channels=1))


def test_inception_is_torch_fidelitys(monkeypatch):
    """torch-fidelity's class gets uint8 images, at `image_size` or else at 299 x 299."""
    import sys
    import types

    class Theirs(torch.nn.Module):
        def __init__(self, name, features):
            super().__init__()
            assert features == ["2048", "logits_unbiased"]
            self.fc = torch.nn.Linear(2, 3)

        def forward(self, x):
            assert x.dtype == torch.uint8
            return x.float().mean((2, 3))[:, :2], self.fc(x.float().mean((2, 3))[:, :2])

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Theirs
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    extractor = open_extractor("inception", image_size=(20, 30), device="cpu")
    batch = extractor.prepare([np.full((60, 90, 3), 7, np.uint8)])
    assert batch.shape == (1, 3, 20, 30)
    assert extractor(batch).features.tolist() == [[7, 7]]
    assert extractor(batch).logits.shape == (1, 3)
    assert open_extractor("inception", device="cpu").prepare([np.zeros((9, 9), np.uint8)]).shape == (
        1,
        3,
        299,
        299,
    )


# Preparation of images


def test_grayscale_transparent_and_opaque_images_are_prepared_alike(tmp_path):
    preparation = Preparation(image_size=(24, 24), size=(16, 16))
    rng = np.random.default_rng(0)
    gray = rng.integers(0, 256, (30, 24), dtype=np.uint8)
    color = np.repeat(gray[..., None], 3, 2)
    opaque = np.concatenate([color, np.full((30, 24, 1), 255, np.uint8)], 2)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    for form in (color, opaque, Image.fromarray(gray), Image.fromarray(opaque), str(tmp_path / "gray.png")):
        np.testing.assert_array_equal(preparation.apply(form), preparation.apply(gray))
    assert (preparation.apply(np.zeros((30, 24, 4), np.uint8)) == 255).all()  # transparent, on white
    expected = resize_crop(resize_crop(color, (24, 24), 1, "crop"), (16, 16), 1, "squash")
    np.testing.assert_array_equal(preparation.apply(color), expected)


def test_preparation_ignores_the_cropping_of_the_card(extractor):
    """The card of the network crops half of an image and pads; features are of the full center square."""
    assert extractor.preparation == Preparation(size=(16, 16))
    assert extractor.preparation.apply(np.zeros((16, 16, 3), np.uint8)).shape == (16, 16, 3)
    assert Preparation(size=(16, 16)).digest != Preparation(size=(16, 16), image_size=(16, 16)).digest


def test_a_loader_prepares_images_as_the_extractor_does(extractor, source):
    (batch, *_) = prepared_loader(source, extractor, LOADING)
    torch.testing.assert_close(batch["image"], extractor.prepare(source[i].image for i in range(5)))
    transparent = emoji("test")
    extractor = open_extractor("vit-emoji", device="cpu")
    (batch, *_) = prepared_loader(Subset(transparent, [3, 8]), extractor, LOADING)
    torch.testing.assert_close(batch["image"], extractor.prepare(transparent[i].image for i in (3, 8)))


# The file


def test_statistics_of_all_images_are_read_from_the_file(tmp_path, source, extractor, monkeypatch):
    path = tmp_path / "reference.safetensors"
    reference = load_or_measure_reference(source, extractor, path, name="colors", loading=LOADING)
    features = extractor(extractor.prepare(source[i].image for i in range(len(source)))).features
    known = Moments.of(features)
    assert reference.statistics.moments.count == 23
    np.testing.assert_allclose(
        reference.statistics.moments.covariance, known.covariance, rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(reference.statistics.features, features)
    assert reference.identity["data"]["name"] == "colors"
    assert reference.identity["preparation"]["size"] == [16, 16]
    assert not partial_path(path).exists()
    monkeypatch.setattr(type(extractor), "__call__", None)  # nothing is extracted again
    assert_same(load_or_measure_reference(source, extractor, path, loading=LOADING), reference)


def assert_same(a, b):
    for name in ("mean", "scatter"):
        np.testing.assert_array_equal(*(getattr(one.statistics.moments, name) for one in (a, b)))
    np.testing.assert_array_equal(a.statistics.features, b.statistics.features)
    assert a.statistics.moments.count == b.statistics.moments.count


def test_without_a_path_the_file_is_in_the_cache(cache, source, extractor, network):
    reference = load_or_measure_reference(source, extractor, loading=LOADING)
    (path,) = cache.rglob("*.safetensors")
    assert path.parent == cache / "triptych" / "references"
    assert_same(read_reference(path), reference)
    load_or_measure_reference(
        source, open_extractor(network, image_size=(20, 20), device="cpu"), loading=LOADING
    )
    load_or_measure_reference(Subset(source, range(9)), extractor, loading=LOADING)
    load_or_measure_reference(source, extractor, loading=LOADING)
    assert len(list(cache.rglob("*.safetensors"))) == 3


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_an_interrupted_measurement_resumes_bitwise_identically(
    tmp_path, source, extractor, network, monkeypatch, stop
):
    uninterrupted = load_or_measure_reference(
        source, extractor, tmp_path / "whole.safetensors", loading=LOADING
    )
    monkeypatch.setattr(reference_statistics, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(reference_statistics, "NUM_STORED_FEATURES", 100)
    path = tmp_path / "cut.safetensors"

    class Stopping(type(extractor)):
        calls = 0

        def __call__(self, images):
            if self.calls == stop:
                raise KeyboardInterrupt
            self.calls += 1
            return super().__call__(images)

    fresh = open_extractor(network, device="cpu")
    fresh.__class__ = Stopping
    with pytest.raises(KeyboardInterrupt):
        load_or_measure_reference(source, fresh, path, loading=LOADING)
    assert not path.exists()
    assert partial_path(path).exists()
    with pytest.raises(DataError, match=f"has only {5 * stop} of 23 images"):
        read_reference(partial_path(path))
    fresh.calls = stop - 5  # exactly the batches that are left
    assert_same(load_or_measure_reference(source, fresh, path, loading=LOADING), uninterrupted)
    assert fresh.calls == 0
    assert not partial_path(path).exists()


def test_a_random_subset_of_many_features_is_stored(tmp_path, source, extractor, monkeypatch):
    monkeypatch.setattr(reference_statistics, "NUM_STORED_FEATURES", 7)
    reference = load_or_measure_reference(source, extractor, tmp_path / "some.safetensors", loading=LOADING)
    assert reference.statistics.moments.count == 23
    features = extractor(extractor.prepare(source[i].image for i in range(23))).features
    rows = [int(torch.cdist(row[None], features).argmin()) for row in reference.statistics.features]
    assert len(set(rows)) == 7
    assert rows == sorted(rows) != list(range(7))


def test_damaged_images_are_left_out_and_named(tmp_path, extractor):
    for i in range(4):
        Image.fromarray(np.full((20, 20, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"nothing")
    source = open_source(str(tmp_path))
    reference = load_or_measure_reference(source, extractor, tmp_path / "r.safetensors", loading=LOADING)
    assert reference.statistics.moments.count == 3
    assert [name for name in reference.bad if "2.png" in name]
    assert read_reference(tmp_path / "r.safetensors").bad == reference.bad
    with pytest.raises(TriptychError, match=r"2\.png"):
        load_or_measure_reference(
            source, extractor, tmp_path / "s.safetensors", loading=replace(LOADING, on_bad_image="fail")
        )


def test_statistics_of_another_identity_are_refused_in_one_line(tmp_path, source, extractor, network):
    path = tmp_path / "reference.safetensors"
    load_or_measure_reference(source, extractor, path, name="colors", loading=LOADING)

    def refused(what, **changed):
        with pytest.raises(DataError) as caught:
            load_or_measure_reference(
                **{"source": source, "extractor": extractor, "path": path, "loading": LOADING, **changed}
            )
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{path} has statistics of ")
        assert what in str(caught.value)

    refused("23 images (colors), and there are 22", source=Subset(source, np.arange(22)))
    refused("other images (colors)", source=Subset(source, np.arange(23)[::-1]))
    refused(
        "picture None, and [20, 20] is needed",  # words: quoted
        extractor=open_extractor(network, image_size=(20, 20), device="cpu"),
    )
    refused(
        "precision 'float32', and 'bfloat16' is needed",
        extractor=open_extractor(network, device="cpu", dtype="bf16"),
    )
    torch.manual_seed(1)
    other = tp.create(
        "vit-ti16",
        depth=1,
        embed_dim=12,
        num_heads=3,
        mlp_ratio=1.0,
        num_classes=4,
        image_size=16,
        patch_size=8,
    )
    other.card = network.card
    refused(
        f"another network ({weights_hash(network)}, and this one is ",
        extractor=open_extractor(other, device="cpu"),
    )
    # Without data, only extractor and preparation must agree.
    require_same_identity(path, read_reference(path), extractor.identity)
    with pytest.raises(DataError, match="another network"):
        require_same_identity(path, read_reference(path), open_extractor(other, device="cpu").identity)


def test_another_preparation_of_a_later_version_is_refused(tmp_path, source, extractor):
    path = tmp_path / "reference.safetensors"
    load_or_measure_reference(source, extractor, path, loading=LOADING)
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()[reference_statistics.KEY])
        tensors = {name: file.get_tensor(name) for name in ("mean", "scatter", "features")}
    metadata["preparation"]["interpolation"] = "lanczos"
    save_file(tensors, path, metadata={reference_statistics.KEY: json.dumps(metadata)})
    with pytest.raises(DataError, match="interpolation 'lanczos', and 'bicubic' is needed"):
        load_or_measure_reference(source, extractor, path, loading=LOADING)


def test_damaged_and_foreign_files_are_refused(tmp_path, source, extractor, network):
    path = tmp_path / "reference.safetensors"
    with pytest.raises(DataError, match="does not exist"):
        read_reference(path)
    load_or_measure_reference(source, extractor, path, loading=LOADING)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(DataError, match="is damaged"):
        read_reference(path)
    path.write_bytes(b"\0" * 40)
    with pytest.raises(DataError, match="is damaged"):
        read_reference(path)
    tp.save(network, path)
    with pytest.raises(DataError, match="not a file of reference statistics"):
        read_reference(path)


def test_the_hash_depends_on_every_weight(network):
    before = weights_hash(network)
    assert before == weights_hash(network)
    with torch.no_grad():
        network.head.bias[-1] += 1e-6
    try:
        assert weights_hash(network) != before
    finally:
        with torch.no_grad():
            network.head.bias[-1] = 0
