"""A folder with a tokenizer's files in, the parts that its fingerprint needs out; transformers is not imported."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from todi_offline.errors import DataError, first_line

_SPECIAL = ("bos", "eos", "pad", "unk")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The attributes that `fingerprint.tokenizer_fingerprint` reads, under the names of transformers."""

    backend_tokenizer: Tokenizer
    special_ids: dict[str, int | None]

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of all tokens, added ones included."""
        vocabulary: dict[str, int] = self.backend_tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    @property
    def added_tokens_decoder(self) -> dict[int, str]:
        """The added tokens by id."""
        return {number: token.content for number, token in self.backend_tokenizer.get_added_tokens_decoder().items()}

    def __getattr__(self, name: str) -> Any:
        """Return `bos_token_id` and its like."""
        kind = name.removesuffix("_token_id")
        if kind in _SPECIAL and name.endswith("_token_id"):
            return self.special_ids[kind]
        raise AttributeError(name)


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read tokenizer.json and tokenizer_config.json of a folder that `save_pretrained` wrote.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    try:
        backend = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises nothing more precise
        raise DataError(
            f"{folder} holds no tokenizer that can be read ({first_line(error)}); expected the tokenizer.json and "
            "tokenizer_config.json that save_pretrained writes"
        ) from error
    tokens = {kind: _content(config.get(f"{kind}_token")) for kind in _SPECIAL}
    special_ids = {kind: None if token is None else backend.token_to_id(token) for kind, token in tokens.items()}
    return TokenizerFiles(backend, special_ids)


def _content(token: Any) -> str | None:
    if isinstance(token, dict):
        return str(token["content"])
    return None if token is None else str(token)
