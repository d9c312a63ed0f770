"""The largest log-probs of targets in, what DistillKit stores of them and reads back out.

Reimplemented from the README of github.com/arcee-ai/distillkit and its `compress_monotonic_logprobs`: PyPI has no such
package. The first log-probs are stored in bfloat16. The others are stored as a polynomial of their rank: the
coefficients of a least-squares fit, in float32. Ids take as many bits as the vocabulary needs. Residual bins, delta
encoding and error diffusion, which its README does not recommend, are left out. The fit is made in float64 here, in
float32 there.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Logprobs = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Layout:
    """How many log-probs are stored as they are, and the powers of the rank that make the others."""

    exact: int
    powers: tuple[float, ...]

    def fits(self, k: int) -> bool:
        """Say whether there are more log-probs to approximate than coefficients."""
        return k - self.exact > len(self.powers)

    def num_bytes(self, k: int, vocab_size: int) -> dict[str, int]:
        """Return the bytes a target of ids and of log-probs."""
        id_bits = math.ceil(math.log2(vocab_size))
        return {"topk_ids": math.ceil(k * id_bits / 8), "topk_logprobs": 2 * self.exact + 4 * len(self.powers)}

    def read_back(self, logprobs: Logprobs) -> Logprobs:
        """Return log-probs, [target, k] in any order, as they are after compression."""
        order = np.argsort(-logprobs, axis=1, kind="stable")
        ranked = np.take_along_axis(logprobs, order, axis=1)
        exact = torch.from_numpy(ranked[:, : self.exact]).bfloat16().float().numpy()
        ranks = np.arange(ranked.shape[1] - self.exact, dtype=np.float64)
        terms = np.stack([ranks**power for power in self.powers], axis=1)
        coefficients = np.linalg.lstsq(terms, ranked[:, self.exact :].T.astype(np.float64), rcond=None)[0]
        approximate = (terms.astype(np.float32) @ coefficients.astype(np.float32)).T
        back = np.empty_like(logprobs)
        np.put_along_axis(back, order, np.concatenate([exact, approximate], axis=1), axis=1)
        return back


RECOMMENDED = Layout(16, (0, 1, 2, 3, 4, 0.5))
BUDGET = Layout(1, (0, 1, 0.5))
"""The two settings of its README, there with k = 128 and k = 50."""
