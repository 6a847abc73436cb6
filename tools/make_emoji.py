"""Build the `emoji` data set: a WebP atlas a drawing style, and emoji.json, which says what each cell shows.

    python tools/make_emoji.py                       # the four shipped styles -> src/triptych/assets/emoji
    python tools/make_emoji.py --styles all --out D  # four more training styles, for emoji(root="D")
    python tools/make_emoji.py --sheet docs/images/emoji_contact_sheet.png

Needs npm (it fetches pinned packages by name) and, beside triptych, `pip install resvg-py==0.5.0`.
Running it twice gives the same bytes.

In: the six pictorial groups of emojibase-data (smileys, animals and nature, food and drink, travel and
places, activities, objects). Out: people and body, flags, symbols, components, skin tones.

Where a package has no table of hexcodes, icons are matched by name; emoji_names.json beside this file
corrects what names get wrong (null leaves an icon out). All were checked by eye, each beside its Twemoji.
"""

import argparse
import io
import json
import re
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from emoji_concepts import GROUPS, Package, concept_of, read_concepts, read_names, slug
from emoji_styles import LABELS, SHIPPED, STYLES, Style
from triptych.atomic_write import write_atomically, write_text_atomically

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent / "src" / "triptych" / "assets" / "emoji"
CELL, COLUMNS = 64, 32  # pixels of a cell's side, cells of an atlas row
RENDER = 256  # pixels an SVG is first drawn at
NAMED = ("noto", "twemoji", "fluent-flat")  # packages whose tables of hexcodes teach the others names


def shrink(image: Image.Image) -> np.ndarray:
    """Any size -> (64, 64, 4) uint8. Pillow resizes RGBA premultiplied, which leaves no dark fringe."""
    return np.asarray(image.convert("RGBA").resize((CELL, CELL), Image.Resampling.LANCZOS))


def draw_icon(icons: dict, name: str) -> np.ndarray:
    import resvg_py

    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{RENDER}" height="{RENDER}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    return shrink(Image.open(io.BytesIO(bytes(png))))


def read_rasters(package: Package, index: dict[str, int]) -> list[tuple[int, np.ndarray]]:
    """[(concept index, RGBA cell)] of a package that has one image per hexcode."""
    # A hexcode with FE0F and its twin without are the same image: the later of the two is used.
    names = sorted(name for name in package.files if name.startswith("assets/"))
    files = {concept_of(Path(name).stem): name for name in names}
    images = package.read(*(name for key, name in files.items() if key in index))
    return [
        (index[key], shrink(Image.open(io.BytesIO(images[name]))))
        for key, name in files.items()
        if name in images
    ]


def read_icons(
    package: Package, index: dict[str, int], names: dict[str, str], hand: dict[str, str | None]
) -> list[tuple[int, np.ndarray]]:
    """[(concept index, RGBA cell)] of a package of SVG icons; a concept may be drawn more than once.

    Args:
        index: concept key -> concept index.
        names: slug of a name -> concept key, for a package without a table of hexcodes.
        hand: icon name -> concept key, or None to leave the icon out; comes before `names`.
    """
    icons, chars = package.json("icons.json"), package.json("chars.json")
    if chars:  # hexcode -> icon name
        matches = {(index[key], icon) for code, icon in chars.items() if (key := concept_of(code)) in index}
    else:
        matches = set()
        for icon in icons["icons"]:
            base = re.sub(r"-\d$", "", icon)  # a style may number its second and third drawings
            if icon in hand or base in hand:
                key = hand.get(icon, hand.get(base))
            else:
                key = names.get(slug(icon)) or names.get(slug(base))
            if key in index:
                matches.add((index[key], icon))
    return [(concept, draw_icon(icons, icon)) for concept, icon in sorted(matches)]


def bleed(cell: np.ndarray) -> np.ndarray:
    """Extend colors under what is transparent: no lossy block across an edge holds a jump to black."""
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


def write_atlas(path: Path, cells: list[np.ndarray]) -> None:
    rows = -(-len(cells) // COLUMNS)
    atlas = np.zeros((rows * CELL, COLUMNS * CELL, 4), np.uint8)
    for k, cell in enumerate(cells):
        y, x = k // COLUMNS * CELL, k % COLUMNS * CELL
        atlas[y : y + CELL, x : x + CELL] = bleed(cell)
    out = io.BytesIO()
    Image.fromarray(atlas).save(out, "WEBP", quality=90, alpha_quality=100, method=6, exact=True)
    write_atomically(path, lambda file: file.write(out.getvalue()))


def build(out: Path, cache: Path, styles: list[Style]) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    labels = Package(LABELS, cache)
    packages = {s.name: Package(s.package, cache) for s in STYLES if s in styles or s.name in NAMED}
    concepts = read_concepts(labels)
    index = {concept["id"]: i for i, concept in enumerate(concepts)}
    names = read_names(labels, [packages[name] for name in NAMED])
    hand = read_hand_names(concepts)
    table = {"cell": CELL, "columns": COLUMNS, "labels": "npm " + LABELS, "concepts": concepts, "styles": []}
    for style in styles:
        package = packages[style.name]
        if "icons.json" in package.files:
            drawings = read_icons(package, index, names, hand.get(style.name, {}))
        else:
            drawings = sorted(read_rasters(package, index), key=lambda drawing: drawing[0])
        write_atlas(out / f"{style.name}.webp", [cell for _, cell in drawings])
        cells = [concept for concept, _ in drawings]
        attributes = ("name", "split", "family", "licence", "credit")  # words: quoted
        facts = {name: getattr(style, name) for name in attributes}
        table["styles"].append({**facts, "source": "npm " + style.package, "cells": cells})
        size = (out / f"{style.name}.webp").stat().st_size / 1e6
        print(f"{style.name:12s} {len(cells):5d} drawings of {len(set(cells)):5d} concepts  {size:.2f} MB")
    write_text_atomically(
        out / "emoji.json", json.dumps(table, ensure_ascii=False, separators=(",", ":")) + "\n"
    )
    print(f"{len(concepts)} concepts, {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.2f} MB in {out}")


def read_hand_names(concepts: list[dict]) -> dict[str, dict[str, str | None]]:
    """style -> icon -> concept key or None, from emoji_names.json, which says labels."""
    keys = {concept["label"]: concept["id"] for concept in concepts}
    hand = json.loads((HERE / "emoji_names.json").read_text())
    unknown = {label for icons in hand.values() for label in icons.values()} - {None, *keys}
    if unknown:
        raise SystemExit(f"emoji_names.json: there is no concept {sorted(unknown)}")
    return {style: {i: label and keys[label] for i, label in icons.items()} for style, icons in hand.items()}


def contact_sheet(root: Path, path: Path, rows: int = 18) -> None:
    """Rows: concepts spread evenly over the groups; columns: styles. A field is empty where a style lacks it.

    Every second row is dark, where a light fringe would show.
    """
    table = json.loads((root / "emoji.json").read_text())
    concepts, styles = table["concepts"], table["styles"]
    chosen: list[int] = []
    for group in GROUPS:
        here = [i for i, c in enumerate(concepts) if c["group"] == group]
        each = rows // len(GROUPS)
        chosen += [here[int((k + 0.5) * len(here) / each)] for k in range(each)]
    # Two blocks side by side, each with its own column of names.
    left, top, half = 230, 22, -(-len(chosen) // 2)
    across, down = left + len(styles) * (CELL + 8), CELL + 4
    sheet = Image.new("RGB", (2 * across, top + half * down), "white")
    pen = ImageDraw.Draw(sheet)
    for column, style in enumerate(styles):
        atlas = Image.open(root / f"{style['name']}.webp").convert("RGBA")
        for place, concept in enumerate(chosen):
            block, row = divmod(place, half)
            x, y = block * across + left + column * (CELL + 8), top + row * down
            if row == 0:
                pen.text((x, 5), style["name"], fill="black")
            if column == 0:
                shown = concepts[concept]
                pen.text((x - left + 8, y + 18), shown["label"], fill="black")
                pen.text((x - left + 8, y + 32), f"{shown['group']} / {shown['subgroup']}", fill="gray")
            if concept in style["cells"]:
                cy, cx = (CELL * v for v in divmod(style["cells"].index(concept), COLUMNS))
                cell = atlas.crop((cx, cy, cx + CELL, cy + CELL))
                if row % 2:
                    pen.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill="#303040")
                sheet.paste(cell, (x, y), cell)
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    write_atomically(path, lambda file: file.write(out.getvalue()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument(
        "--cache", type=Path, help="where the npm packages are kept (default: a temporary folder)"
    )
    parser.add_argument("--styles", default="shipped", help="shipped, all, or names with commas")
    parser.add_argument("--sheet", type=Path, help="only draw a contact sheet of --out into this PNG")
    args = parser.parse_args()
    if args.sheet:
        return contact_sheet(args.out, args.sheet)
    chosen = {"shipped": list(SHIPPED), "all": list(STYLES)}.get(args.styles)
    if chosen is None:
        named = args.styles.split(",")
        chosen = [s for s in STYLES if s.name in named]
        if len(chosen) < len(named):
            parser.error(f"--styles {args.styles}: choose from {', '.join(s.name for s in STYLES)}")
    with tempfile.TemporaryDirectory() as temporary:
        build(args.out, args.cache or Path(temporary), chosen)


if __name__ == "__main__":
    main()
