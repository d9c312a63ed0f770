"""The hidden states of one step of a serving engine in, targets of the sequences that are read through out.

An engine reads many sequences at a time, some of them in several chunks, and may begin a sequence anew. What it reads
in a step are spans: so many tokens of one sequence, from one position on. This module knows no engine.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.rows import TargetRows
from todi_offline.data import Example
from todi_offline.errors import EngineError, TeacherOutputError, TodiError, first_line, memory_errors
from todi_offline.targets.rows import chunk_rows, filled_up, located, sparsify_chunks, tail_uniforms
from todi_offline.teacher.in_vllm.messages import Message, parse_example, rows_message

ComputeLogits = Callable[[Tensor], Tensor | None]
"""Hidden states [row, hidden] in, logits [row, vocab] out; None on a worker to which the logits are not gathered."""


@dataclass(eq=False, slots=True)
class Job:
    """A sequence on its way through the engine."""

    number: int
    example: Example
    columns: npt.NDArray[np.int64]
    """[target]: the supervised positions."""
    uniforms: npt.NDArray[np.float64]
    """[target, sample]: they decide the samples of the tail."""
    position: int = 0
    """The next position to be read."""
    parts: list[TargetRows] = field(default_factory=list)
    """The targets of the supervised positions before it."""

    @classmethod
    def of(cls, message: Message, settings: CacheSettings) -> "Job":
        """Begin the sequence of a message; see `example_message`."""
        number, example = parse_example(message)
        return cls(number, example, np.flatnonzero(example.target_mask), tail_uniforms(example, settings))

    def go_to(self, position: int) -> None:
        """Forget the targets from a position on: the engine reads the sequence again from there.

        Raises:
            EngineError: the engine has left out positions before this one.
        """
        if position > self.position:
            raise EngineError(
                f"the engine read example {self.example.id!r} only from position {position}, without the positions "
                f"{self.position} to {position - 1}; it must read whole prompts, without cached prefixes"
            )
        if position < self.position and self.parts:
            kept = int(np.searchsorted(self.columns, position))
            self.parts = [TargetRows.concatenate(self.parts)[:kept]]
        self.position = position


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one sequence that are read in one step."""

    job: Job
    row: int
    """Row of the step's hidden states that belongs to the first token."""
    start: int
    """Position of the first token in its sequence."""
    count: int
    """How many tokens."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """The supervised positions of a span: these of its job's columns."""

    job: Job
    columns: slice
    rows: npt.NDArray[np.int64]
    """[target]: their rows among the hidden states of the step."""

    @classmethod
    def of(cls, span: Span) -> "_Cut":
        job = span.job
        start, stop = np.searchsorted(job.columns, (span.start, span.start + span.count)).tolist()
        return cls(job, slice(start, stop), span.row + job.columns[start:stop] - span.start)

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        return self.job.columns[self.columns]


class StepTargets:
    """Collects the targets of the sequences that an engine reads."""

    def __init__(
        self, compute_logits: ComputeLogits, settings: CacheSettings, vocab_size: int, *, is_answering: bool
    ) -> None:
        """Take the model's head, and whether this worker answers.

        Of workers that share a model one answers; the others take part in the gathering of its logits.
        """
        self._compute_logits, self._settings, self._vocab_size = compute_logits, settings, vocab_size
        self.is_answering = is_answering
        self._jobs: dict[str, Job] = {}
        self._finished: dict[int, TargetRows] = {}
        self._errors: list[Message] = []

    def begin(self, request_id: str, message: Message) -> None:
        """Begin a request that carries an example, unless it has begun; an error is kept for `take`."""
        if request_id not in self._jobs:
            with self._keeping_errors():
                self._jobs[request_id] = Job.of(message, self._settings)

    def job(self, request_id: str) -> Job | None:
        """Return the sequence of a request, where the request carries one."""
        return self._jobs.get(request_id)

    def end(self, request_id: str) -> None:
        """Forget a request that the engine has finished or given up."""
        self._jobs.pop(request_id, None)

    def keep_only(self, request_ids: Mapping[str, object]) -> None:
        """Forget all other requests."""
        self._jobs = {name: job for name, job in self._jobs.items() if name in request_ids}

    @torch.no_grad()
    def step(self, hidden: Float[Tensor, "row hidden"], spans: Sequence[Span]) -> None:
        """Compute the targets of a step; an error is kept for `take`."""
        cuts = [_Cut.of(span) for span in spans]
        chunks = self._logits(hidden, [cut.rows for cut in cuts]) if any(len(cut.rows) for cut in cuts) else iter(())
        with self._keeping_errors():
            if self.is_answering:
                self._answer(spans, cuts, chunks)
        for _ in chunks:  # every worker computes all logits, for they are gathered from all
            pass

    def take(self, max_bytes: int) -> Message:
        """Hand out the targets of sequences that were read through, of about so many bytes, and the errors so far.

        `num_left` sequences are left for the next time.
        """
        taken: list[tuple[int, Message]] = []
        while self._finished and max_bytes > 0:
            number, rows = self._finished.popitem()
            taken.append((number, rows_message(rows)))
            max_bytes -= sum(array.nbytes for array in rows.arrays().values())
        errors, self._errors = self._errors, []
        return {"rows": taken, "errors": errors, "num_left": len(self._finished)}

    @contextlib.contextmanager
    def _keeping_errors(self) -> Iterator[None]:
        """Within, an error is kept: raised in a worker, it would end the engine, and perhaps leave the driver waiting.

        `row` is that of a `TeacherOutputError`.
        """
        try:
            with memory_errors("lower --engine-set gpu_memory_utilization, and run the same command again"):
                yield
        except Exception as error:
            text = str(error) if isinstance(error, TodiError) else f"{type(error).__name__}: {first_line(error)}"
            self._errors.append({"kind": type(error).__name__, "message": text, "row": getattr(error, "row", 0)})

    def _logits(
        self, hidden: Float[Tensor, "row hidden"], rows: Sequence[npt.NDArray[np.int64]]
    ) -> Iterator[Tensor | None]:
        """Yield the logits of some rows of hidden states, chunk by chunk."""
        picked = hidden[torch.from_numpy(filled_up(rows)).to(hidden.device)]
        for piece in torch.split(picked, chunk_rows(self._vocab_size)):
            yield self._compute_logits(piece)

    def _answer(self, spans: Sequence[Span], cuts: Sequence[_Cut], chunks: Iterator[Tensor | None]) -> None:
        """Add the targets of a step to its sequences, and finish those that are read through."""
        for span in spans:
            span.job.go_to(span.start)
        targets = self._targets([cut for cut in cuts if len(cut.rows)], chunks)
        for span, cut in zip(spans, cuts, strict=True):
            job = cut.job
            if len(cut.rows):
                job.parts.append(next(targets))
            job.position = span.start + span.count
            if cut.columns.stop == len(job.columns) and cut.columns.start < cut.columns.stop:
                job.parts = [TargetRows.concatenate(job.parts)]
                self._finished[job.number] = job.parts[0]

    def _targets(self, cuts: Sequence[_Cut], chunks: Iterator[Tensor | None]) -> Iterator[TargetRows]:
        """Return the targets of each cut."""
        if not cuts:
            return iter(())
        labels = filled_up([cut.job.example.token_ids[cut.positions + 1].astype(np.int64) for cut in cuts])
        uniforms = filled_up([cut.job.uniforms[cut.columns] for cut in cuts])
        try:  # read at once: after a step the engine waits for the device anyway, for the token that comes next
            rows = sparsify_chunks(
                self._known_ids(chunks), torch.from_numpy(labels), torch.from_numpy(uniforms), self._settings
            )
        except TeacherOutputError as error:
            raise located(error, [(cut.job.example.id, cut.positions) for cut in cuts]) from error
        ends = np.cumsum([len(cut.rows) for cut in cuts]).tolist()
        return iter([rows[end - len(cut.rows) : end] for end, cut in zip(ends, cuts, strict=True)])

    def _known_ids(self, chunks: Iterable[Tensor | None]) -> Iterator[Tensor]:
        """Yield logits without the ids that only pad the embedding.

        Raises:
            EngineError: the worker has no logits, or fewer than the tokenizer has ids.
        """
        for chunk in chunks:
            if chunk is None:
                raise EngineError("vLLM gave no logits to the worker that computes the targets")
            if chunk.shape[1] < self._vocab_size:
                raise EngineError(
                    f"the tokenizer knows {self._vocab_size} ids, but the engine has logits for {chunk.shape[1]}; use "
                    "the model's own tokenizer, or resize its embeddings if tokens were added"
                )
            yield chunk[:, : self._vocab_size]
