"""A folder, hub id or GGUF file in, a causal language model and its tokenizer out; and where its head runs.

Everything here serves teacher and student alike. What transformers knows is left to transformers.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from todi_offline.checkpoint import locate
from todi_offline.errors import ModelError, first_line

logger = logging.getLogger(__name__)

Model = Any  # transformers.PreTrainedModel, or one wrapped by peft, DDP or FSDP
Tokenizer = Any  # transformers.PreTrainedTokenizerBase


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is the accelerator where there is one, else the CPU."""
    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ModelError(f"device {name!r} is unknown; expected auto, cpu, cuda, cuda:N or mps") from error
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def resolve_dtype(name: str) -> torch.dtype | str:
    """Return the dtype of that name; `auto` is left to transformers, which takes the checkpoint's."""
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
        raise ModelError(
            f"{path} has no tokenizer that can be loaded ({first_line(error)}); if the folder holds a model alone, "
            "save the teacher's tokenizer into it"
        ) from error


def load_model(
    path: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Load a causal language model. A GGUF file is de-quantised, and can then be saved as any other model.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    location, options = _location(path)
    options |= {"attn_implementation": attention} if attention else {}
    options |= {"device_map": device_map} if device_map else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            location, dtype=resolve_dtype(dtype), trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{path} cannot be loaded as a causal language model: {first_line(error)}") from error
    if "gguf_file" in options:
        model = _without_quantization(model)
    return model if device_map else model.to(resolve_device(device))


def real_vocab_size(tokenizer: Tokenizer, model: Model) -> int:
    """Return the number of ids that mean something: the tokenizer's; what lies beyond pads the embedding.

    Raises:
        ModelError: the tokenizer knows ids that the model's head does not have.
    """
    known = int(max(tokenizer.get_vocab().values())) + 1
    head: Any = output_head(model)
    width = getattr(head, "out_features", None) or head.weight.shape[0]
    if known > width:
        raise ModelError(
            f"the tokenizer knows {known} ids and the model's head only {width}: they do not belong together, "
            "or the embeddings were not resized after tokens were added"
        )
    return known


def output_head(model: Model) -> nn.Module:
    """Return the module that turns hidden states into logits."""
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output embeddings; a causal language model is expected")
    return head  # type: ignore[no-any-return]


@contextlib.contextmanager
def head_at(model: Model, positions: Int[Tensor, " target"]) -> Iterator[None]:
    """Within, the model's forward pass runs its head at these positions only, and returns logits [1, target, vocab].

    Positions count over the flattened batch: row * sequence length + column. The hook sits on the head, so whatever
    wraps the model (adapters, DDP, FSDP, checkpointing), and whatever it does to its logits, stays as it is.
    """

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0].flatten(0, 1)
        return (hidden[positions.to(hidden.device)].unsqueeze(0), *args[1:])

    handle = output_head(model).register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def loss_at(
    model: Model, positions: Int[Tensor, " target"], loss_of: Callable[[Tensor, Tensor, Tensor | None], Tensor]
) -> Iterator[None]:
    """Within, the model's forward pass ends in a loss, and returns {"loss": it} in place of its outputs.

    Beside it stands `aux_loss`, its routers' own, where the model has one.

    `loss_of` takes hidden [target, d], what the head would read at these flat positions, and its weight and bias.
    It runs where the head would, so that they are what whatever wraps the model made of them: gathered by FSDP, in
    autocast's reach. The loss leaves through the head and the model, for DDP and FSDP hang on to what these return;
    what the model does to its logits on the way is not done to the loss. The head has to be one of `linear_head`.
    """
    head: Any = output_head(model)
    returned: list[Tensor] = []

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        hidden = hidden.flatten(0, 1)
        loss = loss_of(hidden[positions.to(hidden.device)], head.weight, head.bias)
        return loss * hidden.new_ones(1, 1, 1, dtype=loss.dtype)  # no view: FSDP's hooks on one may be lost

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        returned.append(output)

    def replace(_: nn.Module, __: Any, outputs: Any) -> dict[str, Tensor]:
        of_router = getattr(outputs, "aux_loss", None)  # of a mixture of experts that is asked for it
        return {"loss": returned[0].sum()} | ({} if of_router is None else {"aux_loss": of_router})

    head.forward = forward
    handles = [head.register_forward_hook(keep), model.register_forward_hook(replace, prepend=True)]
    try:
        yield
    finally:
        del head.forward
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class ChunkedHead:
    """A model's head as a function of hidden states, so that logits need never exist for all positions at once."""

    model: Model
    scale: float
    softcap: float | None

    def hidden_states(self, positions: Int[Tensor, " target"], **inputs: Tensor) -> Float[Tensor, "target hidden"]:
        """Run the model without its head, and return what the head would read at these flat positions."""
        kept: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0].flatten(0, 1)
            kept.append(hidden[positions.to(hidden.device)])
            return (args[0][:, :0], *args[1:])

        handle = output_head(self.model).register_forward_pre_hook(keep)
        try:
            self.model(**inputs, use_cache=False)
        finally:
            handle.remove()
        return kept[0]

    def logits(self, hidden: Float[Tensor, "target hidden"]) -> Float[Tensor, "target vocab"]:
        """Return the model's logits of these hidden states."""
        logits = output_head(self.model)(hidden) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def chunked_head(model: Model) -> ChunkedHead | None:
    """Return the head of a model as a function, or None where it does something to its logits that is unknown here.

    Known are a scale (Cohere's `logit_scale`, Granite's `logits_scaling`, Falcon-H1's `lm_head_multiplier`) and a
    soft cap (Gemma's `final_logit_softcapping`, RecurrentGemma's `logits_soft_cap`, xLSTM's `output_logit_soft_cap`);
    the result is compared with the model's own logits.
    """
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    softcaps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    head = ChunkedHead(
        model, float(scale), next((getattr(config, name) for name in softcaps if hasattr(config, name)), None)
    )
    probe = torch.arange(1, 5, device=model.get_input_embeddings().weight.device)[None]
    try:
        with torch.no_grad():
            own = model(input_ids=probe, use_cache=False).logits[0]
            ours = head.logits(head.hidden_states(torch.arange(4), input_ids=probe))
        same = same_logits(ours, own)
    except (RuntimeError, TypeError, IndexError):
        same = False
    if not same:
        logger.warning(
            "%s does something to its logits that is unknown here; its own head runs on whole batches, "
            "which takes more memory",
            type(model).__name__,
        )
    return head if same else None


def linear_head(model: Model) -> ChunkedHead | None:
    """Return the head of a model where its logits follow from hidden states, its weight and bias alone, else None.

    So it is no head that is quantised, wears an adapter, is split over devices or has hooks, which are to see logits.
    """
    if _is_linear(output_head(model)):
        with evaluation_mode(model):
            return chunked_head(model)
    logger.warning(
        "the head of %s is no plain linear layer; the loss is computed from its logits, which takes more memory",
        type(model).__name__,
    )
    return None


def same_logits(found: Tensor, expected: Tensor) -> bool:
    """Whether logits are the same but for rounding, measured by the largest: fresh models have small ones."""
    tolerance = 5e-3 if expected.dtype == torch.float32 else 2e-2  # TF32 rounds to 5e-4, bfloat16 to 4e-3
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


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


def _is_linear(head: Any) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        type(head).forward is nn.Linear.forward
        and "forward" not in vars(head)  # as accelerate patches it
        and not any(vars(head)[name] for name in hooks)
        and type(head.weight) is nn.Parameter  # tensors of other kinds multiply in ways of their own
    )


def _location(path: str) -> tuple[str, dict[str, Any]]:
    """Return what `from_pretrained` takes for a path."""
    place = locate(path)
    if place is not None and place.is_file():
        return str(place.parent), {"gguf_file": place.name}
    return (path if place is None else str(place)), {}


def _without_quantization(model: Model) -> Model:
    """Move a de-quantised model's state into a fresh one: transformers refuses to save the former."""
    values = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    fresh = type(model)(type(model.config).from_dict(values)).to(model.dtype)
    fresh.load_state_dict(model.state_dict())
    fresh.tie_weights()
    return fresh.eval()
