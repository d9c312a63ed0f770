"""Tokenizers and metadata in, short hashes that identify them out.

Every hash is BLAKE2b of 16 bytes in hexadecimal. It guards against accidents, not against an adversary.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from todi_offline.cache.format.keys import KEY_BYTES

_HASH = re.compile(f"[0-9a-f]{{{2 * KEY_BYTES}}}")


def hash_json(value: Any) -> str:
    """Return the hash of a JSON-able value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()


def hash_bytes(pieces: Iterable[bytes]) -> str:
    """Return the hash of a stream of bytes."""
    state = hashlib.blake2b(digest_size=KEY_BYTES)
    for piece in pieces:
        state.update(piece)
    return state.hexdigest()


TOKENIZER_PARTS = ("vocabulary", "merges", "normalizer", "added_tokens", "special_ids")
"""The parts of a tokenizer that decide which ids a text has and what ids mean."""

_SAMPLE = "Ünïcode ﬁ e\u0301 İı ß\t tabs  two   three\r\n\n 3.14 1234567 don't WORLD'S <b>x</b> /a_b/ 東京 🙂‍↔️ ع\u00a0…"
"""Accents, ligatures, cases, spaces, digits, marks, scripts: tokenizers that treat them alike normalise alike."""


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, str]:
    """Return a hash for each part of a transformers tokenizer that decides what ids mean.

    The parts are those of `TOKENIZER_PARTS`. `normalizer` hashes the ids of a sample text, so it stands for normaliser
    and pre-tokenizer in whatever form a release of `tokenizers` saves them. A copy in another folder, or one that was
    saved and loaded again, has the same fingerprint.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model.get("merges", [])]
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")}
    added = {str(i): str(token) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    return {
        "vocabulary": hash_json(tokenizer.get_vocab()),
        "merges": hash_json(merges),
        "normalizer": hash_json(_sample_ids(tokenizer, backend)),
        "added_tokens": hash_json(added),
        "special_ids": hash_json(special),
    }


def _sample_ids(tokenizer: Any, backend: Any) -> list[int]:
    if backend is None:
        return list(tokenizer.encode(_SAMPLE, add_special_tokens=False))
    backend.no_truncation()  # a tokenizer.json may set either; transformers sets both at every call
    backend.no_padding()
    return list(backend.encode(_SAMPLE, add_special_tokens=False).ids)


def tokenizer_differences(
    found: Mapping[str, str], expected: Mapping[str, str], where: tuple[str, str] = ("here", "there")
) -> list[str]:
    """Return a line for each part of two tokenizers that differs and decides ids.

    Caches of earlier releases have no `normalizer`, and have a `chat_template`, which decides no id; both are ignored.
    """
    parts = [name for name in TOKENIZER_PARTS if name != "normalizer" or {name} <= found.keys() & expected.keys()]
    mine, other = ({name: values.get(name) for name in parts} for values in (found, expected))
    return differences(mine, other, where)


def differences(
    found: Mapping[str, Any], expected: Mapping[str, Any], where: tuple[str, str] = ("here", "there")
) -> list[str]:
    """Return a line for each key whose values differ, with both values and `where` each stands; nested keys as `a.b`.

    A hash tells a reader nothing, so for two hashes the line says only that they are not the same.
    """
    lines = []
    for key in sorted(found.keys() | expected.keys()):
        mine, other = (_numbered(values.get(key)) for values in (found, expected))
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            lines += [f"{key}.{line}" for line in differences(mine, other, where)]
        elif mine != other:
            lines.append(f"{key}: {_in_words(mine, other, where)}")
    return lines


def _in_words(mine: Any, other: Any, where: tuple[str, str]) -> str:
    if not any(isinstance(value, str) and _HASH.fullmatch(value) for value in (mine, other)):
        return f"{mine!r} {where[0]}, {other!r} {where[1]}"
    if mine is None or other is None:
        return f"only {where[0] if other is None else where[1]}"
    return "not the same"


def _numbered(value: Any) -> Any:
    """Return a list of mappings as a mapping."""
    is_list = isinstance(value, list) and all(isinstance(item, Mapping) for item in value)
    return {str(number): item for number, item in enumerate(value)} if is_list and value else value
