"""How long does the fused loss take if KD is computed only at selected positions?

The loss of 512 targets and its gradients for the hidden states and a head of [49152, 576] are timed, in float32, with
K = 16 and 8 samples. With w = 1 only the selected rows have a gradient; with w = 0.5 cross-entropy has one everywhere,
and the pass that scores the rows comes on top. A time is the least CPU time of several runs, the cases taking turns:
other programs do not add to it, and on a GPU it means nothing.

Not claimed: the time of a whole training step, of which the loss is a part; quality, which `study` measures.
"""

from time import process_time

import torch

from todi_offline.losses import DistillationConfig, fused_linear_distill
from todi_offline.targets.sparse import sparsify

POSITIONS = ("all", "student-entropy:0.2", "tip:0.5")
WEIGHTS = (0.5, 1.0)


def run(
    quick: bool, *, targets: str = "512", vocab: str = "49152", width: str = "576", runs: str = "7"
) -> dict[str, object]:
    num_targets, num_ids, d = (32, 1000, 64) if quick else (int(targets), int(vocab), int(width))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_targets, d, generator=generator).requires_grad_()
    weight = (torch.randn(num_ids, d, generator=generator) * 3 / d**0.5).requires_grad_()
    teacher = (hidden @ weight.T).detach() + torch.randn(num_targets, num_ids, generator=generator)
    labels = torch.randint(num_ids, (num_targets,), generator=generator)
    kept = sparsify(teacher, 16, num_tail_samples=8, generator=generator)
    cases = [(weight_of_kd, positions) for weight_of_kd in WEIGHTS for positions in POSITIONS]
    seconds: dict[tuple[float, str], list[float]] = {case: [] for case in cases}
    for _ in range(1 if quick else int(runs)):
        for case in cases:
            config = DistillationConfig(kd_weight=case[0], positions=case[1])
            started = process_time()
            fused_linear_distill(hidden, weight, labels, kept, config)[0].backward()  # type: ignore[no-untyped-call]
            seconds[case].append(process_time() - started)
            hidden.grad = weight.grad = None
    rows = []
    for (weight_of_kd, positions), times in seconds.items():
        ratio = min(times) / min(seconds[weight_of_kd, "all"])
        rows.append(
            {
                "kd_weight": weight_of_kd,
                "positions": positions,
                "cpu_seconds": round(min(times), 4),
                "ratio": round(ratio, 3),
            }
        )
        print(f"w = {weight_of_kd:3g}  {positions:20} {min(times):8.3f} s  {ratio:5.2f} of all positions")
    return {"targets": num_targets, "vocab": num_ids, "width": d, "rows": rows}
