"""The config of a data set comes in; the types of its results go out: `Example`, `Examples`, `DataReport`."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from todi_offline.cache.format.keys import ContentKeys, content_key
from todi_offline.errors import ConfigError, DataError

if TYPE_CHECKING:  # a second of import, and not needed to read a config
    import datasets

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("token_ids", pa.list_(pa.uint32())),
        ("target_mask", pa.list_(pa.bool_())),
        ("key", pa.binary()),  # all of one size, but datasets 4 lacks Arrow's type for that
    ]
)

BATCH_ROWS = 1_000


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which data set, how much of it, and where its examples are cut."""

    data: str = "stdlib"
    """The data set: a file (.jsonl .json .csv .parquet .arrow .txt), a folder saved by `datasets`, a hub id, or
    `stdlib`."""

    split: str | None = None
    """The split to read; by default `train`, or the only split."""

    subset: str | None = None
    """Configuration of a hub data set that has several."""

    data_revision: str | None = None
    """Branch, tag or commit of a hub data set."""

    streaming: bool = False
    """Read a hub data set while it is downloaded, and only as much as `limit`."""

    limit: int | None = None
    """Read only this many rows, the first ones."""

    max_length: int = 1024
    """Cut an example after this many tokens; a longer `text` becomes several examples."""

    max_prompt_length: int | None = None
    """Cut a prompt to this many tokens; by default half of `max_length`. For `messages` and `text`, only `max_length`
    counts."""

    overlap: int = 0
    """Tokens that two neighbouring examples of a `text` share; the second reads them as context."""

    pack: bool = False
    """Join short rows of `text` into examples of up to `max_length`."""

    chat_template: str | None = None
    """The chat template: a file, or the template itself. By default the tokenizer's, but trl's training template
    if the tokenizer's rewrites earlier turns."""

    chat_template_kwargs: dict[str, Any] = field(default_factory=dict, metadata={"json": True})
    """Arguments of the chat template, as JSON: {"enable_thinking": false}. A column of this name adds to them."""

    supervise: Literal["all", "last"] = "all"
    """Turns of `messages` to supervise: `all` of the assistant's, or the `last`, after the user's last message."""

    num_proc: int = 1
    """Number of processes that tokenise."""

    examples_dir: Path | None = None
    """Folder for large tokenised data sets; by default ~/.cache/todi_offline/examples."""

    def __post_init__(self) -> None:
        """Refuse lengths that leave no room for a response.

        Raises:
            ConfigError: a value is out of range.
        """
        if not self.data:
            raise ConfigError("data is empty; expected a file, a folder, a hub id, or stdlib")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}; expected a number of rows above 0, or none for all")
        if self.num_proc < 1:
            raise ConfigError(f"num_proc is {self.num_proc}; expected a number of processes above 0")
        if self.max_length < 2:
            raise ConfigError(f"max_length is {self.max_length}; expected at least 2 tokens")
        if not 0 <= self.overlap <= self.max_length // 2:
            raise ConfigError(f"overlap is {self.overlap}; expected 0 to {self.max_length // 2}, half of max_length")
        if self.prompt_limit < 1:
            raise ConfigError(f"max_prompt_length is {self.max_prompt_length}; expected a number of tokens above 0")
        if self.prompt_limit >= self.max_length:
            raise ConfigError(
                f"max_prompt_length is {self.max_prompt_length} and max_length is {self.max_length}: no token is left "
                "for a response; lower max_prompt_length or raise max_length"
            )

    @property
    def prompt_limit(self) -> int:
        """Tokens that a prompt may have."""
        return self.max_length // 2 if self.max_prompt_length is None else self.max_prompt_length


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """A sequence as the teacher reads it, and its supervised positions."""

    id: str
    """Unique within a data set: the row's own `id`, or `source:row number`."""

    source: str
    """Short name of the data set, such as `dolly.jsonl` or `stdlib/train`."""

    token_ids: npt.NDArray[np.uint32]
    """[token]: the ids that the teacher reads."""

    target_mask: npt.NDArray[np.bool_]
    """[token]: True at t if the prediction of token t + 1 is supervised; False at the last position."""

    def __post_init__(self) -> None:
        """Check dtypes and shapes.

        Raises:
            DataError: a dtype or shape is wrong, or the last position is supervised.
        """
        ids, mask = self.token_ids, self.target_mask
        if ids.dtype != np.uint32 or mask.dtype != np.bool_ or ids.ndim != 1 or ids.shape != mask.shape:
            raise DataError(
                f"example {self.id!r} has token_ids {ids.dtype}{list(ids.shape)} and target_mask "
                f"{mask.dtype}{list(mask.shape)}; expected uint32 and bool of the same length"
            )
        if mask[-1:].any():
            raise DataError(f"example {self.id!r} supervises its last position, which no token follows")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """Counts of the rows of a data set: read, cut, split, dropped."""

    num_rows: int
    num_examples: int
    num_prompts_cut: int = 0
    num_responses_cut: int = 0
    """Examples cut at `max_length`."""

    num_texts_split: int = 0
    """Rows of `text` that gave more than one example."""

    num_thoughts_lost: int = 0
    """Conversations in which the chat template left out thoughts of the assistant."""

    num_empty: int = 0
    """Dropped: the response, text or an assistant turn is blank."""

    num_unsupervised: int = 0
    """Dropped: no assistant turn, or none within `max_length`."""

    num_prompt_too_long: int = 0
    """Dropped: the chat template and the system message alone exceed `max_prompt_length`."""

    @property
    def num_dropped(self) -> int:
        """Rows that gave no example."""
        return self.num_empty + self.num_unsupervised + self.num_prompt_too_long

    @property
    def share_cut(self) -> float:
        """Share of the rows that were cut or dropped."""
        return (self.num_prompts_cut + self.num_responses_cut + self.num_dropped) / max(self.num_rows, 1)

    def __str__(self) -> str:
        """Return the counts as one readable line."""
        reasons = (
            f"{self.num_empty:,} empty, {self.num_unsupervised:,} without a supervised token, "
            f"{self.num_prompt_too_long:,} with too long a prompt"
        )
        split = f"; {self.num_texts_split:,} texts split" if self.num_texts_split else ""
        return (
            f"{self.num_rows:,} rows, {self.num_examples:,} examples{split}; {self.num_prompts_cut:,} prompts and "
            f"{self.num_responses_cut:,} responses cut; {self.num_dropped:,} dropped ({reasons})"
        )


@dataclass(frozen=True, eq=False, slots=True)
class Examples:
    """The examples of a data set, in order, over Arrow.

    >>> tokens, mask = np.array([5, 6, 7], np.uint32), np.array([False, True, False])
    >>> examples = Examples.from_list([Example("a", "mine", tokens, mask)])
    >>> len(examples), examples.num_tokens.tolist(), examples[0].id
    (1, [3], 'a')
    """

    dataset: "datasets.Dataset"
    """Columns id, source, token_ids (list of uint32), target_mask (list of bool) and key, in the format `arrow`."""

    report: DataReport
    recipe: dict[str, Any]
    """How the examples were made, as JSON values without paths, times or hosts."""

    @classmethod
    def from_list(cls, examples: Iterable[Example], recipe: Mapping[str, Any] | None = None) -> "Examples":
        """Return examples that you built yourself.

        Raises:
            DataError: the list is empty, or two examples have the same id.
        """
        examples = list(examples)
        ids = Counter(example.id for example in examples)
        if not examples:
            raise DataError("the list of examples is empty")
        if len(ids) < len(examples):
            raise DataError(f"two examples have the id {ids.most_common(1)[0][0]!r}; ids must be unique")
        report = DataReport(num_rows=len(examples), num_examples=len(examples))
        table = pa.Table.from_batches(record_batches(examples), SCHEMA)
        return cls(as_dataset(table), report, dict(recipe or {"form": "examples"}))

    @property
    def num_tokens(self) -> npt.NDArray[np.int64]:
        """[example]: the number of tokens."""
        import pyarrow.compute

        lengths = pyarrow.compute.list_value_length(self.dataset.data.column("token_ids"))
        return np.asarray(lengths, np.int64)

    @property
    def num_targets(self) -> npt.NDArray[np.int64]:
        """[example]: the number of supervised positions."""
        import pyarrow.compute

        counts = [np.empty(0, np.int64)]
        for chunk in self.dataset.data.column("target_mask").chunks:
            lengths = np.asarray(pyarrow.compute.list_value_length(chunk), np.int64)
            marks = np.concatenate([[0], np.cumsum(np.asarray(chunk.flatten().to_numpy(zero_copy_only=False)))])
            ends = np.cumsum(lengths)
            counts.append(marks[ends] - marks[ends - lengths])
        return np.concatenate(counts)

    def require_ids(self, vocab_size: int) -> None:
        """Refuse an example with an id that the teacher does not know.

        Raises:
            DataError: names the first.
        """
        before = 0
        for chunk in self.dataset.data.column("token_ids").chunks:
            ids = chunk.flatten().to_numpy()
            if len(beyond := np.flatnonzero(ids >= vocab_size)):
                ends = np.cumsum([len(row) for row in chunk])
                number = before + int(np.searchsorted(ends, beyond[0], "right"))
                raise DataError(
                    f"example {self[number].id!r} holds the id {ids[beyond[0]]}, which the tokenizer knows, but the "
                    f"teacher has only {vocab_size:,} ids; remove the example, or remove the token from its text"
                )
            before += len(chunk)

    def content_keys(self) -> ContentKeys:
        """Return the keys that identify the examples in a cache."""
        return ContentKeys.from_column(self.dataset.data.column("key"))

    def to_stream(self, indices: Sequence[int]) -> bytes:
        """Return the examples at these indices as an Arrow stream; `examples_from_stream` reads it."""
        table = self.dataset[list(indices)]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table.combine_chunks())
        data: bytes = sink.getvalue().to_pybytes()
        return data

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        """Return one example; negative indices count from the end."""
        return next(_examples_of(self.dataset[range(len(self))[index]]))

    def __iter__(self) -> Iterator[Example]:
        """Yield the examples in order."""
        for table in self.dataset.iter(BATCH_ROWS):
            yield from _examples_of(table)


def examples_from_stream(data: bytes) -> list[Example]:
    """Return the examples that `Examples.to_stream` wrote."""
    return list(_examples_of(pa.ipc.open_stream(data).read_all()))


def record_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    """Return examples as an Arrow batch, with the key of each in a cache."""
    columns: dict[str, list[Any]] = {name: [getattr(one, name) for one in examples] for name in SCHEMA.names[:-1]}
    columns["key"] = [content_key(one.token_ids, one.target_mask) for one in examples]
    return pa.RecordBatch.from_arrays([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def record_batches(examples: Iterable[Example]) -> Iterator[pa.RecordBatch]:
    """Yield the examples as Arrow batches."""
    iterator = iter(examples)
    while batch := list(itertools.islice(iterator, BATCH_ROWS)):
        yield record_batch(batch)


def as_dataset(table: pa.Table) -> "datasets.Dataset":
    """Return a table as a `datasets.Dataset`."""
    import datasets
    from datasets.fingerprint import generate_random_fingerprint

    # A random fingerprint: `datasets` can't mistake its cached results of other examples for these, and need not hash
    # the whole table.
    return datasets.Dataset(table, fingerprint=generate_random_fingerprint()).with_format("arrow")


def _examples_of(table: pa.Table) -> Iterator[Example]:
    columns = [table.column(name) for name in SCHEMA.names[:-1]]
    for name, source, ids, mask in zip(*columns, strict=True):
        yield Example(
            name.as_py(),
            source.as_py(),
            np.array(ids.values.to_numpy()),
            np.array(mask.values.to_numpy(zero_copy_only=False)),
        )
