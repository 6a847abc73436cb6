"""Feed damaged files to every reader: each must be read, or refused by a `TriptychError`.

    python tools/fuzz_readers.py [--count 10000] [--seed 0] [--reader NAME ...] [--keep FOLDER]

Small valid files of each kind are written first, then damaged: bytes flipped, cut, repeated or replaced, words of the
format exchanged, numbers changed. A reader fails if it raises anything but a `TriptychError`, takes more than 5 s of
CPU time, or more memory than 4 times the file (and `SLACK` for the interpreter and for decoded images). Exits
with 1 and prints how to repeat each failure.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

import triptych as tp
from triptych import weights
from triptych.bench.children.process_memory import memory, reset_peak
from triptych.data.images import decode
from triptych.data.open import open_source
from triptych.diffusion.config import ProcessConfig
from triptych.models.configs.autoencoder import AutoencoderConfig
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.configs.text import TextConfig
from triptych.models.configs.unet import UNetConfig
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.pipelines.diffusion import image_metadata
from triptych.weights.diffusion.textual_inversion import read_embeddings

CPU_SECONDS = 5
MEMORY_FACTOR = 4
SLACK = 64 * 2**20
NUMBERS = (
    b"-1",
    b"0",
    b"1e99",
    b"99999999999",
    b"NaN",
    b'"x"',
    b"[]",
    b"null",
)  # what a number is replaced by
PARAMETERS = (
    "a red apple, (shiny:1.2) <lora:x:0.5>\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M Karras, "
    'CFG scale: 7.5, Seed: 4294967297, Size: 512x512, Model hash: 6ce0161689, Model: "a, b", Version: v1.8.0'
)
COMFYUI = {
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 5, "steps": 20, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal",
                   "denoise": 1.0, "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0],
                   "latent_image": ["5", 0]},
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 512, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a house", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text", "clip": ["4", 1]}},
}  # fmt: skip
FOOOCUS = {"prompt": "a cat", "negative_prompt": "", "steps": 30, "guidance_scale": 4.0, "seed": "123",
           "sampler": "dpmpp_2m_sde_gpu", "scheduler": "karras", "resolution": "(1152, 896)"}  # fmt: skip
SWARM = {
    "sui_image_params": {
        "prompt": "a dog",
        "seed": 1,
        "steps": 20,
        "cfgscale": 7.0,
        "width": 512,
        "height": 512,
    }
}


@dataclass(frozen=True)
class Reader:
    """A reader and a valid input of it."""

    path: Path
    """The file, or the folder, that `read` takes."""
    damaged: tuple[Path, ...]
    """The files to damage; one at a time."""
    read: Callable[[Path], object]


def tiny_latent_diffusion() -> LatentDiffusion:
    """Return a text-to-image model with random weights."""
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(
        regularization="kl",
        base_channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        latent_channels=4,
        norm_groups=4,
    )
    network = UNetConfig(
        latent_size=(8, 8), base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1,
        attention_downsample_factors=(1,), num_heads=2, context_dim=16, norm_groups=4,
    )  # fmt: skip
    text = TextConfig(
        type="clip", vocab_size=49408, embed_dim=16, depth=1, num_heads=2, mlp_ratio=2.0, pad_token=49407
    )
    return LatentDiffusion(
        LatentDiffusionConfig(
            autoencoder=autoencoder, network=network, text_encoder=text, process=ProcessConfig()
        )
    )


def load_and_inspect(path: Path) -> object:
    """Inspect a checkpoint, then load it."""
    weights.inspect(path)
    return tp.load(path)


def one_file(path: Path, read: Callable[[Path], object]) -> Reader:
    return Reader(path, (path,), read)


def checkpoints(root: Path) -> dict[str, Reader]:
    """Write one checkpoint of each container and of several formats."""
    torch.manual_seed(0)
    vit = tp.create("vit-ti16", depth=1, image_size=32, embed_dim=64, num_heads=1, num_classes=3)
    swin = tp.create(
        "swin-t", depths=(1, 1), embed_dim=32, num_heads=(1, 2), image_size=32, window_size=4, num_classes=3
    )
    readers = {}
    for name, net in (("vit", vit), ("swin", swin)):
        tp.save(net, root / f"{name}.safetensors")
        readers[f"{name}.safetensors"] = one_file(root / f"{name}.safetensors", load_and_inspect)
        tp.export(net, root / f"{name}.pth", format="timm")
        state = torch.load(root / f"{name}.pth", weights_only=True)
        torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, root / f"{name}-zip.pth")
        torch.save({"state_dict": state}, root / f"{name}-old.pth", _use_new_zipfile_serialization=False)
        for form in ("zip", "old"):
            path = root / f"{name}-{form}.pth"
            readers[path.name] = one_file(path, load_and_inspect)
        folder = root / f"{name}-hf"
        tp.export(net, folder, format="hf")
        files = tuple(sorted(folder.glob("*.json"))) + tuple(folder.glob("*.safetensors"))
        readers[f"{name}-hf"] = Reader(folder, files, load_and_inspect)
    tp.export(vit, root / "vit.npz", format="google")
    readers["vit.npz"] = one_file(root / "vit.npz", load_and_inspect)
    return readers


def diffusion(root: Path) -> dict[str, Reader]:
    """Write a pipeline folder, a single file, a LoRA and embeddings."""
    ldm = tiny_latent_diffusion()
    folder = root / "pipeline"
    tp.export(ldm, folder, format="diffusers")
    configs = tuple(sorted(folder.rglob("*.json")))
    tp.save(ldm, root / "ldm.safetensors")
    readers = {
        "pipeline": Reader(
            folder, tuple(file for file in configs if file.stat().st_size < 10_000), load_and_inspect
        ),
        "ldm.safetensors": one_file(root / "ldm.safetensors", load_and_inspect),
    }
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {f"{layer}.lora_down.weight": torch.randn(2, 8), f"{layer}.lora_up.weight": torch.randn(8, 2)}
    save_file(lora | {f"{layer}.alpha": torch.tensor(1.0)}, root / "lora.safetensors")
    torch.save(lora, root / "lora.pt")
    save_file({"emb_params": torch.randn(2, 16)}, root / "embedding.safetensors")
    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.randn(2, 16)}, "name": "thing"},
        root / "embedding.pt",
    )

    def read_lora(path: Path) -> None:
        weights.inspect(path)
        tp.load_lora(ldm, path).undo()

    query = f"{layer}.dora_scale"
    save_file(lora | {query: torch.rand(8, 1)}, root / "dora.safetensors")
    loha = {
        f"{layer}.hada_w{k}_{side}": torch.randn(*shape)
        for k in "12"
        for side, shape in (("a", (8, 2)), ("b", (2, 8)))
    }
    save_file(loha | {f"{layer}.alpha": torch.tensor(1.0)}, root / "loha.safetensors")
    save_file(
        {f"{layer}.lokr_w1": torch.randn(2, 2), f"{layer}.lokr_w2": torch.randn(4, 4)},
        root / "lokr.safetensors",
    )
    for name in ("lora.safetensors", "lora.pt", "dora.safetensors", "loha.safetensors", "lokr.safetensors"):
        readers[name] = one_file(root / name, read_lora)
    for name in ("embedding.safetensors", "embedding.pt"):
        readers[name] = one_file(root / name, read_embeddings)
    return readers


def images(root: Path) -> dict[str, Reader]:
    """Write images in several formats, with and without generation metadata."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    readers = {}
    for suffix in ("png", "jpg", "webp", "gif", "tif", "bmp", "ppm"):
        image.save(root / f"image.{suffix}")
        readers[f"image.{suffix}"] = one_file(
            root / f"image.{suffix}", lambda path: decode(path, alpha=False, name=str(path))
        )
    texts = {
        "a1111": ("parameters", PARAMETERS),
        "comfyui": ("prompt", json.dumps(COMFYUI)),
        "fooocus": ("parameters", json.dumps(FOOOCUS)),
        "swarm": ("parameters", json.dumps(SWARM)),
        "invokeai": (
            "invokeai_metadata",
            json.dumps({"positive_prompt": "a cat", "steps": 9, "scheduler": "euler"}),
        ),
        "novelai": ("Comment", json.dumps({"prompt": "a cat", "steps": 28, "sampler": "k_euler", "seed": 1})),
    }
    for name, (key, text) in texts.items():
        info = PngImagePlugin.PngInfo()
        info.add_text(key, text)
        if name == "novelai":
            info.add_text("Software", "NovelAI")
        image.save(root / f"{name}.png", pnginfo=info)
        readers[f"{name}.png"] = one_file(root / f"{name}.png", image_metadata.read)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\x00" + PARAMETERS.encode("utf-16-be")
    image.save(root / "parameters.jpg", exif=exif)
    readers["parameters.jpg"] = one_file(root / "parameters.jpg", image_metadata.read)
    return readers


def tables(root: Path) -> dict[str, Reader]:
    """Write image folders, tables of files, and folders of masks."""
    rng = np.random.default_rng(1)
    readers = {}

    def image(path: Path, mode: str = "RGB") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (12, 12, 3) if mode == "RGB" else (12, 12)
        Image.fromarray(rng.integers(0, 3 if mode == "L" else 256, shape, dtype=np.uint8)).save(path)

    def read(path: Path) -> None:
        source = open_source(str(path))
        for index in range(len(source)):
            source[index]

    for name in ("csv", "jsonl"):
        folder = root / name
        for index in range(3):
            image(folder / f"{index}.png")
        rows = [{"file_name": f"{i}.png", "label": "ab"[i % 2]} for i in range(3)]
        lines = (
            ["file_name,label", *(",".join(row.values()) for row in rows)]
            if name == "csv"
            else map(json.dumps, rows)
        )
        (folder / f"metadata.{name}").write_text("\n".join(lines) + "\n")
        readers[f"metadata.{name}"] = Reader(folder, (folder / f"metadata.{name}",), read)
    masks = root / "masks"
    for index in range(2):
        image(masks / "images" / f"{index}.png")
        image(masks / "masks" / f"{index}.png", "L")
    (masks / "classes.txt").write_text("sky\nland\nsea\n")
    readers["masks"] = Reader(masks, (masks / "masks" / "0.png", masks / "classes.txt"), read)
    return readers


def annotations(root: Path) -> dict[str, Reader]:
    """Write folders of images with COCO, YOLO and labelme annotations."""
    rng = np.random.default_rng(2)
    polygon = [2, 2, 9, 2, 9, 9]
    labelme = {
        "version": "5.0", "flags": {}, "imagePath": "0.png", "imageData": None, "imageHeight": 12, "imageWidth": 12,
        "shapes": [{"label": "cat", "shape_type": "polygon", "points": [[2, 2], [9, 2], [9, 9]]}],
    }  # fmt: skip
    coco = {
        "images": [{"id": 1, "file_name": "0.png", "height": 12, "width": 12}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [polygon], "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 1, "iscrowd": 1,
             "segmentation": {"size": [12, 12], "counts": [100, 20, 24]}},
        ],
    }  # fmt: skip
    files = {
        "coco": ("0.png", "_annotations.coco.json", json.dumps(coco)),
        "yolo": ("images/0.png", "labels/0.txt", "0 " + " ".join(str(x / 12) for x in polygon) + "\n"),
        "labelme": ("0.png", "0.json", json.dumps(labelme)),
    }

    def read(path: Path) -> None:
        source = open_source(str(path))
        for index in range(len(source)):
            source[index]

    readers = {}
    for name, (image, annotation, text) in files.items():
        folder = root / name
        for file in (folder / image, folder / annotation):
            file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(folder / image)
        (folder / annotation).write_text(text)
        damaged = [folder / annotation]
        if name == "yolo":
            (folder / "data.yaml").write_text("nc: 1\nnames: [cat]\n")
            damaged.append(folder / "data.yaml")
        readers[name] = Reader(folder, tuple(damaged), read)
    return readers


MAKERS = (checkpoints, diffusion, images, tables, annotations)


def damage(data: bytes, rng: random.Random) -> bytes:
    """Return `data` with one to four random changes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not out:
            break
        at = (
            min(rng.randrange(len(out)), rng.randrange(len(out)))
            if rng.random() < 0.5
            else rng.randrange(len(out))
        )
        change = rng.randrange(8)
        if change == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            out[at] = rng.choice((0, 0x7F, 0x80, 0xFF, 0x22, 0x7B))
        elif change == 2:
            del out[at:]
        elif change == 3:
            del out[at : at + rng.randrange(1, 64)]
        elif change == 4:
            start = rng.randrange(len(out))
            out[at:at] = out[start : start + rng.randrange(1, 256)]
        elif change == 5:
            out[at : at + 8] = rng.choice((2**63 - 1, 2**40, 2**31, 0, 2**64 - 1)).to_bytes(8, "little")
        elif change == 6:
            out = change_number(out, rng)
        else:
            out = exchange_words(out, rng)
    return bytes(out)


def change_number(out: bytearray, rng: random.Random) -> bytearray:
    """Replace a decimal number of the text by one that is negative, huge, not finite or no number."""
    numbers = list(re.finditer(rb"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.])", out))
    if numbers:
        match = rng.choice(numbers)
        out[match.start() : match.end()] = rng.choice(
            (b"-1", b"0", b"1e99", b"99999999999", b"NaN", b'"x"', b"[]", b"null")
        )
    return out


def exchange_words(out: bytearray, rng: random.Random) -> bytearray:
    """Exchange two words of the file."""
    words = list(re.finditer(rb"[A-Za-z_]{3,}", out))
    if len(words) > 1:
        first, second = sorted(rng.sample(words, 2), key=re.Match.start)
        out[second.start() : second.end()], out[first.start() : first.end()] = first.group(), second.group()
    return out


def write_readers(root: Path) -> dict[str, Reader]:
    """Write all valid inputs below `root`."""
    readers: dict[str, Reader] = {}
    for maker in MAKERS:
        folder = root / maker.__name__
        folder.mkdir()
        readers |= maker(folder)
    return readers


def release_memory() -> None:
    """Return free memory to the operating system: what a reader takes of it would not show as growth."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # of glibc
        trim(0)


def attempt(reader: Reader, size: int) -> str | None:
    """Read the input; return what went wrong, if anything did."""
    reset_peak()
    before, start = memory().current, time.process_time()
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(reader.path)
    except tp.TriptychError as error:
        if "\n" in str(error).strip() and len(str(error).splitlines()) > 40:
            return f"an error of {len(str(error).splitlines())} lines"
    except Exception:
        return traceback.format_exc(limit=-4)
    seconds = time.process_time() - start
    if seconds > CPU_SECONDS:
        return f"took {seconds:.1f} s of CPU time"
    grown = memory().peak - before
    if grown > MEMORY_FACTOR * size + SLACK:
        return f"took {grown / 2**20:.0f} MB for a file of {size / 2**20:.2f} MB"
    return None


def fuzz(count: int, seed: int, names: list[str], root: Path, keep: Path | None = None) -> list[str]:
    """Damage and read `count` inputs, and return a description of each failure."""
    torch.set_num_threads(1)
    release_memory()
    readers = write_readers(root)
    unknown = set(names) - set(readers)
    if unknown:
        raise SystemExit(f"no reader {', '.join(sorted(unknown))}; there are {', '.join(readers)}")
    chosen = [name for name in readers if not names or name in names]
    for name in chosen:
        problem = attempt(readers[name], 0)
        if problem and "MB" not in problem:
            raise SystemExit(f"the undamaged input of {name} is not read: {problem}")
    failures = []
    for index in range(count):
        name = chosen[index % len(chosen)]
        reader, rng = readers[name], random.Random(f"{seed}-{index}")
        target = rng.choice(reader.damaged)
        original = target.read_bytes()
        damaged = damage(original, rng)
        target.write_bytes(damaged)
        try:
            problem = attempt(reader, len(damaged))
        finally:
            target.write_bytes(original)
        if problem:
            failures.append(f"{name}, input {index} of seed {seed} ({target.name}): {problem}")
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{index}-{target.name}").write_bytes(damaged)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", nargs="*", default=[])
    parser.add_argument("--keep", type=Path, help="folder for the inputs that failed")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="fuzz"))
    try:
        failures = fuzz(args.count, args.seed, args.reader, root, args.keep)
    finally:
        shutil.rmtree(root)
    print(*failures, sep="\n\n")
    print(f"{args.count:,} inputs, {len(failures)} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
