"""The name of a benchmark in, its table on the terminal and its numbers in benchmarks/results/NAME.json out."""

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

import click

import benchmarks
from benchmarks._environment import environment, listed

NAMES = sorted(
    m.name.replace("_", "-") for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.startswith("_")
)
RESULTS = Path(__file__).parent / "results"


@click.command(epilog="For example: python -m benchmarks read --quick --set cache=cache/")
@click.argument("name", required=False, type=click.Choice(NAMES))
@click.option("--quick", is_flag=True, help="Smaller, to see that it runs; keeps no results.")
@click.option("--set", "options", multiple=True, metavar="NAME=VALUE", help="An argument of the benchmark's `run`.")
def main(name: str | None, quick: bool, options: tuple[str, ...]) -> None:
    """Run the benchmark NAME; without a name, list all with the question that each answers."""
    if name is None:
        for each in NAMES:
            click.echo(f"{each:12} {_load(each).__doc__.splitlines()[0]}")
        return
    benchmark = _load(name)
    click.echo(f"{benchmark.__doc__}\n{listed(environment())}\n")
    measured = benchmark.run(quick, **dict(option.split("=", 1) for option in options))
    if measured and not quick:  # the study keeps its own
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps({"benchmark": name, **environment(), **measured}, indent=1)
        (RESULTS / f"{name}.json").write_text(text + "\n")


def _load(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name.replace('-', '_')}")


if __name__ == "__main__":
    main()
