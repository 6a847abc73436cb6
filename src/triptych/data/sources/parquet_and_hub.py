"""Read parquet files and data sets of the Hugging Face hub as tables of `datasets`, without decoding images."""

import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from triptych.data.sources.splits import SPLITS
from triptych.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", re.ASCII)
HUB_TIMEOUT_SECONDS = 5


def read_parquet(files: list[Path]) -> "Dataset":
    """Read parquet files as a table, memory-mapped from the cache of `datasets`, which is renewed when they change.

    Raises:
        DataError: a file is missing or not a parquet file, or the files have different columns.
    """
    import datasets

    for file in files:
        if not file.is_file():
            raise DataError(f"{file} does not exist; check the path")
        with file.open("rb") as opened:
            if opened.read(4) != b"PAR1":
                raise DataError(f"{file} is not a parquet file; copy or convert it again")
    with _quiet():
        try:
            dataset = datasets.Dataset.from_parquet([str(file) for file in files])
        except Exception as problem:
            reason = _first_line(problem.__cause__ or problem)
            raise DataError(
                f"{files[0]} cannot be read as parquet ({reason}); copy or convert it again"
            ) from problem
        assert isinstance(dataset, datasets.Dataset)
        return without_decoding(dataset)


def read_saved(folder: Path) -> "dict[str, Dataset]":
    """Read the tables of a folder written by `save_to_disk` of `datasets`.

    Raises:
        DataError: the folder cannot be read.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as problem:
        raise DataError(f"{folder} cannot be read ({_first_line(problem)}); save it again") from problem
    return _by_split(saved)


def read_hub(name: str) -> "dict[str, Dataset]":
    """Read the tables of a data set of the hub, "org/name" or "org/name:config", from the cache if it is downloaded.

    Raises:
        DataError: the data set does not exist, cannot be reached, or needs another config.
    """
    import datasets
    from datasets import config as settings

    path, _, config = name.partition(":")
    reachable = _can_reach(settings.HF_ENDPOINT)
    offline = settings.HF_HUB_OFFLINE
    with _quiet():
        try:
            # By default `datasets` retries an unreachable hub for 23 s, with warnings, before it uses the cache.
            settings.HF_HUB_OFFLINE = offline or not reachable
            return _by_split(datasets.load_dataset(path, config or None))
        except Exception as problem:
            if not reachable:
                raise DataError(
                    f"{name} is not a local file or folder and not in the cache, and the hub {settings.HF_ENDPOINT} "
                    "cannot be reached; check the path or the network"
                ) from problem
            raise DataError(f"{name} cannot be loaded from the hub ({_first_line(problem)})") from problem
        finally:
            settings.HF_HUB_OFFLINE = offline


def _can_reach(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(
            urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT_SECONDS
        ).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _by_split(loaded: object) -> "dict[str, Dataset]":
    import datasets

    if isinstance(loaded, datasets.Dataset):
        return {"": without_decoding(loaded)}
    assert isinstance(loaded, datasets.DatasetDict)
    return {
        SPLITS.get(str(split).lower(), str(split)): without_decoding(table) for split, table in loaded.items()
    }


def without_decoding(table: "Dataset") -> "Dataset":
    """Return the table with its images as bytes or paths, since `triptych.data.images.decode` decodes them in the
    workers."""
    import datasets

    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image) and feature.decode:
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


@contextmanager
def _quiet() -> Iterator[None]:
    """Disable the progress bars of `datasets`, since we show our own."""
    import datasets

    were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            datasets.enable_progress_bars()


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip() or type(problem).__name__).split("\n")[0]
