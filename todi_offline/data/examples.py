"""Tokenised examples, their report and their recipe, over Arrow."""

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    ]
)

BATCH_ROWS = 1_000

IN_MEMORY_BYTES = 1 << 30
"""Examples beyond this size live in a memory-mapped temporary file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which data set, how much of it, and where its examples are cut."""

    data: str = "stdlib"
    """A file (.jsonl .json .csv .parquet .arrow), a folder saved by `datasets`, a hub id, or `stdlib`."""

    split: str | None = None
    """The split to read. By default `train`, or the only one that there is."""

    limit: int | None = None
    """Read the first rows only, this many."""

    max_length: int = 1024
    """Tokens at which an example is cut."""

    max_prompt_length: int = 512
    """Tokens at which the prompt before a response is cut. `messages` and `text` have `max_length` alone."""

    def __post_init__(self) -> None:
        """Refuse lengths that leave no room for a response.

        Raises:
            ConfigError: a value is out of range.
        """
        if not self.data:
            raise ConfigError("data is empty; expected a file, a folder, a hub id, or stdlib")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}; expected a number of rows above 0, or none for all")
        if self.max_prompt_length < 1:
            raise ConfigError(f"max_prompt_length is {self.max_prompt_length}; expected a number of tokens above 0")
        if self.max_prompt_length >= self.max_length:
            raise ConfigError(
                f"max_prompt_length is {self.max_prompt_length} and max_length is {self.max_length}: no token is left "
                "for a response; lower the one or raise the other"
            )


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """A sequence as the teacher reads it, and the positions whose predictions are supervised."""

    id: str
    """Unique within a data set: the row's own `id`, or else `source:row number`."""

    source: str
    """Short name of the data set, such as `dolly.jsonl` or `stdlib/train`."""

    token_ids: npt.NDArray[np.uint32]
    """[token]: exactly what the teacher reads."""

    target_mask: npt.NDArray[np.bool_]
    """[token]: True at t where the prediction made at t, for token t + 1, is supervised; False at the last."""

    def __post_init__(self) -> None:
        """Check dtypes and shapes.

        Raises:
            DataError: they are not those of an example.
        """
        ids, mask = self.token_ids, self.target_mask
        if ids.dtype != np.uint32 or mask.dtype != np.bool_ or ids.ndim != 1 or ids.shape != mask.shape:
            raise DataError(
                f"example {self.id!r} has token_ids {ids.dtype}{list(ids.shape)} and target_mask "
                f"{mask.dtype}{list(mask.shape)}; expected uint32 and bool, [token] both"
            )
        if mask[-1:].any():
            raise DataError(f"example {self.id!r} supervises its last position, which no token follows")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """What became of the rows of a data set."""

    num_rows: int
    num_examples: int
    num_prompts_cut: int = 0
    num_responses_cut: int = 0
    """Examples cut at `max_length`, of whatever form."""

    num_empty: int = 0
    """Dropped: the response, text or an assistant turn is blank."""

    num_unsupervised: int = 0
    """Dropped: no assistant turn, or none within `max_length`."""

    num_prompt_too_long: int = 0
    """Dropped: the chat template alone, or what precedes the last message, is over `max_prompt_length`."""

    @property
    def num_dropped(self) -> int:
        """Rows that gave no example."""
        return self.num_empty + self.num_unsupervised + self.num_prompt_too_long

    def __str__(self) -> str:
        """Return one line for a person."""
        reasons = (
            f"{self.num_empty:,} empty, {self.num_unsupervised:,} without a supervised token, "
            f"{self.num_prompt_too_long:,} with too long a prompt"
        )
        return (
            f"{self.num_rows:,} rows, {self.num_examples:,} examples; {self.num_prompts_cut:,} prompts and "
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
    """Columns id, source, token_ids (list of uint32) and target_mask (list of bool), in the format `arrow`."""

    report: DataReport
    recipe: dict[str, Any]
    """How they were made, as JSON knows it; without paths, times or hosts."""

    @classmethod
    def from_list(cls, examples: Iterable[Example], recipe: Mapping[str, Any] | None = None) -> "Examples":
        """Hold examples that were made elsewhere.

        Raises:
            DataError: there are none, or two share an id.
        """
        examples = list(examples)
        ids = Counter(example.id for example in examples)
        if not examples:
            raise DataError("the list of examples is empty")
        if len(ids) < len(examples):
            raise DataError(f"two examples have the id {ids.most_common(1)[0][0]!r}; ids must be unique")
        report = DataReport(num_rows=len(examples), num_examples=len(examples))
        return cls(as_dataset(gather_table(record_batches(examples))), report, dict(recipe or {"form": "examples"}))

    @property
    def num_tokens(self) -> npt.NDArray[np.int64]:
        """[example]: the length of each."""
        import pyarrow.compute

        lengths = pyarrow.compute.list_value_length(self.dataset.data.column("token_ids"))
        return np.asarray(lengths, np.int64)

    def content_keys(self) -> ContentKeys:
        """Return what identifies each in a cache."""
        return ContentKeys.of(content_key(example.token_ids, example.target_mask) for example in self)

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


def record_batches(examples: Iterable[Example]) -> Iterator[pa.RecordBatch]:
    """Yield the examples as Arrow, many at a time."""
    iterator = iter(examples)
    while batch := list(itertools.islice(iterator, BATCH_ROWS)):
        columns = [pa.array([getattr(example, field.name) for example in batch], field.type) for field in SCHEMA]
        yield pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def gather_table(batches: Iterator[pa.RecordBatch]) -> pa.Table:
    """Gather batches in memory or, where they are large, in a memory-mapped file that goes when its user does."""
    gathered: list[pa.RecordBatch] = []
    num_bytes = 0
    for batch in batches:
        gathered.append(batch)
        num_bytes += batch.nbytes
        if num_bytes > IN_MEMORY_BYTES:
            return _mapped_table(itertools.chain(gathered, batches))
    return pa.Table.from_batches(gathered, SCHEMA)


def _mapped_table(batches: Iterable[pa.RecordBatch]) -> pa.Table:
    # The mapping outlives the file's name, so nothing is left behind, however the process ends.
    with tempfile.TemporaryDirectory(prefix="todi-", ignore_cleanup_errors=True) as folder:
        path = str(Path(folder, "examples.arrow"))
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for batch in batches:
                writer.write_batch(batch)
        return pa.ipc.open_file(pa.memory_map(path)).read_all()


def as_dataset(table: pa.Table) -> "datasets.Dataset":
    """Return a table as `datasets` has it."""
    import datasets
    from datasets.fingerprint import generate_random_fingerprint

    # A name of its own: what `datasets` has cached for other examples can never be taken for these, and it need not
    # read the whole table to make one up.
    return datasets.Dataset(table, fingerprint=generate_random_fingerprint()).with_format("arrow")


def _examples_of(table: pa.Table) -> Iterator[Example]:
    columns = [table.column(name) for name in SCHEMA.names]
    for name, source, ids, mask in zip(*columns, strict=True):
        yield Example(
            name.as_py(),
            source.as_py(),
            np.array(ids.values.to_numpy()),
            np.array(mask.values.to_numpy(zero_copy_only=False)),
        )
