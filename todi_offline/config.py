"""A TOML file, or a config, and overrides in; one frozen dataclass out.

Every config of this library is a frozen, keyword-only dataclass that stands beside the function which takes it.
Defaults < TOML file < overrides (the command line); a key that no field has is an error.

Each stage has one entry, which takes a config as `config` (the dataclass itself, or a TOML file of it) and settings
by their own names, which win: all of them come together in `load_config`.
"""

import contextlib
import dataclasses
import difflib
import functools
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from todi_offline.errors import ConfigError

C = TypeVar("C")

Setting = str | int | float | bool | None | Path | Sequence[Any] | Mapping[str, Any] | Callable[..., Any]
"""The value of a setting that is given by its name; its field says which of these it is."""


def load_config(cls: type[C], base: Path | C | None = None, overrides: Mapping[str, Any] | None = None) -> C:
    """Build `cls` from its defaults, `base` (a TOML file, or a config) and `overrides`, the later winning.

    A field that is itself a config is a table of the file. In `overrides` its fields stand flat, by their own names.

    Raises:
        ConfigError: the file cannot be read; a key is unknown; a value is missing or has the wrong type or range.
    """
    tables = as_tables(base)
    for key, value in (overrides or {}).items():
        _place(cls, tables, key, value)
    return _build(cls, tables, where=str(base) if isinstance(base, Path) else "the settings")


def as_tables(base: Any) -> dict[str, Any]:
    """Return what a TOML file, or a config, says: a value for each setting, and a table for each config within.

    Raises:
        ConfigError: the file cannot be read.
    """
    if isinstance(base, Path):
        return _read_toml(base)
    fields = dataclasses.fields(base) if base is not None else ()
    values = {field.name: getattr(base, field.name) for field in fields}
    return {name: as_tables(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as values that JSON and TOML know, in the order of its fields."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def flat_fields(cls: type) -> Iterator[tuple[str, type]]:
    """Yield the name of every setting of `cls` and its tables, with the config class that holds it."""
    for name, kind in _field_types(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from flat_fields(typing.cast(type, kind))
        else:
            yield name, cls


def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _place(cls: type, tables: dict[str, Any], key: str, value: Any) -> None:
    """Put a flat override where its field is: here, or in the table that has it."""
    kinds = _field_types(cls)
    if key in kinds and not (dataclasses.is_dataclass(kinds[key]) and not isinstance(value, Mapping)):
        tables[key] = value
        return
    for name, kind in kinds.items():
        if dataclasses.is_dataclass(kind) and key in dict(flat_fields(typing.cast(type, kind))):
            _place(typing.cast(type, kind), tables.setdefault(name, {}), key, value)
            return
    raise ConfigError(_unknown(key, [name for name, _ in flat_fields(cls)], "the settings"))


def _build(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    kinds = _field_types(cls)
    for key in values:
        if key not in kinds:
            raise ConfigError(_unknown(key, kinds, where))
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind):
            table = values.get(field.name, {})
            if not isinstance(table, Mapping):
                raise ConfigError(f"{field.name} in {where} is {table!r}; expected a table")
            arguments[field.name] = _build(typing.cast(type, kind), table, f"{where} [{field.name}]")
        elif field.name in values:
            arguments[field.name] = _coerce(values[field.name], kind, f"{field.name} in {where}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{field.name} is required; name it in {where}, or as --{field.name} on the command line")
    return cls(**arguments)


def _coerce(value: Any, kind: Any, name: str) -> Any:
    """Return `value` as `kind`: lists become tuples, strings and paths each other, whole numbers floats."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        if callable(value) and any(typing.get_origin(arg) is Callable for arg in args):
            return value
        return _coerce(value, next(arg for arg in args if arg is not type(None)), name)
    if origin is tuple:  # a single value stands for itself alone
        return tuple(_coerce(item, args[0], name) for item in (value if isinstance(value, list | tuple) else [value]))
    if origin is typing.Literal and value not in args:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(map(str, args))}")
    if origin is typing.Literal:
        return value
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    return _coerce_plain(value, kind, name)


def _coerce_plain(value: Any, kind: type, name: str) -> Any:
    if kind is Path and isinstance(value, str | Path):
        return Path(value).expanduser()
    if kind is str and isinstance(value, Path):
        return str(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer of 400 digits
            return float(value)
    if isinstance(value, typing.get_origin(kind) or kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise ConfigError(f"{name} is {value!r}; expected {getattr(kind, '__name__', kind)}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if callable(value):
        return _name(value)
    return str(value) if isinstance(value, Path) else value


def _name(function: Callable[..., Any]) -> str:
    """Return `module:function`, by which it can be loaded again; of a partial function what it is made of too."""
    if isinstance(function, functools.partial):
        words = [repr(arg) for arg in function.args] + [f"{key}={arg!r}" for key, arg in function.keywords.items()]
        return f"{_name(function.func)}({', '.join(words)})"
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"


def _unknown(key: str, known: Any, where: str) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the settings are {', '.join(known)}"
    return f"{key!r} is no setting of {where}; {hint}"
