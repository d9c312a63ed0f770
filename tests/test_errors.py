"""Errors of this library can be sent between processes."""

import inspect
import pickle
from collections.abc import Iterator

import pytest

from todi_offline.errors import TodiError


def tree(root: type[TodiError]) -> Iterator[type[TodiError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


ALL = list(tree(TodiError))


def example_of(kind: type[TodiError]) -> TodiError:
    """An error with a number for each argument beyond its message."""
    extra = list(inspect.signature(kind).parameters)[1:] if "__init__" in vars(kind) else []
    error = kind("the disk is full", **{name: number for number, name in enumerate(extra, 7)})
    error.add_note("seen by rank 3")
    return error


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling_with_all_its_fields(kind: type[TodiError]) -> None:
    error = example_of(kind)
    received = pickle.loads(pickle.dumps(error))
    assert type(received) is kind
    assert (str(received), received.args, vars(received)) == (str(error), error.args, vars(error))


def test_some_error_has_a_field_beyond_its_message() -> None:
    assert any(vars(example_of(kind)).keys() - {"__notes__"} for kind in ALL)
