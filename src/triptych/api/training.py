"""`triptych.train`: from a recipe to a trained model in one call."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triptych.config import with_changes
from triptych.recipes import recipe as find_recipe
from triptych.training.configs.registry import RunConfig


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a training run ended."""

    run: Path
    """Folder of the run; `triptych.load(result.run)` loads the best weights."""
    step: int
    """Optimizer steps done so far."""
    finished: bool
    """False after an interrupt: the same call resumes the run."""
    best: dict[str, float]
    """Metrics of the best evaluation, and its "step"."""
    headline: str
    """Name of the metric that says how good the model is, such as "top1" or "miou"."""

    @property
    def score(self) -> float | None:
        """The headline metric of the best evaluation; None if the run was interrupted before the first."""
        return self.best.get(self.headline)

    def to_json(self) -> dict[str, Any]:
        """Return the result in JSON's types, as `triptych train --json` prints it."""
        return {"step": self.step, "finished": self.finished, "best": self.best, "run": str(self.run)}


def train(
    recipe: "str | RunConfig", *, out: str | Path, data: str | Path | None = None, **fields: Any
) -> TrainResult:
    """Train a model by a recipe. The same call again resumes the run, or returns at once if it is finished.

    ```python
    import triptych as tp

    result = tp.train("vit", data="photos", out="run", model="vit-ti16", epochs=3, batch_size=16)
    result.score                       # top-1 accuracy of the best weights on the held-out images
    net = tp.load(result.run)
    tp.train("vit", data="photos", out="other", **{"loop.epochs": 3}, augment={"flip": 0.0})
    ```

    Args:
        recipe: name of a recipe (`triptych train --help` lists them), or a run config.
        out: folder of the run: config, log, checkpoints and the best weights.
        data: "emoji" or "scenes", a folder, tar shards, a parquet file or a hub id; None is the recipe's own.
        fields: changes to the recipe's config. A nested field is given by its own name (`epochs=3`) if no other has the
            same, by its dotted name (`**{"loop.epochs": 3}`), or with others (`loop={"epochs": 3, "ema": 0.99}`).
            `triptych train RECIPE --help` lists all fields.

    Raises:
        ConfigError: an unknown recipe or field, with similar names, or values that do not fit together.
        DataError: data that cannot be read or that the task cannot use.
        TriptychError: `out` is the folder of another run; or a loss is not finite.
    """
    from triptych.training.runner import run

    config = find_recipe(recipe)() if isinstance(recipe, str) else recipe
    if data is not None:
        fields["data"] = str(data)
    config = with_changes(config, fields)
    outcome = run(config, out)
    return TrainResult(
        run=Path(out),
        step=outcome.step,
        finished=outcome.finished,
        best=outcome.best,
        headline=outcome.headline,
    )
