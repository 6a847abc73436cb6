"""Build the `emoji` data set: one WebP atlas a drawing style, and one emoji.json that says what every cell shows.

    python tools/make_emoji.py                                # the four shipped styles -> src/triptych/assets/emoji
    python tools/make_emoji.py --styles all --out emoji-all   # four more training styles, for emoji(root="emoji-all")
    python tools/make_emoji.py --sheet docs/images/emoji_contact_sheet.png

Needs npm (it fetches pinned packages by name), and from PyPI numpy, pillow and resvg-py. Running it twice gives the same bytes.

What is in: the six pictorial groups of emojibase-data (smileys, animals-nature, food-drink, travel-places, activities,
objects). What is out: people-body, flags, symbols, components, skin tones, and `emotion` signs are kept as they are drawings.

A concept is a hexcode after `concept_of`, which drops presentation selectors and skin tones and merges the man / woman /
person variants of a role into one, so that near-duplicates can never be two classes, nor fall on both sides of a split.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import tarfile
import tempfile
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent / "src" / "triptych" / "assets" / "emoji"
CELL, COLUMNS, RENDER = 64, 32, 256  # pixels of a cell, cells of an atlas row, pixels an SVG is first drawn at
GROUPS = ("smileys-emotion", "animals-nature", "food-drink", "travel-places", "activities", "objects")
LABELS = "emojibase-data@17.0.0"


@dataclass(frozen=True, kw_only=True)
class Style:
    name: str
    package: str  # npm name @ version
    family: str  # styles of one family are the same drawings: never on both sides of a split
    split: str
    licence: str  # SPDX, of the artwork
    credit: str
    shipped: bool = False


STYLES = (
    Style(name="fluent-3d", package="@lobehub/fluent-emoji-3d@1.1.0", family="fluent", split="train", licence="MIT",
          credit="Fluent Emoji, Microsoft Corporation, https://github.com/microsoft/fluentui-emoji", shipped=True),
    Style(name="noto", package="@iconify-json/noto@1.2.9", family="noto", split="train", licence="Apache-2.0",
          credit="Noto Emoji, Google LLC, https://github.com/googlefonts/noto-emoji", shipped=True),
    Style(name="noto-v1", package="@iconify-json/noto-v1@1.2.5", family="noto-v1", split="train", licence="Apache-2.0",
          credit="Noto Emoji (2017, 'blob'), Google LLC, https://github.com/googlefonts/noto-emoji", shipped=True),
    Style(name="twemoji", package="@iconify-json/twemoji@1.2.5", family="twemoji", split="test", licence="CC-BY-4.0",
          credit="Twemoji, Twitter, Inc and other contributors, https://github.com/jdecked/twemoji", shipped=True),
    Style(name="fluent-flat", package="@iconify-json/fluent-emoji-flat@1.2.6", family="fluent", split="train", licence="MIT",
          credit="Fluent Emoji, Microsoft Corporation, https://github.com/microsoft/fluentui-emoji"),
    # The package says Apache-2.0; that is the code's. The artwork of FxEmojis is CC BY 4.0.
    Style(name="fxemoji", package="@iconify-json/fxemoji@1.2.2", family="fxemoji", split="train", licence="CC-BY-4.0",
          credit="FxEmojis, Mozilla Foundation, https://github.com/mozilla/fxemoji"),
    Style(name="emojione", package="@iconify-json/emojione@1.2.3", family="emojione", split="train", licence="CC-BY-4.0",
          credit="EmojiOne 2, EmojiOne, https://github.com/EmojiTwo/emojitwo"),
    Style(name="streamline", package="@iconify-json/streamline-emojis@1.2.4", family="streamline", split="train",
          licence="CC-BY-4.0", credit="Streamline Emojis, Webalys LLC, https://github.com/webalys-hq/streamline-vectors"),
)


# ---------------------------------------------------------------------------------------------------- packages

class Package:
    """One npm package as the registry serves it: a .tgz in the cache, read in place."""

    def __init__(self, spec: str, cache: Path):
        path = cache / (spec.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
        if not path.exists():
            subprocess.run(["npm", "pack", "--silent", "--pack-destination", str(cache), spec], check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(path) as tar:
            self.files = {m.name.split("/", 1)[1]: m for m in tar.getmembers() if m.isfile()}
        self.path = path

    def read(self, *names: str) -> dict[str, bytes]:
        """All the named files in one pass (a .tgz cannot be sought in)."""
        wanted = set(names)
        with tarfile.open(self.path) as tar:
            return {n: tar.extractfile(m).read() for m in tar if (n := m.name.partition("/")[2]) in wanted}

    def json(self, name: str):
        return json.loads(self.read(name)[name])


# ---------------------------------------------------------------------------------------------------- concepts

def concept_of(hexcode: str) -> str:
    """Canonical key of a hexcode: lower case, no FE0F, no skin tone, no gender: one key for each role."""
    parts = [p for p in hexcode.lower().split("-") if p != "fe0f" and not "1f3fb" <= p <= "1f3ff"]
    while len(parts) > 2 and parts[-1] in ("2640", "2642"):  # ... ZWJ female | male
        parts = parts[:-2]
    if len(parts) > 1 and parts[0] in ("1f468", "1f469") and parts[1] == "200d":  # man | woman ZWJ tool -> person ZWJ tool
        parts[0] = "1f9d1"
    return "-".join(parts)


def read_concepts(package: Package) -> list[dict]:
    data, meta = package.json("en/data.json"), package.json("meta/groups.json")
    concepts: dict[str, dict] = {}
    for entry in sorted((e for e in data if "group" in e), key=lambda e: e["order"]):
        group = meta["groups"][str(entry["group"])]
        if group not in GROUPS:
            continue
        key = concept_of(entry["hexcode"])
        concepts.setdefault(key, {  # the first in Unicode order is the person variant: it names the concept
            "id": key, "hexcode": entry["hexcode"], "emoji": entry["emoji"], "label": entry["label"],
            "tags": entry.get("tags", []), "group": group, "subgroup": meta["subgroups"][str(entry["subgroup"])],
        })
    labels = Counter(c["label"] for c in concepts.values())
    assert max(labels.values()) == 1, [n for n, k in labels.items() if k > 1]
    return list(concepts.values())


def slug(name: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", name.lower()) if not unicodedata.combining(c))
    return re.sub(r"[^a-z0-9]", "", plain)


def read_names(labels: Package, named: list[Package]) -> dict[str, str]:
    """slug -> hexcode key over every emoji. Sources in order of trust; the first to claim a slug keeps it."""
    names: dict[str, str] = {}
    data = labels.json("en/data.json")
    known = {concept_of(e["hexcode"]) for e in data}
    for entry in data:
        names.setdefault(slug(entry["label"]), concept_of(entry["hexcode"]))
    for package in named:  # CLDR names of several years, and their aliases
        chars, icons = package.json("chars.json"), package.json("icons.json")
        keys = {icon: concept_of(h) for h, icon in sorted(chars.items(), reverse=True) if concept_of(h) in known}
        for icon, key in keys.items():
            names.setdefault(slug(icon), key)
        for alias, to in icons.get("aliases", {}).items():
            if to["parent"] in keys and len(to) == 1:  # a flipped alias is another emoji
                names.setdefault(slug(alias), keys[to["parent"]])
    for entry in data:
        if "-" not in entry["hexcode"]:
            names.setdefault(slug(unicodedata.name(entry["emoji"][0], "")), concept_of(entry["hexcode"]))
    for name in sorted(n for n in labels.files if re.fullmatch(r"en/shortcodes/[\w-]+\.json", n)):
        for hexcode, short in labels.json(name).items():
            for s in [short] if isinstance(short, str) else short:
                names.setdefault(slug(s), concept_of(hexcode))
    names.pop("", None)
    return names


# ---------------------------------------------------------------------------------------------------- drawings

def shrink(image: Image.Image) -> np.ndarray:
    """Any size -> (64, 64, 4) uint8. Pillow resizes RGBA premultiplied, so no dark fringe comes from what is transparent."""
    return np.asarray(image.convert("RGBA").resize((CELL, CELL), Image.Resampling.LANCZOS))


def draw_icon(icons: dict, name: str) -> np.ndarray:
    import resvg_py

    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
           f'viewBox="{left} {top} {width} {height}" width="{RENDER}" height="{RENDER}">{icon["body"]}</svg>')
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    return shrink(Image.open(io.BytesIO(bytes(png))))


def read_style(style: Style, package: Package, concepts: list[dict], names: dict[str, str], hand: dict) -> list[tuple[int, np.ndarray]]:
    """[(concept index, RGBA cell)] in concept order; a style may draw a concept more than once."""
    index = {c["id"]: i for i, c in enumerate(concepts)}
    if "assets" in {n.split("/")[0] for n in package.files}:  # a raster a hexcode
        files = {concept_of(Path(n).stem): n for n in sorted(package.files) if n.startswith("assets/")}  # FE0F twins: one of the two
        wanted = {n: index[key] for key, n in files.items() if key in index}
        found = [(i, n, shrink(Image.open(io.BytesIO(b)))) for (n, b) in package.read(*wanted).items() for i in [wanted[n]]]
    else:
        icons, chars = package.json("icons.json"), package.json("chars.json")
        by_icon = {icon: concept_of(h) for h, icon in chars.items()}
        by_label = {c["label"]: c["id"] for c in concepts}
        found = []
        for name in icons["icons"]:
            base = re.sub(r"-\d$", "", name)  # streamline numbers its second and third drawings
            if chars:
                key = by_icon.get(name)
            elif name in hand or base in hand:
                label = hand.get(name, hand.get(base))
                key = label and by_label.get(label)
                assert label is None or key, (style.name, name, label)
            else:
                key = names.get(slug(name)) or names.get(slug(base))
            if key in index:
                found.append((index[key], name, draw_icon(icons, name)))
        # An icon that several hexcodes share is stored once under one name: chars.json tells the others.
        drawn = {name: cell for _, name, cell in found}
        have = {i for i, _, _ in found}
        for hexcode, name in sorted(chars.items()):
            i = index.get(concept_of(hexcode))
            if i is not None and i not in have:
                alias = icons.get("aliases", {}).get(name)
                parent = alias["parent"] if alias else name
                cell = drawn[parent] if parent in drawn else draw_icon(icons, parent)
                found.append((i, name, cell[:, ::-1] if alias and alias.get("hFlip") else cell))
                have.add(i)
    found.sort(key=lambda f: (f[0], f[1]))
    return [(i, cell) for i, _, cell in found if cell[..., 3].max() > 127]


def bleed(cell: np.ndarray) -> np.ndarray:
    """Let the colours run out under what is transparent, so that lossy blocks across an edge hold one colour, not a jump to black."""
    rgb, weight = cell[..., :3].astype(np.float32), (cell[..., 3:] > 8).astype(np.float32)
    rgb *= weight
    for _ in range(12):
        total, count = rgb.copy(), weight.copy()
        for axis in (0, 1):
            for step in (-1, 1):
                total, count = total + np.roll(rgb, step, axis), count + np.roll(weight, step, axis)
        fresh = (weight == 0) & (count > 0)
        rgb = np.where(fresh, total / np.maximum(count, 1), rgb)
        weight = np.where(fresh, 1.0, weight)
    seen = cell[..., 3] > 8
    rgb = np.where(weight > 0, rgb, cell[seen][:, :3].mean(0))
    rgb = np.where(seen[..., None], cell[..., :3], rgb)
    return np.concatenate([rgb.round().astype(np.uint8), cell[..., 3:]], -1)


def write(path: Path, data: bytes) -> None:
    side = path.with_name(path.name + ".part")
    side.write_bytes(data)
    os.replace(side, path)


def write_atlas(path: Path, cells: list[np.ndarray]) -> None:
    rows = -(-len(cells) // COLUMNS)
    atlas = np.zeros((rows * CELL, COLUMNS * CELL, 4), np.uint8)
    for k, cell in enumerate(cells):
        y, x = k // COLUMNS * CELL, k % COLUMNS * CELL
        atlas[y:y + CELL, x:x + CELL] = bleed(cell)
    out = io.BytesIO()
    Image.fromarray(atlas).save(out, "WEBP", quality=90, alpha_quality=100, method=6, exact=True)
    write(path, out.getvalue())


def build(out: Path, cache: Path, styles: list[Style]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    labels = Package(LABELS, cache)
    packages = {s.name: Package(s.package, cache) for s in STYLES if s in styles or s.name in ("noto", "twemoji", "fluent-flat")}
    concepts = read_concepts(labels)
    names = read_names(labels, [packages[n] for n in ("noto", "twemoji", "fluent-flat")])
    hand = json.loads((HERE / "emoji_names.json").read_text())
    described = []
    for style in styles:
        drawings = read_style(style, packages[style.name], concepts, names, hand.get(style.package.split("/")[-1].split("@")[0], {}))
        write_atlas(out / f"{style.name}.webp", [cell for _, cell in drawings])
        described.append({
            "name": style.name, "split": style.split, "family": style.family, "licence": style.licence, "credit": style.credit,
            "source": "npm " + style.package, "atlas": f"{style.name}.webp", "cells": [i for i, _ in drawings],
        })
        size = (out / f"{style.name}.webp").stat().st_size / 1e6
        print(f"{style.name:12s} {len(drawings):5d} drawings of {len({i for i, _ in drawings}):5d} concepts  {size:.2f} MB")
    table = {"cell": CELL, "columns": COLUMNS, "labels": "npm " + LABELS, "concepts": concepts, "styles": described}
    write(out / "emoji.json", (json.dumps(table, ensure_ascii=False, indent=None, separators=(",", ":")) + "\n").encode())
    print(f"{len(concepts)} concepts, {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.2f} MB in {out}")


# ---------------------------------------------------------------------------------------------------- contact sheet

def contact_sheet(root: Path, path: Path, rows: int = 24, labels: list[str] | None = None, checker: bool = False) -> None:
    """Rows: concepts spread evenly over the groups; columns: styles. An empty field: this style does not draw it."""
    table = json.loads((root / "emoji.json").read_text())
    concepts, styles = table["concepts"], table["styles"]
    if labels is None:
        chosen = []
        for group in GROUPS:
            here = [i for i, c in enumerate(concepts) if c["group"] == group]
            chosen += [here[int((k + 0.5) * len(here) / (rows // len(GROUPS)))] for k in range(rows // len(GROUPS))]
    else:
        chosen = [i for i, c in enumerate(concepts) if c["label"] in labels]
    left, top = 190, 22
    sheet = Image.new("RGB", (left + len(styles) * (CELL + 8), top + len(chosen) * (CELL + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, style in enumerate(styles):
        atlas = Image.open(root / style["atlas"]).convert("RGBA")
        x = left + column * (CELL + 8)
        pen.text((x, 5), style["name"], fill="black")
        for row, i in enumerate(chosen):
            y = top + row * (CELL + 4)
            if column == 0:
                pen.text((4, y + 20), concepts[i]["label"][:30], fill="black")
                pen.text((4, y + 34), f"{concepts[i]['group']} / {concepts[i]['subgroup']}"[:30], fill="grey")
            if i in style["cells"]:
                k = style["cells"].index(i)
                cell = atlas.crop((k % COLUMNS * CELL, k // COLUMNS * CELL, k % COLUMNS * CELL + CELL, k // COLUMNS * CELL + CELL))
                if checker and row % 2:
                    pen.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill="#303040")
                sheet.paste(cell, (x, y), cell)
    out = io.BytesIO()
    sheet.quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    write(path, out.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--cache", type=Path, help="where the npm packages are kept (default: a temporary folder)")
    parser.add_argument("--styles", default="shipped", help="shipped, all, or names with commas")
    parser.add_argument("--sheet", type=Path, help="only draw a contact sheet of --out into this PNG")
    args = parser.parse_args()
    if args.sheet:
        return contact_sheet(args.out, args.sheet)
    chosen = {"shipped": [s for s in STYLES if s.shipped], "all": list(STYLES)}.get(args.styles)
    if chosen is None:
        chosen = [s for s in STYLES if s.name in args.styles.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        build(args.out, args.cache or Path(temporary), chosen)


if __name__ == "__main__":
    main()
