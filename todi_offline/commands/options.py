"""A config class in, the options of a command out: each field is an option, with its documentation as help."""

import ast
import dataclasses
import inspect
import json
import textwrap
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click

from todi_offline.config import flat_fields
from todi_offline.errors import ConfigError

F = typing.TypeVar("F", bound=Callable[..., Any])

_OPTION_NAMES = {"temperatures": "temperature", "seeds": "seed"}
"""Options with another name than their fields: an option that is repeated names one value."""

RARE = "Rarely needed"
"""The heading of the options that no group names; it comes last."""


class ConfigCommand(click.Command):
    """A command with an option for every field of some config classes, which are imported only when they are used.

    An option of the command's own replaces the field of the same name. The help lists the options in groups.
    """

    def __init__(
        self,
        *args: Any,
        config: str | tuple[str, ...],
        groups: Mapping[str, str] = MappingProxyType({}),
        **kwargs: Any,
    ) -> None:
        """Name each class as `module:Class`; `groups` are headings, each with the names of its options' fields."""
        super().__init__(*args, **kwargs)
        self._configs = (config,) if isinstance(config, str) else config
        self._groups = groups
        self._options: list[click.Parameter] = []

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the options of the configs' fields, then the command's own."""
        own = super().get_params(ctx)
        if not self._options:
            names = {param.name for param in own}
            self._options = [
                option
                for module, _, name in (config.partition(":") for config in self._configs)
                for field, holder in flat_fields(getattr(import_module(module), name))
                if field not in names and (option := _option(field, holder)) is not None
            ]
        return [*self._options, *own]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in their groups, those of no group last."""
        own = self.get_help_option(ctx)
        names = {param: "help" if param is own else param.name or "" for param in self.get_params(ctx)}
        records = {name: record for param, name in names.items() if (record := param.get_help_record(ctx))}
        for heading, listed in self._groups.items():
            with formatter.section(heading):
                formatter.write_dl([records.pop(name) for name in listed.split()])
        if records:
            with formatter.section(RARE if self._groups else "Options"):
                formatter.write_dl(list(records.values()))


def config_options(as_json: str, *, file: str = "A TOML file of these settings.") -> Callable[[F], F]:
    """Return a decorator with what commands of configs have in common: --config FILE and --json, with their help."""

    def add(function: F) -> F:
        function = click.option("--json", "as_json", is_flag=True, help=as_json)(function)
        return click.option("--config", type=click.Path(path_type=Path), help=file)(function)

    return add


class _JsonObject(click.ParamType[dict[str, Any]]):
    name = "JSON"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        try:
            parsed = value if isinstance(value, dict) else json.loads(value)
        except ValueError as error:
            self.fail(f"{value!r} is not valid JSON ({error}); expected an object", param, ctx)
        if not isinstance(parsed, dict):
            self.fail(f"{value!r} is not an object; expected one, such as {{}}", param, ctx)
        return parsed


class _NamedValue(click.ParamType[tuple[str, Any]]):
    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        try:
            return argument(value)
        except ConfigError:
            self.fail(f"{value!r} has no `=`; expected NAME=VALUE", param, ctx)


def _option(field: str, holder: type) -> click.Option | None:
    """Return the option of a field, or None for a table, which has no single value."""
    item = next(item for item in dataclasses.fields(holder) if item.name == field)
    kind = typing.get_type_hints(holder)[field]
    args = typing.get_args(kind)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(arg for arg in args if arg is not type(None))
        args = typing.get_args(kind)
    if typing.get_origin(kind) is dict and not item.metadata:
        return None
    name = _OPTION_NAMES.get(field, field).replace("_", "-")
    described = _help(field, holder, item)
    if kind is bool:
        return click.Option([f"--{name}/--no-{name}", field], default=None, help=described)
    if "named_values" in item.metadata:
        return click.Option(
            [f"--{name}", field],
            type=_NamedValue(),
            multiple=True,
            help=described,
            callback=lambda _context, _option, pairs: dict(pairs) or None,
        )
    if typing.get_origin(kind) is dict:
        return click.Option([f"--{name}", field], type=_JsonObject(), default=None, help=described)
    multiple = typing.get_origin(kind) is tuple
    choice = click.Choice(args) if typing.get_origin(kind) is typing.Literal else None
    scalar = args[0] if multiple else click.Path(path_type=Path) if kind is Path else kind
    return click.Option([f"--{name}", field], type=choice or scalar, multiple=multiple, default=None, help=described)


def _help(field: str, holder: type, item: "dataclasses.Field[Any]") -> str:
    text = _field_docs(holder).get(field, "")
    required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    if required:
        return f"{text} [required]"
    default = item.default
    if default in (None, False, (), dataclasses.MISSING):
        return text
    shown = ", ".join(f"{value:g}" for value in default) if isinstance(default, tuple) else default
    return f"{text} [default: {shown}]"


def _field_docs(holder: type) -> dict[str, str]:
    """Return the docstring below each field of a class."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(holder))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            docs[field.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    return docs


def given(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the command line has set."""
    return {name: value for name, value in settings.items() if value is not None and value != ()}


def argument(text: str) -> tuple[str, Any]:
    """Return name and value of `NAME=VALUE`, the value as TOML has it.

    Raises:
        ConfigError: there is no `=`.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}; expected NAME=VALUE, e.g. --set bf16=true")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value  # a bare word


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Return numbers that stand with commas between them.

    Raises:
        ConfigError: a part is no whole number.
    """
    try:
        return tuple(int(number) for number in text.split(",") if number.strip())
    except ValueError as error:
        raise ConfigError(f"--{option} is {text!r}; expected whole numbers, e.g. 0,4,8,29") from error
