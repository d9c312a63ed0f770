"""The fingerprint of a tokenizer depends on the ids that texts get, and on nothing else."""

import dataclasses
from pathlib import Path

import pytest
from support.tiny import tiny_tokenizer
from tokenizers import normalizers
from transformers import AutoTokenizer

from todi_offline.cache.format.fingerprint import differences, hash_json, tokenizer_differences, tokenizer_fingerprint
from todi_offline.cache.format.manifest import require_same_tokenizer
from todi_offline.cache.reader import Cache
from todi_offline.errors import CacheMismatchError

EARLIER = ("vocabulary", "merges", "added_tokens", "special_ids")
"""What caches of earlier releases hold, beside `chat_template`."""


def test_a_tokenizer_saved_and_loaded_has_the_same_fingerprint(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_fingerprint(tokenizer)


def test_another_chat_template_and_padding_change_nothing() -> None:
    other = tiny_tokenizer()
    other.chat_template, other.padding_side = "{{ messages }}", "left"
    other("A text.", padding="max_length", max_length=50, truncation=True)
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tiny_tokenizer())


def test_another_normalizer_is_another_tokenizer() -> None:
    other = tiny_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    (line,) = tokenizer_differences(tokenizer_fingerprint(other), tokenizer_fingerprint(tiny_tokenizer()))
    assert line.startswith("normalizer: ")


def test_a_cache_of_an_earlier_release_is_accepted_with_any_chat_template(cache: Cache) -> None:
    found = tokenizer_fingerprint(tiny_tokenizer())
    earlier = {name: found[name] for name in EARLIER} | {"chat_template": "0" * 32}
    manifest = dataclasses.replace(cache.manifest, tokenizer=earlier)
    require_same_tokenizer(found, manifest, "the student")
    other = tokenizer_fingerprint(tiny_tokenizer(vocab_size=480))
    with pytest.raises(CacheMismatchError, match=r"not the one .*merges: .*; vocabulary: "):
        require_same_tokenizer(other, manifest, "the student")


def test_hashes_that_differ_are_named_and_not_shown() -> None:
    mine = {"weights": hash_json(1), "adapters": {"default": hash_json(2)}, "k": 8, "config": hash_json(0)}
    other = {"weights": hash_json(3), "adapters": {}, "k": 4, "config": hash_json(0)}
    lines = ["adapters.default: only in a", "k: 8 in a, 4 in b", "weights: not the same"]
    assert differences(mine, other, ("in a", "in b")) == lines
    assert differences(other, mine, ("in a", "in b"))[0] == "adapters.default: only in b"
