"""The name of a data set, or its rows, in; `Examples` out."""

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
from todi_offline.data.keeping import Place, gather_table, keep_facts, place_of, read_kept
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
"""Of the rows; where more are cut or dropped, it is a warning."""


def load_examples(config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> Examples:
    """Read and tokenise the data set that `config` names; a large one is kept, and found by the next run.

    Raises:
        DataError: it cannot be found or read, or a row of it is no example; says which.
        ModelError: the tokenizer lacks EOS, or the chat template that the rows need.
    """
    source = open_source(config)
    place = None if source.identity is None else place_of(config, source.identity, tokenizer)
    kept = read_kept(place) if place else None
    if kept is None:
        return _examples_from(source, config, tokenizer, place)
    table, facts = kept
    return _examples(table, source, DataReport(**facts["report"]), facts["recipe"])


def recorded_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `DataConfig` that a recipe records: the same rows give the same examples with them."""
    return {name: recipe[name] for name in _RECORDED if recipe.get(name) is not None}


def examples_from_rows(
    rows: Iterable[Row], config: DataConfig, tokenizer: "PreTrainedTokenizerBase", source: str = "rows"
) -> Examples:
    """Tokenise rows that are already loaded: a `datasets.Dataset`, or any iterable of dicts.

    Of `config` the limit and how examples are made are used; `source` names the rows.

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
        raise ConfigError(f"pack joins rows of `text`, and those of {source.name} are {form.name}; leave it out")
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
    """Return a table as examples, under their rows' own ids where these name each, and say what became of the rows."""
    import pyarrow.compute

    own_ids = table.column(OWN_ID.name)
    if not own_ids.null_count and pyarrow.compute.count_distinct(own_ids).as_py() == len(own_ids):
        table = table.set_column(0, SCHEMA.field(0), own_ids)
    much = report.share_cut > WARN_SHARE
    logger.log(logging.WARNING if much else logging.INFO, "%s: %s", source.name, report)
    if report.num_thoughts_lost:
        logger.warning(
            "%s: the chat template leaves out thoughts of the assistant in %s rows; an argument of it may keep them "
            "(--chat-template-kwargs)",
            source.name,
            f"{report.num_thoughts_lost:,}",
        )
    return Examples(as_dataset(table.select(SCHEMA.names)), report, recipe)


def _recipe(form: Form, encoder: Encoder) -> dict[str, Any]:
    """Return how examples are made, as far as it applies to this form."""
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
