"""`triptych plot`"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw a training run's curves: losses, scores, learning rate, speed."""

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The folder of a training run, which holds log.jsonl; or such a file."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PNG")] = None
    """PNG to write; curves.png in the run's folder if left out."""

    def run(self) -> int:
        from triptych.plots import style
        from triptych.plots.curves import read_log, training_curves

        log = self.run_folder / "log.jsonl" if self.run_folder.is_dir() else self.run_folder
        out = self.out or log.parent / "curves.png"
        style.save(training_curves(read_log(log), title=log.resolve().parent.name), out)
        print(out)
        return 0
