"""Performance targets and whether the last runs met them: the first table of the page."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORWARD, STEP, CLASSIFIER = "Images per second", "A step of latent diffusion", "A step of a classifier"


@dataclass(frozen=True)
class Target:
    """A value in the table of a suite, and its bound."""

    what: str
    suite: str
    table: str
    row: Mapping[str, Any]
    """Values that identify the row."""
    key: str
    bound: float
    most: bool = True
    """Whether the bound is an upper bound; otherwise it is a lower bound."""

    @property
    def peer(self) -> str:
        """The library that the value compares with, if a row has a ratio for each library; else empty."""
        prefix = "ratio to "
        return self.key.removeprefix(prefix) if self.key.startswith(prefix) else ""


def _eager(network: str, batch: int, peer: str, bound: float, suite: str, mode: str = "eager") -> Target:
    row = {"mode": mode, "network": network, "size": "224 x 224", "dtype": "bf16", "batch": batch}
    if suite == "vit":
        del row["size"]
    else:
        del row["network"]
    return Target(
        f"{network} {mode}, bf16, batch {batch}, over {peer}", suite, FORWARD, row, f"ratio to {peer}", bound
    )


def _training_targets(table: str, network: str, peer: str) -> list[Target]:
    return [
        Target(
            f"training step, {network}, {dtype}, over {peer}",
            "train",
            table,
            {"network": network, "mode": "eager", "dtype": dtype},
            f"ratio to {peer}",
            0.9,
        )
        for dtype in ("fp32", "bf16")
    ]


TARGETS = (
    *(
        _eager("vit-b16", batch, peer, bound, "vit")
        for batch in (1, 8)
        for peer, bound in (("transformers", 0.85), ("timm", 0.95))
    ),
    Target(
        "vit-b16 compiled, bf16, batch 8, of the peak",
        "vit",
        FORWARD,
        {"mode": "compiled", "network": "vit-b16", "dtype": "bf16", "batch": 8},
        "utilization",
        0.8,
        most=False,
    ),
    *(
        _eager("swin-t", batch, peer, bound, "swin")
        for batch in (1, 8)
        for peer, bound in (("transformers", 0.65), ("timm", 0.8))
    ),
    *(_eager("swin-t", batch, "timm", 0.97, "swin", "compiled") for batch in (1, 8)),
    *(
        Target(
            f"Stable Diffusion 1's UNet {mode}, bf16, over diffusers",
            "ldm",
            "A step of the denoiser",
            {"mode": mode, "dtype": "bf16"},
            "ratio to diffusers",
            bound,
        )
        for mode, bound in (("eager", 0.8), ("compiled", 0.85))
    ),
    Target(
        "an image from its prompt, over diffusers",
        "ldm",
        "Generating an image",
        {"what": "prompt to image, s"},
        "ratio",
        0.35,
    ),
    *(
        Target(f"{what}, over transformers", "vit", "Startup", {"what": what}, "ratio", 0.3)
        for what in (
            "import the package",
            "import to first result, vit-ti16",
            "import to first result, swin-t",
        )
    ),
    *(
        Target(f"{what}, over diffusers", "ldm", "Startup", {"what": what}, "ratio", 0.3)
        for what in ("import the pipeline", "import to first step, a tiny one")
    ),
    *_training_targets(STEP, "UNet, 32 x 32, batch 4", "diffusers"),
    *_training_targets(STEP, "autoencoder, 64 px, batch 4", "diffusers"),
    *_training_targets(CLASSIFIER, "vit-s16, 224 px, batch 8", "transformers"),
    *_training_targets(CLASSIFIER, "swin-t, 224 px, batch 4", "transformers"),
)


def measured(target: Target, sections: Mapping[str, Any]) -> float | None:
    """Return the median in the last run of the target's suite; None if that run did not measure it."""
    for table in sections.get(target.suite, {}).get("tables", ()):
        for row in table["rows"] if table["title"] == target.table else ():
            if all(row.get(key) == value for key, value in target.row.items()):
                value = row.get(target.key)
                return value["median"] if isinstance(value, Mapping) else value
    return None


def met(target: Target, sections: Mapping[str, Any]) -> bool | None:
    """Return whether the measured value is within the bound; None if it was not measured."""
    value = measured(target, sections)
    if value is None:
        return None
    return value <= target.bound if target.most else value >= target.bound


def verdict(target: Target, sections: Mapping[str, Any]) -> str:
    """Return the verdict on a target. If a row has targets for two libraries, one is enough: the verdict on the other
    names the library whose target is met."""
    good = met(target, sections)
    if not good and target.peer:
        for other in TARGETS:
            same = (other.suite, other.table, other.row) == (target.suite, target.table, target.row)
            if same and other.peer and met(other, sections):
                return f"met over {other.peer}"
    return {None: "not measured", True: "met", False: "missed"}[good]


def judged(sections: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of cells for each target: name, bound, measured value and verdict."""
    rows = []
    for target in TARGETS:
        value = measured(target, sections)
        rows.append(
            [
                target.what,
                f"{'at most' if target.most else 'at least'} {target.bound:.2f}",
                "-" if value is None else f"{value:.2f}",
                verdict(target, sections),
            ]
        )
    return rows
