"""A Trainer's logs in, a row each on the terminal out."""

from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

_COLUMNS = {
    "loss": ("loss", ".4f"),
    "cross_entropy": ("CE", ".4f"),
    "kd": ("KD", ".4f"),
    "forward_kl": ("fwd KL", ".4f"),
    "reverse_kl": ("rev KL", ".4f"),
    "grad_norm": ("grad norm", ".3g"),
    "learning_rate": ("rate", ".3g"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "data_wait_share": ("waiting", ".2%"),
}


def print_rows(trainer: Trainer) -> None:
    """Let a trainer print a row a log in place of a dict, above its bars where it has them; a notebook has its own."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
            trainer.add_callback(LogRows)
            if isinstance(callback, ProgressCallback):
                trainer.add_callback(_Bars)


class LogRows(TrainerCallback):
    """Prints the main numbers of a training step's log and of an evaluation's, under a header.

    All numbers are in `trainer_state.json`, and go where the run reports to.
    """

    def __init__(self) -> None:
        """Begin without a header."""
        self._has_header = False

    def on_log(self, _args: Any, state: Any, _control: Any, *, logs: dict[str, Any], **_: Any) -> None:
        """Print what is a step's or an evaluation's."""
        prefix = "eval_" if "eval_loss" in logs else ""
        if not state.is_world_process_zero or f"{prefix}loss" not in logs:
            return
        if not self._has_header:
            tqdm.write(_row("step", [title for title, _ in _COLUMNS.values()]))
            self._has_header = True
        values = ((logs.get(prefix + name), form) for name, (_, form) in _COLUMNS.items())
        cells = ["" if value is None else format(float(value), form) for value, form in values]
        tqdm.write(_row(f"{state.global_step:,}{' held out' if prefix else ''}", cells))


class _Bars(ProgressCallback):
    """The Trainer's own bars, without the dicts."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Leave it to the rows."""


def _row(first: str, cells: list[str]) -> str:
    return f"{first:16}" + "".join(f"{cell:>10}" for cell in cells).rstrip()
