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

The modules, in the order in which a row goes through them:

    sources     a name -> rows
    encoder     text -> token ids
    forms       a row -> tokens, and which of them are supervised
    examples    the config, and what comes out: `Example`, `Examples`, `DataReport`
    loading     all of it
"""

from todi_offline.data.examples import DataConfig, DataReport, Example, Examples
from todi_offline.data.forms import ALPACA, ALPACA_WITH_INPUT
from todi_offline.data.loading import examples_from_rows, load_examples

__all__ = [
    "ALPACA",
    "ALPACA_WITH_INPUT",
    "DataConfig",
    "DataReport",
    "Example",
    "Examples",
    "examples_from_rows",
    "load_examples",
]
