"""The name of a timm architecture, which says what no tensor does: heads, activation, windows."""

import re

from triptych.weights.mapping.format import StateDictKeys

_FILE_NAME = re.compile(r"((?:vit|deit3?|flexivit|swin|swinv2)_[a-z0-9_]+)")


def architecture_of(keys: StateDictKeys) -> tuple[str, str]:
    """Return the architecture of a timm checkpoint and where it is named; empty strings if it is nowhere.

    It stands in config.json, in what timm's training script stores next to the weights, or in the name of a published
    file.
    """
    config = keys.settings.get("config", {})
    inside = keys.settings.get("inside", {})
    arguments = inside.get("args") if isinstance(inside.get("args"), dict) else {}
    places = (
        (config.get("architecture"), "architecture in config.json"),
        (inside.get("arch"), "arch in the file"),
        (arguments.get("model"), "args in the file"),
    )
    for name, where in places:
        if isinstance(name, str) and name:
            return name, where
    named = _FILE_NAME.match(keys.path.name)
    return (named[1], "name of the file") if named and not config else ("", "")
