"""`todi-cache export` and `import`: exported rows can be imported, and imported rows are checked."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.damage import contents_of
from support.fake_cache import VOCAB, sequence, settings, write_cache
from support.foreign_rows import DESCRIBED, plain_rows, write_rows
from support.stopping import StoppedError, stop_at
from support.tiny import tiny_tokenizer
from support.tools import run

from todi_offline.cache.check.verify import verify_cache
from todi_offline.cache.convert.describing import fewest_entries, imported_manifest
from todi_offline.cache.convert.export import MANIFEST_KEY
from todi_offline.cache.convert.importing import import_table
from todi_offline.cache.convert.tokenizer_files import read_tokenizer_files
from todi_offline.cache.format.fingerprint import tokenizer_fingerprint
from todi_offline.cache.format.layout import ENCODINGS, FORMAT_VERSION
from todi_offline.cache.reader import open_cache
from todi_offline.errors import CacheIncompleteError, CacheMismatchError, ConfigError, DataError, TargetsError


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("tail_samples", [0, 3])
def test_exported_rows_can_be_imported(tmp_path: Path, encoding: str, tail_samples: int) -> None:
    root = write_cache(tmp_path / "cache", encoding=encoding, tail_samples=tail_samples)
    assert "24 rows" in run("export", root, "--out", tmp_path / "out.parquet").output
    assert "24 sequences" in run("import", tmp_path / "out.parquet", "--out", tmp_path / "again").output
    assert "is whole" in run("verify", tmp_path / "again").output
    first, again = open_cache(root), open_cache(tmp_path / "again")
    assert again.manifest.teacher == first.manifest.teacher
    for mine, other in zip(first, again, strict=True):
        for name, values in mine.targets.arrays().items():
            np.testing.assert_array_equal(other.targets.arrays()[name], values)
    assert again.sequences["id"].equals(first.sequences["id"])
    assert list(tmp_path.glob("*.tmp")) == []


@pytest.mark.parametrize("name", ["f.csv", "f.jsonl", "f", "f.parquet.gz", "s3://bucket/f.parquet"])
def test_an_export_is_a_local_parquet_file_and_nothing_else(tmp_path: Path, name: str) -> None:
    root, out = write_cache(tmp_path / "cache"), name if "://" in name else str(tmp_path / name)
    with pytest.raises(ConfigError, match=r"is a URL" if "://" in name else r"does not end in \.parquet"):
        run("export", root, "--out", out)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_the_axolotl_layout_has_each_prediction_in_the_row_of_its_token(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    run("export", root, "--layout", "axolotl", "--out", tmp_path / "out.parquet")
    for row, cached in zip(pq.read_table(tmp_path / "out.parquet").to_pylist(), open_cache(root), strict=True):
        mask = np.array(row["target_mask"])
        assert mask.shape == (len(cached.token_ids), 6)
        np.testing.assert_array_equal(mask.any(axis=1), cached.target_mask)
        np.testing.assert_array_equal(np.array(row["target_token_ids"])[cached.target_mask], cached.targets.ids)
        np.testing.assert_array_equal(np.array(row["target_logprobs"])[cached.target_mask], cached.targets.logprobs)
        labels = np.array(row["labels"])
        shifted = np.append(labels[1:], -100)  # as its loss does
        np.testing.assert_array_equal(shifted[cached.target_mask], cached.token_ids[1:][cached.target_mask[:-1]])
        assert (shifted[~cached.target_mask] == -100).all()


@pytest.mark.parametrize("encoding", ["f16", "root8"])
def test_axolotl_gets_log_probs_at_its_own_temperature(tmp_path: Path, encoding: str) -> None:
    root = write_cache(tmp_path / "cache", k=VOCAB - 1, tail_samples=0, num_shards=1, per_shard=3, encoding=encoding)
    run("export", root, "--layout", "axolotl", "--temperature", 2, "--out", tmp_path / "out.parquet")
    for row, cached in zip(pq.read_table(tmp_path / "out.parquet").to_pylist(), open_cache(root), strict=True):
        found = np.array(row["target_logprobs"])[cached.target_mask]
        halved = cached.targets.logprobs / 2
        np.testing.assert_allclose(found - found[:, :1], halved - halved[:, :1], atol=1e-5)
        assert np.exp(found).sum(axis=1) == pytest.approx(1, abs=1e-3)  # all but one of the ids
    for options in (("--layout", "axolotl", "--temperature", 3), ("--temperature", 2)):
        with pytest.raises(TargetsError, match="log-probs at temperature"):
            run("export", root, *options, "--out", tmp_path / "none.parquet")
    assert not (tmp_path / "none.parquet").exists()


def with_label_beside(row: dict[str, Any], number: int, k: int) -> None:
    """Leave the label's entry beside the first k, as a serving engine gives it, and positions for a mask."""
    made = sequence(number, settings(k=VOCAB, temperatures=(1.0,), tail_samples=0))
    positions = np.flatnonzero(made.target_mask)
    labels = made.token_ids[positions + 1]
    shown = [list(range(k)) for _ in labels]
    for target, label in enumerate(labels):
        place = int(np.flatnonzero(made.targets.ids[target] == label)[0])
        shown[target] += [place] if place >= k else []
    row["target_ids"] = [made.targets.ids[target, places].tolist() for target, places in enumerate(shown)]
    row["target_logprobs"] = [made.targets.logprobs[target, places].tolist() for target, places in enumerate(shown)]
    row["positions"] = positions.tolist()
    del row["label_logprob"], row["target_mask"]


@pytest.mark.parametrize("has_tail", [False, True])
def test_a_label_beside_the_first_k_gives_its_log_prob_and_belongs_to_the_tail(tmp_path: Path, has_tail: bool) -> None:
    rows = plain_rows(range(5))
    for number, row in enumerate(rows):
        with_label_beside(row, number, 6)
        assert {len(ids) for ids in row["target_ids"]} == {6, 7}
        if has_tail:
            sums = [np.exp(np.float64(logprobs)).sum() for logprobs in row["target_logprobs"]]
            row["tail_logsumexp"] = np.log1p(-np.array(sums))[:, None].tolist()
    table = write_rows(tmp_path / "rows.parquet", rows)
    assert fewest_entries(table) == 6
    import_table(table, str(tmp_path / "cache"), DESCRIBED)
    assert "is whole" in run("verify", tmp_path / "cache").output
    for number, found in enumerate(open_cache(tmp_path / "cache")):
        made = sequence(number, settings(temperatures=(1.0,), tail_samples=0))
        np.testing.assert_array_equal(found.target_mask, made.target_mask)
        np.testing.assert_array_equal(found.targets.ids, made.targets.ids)
        np.testing.assert_allclose(found.targets.label_logprob, made.targets.label_logprob, atol=1e-5)
        np.testing.assert_allclose(found.targets.tail_logsumexp, made.targets.tail_logsumexp, atol=0.1)


def test_samples_alone_are_imported_with_k_0(tmp_path: Path) -> None:
    chosen = settings(k=0, temperatures=(1.0,))
    rows = plain_rows(range(2))
    for number, row in enumerate(rows):
        del row["target_ids"], row["target_logprobs"]
        targets = sequence(number, chosen).targets.arrays()
        row |= {name: targets[name].tolist() for name in ("tail_ids", "tail_logprobs")}
    table = write_rows(tmp_path / "rows.parquet", rows)
    described = imported_manifest(chosen, VOCAB, "elsewhere", {"vocabulary": "a"})
    import_table(table, str(tmp_path / "cache"), described)
    assert verify_cache(tmp_path / "cache") == []
    for number, found in enumerate(open_cache(tmp_path / "cache")):
        np.testing.assert_array_equal(found.targets.tail_ids, sequence(number, chosen).targets.tail_ids)
        np.testing.assert_array_equal(found.targets.tail_logsumexp, 0)  # all ids are in the tail
    with pytest.raises(DataError, match="lacks the columns target_ids, target_logprobs"):
        import_table(table, str(tmp_path / "none"), DESCRIBED)


def test_equal_entries_out_of_order_are_put_by_id(tmp_path: Path) -> None:
    (row,) = plain_rows(range(1))
    for ids, logprobs in zip(row["target_ids"], row["target_logprobs"], strict=True):
        logprobs[:] = [-3.0, -2.0, -2.0, -3.0, -3.0, -3.0]
        ids[:] = [9, 7, 5, 3, 2, 1]
    row["label_logprob"] = [-3.0] * len(row["target_ids"])
    import_table(write_rows(tmp_path / "rows.parquet", [row]), str(tmp_path / "cache"), DESCRIBED)
    assert (open_cache(tmp_path / "cache")[0].targets.ids == [5, 7, 1, 2, 3, 9]).all()


def test_a_stopped_import_resumes(tmp_path: Path) -> None:
    table = write_rows(tmp_path / "rows.parquet", plain_rows(range(90)))
    calls: list[tuple[int, int]] = []
    import_table(table, str(tmp_path / "whole"), DESCRIBED, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (180, 180)
    assert calls == sorted(calls)
    with pytest.raises(StoppedError):
        import_table(table, str(tmp_path / "cache"), DESCRIBED, progress=stop_at(91))
    with pytest.raises(CacheIncompleteError):
        open_cache(tmp_path / "cache")
    import_table(table, str(tmp_path / "cache"), DESCRIBED)
    assert contents_of(tmp_path / "cache") == contents_of(tmp_path / "whole")


def test_a_table_that_has_changed_since_is_not_taken_for_the_one_that_was_imported(tmp_path: Path) -> None:
    rows = plain_rows(range(2))
    import_table(write_rows(tmp_path / "rows.parquet", rows), str(tmp_path / "cache"), DESCRIBED)
    rows[0]["label_logprob"] = [value / 1.0001 for value in rows[0]["label_logprob"]]
    with pytest.raises(CacheMismatchError, match="holds other data"):
        import_table(write_rows(tmp_path / "rows.parquet", rows), str(tmp_path / "cache"), DESCRIBED)


def test_a_table_that_an_older_release_exported_becomes_a_cache_of_this_format(tmp_path: Path) -> None:
    run("export", write_cache(tmp_path / "cache"), "--out", tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    manifest = json.loads(metadata[MANIFEST_KEY]) | {"format_version": 1}
    pq.write_table(
        table.replace_schema_metadata(metadata | {MANIFEST_KEY: json.dumps(manifest)}), tmp_path / "old.parquet"
    )
    import_table(tmp_path / "old.parquet", str(tmp_path / "again"))
    assert open_cache(tmp_path / "again").manifest.format_version == FORMAT_VERSION
    assert verify_cache(tmp_path / "again") == []


def test_imported_targets_are_sorted_and_get_the_remaining_mass_as_tail(tmp_path: Path) -> None:
    table = write_rows(tmp_path / "rows.parquet", plain_rows(range(5)))
    import_table(table, str(tmp_path / "cache"), DESCRIBED)
    assert "is whole" in run("verify", tmp_path / "cache").output
    for number, found in enumerate(open_cache(tmp_path / "cache")):
        made = sequence(number, settings(temperatures=(1.0,), tail_samples=0))
        np.testing.assert_array_equal(found.targets.ids, made.targets.ids)
        np.testing.assert_allclose(found.targets.tail_logsumexp, made.targets.tail_logsumexp, atol=0.1)


def test_a_label_that_is_not_kept_needs_its_own_log_prob(tmp_path: Path) -> None:
    rows = plain_rows(range(3))
    for row in rows:
        del row["label_logprob"]
    with pytest.raises(DataError, match=r"lacks its label, .* and there is no column label_logprob"):
        import_table(write_rows(tmp_path / "rows.parquet", rows), str(tmp_path / "cache"), DESCRIBED)


def test_a_table_that_is_none_or_not_described_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"cannot read .* as Parquet"):
        import_table(tmp_path / "none.parquet", str(tmp_path / "cache"), DESCRIBED)
    table = write_rows(tmp_path / "rows.parquet", plain_rows(range(1)))
    with pytest.raises(DataError, match="has no manifest"):
        import_table(table, str(tmp_path / "cache"))
    two = imported_manifest(settings(tail_samples=0), VOCAB, "elsewhere", {})
    with pytest.raises(DataError, match="which the temperatures 1, 2 need"):
        import_table(table, str(tmp_path / "cache"), two)
    narrow = write_rows(tmp_path / "narrow.parquet", [{"input_ids": [1]}])
    with pytest.raises(DataError, match="lacks the columns target_mask, target_ids, target_logprobs"):
        import_table(narrow, str(tmp_path / "cache"), DESCRIBED)


def test_a_tokenizers_files_have_the_fingerprint_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(read_tokenizer_files(tmp_path)) == tokenizer_fingerprint(tokenizer)
    with pytest.raises(DataError, match="holds no tokenizer that can be read"):
        read_tokenizer_files(tmp_path / "nowhere")


def test_import_from_the_command_line_names_teacher_and_tokenizer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    table = write_rows(tmp_path / "rows.parquet", plain_rows(range(3)))
    described = ("--teacher", "my-70b", "--tokenizer", tmp_path / "tokenizer", "--k", 6)
    found = json.loads(run("import", table, *described, "--out", tmp_path / "cache", "--json").stdout)
    assert found["sequences"] == 3
    manifest = open_cache(tmp_path / "cache").manifest
    assert manifest.teacher == {"model_type": "imported", "name": "my-70b"}
    assert manifest.tokenizer == tokenizer_fingerprint(tokenizer)
