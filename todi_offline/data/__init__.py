"""A data set comes in; tokenised examples with their supervised positions go out.

    rows -> the form of their columns -> prompt and response, tokenised apart -> cut to length -> Example

Rows come from a file (JSONL, JSON, CSV, Parquet, Arrow, text), a folder saved by `datasets`, the hub, or `stdlib`.
The columns of the first row decide the form: the first form of this list that fits. Other columns are ignored.

    input_ids                               token ids; `labels`, `completion_mask` or `assistant_masks` mark the
                                            supervised tokens, by default all are supervised
    messages                                every assistant turn is supervised, including its end-of-turn token
    prompt, completion                      two texts, or two lists of messages
    instruction, input?, output | response  go through the tokenizer's chat template, or else Alpaca's; a `prompt`
                                            column beside them replaces instruction and input, unchanged
    text                                    every token is supervised

The supervised part of a turn is the text that the model would generate after the generation prompt: thoughts, tool
calls, the answer and the end-of-turn token. Text that the template adds, such as an empty <think></think>, is context.

A prompt over `max_prompt_length` loses its oldest turns, never the system message, and then the middle of its last
message; a prompt given as text loses its middle. Then the sequence is cut at `max_length`; a `text` is split there
instead. A conversation ends at its last supervised token: later tokens would teach nothing.

The modules, in the order in which a row passes through them:

    sources        the name of a data set -> rows
    templates      a tokenizer -> the chat template, and how the template writes a turn
    forms          the columns of a row -> its form; a new form is one more entry in its table
    conversations  messages -> tokens, each supervised or not
    chat           messages -> pieces of text, each supervised or not
    encoder        text -> token ids
    encoding       rows -> batches of examples, in one process or several
    keeping        batches -> a table, in memory or in a file that the next run reuses
    examples       the config and the results: `Example`, `Examples`, `DataReport`
    loading        the name of a data set -> `Examples`, through all of the above
    questions      a row -> the prompt for a student, and the references for its answer
"""

from todi_offline.data.examples import DataConfig, DataReport, Example, Examples, examples_from_stream
from todi_offline.data.forms import ALPACA, ALPACA_WITH_INPUT
from todi_offline.data.loading import examples_from_rows, load_examples, recorded_settings
from todi_offline.data.templates import with_recorded_template

__all__ = [
    "ALPACA",
    "ALPACA_WITH_INPUT",
    "DataConfig",
    "DataReport",
    "Example",
    "Examples",
    "examples_from_rows",
    "examples_from_stream",
    "load_examples",
    "recorded_settings",
    "with_recorded_template",
]
