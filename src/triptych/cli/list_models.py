"""`triptych list`"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from triptych.cli.output import count, print_json, table


@dataclass(frozen=True, kw_only=True)
class List:
    """List the networks that `triptych.create` and `triptych train` know by name.

    Parameters and multiply-accumulates (MACs) are those at the image size and number of classes shown. MACs are per
    image: of a forward pass, of encoding and decoding (autoencoders), or of one step (diffusion models).
    """

    pattern: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[PATTERN]")] = "*"
    """A shell pattern, such as "swin*"; quote it."""
    json: bool = False
    """Print a JSON list that includes the complete configs."""

    def run(self) -> int:
        from triptych.cli.model_summary import describe
        from triptych.config import to_json
        from triptych.errors import ConfigError
        from triptych.models.registry import config_for, list_models

        configs = {name: config_for(name) for name in list_models(self.pattern)}
        if not configs:
            raise ConfigError(f"no model matches {self.pattern!r}; `triptych list` shows all")
        summaries = {name: describe(config) for name, config in configs.items()}
        if self.json:
            print_json(
                [
                    {
                        "name": name,
                        "family": known.family,
                        "image_size": getattr(configs[name], "image_size", None),
                        "classes": getattr(configs[name], "num_classes", None),
                        "parameters": known.parameters,
                        "macs": known.macs,
                        "form": known.form,
                        "config": to_json(configs[name]),
                    }
                    for name, known in summaries.items()
                ],
                indent=1,
            )
            return 0
        rows = [
            (
                name,
                known.family,
                known.size,
                known.form,
                *("-" if n is None else count(n) for n in (known.parameters, known.macs)),
            )
            for name, known in summaries.items()
        ]
        sides = {"name": "left", "family": "left", "size": "right", "form": "left"}
        table("", {**sides, "parameters": "right", "MACs": "right"}, rows)
        return 0
