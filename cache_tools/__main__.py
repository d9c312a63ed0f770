"""A command line in, the call of a tool out: `todi-cache COMMAND`. A command is imported when it is used."""

from importlib import import_module

import click

from todi_offline import __version__
from todi_offline.errors import one_line_errors

_COMMANDS = {
    "inspect": "Show the contents and the size of a cache.",
    "view": "Write a page that shows a cache in a browser.",
    "verify": "Check every checksum and every invariant of a cache.",
    "repair": "Delete damaged shards, so that the same capture writes only these again.",
    "diff": "Compare two caches: their manifests, sequences and targets.",
    "subset": "Write some sequences of a cache, with fewer entries or in another encoding.",
    "merge": "Write one cache with the sequences of several.",
    "export": "Write a cache as Parquet, for other trainers too.",
    "import": "Make a cache from the targets of another program.",
}
_MODULES = {"import": "import_"}  # `import` is a keyword of Python


class _Lazy(click.Group):
    """A group whose commands are modules of this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- click's signature
        """Return the names, without importing anything."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a command."""
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = import_module(f"cache_tools.{_MODULES.get(cmd_name, cmd_name)}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Lazy)
@click.version_option(__version__)
def cli() -> None:
    """Inspect, check and repair caches of teacher targets, and make new caches from them.

    Example: todi-cache inspect cache/
    """


def main() -> None:
    """Run `todi-cache`; an error of ours is one line and exit code 1."""
    with one_line_errors():
        cli()


if __name__ == "__main__":
    main()
