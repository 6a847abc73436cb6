"""Reference statistics: what they are of, kept in a file, gone on with after a stop, refused where they belong not."""

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
from triptych.data.images import resize_crop
from triptych.data.open import open_source
from triptych.data.source import Subset
from triptych.errors import UserError
from triptych.evaluation import reference_statistics
from triptych.evaluation.feature_extractor import Preparation, open_extractor, weights_hash
from triptych.evaluation.reference_statistics import partial, pictures_of, read, reference, require
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


# What features are


def test_features_are_the_class_token_of_the_last_norm(network, extractor):
    pictures = torch.randint(
        256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None].unbind(0)
    x = (pictures / 255 - mean) / std
    found = extractor(pictures)
    with torch.no_grad():
        z, _, _ = network.encode(x)
        torch.testing.assert_close(found.features, network.norm(z)[:, 0])
        torch.testing.assert_close(found.logits, network(x))
    assert "class token" in extractor.layer


def test_features_of_networks_without_a_class_token():
    pictures = torch.randint(
        256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    shipped = open_extractor("vit-emoji", device="cpu")
    assert shipped(pictures).features.shape == (2, 192)
    assert shipped(pictures).logits.shape == (2, 1032)
    torch.manual_seed(0)
    swin = tp.create(
        "swin-t", embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, image_size=64, num_classes=3
    )
    torch.nn.init.normal_(swin.head.weight)
    taken = []
    swin.head.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    found = open_extractor(swin, device="cpu")(pictures)
    with torch.no_grad():
        logits = swin((pictures / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None])
                      / torch.tensor([0.229, 0.224, 0.225])[:, None, None])  # fmt: skip
    torch.testing.assert_close(found.features, taken[-1])
    torch.testing.assert_close(found.logits, logits)


def test_bf16_is_near_fp32_and_another_extractor(network, extractor):
    pictures = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    other = open_extractor(network, device="cpu", dtype="bf16")
    torch.testing.assert_close(other(pictures).features, extractor(pictures).features, atol=0.1, rtol=0.1)
    assert other.identity != extractor.identity


def test_only_networks_that_see_give_features(tmp_path):
    with pytest.raises(UserError, match="a ViT or a Swin that classifies"):
        open_extractor(tp.create("kl-f4", base_channels=32))
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        open_extractor("inception")
    with pytest.raises(UserError, match="sees 1 channels"):
        open_extractor(tp.create("vit-ti16", depth=1, in_channels=1))


def test_inception_is_torch_fidelitys(monkeypatch):
    """The package's class is fed whole numbers, at the pictures' own size, or at 299 where they have none in common."""
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
    found = open_extractor("inception", picture=(20, 30), device="cpu")
    batch = found.fitted([np.full((60, 90, 3), 7, np.uint8)])
    assert batch.shape == (1, 3, 20, 30)
    assert found(batch).features.tolist() == [[7, 7]]
    assert found(batch).logits.shape == (1, 3)
    assert open_extractor("inception", device="cpu").fitted([np.zeros((9, 9), np.uint8)]).shape == (
        1,
        3,
        299,
        299,
    )


# How pictures are prepared


def test_grey_transparent_and_opaque_pictures_are_prepared_alike(tmp_path):
    how = Preparation(picture=(24, 24), size=(16, 16))
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (30, 24), dtype=np.uint8)
    color = np.repeat(grey[..., None], 3, 2)
    opaque = np.concatenate([color, np.full((30, 24, 1), 255, np.uint8)], 2)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    for same in (color, opaque, Image.fromarray(grey), Image.fromarray(opaque), str(tmp_path / "grey.png")):
        np.testing.assert_array_equal(how.fitted(same), how.fitted(grey))
    assert (how.fitted(np.zeros((30, 24, 4), np.uint8)) == 255).all()  # nothing at all, on white
    expected = resize_crop(resize_crop(color, (24, 24), 1, "crop"), (16, 16), 1, "squash")
    np.testing.assert_array_equal(how.fitted(color), expected)


def test_the_cards_cropping_has_no_part_in_it(extractor):
    """A card may say "pad", or keep half of a picture; what is measured is the picture's middle, whole."""
    assert extractor.preparation == Preparation(size=(16, 16))
    assert extractor.preparation.fitted(np.zeros((16, 16, 3), np.uint8)).shape == (16, 16, 3)
    assert Preparation(size=(16, 16)).digest != Preparation(size=(16, 16), picture=(16, 16)).digest


def test_a_loader_feeds_what_single_pictures_are(extractor, source):
    (batch, *_) = pictures_of(source, extractor, LOADING)
    torch.testing.assert_close(batch["image"], extractor.fitted(source[i].image for i in range(5)))
    transparent = emoji("test")
    extractor = open_extractor("vit-emoji", device="cpu")
    (batch, *_) = pictures_of(Subset(transparent, [3, 8]), extractor, LOADING)
    torch.testing.assert_close(batch["image"], extractor.fitted(transparent[i].image for i in (3, 8)))


# The file


def test_statistics_of_all_pictures_come_back_from_the_file(tmp_path, source, extractor, monkeypatch):
    path = tmp_path / "reference.safetensors"
    made = reference(source, extractor, path, name="colors", loading=LOADING)
    features = extractor(extractor.fitted(source[i].image for i in range(len(source)))).features
    known = Moments.of(features)
    assert made.statistics.moments.count == 23
    np.testing.assert_allclose(made.statistics.moments.covariance, known.covariance, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(made.statistics.features, features)
    assert made.identity["data"]["name"] == "colors"
    assert made.identity["preparation"]["size"] == [16, 16]
    assert not partial(path).exists()
    monkeypatch.setattr(type(extractor), "__call__", None)  # nothing is extracted again
    assert_same(reference(source, extractor, path, loading=LOADING), made)


def assert_same(a, b):
    for name in ("mean", "scatter"):
        np.testing.assert_array_equal(*(getattr(one.statistics.moments, name) for one in (a, b)))
    np.testing.assert_array_equal(a.statistics.features, b.statistics.features)
    assert a.statistics.moments.count == b.statistics.moments.count


def test_without_a_file_it_is_kept_in_the_cache(cache, source, extractor, network):
    made = reference(source, extractor, loading=LOADING)
    (path,) = cache.rglob("*.safetensors")
    assert path.parent == cache / "triptych" / "references"
    assert_same(read(path), made)
    reference(source, open_extractor(network, picture=(20, 20), device="cpu"), loading=LOADING)
    reference(Subset(source, range(9)), extractor, loading=LOADING)
    reference(source, extractor, loading=LOADING)
    assert len(list(cache.rglob("*.safetensors"))) == 3


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_cut_off_it_goes_on_to_the_same_bits(tmp_path, source, extractor, network, monkeypatch, stop):
    whole = reference(source, extractor, tmp_path / "whole.safetensors", loading=LOADING)
    monkeypatch.setattr(reference_statistics, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(reference_statistics, "KEPT", 100)
    path = tmp_path / "cut.safetensors"

    class Stopping(type(extractor)):
        calls = 0

        def __call__(self, pictures):
            if self.calls == stop:
                raise KeyboardInterrupt
            self.calls += 1
            return super().__call__(pictures)

    fresh = open_extractor(network, device="cpu")
    fresh.__class__ = Stopping
    with pytest.raises(KeyboardInterrupt):
        reference(source, fresh, path, loading=LOADING)
    assert not path.exists()
    assert partial(path).exists()
    with pytest.raises(UserError, match=f"holds {5 * stop} of 23 pictures"):
        read(partial(path))
    fresh.calls = stop - 5  # as many as are left, and no more
    assert_same(reference(source, fresh, path, loading=LOADING), whole)
    assert fresh.calls == 0
    assert not partial(path).exists()


def test_of_many_pictures_a_random_part_is_kept(tmp_path, source, extractor, monkeypatch):
    monkeypatch.setattr(reference_statistics, "KEPT", 7)
    made = reference(source, extractor, tmp_path / "some.safetensors", loading=LOADING)
    assert made.statistics.moments.count == 23
    features = extractor(extractor.fitted(source[i].image for i in range(23))).features
    rows = [int(torch.cdist(row[None], features).argmin()) for row in made.statistics.features]
    assert len(set(rows)) == 7
    assert rows == sorted(rows) != list(range(7))


def test_damaged_pictures_are_left_out_and_named(tmp_path, extractor):
    for i in range(4):
        Image.fromarray(np.full((20, 20, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"nothing")
    source = open_source(str(tmp_path))
    made = reference(source, extractor, tmp_path / "r.safetensors", loading=LOADING)
    assert made.statistics.moments.count == 3
    assert [name for name in made.bad if "2.png" in name]
    assert read(tmp_path / "r.safetensors").bad == made.bad
    with pytest.raises(UserError, match=r"2\.png"):
        reference(
            source, extractor, tmp_path / "s.safetensors", loading=replace(LOADING, on_bad_image="fail")
        )


def test_statistics_of_something_else_are_refused_in_one_line(tmp_path, source, extractor, network):
    path = tmp_path / "reference.safetensors"
    reference(source, extractor, path, name="colors", loading=LOADING)

    def refused(what, **changed):
        with pytest.raises(UserError) as caught:
            reference(
                **{"source": source, "extractor": extractor, "path": path, "loading": LOADING, **changed}
            )
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{path} holds statistics of ")
        assert what in str(caught.value)

    refused("23 pictures (colors), and these are 22", source=Subset(source, np.arange(22)))
    refused("other pictures (colors)", source=Subset(source, np.arange(23)[::-1]))
    refused(
        "picture None, and this is [20, 20]",
        extractor=open_extractor(network, picture=(20, 20), device="cpu"),
    )
    refused(
        "precision 'float32', and this is 'bfloat16'",
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
    # Of whatever pictures, as long as they were seen alike
    require(path, read(path), extractor.identity)
    with pytest.raises(UserError, match="another network"):
        require(path, read(path), open_extractor(other, device="cpu").identity)


def test_what_a_later_version_does_otherwise_is_refused(tmp_path, source, extractor):
    path = tmp_path / "reference.safetensors"
    reference(source, extractor, path, loading=LOADING)
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()[reference_statistics.KEY])
        tensors = {name: file.get_tensor(name) for name in ("mean", "scatter", "features")}
    said["preparation"]["interpolation"] = "lanczos"
    save_file(tensors, path, metadata={reference_statistics.KEY: json.dumps(said)})
    with pytest.raises(UserError, match="interpolation 'lanczos', and this is 'bicubic'"):
        reference(source, extractor, path, loading=LOADING)


def test_damaged_and_foreign_files_are_said(tmp_path, source, extractor, network):
    path = tmp_path / "reference.safetensors"
    with pytest.raises(UserError, match="there is no file"):
        read(path)
    reference(source, extractor, path, loading=LOADING)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="is damaged"):
        read(path)
    path.write_bytes(b"\0" * 40)
    with pytest.raises(UserError, match="is damaged"):
        read(path)
    tp.save(network, path)
    with pytest.raises(UserError, match="no file of reference statistics"):
        read(path)


def test_hash_is_of_every_number(network):
    before = weights_hash(network)
    assert before == weights_hash(network)
    with torch.no_grad():
        network.head.bias[-1] += 1e-6
    try:
        assert weights_hash(network) != before
    finally:
        with torch.no_grad():
            network.head.bias[-1] = 0
