"""HEIC, AVIF and JPEG XL: decoded as their own libraries decode them, or counted and named where those are missing."""

import io
import logging

import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401  (registers JPEG XL with Pillow)
import pytest
from PIL import Image, features

from triptych.data import image_formats
from triptych.data.image_formats import AVIF, HEIF, JXL, OptionalFormat, optional_format, readable_suffixes
from triptych.data.images import decode, read_image_size
from triptych.data.open import open_source, train_and_eval
from triptych.errors import DataError
from triptych.pipelines.image_input import images_below

RNG = np.random.default_rng(0)


def smooth(height=48, width=32, channels=3):
    coarse = Image.fromarray(RNG.integers(0, 255, (4, 4, channels), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def heic(pixels, **options):
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(buffer, quality=90, **options)
    return buffer.getvalue()


def jxl(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JXL", lossless=True, **options)
    return buffer.getvalue()


@pytest.fixture
def without_packages(monkeypatch):
    """The environment without the packages of the extra."""
    monkeypatch.setattr(OptionalFormat, "is_readable", property(lambda self: False))
    readable_suffixes.cache_clear()
    yield
    monkeypatch.undo()
    readable_suffixes.cache_clear()


@pytest.mark.parametrize("channels", [3, 4])
def test_heic_is_decoded_as_libheif_does(channels, tmp_path):
    content = heic(smooth(channels=channels))
    want = np.asarray(pillow_heif.open_heif(content))
    assert optional_format(content[:64]) is HEIF
    assert np.array_equal(decode(content, alpha=channels == 4), want)
    path = tmp_path / "IMG_1.HEIC"
    path.write_bytes(content)
    assert decode(path).shape == (48, 32, 3)
    assert read_image_size(str(path)) == (48, 32)


def test_heic_is_turned_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(smooth())
    content = io.BytesIO()
    heif = pillow_heif.from_pillow(image)
    heif.save(content, quality=95, exif=exif.tobytes())
    upright = np.asarray(pillow_heif.open_heif(content.getvalue()))  # libheif turns it itself
    ours = decode(content.getvalue())
    assert ours.shape == upright.shape
    assert np.array_equal(ours, upright)
    assert read_image_size(content.getvalue()) == upright.shape[:2]


@pytest.mark.parametrize("container", [False, True])
def test_jpeg_xl_is_lossless(container, tmp_path):
    pixels = smooth()
    content = jxl(pixels, use_container=container)
    assert optional_format(content[:64]) is JXL
    assert np.array_equal(decode(content), pixels)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), pixels)
    (tmp_path / "x.jpg").write_bytes(content)  # with a wrong suffix
    assert np.array_equal(decode(tmp_path / "x.jpg"), pixels)


def test_jpeg_xl_is_upright_by_its_own_header_and_a_stored_jpeg_by_its_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(jxl(smooth(), exif=exif.tobytes())).shape == (48, 32, 3)
    Image.fromarray(smooth()).save(tmp_path / "x.jpg", exif=exif.tobytes())
    with Image.open(tmp_path / "x.jpg") as image:
        image.save(tmp_path / "x.jxl", lossless_jpeg=True)
    assert np.array_equal(decode(tmp_path / "x.jxl"), decode(tmp_path / "x.jpg"))
    assert read_image_size(tmp_path / "x.jxl") == (32, 48)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
def test_avif():
    buffer = io.BytesIO()
    Image.fromarray(smooth()).save(buffer, "AVIF")
    assert optional_format(buffer.getvalue()[:64]) is AVIF
    assert np.array_equal(decode(buffer.getvalue()), np.asarray(Image.open(buffer)))


def test_damaged_files_are_refused():
    for content in (heic(smooth()), jxl(smooth())):
        for damaged in (content[:40], content[: len(content) // 2], content[:60] + bytes(200)):
            with pytest.raises(DataError, match="damaged"):
                decode(damaged, name="x")


@pytest.fixture
def photos(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(smooth()).save(tmp_path / split / name / f"{i}.png")
            for i in range(count):
                (tmp_path / split / name / f"p{i}.heic").write_bytes(heic(smooth()))
        (tmp_path / split / "a" / "x.jxl").write_bytes(jxl(smooth()))
    (tmp_path / "train" / "b" / "raw.CR2").write_bytes(b"II*\0")
    return tmp_path


@pytest.mark.parametrize("stream", [False, True])
def test_images_of_phones_in_folders(photos, stream, caplog, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(photos / ".cache"))
    with caplog.at_level(logging.WARNING):
        train, held_out = train_and_eval(str(photos), stream=stream)
    assert (len(train), len(held_out)) == (4 + 6 + 1, 4 + 4 + 1)
    assert all(decode(train[i].image).shape == (48, 32, 3) for i in range(len(train)))
    assert caplog.messages == [
        f"{photos / 'train'} (split train): images are left out: 1 .cr2 (convert them to PNG)"
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_images_left_out_are_counted_for_each_split(photos, stream, caplog, without_packages, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(photos / ".cache"))
    with caplog.at_level(logging.WARNING):
        train, held_out = train_and_eval(str(photos), stream=stream)
    assert (len(train), len(held_out)) == (4, 4)
    heif, jpeg_xl = "(pip install pillow-heif)", "(pip install pillow-jxl-plugin)"
    assert sorted(caplog.messages) == [
        f"{photos / 'train'} (split train): images are left out: "
        f"1 .cr2 (convert them to PNG), 6 .heic {heif}, 1 .jxl {jpeg_xl}",
        f"{photos / 'val'} (split val): images are left out: 4 .heic {heif}, 1 .jxl {jpeg_xl}",
    ]


def test_only_unreadable_images(tmp_path, without_packages):
    content = heic(smooth())
    (tmp_path / "a.heic").write_bytes(content)
    with pytest.raises(
        DataError, match=r"holds no images that can be read: 1 .heic \(pip install pillow-heif"
    ):
        open_source(str(tmp_path))
    with pytest.raises(
        DataError, match=r"a.heic is HEIF, which needs another package: pip install pillow-heif"
    ):
        decode(tmp_path / "a.heic")


def test_a_folder_given_to_a_pipeline(photos, caplog, without_packages):
    with caplog.at_level(logging.WARNING):
        assert len(list(images_below(photos))) == 8
    (message,) = caplog.messages
    assert message.startswith(f"{photos}: images are left out: 1 .cr2 (convert them to PNG), 10 .heic (pip")


def test_every_optional_format_has_a_suffix_of_its_own():
    suffixes = [suffix for form in image_formats.OPTIONAL_FORMATS for suffix in form.suffixes]
    assert len(set(suffixes)) == len(suffixes)
    assert not image_formats.OTHER_SUFFIXES & image_formats.KNOWN_SUFFIXES
