"""`triptych plot`"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from triptych.cli.parsing import flag


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Plot a training run's curves: losses, scores, learning rate, speed."""

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a training run, or its log.jsonl."""
    out: Annotated[Path | None, flag("PNG", "curves.png in the run's folder")] = None
    """PNG to write."""

    def run(self) -> int:
        from triptych.plots import style
        from triptych.plots.curves import read_log, training_curves

        log = self.run_folder / "log.jsonl" if self.run_folder.is_dir() else self.run_folder
        out = self.out or log.parent / "curves.png"
        style.save(training_curves(read_log(log), title=log.resolve().parent.name), out)
        print(out)
        return 0
