"""Decoding images to uint8: modes, orientations, formats and sizes; one-line errors for files that are not images."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from triptych.data.images import MAX_PIXELS, decode
from triptych.data.resizing import RESAMPLING_FILTERS, resize_crop
from triptych.errors import DataError, TriptychError

RED = (200, 30, 10)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Return random pixels; size is (width, height)."""
    rng = np.random.default_rng(seed)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8), mode)


def in_mode(mode: str, size: tuple[int, int]) -> Image.Image:
    rgb = noise(size)
    if mode.startswith("I;16"):
        return Image.new(mode, size, 30000)
    if mode == "LAB":
        return Image.new(mode, size, (128, 140, 120))
    if mode == "PA":
        return Image.new(mode, size)
    if mode in ("La", "RGBa"):
        return rgb.convert(mode.upper()).convert(mode)
    return rgb.convert(mode)


MODES = [
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "LA",
    "PA",
    "RGBX",
    "RGBa",
    "La",
]
MODES += ["I;16", "I;16L", "I;16B", "I;16N"]


@given(mode=st.sampled_from(MODES), width=st.integers(1, 40), height=st.integers(1, 40), alpha=st.booleans())
@settings(max_examples=120, deadline=None)
def test_any_mode_of_any_size_becomes_uint8(mode, width, height, alpha):
    got = decode(in_mode(mode, (width, height)), alpha)
    assert got.shape == (height, width, 4 if alpha else 3)
    assert got.dtype == np.uint8
    assert got.flags.writeable


def test_the_pixels_of_each_mode_are_right():
    image = noise((7, 5))
    exact = np.asarray(image)
    assert np.array_equal(decode(image), exact)
    assert np.array_equal(decode(image.convert("RGBX")), exact)
    assert np.array_equal(decode(image.convert("CMYK")), exact)
    assert np.abs(decode(image.convert("YCbCr")).astype(int) - exact).max() <= 3
    assert np.abs(decode(image.convert("HSV")).astype(int) - exact).max() <= 12
    gray = np.asarray(image.convert("L"))
    for mode in ("L", "I", "F", "LA"):
        assert np.abs(decode(image.convert("L").convert(mode)).astype(int) - gray[..., None]).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    assert decode(palette).tolist() == [[list(RED), [0, 255, 0]]]
    lab = decode(Image.new("LAB", (1, 1), (255, 128, 128)))
    assert lab.min() >= 254


def test_deep_grays_keep_their_upper_bits():
    ramp = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    expected = [[[v] * 3 for v in (0, 1, 128, 255)]]
    assert decode(encoded(Image.fromarray(ramp), "PNG")).tolist() == expected
    assert decode(encoded(Image.fromarray(ramp), "TIFF")).tolist() == expected
    assert decode(Image.fromarray(ramp.astype(np.int32))).tolist() == expected
    assert decode(Image.fromarray((ramp / 65535).astype(np.float32))).tolist() == expected
    assert decode(Image.fromarray(np.array([[0.0, 128.0, 255.0]], np.float32)))[0, :, 0].tolist() == [
        0,
        128,
        255,
    ]
    odd = np.array([[-1000.0, np.nan, 1000.0, np.inf]], np.float32)
    assert decode(Image.fromarray(odd))[0, :, 0].tolist() == [0, 128, 255, 128]


def test_alpha_is_composited_over_white_or_kept():
    image = Image.new("RGBA", (3, 1), (*RED, 255))
    image.putpixel((0, 0), (*RED, 0))
    image.putpixel((1, 0), (0, 0, 0, 51))
    for format in ("PNG", "WEBP"):
        content = encoded(image, format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))
        assert decode(content).tolist() == [[[255, 255, 255], [204, 204, 204], list(RED)]]
        assert decode(content, alpha=True).tolist() == [[[*RED, 0], [0, 0, 0, 51], [*RED, 255]]]
    assert decode(encoded(noise((4, 4)), "PNG"), alpha=True)[..., 3].min() == 255
    assert decode(image.convert("LA")).shape == (1, 3, 3)


def test_transparent_palettes_and_colors_count_as_alpha():
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, *RED])
    palette.putpixel((1, 0), 1)
    for transparency in (0, bytes([0, 255])):
        content = encoded(palette, "PNG", transparency=transparency)
        assert decode(content).tolist() == [[[255, 255, 255], list(RED)]]
        assert decode(content, alpha=True)[0, :, 3].tolist() == [0, 255]
    content = encoded(Image.new("RGB", (1, 1), (0, 0, 0)), "PNG", transparency=(0, 0, 0))
    assert decode(content).tolist() == [[[255, 255, 255]]]


def test_cmyk_jpegs_with_adobes_inversion():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    content = encoded(image, "JPEG", quality=95)
    assert b"Adobe" in content
    red = decode(content)
    assert red[..., 0].min() > 240
    assert red[..., 1:].max() < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    upright = noise((6, 4))
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        assert np.array_equal(decode(encoded(stored, format, exif=exif, **options)), np.asarray(upright))
    assert decode(encoded(stored, "JPEG", exif=exif)).shape == (4, 6, 3)
    deep = Image.fromarray(np.arange(24, dtype=np.uint16).reshape(4, 6) * 2570)
    assert decode(encoded(deep, "TIFF", exif=exif)).shape == ((4, 6, 3) if orientation < 5 else (6, 4, 3))


def test_an_image_with_a_damaged_exif_block_is_decoded():
    content = encoded(noise((6, 4)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff")
    assert decode(content).shape == (4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 77
    assert decode(encoded(noise((6, 4)), "PNG", exif=exif)).shape == (4, 6, 3)


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (5, 4), color) for color in (RED, (0, 0, 255))]
    for format in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        content = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(content)).n_frames == 2
        assert decode(content).reshape(-1, 3).tolist() == [list(RED)] * 20


def test_color_profiles_are_ignored():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = noise((4, 4))
    assert np.array_equal(decode(encoded(image, "PNG", icc_profile=profile)), np.asarray(image))


@pytest.mark.parametrize(
    "format", ["BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TIFF", "WEBP", "AVIF"]
)
def test_formats(format):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    assert decode(encoded(noise((16, 16)), format)).shape == (16, 16, 3)


def test_all_types_of_sources(tmp_path: Path):
    image = noise((4, 3))
    exact = np.asarray(image)
    file = tmp_path / "ä b.png"
    image.save(file)
    for source in (file, str(file), file.read_bytes(), image, exact):
        assert np.array_equal(decode(source), exact)
    assert np.array_equal(decode(exact, alpha=True)[..., :3], exact)
    assert decode(exact[..., 0]).shape == decode(exact[..., :1]).shape == (3, 4, 3)
    clear = np.zeros((2, 2, 4), np.uint8)
    assert decode(clear).min() == 255
    assert decode(clear, alpha=True) is clear


def test_a_jpeg_is_decoded_no_larger_than_needed():
    content = encoded(noise((640, 320)), "JPEG")
    assert decode(content, min_size=(50, 60)).shape == (80, 160, 3)
    assert decode(content, min_size=(300, 300)).shape == (320, 640, 3)
    assert decode(content, min_size=(5000, 300)).shape == (320, 640, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(encoded(noise((640, 320)), "JPEG", exif=exif), min_size=(150, 50))
    assert turned.shape == (160, 80, 3)
    opened = Image.open(io.BytesIO(content))
    assert decode(opened, min_size=(50, 60)).shape == (320, 640, 3)  # the caller's image is not changed


# ------------------------------------------------------------------------------------------------- bad files


def bomb_header(width: int, height: int) -> bytes:
    """Return a PNG whose header has a size, and which has no pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def refusal(source, **options) -> str:
    with pytest.raises(TriptychError) as caught:
        decode(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_not_images_are_reported(tmp_path: Path):
    missing, empty, text, cut = (tmp_path / name for name in ("no.png", "empty.png", "text.png", "cut.jpg"))
    empty.touch()
    text.write_text("not an image\n" * 50)
    content = encoded(noise((64, 64)), "JPEG")
    cut.write_bytes(content[: len(content) // 2])
    for path, what in (
        (missing, "does not exist"),
        (empty, "empty"),
        (text, "or not an image"),
        (cut, "truncated"),
    ):
        message = refusal(path)
        assert path.name in message
        assert what in message
    assert "is a folder" in refusal(tmp_path)
    assert refusal(content[:20], name="shard/7").startswith("shard/7 ")
    assert "float64" in refusal(np.zeros((3, 3, 3)))
    assert "(0, 3, 3)" in refusal(np.zeros((0, 3, 3), np.uint8))


def test_a_bomb_is_refused_before_it_is_decoded():
    message = refusal(bomb_header(20000, 10000), name="big.png")
    assert "200 megapixels" in message
    assert str(MAX_PIXELS // 10**6) in message
    image = Image.new("1", (1, 1))
    image._size = (20000, 10000)  # as of an image that the caller opened
    assert "200 megapixels" in refusal(image)
    assert "damaged" in refusal(bomb_header(10000, 10000))  # the size is allowed, but the pixels are missing


@given(
    cut=st.integers(0, 10_000), at=st.integers(0, 10_000), byte=st.integers(0, 255), number=st.integers(0, 5)
)
@settings(max_examples=150, deadline=None)
def test_damaged_files_are_refused_or_decoded(cut, at, byte, number):
    format = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")[number]
    content = bytearray(encoded(noise((24, 16)), format))
    content[at % len(content)] = byte
    content = bytes(content[: cut % (2 * len(content)) + 1])
    problem = None
    try:
        got = decode(content)
    except TriptychError as refused:
        problem = str(refused)
    if problem is None:
        assert got.dtype == np.uint8
        assert got.ndim == 3
    else:
        assert "\n" not in problem


# -------------------------------------------------------------------------------------------------- resizing


@given(
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    out=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    crop=st.floats(0.2, 1.0),
    mode=st.sampled_from(["crop", "squash", "pad"]),
    interpolation=st.sampled_from(list(RESAMPLING_FILTERS)),
    channels=st.sampled_from([3, 4]),
)
@settings(max_examples=150, deadline=None)
def test_resizing_returns_the_requested_size(size, out, crop, mode, interpolation, channels):
    array = np.full((*size, channels), 77, dtype=np.uint8)
    got = resize_crop(array, out, crop, mode, interpolation, background=(77, 77, 77))
    assert got.shape == (*out, channels)
    assert got.dtype == np.uint8
    if channels == 3:
        assert (got == 77).all()  # no other values appear


def test_resizing_to_the_same_size_changes_nothing():
    array = np.asarray(noise((9, 7)))
    for mode in ("crop", "squash", "pad"):
        assert np.array_equal(resize_crop(array, (7, 9), 1.0, mode), array)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (333, 500), (256, 256), (640, 427)])
def test_standard_preprocessing_equals_torchvision(width, height):
    """Resize the shorter side to 256 and center-crop 224, with the rounding of torchvision written out."""
    image = noise((width, height))
    short = 256
    if width <= height:
        new = (short, int(short * height / width))
    else:
        new = (int(short * width / height), short)
    resized = np.asarray(image.resize(new, Image.Resampling.BICUBIC))
    top, left = round((new[1] - 224) / 2.0), round((new[0] - 224) / 2.0)
    expected = resized[top : top + 224, left : left + 224]
    assert np.array_equal(resize_crop(np.asarray(image), (224, 224), 0.875, "crop", "bicubic"), expected)


def test_squash_and_pad_crop_nothing():
    image = noise((60, 20))
    squashed = resize_crop(np.asarray(image), (16, 16), 1.0, "squash", "bilinear")
    assert np.array_equal(squashed, np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)))
    padded = resize_crop(np.asarray(image), (30, 30), 1.0, "pad", "box", background=(1, 2, 3))
    assert np.array_equal(padded[10:20], np.asarray(image.resize((30, 10), Image.Resampling.BOX)))
    assert (padded[:10] == [1, 2, 3]).all()
    assert (padded[20:] == [1, 2, 3]).all()
    clear = resize_crop(np.asarray(noise((60, 20), "RGBA")), (30, 30), 1.0, "pad")
    assert (clear[:10] == 0).all()


def test_extreme_aspect_ratios_need_little_memory():
    for shape in ((1, 200_000), (200_000, 1)):
        line = np.zeros((*shape, 3), np.uint8)
        assert resize_crop(line, (224, 224), 0.875).shape == (224, 224, 3)
        assert resize_crop(line, (224, 224), 0.875, "pad").shape == (224, 224, 3)
        assert resize_crop(line, (224, 224), 0.875, "squash").shape == (224, 224, 3)


def test_an_image_of_one_pixel():
    pixel = decode(encoded(Image.new("RGB", (1, 1), RED), "PNG"))
    assert (resize_crop(pixel, (4, 6)) == RED).all()


def test_unknown_resize_options_are_refused():
    with pytest.raises(TriptychError, match="cubic2"):
        resize_crop(np.zeros((2, 2, 3), np.uint8), (1, 1), interpolation="cubic2")
    with pytest.raises(TriptychError, match="stretch"):
        resize_crop(np.zeros((2, 2, 3), np.uint8), (1, 1), mode="stretch")  # type: ignore[arg-type]


def test_a_tiff_without_most_of_its_strips_is_refused_before_it_is_allocated():
    file = io.BytesIO()
    Image.new("RGB", (20, 24)).save(file, "TIFF", tiffinfo={278: 24})
    content = bytearray(file.getvalue())
    height = content.index(struct.pack("<HHII", 257, 4, 1, 24))
    content[height + 8 : height + 12] = struct.pack("<I", 8_000_000)
    with pytest.raises(DataError, match=r"damaged image \(1 of 333334 strips"):
        decode(bytes(content))
