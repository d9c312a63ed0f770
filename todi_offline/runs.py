"""A run's folder and what the run is made of in; whether it begins there, goes on, is finished or is refused out.

`todi_run.json` says what a run is made of, and once it is finished what it came to. A run goes on by itself where all
of that is the same; batches may be split otherwise over ranks and micro-batches as long as a step has as many
sequences. A checkpoint counts once its `trainer_state.json`, which is written last, is whole.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from todi_offline.cache.format.fingerprint import differences, hash_bytes
from todi_offline.errors import ConfigError
from todi_offline.models import Model

RUN_NAME = "todi_run.json"

Parts = Mapping[str, Any]
"""What a run is made of: settings, data and weights, as JSON has them."""

SAMPLED_WEIGHTS = 256
"""Numbers of each tensor that stand for it: enough to tell two models apart, and fast for one of any size."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins."""

    checkpoint: str | None = None
    """Of the run to go on with."""
    before: Mapping[str, float] | None = None
    """What was measured before the first step of the run that goes on."""
    finished: Mapping[str, Any] | None = None
    """The summary of the run, where there is nothing to do."""


def find_start(out: Path, parts: Parts, resume: bool | None) -> Start:
    """Say where a run of these parts begins in a folder; nothing is changed there.

    Of what the folder's run is made of only these parts are compared, so that some can be before others are known.
    With `resume` None the run goes on, or is finished, where the folder holds one of the same parts, and is refused
    where it holds another. With True it goes on whatever the parts, with False it begins.

    Raises:
        ConfigError: the folder holds another run; there is nothing to go on with; or a step would have another number
            of sequences, so that the place in the data would be lost.
    """
    checkpoint, record = last_checkpoint(out), _read(out)
    if resume is False:
        _require_ours(checkpoint, record)
        return Start()
    finished, before = record.get("summary"), record.get("before")
    recorded = {name: value for name, value in record.get("parts", {}).items() if name in parts}
    lines = differences(parts, recorded, ("now", "in that run")) if record else []
    if checkpoint is None and finished is None:
        if resume:
            raise ConfigError(f"{out} holds no checkpoint to go on from; leave out resume (--resume) to begin")
        return Start()
    stopped = finished is not None and finished["num_steps"] < record.get("planned_steps", 0)  # by a callback
    if finished is not None and not lines and not (resume and stopped and checkpoint):
        return Start(finished=finished)
    if not resume and (lines or not record):
        raise ConfigError(_refusal(out, lines, finished is not None))
    if checkpoint is None:
        raise ConfigError(f"{out} holds a finished run and no checkpoint to go on from; name another folder (--out)")
    if any(line.startswith("sequences_a_step") for line in lines):
        line = next(line for line in lines if line.startswith("sequences_a_step"))
        raise ConfigError(
            f"{checkpoint} cannot be gone on with ({line}): its place in the data would be lost; keep processes x "
            "per_device_train_batch_size x gradient_accumulation_steps as they were"
        )
    return Start(checkpoint, before)


def begin(out: Path, parts: Parts, start: Start) -> None:
    """Write down what a run is made of; delete checkpoints that are not whole, and all that it does not go on with."""
    for folder in _checkpoints(out):
        if start.checkpoint is None or not _is_whole(folder):
            shutil.rmtree(folder)
    if start.checkpoint is None and (out / RUN_NAME).exists():
        for file in out.glob("runs/events.out.tfevents.*"):  # curves of another run
            file.unlink()
    _write(out, {"parts": parts, "before": start.before})


def note(out: Path, **values: Any) -> None:
    """Add to what is known of a run: `before` it, or its `summary`."""
    _write(out, _read(out) | values)


def last_checkpoint(out: Path) -> str | None:
    """Return the folder of the last whole checkpoint of a run, None where there is none."""
    whole = [folder for folder in _checkpoints(out) if _is_whole(folder)]
    return str(max(whole, key=_step)) if whole else None


def weights_fingerprint(model: Model) -> str:
    """Return a hash of a model's names, shapes and some of each of its tensors."""
    parts: list[bytes] = []
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        some = flat[:: max(flat.numel() // SAMPLED_WEIGHTS, 1)].float().cpu()
        parts += [f"{name} {list(tensor.shape)} {tensor.dtype}".encode(), some.numpy().tobytes()]
    return hash_bytes(parts)


def _refusal(out: Path, lines: list[str], is_finished: bool) -> str:
    holds = "a finished run" if is_finished else "the checkpoints of a run"
    why = f"of other settings ({'; '.join(lines)})" if lines else f"without {RUN_NAME}, so its settings are unknown"
    return (
        f"{out} holds {holds} {why}; --resume goes on with it as set now, --no-resume deletes its checkpoints and "
        "begins anew; or name another folder (--out)"
    )


def _require_ours(checkpoint: str | None, record: Parts) -> None:
    if checkpoint is not None and not record:
        raise ConfigError(
            f"{checkpoint} lies in a folder without {RUN_NAME}, so it may be another program's and is not deleted; "
            "name another folder (--out)"
        )


def _checkpoints(out: Path) -> list[Path]:
    found = out.iterdir() if out.is_dir() else ()
    return [path for path in found if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _is_whole(checkpoint: Path) -> bool:
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
        raise ConfigError(f"{file} is damaged ({error}); delete it, or name another folder (--out)") from error
    return record


def _write(out: Path, record: Mapping[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    new = out / f"{RUN_NAME}.new"
    new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    new.replace(out / RUN_NAME)
