"""`triptych list`"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from triptych.cli.output import count, print_json, table


@dataclass(frozen=True, kw_only=True)
class List:
    """The networks that `triptych.create` and `triptych train` know by name.

    Parameters and multiply-accumulates an image are those of the size shown, with its classes.
    """

    pattern: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[PATTERN]")] = "*"
    """A shell pattern, such as "vit-b*"; quote it."""
    json: bool = False
    """Print a JSON list."""

    def run(self) -> int:
        from triptych.errors import UserError
        from triptych.models.registry import config_for, list_models
        from triptych.models.vit_config import macs, parameters

        configs = {name: config_for(name) for name in list_models(self.pattern)}
        if not configs:
            raise UserError(f"no model matches {self.pattern!r}; `triptych list` shows all")
        facts = [
            {
                "name": name,
                "image_size": list(c.image_size),
                "patch": c.stride,
                "width": c.embed_dim,
                "depth": c.depth,
                "heads": c.num_heads,
                "classes": c.num_classes,
                "parameters": parameters(c),
                "macs": macs(c),
            }
            for name, c in configs.items()
        ]
        if self.json:
            print_json(facts, indent=1)
            return 0
        headings = ("name", "image", "patch", "width", "depth", "heads", "classes", "parameters", "MACs")
        rows = [
            (name, "x".join(map(str, size)), *map(str, sizes), count(weights), count(products))
            for name, size, *sizes, weights, products in (fact.values() for fact in facts)
        ]
        table("", {h: "left" if h == "name" else "right" for h in headings}, rows)
        return 0
