"""The latent cache: contents, interruptions, damaged shards and images, caches larger than memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import triptych as tp
from triptych.data.config import DataConfig
from triptych.data.open import open_source
from triptych.errors import TriptychError
from triptych.training.second_stage import latent_cache
from triptych.training.second_stage.latent_cache import LatentCache

SMALL = {
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "norm_groups": 4,
    "middle_attention": False,
    "latent_channels": 2,
}


@pytest.fixture(scope="module")
def stage():
    torch.manual_seed(0)
    return tp.create("kl-f8", image_size=16, scale=(2.0, 3.0), shift=(0.1, -0.2), **SMALL).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven images, the fifth of them damaged."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for i in range(11):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    content = (folder / "04.png").read_bytes()
    (folder / "04.png").write_bytes(content[: len(content) // 2])
    return folder


def cache_of(folder, stage, **more):
    preprocess = replace(stage.card.preprocess, size=(16, 16))
    options = {"mirrored": True, "dtype": "fp32", "shard": 4, "batch_size": 3, **more}
    return LatentCache(open_source(folder), stage, preprocess, loading=DataConfig(workers=0), **options)


def pixels(folder, row):
    with Image.open(folder / f"{row:02d}.png") as image:
        return torch.from_numpy(np.array(image)).movedim(-1, 0)[None] / 127.5 - 1


def test_the_cache_has_mean_and_std_of_each_image_and_its_mirror_image(folder, stage, tmp_path):
    cache = cache_of(folder, stage)
    cache.fill(tmp_path)
    batch = cache.__getitems__([7, 2, 10])
    assert batch["row"] == [7, 2, 10]
    assert batch["bad"] == {}
    for place, row in enumerate(batch["row"]):
        for view, images in enumerate((pixels(folder, row), pixels(folder, row).flip(-1))):
            with torch.no_grad():
                mean, logvar = stage.posterior(images)
                wanted = stage.scaled(mean)
            torch.testing.assert_close(batch["mean"][place, view], wanted[0], atol=1e-5, rtol=1e-5)
            std = torch.exp(0.5 * logvar[0]) * torch.tensor([2.0, 3.0])[:, None, None]
            torch.testing.assert_close(batch["std"][place, view], std, atol=1e-5, rtol=1e-5)


def test_a_damaged_image_is_left_out_and_named(folder, stage, tmp_path):
    cache = cache_of(folder, stage)
    cache.fill(tmp_path)
    batch = cache.__getitems__([3, 4, 5])
    assert batch["row"] == [3, 5]
    assert len(batch["mean"]) == len(batch["label"]) == 2
    ((name, why),) = batch["bad"].items()
    assert name.endswith("04.png")
    assert "04.png" in why


def test_an_interrupted_cache_encodes_only_what_is_missing(folder, stage, tmp_path, monkeypatch):
    uninterrupted = cache_of(folder, stage)
    uninterrupted.fill(tmp_path / "whole")
    written = []
    write = latent_cache.write_atomically

    def dies_at_the_second(path, write_it):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path)
        write(path, write_it)

    with monkeypatch.context() as patch:
        patch.setattr(latent_cache, "write_atomically", dies_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            cache_of(folder, stage).fill(tmp_path / "cut")
    first = next((tmp_path / "cut").glob("*.safetensors"))
    before = first.stat().st_mtime_ns
    again = cache_of(folder, stage)
    encoded = []
    monkeypatch.setattr(again, "_encode", lambda rows, run=again._encode: encoded.extend(rows) or run(rows))
    again.fill(tmp_path / "cut")
    assert encoded == list(range(4, 11))
    assert first.stat().st_mtime_ns == before
    for one, other in zip(
        sorted((tmp_path / "whole").iterdir()), sorted((tmp_path / "cut").iterdir()), strict=True
    ):
        assert one.read_bytes() == other.read_bytes()


def test_a_damaged_shard_is_encoded_again(folder, stage, tmp_path):
    cache_of(folder, stage).fill(tmp_path)
    shard = tmp_path / "00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    cache_of(folder, stage).fill(tmp_path)
    assert shard.read_bytes() == content


def test_more_than_fits_in_memory_is_read_from_the_files(folder, stage, tmp_path, monkeypatch):
    small = cache_of(folder, stage)
    small.fill(tmp_path)
    monkeypatch.setattr(latent_cache, "MAX_MEMORY", 0)
    large = cache_of(folder, stage)
    large.fill(tmp_path)
    assert len(small._shards) == 1
    assert len(large._shards) == 3
    rows = [9, 0, 4, 6, 5, 0]
    one, other = small.__getitems__(rows), large.__getitems__(rows)
    assert one["row"] == other["row"] == [9, 0, 6, 5, 0]
    assert one["bad"] == other["bad"] != {}
    assert torch.equal(one["mean"], other["mean"])
    assert torch.equal(one["std"], other["std"])
    assert large.deviation() == pytest.approx(small.deviation())


def test_without_a_folder_latents_are_encoded_at_each_request(folder, stage, tmp_path):
    cache = cache_of(folder, stage)
    filled = cache_of(folder, stage)
    filled.fill(tmp_path)
    for one, other in zip(*(c.__getitems__([1, 8])["mean"] for c in (cache, filled)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_another_decoder_has_the_same_latents(folder, stage, tmp_path):
    import copy

    cache_of(folder, stage).fill(tmp_path)
    other = copy.deepcopy(stage)
    torch.nn.init.normal_(other.decoder.conv_in.weight)
    cache_of(folder, other).fill(tmp_path)
    torch.nn.init.normal_(other.encoder.conv_in.weight)
    with pytest.raises(
        TriptychError, match=r"has latents of another first stage; remove it, or give another"
    ):
        cache_of(folder, other).fill(tmp_path)
    with pytest.raises(TriptychError, match="has latents of mirrored True, not False; remove it"):
        cache_of(folder, stage, mirrored=False).fill(tmp_path)


def test_a_folder_of_other_files_is_refused(folder, stage, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TriptychError, match=r"has files and no about.json; give another --cache.folder"):
        cache_of(folder, stage).fill(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_latents_beyond_half_precision_are_refused(folder, stage, tmp_path):
    import copy

    loud = copy.deepcopy(stage)
    loud.config = replace(loud.config, scale=1e8)
    with pytest.raises(
        TriptychError, match=r"latents are NaN or infinite in float16; set cache.dtype to fp32"
    ):
        cache_of(folder, loud, dtype="fp16").fill(tmp_path)


def test_a_quantized_first_stage_has_no_std(folder, tmp_path):
    torch.manual_seed(0)
    stage = tp.create("vq-f4", image_size=16, codebook_size=8, **SMALL).eval()
    cache = cache_of(folder, stage)
    cache.fill(tmp_path)
    batch = cache.__getitems__([0])
    assert "std" not in batch
    with torch.no_grad():
        torch.testing.assert_close(
            batch["mean"][0, 0], stage.encode(pixels(folder, 0))[0], atol=1e-5, rtol=1e-5
        )


def test_nothing_readable_is_one_line(stage, tmp_path):
    (tmp_path / "data").mkdir()
    for name in "ab":
        (tmp_path / "data" / f"{name}.png").write_bytes(b"not an image")
    with pytest.raises(TriptychError, match=r"no image could be read; the first: .*a.png"):
        cache_of(tmp_path / "data", stage).fill(tmp_path / "latents")
