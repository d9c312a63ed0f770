"""A student and a cache in, a trained student out: transformers' Trainer with the objective of `losses`."""

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback

from todi_offline.cache.format.fingerprint import differences, tokenizer_fingerprint
from todi_offline.cache.format.manifest import require_same_tokenizer
from todi_offline.cache.reader import Cache
from todi_offline.errors import CacheMismatchError, ConfigError, ModelError
from todi_offline.losses import DistillationConfig, distillation_loss, fused_linear_distill
from todi_offline.losses.schedule import scheduled
from todi_offline.models.head import Head, require_vocabulary
from todi_offline.models.loading import Model, Tokenizer
from todi_offline.targets.sparse import SparseTargets
from todi_offline.training.arguments import refuse_float16, refuse_ignored
from todi_offline.training.meters import FiniteLosses, Meter
from todi_offline.training.probes import probe
from todi_offline.training.stream import (
    Batch,
    CacheDataset,
    FilledOrder,
    ShuffledOrder,
    batch_targets,
    model_inputs,
    prefetch,
    training_order,
)

logger = logging.getLogger(__name__)


class ToDiTrainer(Trainer):
    """A `transformers.Trainer` whose targets come from a cache.

    If the student's head is a linear layer (`head.is_linear`), the forward pass of the model computes the loss, without
    holding the logits of a batch. Otherwise a log line says why, and the loss is computed from the logits: the numbers
    are the same. The loss is also computed from the logits if `compute_loss` has to return the outputs.

    Arguments, callbacks, reporting, checkpoints and resuming are the Trainer's own. Beside the loss, these means over
    targets are logged: `cross_entropy`, `kd`, `forward_kl`, `reverse_kl`, `teacher_kept_mass`, `student_kept_mass`,
    `share_a_above_half` and `tail_share`; and `tokens_per_second` and `data_wait_share`. If a mixture of experts
    returns the loss of its routers, this `router_loss` is logged too, and added to the loss with the model's
    coefficient. Evaluation reports the same; its loss is without the loss of the routers.

    A loss that is not finite ends the run at the next log or checkpoint. TensorBoard's curves lie in `runs` inside the
    run's folder. Arguments that would be ignored are refused; see `todi_offline.training.arguments`.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Model,
        args: TrainingArguments,
        train_dataset: Cache | None = None,
        eval_dataset: Cache | Mapping[str, Cache] | None = None,
        processing_class: Tokenizer | None = None,
        distillation: DistillationConfig | None = None,
        **kwargs: Any,
    ) -> None:
        """Prepare training; `processing_class` is the student's tokenizer, and must be the cache's.

        Raises:
            ConfigError: an argument would be ignored, or the weights to train are float16.
            CacheMismatchError: it is not, or the caches differ in what they hold.
            ModelError: there is no tokenizer, or the student's vocabulary is smaller than the cache's.
            TargetsError: the cache does not hold what the objective asks for.
        """
        refuse_ignored(vars(args) | kwargs)
        if train_dataset is not None:
            refuse_float16(model)
        self.distillation = distillation or DistillationConfig()
        self._tokenizer = _student_tokenizer(processing_class)
        self._student = model
        self._cache: Cache | None = None
        train_dataset, eval_dataset = self._datasets(train_dataset), self._datasets(eval_dataset)
        args.remove_unused_columns = False  # a batch is no row of a table
        args.logging_nan_inf_filter = False  # it reads every loss, and hides what `FiniteLosses` reports
        args.dataloader_pin_memory &= args.device.type not in ("cpu", "mps")  # nothing to pin for: torch warns
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"{self.args.n_gpu} GPUs are visible to one process; start one process a GPU "
                "(torchrun or accelerate launch), or make one visible with CUDA_VISIBLE_DEVICES=0"
            )
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(Path(self.args.output_dir, "runs"))  # else a log before training goes to .
        self.model_accepts_loss_kwargs = True  # the loss is divided by num_items_in_batch here
        found = probe(self.model, self.accelerator)
        self.head = found.head
        if "data_collator" not in kwargs:
            self.data_collator = found.collator
        self._order: ShuffledOrder | None = None
        self._source: Iterator[Any] | None = None
        self._batches: Iterator[Batch] = iter(())
        self._meters = {True: Meter(), False: Meter()}
        self._losses = FiniteLosses()
        self._num_tokens: Tensor | int = 0
        self._counted: Any = None  # the state of the training whose tokens are counted

    @property
    def num_tokens_trained(self) -> int:
        """Tokens that were trained on since the training began or was resumed, on all ranks."""
        return int(self._num_tokens)

    def num_planned_steps(self) -> int:
        """Return after how many optimizer steps, from the first on, the training ends."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        batches = len(self.get_train_dataloader())
        steps_an_epoch = max(math.ceil(batches / self.args.gradient_accumulation_steps), 1)
        steps: int = math.ceil(self.args.num_train_epochs * steps_an_epoch)
        return steps

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the objective, summed over the targets here and divided by `num_items_in_batch`."""
        in_forward = self.head.is_linear and not return_outputs
        objective = self._objective_in_forward if in_forward else self._objective_from_logits
        outputs, loss, sums = objective(model, inputs, num_items_in_batch)
        if (of_router := _router_loss(outputs)) is not None:
            num_targets = len(inputs["labels"])
            share = num_targets / (max(num_targets, 1) if num_items_in_batch is None else num_items_in_batch)
            loss = loss + _router_coefficient(self.accelerator.unwrap_model(model)) * share * of_router
            sums["router_loss"] = num_targets * of_router.detach()
        self._meters[model.training].add(sums, inputs["num_tokens"])
        if model.training:
            self._losses.add(loss, self.state.global_step + 1)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over ranks, the loss is a sum
        return (loss, outputs) if return_outputs else loss

    def _head_within(self, model: nn.Module) -> Head:
        return dataclasses.replace(self.head, model=self.accelerator.unwrap_model(model))

    def _objective_in_forward(
        self, model: nn.Module, inputs: Batch, num_targets: Tensor | int | None
    ) -> tuple[Any, Tensor, dict[str, Tensor]]:
        """Return what `_objective_from_logits` does, from hidden states and the head."""
        assert self._cache is not None
        vocab_size, head, sums = self._cache.manifest.vocab_size, self._head_within(model), {}
        targets = batch_targets(inputs, self._cache)

        @torch.compiler.disable  # type: ignore[untyped-decorator]  # its gradients are made by hand
        def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            loss, found = fused_linear_distill(
                hidden,
                weight,
                inputs["labels"],
                targets,
                self._objective(model),
                bias=bias,
                num_targets=num_targets,
                vocab_size=vocab_size,
                scale=head.scale,
                softcap=head.softcap,
            )
            sums.update(found)
            return loss

        with head.loss_at(inputs["target_positions"], loss_of):
            outputs = model(**model_inputs(inputs), use_cache=False)
        return outputs, outputs["loss"], sums

    def _objective_from_logits(
        self, model: nn.Module, inputs: Batch, num_targets: Tensor | int | None
    ) -> tuple[Any, Tensor, dict[str, Tensor]]:
        """Return the model's outputs, the loss and the sums to log."""
        assert self._cache is not None
        with self._head_within(model).at(inputs["target_positions"]):
            outputs = model(**model_inputs(inputs), use_cache=False)
        logits = outputs.logits[0, :, : self._cache.manifest.vocab_size]
        targets = batch_targets(inputs, self._cache)
        objective = self._objective(model)
        loss, sums = distillation_loss(logits, inputs["labels"], targets, objective, num_targets=num_targets)
        return outputs, loss, sums

    def _objective(self, model: nn.Module) -> DistillationConfig:
        """Return the settings at this step of training; an evaluation has the full weight of KD at any step."""
        if not model.training:
            return self.distillation
        return scheduled(self.distillation, (self.state.global_step + 0.5) / max(self.state.max_steps, 1))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Take the batches of a step, made ahead of it, and count their targets over all ranks.

        There are no batches where the run is finished: a checkpoint of the last step was resumed within an epoch.
        """
        if self.state.max_steps and self.state.global_step >= self.state.max_steps:
            return [], torch.zeros((), device=device)
        if self.state is not self._counted:  # it begins, maybe again with smaller batches (auto_find_batch_size)
            self._counted, self._meters[True], self._num_tokens = self.state, Meter(), 0
        if epoch_iterator is not self._source:
            self._source = epoch_iterator
            if self._order is not None:  # accelerate's wrappers do not always pass the epoch on
                self._order.set_epoch(int(self.state.epoch or 0))
            self._batches = prefetch(epoch_iterator)
        started = perf_counter()
        batches = list(itertools.islice(self._batches, num_batches))
        self._meters[True].wait_seconds += perf_counter() - started
        # Counted on the device: to read a number there would wait for the step before.
        num_targets = torch.full((), sum(batch["labels"].numel() for batch in batches), device=device)
        num_tokens = sum((batch["num_tokens"].sum() for batch in batches), torch.zeros_like(num_targets))
        counts = torch.stack([num_targets, num_tokens])[None]
        num_targets, num_tokens = self.accelerator.gather(counts).sum(0)
        self._num_tokens += num_tokens
        return batches, num_targets

    def prediction_step(self, model: nn.Module, inputs: Batch, *_: Any, **__: Any) -> tuple[None, None, None]:
        """Add what is measured of a batch to the meter; `evaluation_loop` takes the means over targets."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            self.compute_loss(model, inputs)
        return None, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate, and report means over targets rather than over batches."""
        self._meters[False] = Meter()
        started = perf_counter()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._meters[False].means(self.accelerator)
        weight = self.distillation.kd_weight
        means["loss"] = (1 - weight) * means["cross_entropy"] + weight * means["kd"]
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        self._meters[True].pause(perf_counter() - started)
        return output

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        """Count what fills up packed rows as padding: it is no pad token."""
        if self.args.include_num_input_tokens_seen == "non_padding":
            inputs = {"input_ids": inputs["num_tokens"], "attention_mask": inputs["num_tokens"]}
        super()._track_num_input_tokens(inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log to a training step's."""
        if "loss" in logs or "train_loss" in logs:
            self._losses.require(self.accelerator, self.args)
        if "loss" in logs:
            logs |= self._meters[True].means(self.accelerator)
            self._meters[True] = Meter()
        super().log(logs, start_time)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._losses.require(self.accelerator, self.args)
        super()._save_checkpoint(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> FilledOrder:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        self._order = training_order(dataset.cache, seed)
        drops = self.args.dataloader_drop_last  # what does not fill a batch
        return FilledOrder(self._order, 1 if drops else self._train_batch_size * self.args.world_size)

    def _get_eval_sampler(self, eval_dataset: Any) -> FilledOrder:
        return FilledOrder(range(len(eval_dataset)), self.args.eval_batch_size * self.args.world_size)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on a cache or a mapping of names to caches; by default on the eval_dataset of the constructor."""
        metrics: dict[str, float] = super().evaluate(self._datasets(eval_dataset), *args, **kwargs)
        return metrics

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the Trainer's, of a cache that has been checked."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            getattr(self, "_eval_dataloaders", {}).pop("eval", None)  # persistent workers of an earlier cache
        return super().get_eval_dataloader(self._datasets(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the Trainer's, of a cache that has been checked."""
        return super().get_test_dataloader(self._datasets(test_dataset))

    def _datasets(self, caches: Any) -> Any:
        """Return caches as the Trainer takes them, once they are known to fit the student and the objective.

        Names of data sets that the trainer has already stay names.
        """
        if isinstance(caches, Mapping):
            return {name: self._datasets(cache) for name, cache in caches.items()}
        if caches is None or isinstance(caches, str):
            return caches
        cache = caches.cache if isinstance(caches, CacheDataset) else caches
        if not isinstance(cache, Cache):
            raise ConfigError(f"{type(cache).__name__} is not a cache; ToDiTrainer reads what `open_cache` returns")
        require_same_tokenizer(self._tokenizer, cache.manifest, "the student")
        require_vocabulary(self._student, cache.manifest.vocab_size)
        self._cache = self._cache or cache
        _require_alike(cache, self._cache)
        require_targets(cache, self.distillation)
        return CacheDataset(cache)


def require_targets(cache: Cache, distillation: DistillationConfig) -> None:
    """Refuse a cache that does not hold what the objective asks for.

    Raises:
        ConfigError: the divergence does not return a value for each target.
        TargetsError: the temperature, the k or the tail samples are not in the cache.
    """
    targets = SparseTargets.from_numpy(cache[0].targets[:0])
    logits, labels = torch.zeros(0, cache.manifest.vocab_size), torch.zeros(0, dtype=torch.long)
    distillation_loss(logits, labels, targets, distillation)


def _router_loss(outputs: Any) -> Tensor | None:
    found = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
    return found if isinstance(found, Tensor) else None


def _router_coefficient(model: Any) -> float:
    """Return what a mixture of experts multiplies its routers' loss by, under the names that transformers gives it."""
    config = model.config.get_text_config()
    for name in ("router_aux_loss_coef", "aux_loss_coef"):
        if hasattr(config, name):
            return float(getattr(config, name))
    raise ModelError(
        f"{type(model).__name__} returns a loss of its routers, with a coefficient that is unknown here; set "
        "output_router_logits to false in its config"
    )


def _student_tokenizer(tokenizer: Tokenizer | None) -> dict[str, str]:
    """Return the fingerprint of a student's tokenizer; refuse a student without one."""
    if tokenizer is None:
        raise ModelError("ToDiTrainer needs processing_class, the student's tokenizer: it is compared with the cache's")
    return tokenizer_fingerprint(tokenizer)


def _require_alike(cache: Cache, first: Cache) -> None:
    """Refuse a cache whose vocabulary or temperatures differ: a trainer reads all of its caches alike."""

    def reading(cache: Cache) -> dict[str, Any]:
        settings = cache.manifest.settings
        return {
            "vocab_size": cache.manifest.vocab_size,
            "temperatures": settings.temperatures,
            "tail_temperature": settings.tail_temperature,
        }

    lines = differences(reading(cache), reading(first))
    if lines:
        raise CacheMismatchError(
            f"{cache.root} cannot be used beside {first.root} ({'; '.join(lines)}); capture both with the same settings"
        )
