"""A data set in, tokenised examples with their supervised positions out.

    rows -> the form of their columns -> prompt and response, tokenised apart -> cut to length -> Example

Rows come from a file (JSONL, JSON, CSV, Parquet, Arrow), a folder saved by `datasets`, the hub, or `stdlib`.
The first form that the columns have is taken; other columns are ignored.

    messages                                every assistant turn is supervised, its end-of-turn token included
    prompt, completion                      two texts, or two lists of messages
    instruction, input?, output | response  through the tokenizer's chat template, or else Alpaca's; a `prompt` that
                                            stands beside them is used as it is
    text                                    every token is supervised

A prompt over `max_prompt_length` loses its beginning: a text's own, BOS apart; in a chat that of the last message
before the answer, never the template. Then the whole loses its end at `max_length`. Of a conversation nothing is kept
after the last supervised token, since nothing is learnt there.
"""

import bisect
import contextlib
import csv
import itertools
import json
import logging
import platform
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from todi_offline.errors import ConfigError, DataError, ModelError
from todi_offline.stdlib_corpus import SPLITS, stdlib_pairs

if TYPE_CHECKING:  # a second of import each, and not needed to read a config
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
Message = dict[str, Any]

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

ROLES = ("system", "developer", "user", "assistant")

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
        return cls(_dataset(_table(_batches(examples))), report, dict(recipe or {"form": "examples"}))

    @property
    def num_tokens(self) -> npt.NDArray[np.int64]:
        """[example]: the length of each."""
        import pyarrow.compute

        lengths = pyarrow.compute.list_value_length(self.dataset.data.column("token_ids"))
        return np.asarray(lengths, np.int64)

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


def load_examples(config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> Examples:
    """Read and tokenise the data set that `config` names.

    Raises:
        DataError: it cannot be found or read, or a row of it is no example; says which.
        ModelError: the tokenizer lacks EOS, or the chat template that the rows need.
    """
    return _examples_from(_open(config), config, tokenizer)


def examples_from_rows(
    rows: Iterable[Row], config: DataConfig, tokenizer: "PreTrainedTokenizerBase", source: str = "rows"
) -> Examples:
    """Tokenise rows that are already loaded: a `datasets.Dataset`, or any iterable of dicts.

    Of `config` the limit and the lengths are used; `source` names the rows.

    Raises:
        DataError, ModelError: as `load_examples`.
    """
    rows = rows.with_format(None) if hasattr(rows, "with_format") else rows
    return _examples_from(_Source(rows, source, {"source": source}), config, tokenizer)


# Rows -> Examples


@dataclass(frozen=True, slots=True)
class _Source:
    rows: Iterable[Row]
    name: str
    recipe: dict[str, Any]


class _Dropped(Exception):  # noqa: N818 -- no error: the row gives no example, and is counted under this name
    pass


def _examples_from(source: _Source, config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> Examples:
    encoder = _encoder(tokenizer, config)
    rows = iter(itertools.islice(source.rows, config.limit))
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source.name} has no rows")
    form = _form(first, encoder, source.name)
    counts: Counter[str] = Counter()
    ids: list[Any] = []
    table = _table(_batches(_encoded(itertools.chain([first], rows), form, encoder, source.name, counts, ids)))
    report = DataReport(num_examples=len(ids), **counts)
    if not ids:
        raise DataError(f"{source.name} gives no example: {report}")
    logger.info("%s: %s", source.name, report)
    if all(type(value) in (str, int) for value in ids) and len({str(value) for value in ids}) == len(ids):
        table = table.set_column(0, "id", pa.array([str(value) for value in ids]))
    recipe = source.recipe | {
        "limit": config.limit,
        "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length,
        "form": form.name,
        "template": form.template,
    }
    return Examples(_dataset(table), report, recipe)


def _encoded(
    rows: Iterable[Row], form: "_Form", encoder: "_Encoder", source: str, counts: Counter[str], ids: list[Any]
) -> Iterator[Example]:
    """Yield the examples of the rows; count what is cut or dropped, and note the id that each one's row has."""
    for number, row in enumerate(rows):
        counts["num_rows"] += 1
        try:
            tokens = form.encode(encoder, _columns(row, "it"))
            example = _cut(tokens, encoder.config.max_length, f"{source}:{number}", source)
        except _Dropped as reason:
            counts[str(reason)] += 1
            continue
        except DataError as error:
            raise DataError(f"{source}, row {number} (counted from 0): {error}") from error
        counts["num_prompts_cut"] += tokens.prompt_cut
        counts["num_responses_cut"] += len(tokens.ids) > len(example.token_ids)
        ids.append(row.get("id"))
        yield example


def _cut(tokens: "_Tokens", max_length: int, name: str, source: str) -> Example:
    ids, supervised = tokens.ids[:max_length], tokens.supervised[:max_length]
    target_mask = np.array([*supervised[1:], False])
    if not target_mask.any():
        raise _Dropped("num_unsupervised")
    return Example(name, source, np.array(ids, np.uint32), target_mask)


def _batches(examples: Iterable[Example]) -> Iterator[pa.RecordBatch]:
    iterator = iter(examples)
    while batch := list(itertools.islice(iterator, BATCH_ROWS)):
        columns = [pa.array([getattr(example, field.name) for example in batch], field.type) for field in SCHEMA]
        yield pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _table(batches: Iterator[pa.RecordBatch]) -> pa.Table:
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


def _dataset(table: pa.Table) -> "datasets.Dataset":
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


# A name -> rows


def _open(config: DataConfig) -> _Source:
    path = Path(config.data).expanduser()
    if config.data == "stdlib":
        split = _choose_split(config.split, SPLITS, "stdlib")
        pairs = stdlib_pairs(split)
        rows = [{"id": pair.id, "instruction": pair.instruction, "output": pair.response} for pair in pairs]
        return _split_source("stdlib", split, rows, python=platform.python_version())
    if path.is_dir():
        return _open_folder(path, config.split)
    if path.is_file():
        _choose_split(config.split, ["train"], path.name)
        return _Source(_read_file(path), path.name, {"source": path.name, "split": None})
    if path.suffix.lower() in _READERS or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", config.data):
        raise DataError(f"there is no file or folder {config.data}; expected one, a hub id, or stdlib")
    return _open_hub(config.data, config.split)


def _split_source(name: str, split: str, rows: Iterable[Row], **more: str) -> _Source:
    return _Source(rows, f"{name}/{split}", {"source": name, "split": split, **more})


def _choose_split(wanted: str | None, splits: Sequence[str], where: str) -> str:
    chosen = wanted or ("train" if "train" in splits or len(splits) > 1 else splits[0])
    if chosen not in splits:
        found = f"has no split {wanted!r}" if wanted else "has several splits"
        raise DataError(f"{where} {found}; choose one of: {', '.join(splits)}")
    return chosen


def _open_folder(path: Path, split: str | None) -> _Source:
    import datasets

    name = path.resolve().name
    try:
        with _quiet():
            loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{path} is not a folder that `datasets` saved ({_first_line(error)}); name a file within it, or save it "
            "with save_to_disk"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        chosen = _choose_split(split, list(loaded), name)
        return _split_source(name, chosen, loaded[chosen].with_format(None))
    _choose_split(split, [str(loaded.split or "train")], name)
    return _Source(loaded.with_format(None), name, {"source": name, "split": None})


def _open_hub(name: str, split: str | None) -> _Source:
    import datasets

    try:
        with _quiet():
            chosen = _choose_split(split, datasets.get_dataset_split_names(name), name)
            return _split_source(name, chosen, datasets.load_dataset(name, split=chosen))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name} is no file or folder here, and cannot be had from the hub: {_first_line(error)}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of `datasets` and of the hub where no terminal shows them."""
    import datasets
    import huggingface_hub.utils

    shown = [owner for owner in (datasets, huggingface_hub.utils) if not owner.are_progress_bars_disabled()]
    hidden = [] if sys.stderr.isatty() else shown
    for owner in hidden:
        owner.disable_progress_bars()
    try:
        yield
    finally:
        for owner in hidden:
            owner.enable_progress_bars()


def _read_file(path: Path) -> Iterator[Row]:
    """Yield the rows of a file one after the other; it is never in memory as a whole, a list in a .json file apart."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path.name} is of no known kind; expected one of {', '.join(_READERS)}")
    try:
        yield from reader(path)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {_first_line(error)}") from error


def _read_json(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        if _starts_a_list(file):
            yield from json.load(file)
            return
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as error:
                raise ValueError(
                    f"line {number} is not valid JSON ({error}); expected one object a line, or a list of objects"
                ) from error
            if row is not None:
                yield row


def _starts_a_list(file: TextIO) -> bool:
    """Look at the first character that is not blank, and go back to the start."""
    while (character := file.read(1)).isspace():
        pass
    file.seek(0)
    return character == "["


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long text
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"the row that ends in line {reader.line_num} has not as many fields as the header")
            yield row


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH_ROWS):
            yield from batch.to_pylist()


def _read_arrow(path: Path) -> Iterator[Row]:
    with pa.memory_map(str(path)) as source:
        try:
            batches = iter(pa.ipc.open_stream(source))
        except pa.ArrowInvalid:
            file = pa.ipc.open_file(source)
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
        for batch in batches:
            yield from batch.to_pylist()


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


# A row -> tokens


@dataclass(frozen=True, slots=True)
class _Tokens:
    ids: list[int]
    supervised: list[bool]
    """[token]: whether the token itself is to be predicted."""
    prompt_cut: bool = False


@dataclass(frozen=True, slots=True)
class _Form:
    name: str
    encode: Callable[["_Encoder", Row], _Tokens]
    template: str | None = None


def _form(first: Any, encoder: "_Encoder", where: str) -> _Form:
    """Return the form that the columns of the first row have."""
    columns = _columns(first, f"row 0 of {where}")
    answer = "output" if "output" in columns else "response"
    if "messages" in columns:
        return _Form("messages", _encode_messages, "chat")
    if {"prompt", "completion"} <= columns.keys():
        return _Form("prompt + completion", _encode_completion, "chat" if isinstance(columns["prompt"], list) else None)
    if {"instruction", answer} <= columns.keys():
        template = None if "prompt" in columns else "chat" if encoder.template else "alpaca"
        return _Form(f"instruction + {answer}", partial(_encode_instruction, answer, template), template)
    if "text" in columns:
        return _Form("text", _encode_text)
    raise DataError(
        f"{where} has the columns {', '.join(map(str, columns))}; expected messages, or prompt and completion, "
        "or instruction (and input) and output or response, or text: rename its columns"
    )


def _columns(row: Any, where: str) -> Row:
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}; expected columns with their values")
    return row


def _encode_text(encoder: "_Encoder", row: Row) -> _Tokens:
    ids = _ended(encoder, _first_ids(encoder, _filled(_text(row, "text"))))
    return _Tokens(ids, [True] * len(ids))


def _encode_completion(encoder: "_Encoder", row: Row) -> _Tokens:
    if isinstance(row.get("prompt"), list):
        return _encode_chat_pair(encoder, _messages(row, "prompt"), _messages(row, "completion"))
    return _encode_pair(encoder, _text(row, "prompt"), _text(row, "completion"))


def _encode_instruction(answer: str, template: str | None, encoder: "_Encoder", row: Row) -> _Tokens:
    response = _text(row, answer)
    if template is None:
        return _encode_pair(encoder, _text(row, "prompt"), response)
    instruction = _text(row, "instruction")
    context = "" if row.get("input") is None else _text(row, "input")
    if template == "alpaca":
        layout = ALPACA_WITH_INPUT if context else ALPACA
        return _encode_pair(encoder, layout.format(instruction=instruction, input=context), response)
    question = f"{instruction}\n\n{context}" if context else instruction
    return _encode_chat_pair(
        encoder, [{"role": "user", "content": question}], [{"role": "assistant", "content": response}]
    )


def _encode_pair(encoder: "_Encoder", prompt: str, response: str) -> _Tokens:
    prompt_ids = _first_ids(encoder, prompt)
    limit = encoder.config.max_prompt_length
    cut = len(prompt_ids) > limit
    if cut:
        start = encoder.start[:limit]
        prompt_ids = start + prompt_ids[len(prompt_ids) - limit + len(start) :]
    response_ids = _ended(encoder, _next_ids(encoder, _filled(response)))
    return _Tokens(prompt_ids + response_ids, [False] * len(prompt_ids) + [True] * len(response_ids), prompt_cut=cut)


def _encode_messages(encoder: "_Encoder", row: Row) -> _Tokens:
    if row.get("tools"):
        raise DataError("it has tools, which are not supported; take such rows out")
    messages = _messages(row, "messages")
    if encoder.marks_answers:
        return _encode_marked(encoder, messages)
    return _encode_turns(encoder, messages, first=0)


def _encode_chat_pair(encoder: "_Encoder", prompt: list[Message], answer: list[Message]) -> _Tokens:
    """Encode a prompt and its answer; too long a prompt loses the beginning of its last message."""
    tokens = _encode_turns(encoder, prompt + answer, first=len(prompt))
    limit = encoder.config.max_prompt_length
    if tokens.supervised.index(True) <= limit:
        return tokens
    *before, last = prompt

    def without(num_chars: int) -> list[Message]:
        return [*before, last | {"content": last["content"][num_chars:]}]

    def fits(num_chars: int) -> bool:
        return len(_ids(encoder, _render(encoder, without(num_chars), asks=True))) <= limit

    num_chars = bisect.bisect_left(range(len(last["content"])), True, key=fits)
    if num_chars == len(last["content"]):
        raise _Dropped("num_prompt_too_long")
    tokens = _encode_turns(encoder, without(num_chars) + answer, first=len(prompt))
    return replace(tokens, prompt_cut=True)


def _encode_turns(encoder: "_Encoder", messages: list[Message], first: int) -> _Tokens:
    """Encode a conversation whose assistant turns from `first` on are supervised.

    A turn is what the template adds to the conversation before it that asks for an answer; so what stands before a
    turn is what a model is asked with.
    """
    answers = _answers(messages, first)
    whole = _render(encoder, messages)
    ids: list[int] = []
    supervised: list[bool] = []
    end = 0
    for index in answers:
        start, stop = _turn(encoder, messages, index, whole)
        for text, is_answer in ((whole[end:start], False), (whole[start:stop], True)):
            more = _next_ids(encoder, text) if ids else _ids(encoder, text)
            ids += more
            supervised += [is_answer] * len(more)
        end = stop
    return _closed(encoder, ids, supervised)


def _answers(messages: list[Message], first: int = 0) -> list[int]:
    """Return which messages are the assistant's, from `first` on; a blank one drops the row."""
    answers = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
    if not answers:
        raise _Dropped("num_unsupervised")
    for index in answers:
        _filled(messages[index]["content"])
    return answers


def _turn(encoder: "_Encoder", messages: list[Message], index: int, whole: str) -> tuple[int, int]:
    """Return where an assistant turn starts and stops in the rendered conversation, end-of-turn token included."""
    if index == 0:
        raise DataError("its first message is the assistant's, which answers nothing; take that message out")
    before = _render(encoder, messages[:index], asks=True)
    after = _render(encoder, messages[: index + 1])
    if not whole.startswith(after):  # as with Phi 3, which writes EOS after the last message of all
        after = after.removesuffix(encoder.closing[encoder.eos])
    if not (whole.startswith(after) and after.startswith(before)):
        raise DataError(
            f"the chat template writes messages 0 to {index} in another way when others follow, so the answer among "
            "them cannot be told apart; use a template with {% generation %} blocks, or rows of one answer each"
        )
    turn = after[len(before) :].rstrip()
    ends = turn.endswith(tuple(encoder.closing.values()))
    return len(before), len(before) + len(turn) if ends else len(after)


def _encode_marked(encoder: "_Encoder", messages: list[Message]) -> _Tokens:
    """Encode a conversation whose template marks the answers itself, with {% generation %} blocks."""
    _answers(messages)
    rendered = _apply_template(encoder, messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, marked = rendered["input_ids"], [bool(mark) for mark in rendered["assistant_masks"]]
    # Some templates leave the end-of-turn token out of the block.
    ends = [before and token in encoder.closing for token, before in zip(ids, [False, *marked], strict=False)]
    supervised = [mark or end for mark, end in zip(marked, ends, strict=True)]
    if not any(supervised):
        raise _Dropped("num_unsupervised")
    stop = len(supervised) - supervised[::-1].index(True)
    return _closed(encoder, ids[:stop], supervised[:stop])


def _closed(encoder: "_Encoder", ids: list[int], supervised: list[bool]) -> _Tokens:
    """End a conversation with EOS where its template has written no end-of-turn token."""
    if ids[-1] in encoder.closing:
        return _Tokens(ids, supervised)
    return _Tokens([*ids, encoder.eos], [*supervised, True])


def _text(row: Row, column: str) -> str:
    if column not in row:
        raise DataError(f"it has no column {column!r}, which the first row has")
    return _string(row[column], f"column {column!r}")


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} holds {value!r:.60} ({type(value).__name__}); expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half a character ({error}); repair its encoding") from error
    return value


def _filled(text: str) -> str:
    if not text.strip():
        raise _Dropped("num_empty")
    return text


def _messages(row: Row, column: str) -> list[Message]:
    messages = row.get(column)
    if not isinstance(messages, list | tuple):
        raise DataError(
            f"column {column!r} holds {messages!r:.60} ({type(messages).__name__}); expected a list of messages"
        )
    return [_message(message, f"{column}[{number}]") for number, message in enumerate(messages)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is a {type(message).__name__}; expected an object with role and content")
    if message.get("role") not in ROLES or message.get("tool_calls"):
        found = "tool calls" if message.get("tool_calls") else f"the role {message.get('role')!r}"
        raise DataError(f"{where} has {found}; expected a text by one of {', '.join(ROLES)}: take such rows out")
    _string(message.get("content"), f"the content of {where}")
    return {key: value for key, value in message.items() if value is not None}


# Text -> tokens


@dataclass(frozen=True, slots=True)
class _Encoder:
    """A tokenizer, and what has to be known of it to put sequences together."""

    tokenizer: "PreTrainedTokenizerBase"
    config: DataConfig
    template: str | None
    marks_answers: bool
    """The template has {% generation %} blocks."""
    eos: int
    closing: dict[int, str]
    """The special tokens that may end a turn, with their texts."""
    start: list[int]
    """What the tokenizer puts before a text: BOS, or nothing."""
    starts_with_space: bool
    """It reads a text as though a space stood before it, as SentencePiece does: wrong in the middle of a sequence."""


def _encoder(tokenizer: "PreTrainedTokenizerBase", config: DataConfig) -> _Encoder:
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no EOS token, so no response could end; set tokenizer.eos_token, or eos_token in its "
            "tokenizer_config.json"
        )
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if template and "strftime_now" in template:
        # A prompt with the date of today would be another one tomorrow: capture could not go on, nor match.
        template = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}" + template
    closing = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    closing.pop(tokenizer.unk_token_id, None)
    closing[tokenizer.eos_token_id] = tokenizer.eos_token
    alone, whole = _plain_ids(tokenizer, "a"), tokenizer("a", verbose=False)["input_ids"]
    line = _plain_ids(tokenizer, "\n")
    after_line = _plain_ids(tokenizer, "\na")
    return _Encoder(
        tokenizer,
        config,
        template,
        marks_answers=bool(template and re.search(r"\{%-?\s*generation\s*-?%\}", template)),
        eos=tokenizer.eos_token_id,
        closing=closing,
        start=next((whole[:n] for n in range(len(whole)) if whole[n : n + len(alone)] == alone), []),
        starts_with_space=after_line[: len(line)] == line and after_line[len(line) :] != alone,
    )


def _plain_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _ids(encoder: _Encoder, text: str) -> list[int]:
    return _plain_ids(encoder.tokenizer, text)


def _first_ids(encoder: _Encoder, text: str) -> list[int]:
    """Return the ids of a text that begins a sequence: BOS is put before it unless the text has it already."""
    ids = _ids(encoder, text)
    return ids if ids[: len(encoder.start)] == encoder.start else encoder.start + ids


def _next_ids(encoder: _Encoder, text: str) -> list[int]:
    """Return the ids of a text that goes on with a sequence."""
    if not encoder.starts_with_space:
        return _ids(encoder, text)
    line, ids = _ids(encoder, "\n"), _ids(encoder, "\n" + text)
    return ids[len(line) :] if ids[: len(line)] == line else _ids(encoder, text)


def _ended(encoder: _Encoder, ids: list[int]) -> list[int]:
    return ids if ids[-1:] == [encoder.eos] else [*ids, encoder.eos]


def _render(encoder: _Encoder, messages: list[Message], *, asks: bool = False) -> str:
    return str(_apply_template(encoder, messages, tokenize=False, add_generation_prompt=asks))


def _apply_template(encoder: _Encoder, messages: list[Message], **options: Any) -> Any:
    from jinja2 import TemplateError

    if encoder.template is None:
        raise ModelError(
            "the rows are conversations, and the tokenizer has no chat template; take the tokenizer of an instruct "
            "model, set tokenizer.chat_template, or give prompt and completion as texts"
        )
    try:
        return encoder.tokenizer.apply_chat_template(messages, chat_template=encoder.template, **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the chat template refuses its messages: {_first_line(error)}") from error
