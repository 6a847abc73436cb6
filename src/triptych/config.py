"""Conversion of config dataclasses to JSON and back, and checks of their fields."""

import dataclasses
import functools
import numbers
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from triptych.errors import ConfigError, TriptychError, did_you_mean, near_names

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """Return a config as JSON values. Dataclasses become dicts, tuples become lists.

    Raises:
        TypeError: a value has no JSON form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, numbers.Integral):  # numpy's
        return int(value)
    raise TypeError(f"a config has a {type(value).__name__}, which JSON cannot represent")


def from_json(cls: type[T], data: Any) -> T:
    """Return the config that `to_json` gave as `data`.

    Fields that are left out take their defaults. The config's own checks run.

    Raises:
        ConfigError: an unknown or missing field, a value of the wrong type, or one that the config's checks reject.
    """
    return _build(cls, data, cls.__name__)


def first_difference(a: Any, b: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Return the dotted name and both values of the first place where two JSON objects differ; None if they are equal.

    A difference of "fingerprint" comes last.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}, key=lambda key: (key == "fingerprint", key)):
            difference = first_difference(a.get(key), b.get(key), f"{name}.{key}" if name else key)
            if difference is not None:
                return difference
        return None
    return None if a == b else (name, a, b)


def with_changes(config: T, changes: Mapping[str, Any]) -> T:
    """Return a copy of a config with some fields changed, nested ones included.

    ```python
    with_changes(config, {"data": "DIR", "loop.epochs": 3})       # a nested field by its dotted name
    with_changes(config, {"epochs": 3})                           # or by its own name, if only one field has it
    with_changes(config, {"loop": {"epochs": 3, "ema": 0.99}})    # several fields of a nested config
    ```

    Args:
        config: a frozen dataclass.
        changes: field -> new value. A field of `config` itself goes before a nested field of the same name.

    Raises:
        ConfigError: no such field, with similar names; a name that several nested fields have; or an invalid value.
    """
    paths = list(_field_paths(config))
    resolved: dict[str, Any] = {}
    for name, value in changes.items():
        path = _resolve_field(config, name, paths)
        if path in resolved:
            raise ConfigError(f"{type(config).__name__}.{path} is given twice; leave one of the two out")
        resolved[path] = value
    return _with_paths(config, resolved)


def _with_paths(config: T, changes: Mapping[str, Any]) -> T:
    """Change fields by dotted names that exist."""
    fields: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        head, _, rest = path.partition(".")
        current = getattr(config, head)
        if rest:
            nested.setdefault(head, {})[rest] = value
        elif isinstance(value, Mapping) and dataclasses.is_dataclass(current):
            fields[head] = with_changes(current, value)
        else:
            fields[head] = value
    for head, parts in nested.items():
        fields[head] = _with_paths(fields.get(head, getattr(config, head)), parts)
    return dataclasses.replace(config, **fields)  # type: ignore[type-var]


def _field_paths(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields, those of nested configs included."""
    for spec in dataclasses.fields(config):
        yield prefix + spec.name
        value = getattr(config, spec.name)
        if dataclasses.is_dataclass(value):
            yield from _field_paths(value, f"{prefix}{spec.name}.")


def _resolve_field(config: object, name: str, paths: list[str]) -> str:
    """Return the dotted name of the field that `name` means."""
    if name in paths:
        return name
    matches = [path for path in paths if path.rpartition(".")[2] == name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(
            f"{type(config).__name__} has several fields called {name!r}; name one of {', '.join(matches)}"
        )
    leaves = {path.rpartition(".")[2]: path for path in paths}
    near = near_names(name, [*paths, *(leaf for leaf in leaves if leaf not in paths)])
    near = list(dict.fromkeys(leaves.get(leaf, leaf) for leaf in near))
    hint = f"near names: {', '.join(near)}" if near else f"there are {', '.join(paths)}"
    raise ConfigError(f"{type(config).__name__} has no field {name!r}; {hint}")


def check(config: Any) -> None:
    """Check every field of a dataclass against its type hint, from its `__post_init__`. Lists become tuples.

    Raises:
        ConfigError: a value is not of the field's type, or not one of its literals.
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            continue  # checked by its own __post_init__
        where = f"{type(config).__name__}.{name}"
        try:
            plain = to_json(value)
        except TypeError as problem:
            raise ConfigError(f"{where} is {value!r}: {problem}") from problem
        object.__setattr__(config, name, _build(hint, plain, where))


def need(condition: bool, config: object, name: str, requirement: str) -> None:
    """Require a condition of a field, from a config's `__post_init__`.

    ```python
    need(self.lr > 0, self, "lr", "positive")       # OptimizerConfig.lr is -1.0, which must be positive
    ```

    Args:
        condition: whether the field's value is valid.
        name: the field.
        requirement: what the value must be, in words.

    Raises:
        ConfigError: `condition` is false.
    """
    if not condition:
        raise ConfigError(
            f"{type(config).__name__}.{name} is {getattr(config, name)}, which must be {requirement}"
        )


def need_at_least(config: object, minimum: float, *names: str) -> None:
    """Require that each of the named fields is at least `minimum`; of a tuple, each of its entries.

    Fields that are None (their default is chosen elsewhere) and empty tuples pass.

    Raises:
        ConfigError: a field is smaller.
    """
    for name in names:
        value = getattr(config, name)
        need(value is None or _smallest(value) >= minimum, config, name, f"at least {minimum}")


def need_fraction(config: object, *names: str, below_one: bool = False) -> None:
    """Require that each of the named fields is in [0, 1], or in [0, 1) if `below_one`. Fields that are None pass.

    Raises:
        ConfigError: a field is outside.
    """
    for name in names:
        value = getattr(config, name)
        fits = value is None or 0 <= value < 1 or (value == 1 and not below_one)
        need(fits, config, name, "from 0 to below 1" if below_one else "from 0 to 1")


def _smallest(value: Any) -> float:
    return min(map(_smallest, value), default=float("inf")) if isinstance(value, tuple) else value


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _build(hint: Any, data: Any, where: str) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return data
    if origin in (Union, types.UnionType):
        return _build_union(get_args(hint), data, where)
    if origin is Literal:
        if data not in get_args(hint):
            raise ConfigError(
                f"{where} is {data!r}, which must be one of {', '.join(map(repr, get_args(hint)))}"
            )
        return data
    if origin is tuple:
        inner = get_args(hint)
        if not isinstance(data, list | tuple):
            raise ConfigError(f"{where} is {data!r}, which must be a list")
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_build(inner[0], item, f"{where}[{i}]") for i, item in enumerate(data))
        if len(data) != len(inner):
            raise ConfigError(f"{where} has {len(data)} values, which must be {len(inner)}")
        return tuple(
            _build(h, item, f"{where}[{i}]") for i, (h, item) in enumerate(zip(inner, data, strict=True))
        )
    if origin is dict:
        if not isinstance(data, dict):
            raise ConfigError(f"{where} is {data!r}, which must be an object")
        return {key: _build(get_args(hint)[1], item, f"{where}.{key}") for key, item in data.items()}
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(hint, data, where)
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if hint is type(None):
        hint = types.NoneType
    if not isinstance(data, hint) or (hint is int and isinstance(data, bool)):
        raise ConfigError(f"{where} is {data!r}, which must be {getattr(hint, '__name__', hint)}")
    return data


def _build_union(options: tuple[Any, ...], data: Any, where: str) -> Any:
    problems = []
    for option in options:
        try:
            return _build(option, data, where)
        except TriptychError as problem:
            problems.append(str(problem))
    raise ConfigError(problems[0])


def _build_dataclass(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{where} is {data!r}, which must be an object")
    hints = _hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise ConfigError(f"{where} has no field {key!r}{did_you_mean(key, fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise ConfigError(f"{where} lacks the field {name!r}")
    return cls(**{key: _build(hints[key], item, f"{where}.{key}") for key, item in data.items()})
