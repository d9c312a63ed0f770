"""The logs of a Trainer come in; one row per log goes out to the terminal."""

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
    """Make a trainer print a row per log, above its progress bar, instead of a dict; a notebook keeps its own table."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
            trainer.add_callback(LogRows)
            if isinstance(callback, ProgressCallback):
                trainer.add_callback(_Bars)


class LogRows(TrainerCallback):
    """Prints the main numbers of each training and evaluation log under a header.

    All numbers are in `trainer_state.json` and in the reports of `report_to`.
    """

    def __init__(self) -> None:
        """Begin without a header."""
        self._has_header = False

    def on_log(self, _args: Any, state: Any, _control: Any, *, logs: dict[str, Any], **_: Any) -> None:
        """Print a row if the log is of a training step or an evaluation."""
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
    """The Trainer's own progress bars, without its printed dicts."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing: `LogRows` prints the log."""


def _row(first: str, cells: list[str]) -> str:
    return f"{first:16}" + "".join(f"{cell:>10}" for cell in cells).rstrip()
