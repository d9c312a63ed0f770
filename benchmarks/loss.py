"""How much longer than its three matrix products does a distillation step of the head take, and in how much memory?

One step is the head's forward pass, the loss, and the gradients of the hidden states and of the head's weight, in
float32. Compared are, in one process and in turns:

    products        hidden @ W.T, its result @ W, and its result.T @ hidden: what no method can go without
    cross_entropy   plain fine-tuning: cross-entropy of all logits
    fused ...       fused_linear_distill: CE and ToDi from K ids, with tail samples or without, at T = 1 or 2
    readable        distillation_loss of all logits: the same numbers as fused
    dense           CE and ToDi over the whole vocabulary, the teacher's logits given

Time is the median over repetitions of the ratio to another method's time in the same repetition, as the clock on the
wall has it and as the processor does (all threads; less disturbed by other processes). Memory is the most that
torch's allocator handed out at once during the step, gradients included: not what the step is given (the dense
teacher's logits are given), nor what the matrix library works in.

On a machine that does other work at the same time, run it on one thread (OMP_NUM_THREADS=1, as the results kept here):
with more, each of the fused step's many short operations waits for the thread that was interrupted.

Not claimed: anything of a GPU, of more threads than the results name, of bfloat16, of other sizes, or of a whole
training step; the targets are random.
"""

import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks._peak import peak_bytes
from todi_offline.losses import DistillationConfig, dense_divergence, distillation_loss, fused_linear_distill
from todi_offline.targets import SparseTargets, sparsify

Step = Callable[[], object]

WIDTH, VOCAB, K, NUM_SAMPLES = 576, 49_152, 64, 8
REFERENCES = ("products", "cross_entropy", "dense")
BARS = [
    ("wall_seconds", "products", 1.15),
    ("wall_seconds", "cross_entropy", 1.0),
    ("wall_seconds", "dense", 0.5),
    ("peak_bytes", "dense", 0.1),
]
"""What the fused step is to take at most: of which measure, as a multiple of whose, how much."""


def run(quick: bool) -> dict[str, object]:
    num_targets, repetitions = (128, 3) if quick else (1024, 7)
    steps = _steps(num_targets)
    measured = _times(steps, repetitions)
    measured["peak_bytes"] = {name: [peak_bytes(step)] for name, step in steps.items()}
    _print_ratios(measured)
    if not quick:  # the bars are for the full size
        _print_bars(measured)
    return {
        "sizes": {"targets": num_targets, "d": WIDTH, "vocab": VOCAB, "k": K, "samples": NUM_SAMPLES},
        "threads": torch.get_num_threads(),
        "repetitions": repetitions,
        "medians": _each(statistics.median, measured),
        "least": _each(min, measured),
        "ratios": {
            f"{measure} / {other}": {name: round(_ratio(by_name, name, other), 3) for name in by_name}
            for (measure, by_name), other in itertools.product(measured.items(), REFERENCES)
        },
    }


def _steps(num_targets: int) -> dict[str, Step]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_targets, WIDTH, generator=generator).requires_grad_()
    weight = (torch.randn(VOCAB, WIDTH, generator=generator) / 10).requires_grad_()
    labels = torch.randint(VOCAB, (num_targets,), generator=generator)
    teacher = torch.randn(num_targets, VOCAB, generator=generator) * 3
    bucket = sparsify(teacher, K)
    sampled = sparsify(teacher, K, num_tail_samples=NUM_SAMPLES, generator=generator)

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (hidden, weight))

    def fused(targets: SparseTargets, temperature: float = 1.0) -> Step:
        config = DistillationConfig(temperature=temperature)
        return lambda: gradients(fused_linear_distill(hidden, weight, labels, targets, config)[0])

    def products() -> tuple[Tensor, ...]:
        with torch.no_grad():
            logits = hidden @ weight.T
            return logits @ weight, logits.T @ hidden

    def dense() -> tuple[Tensor, ...]:
        logits = hidden @ weight.T
        return gradients((cross_entropy(logits, labels) + dense_divergence(logits, teacher).mean()) / 2)

    return {
        "products": products,
        "cross_entropy": lambda: gradients(cross_entropy(hidden @ weight.T, labels)),
        "fused": fused(bucket),
        "fused, samples": fused(sampled),
        "fused, samples, T = 2": fused(sampled, 2.0),
        "readable, samples": lambda: gradients(distillation_loss(hidden @ weight.T, labels, sampled)[0]),
        "dense": dense,
    }


def _times(steps: dict[str, Step], repetitions: int) -> dict[str, dict[str, list[float]]]:
    """Return wall and processor seconds of each step, all steps in turns; a first round is not counted."""
    wall: dict[str, list[float]] = {name: [] for name in steps}
    processor: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repetitions + 1):
        for name, step in steps.items():
            started = time.perf_counter(), time.process_time()
            step()
            wall[name].append(time.perf_counter() - started[0])
            processor[name].append(time.process_time() - started[1])
    return {
        "wall_seconds": {name: values[1:] for name, values in wall.items()},
        "cpu_seconds": {name: values[1:] for name, values in processor.items()},
    }


def _each(
    summary: Callable[[list[float]], float], measured: dict[str, dict[str, list[float]]]
) -> dict[str, dict[str, float]]:
    return {
        measure: {name: round(summary(values), 3) for name, values in by_name.items()}
        for measure, by_name in measured.items()
    }


def _ratio(values: dict[str, list[float]], name: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(values[name], values[other], strict=True))


def _print_ratios(measured: dict[str, dict[str, list[float]]]) -> None:
    print(f"{torch.get_num_threads()} threads")
    print(f"{'':22}" + "".join(f"{column:>14}" for column in ("wall s", *REFERENCES, "peak MiB", "of dense")))
    wall, peak = measured["wall_seconds"], measured["peak_bytes"]
    for name in wall:
        ratios = "".join(f"{_ratio(wall, name, other):13.2f}x" for other in REFERENCES)
        memory = f"{peak[name][0] / 2**20:14.0f}{_ratio(peak, name, 'dense'):13.2f}x"
        print(f"{name:22}{statistics.median(wall[name]):14.2f}{ratios}{memory}")


def _print_bars(measured: dict[str, dict[str, list[float]]]) -> None:
    print()
    for measure, other, bar in BARS:
        ratio = _ratio(measured[measure], "fused, samples", other)
        verdict = "met" if ratio <= bar else "MISSED"
        print(f"fused, samples: {measure} {ratio:.3f} x {other}, at most {bar}: {verdict}")
    cpu = measured["cpu_seconds"]
    for other in REFERENCES:
        least = min(cpu["fused, samples"]) / min(cpu[other])
        print(f"fused, samples: cpu_seconds {_ratio(cpu, 'fused, samples', other):.3f} x {other}, least {least:.3f} x")
