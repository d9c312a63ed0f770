"""A causal language model in; its head as one object out: what the head is, where it runs, and how it is chunked.

The logits of a model are those of a module, times a scale, and capped softly where the model does so. Where that is
known and tried, the head runs apart from the model, at chosen positions and some rows at a time, so that logits need
never exist for all positions at once; and where the module is a linear layer, a loss may take its weight and bias in
their place. Where it is not, the model runs its own head, at these positions.

Positions count over the flattened batch: row * sequence length + column. Hooks sit on the head, so that whatever wraps
the model (adapters, DDP, FSDP, checkpointing) stays as it is.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from todi_offline.errors import ModelError
from todi_offline.models.loading import Model, evaluation_mode

logger = logging.getLogger(__name__)

_SCALES = ("logit_scale", "lm_head_multiplier")  # Cohere's, Falcon-H1's
_DIVISORS = ("logits_scaling",)  # Granite's
_SOFTCAPS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
)  # Gemma's, RecurrentGemma's, xLSTM's

LossOf = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Takes hidden states [target, d], the head's weight and its bias; returns a loss."""


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a causal language model.

    Attributes:
        model: the model, whatever wraps it.
        scale: what the head's output is multiplied by, as the model's config says.
        softcap: the c of c * tanh(logits / c), as the model's config says; None without one.
        runs_apart: whether `logits` gives the model's own, as a try has shown.
        is_linear: whether, besides, they follow from the weight and bias of the head alone. So the head is not
            quantised, wears no adapter, is not split over devices and has no hooks, which are to see logits.
        stand_in: a copy of a linear head in another dtype, which runs in its place.
    """

    model: Model
    scale: float = 1.0
    softcap: float | None = None
    runs_apart: bool = False
    is_linear: bool = False
    stand_in: nn.Linear | None = None

    @property
    def module(self) -> Any:
        """The module that turns hidden states into logits.

        Raises:
            ModelError: the model has none.
        """
        return self.stand_in if self.stand_in is not None else output_module(self.model)

    @property
    def device(self) -> torch.device:
        """Where the logits are made."""
        device: torch.device = self.module.weight.device
        return device

    @property
    def num_ids(self) -> int:
        """Ids that have a logit."""
        module: Any = output_module(self.model)
        return int(getattr(module, "out_features", None) or module.weight.shape[0])

    def logits(self, hidden: Float[Tensor, "target d"]) -> Float[Tensor, "target vocab"]:
        """Return the model's logits of these hidden states, where the head runs apart."""
        if self.stand_in is not None:
            hidden = hidden.to(self.stand_in.weight)  # dtype, and device where accelerate's hooks would move it
        logits = self.module(hidden) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def hidden_states(self, positions: Int[Tensor, " target"], **inputs: Tensor) -> Float[Tensor, "target d"]:
        """Run the model up to its head, and return what the head would read at these positions."""

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            raise _ReachedError(_rows(args[0], positions))

        handle = output_module(self.model).register_forward_pre_hook(stop)
        try:
            self.model(**inputs, use_cache=False)
        except _ReachedError as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise ModelError(f"the forward pass of {type(self.model).__name__} does not run its output embeddings")

    def chunks(
        self, positions: Int[Tensor, " target"], rows: int, **inputs: Tensor
    ) -> Iterator[Float[Tensor, "chunk vocab"]]:
        """Yield the model's logits at these positions, `rows` at a time: made one after the other where that is known.

        Else all of them exist at once.
        """
        if self.runs_apart:
            for hidden in torch.split(self.hidden_states(positions, **inputs), rows):
                yield self.logits(hidden)
            return
        with self.at(positions):
            logits = self.model(**inputs, use_cache=False).logits[0]
        yield from torch.split(logits, rows)

    @contextlib.contextmanager
    def at(self, positions: Int[Tensor, " target"]) -> Iterator[None]:
        """Within, the model runs its head at these positions only, and returns logits [1, target, vocab]."""

        def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (_rows(args[0], positions).unsqueeze(0), *args[1:])

        handle = output_module(self.model).register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def loss_at(self, positions: Int[Tensor, " target"], loss_of: LossOf) -> Iterator[None]:
        """Within, the model's forward pass ends in a loss, and returns {"loss": loss} in place of its outputs.

        Beside it stands `aux_loss`, its routers' own, where the model has one.

        `loss_of` takes what the head would read at these positions, where the head is linear. It runs where the head
        would, so that hidden states, weight and bias are what whatever wraps the model made of them: gathered by FSDP,
        in autocast's reach. The loss leaves through the head and the model, for DDP and FSDP hang on to what these
        return; what the model does to its logits on the way is not done to the loss.
        """
        head: Any = output_module(self.model)
        returned: list[Tensor] = []

        def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            loss = loss_of(_rows(hidden, positions), head.weight, head.bias)
            return loss * hidden.new_ones(1, 1, 1, dtype=loss.dtype)  # no view: FSDP's hooks on one may be lost

        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            returned.append(output)

        def replace(_: nn.Module, __: Any, outputs: Any) -> dict[str, Tensor]:
            of_router = getattr(outputs, "aux_loss", None)  # of a mixture of experts that is asked for it
            return {"loss": returned[0].sum()} | ({} if of_router is None else {"aux_loss": of_router})

        head.forward = forward
        handles = [head.register_forward_hook(keep), self.model.register_forward_hook(replace, prepend=True)]
        try:
            yield
        finally:
            del head.forward
            for handle in handles:
                handle.remove()


def head_of(model: Model) -> Head:
    """Return the head of a model as its config describes it; nothing is tried, so that the model has to run it."""
    config = model.config.get_text_config()

    def named(names: tuple[str, ...]) -> float | None:
        return next((value for name in names if (value := getattr(config, name, None))), None)

    scale = (named(_SCALES) or 1.0) / (named(_DIVISORS) or 1.0)
    return Head(model, float(scale), named(_SOFTCAPS))


def tried_head(model: Model, *, linear: bool = False) -> Head:
    """Return the head of a model once a pass over four tokens has shown whether the head runs apart.

    A line of the log says why not, and with `linear`, why no loss may take its weight and bias. The pass runs under the
    autocast, and with the attention, that the caller has set; what it raises, a run of the model would raise as well.
    """
    head = head_of(model)
    if linear and (reason := _not_linear(head.module)) is not None:
        logger.warning(
            "the head of %s is not a plain linear layer (%s); the loss is computed from its logits, which takes more "
            "memory",
            type(model).__name__,
            reason,
        )
        return head
    tokens = torch.arange(1, 5, device=model.get_input_embeddings().weight.device)[None]
    with evaluation_mode(model):
        expected = model(input_ids=tokens, use_cache=False).logits[0]
        found = head.logits(head.hidden_states(torch.arange(4), input_ids=tokens))
    if (difference := logits_difference(found, expected)) is not None:
        logger.warning(
            "%s changes its logits in an unknown way (%s); its own head runs on whole batches, which takes more memory",
            type(model).__name__,
            difference,
        )
        return head
    return dataclasses.replace(head, runs_apart=True, is_linear=_not_linear(head.module) is None)


def in_dtype(head: Head, dtype: torch.dtype) -> Head:
    """Return a head that runs in a dtype of its own, by a copy of its weight and bias.

    In bfloat16 logits are rounded to 8 bits; a product in float32 of the same hidden states is not.

    Raises:
        ModelError: the head is no linear layer, or does more than its weight and bias say.
    """
    module = head.module
    if not head.runs_apart or type(module).forward is not nn.Linear.forward or module.weight.is_meta:
        raise ModelError(
            f"the head of {type(head.model).__name__} is not a plain linear layer on a device, so it cannot run in "
            "another dtype; leave head_dtype (--head-dtype) out"
        )
    weight, bias = module.weight, module.bias
    with torch.no_grad():
        num_ids, width = weight.shape
        copy = nn.Linear(width, num_ids, bias=bias is not None, device="meta", dtype=dtype)
        copy = copy.to_empty(device=weight.device)
        copy.weight.copy_(weight)
        if bias is not None:
            copy.bias.copy_(bias)
        changed = dataclasses.replace(head, stand_in=copy)
        difference = logits_difference(changed.logits(weight[:4]), head.logits(weight[:4]))
    if difference is not None:
        raise ModelError(
            f"the head of {type(head.model).__name__} uses more than its weight and bias ({difference}), so it cannot "
            "run in another dtype; leave head_dtype (--head-dtype) out"
        )
    return changed


def logits_difference(found: Tensor, expected: Tensor) -> str | None:
    """Return how two tensors of logits differ, None where they are the same but for rounding.

    Differences are measured by the largest logit: fresh models have small ones. Either may be on any device.
    """
    if found.shape != expected.shape:
        return f"their shape is {tuple(expected.shape)}, expected {tuple(found.shape)}"
    exact = expected.dtype == torch.float32 and not torch.is_autocast_enabled(expected.device.type)
    tolerance = 5e-3 if exact else 2e-2  # TF32 rounds to 5e-4, bfloat16 to 4e-3
    found, expected = found.to(expected.device, torch.float32), expected.float()
    off = float((found - expected).abs().max() / expected.abs().max())
    return None if off <= tolerance else f"they are off by {off:.1%} of the largest"


def require_vocabulary(model: Model, vocab_size: int) -> None:
    """Refuse a student whose head lacks ids that a cache holds.

    Raises:
        ModelError: with both numbers.
    """
    if (num_ids := head_of(model).num_ids) < vocab_size:
        raise ModelError(
            f"the student's head has {num_ids} ids, but the cache's targets are over {vocab_size}; choose a student "
            "with the teacher's ids, or resize its embeddings if tokens were added"
        )


def output_module(model: Model) -> nn.Module:
    """Return the module that turns hidden states into logits.

    Raises:
        ModelError: there is none.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output embeddings; a causal language model is expected")
    return head  # type: ignore[no-any-return]


class _ReachedError(Exception):
    """Ends a forward pass at the head, with what the head would read."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _rows(hidden: Float[Tensor, "batch seq d"], positions: Int[Tensor, " target"]) -> Float[Tensor, "target d"]:
    flat = hidden.flatten(0, 1)
    return flat[positions.to(flat.device)]


def _not_linear(head: Any) -> str | None:
    """Return why logits do not follow from a head's weight and bias alone, None where they do."""
    if type(head).forward is not nn.Linear.forward:
        return f"a {type(head).__name__}"
    if "forward" in vars(head):  # as accelerate patches it
        return "its forward is replaced"
    if any(vars(head)[f"_{name}_hooks"] for name in ("forward", "forward_pre", "backward", "backward_pre")):
        return "it has hooks"
    if type(head.weight) is not nn.Parameter:  # tensors of other kinds multiply in ways of their own
        return f"its weight is a {type(head.weight).__name__}"
    return None
