"""Rows come in; batches of tokenised examples go out, in order, from one process or several."""

import itertools
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from todi_offline.data.encoder import Encoder
from todi_offline.data.examples import BATCH_ROWS, Example, record_batch
from todi_offline.data.forms import Form, columns_of
from todi_offline.data.tokens import Dropped, Row, Tokens
from todi_offline.errors import DataError

OWN_ID = pa.field("own_id", pa.string())
"""The column with the rows' own ids. They name the examples if every row has an id and all ids differ."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The examples of a batch of rows, in the columns of `SCHEMA` and `OWN_ID`, and the counts for `DataReport`."""

    batch: pa.RecordBatch
    counts: Counter[str]


@dataclass(frozen=True, slots=True)
class RowEncoder:
    """The encoder, the form and the data set's name: together they encode rows."""

    encoder: Encoder
    form: Form
    source: str


@dataclass(frozen=True, slots=True)
class _Piece:
    """The tokens of one example: a row, or a part of a row."""

    name: str
    own_id: str | None
    ids: list[int]
    supervised: list[bool]


def encoded_batches(rows: Iterable[Row], job: RowEncoder, num_proc: int) -> Iterator[Encoded]:
    """Yield the examples of the rows, one batch at a time. The number of processes does not change the examples.

    Raises:
        DataError: a row cannot be encoded; the message names the row.
    """
    batches = _numbered(iter(rows))
    if num_proc == 1:
        yield from (encode_rows(job, first, batch) for first, batch in batches)
        return
    context = multiprocessing.get_context("spawn")  # threads of Arrow, torch and tokenizers do not survive a fork
    with ProcessPoolExecutor(num_proc, context, _start_worker, (job,)) as pool:
        running: deque[Future[Encoded]] = deque()
        for first, batch in batches:
            running.append(pool.submit(_encode_in_worker, first, batch))
            if len(running) > 2 * num_proc:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def encode_rows(job: RowEncoder, first: int, rows: Sequence[Row]) -> Encoded:
    """Encode rows whose numbers start at `first`."""
    counts: Counter[str] = Counter(num_rows=len(rows))
    pieces: list[_Piece] = []
    for number, row in enumerate(rows, first):
        try:
            tokens = job.form.encode(job.encoder, columns_of(row, "the row"))
            pieces += _pieces(tokens, job, number, row, counts)
        except Dropped as reason:
            counts[str(reason)] += 1
        except DataError as error:
            raise DataError(f"{job.source}, row {number} (counted from 0): {error}") from error
    if job.encoder.config.pack:
        pieces = list(_packed(pieces, job.encoder.config.max_length))
    examples = [
        Example(piece.name, job.source, np.array(piece.ids, np.uint32), np.array([*piece.supervised[1:], False]))
        for piece in pieces
    ]
    counts["num_examples"] += len(examples)
    own_ids = pa.array([piece.own_id for piece in pieces], OWN_ID.type)
    return Encoded(record_batch(examples).append_column(OWN_ID, own_ids), counts)


def _numbered(rows: Iterator[Row]) -> Iterator[tuple[int, list[Row]]]:
    for start in itertools.count(0, BATCH_ROWS):
        batch = list(itertools.islice(rows, BATCH_ROWS))
        if not batch:
            return
        yield start, batch


def _pieces(tokens: Tokens, job: RowEncoder, number: int, row: Row, counts: Counter[str]) -> list[_Piece]:
    """Return the pieces of a row: one, or several if a long text is split."""
    max_length = job.encoder.config.max_length
    parts = list(_split(tokens, job.encoder)) if tokens.splits else [(tokens.ids[:max_length], tokens.supervised)]
    parts = [(ids, supervised[: len(ids)]) for ids, supervised in parts]
    parts = [(ids, supervised) for ids, supervised in parts if any(supervised[1:])]
    if not parts:
        raise Dropped("num_unsupervised")
    counts["num_prompts_cut"] += tokens.prompt_cut
    counts["num_thoughts_lost"] += tokens.lost_thoughts
    counts["num_texts_split"] += len(parts) > 1
    counts["num_responses_cut"] += not tokens.splits and len(tokens.ids) > max_length
    own = row.get("id")
    own_id = str(own) if type(own) in (str, int) else None
    ends = [""] if len(parts) == 1 else [f"#{part}" for part in range(1, len(parts) + 1)]
    return [
        _Piece(f"{job.source}:{number}{end}", None if own_id is None else own_id + end, *part)
        for part, end in zip(parts, ends, strict=True)
    ]


def _split(tokens: Tokens, encoder: Encoder) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield the parts of a text, each with BOS if the tokenizer adds one; each token is supervised once."""
    max_length, overlap = encoder.config.max_length, encoder.config.overlap
    yield tokens.ids[:max_length], tokens.supervised
    end = min(max_length, len(tokens.ids))
    room = max_length - len(encoder.start)
    while end < len(tokens.ids):
        begin = end - overlap
        ids = encoder.start + tokens.ids[begin : begin + room]
        num_context = len(encoder.start) + max(overlap, 1)  # without an overlap, no position predicts the first token
        yield ids, [False] * num_context + [True] * (len(ids) - num_context)
        end = begin + room


def _packed(pieces: Iterable[_Piece], max_length: int) -> Iterator[_Piece]:
    """Join neighbouring pieces up to `max_length`; the first token of each text is not supervised."""
    packed: _Piece | None = None
    for piece in pieces:
        if packed is not None and len(packed.ids) + len(piece.ids) <= max_length:
            supervised = [*packed.supervised, False, *piece.supervised[1:]]
            packed = _Piece(packed.name, packed.own_id, packed.ids + piece.ids, supervised)
            continue
        if packed is not None:
            yield packed
        packed = piece
    if packed is not None:
        yield packed


_worker: RowEncoder | None = None


def _start_worker(job: RowEncoder) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = job


def _encode_in_worker(first: int, rows: Sequence[Row]) -> Encoded:
    assert _worker is not None, "the pool calls _start_worker first"
    return encode_rows(_worker, first, rows)
