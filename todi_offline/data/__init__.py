"""A data set in, tokenised examples with their supervised positions out.

    rows -> the form of their columns -> prompt and response, tokenised apart -> cut to length -> Example

Rows come from a file (JSONL, JSON, CSV, Parquet, Arrow, text), a folder saved by `datasets`, the hub, or `stdlib`.
The first form that the columns have is taken; other columns are ignored.

    input_ids                               tokens as they are; `labels`, `completion_mask` or `assistant_masks` say
                                            which are supervised, all of them by default
    messages                                every assistant turn is supervised, its end-of-turn token included
    prompt, completion                      two texts, or two lists of messages
    instruction, input?, output | response  through the tokenizer's chat template, or else Alpaca's; a `prompt` that
                                            stands beside them is used as it is
    text                                    every token is supervised

Of a turn, what the model would generate after the generation prompt is supervised: thoughts, calls of tools, the
answer and the end-of-turn token. What the template adds by itself, such as an empty <think></think>, is read only.

A prompt over `max_prompt_length` loses its oldest turns, never the system message, and then the middle of its last
message; a prompt that is a text loses its middle. Then the whole loses its end at `max_length`; a `text` is split
there instead. Of a conversation nothing is kept after the last supervised token, since nothing is learnt there.

The modules, in the order in which a row goes through them:

    sources        a name -> rows
    templates      a tokenizer -> the chat template, and how it writes a turn
    forms          the columns of a row -> its form; a new form is an entry in one table there
    conversations  messages -> tokens, and which of them are supervised
    chat           messages -> text in pieces, each supervised or not
    encoder        text -> token ids
    encoding       rows -> batches of examples, in one process or several
    keeping        batches -> a table, in memory or in a file that the next run finds
    examples       the config, and what comes out: `Example`, `Examples`, `DataReport`
    loading        all of it
    questions      a row -> what a student is asked, and the references
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
