"""A new model and the tensors of a teacher that it is made of in, the same model with these tensors out."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from todi_offline.errors import ModelError
from todi_offline.models.loading import Model


@contextlib.contextmanager
def construction_errors(described: str, remedy: str) -> Iterator[None]:
    """Within, what transformers says of a config that it makes no model of is an error of ours.

    Raises:
        ModelError: transformers refuses the config, or fails in making or running the model.
    """
    try:
        yield
    except (StrictDataclassError, ValueError, LookupError, RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]  # the first says in which validator
        line = reason[-1] if isinstance(error, StrictDataclassError) else reason[0]
        raise ModelError(f"{described}: {line.strip().removeprefix('ValueError: ')}; {remedy}") from error


def load_tensors(student: Model, state: Mapping[str, Tensor], described: str, remedy: str) -> None:
    """Give a model copies of these tensors, in their own dtypes.

    Raises:
        ModelError: a tensor does not fit; `described` says what the config should describe, `remedy` what to do.
    """
    expected = student.state_dict()
    for key in sorted(state.keys() | expected.keys()):
        found, wanted = (tuple(tensors[key].shape) if key in tensors else "absent" for tensors in (state, expected))
        if found != wanted:
            raise ModelError(
                f"the config of {type(student).__name__} cannot describe {described}: with it {key} "
                f"would be {wanted}, in the teacher it is {found}; {remedy}"
            )
    student.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    student.tie_weights()


def generation_config(model: Model) -> Any:
    """Return how a model generates, what ends its texts above all; without settings that transformers does not save."""
    config = copy.deepcopy(model.generation_config)
    try:
        config.validate(strict=True)  # as saving does
    except ValueError:
        tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return type(config)(**tokens)
    return config
