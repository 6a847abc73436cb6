"""npm packages, the concepts of the `emoji` data set, and how an icon's name finds its concept.

A concept is a hexcode after `concept_of`, which drops presentation selectors and skin tones and merges the
man, woman and person variants of a role into one, so that near-duplicates can never be two classes. (Roles
live in the group people and body; with that group left out nothing is merged today.)
"""

import json
import re
import subprocess
import tarfile
import unicodedata
from collections import Counter
from pathlib import Path

GROUPS = ("smileys-emotion", "animals-nature", "food-drink", "travel-places", "activities", "objects")


class Package:
    """One npm package as the registry serves it: a .tgz in the cache, read in place."""

    def __init__(self, spec: str, cache: Path):
        path = cache / (spec.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
        if not path.exists():
            subprocess.run(
                ["npm", "pack", "--silent", "--pack-destination", str(cache), spec],
                check=True,
                stdout=subprocess.DEVNULL,
            )
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


def concept_of(hexcode: str) -> str:
    """Canonical key of a hexcode: lower case, no FE0F, no skin tone, no gender: one key for each role."""
    parts = [p for p in hexcode.lower().split("-") if p != "fe0f" and not "1f3fb" <= p <= "1f3ff"]
    while len(parts) > 2 and parts[-1] in ("2640", "2642"):  # ... ZWJ female | male
        parts = parts[:-2]
    if "200d" in parts and parts[0] in ("1f468", "1f469"):  # man | woman ZWJ tool -> person ZWJ tool
        parts[0] = "1f9d1"
    return "-".join(parts)


def read_concepts(package: Package) -> list[dict]:
    """The concepts of `GROUPS` in Unicode's order, which puts like beside like."""
    data, meta = package.json("en/data.json"), package.json("meta/groups.json")
    concepts: dict[str, dict] = {}
    for entry in sorted((e for e in data if "group" in e), key=lambda e: e["order"]):
        group = meta["groups"][str(entry["group"])]
        if group not in GROUPS:
            continue
        key = concept_of(entry["hexcode"])
        concept = {
            "id": key,
            "hexcode": entry["hexcode"],
            "emoji": entry["emoji"],
            "label": entry["label"],
            "tags": entry.get("tags", []),
            "group": group,
            "subgroup": meta["subgroups"][str(entry["subgroup"])],
        }
        concepts.setdefault(
            key, concept
        )  # the first in Unicode order is the person variant: it names the concept
    twice = [label for label, count in Counter(c["label"] for c in concepts.values()).items() if count > 1]
    if twice:
        raise SystemExit(f"two concepts have one label: {twice}")
    return list(concepts.values())


def slug(name: str) -> str:
    """Letters and digits only: "piñata" -> "pinata", "one-piece swimsuit" -> "onepieceswimsuit"."""
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
        icons = package.json("icons.json")
        chars = sorted(package.json("chars.json").items(), reverse=True)
        keys = {icon: key for code, icon in chars if (key := concept_of(code)) in known}
        for icon, key in keys.items():
            names.setdefault(slug(icon), key)
        for alias, to in icons.get("aliases", {}).items():
            if to["parent"] in keys and len(to) == 1:  # a flipped alias is another emoji
                names.setdefault(slug(alias), keys[to["parent"]])
    for entry in data:
        if "-" not in entry["hexcode"]:
            names.setdefault(slug(unicodedata.name(entry["emoji"][0], "")), concept_of(entry["hexcode"]))
    tables = sorted(name for name in labels.files if re.fullmatch(r"en/shortcodes/[\w-]+\.json", name))
    texts = labels.read(*tables)
    for table in tables:
        for hexcode, short in json.loads(texts[table]).items():
            for s in [short] if isinstance(short, str) else short:
                names.setdefault(slug(s), concept_of(hexcode))
    names.pop("", None)
    return names
