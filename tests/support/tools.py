"""The words of a command line come in; the result of `todi-cache` goes out."""

from pathlib import Path

from click.testing import CliRunner, Result

import cache_tools.__main__ as tools


def run(*args: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(tools.cli, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result
