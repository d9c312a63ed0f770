"""The rows that a training run prints: columns, header, other processes and other callbacks."""

from types import SimpleNamespace

import pytest
from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback, TrainerCallback

from todi_offline.training.log import LogRows, print_rows


def logged(rows: LogRows, logs: dict[str, float], step: int = 10, is_first_process: bool = True) -> None:
    state = SimpleNamespace(global_step=step, is_world_process_zero=is_first_process)
    rows.on_log(None, state, None, logs=logs)


STEP = {"loss": 10.3, "cross_entropy": 9.80123, "learning_rate": 5e-4, "tokens_per_second": 12345.6, "epoch": 0.4}
HELD_OUT = {"eval_loss": 4.5, "eval_forward_kl": 2.18912, "eval_runtime": 6.0}
END = {"train_runtime": 288.0, "train_loss": 5.681}


def test_each_log_is_a_row_under_one_header(capsys: pytest.CaptureFixture[str]) -> None:
    rows = LogRows()
    logged(rows, STEP)
    logged(rows, HELD_OUT, step=20)
    logged(rows, END, step=20)
    header, step, held_out = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["step", "loss", "CE"]
    assert step.split() == ["10", "10.3000", "9.8012", "0.0005", "12,346"]
    assert held_out.split() == ["20", "held", "out", "4.5000", "2.1891"]
    # A number stands below its title, aligned on the right.
    assert step.index("9.8012") + len("9.8012") == header.index("CE") + len("CE")
    assert held_out.index("2.1891") + len("2.1891") == header.index("fwd KL") + len("fwd KL")


def test_other_processes_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    logged(LogRows(), STEP, is_first_process=False)
    assert capsys.readouterr().out == ""


class Mine(ProgressCallback):
    """A user's own progress callback."""


@pytest.mark.parametrize(("own", "has_bars"), [(PrinterCallback, False), (ProgressCallback, True)])
def test_the_rows_replace_the_trainers_printed_dicts_and_other_callbacks_stay(
    own: type[TrainerCallback], has_bars: bool
) -> None:
    handler = CallbackHandler([Mine, own], None, None, None, None)
    trainer = SimpleNamespace(
        callback_handler=handler, remove_callback=handler.remove_callback, add_callback=handler.add_callback
    )
    print_rows(trainer)
    assert any(isinstance(callback, LogRows) for callback in handler.callbacks)
    assert [type(c) for c in handler.callbacks if isinstance(c, ProgressCallback)][:1] == [Mine]
    assert own not in map(type, handler.callbacks)
    assert sum(isinstance(callback, ProgressCallback) for callback in handler.callbacks) == 1 + has_bars
