"""Made-up sequences and students come in; token views go out. Also reads the data of a page like its scripts."""

import base64
import json
import re
import zlib
from typing import Any

import numpy as np

from support.fake_cache import VOCAB, sequence, settings
from todi_offline.cache.format.sequences import CachedSequence
from todi_offline.pages.tokens import ShownSequence, StudentRows


def shown_sequence(number: int, *, with_student: bool, k: int = 12) -> ShownSequence:
    made = sequence(number, settings(k=k))
    cached = CachedSequence(made.token_ids, made.target_mask, made.targets)
    student = student_rows(cached, seed=number) if with_student else None
    return ShownSequence(number, made.id, made.source, "random", cached, student)


def student_logprobs(cached: CachedSequence, seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed + 1000).normal(0, 2, (len(cached.targets), VOCAB))
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def student_rows(cached: CachedSequence, seed: int) -> StudentRows:
    """Return the predictions of a made-up student, computed from its whole distribution."""
    logprobs = student_logprobs(cached, seed)
    ids = cached.targets.ids.astype(np.int64)
    labels = cached.token_ids[np.flatnonzero(cached.target_mask) + 1].astype(np.int64)[:, None]
    others = logprobs.copy()
    np.put_along_axis(others, ids, -np.inf, axis=1)
    top_ids = np.argsort(-logprobs, axis=1)[:, :16]
    label = np.take_along_axis(logprobs, labels, axis=1)[:, 0]
    return StudentRows(
        kept=np.take_along_axis(logprobs, ids, axis=1),
        tail=np.logaddexp.reduce(others, axis=1),
        label=label,
        nll=-label,
        entropy=-(np.exp(logprobs) * logprobs).sum(1),
        top_ids=top_ids,
        top=np.take_along_axis(logprobs, top_ids, axis=1),
    )


def page_data(html: str) -> tuple[Any, list[np.ndarray]]:
    """Return the values of a page, and the arrays that these values reference by number."""
    found = re.search(r'<script type="application/octet-stream" id="data">([A-Za-z0-9+/=]*)</script>', html)
    assert found
    data = zlib.decompress(base64.b64decode(found[1]), -zlib.MAX_WBITS)
    length = int.from_bytes(data[:4], "little")
    header = json.loads(data[4 : 4 + length])
    arrays = []
    for array in header["arrays"]:
        count = int(np.prod(array["shape"]))
        values = np.frombuffer(data, "<" + array["type"], count, 4 + length + array["start"])
        arrays.append(values.reshape(array["shape"]))
    return header["page"], arrays
