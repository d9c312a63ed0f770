"""The name of a data set, or its rows, come in; `Examples` go out."""

import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from todi_offline.data.encoder import Encoder, make_encoder
from todi_offline.data.encoding import OWN_ID, Encoded, RowEncoder, encoded_batches
from todi_offline.data.examples import SCHEMA, DataConfig, DataReport, Examples, as_dataset
from todi_offline.data.forms import Form, encoder_of, recognise_form
from todi_offline.data.keeping import Place, choose_place, gather_table, keep_facts, read_kept
from todi_offline.data.sources import Source, open_source
from todi_offline.data.tokens import Row
from todi_offline.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_RECORDED = (
    "max_length",
    "max_prompt_length",
    "overlap",
    "pack",
    "supervise",
    "chat_template",
    "chat_template_kwargs",
)

WARN_SHARE = 0.01
"""Share of the rows that may be cut or dropped without a warning."""


def load_examples(config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> Examples:
    """Read and tokenise the data set that `config` names. A large result is kept in a file that the next run reuses.

    Raises:
        DataError: the data set cannot be found or read, or a row cannot be encoded; the message names the row.
        ModelError: the tokenizer has no EOS token, or lacks the chat template that the rows need.
    """
    source = open_source(config)
    place = None if source.identity is None else choose_place(config, source.identity, tokenizer)
    kept = read_kept(place) if place else None
    if kept is None:
        return _examples_from(source, config, tokenizer, place)
    table, facts = kept
    return _examples(table, source, DataReport(**facts["report"]), facts["recipe"])


def recorded_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `DataConfig` settings of a recipe; with them the same rows give the same examples."""
    return {name: recipe[name] for name in _RECORDED if recipe.get(name) is not None}


def examples_from_rows(
    rows: Iterable[Row], config: DataConfig, tokenizer: "PreTrainedTokenizerBase", source: str = "rows"
) -> Examples:
    """Tokenise rows that are already loaded: a `datasets.Dataset`, or any iterable of dicts.

    `source` names the rows in messages and ids. The fields of `config` that name a data set are ignored.

    Raises:
        DataError, ModelError: as `load_examples`.
    """
    rows = rows.with_format(None) if hasattr(rows, "with_format") else rows
    return _examples_from(Source(rows, source, {"source": source}), config, tokenizer, None)


def _examples_from(
    source: Source, config: DataConfig, tokenizer: "PreTrainedTokenizerBase", place: Place | None
) -> Examples:
    rows = iter(itertools.islice(source.rows, config.limit))
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source.name} has no rows")
    encoder = make_encoder(tokenizer, config)
    form = recognise_form(first, encoder, source.name)
    if config.pack and form.name != "text":
        raise ConfigError(f"pack works only for rows of `text`, and {source.name} has {form.name}; leave out pack")
    encoder = encoder_of(form, encoder)
    counts: Counter[str] = Counter()
    job = RowEncoder(encoder, form, source.name)
    encoded = encoded_batches(itertools.chain([first], rows), job, config.num_proc)
    table = gather_table(_counted(encoded, counts), SCHEMA.append(OWN_ID), place)
    report = DataReport(**counts)
    if not report.num_examples:
        raise DataError(f"{source.name} gives no example: {report}")
    recipe = source.recipe | _recipe(form, encoder)
    if place is not None:
        keep_facts(place, {"report": dataclasses.asdict(report), "recipe": recipe})
    return _examples(table, source, report, recipe)


def _counted(encoded: Iterable[Encoded], counts: Counter[str]) -> Iterator[pa.RecordBatch]:
    for one in encoded:
        counts.update(one.counts)
        yield one.batch


def _examples(table: pa.Table, source: Source, report: DataReport, recipe: dict[str, Any]) -> Examples:
    """Return a table as examples and log the report. The rows' own ids name the examples if they are unique."""
    import pyarrow.compute

    own_ids = table.column(OWN_ID.name)
    if not own_ids.null_count and pyarrow.compute.count_distinct(own_ids).as_py() == len(own_ids):
        table = table.set_column(0, SCHEMA.field(0), own_ids)
    level = logging.WARNING if report.share_cut > WARN_SHARE else logging.INFO
    logger.log(level, "%s: %s", source.name, report)
    if report.num_thoughts_lost:
        logger.warning(
            "%s: the chat template leaves out thoughts of the assistant in %s rows; a template argument may keep them "
            "(--chat-template-kwargs)",
            source.name,
            f"{report.num_thoughts_lost:,}",
        )
    return Examples(as_dataset(table.select(SCHEMA.names)), report, recipe)


def _recipe(form: Form, encoder: Encoder) -> dict[str, Any]:
    """Return the settings that decide the examples of this form."""
    config = encoder.config
    recipe: dict[str, Any] = {
        "limit": config.limit,
        "max_length": config.max_length,
        "max_prompt_length": config.prompt_limit,
        "form": form.name,
        "template": form.template,
    }
    if form.name == "text":
        recipe |= {"overlap": config.overlap, "pack": config.pack}
    if encoder.chat is not None:
        recipe |= {
            "supervise": config.supervise,
            "chat_template_from": encoder.chat.origin,
            "chat_template_kwargs": config.chat_template_kwargs or None,
            "chat_template": encoder.chat.text,
        }
    return recipe
