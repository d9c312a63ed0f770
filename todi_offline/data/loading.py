"""The name of a data set, or its rows, in; `Examples` out."""

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from todi_offline.data.encoder import Encoder, make_encoder
from todi_offline.data.examples import (
    DataConfig,
    DataReport,
    Example,
    Examples,
    as_dataset,
    gather_table,
    record_batches,
)
from todi_offline.data.forms import Dropped, Form, Tokens, columns_of, recognise_form
from todi_offline.data.sources import Row, Source, open_source
from todi_offline.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_examples(config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> Examples:
    """Read and tokenise the data set that `config` names.

    Raises:
        DataError: it cannot be found or read, or a row of it is no example; says which.
        ModelError: the tokenizer lacks EOS, or the chat template that the rows need.
    """
    return _examples_from(open_source(config), config, tokenizer)


def examples_from_rows(
    rows: Iterable[Row], config: DataConfig, tokenizer: "PreTrainedTokenizerBase", source: str = "rows"
) -> Examples:
    """Tokenise rows that are already loaded: a `datasets.Dataset`, or any iterable of dicts.

    Of `config` the limit and the lengths are used; `source` names the rows.

    Raises:
        DataError, ModelError: as `load_examples`.
    """
    rows = rows.with_format(None) if hasattr(rows, "with_format") else rows
    return _examples_from(Source(rows, source, {"source": source}), config, tokenizer)


def _examples_from(source: Source, config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> Examples:
    encoder = make_encoder(tokenizer, config)
    rows = iter(itertools.islice(source.rows, config.limit))
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source.name} has no rows")
    form = recognise_form(first, encoder, source.name)
    counts: Counter[str] = Counter()
    ids: list[Any] = []
    table = gather_table(
        record_batches(_encoded(itertools.chain([first], rows), form, encoder, source.name, counts, ids))
    )
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
    return Examples(as_dataset(table), report, recipe)


def _encoded(
    rows: Iterable[Row], form: Form, encoder: Encoder, source: str, counts: Counter[str], ids: list[Any]
) -> Iterator[Example]:
    """Yield the examples of the rows; count what is cut or dropped, and note the id that each one's row has."""
    for number, row in enumerate(rows):
        counts["num_rows"] += 1
        try:
            tokens = form.encode(encoder, columns_of(row, "it"))
            example = _cut(tokens, encoder.config.max_length, f"{source}:{number}", source)
        except Dropped as reason:
            counts[str(reason)] += 1
            continue
        except DataError as error:
            raise DataError(f"{source}, row {number} (counted from 0): {error}") from error
        counts["num_prompts_cut"] += tokens.prompt_cut
        counts["num_responses_cut"] += len(tokens.ids) > len(example.token_ids)
        ids.append(row.get("id"))
        yield example


def _cut(tokens: Tokens, max_length: int, name: str, source: str) -> Example:
    ids, supervised = tokens.ids[:max_length], tokens.supervised[:max_length]
    target_mask = np.array([*supervised[1:], False])
    if not target_mask.any():
        raise Dropped("num_unsupervised")
    return Example(name, source, np.array(ids, np.uint32), target_mask)
