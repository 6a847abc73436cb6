"""`triptych train`"""

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from triptych.cli.output import count, print_json
from triptych.errors import ConfigError
from triptych.training.configs.registry import RunConfig


@dataclass(frozen=True, kw_only=True)
class Train:
    """Flags of every run besides its config."""

    out: Path | None = None
    """Folder of the run. The same command resumes from its newest checkpoint."""
    dry_run: bool = False
    """Print the config, sizes, cost, and estimates of time and memory from a few steps; write nothing."""
    json: bool = False
    """Print the result as JSON."""


def command_of(config: RunConfig) -> Any:
    """`Train` with the flags of a config's type, and its values as their defaults."""
    config_type = Annotated[type(config), tyro.conf.arg(name="")]
    command = make_dataclass("Train", [("config", config_type)], bases=(Train,), frozen=True, kw_only=True)
    return command(config=config)


def train(args: Sequence[str]) -> int:
    """The first argument is the recipe, whose config gives the flags and their defaults."""
    from triptych.cli.parsing import in_columns, logged_to_stderr, parse
    from triptych.recipes import RECIPES, recipe

    if not args or args[0] in ("-h", "--help"):
        print("usage: triptych train RECIPE --data DATA --out RUN [--any.field VALUE]\n")
        width = max(map(len, RECIPES))
        for name in RECIPES:
            summary = (recipe(name).__doc__ or "").splitlines()[0]
            print(in_columns(f"  {name:<{width}}  ", summary, " " * (width + 4)))
        print("\n`triptych train RECIPE --help` lists all flags.")
        print("Ctrl-C writes a checkpoint and exits with code 130; errors exit with code 2.")
        print("To resume, run the same command again.")
        return 0
    if args[0].startswith("-"):
        raise ConfigError(
            f"the first argument is {args[0]}, which must be a recipe; `triptych train` lists them"
        )
    make = recipe(args[0])
    default = command_of(make())
    command = parse(
        type(default),
        args[1:],
        f"triptych train {args[0]}",
        default=default,
        description=inspect.getdoc(make) or "",
    )
    if command.out is None and not command.dry_run:
        raise ConfigError(
            "--out is missing; add --out RUN, the folder of the run, or --dry-run to print the plan"
        )
    with logged_to_stderr():
        if command.dry_run:
            return _dry_run(command.config, command.json)
        from triptych.api.training import train as train_model

        result = train_model(command.config, out=command.out)  # type: ignore[arg-type]
    import os

    if os.environ.get("RANK", "0") != "0":  # of torchrun's; the first one says how it ended
        return 0 if result.finished else 130
    if command.json:
        print_json(result.to_json())
    elif result.finished:
        print(
            f"{command.out}: finished; best {result.headline} {result.best[result.headline]:.4f} "
            f"at step {result.best['step']}"
        )
    else:
        print(f"{command.out}: stopped at step {result.step}; the same command resumes", file=sys.stderr)
    return 0 if result.finished else 130


def _dry_run(config: RunConfig, as_json: bool) -> int:
    from triptych.training import dry_run

    plan = dry_run(config)
    if as_json:
        print_json(plan, indent=1)
        return 0
    import json

    print(json.dumps({"config": plan["config"], "network": plan["network"]}, indent=1))
    print(
        f"images       {plan['images']['train']:,} to train on, {plan['images']['evaluation']:,} to evaluate on"
    )
    print(f"classes      {plan['classes']:,}")
    print(
        f"parameters   {count(plan['parameters'])}, of which {count(plan['parameters_trained'])} are trained"
    )
    print(
        f"FLOPs        {count(plan['flops_per_image'])} per image, forward pass (twice the multiply-accumulates)"
    )
    print(f"steps        {plan['steps']:,} of {plan['seconds_per_step']:.2f} s on {plan['device']}")
    print(f"time         {plan['hours'] * 60:,.1f} minutes without evaluations")
    print(f"memory       {plan['peak_memory_bytes'] / 1e9:.2f} GB at the peak")
    return 0
