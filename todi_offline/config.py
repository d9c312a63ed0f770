"""A TOML file or a config comes in, with overrides; one frozen dataclass goes out.

Every config of this library is a frozen, keyword-only dataclass in the module of the function that takes it.
Defaults < TOML file < overrides (the command line); an unknown key is an error.

Each stage has one entry function. It takes `config`, which is the dataclass or its TOML file, and settings by name,
which win over it; `load_config` combines them.
"""

import contextlib
import dataclasses
import difflib
import functools
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from todi_offline.errors import ConfigError

C = TypeVar("C")

Setting = str | int | float | bool | None | Path | Sequence[Any] | Mapping[str, Any] | Callable[..., Any]
"""The value of a setting that is passed by name; the type of its field decides which of these is valid."""


def load_config(cls: type[C], base: Path | C | None = None, overrides: Mapping[str, Any] | None = None) -> C:
    """Build `cls` from its defaults, then `base` (a TOML file or a config), then `overrides`; later values win.

    A field that is itself a config is a table in the file; `overrides` names the fields of a table without the table.

    Raises:
        ConfigError: the file cannot be read; a key is unknown; a value is missing or has the wrong type or range.
    """
    tables = as_tables(base)
    for key, value in (overrides or {}).items():
        _place(cls, tables, key, value)
    return _build(cls, tables, where=str(base) if isinstance(base, Path) else "the settings")


def as_tables(base: Any) -> dict[str, Any]:
    """Return a TOML file or a config as a dict, with a table for each config inside it.

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
    """Return a config as JSON and TOML values, in the order of its fields."""
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
    """Store an override under its field: here, or in the table that has the field."""
    kinds = _field_types(cls)
    if key in kinds and not (dataclasses.is_dataclass(kinds[key]) and not isinstance(value, Mapping)):
        tables[key] = value
        return
    for name, kind in kinds.items():
        if dataclasses.is_dataclass(kind) and key in dict(flat_fields(typing.cast(type, kind))):
            _place(typing.cast(type, kind), tables.setdefault(name, {}), key, value)
            return
    raise ConfigError(unknown_setting(key, [name for name, _ in flat_fields(cls)]))


def _build(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    kinds = _field_types(cls)
    for key in values:
        if key not in kinds:
            raise ConfigError(unknown_setting(key, kinds, f" in {where}"))
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
            option = field.name.replace("_", "-")
            raise ConfigError(f"{field.name} is missing; set it in {where}, or as --{option} on the command line")
    return cls(**arguments)


def _coerce(value: Any, kind: Any, name: str) -> Any:
    """Return `value` as `kind`: convert lists to tuples, strings to paths and back, and integers to floats."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        if callable(value) and any(typing.get_origin(arg) is Callable for arg in args):
            return value
        return _coerce(value, next(arg for arg in args if arg is not type(None)), name)
    if origin is tuple:  # a single value becomes a tuple of one
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
    """Return `module:function`, by which it can be loaded again; for a partial function, also its arguments."""
    if isinstance(function, functools.partial):
        words = [repr(arg) for arg in function.args] + [f"{key}={arg!r}" for key, arg in function.keywords.items()]
        return f"{_name(function.func)}({', '.join(words)})"
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"


def unknown_setting(key: str, known: Iterable[str], where: str = "", otherwise: str = "") -> str:
    """Return the message for an unknown setting: the closest known one, `otherwise`, or a list of all settings."""
    close = difflib.get_close_matches(key, list(known), n=1)
    hint = f"did you mean {close[0]!r}?" if close else otherwise or f"the settings are {', '.join(known)}"
    return f"unknown setting {key!r}{where}; {hint}"
