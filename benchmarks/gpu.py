"""What do the loss, a training step and a capture take on a GPU, in time and in memory, beside trl and Liger?

    python -m benchmarks gpu                        # all of it, on `cuda`; about ten minutes
    python -m benchmarks gpu --set parts=loss       # or some: loss, step, capture
    pip install trl liger-kernel                    # the peers, which are left out where they are missing

    loss       the steps of `python -m benchmarks loss`, peers included, at d = 2,048, 128,256 ids and 8,192 targets, in
               float32 and in bfloat16: 24 repetitions in turns, after three uncounted ones that make the
               kernels; the clock waits for the device. `--set vocab=49152 --set targets=2048 --set width=576` takes
               others
    step       `python -m benchmarks step` under bfloat16's autocast, with models four times as wide
    capture    `python -m benchmarks capture` with 200 examples

Memory is the most that torch's allocator handed out beyond what a step is given. `--set device=cpu` runs the same code
on a CPU, which says nothing about a GPU. Run `pytest -m cuda` on the GPU first.

Not claimed: anything about other GPUs, about several, or about other sizes; targets and weights are random.
"""

import statistics
from collections.abc import Callable

import torch

from benchmarks import capture, step
from benchmarks._peak import now, peak_bytes
from benchmarks._peers import peer_steps, peers
from benchmarks.loss import make_given, make_steps

Part = Callable[[], dict[str, object]]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REFERENCES = ("products", "cross_entropy", "fused, samples")
WARM_UPS = 3


def run(
    quick: bool,
    device: str = "cuda",
    parts: str = "loss,step,capture",
    vocab: str = "128256",
    targets: str = "8192",
    width: str = "2048",
    repetitions: str = "24",
) -> dict[str, object]:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --set device=cpu shows that the code runs, and nothing of a GPU")
    sizes = (16, 320, 32, 1) if quick else (int(targets), int(vocab), int(width), int(repetitions))
    known: dict[str, Part] = {
        "loss": lambda: _losses(device, *sizes),
        "step": lambda: step.run(quick, device=device, scale="1" if quick else "4", batch_size="2" if quick else "8"),
        "capture": lambda: capture.run(quick, device=device, limit="1" if quick else "200"),
    }
    measured: dict[str, object] = {"device": _name(device), "peers": peers()}
    print("\n".join(f"{name}: {version}" for name, version in peers().items()))
    for part in parts.split(","):
        print(f"\n# {part} on {_name(device)}")
        measured[part] = known[part]()
    return measured


def _name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _losses(device: str, targets: int, vocab: int, width: int, repetitions: int) -> dict[str, object]:
    measured: dict[str, object] = {"sizes": {"targets": targets, "vocab": vocab, "d": width}}
    for name, dtype in DTYPES.items():
        given = make_given(targets, vocab, width, device, dtype)
        steps = make_steps(given) | peer_steps(given)
        seconds: dict[str, list[float]] = {step: [] for step in steps}
        failures: dict[str, str] = {}
        for _ in range(WARM_UPS + repetitions):
            for step_name, work in steps.items():
                if step_name not in failures:
                    _time(step_name, work, device, seconds, failures)
        times = {step_name: taken[WARM_UPS:] for step_name, taken in seconds.items() if step_name not in failures}
        peaks = {step_name: peak_bytes(steps[step_name], device) for step_name in times}
        _print(name, times, peaks)
        for step_name, reason in failures.items():
            print(f"{step_name}: did not run ({reason})")
        measured[name] = {
            "seconds": {step_name: round(statistics.median(taken), 6) for step_name, taken in times.items()},
            "bytes": peaks,
            "did not run": failures,
        }
    return measured


def _time(
    name: str, work: Callable[[], object], device: str, seconds: dict[str, list[float]], failures: dict[str, str]
) -> None:
    """Note how long a step takes, or why it does not run: a peer may have no kernel, or no memory, for these sizes."""
    started = now(device)
    try:
        work()
    except (RuntimeError, NotImplementedError) as error:
        failures[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
        return
    seconds[name].append(now(device) - started)


def _print(dtype: str, times: dict[str, list[float]], peaks: dict[str, float]) -> None:
    print(f"\n{dtype:22}{'ms':>10}" + "".join(f"{name:>16}" for name in REFERENCES) + f"{'peak MiB':>12}")
    for name, taken in times.items():
        ratios = [statistics.median(a / b for a, b in zip(taken, times[other], strict=True)) for other in REFERENCES]
        shown = "".join(f"{ratio:15.2f}x" for ratio in ratios)
        print(f"{name:22}{1000 * statistics.median(taken):10.2f}{shown}{peaks[name] / 2**20:12.0f}")
