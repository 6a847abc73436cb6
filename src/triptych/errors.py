"""The exceptions that callers are meant to catch, and the hint for misspelled names.

    TriptychError (a ValueError)
    ├── ConfigError       an argument, flag or config field
    ├── DataError         images, labels or data sets
    ├── CheckpointError   model files, their contents and where they come from
    ├── DeviceError       hardware and the software that drives it
    └── StorageError      writing to disk

Each message is one line that says what was given, what is needed and what to do. The command line prints it and exits
with status 2. An exception of any other class is a bug in the package.
"""

from collections.abc import Iterable


class TriptychError(ValueError):
    """Base class of the package's exceptions. Catch it to handle every error that a user can correct."""


class ConfigError(TriptychError):
    """An argument, command line flag or config field is invalid.

    Raised for an unknown name, a value of the wrong type or out of range, values that contradict each other, and
    options that the model or task does not have.
    """


class DataError(TriptychError):
    """Images, masks, captions or a data set cannot be used.

    Raised for a missing or empty data folder, a damaged or unsupported image, labels that do not match the images or
    the network's classes, and malformed tables, archives and label maps.
    """


class CheckpointError(TriptychError):
    """A model file cannot be found, read, recognized, loaded or exported.

    Raised for missing, damaged or unsafe checkpoint files, unknown formats, state dict keys and shapes that do not fit
    the network, RUN folders that cannot be resumed, and networks that a target format cannot represent.
    """


class DeviceError(TriptychError):
    """The hardware, or software that it needs, is missing or insufficient.

    Raised for a device that is not available, a process group that cannot be formed, and a missing C++ compiler.
    """


class StorageError(TriptychError):
    """A file or folder cannot be written: no permission, no space, or a path that is in use."""


def near_names(name: str, known: Iterable[str], limit: int = 3, cutoff: float = 0.4) -> list[str]:
    """Return the names in `known` that resemble `name`, the most similar first.

    Letter case, and the difference between a space and a hyphen, are ignored.

    Args:
        limit: largest number of names to return.
        cutoff: similarity that a name needs, from 0 (any) to 1 (equal).
    """
    import difflib  # only errors need it

    spellings: dict[str, str] = {}
    for spelling in known:
        spellings.setdefault(_folded(spelling), spelling)
    return [spellings[close] for close in difflib.get_close_matches(_folded(name), spellings, limit, cutoff)]


def near_names_hint(name: str, known: Iterable[str], otherwise: str | None = None, limit: int = 3) -> str:
    """Return "near names: a, b" for an error message.

    Args:
        otherwise: returned if no name resembles `name`; by default "there are" and all known names.
    """
    known = list(known)
    if near := near_names(name, known, limit):
        return f"near names: {', '.join(near)}"
    return f"there are {', '.join(known)}" if otherwise is None else otherwise


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'b'?" to end an error message with, or an empty string if no name is similar enough."""
    near = near_names(name, known, limit=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def require_known(name: str, known: Iterable[str], what: str) -> str:
    """Return `name` if it is one of `known`.

    Args:
        what: what the name stands for, such as "sampler".

    Raises:
        ConfigError: `name` is not in `known`; the message lists similar names.
    """
    known = list(known)
    if name not in known:
        raise ConfigError(f"no {what} is called {name!r}; {near_names_hint(name, known)}")
    return name


def _folded(name: str) -> str:
    return name.lower().replace(" ", "-")
