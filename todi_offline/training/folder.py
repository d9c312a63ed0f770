"""The folder and the parts of a run come in; its start goes out: step 0, a checkpoint, already finished, or refused.

`todi_run.json` records the parts of a run, and its summary once it is finished. A run with the same parts resumes by
itself. The split of a step over ranks and micro-batches may change if the number of sequences per step stays the same.
A checkpoint is complete if its `trainer_state.json`, which is written last, can be read. A run holds the lock of its
folder while it trains; the kernel releases the lock when its process ends.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from todi_offline.cache.format.fingerprint import differences, hash_bytes
from todi_offline.cache.store.locks import FolderLock
from todi_offline.errors import ConfigError
from todi_offline.models.loading import Model
from todi_offline.training.first_rank import of_first_rank

RUN_NAME = "todi_run.json"

Parts = Mapping[str, Any]
"""Everything that decides the outcome of a run: settings, data and weights, as JSON values."""

SAMPLED_WEIGHTS = 256
"""Numbers of each tensor in a weights fingerprint: enough to tell two models apart, and fast for large models."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run starts."""

    checkpoint: str | None = None
    """The checkpoint to resume; None to start at step 0."""
    before: Mapping[str, float] | None = None
    """The metrics before the first step, if the run resumes."""
    finished: Mapping[str, Any] | None = None
    """The summary of the run, if it is already finished."""
    is_changed: bool = False
    """Whether the checkpoint is of a run with other settings."""


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """In this context no other run can write in the folder. The first process locks it for all processes of this run.

    Raises:
        CacheLockedError: another run writes in the folder; names its process.
        ConfigError: the folder cannot be made.
    """
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                message = f"the folder {out} cannot be made: {error.strerror}; name another folder (--out)"
                raise ConfigError(message) from error
            stack.enter_context(FolderLock(out))

        of_first_rank(lock)
        yield


def find_start(out: Path, parts: Parts, resume: bool | None) -> Start:
    """Decide where a run with these parts starts in a folder; nothing in the folder changes.

    Only the given parts are compared with the recorded ones, so that some parts can be checked before others are known.
    With `resume` None, a run with the same parts resumes or is finished, and a different run in the folder is refused.
    With True, the run resumes whatever its parts; with False, it starts at step 0.

    Raises:
        ConfigError: the folder holds a different run; there is no checkpoint to resume; the last one holds a model
            alone; or the number of sequences per step differs, so the position in the data would be lost.
    """
    _require_folder(out)
    checkpoint, record = last_checkpoint(out), _read(out)
    if resume is False:
        _require_ours(checkpoint, record)
        return Start()
    finished, before = record.get("summary"), record.get("before")
    recorded = {name: value for name, value in record.get("parts", {}).items() if name in parts}
    lines = differences(parts, recorded, ("now", "in that run")) if record else []
    if checkpoint is None and finished is None:
        if resume:
            raise ConfigError(f"{out} holds no checkpoint to resume; leave out resume (--resume) to start a new run")
        return Start()
    stopped = finished is not None and finished["num_steps"] < record.get("planned_steps", 0)  # by a callback
    if finished is not None and not lines and not (resume and stopped and checkpoint):
        return Start(finished=finished)
    if not resume and (lines or not record):
        raise ConfigError(_refusal(out, lines, finished is not None))
    if checkpoint is None:
        raise ConfigError(f"{out} holds a finished run and no checkpoint to resume; name another folder (--out)")
    _require_resumable(checkpoint)
    if line := next((line for line in lines if line.startswith(("sequences_a_step", "sequences_a_batch"))), None):
        raise ConfigError(
            f"{checkpoint} cannot be resumed ({line}): its position in the data would be lost; keep processes x "
            "per_device_train_batch_size x gradient_accumulation_steps as in that run"
        )
    return Start(checkpoint, before, is_changed=bool(lines))


def require_steps_left(start: Start, num_planned_steps: Callable[[], int]) -> None:
    """Refuse to resume a checkpoint with other settings that plan no step after it.

    Counting the planned steps lays out an epoch, so it is done where it matters.

    Raises:
        ConfigError: with the ways to train on.
    """
    if start.checkpoint is None or not start.is_changed:
        return
    planned_steps = num_planned_steps()
    if (step := _step(Path(start.checkpoint))) >= planned_steps:
        raise ConfigError(
            f"{start.checkpoint} is already at step {step:,} and the new settings end at step {planned_steps:,}, so no "
            "step is left to train; train longer (--max-steps, --epochs), or start again with the new settings: in "
            "another folder (--out), or here (--no-resume, which deletes the checkpoints)"
        )


def how_to_go_on(out: Path) -> str:
    """Return in words what the same command does next in the folder of a run that was stopped."""
    checkpoint = last_checkpoint(out)
    if checkpoint is None:
        return "there is no checkpoint yet, so the same command starts again; --set save_steps=N writes one earlier"
    if not _has_optimizer(checkpoint):
        return f"{checkpoint} holds a model alone (save_only_model), so the run cannot be resumed"
    return f"the same command resumes from {checkpoint}"


def begin(out: Path, parts: Parts, start: Start) -> None:
    """Record the parts of a run. Delete incomplete checkpoints, and all checkpoints if the run starts at step 0."""
    for folder in _checkpoints(out):
        if start.checkpoint is None or not _is_complete(folder):
            shutil.rmtree(folder)
    if start.checkpoint is None and (out / RUN_NAME).exists():
        for file in out.glob("runs/events.out.tfevents.*"):  # the curves of the previous run
            file.unlink()
    _write(out, {"parts": parts, "before": start.before})


def note(out: Path, **values: Any) -> None:
    """Add values to the record of a run: its metrics `before` the first step, or its `summary`."""
    _write(out, _read(out) | values)


def last_checkpoint(out: Path) -> str | None:
    """Return the folder of the last complete checkpoint of a run; None if there is none."""
    complete = [folder for folder in _checkpoints(out) if _is_complete(folder)]
    return str(max(complete, key=_step)) if complete else None


def weights_fingerprint(model: Model) -> str:
    """Return a hash of the names, the shapes and a sample of the numbers of a model's tensors."""
    parts: list[bytes] = []
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(flat.numel() // SAMPLED_WEIGHTS, 1)].float().cpu()
        parts += [f"{name} {list(tensor.shape)} {tensor.dtype}".encode(), sample.numpy().tobytes()]
    return hash_bytes(parts)


def _refusal(out: Path, lines: list[str], is_finished: bool) -> str:
    contents = "a finished run" if is_finished else "the checkpoints of a run"
    reason = f"with other settings ({'; '.join(lines)})" if lines else f"without {RUN_NAME}: its settings are unknown"
    return (
        f"{out} holds {contents} {reason}; name another folder (--out), resume it with the new settings (--resume), or "
        "delete its checkpoints and start again (--no-resume)"
    )


def _require_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; name a folder for the run (--out)")


def _require_ours(checkpoint: str | None, record: Parts) -> None:
    if checkpoint is not None and not record:
        raise ConfigError(
            f"{checkpoint} is in a folder without {RUN_NAME}: another program may have written it, so it is not "
            "deleted; name another folder (--out)"
        )


def _has_optimizer(checkpoint: str) -> bool:
    return (Path(checkpoint) / "scheduler.pt").is_file()  # beside the optimizer, which FSDP writes under other names


def _require_resumable(checkpoint: str) -> None:
    """Refuse a checkpoint without the optimizer: the learning rate would start again in the middle of a run."""
    if not _has_optimizer(checkpoint):
        raise ConfigError(
            f"{checkpoint} holds a model alone (save_only_model), so it cannot be resumed; start again here "
            "(--no-resume, which deletes the checkpoints), or train from it in another folder (--student, --out)"
        )


def _checkpoints(out: Path) -> list[Path]:
    paths = out.iterdir() if out.is_dir() else ()
    return [path for path in paths if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
    except (OSError, ValueError):
        return False
    return True


def _read(out: Path) -> dict[str, Any]:
    file = out / RUN_NAME
    if not file.exists():
        return {}
    try:
        record: dict[str, Any] = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}); delete it, or name another folder (--out)") from error
    return record


def _write(out: Path, record: Mapping[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    new = out / f"{RUN_NAME}.new"
    new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    new.replace(out / RUN_NAME)
