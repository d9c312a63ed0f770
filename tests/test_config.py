"""Settings from defaults, TOML files and overrides."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from todi_offline.config import flat_fields, load_config, to_dict
from todi_offline.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    inner: str = "x"
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    out: Path
    mode: Literal["a", "b"] = "a"
    limit: int | None = None
    flag: bool = False
    inner: Inner = field(default_factory=Inner)
    free: dict[str, object] = field(default_factory=dict)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return path


def test_a_file_wins_over_defaults_and_overrides_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, 'out = "o"\nmode = "b"\nlimit = 3\n[inner]\nrate = 2\nsizes = [4]\n[free]\nany = 1\n')
    config = load_config(Outer, path, {"limit": 5, "rate": 0.25})
    assert config == Outer(out=Path("o"), mode="b", limit=5, inner=Inner(rate=0.25, sizes=(4,)), free={"any": 1})


def test_a_config_can_replace_the_file_and_is_not_changed() -> None:
    base = load_config(Outer, None, {"out": "o", "limit": 3, "inner": {"inner": "y", "rate": 0.5}})
    assert load_config(Outer, base) == base
    assert load_config(Outer, base, {"rate": 0.25, "limit": 4}) == dataclasses.replace(
        base, limit=4, inner=dataclasses.replace(base.inner, rate=0.25)
    )
    assert base.inner.rate == 0.5


def test_an_override_with_the_name_of_a_table_sets_the_field_of_that_name_in_it(tmp_path: Path) -> None:
    assert load_config(Outer, None, {"out": "o", "inner": "y"}).inner == Inner(inner="y")
    assert load_config(Outer, None, {"out": "o", "inner": {"rate": 1}}).inner == Inner(rate=1.0)


def test_a_config_written_as_a_dict_can_be_read_back(tmp_path: Path) -> None:
    config = load_config(Outer, None, {"out": "o", "sizes": [3]})
    plain = to_dict(config)
    assert plain["inner"] == {"inner": "x", "rate": 0.5, "sizes": [3]}
    assert load_config(Outer, None, plain) == config


def test_every_setting_is_listed_with_its_table() -> None:
    assert [name for name, _ in flat_fields(Outer)][-4:] == ["inner", "rate", "sizes", "free"]
    assert dict(flat_fields(Outer))["rate"] is Inner


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ('out = "o"\nmodes = "a"', {}, r"unknown setting 'modes' in .*settings.toml; did you mean 'mode'\?"),
        ('out = "o"\n[inner]\nrat = 1', {}, r"unknown setting 'rat' in .*\[inner\]; did you mean 'rate'\?"),
        ('out = "o"', {"zzz": 1}, r"unknown setting 'zzz'; the settings are out, mode"),
        ('out = "o"\nmode = "c"', {}, r"mode in .* is 'c'; expected one of a, b"),
        ('out = "o"\nlimit = "many"', {}, r"limit in .* is 'many'; expected int"),
        ('out = "o"\nlimit = true', {}, r"limit in .* is True; expected int"),
        ('out = "o"\nflag = 1', {}, r"flag in .* is 1; expected bool"),
        ('out = "o"\ninner = 3', {}, r"inner in .* is 3; expected a table"),
        ("", {}, r"out is missing; set it in .*, or as --out"),
        ("out = ", {}, r"is not valid TOML"),
    ],
)
def test_invalid_settings_are_refused(tmp_path: Path, text: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, write(tmp_path, text), overrides)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config .*none.toml: No such file"):
        load_config(Outer, tmp_path / "none.toml")


def shifted(value: float, by: float = 0.0) -> float:
    return value + by


def test_a_function_is_accepted_by_a_callable_field_and_written_by_its_name() -> None:
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Named:
        function: str | Callable[[float], float] = "none"

    assert load_config(Named, None, {"function": shifted}).function is shifted
    assert load_config(Named, None, {"function": "x:y"}).function == "x:y"
    assert to_dict(Named(function=shifted)) == {"function": f"{__name__}:shifted"}
    part = functools.partial(shifted, by=2.0)
    assert to_dict(Named(function=part)) == {"function": f"{__name__}:shifted(by=2.0)"}
    with pytest.raises(ConfigError, match=r"function in .* is 3; expected str"):
        load_config(Named, None, {"function": 3})
