"""Tables as a serving engine exports them: no tail, no samples, entries in any order."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from support.fake_cache import VOCAB, sequence, settings
from todi_offline.cache.convert.describing import imported_manifest

DESCRIBED = imported_manifest(settings(temperatures=(1.0,), tail_samples=0), VOCAB, "elsewhere", {"vocabulary": "a"})


def plain_rows(numbers: range) -> list[dict[str, Any]]:
    """Return fake sequences as rows that a serving engine could give: no tail, no samples, entries in any order."""
    rows = []
    for number in numbers:
        made = sequence(number, settings(temperatures=(1.0,), tail_samples=0))
        order = np.random.default_rng(number).permuted(np.tile(np.arange(6), (len(made.targets), 1)), axis=1)
        rows.append(
            {
                "input_ids": made.token_ids.tolist(),
                "target_mask": made.target_mask.tolist(),
                "target_ids": np.take_along_axis(made.targets.ids, order, axis=1).tolist(),
                "target_logprobs": np.take_along_axis(made.targets.logprobs, order, axis=1).tolist(),
                "label_logprob": made.targets.label_logprob.tolist(),
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
