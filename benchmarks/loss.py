"""How much longer does a distillation step of the head take than its three matrix products, and how much memory?

One step is the head's forward pass, the loss, and the gradients of the hidden states and of the head's weight, in
float32. These steps are compared, in one process and in turns:

    products        hidden @ W.T, its result @ W, and its result.T @ hidden, which every method needs
    cross_entropy   plain fine-tuning: cross-entropy of all logits
    fused ...       fused_linear_distill: CE and ToDi from K ids, with tail samples or without, at T = 1 or 2
    readable        distillation_loss of all logits: the same numbers as fused
    dense           CE and ToDi over the whole vocabulary, the teacher's logits given

and, where they are installed, public libraries that run on a CPU:

    trl, dense      GKDTrainer's loss: forward KL over the whole vocabulary, no CE; the teacher's logits given
    trl, tiled      DistillationTrainer's: the same from hidden states and head of student and teacher, logits in tiles
    liger           LigerFusedLinearJSDLoss: CE and forward KL over the whole vocabulary; given as trl, tiled
    axolotl         its top-k loss: CE and forward KL among the K ids, renormalised, no tail; given K ids and log-probs

Forward KL (beta = 0 in each) is less work than ToDi, which is forward and reverse KL with weights. `trl, tiled` and
liger make the teacher's logits within the step, as with a teacher in memory, here of the student's width. This takes
one more matrix product; `trl, tiled` takes three more, because it makes all logits again for the gradients. By default
liger and axolotl work in chunks of 1,024 targets, which here is all of them; `by 128` means chunks of 128. `compiled`
is torch.compile, compilation not counted; axolotl has it too, but its mask breaks the graph: memory came out the same
and time no shorter, so it is not in the table.

    pip install --no-deps trl==1.16.0 liger-kernel==0.8.5 axolotl==0.19.0
    pip install addict pydantic peft    # what axolotl's loss imports; trl needs what this project needs

Vocabularies are 32,000, 49,152 and 128,256 ids; `--set vocab=32000,49152` takes some, `--set repetitions=3` is less.
Time is a ratio to another method's time in the same repetition; the table has the median over repetitions, of wall time
and of processor time (all threads; less disturbed by other processes). Memory is the most that torch's allocator handed
out at once during the step, gradients included. The inputs of the step, such as the dense teacher's logits, and the
work space of the matrix library are not counted.

On a machine that does other work at the same time, run it on one thread (OMP_NUM_THREADS=1):
with more, each of the fused step's many short operations waits for the thread that was interrupted.

Not claimed: anything about a GPU, for which the peers are made, about more threads than the results name, bfloat16,
other sizes or a whole training step; the targets are random.
"""

import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks._peak import peak_bytes
from benchmarks._peers import Given, Step, peer_steps, peers
from todi_offline.losses import DistillationConfig, dense_divergence, distillation_loss, fused_linear_distill
from todi_offline.targets.sparse import SparseTargets, sparsify

Measured = dict[str, dict[str, list[float]]]
"""By measure, then by method."""

WIDTH, K, NUM_SAMPLES = 576, 64, 8
VOCABS = (32_000, 49_152, 128_256)
REFERENCES = ("products", "cross_entropy", "dense", "fused, samples")
BARS_VOCAB = 49_152
BARS = [
    ("wall_seconds", "products", 1.15),
    ("wall_seconds", "cross_entropy", 1.0),
    ("wall_seconds", "dense", 0.5),
    ("peak_bytes", "dense", 0.1),
]
"""What the fused step is to take at most: of which measure, as a multiple of whose, how much."""


def run(quick: bool, vocab: str | None = None, repetitions: str = "7") -> dict[str, object]:
    num_targets, num_repetitions = (128, 3) if quick else (1024, int(repetitions))
    vocabs = tuple(map(int, vocab.split(","))) if vocab else VOCABS[:1] if quick else VOCABS
    found = peers()
    print(f"{torch.get_num_threads()} threads, {num_targets} targets")
    print("\n".join(f"{name}: {version}" for name, version in found.items()))
    by_vocab = {}
    for size in vocabs:
        measured = _measured(num_targets, size, num_repetitions)
        _print_ratios(size, measured)
        if size == BARS_VOCAB and not quick:  # the bars are for the full size
            _print_bars(measured)
        by_vocab[str(size)] = _summary(measured)
    return {
        "sizes": {"targets": num_targets, "d": WIDTH, "k": K, "samples": NUM_SAMPLES},
        "peers": found,
        "threads": torch.get_num_threads(),
        "repetitions": num_repetitions,
        "vocabs": by_vocab,
    }


def _measured(num_targets: int, vocab: int, repetitions: int) -> Measured:
    given = make_given(num_targets, vocab)
    steps = make_steps(given) | peer_steps(given)
    measured = _times(steps, repetitions)
    measured["peak_bytes"] = {name: [peak_bytes(step)] for name, step in steps.items()}
    torch.compiler.reset()  # else the next vocabulary is compiled for any size
    return measured


def make_given(
    num_targets: int, vocab: int, width: int = WIDTH, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Given:
    """Return what all methods are given, the same numbers on every device."""
    generator = torch.Generator().manual_seed(0)

    def normal(num_rows: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(num_rows, width, generator=generator) * scale).to(device, dtype)

    teacher_hidden, teacher_weight = normal(num_targets), normal(vocab, 1 / 8)
    teacher_logits = teacher_hidden @ teacher_weight.T
    return Given(
        hidden=normal(num_targets).requires_grad_(),
        weight=normal(vocab, 1 / 10).requires_grad_(),
        labels=torch.randint(vocab, (num_targets,), generator=generator).to(device),
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        teacher_logits=teacher_logits,
        bucket=sparsify(teacher_logits, K),
        sampled=sparsify(
            teacher_logits, K, num_tail_samples=NUM_SAMPLES, generator=torch.Generator(device).manual_seed(0)
        ),
    )


def make_steps(given: Given) -> dict[str, Step]:
    """Return what is timed, by its name."""
    hidden, weight, labels = given.hidden, given.weight, given.labels

    def fused(targets: SparseTargets, temperature: float = 1.0) -> Step:
        config = DistillationConfig(temperature=temperature)
        return lambda: given.gradients(fused_linear_distill(hidden, weight, labels, targets, config)[0])

    def products() -> tuple[Tensor, ...]:
        with torch.no_grad():
            logits = hidden @ weight.T
            return logits @ weight, logits.T @ hidden

    def dense() -> tuple[Tensor, ...]:
        logits = hidden @ weight.T
        divergence = dense_divergence(logits, given.teacher_logits).mean()
        return given.gradients((cross_entropy(logits, labels) + divergence) / 2)

    return {
        "products": products,
        "cross_entropy": lambda: given.gradients(cross_entropy(hidden @ weight.T, labels)),
        "fused": fused(given.bucket),
        "fused, samples": fused(given.sampled),
        "fused, samples, T = 2": fused(given.sampled, 2.0),
        "readable, samples": lambda: given.gradients(distillation_loss(hidden @ weight.T, labels, given.sampled)[0]),
        "dense": dense,
    }


def _times(steps: dict[str, Step], repetitions: int) -> Measured:
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


def _summary(measured: Measured) -> dict[str, object]:
    return {
        "medians": _each(statistics.median, measured),
        "least": _each(min, measured),
        "ratios": {
            f"{measure} / {other}": {name: round(_ratio(by_name, name, other), 3) for name in by_name}
            for (measure, by_name), other in itertools.product(measured.items(), REFERENCES)
        },
    }


def _each(summary: Callable[[list[float]], float], measured: Measured) -> dict[str, dict[str, float]]:
    return {
        measure: {name: round(summary(values), 3) for name, values in by_name.items()}
        for measure, by_name in measured.items()
    }


def _ratio(values: dict[str, list[float]], name: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(values[name], values[other], strict=True))


def _print_ratios(vocab: int, measured: Measured) -> None:
    columns = ("wall s", *REFERENCES, "peak MiB", "of dense")
    print(f"\n{f'vocabulary {vocab:,}':22}" + "".join(f"{column:>15}" for column in columns))
    wall, peak = measured["wall_seconds"], measured["peak_bytes"]
    for name in wall:
        ratios = "".join(f"{_ratio(wall, name, other):14.2f}x" for other in REFERENCES)
        memory = f"{peak[name][0] / 2**20:15.0f}{_ratio(peak, name, 'dense'):14.2f}x"
        print(f"{name:22}{statistics.median(wall[name]):15.2f}{ratios}{memory}")


def _print_bars(measured: Measured) -> None:
    print()
    for measure, other, bar in BARS:
        ratio = _ratio(measured[measure], "fused, samples", other)
        verdict = "met" if ratio <= bar else "MISSED"
        print(f"fused, samples: {measure} {ratio:.3f} x {other}, at most {bar}: {verdict}")
    cpu = measured["cpu_seconds"]
    for other in REFERENCES[:-1]:
        least = min(cpu["fused, samples"]) / min(cpu[other])
        print(f"fused, samples: cpu_seconds {_ratio(cpu, 'fused, samples', other):.3f} x {other}, least {least:.3f} x")
