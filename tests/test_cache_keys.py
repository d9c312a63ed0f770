"""Content keys: any number of them is read back exactly, whatever their last bytes."""

import hashlib
import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from todi_offline.cache.format.keys import ContentKeys, content_key

KEYS = st.lists(
    st.one_of(
        st.binary(min_size=16, max_size=16),
        st.integers(0, 16).map(lambda zeros: bytes(range(1, 17 - zeros)) + bytes(zeros)),
        st.sampled_from([bytes(16), b"\xff" * 16, b"a" + bytes(15), bytes(15) + b"a"]),
    ),
    max_size=12,
)


@given(KEYS)
@settings(deadline=None)
def test_keys_come_back_one_by_one_in_hex_in_arrow_and_in_a_pickle(keys: list[bytes]) -> None:
    held = ContentKeys.of(keys)
    assert len(held) == len(keys)
    assert list(held) == [held[number] for number in range(len(keys))] == keys
    assert held.to_hex() == [key.hex() for key in keys]
    assert ContentKeys.from_hex(held.to_hex()) == held
    assert ContentKeys.from_column(pa.chunked_array([pa.array(keys, pa.binary(16))])) == held
    assert pickle.loads(pickle.dumps(held)) == held
    assert held.digest() == hashlib.blake2b(b"".join(keys), digest_size=16).hexdigest()


@given(KEYS, KEYS)
@settings(deadline=None)
def test_lookup_and_comparison_equal_those_of_lists(keys: list[bytes], wanted: list[bytes]) -> None:
    held, asked = ContentKeys.of(keys), ContentKeys.of([*wanted, *keys[:3]])
    assert held.find(asked).tolist() == [keys.index(key) if key in keys else -1 for key in asked]
    assert held.is_first().tolist() == [key not in keys[:number] for number, key in enumerate(keys)]
    assert (held == ContentKeys.of(wanted)) == (keys == wanted)
    assert list(ContentKeys.concatenate([held, asked])) == [*keys, *wanted, *keys[:3]]


def test_some_are_chosen_by_slice_by_numbers_and_by_a_mask() -> None:
    keys = [bytes([number]) + bytes(15) for number in range(5)]
    held = ContentKeys.of(keys)
    assert list(held[1:3]) == keys[1:3]
    assert list(held[np.array([4, 0, 4])]) == [keys[4], keys[0], keys[4]]
    assert list(held[np.array([True, False, True, False, False])]) == [keys[0], keys[2]]
    assert held[-1] == held[np.int64(4)] == keys[4]
    with pytest.raises(IndexError):
        held[5]


@pytest.mark.parametrize("line", ["", "ab", "00" * 15, "00" * 17, "zz" * 16])
def test_a_line_that_is_no_key_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"16|hexadecimal"):
        ContentKeys.from_hex(["00" * 16, line])


def test_the_key_of_a_sequence_depends_only_on_its_tokens_and_its_mask() -> None:
    tokens, mask = np.array([7, 8, 9], np.uint32), np.array([True, False, False])
    key = content_key(tokens, mask)
    described = (3).to_bytes(8, "little") + b"\7\0\0\0\x08\0\0\0\x09\0\0\0" + b"\x80"
    assert key == hashlib.blake2b(described, digest_size=16).digest()
    assert key == content_key(np.stack([tokens, tokens], axis=1)[:, 0], mask)
    assert key != content_key(tokens, np.array([True, True, False]))
    assert key != content_key(tokens[:2], mask[:2])
