"""Places in a file where other programs put their texts: comments, EXIF, XMP, and the lowest bits of the pixels."""

import gzip
import io
import json
from xml.sax.saxutils import escape

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from triptych.pipelines.diffusion.foreign_metadata.hidden_text import hidden_texts
from triptych.pipelines.diffusion.image_metadata import read_settings

pytestmark = pytest.mark.proves(
    "Prompts and generation metadata", "texts in comments, EXIF, XMP and lowest bits", by="names"
)

TEXT = "a cat\nNegative prompt: dog\nSteps: 22, Sampler: Euler, CFG scale: 6.5, Seed: 77, Size: 512x640"
DRAW_THINGS = json.dumps(
    {
        **{"c": "a cat & <b>", "uc": "dog", "steps": 20, "scale": 7.5, "seed": 11, "size": "512x768"},
        **{"sampler": "DPM++ 2M Karras", "model": "sd_v1.5_f16.ckpt", "strength": 1},
    }
)
# As Apple's ImageIO writes what Draw Things gives it.
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description rdf:about=""><xmp:CreatorTool>Draw Things'
    '</xmp:CreatorTool><exif:UserComment><rdf:Alt><rdf:li xml:lang="x-default">'
    f"{escape(DRAW_THINGS)}</rdf:li></rdf:Alt></exif:UserComment></rdf:Description></rdf:RDF></x:xmpmeta>"
)
NOVELAI = {
    "Description": "a cat",
    "Software": "NovelAI",
    "Source": "NovelAI Diffusion V3",
    "Comment": json.dumps({"prompt": "a cat", "uc": "dog", "steps": 28, "scale": 5.0, "seed": 12}),
}


def encoded(format, mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, (64, 64)).save(file, format, **options)
    return file.getvalue()


def exif(**tags):
    block = Image.Exif()
    for tag, value in tags.items():
        block[int(tag[1:], 16)] = value
    return block.tobytes()


@pytest.mark.parametrize(
    "data",
    [
        encoded("JPEG", comment=TEXT.encode()),
        encoded("GIF", "P", comment=TEXT.encode()),
        encoded("JPEG", exif=exif(x010E=TEXT)),
        encoded("JPEG", exif=exif(x9C9C=TEXT.encode("utf-16-le") + b"\0\0")),
        encoded("WEBP", exif=exif(x010E=TEXT)),
    ],
    ids=["jpeg-comment", "gif-comment", "description", "windows-comment", "webp-description"],
)
def test_the_web_uis_text_in_other_places(data):
    record = read_settings(data).record
    assert (record.prompt, record.negative_prompt, record.seed) == ("a cat", "dog", 77)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_draw_things_json_in_xmp(format):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("XML:com.adobe.xmp", XMP)
    options = {"pnginfo": chunks} if format == "PNG" else {"xmp": XMP.encode()}
    settings = read_settings(encoded(format, **options))
    assert (settings.source, settings.record.prompt) == ("Draw Things", "a cat & <b>")
    assert (settings.record.seed, settings.record.schedule) == (11, "karras")


def hide(text, form, bands):
    """Hide a text as the web UI's extension "stealth pnginfo" does: bits go down a column, then to the next one."""
    payload = gzip.compress(text.encode()) if form.endswith("comp") else text.encode()
    data = form.encode() + (8 * len(payload)).to_bytes(4, "big") + payload
    pixels = np.full((96, 128, 4), 255, np.uint8)
    positions = ((x, y, band) for x in range(128) for y in range(96) for band in bands)
    for bit, (x, y, band) in zip(np.unpackbits(np.frombuffer(data, np.uint8)), positions, strict=False):
        pixels[y, x, band] = pixels[y, x, band] & 254 | bit
    return Image.fromarray(pixels)


@pytest.mark.parametrize("form", ["stealth_pnginfo", "stealth_pngcomp", "stealth_rgbinfo", "stealth_rgbcomp"])
def test_text_in_the_lowest_bits(form):
    image = hide(TEXT, form, [0, 1, 2] if "rgb" in form else [3])
    file = io.BytesIO()
    (image.convert("RGB") if "rgb" in form else image).save(file, "PNG")
    record = read_settings(file.getvalue()).record
    assert (record.prompt, record.num_steps, record.width) == ("a cat", 22, 512)


def test_novelais_chunks_in_alpha():
    file = io.BytesIO()
    hide(json.dumps(NOVELAI), "stealth_pngcomp", [3]).save(file, "PNG")
    settings = read_settings(file.getvalue())
    assert (settings.source, settings.record.prompt, settings.record.num_steps) == ("NovelAI", "a cat", 28)


@pytest.mark.parametrize("count", [3, 20, 30, 100])
def test_a_damaged_hidden_text_is_none(count):
    """A resized or cut image has the name of the form at most."""
    pixels = np.asarray(hide(TEXT * 3, "stealth_pngcomp", [3])).copy()
    flat = pixels[..., 3].swapaxes(0, 1).reshape(-1)
    flat[8 * count :] = 254
    pixels[..., 3] = flat.reshape(128, 96).swapaxes(0, 1)
    assert hidden_texts(Image.fromarray(pixels)) == {}


def test_midjourneys_description():
    chunks = PngImagePlugin.PngInfo()
    job = "1b2c3d4e-aaaa-bbbb-cccc-1234567890ab"
    chunks.add_text("Description", f"a red fox -- in snow --ar 3:2 --no dog, cat --v 5.2 Job ID: {job}")
    settings = read_settings(encoded("PNG", pnginfo=chunks))
    record = settings.record
    assert (settings.source, record.prompt, record.negative_prompt) == (
        "Midjourney",
        "a red fox -- in snow",
        "dog, cat",
    )
    assert settings.notes[1:] == ("--ar: 3:2 is not reproduced", "--v: 5.2 is not reproduced")
