"""A folder, hub id or GGUF file comes in; a causal language model and its tokenizer go out.

Teacher and student are loaded in the same way, by transformers.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch

from todi_offline.errors import ModelError, first_line
from todi_offline.models.checkpoint import locate

logger = logging.getLogger(__name__)

Model = Any  # transformers.PreTrainedModel, or one wrapped by peft, DDP or FSDP
Tokenizer = Any  # transformers.PreTrainedTokenizerBase


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is an accelerator if there is one, else the CPU.

    Raises:
        ModelError: the device is unknown, or this machine does not have it.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device {name!r} is unknown; expected auto, cpu, cuda, cuda:N or mps") from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"device {name!r} cannot be used here ({first_line(error)}); use auto or cpu") from error
    return device


def resolve_dtype(name: str) -> torch.dtype | str:
    """Return the dtype of that name; transformers resolves `auto` to the checkpoint's dtype."""
    dtype = getattr(torch, name, None)
    if name != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ModelError(f"dtype {name!r} is unknown; expected auto, float32, bfloat16 or float16")
    return name if dtype is None else dtype


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer of a folder, hub id or GGUF file.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    location, options = _location(path)
    try:
        return AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        remedy = "save the teacher's tokenizer there" if locate(path) else "check the name: no such folder exists"
        raise ModelError(f"{path} has no tokenizer that can be loaded ({first_line(error)}); {remedy}") from error


def load_model(
    path: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    tp: int = 1,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Load a causal language model. A GGUF file is de-quantised, and can then be saved as any other model.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    is_spread = device_map is not None or tp > 1
    place = None if is_spread else resolve_device(device)  # refused before the weights are read
    location, options = _location(path)
    options |= {"attn_implementation": attention} if attention else {}
    options |= {"device_map": device_map} if device_map else {}
    options |= {"distributed_config": _split_over(tp)} if tp > 1 else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            location, dtype=resolve_dtype(dtype), trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{path} cannot be loaded as a causal language model: {first_line(error)}") from error
    if "gguf_file" in options:
        model = _without_quantization(model)
    if tp > 1 and not model.supports_tp_plan:
        raise ModelError(
            f"transformers has no plan to split {type(model).__name__} over ranks; leave out tp, and use device_map"
        )
    return model if place is None else model.to(place)


def _split_over(num_ranks: int) -> Any:
    """Return what tells transformers to load a part of every layer in each rank.

    Raises:
        ModelError: this release of transformers cannot.
    """
    try:
        from transformers.distributed import DistributedConfig

        return DistributedConfig(tp_size=num_ranks)
    except (ImportError, TypeError) as error:
        raise ModelError(f"tp needs a newer release of transformers: {first_line(error)}") from error


def num_known_ids(tokenizer: Tokenizer) -> int:
    """Return how many ids a tokenizer knows."""
    return int(max(tokenizer.get_vocab().values())) + 1


def real_vocab_size(tokenizer: Tokenizer, num_ids: int) -> int:
    """Return how many ids the tokenizer and a head of `num_ids` rows both know; rows beyond pad the embedding.

    Of a tokenizer that knows more, as Gemma 3's knows one, the others have no logit; `Examples.require_ids` refuses an
    example that holds one.
    """
    known = num_known_ids(tokenizer)
    if known > num_ids:
        logger.warning(
            "the tokenizer knows %s ids, but the model's head has only %s; an example with a later id will be refused",
            f"{known:,}",
            f"{num_ids:,}",
        )
    return min(known, num_ids)


@contextlib.contextmanager
def evaluation_mode(model: Model) -> Iterator[None]:
    """Within, the model is in evaluation mode and no gradient is kept."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _location(path: str) -> tuple[str, dict[str, Any]]:
    """Return what `from_pretrained` takes for a path."""
    place = locate(path)
    if place is not None and place.is_file():
        return str(place.parent), {"gguf_file": place.name}
    return (path if place is None else str(place)), {}


def _without_quantization(model: Model) -> Model:
    """Move a de-quantised model's state into a fresh one: transformers refuses to save the former.

    Buffers that no state holds stay in float32: rotary angles in bfloat16 are off by up to a radian after 500 tokens.
    """
    values = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    fresh = type(model)(type(model.config).from_dict(values))
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    return fresh.eval()
